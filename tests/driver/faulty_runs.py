"""Runs one command line again and again, and breaks it at one file operation after the other.

    python faulty_runs.py FAULT FOLDER WORDS...

A copy of `FOLDER`/before is put at `FOLDER`/now, and the command line runs there in a forked process in which the nth
file operation that would change something below `FOLDER`/now does not happen: the process is killed (`kill`), the
operation fails with an error of the disk (`EIO`), or the disk is full from there on (`ENOSPC`). What each run left is
written as a line of JSON; the last is of the run that nothing broke.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_policy import BUILDS, worker

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "subprocess.Popen", "exchange")
NEEDS_SPACE = ("open", "os.mkdir")


class Fault:
    """Counts the file operations below a folder, and lets the nth fail."""

    def __init__(self, kind: str, place: Path, nth: int) -> None:
        self.kind, self.place, self.nth = kind, str(place), nth
        self.count, self.reached = -1, ""

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """A hook for `sys.addaudithook`."""
        changes = event in CHANGES or (event == "open" and bool(int(arguments[2] or 0) & WRITES))
        if not changes or self.place not in " ".join(map(str, arguments)):
            return
        self.count += 1
        if self.count < self.nth or (self.reached and self.kind != "ENOSPC"):
            return
        self.reached = self.reached or f"{event} {' '.join(map(str, arguments[:2]))}"
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "EIO" or event in NEEDS_SPACE:
            code = getattr(errno, self.kind)
            raise OSError(code, os.strerror(code), str(arguments[0]))


def run(fault: Fault, words: list[str], said: Path) -> int:
    """Run the command line in a process of its own; its exit status, or minus the signal that ended it."""
    process = os.fork()
    if not process:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.addaudithook(fault.audit)
        status = cli.main(words)
        sys.stdout.flush()
        os.write(1, f"\n@{fault.count} {fault.reached}".encode())
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def content(folder: Path) -> dict[str, str]:
    """The files of a folder by path, each with its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in files}


def main(kind: str, folder: Path, words: list[str]) -> None:
    """Break the nth operation for each n until one run is whole."""
    before, now = folder / "before", folder / "now"
    nth, reached = 0, "something"
    while reached:
        shutil.rmtree(now, ignore_errors=True)
        shutil.copytree(before, now, symlinks=True)
        status = run(Fault(kind, now, nth), words, folder / "said")
        said, _, end = (folder / "said").read_text(errors="replace").rpartition("\n@")
        reached = "killed" if status < 0 else end.partition(" ")[2]
        print(
            json.dumps({"nth": nth, "reached": reached, "status": status, "said": said, "left": content(now)})
        )
        nth += 1


def exchange_with_audit(exchange: Callable[[Path, Path], int]) -> Callable[[Path, Path], int]:
    """The exchange of two folders is a call of the C library, of which Python's audit hooks learn nothing."""

    def audited(new: Path, old: Path) -> int:
        sys.audit("exchange", str(new), str(old))
        return exchange(new, old)

    return audited


if __name__ == "__main__":
    from pi05c import bisection, building, calibration, cli, compilation, extraction, folder  # noqa: F401 - before the forks
    from pi05c.backend import tensorrt

    place = Path(sys.argv[2])
    os.environ["PI05C_CACHE"] = str(place / "now" / "cache")
    folder._renameat2 = exchange_with_audit(folder._renameat2)
    tensorrt.WORKER_COMMAND = worker(place, BUILDS)
    tensorrt.can_build = lambda *_: None
    main(sys.argv[1], place, sys.argv[3:])
