"""`pi05c compile` and `pi05c build`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pi05c.cli.app import (
    Backend,
    Calibration,
    CalibrationMethod,
    Dask,
    Debug,
    Jobs,
    Json,
    MaxError,
    Passes,
    Plugin,
    Quiet,
    Split,
    Target,
    TimeLimit,
    Verbose,
    app,
)
from pi05c.cli.output import (
    console,
    echo,
    engine_lines,
    make_progress,
    plain_table,
    print_json,
    show_precision,
)
from pi05c.cli.samples import Camera, Frames, FromDataset, Preprocess, Tokenizer, given_samples
from pi05c.graph.errors import UsageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from pi05c.manifest import Manifest
    from pi05c.passrun import RunOptions
    from pi05c.progress import Progress


class VerifyEach(str, Enum):
    """What is checked after each pass."""

    STRUCTURE = "structure"
    NUMBERS = "numbers"


_CHECKS: dict[VerifyEach, Literal["structure", "numbers"]] = {
    VerifyEach.STRUCTURE: "structure",
    VerifyEach.NUMBERS: "numbers",
}


@app.command("compile")
def compile_command(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The engine folder to write; not needed where passes are only looked at."
        ),
    ] = None,
    passes: Passes = None,
    split: Split = None,
    calibration: Calibration = None,
    calibration_method: CalibrationMethod = "max",
    tokenizer: Tokenizer = None,
    camera: Camera = None,
    frames: Frames = None,
    preprocess: Preprocess = None,
    jobs: Jobs = None,
    dask: Dask = None,
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
    max_autotune: Annotated[
        bool, typer.Option("--max-autotune", help="Time several kernels for each product (inductor only).")
    ] = False,
    time_limit: TimeLimit = None,
    plugin: Plugin = None,
    dump: Annotated[
        Path | None, typer.Option(help="Folder that gets the graph before the first pass and after each.")
    ] = None,
    print_after: Annotated[
        str | None,
        typer.Option(help="Print the graph after a pass: its name, `changed` or `all`."),
    ] = None,
    verify_each: Annotated[
        VerifyEach | None,
        typer.Option(
            help="Check the graph after each pass; `--verify-each=numbers` runs it, too, against the one before."
        ),
    ] = None,
    rewrite_limit: Annotated[
        list[str] | None,
        typer.Option(help="NAME=N, or N for every pass: stop it after its first N rewrites."),
    ] = None,
    stop_after: Annotated[
        str | None, typer.Option(help="The last pass to run, by name or as 03-name.")
    ] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A file that --dump wrote: the passes behind it run.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option(help="Start from the beginning: forget what a run that ended early had finished.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Rewrite a graph by an ordered list of passes, verify it, and build its engine."""
    from pi05c.building import parse_profile
    from pi05c.compilation import compile
    from pi05c.executors import executor_for
    from pi05c.passrun import RunOptions
    from pi05c.samples import on_disk

    options = RunOptions(
        plugins=tuple(plugin or ()),
        rewrite_limit=tuple(rewrite_limit or ()),
        stop_after=stop_after,
        start_from=start_from,
        dump=dump,
        print_after=print_after,
        verify_each=None if verify_each is None else _CHECKS[verify_each],
    )
    progress = make_progress(quiet, verbose)
    dataset = FromDataset(tokenizer, camera, frames, preprocess)
    given = given_samples(model, calibration or (), dataset, progress)
    if output is None:
        if split is not None or (dump is None and print_after is None and verify_each is None):
            raise UsageError(
                "give '--output' (-o), the engine folder, or look at the passes alone with --dump, --print-after or "
                "--verify-each (of a part: pi05c extract it first)"
            )
        scratch = Path(tempfile.gettempdir())
        with executor_for(jobs=jobs, dask=dask) as executor, on_disk(given, scratch) as found:
            _run_passes(
                model,
                passes,
                options,
                found,
                calibration_method,
                target,
                progress,
                executor,
                json_,
                quiet,
            )
        return
    with executor_for(jobs=jobs, dask=dask) as executor:
        result = compile(
            model,
            output,
            passes=passes,
            split=split,
            calibration=given,
            calibration_method=calibration_method,
            target=target,
            backend=backend,
            max_error=max_error,
            fresh=fresh,
            progress=progress,
            options=options,
            executor=executor,
            profiles=tuple(parse_profile(text) for text in shapes or ()),
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            strip_weights=strip_weights,
            timing_cache=timing_cache,
            max_autotune=max_autotune,
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
        str | None,
        typer.Option(help="tensorrt-rtx, tensorrt or inductor, instead of the one in the manifest."),
    ] = None,
    time_limit: TimeLimit = None,
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
            echo(line)


def _run_passes(
    model: Path,
    passes: str | None,
    options: RunOptions,
    calibration: Sequence[str | Path],
    calibration_method: str,
    target: str | None,
    progress: Progress,
    executor: Executor | None,
    json_: bool,
    quiet: bool,
) -> None:
    """Run passes without making an engine folder, and show what each did."""
    from pi05c.passrun import run_passes

    run = run_passes(
        model,
        passes,
        options,
        calibration=calibration,
        calibration_method=calibration_method,
        target=target,
        progress=progress,
        executor=executor,
    )
    if json_:
        print_json(
            {
                "passes": [
                    {
                        "name": result.step.spec.name,
                        "changed": len(result.changes),
                        "rewrites": len(result.rewrites),
                        "skipped": [vars(skip) for skip in result.skips],
                        "notes": list(result.notes),
                        "seconds": result.seconds,
                        "nodes_before": result.nodes_before,
                        "nodes_after": result.nodes_after,
                        "moved": run.errors[index].comparison.as_json()["worst"] if run.errors else None,
                    }
                    for index, result in enumerate(run.results)
                ],
                "stages": [str(path) for path in (run.stages or {}).values()],
            }
        )
    elif not quiet:
        moved = ["moved by"] if run.errors else []
        table = plain_table("pass", figures=("rewrites", "skipped", "nodes", "seconds", *moved))
        for index, result in enumerate(run.results):
            table.add_row(
                result.step.text,
                str(len(result.rewrites)),
                str(len(result.skips)),
                str(result.nodes_after),
                f"{result.seconds:.2f}",
                *([f"{run.errors[index].comparison.worst.relative_l2:.4g}"] if run.errors else []),
            )
        console().print(table)
        if run.stages:
            echo(f"{len(run.stages)} stages in {options.dump}")


def _show_compiled(folder: Path, manifest: Manifest) -> None:
    screen = console()
    places = [([part.name], part.pipeline) for part in manifest.parts] or [([], manifest.pipeline)]
    measured = any(record.moved is not None for _, pipeline in places for record in pipeline.passes)
    table = plain_table(
        *(["part"] if manifest.parts else []),
        "pass",
        figures=("changed", "skipped", "nodes", "seconds", *(["moved by"] if measured else [])),
    )
    for place, record in [(place, record) for place, pipeline in places for record in pipeline.passes]:
        table.add_row(
            *place,
            record.name,
            str(record.changed),
            str(len(record.skipped)),
            str(record.nodes_after),
            f"{record.seconds:.2f}",
            *([f"{record.moved:.4g}"] if record.moved is not None else []),
        )
    screen.print(table)
    screen.print()
    show_precision(manifest.precision)
    if manifest.calibration is not None:
        used = manifest.calibration
        kind = "made-up samples" if used.synthetic else "samples"
        how = "" if used.method == "max" else f" by {used.method}"
        screen.print(f"\ncalibrated{how} on {used.used} {kind} of {used.source}", markup=False)
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
