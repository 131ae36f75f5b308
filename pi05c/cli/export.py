"""`pi05c export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Debug, Json, Quiet, Verbose, app
from pi05c.cli.output import make_progress, print_json


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
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Write the plain ONNX graph of a checkpoint, with what a robot needs beside the network."""
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
    facts = {
        "model": str(result.model),
        "calibration": None if result.calibration is None else str(result.calibration),
        "synthetic": result.synthetic,
        "parameters": result.parameters,
        "bytes": result.nbytes,
        "seconds": round(result.seconds, 3),
    }
    if json_:
        print_json(facts)
    elif not quiet:
        typer.echo(f"{result.model}: {result.parameters:,} weights, {result.nbytes / 1e9:.3g} GB")
        if result.calibration is not None:
            kind = "made-up" if result.synthetic else "recorded"
            typer.echo(f"{result.calibration}: {kind} samples for calibration")
