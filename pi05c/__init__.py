"""pi05c compiles the pi0.5 robot policy from ONNX into a TensorRT engine.

    pi05c.compile("model.onnx", "engine", passes="default", calibration=["recorded.npz"])

Importing the package is light: each function imports what it needs when it is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi05c.building import build
    from pi05c.compilation import compile
    from pi05c.extraction import extract_part as extract
    from pi05c.frontend.export import export_model as export
    from pi05c.inspection import inspect
    from pi05c.runtime import load
    from pi05c.tuning import tune
    from pi05c.verification import run, verify

_WHERE = {
    "build": ("pi05c.building", "build"),
    "compile": ("pi05c.compilation", "compile"),
    "export": ("pi05c.frontend.export", "export_model"),
    "extract": ("pi05c.extraction", "extract_part"),
    "inspect": ("pi05c.inspection", "inspect"),
    "load": ("pi05c.runtime", "load"),
    "run": ("pi05c.verification", "run"),
    "tune": ("pi05c.tuning", "tune"),
    "verify": ("pi05c.verification", "verify"),
}

__all__ = ["build", "compile", "export", "extract", "inspect", "load", "run", "tune", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pi05c.graph.requirements import refuse_unsupported

    refuse_unsupported()
    module, attribute = _WHERE[name]
    return getattr(importlib.import_module(module), attribute)
