"""The process: arguments, signals, exit status."""

from __future__ import annotations

import contextlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pi05c.cli.app import SHARED_OPTIONS, app
from pi05c.cli.truncation import truncation_explained
from pi05c.graph.errors import Pi05cError, UsageError, unwritable
from pi05c.terminal import printable

_SIGNAL_STATUS = 128
"""What a shell adds to the number of the signal that ended a command."""

_ENDING_SIGNALS = ("SIGTERM", "SIGHUP")
"""Signals that end a run as Ctrl-C does: scratch files go, the old engine stays. SIGHUP: the terminal was closed."""


_SAME_S = 1.0
"""A Ctrl-C so soon after another, or after a signal, is the same one, which a terminal and a parent process both passed on:
it must not keep what is half done from being put away."""

_COMPARING = ("diff", "golden", "bisect")
"""Commands whose exit status is that of `diff`: 0 the same, 1 different, 2 anything that kept them from telling."""

_TROUBLE = 2

_NARROWEST, _WIDEST = 20, 1000
"""Between these, what COLUMNS says of a terminal is believed."""

_MESSAGE_CHARACTERS = 4000
"""What is beyond that is cut out of the middle of a message."""


class _Ended(BaseException):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.status = _SIGNAL_STATUS + number


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn signals that end a process at once into an exception, so that what is half done is put away."""
    numbers = [getattr(signal, name) for name in _ENDING_SIGNALS if hasattr(signal, name)]
    ended = -math.inf

    def end(number: int, _frame: object) -> None:
        nonlocal ended
        ended = time.monotonic()
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise _Ended(number)

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal ended
        if (now := time.monotonic()) - ended > _SAME_S:
            ended = now
            raise KeyboardInterrupt

    before = {number: signal.signal(number, end) for number in numbers}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line in the main thread and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _repair_streams()
    completing = "_PI05C_COMPLETE" in os.environ
    try:
        with _ended_by_signals(), truncation_explained(_status(arguments, Pi05cError.exit_code)):
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
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # who read the output has gone, which is no error
            return _SIGNAL_STATUS + signal.SIGPIPE
        raise
    except Exception as error:
        message, status = _explained(error)
        if "--debug" in arguments:
            import traceback

            traceback.print_exception(error)
        print(f"error: {printable(_cut(message), layout=False)}", file=sys.stderr)
        return _status(arguments, status)


def _repair_streams() -> None:
    """Bear standard streams that are closed, lack characters, or are said to be too narrow or too wide to print on."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would get this number, and what libraries print
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115 - it stays open
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and not _NARROWEST <= int(columns[:9]) <= _WIDEST:
        del os.environ["COLUMNS"]


def _cut(message: str) -> str:
    """A message that can be read, whatever was put into it."""
    if len(message) <= _MESSAGE_CHARACTERS:
        return message
    half = _MESSAGE_CHARACTERS // 2
    return f"{message[:half]} ... {message[-half:]}"


def _status(arguments: Sequence[str], status: int) -> int:
    """The exit status of a command that fails with `status`."""
    command = next((word for word in arguments if word not in SHARED_OPTIONS), "")
    return _TROUBLE if command in _COMPARING else status


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
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename2 or error.filename or "a file or the standard output"
        return f"{named} cannot be used: {unwritable(error)}", Pi05cError.exit_code
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # Path.resolve, up to 3.12
        return f"{str(error)[:1].lower()}{str(error)[1:]}: name another place", Pi05cError.exit_code
    if isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError):
        return (
            f"a library cannot be loaded ({error}): where memory did not run out, install it again",
            Pi05cError.exit_code,
        )
    if isinstance(error, MemoryError):
        return "memory ran out: use a machine with more, or end other programs", Pi05cError.exit_code
    kind = type(error).__name__
    defect = f"pi05c has a defect ({kind}: {error}): run again with --debug and report the traceback"
    return defect, Pi05cError.exit_code
