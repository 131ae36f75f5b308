"""All golden cases, those of the modules `golden_cases_PASS` too."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from golden_cases import CASES, GoldenCase

for _module in sorted(Path(__file__).parent.glob("golden_cases_*.py")):
    import_module(_module.stem)  # adds its cases

__all__ = ["CASES", "GoldenCase"]
