"""A command line, run in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """What a command left: exit status, stdout and stderr."""

    status: int
    out: str
    err: str


Command = Callable[..., Result]
"""Takes the words of a command line, paths too."""
