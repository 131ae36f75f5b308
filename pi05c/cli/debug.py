"""`pi05c debug`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Calibration, Debug, Plugin, app
from pi05c.cli.output import echo

_SCRIPT = Path("pi05c_samples.py")


@app.command("debug", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def debug_command(
    context: typer.Context,
    pass_: Annotated[
        str, typer.Argument(metavar="PASS", help="One pass, with options: `fold_norms{option=value}`.")
    ],
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph, or a dumped stage.")],
    calibration: Calibration = None,
    plugin: Plugin = None,
    debug: Debug = False,
) -> None:
    """Compare a graph without and with one pass in Polygraphy: prints the command and runs it.

    What stands behind MODEL and is not known here goes to `polygraphy run`. The exit status is Polygraphy's. Where there
    are samples, the script that loads them is written to pi05c_samples.py.
    """
    from polygraphy.tools import main as polygraphy

    from pi05c.graph.errors import Pi05cError, UsageError
    from pi05c.graph.files import read_text
    from pi05c.graph.io import load
    from pi05c.plugins import parse_passes
    from pi05c.polygraphy.samples import write_data_loader
    from pi05c.samples import find_samples

    if len(parse_passes(pass_, plugin or ())) != 1:
        raise UsageError(f"{pass_!r} is not one pass: name one, or use polygraphy run with --pi05c-passes")
    words = ["run", str(model), "--onnxrt", "--pi05c", "--pi05c-passes", pass_]
    for option, values in (("--pi05c-plugin", plugin), ("--pi05c-calibration", calibration)):
        words += [option, *values] if values else []
    found = find_samples(load(model), calibration or ())
    if found is not None and "--data-loader-script" not in context.args:
        if _SCRIPT.exists() and "from pi05c.polygraphy import" not in read_text(_SCRIPT):
            raise Pi05cError(
                f"{_SCRIPT} is here already and not by pi05c: give --data-loader-script FILE.py, which pi05c "
                "data-loader writes"
            )
        write_data_loader(_SCRIPT, model, calibration or ())
        words += ["--data-loader-script", str(_SCRIPT)]
    words += context.args
    echo(shlex.join(["polygraphy", *words]))
    raise typer.Exit(int(polygraphy(words) or 0))
