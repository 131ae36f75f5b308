"""`pi05c tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi05c.cli.app import (
    Calibration,
    CalibrationMethod,
    Dask,
    Debug,
    Jobs,
    Json,
    Passes,
    Plugin,
    Quiet,
    Verbose,
    app,
)
from pi05c.cli.output import console, make_progress, plain_table, print_json

if TYPE_CHECKING:
    from pi05c.tuning import TuneResult


@app.command()
def tune(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="The plain graph.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The recipe to write, NAME.toml; NAME.html goes beside it.")
    ],
    passes: Passes = None,
    plugin: Plugin = None,
    calibration: Calibration = None,
    calibration_method: CalibrationMethod = "max",
    formats: Annotated[
        str | None,
        typer.Option(
            help="What to choose among beside float16: fp8, nvfp4, each with _two_terms behind it, nvfp4_w4a16; several with "
            "commas. FP8 if none, and NVFP4 where --target has it."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The GPU whose roofline counts, such as rtx5090 or thor; sm120 if none."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Largest relative L2 error that the choice may have; what compile allows FP8 if none."
        ),
    ] = None,
    minimize: Annotated[
        str,
        typer.Option(
            help="time on the GPU, bytes of weights that a run has to read, or bytes stored: time, read, stored."
        ),
    ] = "time",
    samples: Annotated[int, typer.Option(help="Calibration samples to run for each choice, at most.")] = 4,
    resolution: Annotated[
        int | None, typer.Option(help="Groups of layers of each part, at most: fewer take less time.")
    ] = None,
    jobs: Jobs = None,
    dask: Dask = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Measure what each group of layers costs in error, and choose formats under --max-error: --passes @NAME.toml uses them.

    A run that was interrupted goes on from NAME.measurements.json.
    """
    from pi05c.tuning import tune

    result = tune(
        model,
        output,
        passes=passes,
        calibration=calibration or (),
        calibration_method=calibration_method,
        formats=None if formats is None else [each.strip() for each in formats.split(",")],
        target=target,
        max_error=max_error,
        minimize=minimize,
        samples=samples,
        resolution=resolution,
        plugins=plugin or (),
        jobs=jobs,
        dask=dask,
        progress=make_progress(quiet, verbose),
    )
    if json_:
        print_json(result.as_json())
    elif not quiet:
        _show(result)


def _show(result: TuneResult) -> None:
    from pi05c.tunegroups import KEPT
    from pi05c.tunereport import UNITS

    screen = console(160)
    scale, unit = UNITS[result.minimize]
    formats = list(dict.fromkeys(each for group in result.groups for each in group.formats))
    columns = [(f"error in {each}", f"saves, {unit}") for each in formats]
    table = plain_table("group", figures=[title for pair in columns for title in pair])
    table.add_column("chosen")
    for group in result.groups:
        cells: list[str] = []
        for each in formats:
            effect = result.effects[group.name].get(each)
            cells += (
                ["", ""] if effect is None else [f"{effect.error**0.5:.4f}", f"{-effect.cost / scale:,.3f}"]
            )
        chosen = result.chosen.choice[group.name]
        table.add_row(group.name, *cells, "float16" if chosen == KEPT else chosen)
    screen.print(table)
    table = plain_table("", figures=("predicted", "error", "held back", "weights MB", "floor ms"))
    for point in result.points:
        if point.kind in ("naive", "chosen"):
            held_back = "" if point.held_back is None else f"{point.held_back.worst:.4f}"
            table.add_row(
                point.name,
                f"{point.predicted:.4f}",
                f"{point.tuned.worst:.4f}",
                held_back,
                f"{point.tuned.stored / 1e6:,.2f}",
                f"{1e3 * point.tuned.floors[result.device.name]:,.4f}",
            )
    screen.print(table)
    screen.print(
        f"{result.recipe}: within {result.limit:g}; floors are those of {result.device.product}; "
        f"{result.measured} measurements, {result.reused} of an earlier run; {result.page} shows them",
        markup=False,
    )
