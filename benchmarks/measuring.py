"""Runs a command to its end and says what it took: seconds, and the memory of all its processes.

`anonymous` is RssAnon and shared memory, which the machine must hold; `mapped` is RssFile, pages of files that the kernel
may drop. Both are peaks of sums over the process tree, sampled every 50 ms, in GB (10^9 bytes).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.05
_FIELDS = ("RssAnon", "RssShmem", "RssFile")


@dataclass
class Measured:
    """One command.

    Attributes:
        seconds: wall-clock time.
        processor_seconds: of all its processes, user and system.
        ended: `done`, `killed at the memory cap`, `killed after the time limit`, or how it failed.
        output: the last line that it printed.
    """

    command: str
    seconds: float
    processor_seconds: float
    anonymous: float
    mapped: float
    ended: str = "done"
    output: str = ""


def measure(
    command: Sequence[str],
    *,
    cap: float | None = None,
    limit: float | None = None,
    log: Path | None = None,
    statuses: Sequence[int] = (0,),
) -> Measured:
    """Run a command.

    Args:
        cap: GB of anonymous memory at which it is killed.
        limit: seconds after which it is killed.
        log: file for what it prints.
        statuses: exit statuses of a command that did what it was to do.
    """
    log = log or Path(os.devnull)
    before = _processor_seconds()
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        peak = {"anonymous": 0, "mapped": 0}
        killed: list[str] = []
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_SAMPLE_SECONDS):
                totals = dict.fromkeys(_FIELDS, 0)
                for member in _tree(process.pid):
                    for field, kilobytes in _memory(member).items():
                        totals[field] += kilobytes
                anonymous = totals["RssAnon"] + totals["RssShmem"]
                peak["anonymous"] = max(peak["anonymous"], anonymous)
                peak["mapped"] = max(peak["mapped"], totals["RssFile"])
                late = limit is not None and time.perf_counter() - start > limit
                if not killed and (late or (cap is not None and anonymous / 1e6 > cap)):
                    killed.append("killed after the time limit" if late else "killed at the memory cap")
                    os.killpg(process.pid, signal.SIGKILL)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            status = process.wait()
        finally:
            done.set()
            watcher.join()
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return Measured(
        " ".join(command),
        time.perf_counter() - start,
        _processor_seconds() - before,
        peak["anonymous"] / 1e6,
        peak["mapped"] / 1e6,
        killed[0] if killed else "done" if status in statuses else f"failed with status {status}",
        next((line for line in reversed(lines) if line.strip()), ""),
    )


def _processor_seconds() -> float:
    """What the children that have ended took."""
    times = os.times()
    return times.children_user + times.children_system


def _tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return found
    for child in children:
        found.extend(_tree(int(child)))
    return found


def _memory(pid: int) -> dict[str, int]:
    """Kilobytes by kind, none where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key: int(value.split()[0]) for key, value in pairs if key in _FIELDS}
