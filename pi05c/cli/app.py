"""What all commands share: the group that `pi05c` is, its options, and how they are read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

_SAMPLES = "--calibration"
"""The option that takes several words: `--calibration a.npz b.npz`."""

_CHECK = "--check"
"""The option that takes all words behind it: `--check polygraphy run {} --onnxrt`."""

_VERIFY_EACH = "--verify-each"
"""The option whose value may be left out: `--verify-each`, `--verify-each=numbers`."""


class _Group(TyperGroup):
    """Compiles where no command is named: `pi05c MODEL.onnx -o engine`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(self._with_command(list(args))))

    def _with_command(self, args: list[str]) -> list[str]:
        """`args` with the command in front: options that all commands share may precede it, `compile` may be left out."""
        shared = 0
        while shared < len(args) and args[shared] in SHARED_OPTIONS:
            shared += 1
        args = [*args[shared : shared + 1], *args[:shared], *args[shared + 1 :]]
        if not args or args[0] in self.commands or args[0] in _OWN_OPTIONS:
            return args
        names_model = args[0].endswith(".onnx") or Path(args[0]).exists()
        return ["compile", *args] if names_model or args[0].startswith("-") else args


_OWN_OPTIONS = ("--help", "-h", "--version", "--install-completion", "--show-completion")
SHARED_OPTIONS = ("--json", "--quiet", "-q", "--verbose", "-v", "--debug")


def spread(args: list[str]) -> list[str]:
    """Repeat `--calibration` before each further sample that follows it; let `--verify-each` stand without a value.

    What follows `--check` becomes one word; a single one may be a command line by itself.
    """
    args, command = _without_check(args)
    spread: list[str] = []
    listing = False
    for index, word in enumerate(args):
        if word == _VERIFY_EACH:
            word = f"{word}=structure"
        if listing and _is_samples(word, args[0]):
            spread.append(_SAMPLES)
        else:
            listing = index > 0 and args[index - 1] == _SAMPLES
        spread.append(word)
    return [*spread, *command]


def _without_check(args: list[str]) -> tuple[list[str], list[str]]:
    """The words before `--check`, and that option with its command."""
    if _CHECK not in args:
        return args, []
    place = args.index(_CHECK)
    words = args[place + 1 :]
    return args[:place], [_CHECK, *(words if len(words) < 2 else [shlex.join(words)])]


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
    str | None,
    typer.Option(
        help="GPUs to build for, such as sm120,sm89 or thor; the one at hand if none; cpu for inductor."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(help="tensorrt-rtx, tensorrt, inductor, or onnxruntime for a folder without a plan."),
]
Split = Annotated[
    str | None,
    typer.Option(help="One engine a part: vision,prefix,denoise; vision,prefix+denoise; vision+prefix,step."),
]
Steps = Annotated[
    int | None, typer.Option(help="Denoising steps, of a folder whose step is an engine of its own.")
]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds after which the builder is ended.")]
MaxError = Annotated[
    float | None, typer.Option(help="Largest relative L2 error that passes; exit 3 beyond it.")
]
Passes = Annotated[
    str | None,
    typer.Option(help="default, fp16, exact, none; `default,-pin_fp32`; `a,b{option=value}`."),
]
Plugin = Annotated[
    list[str] | None,
    typer.Option(help="A Python file, or an installed entry point, that brings further passes."),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        help="Samples: FILE.npz, a folder of them, or `synthetic` for made-up ones beside the model; for compile also a LeRobot dataset."
    ),
]
CalibrationMethod = Annotated[
    str,
    typer.Option(
        help="Where quantizers clip: max, percentile{percent=99.99}, mse, entropy; {steps=joint} for all steps."
    ),
]
Jobs = Annotated[int | None, typer.Option(help="Local processes that measure side by side.")]
Dask = Annotated[str | None, typer.Option(help="Address of a Dask scheduler whose workers measure.")]


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
    from pi05c.graph.requirements import refuse_unsupported

    refuse_unsupported()
