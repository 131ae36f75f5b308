"""A builder in a child process: its request, its limits, its log, and what is kept of it when it fails.

A process of its own because a builder may crash or be killed without taking the compiler along, and because its memory
is returned as a whole. The child reads its request from a file of JSON. It writes a log to stdout and stderr, in which
lines that begin with `[E]` are errors and with `[W]` warnings, and events for the parent as lines of JSON after `EVENT`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import platform
import selectors
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pi05c
from pi05c.graph.errors import BuildError, MachineError, unwritable
from pi05c.graph.files import REQUEST, replacing, write_text

EVENT = "@pi05c "
"""What starts a line that is an event: `{"event": "progress" | "built", ...}`."""

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that names the signal which ends this process with its parent (linux/prctl.h)."""

_GIB = 2**30
_LOG_LINES = 20_000
_ERRORS_SHOWN = 3
_SHOWN_CHARACTERS = 1000
_LINE_BYTES = 10_000
_READ_BYTES = 2**16
_WATCH_INTERVAL_S = 0.1
_AFTER_END_S = 1.0
"""How long a child's output is read on after its end, where others write to the pipe."""
_INTERNAL = "Internal Error"
"""TensorRT's name for what is not the graph's fault (`ErrorCode::kINTERNAL_ERROR` of its API)."""

_NOISE = ("--- Begin node", "--- End node", "catchCudaError")
"""Error lines that explain nothing: the frame around a printed node, and what follows from there being no GPU."""


@dataclass(frozen=True)
class BuildProgress:
    """Where the builder is: `step` of `steps` of a phase (0 of 0 where it does not say)."""

    phase: str
    step: int
    steps: int


@dataclass
class ChildRun:
    """What became of one child process.

    Attributes:
        log: its last lines.
        stopped: which limit it exceeded.
        built: what it said in its event `built`; None where it did not.
        phase: the last one that it named.
        peak_memory: largest resident set in bytes, mapped files included; 0 where unknown.
        seconds: from start to end.
    """

    log: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))
    returncode: int = 0
    stopped: str | None = None
    built: dict[str, Any] | None = None
    phase: str = ""
    peak_memory: int = 0
    seconds: float = 0.0

    def lines(self, prefix: str) -> list[str]:
        """Lines of the log that begin so, without it."""
        return [line[len(prefix) :].strip() for line in self.log if line.startswith(prefix)]

    def failure(self) -> str | None:
        """What went wrong, or None. An `[E]` line is a failure whatever the builder returned."""
        errors = self.lines("[E]")
        telling = [line for line in errors if not any(noise in line for noise in _NOISE)] or errors
        reasons = "; ".join(dict.fromkeys(map(_cut, telling[-_ERRORS_SHOWN:])))
        if self.stopped is not None:
            return self.stopped + self._where()
        if self.returncode < 0:
            return self._killed() + self._where() + (f" after logging: {reasons}" if reasons else "")
        if not errors and self.returncode == 0 and self.built is not None:
            return None
        if not errors:
            last = next(iter(self.lines("[!]")[-1:]), next(reversed(self.log), "no output"))
            reasons = f"it ended with exit status {self.returncode} and said last: {_cut(last)}"
        if _INTERNAL in reasons:
            reasons += "; this is a defect of the builder, which another version of it, or other --passes, may not meet"
        return reasons

    def _where(self) -> str:
        return f", in the phase {self.phase!r}" if self.phase else ""

    def _killed(self) -> str:
        try:
            name = signal.Signals(-self.returncode).name
        except ValueError:
            name = f"signal {-self.returncode}"
        held = f" when it held {self.peak_memory / _GIB:.1f} GiB" if self.peak_memory else ""
        if name == "SIGKILL":
            return f"the builder was killed ({name}){held}, as the system does when memory runs out"
        return f"the builder crashed ({name}){held}"


def produce(
    command: Sequence[str],
    request: Callable[[str, str], str],
    model: Path,
    artifact: Path,
    *,
    failed: str,
    versions: Mapping[str, str],
    time_limit_s: float | None = None,
    memory_limit: int | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
    reproducer_dir: Path | None = None,
) -> ChildRun:
    """Let a builder make a file of a graph; the file is there whole, or as it was before.

    Args:
        command, time_limit_s, memory_limit, progress: as `_run_child` takes them.
        request: JSON for the path of a graph and that of the file to write.
        failed: the beginning of the sentence that says why it failed.
        versions: of the builder, by name.
        reproducer_dir: where to leave, if it fails, the command that fails again, its log and the versions.

    Raises:
        Pi05cError: the builder cannot be started.
        BuildError: it logged an error, crashed, was killed, or exceeded its limits.
    """
    with replacing(artifact.absolute(), through_link=False) as partial:
        run = _run_child(
            command,
            request(str(model.absolute()), str(partial)),
            partial,
            time_limit_s=time_limit_s,
            memory_limit=memory_limit,
            progress=progress,
        )
        failure = run.failure()
        if failure is None and not (partial.is_file() and partial.stat().st_size):
            failure = "it said that it had ended well, and wrote nothing"
        if failure is not None:
            where = ""
            if reproducer_dir is not None:
                script = _write_reproducer(
                    reproducer_dir,
                    command,
                    lambda place: request(place, f"model{artifact.suffix}"),
                    model.absolute(),
                    run,
                    versions,
                )
                where = f"; {script} reproduces it"
            raise BuildError(f"{failed}: {failure}{where}")
    return run


def _run_child(
    command: Sequence[str],
    request: str,
    partial: Path,
    *,
    time_limit_s: float | None = None,
    memory_limit: int | None = None,
    progress: Callable[[BuildProgress], None] | None = None,
) -> ChildRun:
    """Run a builder to its end, with all processes that it starts.

    Args:
        command: takes the path of the request; it runs in the folder of `partial`.
        request: JSON.
        partial: the file that is written; the request lies beside it meanwhile.
        time_limit_s: seconds after which the child is ended.
        memory_limit: bytes at which it is ended, mapped files not counted (Linux).
        progress: called from time to time.

    Raises:
        Pi05cError: it cannot be started.
    """
    run = ChildRun()
    request_path = Path(f"{partial}{REQUEST}")
    package_root = str(Path(pi05c.__file__).resolve().parents[1])
    python_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    start = time.monotonic()
    try:
        request_path.write_text(request, encoding="utf-8")
        process = subprocess.Popen(
            [*command, str(request_path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=partial.parent,
            env={**os.environ, "PYTHONPATH": python_path},
            start_new_session=True,  # so that the compilers that it starts end with it
        )
    except OSError as error:
        request_path.unlink(missing_ok=True)
        raise MachineError(
            f"the builder cannot be started in {partial.parent}: {unwritable(error)}"
        ) from error

    watch = threading.Thread(target=_watch, args=(process, run, time_limit_s, memory_limit), daemon=True)
    try:
        watch.start()
        for line in _lines(process):
            if not _take_event(run, line, progress) and line.strip():
                run.log.append(line.rstrip())
        run.returncode = process.wait()
    finally:
        _end(process)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        request_path.unlink(missing_ok=True)
    run.seconds = time.monotonic() - start
    return run


def _cut(line: str) -> str:
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """The lines of a child's output, the longest cut, up to the end of the child.

    What it started may have the pipe open still, and write to it without end.
    """
    assert process.stdout is not None
    pipe, rest, ended = process.stdout.fileno(), b"", math.inf
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        while time.monotonic() < ended + _AFTER_END_S:
            if process.poll() is not None:
                ended = min(ended, time.monotonic())
            if ready.select(_WATCH_INTERVAL_S):
                if not (read := os.read(pipe, _READ_BYTES)):
                    break
                *lines, rest = (rest + read).split(b"\n")
                for line in lines:
                    yield line[:_LINE_BYTES].decode("utf-8", "replace")
                rest = rest[:_LINE_BYTES]
            elif ended < math.inf:
                break
    if rest:
        yield rest.decode("utf-8", "replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child and what it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _watch(
    process: subprocess.Popen[bytes], run: ChildRun, time_limit_s: float | None, memory_limit: int | None
) -> None:
    """End the child when it exceeds a limit, and note why. Ends with the child."""
    deadline = math.inf if time_limit_s is None else time.monotonic() + time_limit_s
    while process.poll() is None:
        run.peak_memory = max(run.peak_memory, memory_of(process.pid))
        if time.monotonic() >= deadline:
            run.stopped = f"it was stopped after its time limit of {time_limit_s:g} s"
        elif memory_limit is not None and memory_of(process.pid, "RssAnon") > memory_limit:
            run.stopped = f"it was stopped at its memory limit of {memory_limit / _GIB:.1f} GiB"
        if run.stopped is not None:
            _end(process)
            return
        time.sleep(_WATCH_INTERVAL_S)


def _take_event(run: ChildRun, line: str, progress: Callable[[BuildProgress], None] | None) -> bool:
    """Note the event that a line is; False where it is none."""
    if not line.startswith(EVENT):
        return False
    try:
        event = json.loads(line[len(EVENT) :])
        if event["event"] == "built":
            run.peak_memory = max(run.peak_memory, int(event["peak_memory"]))
            run.built = event
            return True
        state = BuildProgress(str(event["phase"]), int(event["step"]), int(event["steps"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
    run.phase = state.phase
    if progress is not None:
        progress(state)
    return True


def _write_reproducer(
    folder: Path,
    command: Sequence[str],
    request: Callable[[str], str],
    model: Path,
    run: ChildRun,
    versions: Mapping[str, str],
) -> Path:
    """Leave in `folder` what it takes to see a failure again; returns the script.

    Args:
        request: the request for a model at another place, as JSON.
        versions: of the builder, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model.parent == folder.absolute().parent:  # so that the two may move together
        model = Path("..", model.name)
    write_text(folder / "request.json", request(str(model)))
    write_text(folder / "build.log", "\n".join(run.log) + "\n")
    known = {
        **_versions(("pi05c", "polygraphy", "onnx")),
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    write_text(folder / "versions.txt", "".join(f"{name} {version}\n" for name, version in known.items()))
    script = folder / "reproduce.sh"
    write_text(
        script,
        "#!/bin/sh\n"
        "# Builds the graph that request.json names again as it failed; the log of the failure is in build.log.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f"exec {shlex.join(command)} request.json\n",
    )
    script.chmod(0o755)
    return script


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed: pi05c need not be."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def send(**fields: object) -> None:
    """Tell the parent; one write, on a line of its own even where another thread is in the middle of one."""
    sys.stdout.write(f"\n{EVENT}{json.dumps(fields)}\n")
    sys.stdout.flush()


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone, so that nobody builds for nobody (Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def memory_of(pid: int | None = None, what: str = "VmHWM") -> int:
    """Bytes of memory of a process, by default this one, as Linux counts them; 0 where they cannot be read.

    `VmHWM` is the largest resident set so far, mapped files included (unlike `ru_maxrss`, it does not carry over
    from the parent through fork); `RssAnon` is what is resident now and backed by no file.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{'self' if pid is None else pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
    return 0


__all__ = [
    "EVENT",
    "BuildProgress",
    "ChildRun",
    "end_with_parent",
    "memory_of",
    "produce",
    "send",
]
