"""`pi05c run` and `pi05c verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pi05c.cli.app import Debug, Json, MaxError, Quiet, Steps, Verbose, app
from pi05c.cli.output import echo, make_progress, print_json, show_errors
from pi05c.graph.errors import VerificationError


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="An engine folder or an ONNX file.")],
    inputs: Annotated[Path, typer.Option(help="Samples (.npz): one, or many along a leading axis.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file of outputs to write.")],
    steps: Steps = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run an engine, else its graph in torch on a GPU, else in onnxruntime, saying which."""
    from pi05c.verification import run

    result = run(path, inputs, output, steps=steps, progress=make_progress(quiet, verbose))
    if json_:
        print_json({"ran": result.ran, "output": str(result.output), "samples": result.samples})
    elif not quiet:
        count = "one sample" if result.samples == 1 else f"{result.samples} samples"
        echo(f"{result.output}: {count}, by {result.ran}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An engine folder.")],
    samples: Annotated[
        Path | None, typer.Option(help="Inputs with reference outputs (.npz), instead of the folder's.")
    ] = None,
    max_error: MaxError = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Compare an engine, or its graph, with the float32 reference of its samples; exit 3 past the limit."""
    from pi05c.verification import verify

    verdict = verify(folder, samples=samples, max_error=max_error, progress=make_progress(quiet, verbose))
    if json_:
        print_json(
            {
                "passed": verdict.passed,
                "limit": verdict.limit,
                "simulated": verdict.simulated.as_json(),
                "measured": None if verdict.measured is None else verdict.measured.as_json(),
                "ran": verdict.ran,
                "why_not_measured": verdict.why_not_measured,
            }
        )
    elif not quiet:
        show_errors("simulated in onnxruntime", verdict.simulated)
        if verdict.measured is not None:
            show_errors(f"measured: {verdict.ran}", verdict.measured)
        if verdict.why_not_measured is not None:
            what = "on a GPU" if verdict.measured is None else "by its engine"
            echo(f"not measured {what}: {verdict.why_not_measured}")
    if not verdict.passed:
        worst = (verdict.measured or verdict.simulated).worst
        raise VerificationError(
            f"{worst.output} of sample {worst.sample} has a relative L2 error of {worst.relative_l2:.4g}, beyond the "
            f"limit of {verdict.limit:g}: do not deploy {folder}, or give the error that is acceptable as --max-error"
        )
    if not json_ and not quiet:
        echo(f"within the limit of {verdict.limit:g}")
