"""pi05c in Polygraphy: passes as a loader, a runner, and samples as a data loader.

    from polygraphy.backend.onnx import SaveOnnx
    from pi05c.polygraphy import ApplyPasses

    SaveOnnx(ApplyPasses("model.onnx", passes="exact"), "exact.onnx")()

`polygraphy run` imports `pi05c.polygraphy.arguments` whether or not it is used, so that nothing here imports more than
it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pi05c.polygraphy.loader import ApplyPasses
    from pi05c.polygraphy.runner import Pi05cRunner
    from pi05c.polygraphy.samples import load_samples

_WHERE = {"ApplyPasses": "loader", "Pi05cRunner": "runner", "load_samples": "samples"}

__all__ = ["ApplyPasses", "Pi05cRunner", "load_samples"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
