"""`pi05c extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Calibration, Debug, Json, Quiet, Verbose, app
from pi05c.cli.output import echo, make_progress, print_json


@app.command()
def extract(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph.")],
    part: Annotated[
        str,
        typer.Option(
            help="vision, prefix, denoise, step (one denoising step), or neighbours like prefix+denoise."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    calibration: Calibration = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write the plain graph of one part, with what earlier parts hand over as inputs."""
    from pi05c.extraction import extract_part

    result = extract_part(
        model, part, output, calibration=calibration or (), progress=make_progress(quiet, verbose)
    )
    if json_:
        print_json(
            {
                "model": str(result.model),
                "table": None if result.table is None else str(result.table),
                "calibration": None if result.calibration is None else str(result.calibration),
                "inputs": [record.model_dump(mode="json") for record in result.inputs],
                "outputs": [record.model_dump(mode="json") for record in result.outputs],
            }
        )
    elif not quiet:
        echo(
            f"{result.model}: {len(result.inputs)} inputs, {len(result.outputs)} outputs, float32 as exported"
        )
        if result.table is not None:
            echo(f"{result.table}: makes step_row, for any number of steps")
        if result.calibration is not None:
            echo(f"{result.calibration}: samples for calibration, by the parts before it")
