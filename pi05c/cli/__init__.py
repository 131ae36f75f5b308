"""The command line, a module a command.

Every command imports what it needs when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from importlib import import_module

from pi05c.cli.app import app
from pi05c.cli.main import main

_COMMANDS = (
    "compile",
    "export",
    "samples",
    "extract",
    "verify",
    "inspect",
    "explain",
    "cost",
    "bench",
    "diff",
    "bisect",
    "tune",
    "golden",
    "debug",
    "view",
    "data_loader",
)
"""Modules that add their commands to `app`, in the order in which `pi05c --help` lists them."""

for _name in _COMMANDS:
    import_module(f"pi05c.cli.{_name}")

__all__ = ["app", "main"]
