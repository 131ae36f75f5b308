"""`pi05c export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import CalibrationMethod, Debug, Json, Passes, Quiet, Verbose, app
from pi05c.cli.output import echo, make_progress, print_json
from pi05c.graph.errors import UsageError


class CalibrateWith(str, Enum):
    """Whose calibrators measure ranges when a model is exported."""

    MODELOPT = "modelopt"


@app.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of an openpi or LeRobot checkpoint.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights instead of a checkpoint.")] = False,
    config: Annotated[str | None, typer.Option(help="A named configuration or a config.json.")] = None,
    batch: Annotated[int, typer.Option(help="Observations at once.")] = 1,
    views: Annotated[int | None, typer.Option(help="Cameras.")] = None,
    prompt_length: Annotated[int | None, typer.Option(help="Text tokens, padding included.")] = None,
    horizon: Annotated[int | None, typer.Option(help="Actions in a chunk.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights and made-up samples.")] = 0,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Recorded samples (.npz) to leave beside the model.")
    ] = None,
    calibrate_with: Annotated[
        CalibrateWith | None,
        typer.Option(help="modelopt: measure ranges in torch at once, and keep them for `pi05c compile`."),
    ] = None,
    calibration_method: CalibrationMethod = "max",
    passes: Passes = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write the plain ONNX graph of a checkpoint, with what a robot needs beside the network."""
    if calibrate_with is None and (passes is not None or calibration_method != "max"):
        raise UsageError(
            "--passes and --calibration-method say what --calibrate-with measures: give that too"
        )
    from pi05c.frontend.export import export_model

    progress = make_progress(quiet, verbose)
    with progress.stage("export") as update:
        result = export_model(
            checkpoint,
            output,
            config=config,
            random=random,
            seed=seed,
            batch=batch,
            views=views,
            prompt_length=prompt_length,
            horizon=horizon,
            steps=steps,
            calibration=calibration or (),
            progress=lambda text: update(None, text),
        )
    measured = None
    if calibrate_with is not None:
        from pi05c.modelopt_calibration import calibrate_with_modelopt

        given = ("synthetic",) if result.synthetic else ()
        measured = calibrate_with_modelopt(
            result.model, passes, calibration=given, calibration_method=calibration_method, progress=progress
        )
    facts = {
        "model": str(result.model),
        "calibration": None if result.calibration is None else str(result.calibration),
        "synthetic": result.synthetic,
        "parameters": result.parameters,
        "bytes": result.nbytes,
        "seconds": round(result.seconds, 3),
        "ranges": None if measured is None else str(measured.file),
    }
    if json_:
        print_json(facts)
    elif not quiet:
        echo(f"{result.model}: {result.parameters:,} weights, {result.nbytes / 1e9:.3g} GB")
        if result.calibration is not None:
            kind = "made-up" if result.synthetic else "recorded"
            echo(f"{result.calibration}: {kind} samples for calibration")
        if measured is not None:
            echo(
                f"{measured.file}: ranges of {len(measured.ranges.low):,} tensors by ModelOpt's calibrators, on "
                f"{measured.samples} samples on {measured.device}"
            )
