"""The command line. Every command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pi05c.graph.errors import Pi05cError, UsageError, VerificationError

if TYPE_CHECKING:
    from pi05c.comparison import Comparison
    from pi05c.manifest import Manifest, PrecisionRecord
    from pi05c.progress import Progress

_SAMPLES = "--calibration"
"""The option that takes several words: `--calibration a.npz b.npz`."""

_SIGNAL_STATUS = 128
"""What a shell adds to the number of the signal that ended a command."""

_ENDING_SIGNALS = ("SIGTERM", "SIGHUP")
"""Signals that end a run as Ctrl-C does: scratch files go, the old engine stays. SIGHUP: the terminal was closed."""


class _Group(TyperGroup):
    """Compiles where no command is named: `pi05c MODEL.onnx -o engine`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _spread(self._with_command(list(args))))

    def _with_command(self, args: list[str]) -> list[str]:
        """`args` with the command in front: options that all commands share may precede it, `compile` may be left out."""
        shared = 0
        while shared < len(args) and args[shared] in _SHARED_OPTIONS:
            shared += 1
        args = [*args[shared : shared + 1], *args[:shared], *args[shared + 1 :]]
        if not args or args[0] in self.commands or args[0] in _OWN_OPTIONS:
            return args
        names_model = args[0].endswith(".onnx") or Path(args[0]).exists()
        return ["compile", *args] if names_model or args[0].startswith("-") else args


_OWN_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")
_SHARED_OPTIONS = ("--json", "--quiet", "-q", "--verbose", "-v", "--debug")


def _spread(args: list[str]) -> list[str]:
    """Repeat `--calibration` before each further sample that follows it."""
    spread: list[str] = []
    listing = False
    for index, word in enumerate(args):
        if listing and _is_samples(word, args[0]):
            spread.append(_SAMPLES)
        else:
            listing = index > 0 and args[index - 1] == _SAMPLES
        spread.append(word)
    return spread


def _is_samples(word: str, command: str) -> bool:
    """Whether a word that follows samples is samples too; the folder that `export` takes is its checkpoint."""
    return word.endswith(".npz") or (
        command == "compile" and not word.startswith("-") and Path(word).is_dir()
    )


app = typer.Typer(
    cls=_Group,
    subcommand_metavar="MODEL.onnx | COMMAND [ARGS]...",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile the pi0.5 robot policy into a TensorRT engine: `pi05c MODEL.onnx --passes default -o engine`.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log each stage with its time and memory.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Target = Annotated[
    str | None, typer.Option(help="GPUs to build for, such as sm120,sm89 or thor; the one at hand if none.")
]
Backend = Annotated[
    str | None,
    typer.Option(help="tensorrt-rtx, tensorrt, or onnxruntime for a folder without a plan."),
]
MaxError = Annotated[
    float | None, typer.Option(help="Largest relative L2 error that passes; exit 3 beyond it.")
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Samples: FILE.npz, a folder of them, or `synthetic` for made-up ones beside the model."
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"pi05c {version('pi05c')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    model: Annotated[Path, typer.Argument(help="The plain ONNX graph.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The engine folder to write.")],
    passes: Annotated[
        str,
        typer.Option(help="default, fp16, exact, none; `default,-pin_fp32`; `a,b{option=value}`."),
    ] = "default",
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
        calibration=calibration or (),
        target=target,
        backend=backend,
        max_error=max_error,
        progress=_progress(quiet, verbose),
        profiles=tuple(parse_profile(text) for text in shapes or ()),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        strip_weights=strip_weights,
        timing_cache=timing_cache,
        time_limit_s=time_limit,
        verbose=verbose,
    )
    if json_:
        _print_json(
            {
                "folder": str(result.folder),
                "seconds": result.seconds,
                **result.manifest.model_dump(mode="json"),
            }
        )
    elif not quiet:
        _show_compiled(result.folder, result.manifest)


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

    progress = _progress(quiet, verbose)
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
        _print_json(facts)
    elif not quiet:
        typer.echo(f"{result.model}: {result.parameters:,} weights, {result.nbytes / 1e9:.3g} GB")
        if result.calibration is not None:
            kind = "made-up" if result.synthetic else "recorded"
            typer.echo(f"{result.calibration}: {kind} samples for calibration")


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
        progress=_progress(quiet, verbose),
    )
    if json_:
        _print_json({"folder": str(folder), **manifest.model_dump(mode="json")})
    elif not quiet:
        typer.echo(_engine_line(folder, manifest))


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="An engine folder or an ONNX file.")],
    inputs: Annotated[Path, typer.Option(help="Samples (.npz): one, or many along a leading axis.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file of outputs to write.")],
    json_: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Run an engine on its GPU, else its graph in onnxruntime, saying which."""
    from pi05c.verification import run

    result = run(path, inputs, output, progress=_progress(quiet, verbose))
    if json_:
        _print_json({"ran": result.ran, "output": str(result.output), "samples": result.samples})
    elif not quiet:
        count = "one sample" if result.samples == 1 else f"{result.samples} samples"
        typer.echo(f"{result.output}: {count}, by {result.ran}")


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

    verdict = verify(folder, samples=samples, max_error=max_error, progress=_progress(quiet, verbose))
    if json_:
        _print_json(
            {
                "passed": verdict.passed,
                "limit": verdict.limit,
                "simulated": verdict.simulated.as_json(),
                "measured": None if verdict.measured is None else verdict.measured.as_json(),
                "why_not_measured": verdict.why_not_measured,
            }
        )
    elif not quiet:
        _show_errors("simulated in onnxruntime", verdict.simulated)
        if verdict.measured is not None:
            _show_errors("measured on the GPU", verdict.measured)
        else:
            typer.echo(f"not measured on a GPU: {verdict.why_not_measured}")
    if not verdict.passed:
        worst = (verdict.measured or verdict.simulated).worst
        raise VerificationError(
            f"{worst.output} of sample {worst.sample} has a relative L2 error of {worst.relative_l2:.4g}, beyond the "
            f"limit of {verdict.limit:g}: do not deploy {folder}, or give the error that is acceptable as --max-error"
        )
    if not json_ and not quiet:
        typer.echo(f"within the limit of {verdict.limit:g}")


@app.command("passes")
def passes_command(json_: Json = False, debug: Debug = False) -> None:
    """List the passes in default order, with their options."""
    from pi05c.passes import PRESETS, REGISTRY

    order = list(dict.fromkeys([*PRESETS["default"], *REGISTRY]))
    if json_:
        _print_json({"passes": [_described(name) for name in order], "presets": PRESETS})
        return
    from rich.table import Table

    table = Table("pass", "exact", "what it does", "options", box=None, padding=(0, 2, 0, 0))
    for name in order:
        facts = _described(name)
        options = "\n".join(f"{option['name']}={option['default']}" for option in facts["options"])
        table.add_row(name, "yes" if facts["exact"] else "no", facts["summary"], options)
    console = _console()
    console.print(table)
    for preset, members in PRESETS.items():
        console.print(f"{preset}: {', '.join(members) or 'nothing'}", markup=False)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An engine folder or an ONNX file.")],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Show inputs, outputs, precision by part, sizes, pipeline and provenance."""
    from pi05c.inspection import inspect

    found = inspect(path)
    if json_:
        _print_json(found.as_json())
        return
    console = _console()
    console.print(f"{path}: opset {found.opset}, {found.nodes:,} nodes", markup=False)
    for role, records in (("input", found.inputs), ("output", found.outputs)):
        for record in records:
            shape = ",".join(map(str, record.shape))
            console.print(f"  {role:6} {record.name}: {record.dtype}[{shape}]", markup=False)
    for total in found.weights:
        console.print(
            f"  {total.tensors:,} weights in {total.dtype}: {total.bytes / 1e6:,.1f} MB", markup=False
        )
    _show_precision(found.precision)
    source = found.source
    if source.config is not None:
        console.print(f"config: {json.dumps(source.config)}", markup=False)
    if source.weights_random is not None:
        console.print(f"weights: {'random' if source.weights_random else 'from a checkpoint'}")
    if source.robot is not None:
        console.print(f"robot: {json.dumps(source.robot)}", markup=False)
    if found.manifest is not None:
        console.print(f"pipeline: {found.manifest.pipeline.resolved or 'none'}", markup=False)
        console.print(_engine_line(path, found.manifest), markup=False)
    for name, size in found.files.items():
        console.print(f"  {name}: {size:,} bytes", markup=False)


def _described(name: str) -> dict[str, Any]:
    from pi05c.passes import REGISTRY

    spec = REGISTRY[name]
    return {
        "name": name,
        "summary": spec.summary,
        "exact": spec.exact,
        "after": list(spec.after),
        "min_opset": spec.min_opset,
        "needs_ranges": spec.ranges is not None and not spec.ranges_optional,
        "formats": list(spec.formats),
        "options": [
            {"name": key, "type": str(parameter.annotation), "default": parameter.default}
            for key, parameter in spec.options.items()
        ],
    }


def _show_compiled(folder: Path, manifest: Manifest) -> None:
    from rich.table import Table

    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("pass")
    for title in ("changed", "skipped", "nodes", "seconds"):
        table.add_column(title, justify="right")
    for record in manifest.pipeline.passes:
        table.add_row(
            record.name,
            str(record.changed),
            str(len(record.skipped)),
            str(record.nodes_after),
            f"{record.seconds:.2f}",
        )
    console.print(table)
    console.print()
    _show_precision(manifest.precision)
    if manifest.calibration is not None:
        used = manifest.calibration
        kind = "made-up samples" if used.synthetic else "samples"
        console.print(f"\ncalibrated on {used.used} {kind} of {used.source}", markup=False)
    if manifest.verification is not None:
        worst = manifest.verification.worst()
        ratio = "equal" if worst.sqnr_db is None else f"{worst.sqnr_db:.1f} dB"
        console.print(
            f"fidelity of {worst.output} on held-back samples, worst: relative L2 {worst.relative_l2:.4g} "
            f"(limit {manifest.verification.limit:g}), cosine {worst.cosine:.6f}, SQNR {ratio}, "
            f"max abs {worst.max_abs:.3g}",
            markup=False,
        )
    console.print(_engine_line(folder, manifest), markup=False)


def _show_precision(records: Sequence[PrecisionRecord]) -> None:
    from rich.table import Table

    dtypes = list(dict.fromkeys(record.dtype for record in records))
    if not dtypes:
        return
    table = Table("part", "operators", box=None, padding=(0, 2, 0, 0))
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for record in records:
        rows.setdefault((record.part, record.kind), {})[record.dtype] = record.count
    for (part, kind), counts in rows.items():
        table.add_row(part, kind, *(str(counts.get(dtype, "")) for dtype in dtypes))
    _console().print(table)


def _show_errors(title: str, comparison: Comparison) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), title=title, title_justify="left")
    for name in ("sample", "output", "relative L2", "cosine", "SQNR dB", "max abs"):
        table.add_column(name, justify="left" if name == "output" else "right")
    for error in comparison.errors:
        table.add_row(
            str(error.sample),
            error.output,
            f"{error.relative_l2:.4g}",
            f"{error.cosine:.6f}",
            f"{error.sqnr_db:.1f}",
            f"{error.max_abs:.3g}",
        )
    _console().print(table)


def _engine_line(folder: Path, manifest: Manifest) -> str:
    engine = manifest.engine
    if engine.file is None:
        return f"{folder}: no plan ({engine.reason})"
    size = manifest.files[engine.file].bytes / 1e6
    seconds = "" if engine.seconds is None else f", built in {engine.seconds:.1f} s"
    return f"{folder / engine.file}: {size:,.1f} MB for {', '.join(engine.targets)}{seconds}"


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, default=str, allow_nan=False))


def _progress(quiet: bool, verbose: bool) -> Progress:
    from pi05c.progress import Progress, StderrProgress

    return Progress() if quiet else StderrProgress(verbose=verbose)


class _Ended(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.status = _SIGNAL_STATUS + number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn signals that end a process at once into an exception, so that what is half done is put away."""
    numbers = [getattr(signal, name) for name in _ENDING_SIGNALS if hasattr(signal, name)]

    def end(number: int, _frame: object) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line in the main thread and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    completing = "_PI05C_COMPLETE" in os.environ
    try:
        with _ended_by_signals():
            status = app(
                args=arguments if arguments or completing else ["--help"],
                prog_name="pi05c",
                standalone_mode=False,
            )
        if status == _SIGNAL_STATUS + signal.SIGINT:
            print("interrupted", file=sys.stderr)
        return int(status or 0) if arguments else UsageError.exit_code
    except (_Ended, KeyboardInterrupt) as error:
        print("interrupted", file=sys.stderr)
        return error.status if isinstance(error, _Ended) else _SIGNAL_STATUS + signal.SIGINT
    except Exception as error:
        message, status = _explained(error)
        if "--debug" in arguments:
            import traceback

            traceback.print_exception(error)
        print(f"error: {_printable(message)}", file=sys.stderr)
        return status


def _explained(error: Exception) -> tuple[str, int]:
    """One sentence for an error, and the exit status."""
    if isinstance(error, Pi05cError):
        return str(error), error.exit_code
    if any(
        kind.__name__ == "ClickException" for kind in type(error).__mro__
    ):  # of click, or of typer's copy of it
        message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
        context = getattr(error, "ctx", None)
        command = "pi05c" if context is None else context.command_path
        return f"{message[:1].lower()}{message[1:]} (see {command} --help)", UsageError.exit_code
    if isinstance(error, MemoryError):
        return "memory ran out: use a machine with more, or end other programs", Pi05cError.exit_code
    kind = type(error).__name__
    defect = f"pi05c has a defect ({kind}: {error}): run again with --debug and report the traceback"
    return defect, Pi05cError.exit_code


def _printable(text: str) -> str:
    """A message without control characters, which names of tensors and files may hold."""
    return "".join(character if character.isprintable() else " " for character in text)


__all__ = ["app", "main"]
