"""`pi05c compile` and `pi05c build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pi05c.cli.app import Backend, Calibration, Debug, Json, MaxError, Quiet, Target, Verbose, app
from pi05c.cli.output import console, engine_lines, make_progress, print_json, show_precision

if TYPE_CHECKING:
    from pi05c.manifest import Manifest


@app.command("compile")
def compile_command(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine folder to write.")],
    passes: Annotated[
        str,
        typer.Option(help="default, fp16, exact, none; `default,-pin_fp32`; `a,b{option=value}`."),
    ] = "default",
    split: Annotated[
        str | None,
        typer.Option(
            help="One engine a part: vision,prefix,denoise; vision,prefix+denoise; vision+prefix,step."
        ),
    ] = None,
    calibration: Calibration = None,
    target: Target = None,
    backend: Backend = None,
    max_error: MaxError = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help="NAME=MIN:OPT:MAX with sizes like 1x3, for each dynamic input.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option(help="The plan runs on later minor releases of the builder too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option(help="The plan runs on other GPUs from Ampere on (TensorRT only).")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option(help="Leave the weights out of the plan (needs a GPU).")
    ] = False,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings to reuse and extend (TensorRT only).")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which the builder is ended.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Rewrite a graph by an ordered list of passes, verify it, and build its engine."""
    from pi05c.building import parse_profile
    from pi05c.compilation import compile

    result = compile(
        model,
        output,
        passes=passes,
        split=split,
        calibration=calibration or (),
        target=target,
        backend=backend,
        max_error=max_error,
        progress=make_progress(quiet, verbose),
        profiles=tuple(parse_profile(text) for text in shapes or ()),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        time_limit_s=time_limit,
        verbose=verbose,
    )
    if json_:
        print_json(
            {
                "folder": str(result.folder),
                "seconds": result.seconds,
                **result.manifest.model_dump(mode="json"),
            }
        )
    elif not quiet:
        _show_compiled(result.folder, result.manifest)


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="An engine folder.")],
    target: Target = None,
    backend: Annotated[
        str | None, typer.Option(help="tensorrt-rtx or tensorrt, instead of the one in the manifest.")
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds after which the builder is ended.")
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make the plan of an engine folder here, from its graph and manifest."""
    from pi05c.building import build

    manifest = build(
        folder,
        target=target,
        backend=backend,
        time_limit_s=time_limit,
        verbose=verbose,
        progress=make_progress(quiet, verbose),
    )
    if json_:
        print_json({"folder": str(folder), **manifest.model_dump(mode="json")})
    elif not quiet:
        for line in engine_lines(folder, manifest):
            typer.echo(line)


def _show_compiled(folder: Path, manifest: Manifest) -> None:
    from rich.table import Table

    screen = console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    if manifest.parts:
        table.add_column("part")
    table.add_column("pass")
    for title in ("changed", "skipped", "nodes", "seconds"):
        table.add_column(title, justify="right")
    places = [([part.name], part.pipeline) for part in manifest.parts] or [([], manifest.pipeline)]
    for place, record in [(place, record) for place, pipeline in places for record in pipeline.passes]:
        table.add_row(
            *place,
            record.name,
            str(record.changed),
            str(len(record.skipped)),
            str(record.nodes_after),
            f"{record.seconds:.2f}",
        )
    screen.print(table)
    screen.print()
    show_precision(manifest.precision)
    if manifest.calibration is not None:
        used = manifest.calibration
        kind = "made-up samples" if used.synthetic else "samples"
        screen.print(f"\ncalibrated on {used.used} {kind} of {used.source}", markup=False)
    for part in manifest.parts:
        for output in dict.fromkeys(error.output for error in part.errors):
            errors = [error.relative_l2 for error in part.errors if error.output == output]
            screen.print(f"{part.name} hands over {output}: relative L2 {max(errors):.4g}", markup=False)
    if manifest.verification is not None:
        worst = manifest.verification.worst()
        ratio = "equal" if worst.sqnr_db is None else f"{worst.sqnr_db:.1f} dB"
        screen.print(
            f"fidelity of {worst.output} on held-back samples, worst: relative L2 {worst.relative_l2:.4g} "
            f"(limit {manifest.verification.limit:g}), cosine {worst.cosine:.6f}, SQNR {ratio}, "
            f"max abs {worst.max_abs:.3g}",
            markup=False,
        )
    for line in engine_lines(folder, manifest):
        screen.print(line, markup=False)
