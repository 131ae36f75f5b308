"""A file that somebody cuts short while it is mapped: the system ends the process by SIGBUS, and says nothing."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from pi05c.terminal import printable

_MAPS = Path("/proc/self/maps")
"""Each line: first and last address, permissions, offset in the file, device, inode and path (proc(5))."""


@contextlib.contextmanager
def truncation_explained(status: int) -> Iterator[None]:
    """While the block runs, let such an end name the file and have an exit status (Linux).

    Weights and samples are mapped, here and in onnxruntime, and may be rewritten in place by whoever exports them anew.
    The thread that reads a page which is gone cannot go on, and there is no way out of it but out of the process: what
    it leaves is what a kill leaves.
    """
    if not _MAPS.exists():
        yield
        return
    import ctypes

    set_handler = ctypes.CDLL(None).signal
    set_handler.argtypes, set_handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p

    def end(_: int) -> None:
        # Not by signal.signal: its handlers run when the thread goes on, which is at the page that is gone.
        if path := _cut_short():
            said = f"error: {printable(path, layout=False)} became shorter while it was read: start again when nothing writes it any more"
            os.write(2, f"{said}\n".encode())
            os._exit(status)
        set_handler(signal.SIGBUS, None)  # SIG_DFL: the same instruction again, and the end

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    before = set_handler(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        set_handler(signal.SIGBUS, before)


def _cut_short() -> str | None:
    """A mapped file of which the last page that is mapped is no more."""
    for line in _MAPS.read_text(errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or not fields[1].startswith("r"):
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        last_page = int(fields[2], 16) + end - start - mmap.PAGESIZE
        with contextlib.suppress(OSError):
            if Path(fields[5]).stat().st_size <= last_page:
                return fields[5]
    return None


__all__ = ["truncation_explained"]
