"""`pi05c data-loader`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Calibration, Debug, Json, Quiet, app
from pi05c.cli.output import echo, print_json


@app.command("data-loader")
def data_loader(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph, or a dumped stage.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Python file to write.")],
    calibration: Calibration = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All samples; else those held back from calibration.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a script that gives Polygraphy the samples: `polygraphy run ... --data-loader-script FILE.py`."""
    from pi05c.polygraphy.samples import write_data_loader

    samples = write_data_loader(output, model, calibration or (), everything=everything)
    if json_:
        print_json(
            {
                "script": str(output),
                "samples": len(samples),
                "source": samples.source,
                "synthetic": samples.synthetic,
            }
        )
    elif not quiet:
        kind = "made-up samples" if samples.synthetic else "samples"
        echo(f"{output}: {len(samples)} {kind} of {samples.source}")
