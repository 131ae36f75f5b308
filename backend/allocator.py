"""The memory allocator of a builder.

TensorRT-RTX compiles a graph in one thread that allocates all the time. With mimalloc instead of glibc's malloc an
unrolled graph takes a third to a half of the seconds, one with its loop hardly fewer, and no more memory (README, Figures).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

_DISTRIBUTION = "cmeel-mimalloc"
_LIBRARY = "libmimalloc.so"
_VARIABLE = "LD_PRELOAD"
_SEPARATORS = " :"
"""What parts the libraries that the variable names (ld.so(8)): no path with one of them can be named."""


def with_mimalloc(command: Sequence[str]) -> tuple[str, ...]:
    """The command, run with mimalloc (Linux).

    As it was where mimalloc is not installed, or LD_PRELOAD is set: whoever set it may have chosen an allocator.
    """
    library = _mimalloc()
    if library is None or os.environ.get(_VARIABLE) or any(each in library for each in _SEPARATORS):
        return tuple(command)
    return ("env", f"{_VARIABLE}={library}", *command)


def _mimalloc() -> str | None:
    """Path of the library, if its package is installed."""
    try:
        files = metadata.files(_DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        return None
    found = (str(file.locate()) for file in files if file.name == _LIBRARY)
    return next((path for path in found if Path(path).exists()), None)


__all__ = ["with_mimalloc"]
