"""How every session of onnxruntime starts, whichever version is installed."""

from __future__ import annotations

from functools import cache
from typing import Any

_LAYOUT_FROM = "1.30"
"""From 1.23 to 1.29 onnxruntime aborts the process in its layout optimizations where constant folding is off and a weight
is cast in front of a MatMul (an assertion of std::vector on `NodeArg*`, behind CastFloat16Transformer)."""


def session_options() -> Any:
    """Options that choose the optimizations which this version survives, and nothing else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not _survives_layout(onnxruntime.__version__):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return options


@cache
def _survives_layout(version: str) -> bool:
    from packaging.version import Version

    return Version(version) >= Version(_LAYOUT_FROM)


__all__ = ["session_options"]
