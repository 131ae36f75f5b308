"""Ranges of tensors: what calibration measures and what passes decide by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.graph.weights import weight_of

RANGE_PRESERVING = frozenset(
    "Cast Identity Transpose Reshape Flatten Squeeze Unsqueeze Expand Tile Slice Split Gather "
    "QuantizeLinear DequantizeLinear".split()
)
"""Operators whose output holds no value that their first input does not (up to rounding)."""


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest value of each calibrated tensor over all samples, by tensor name.

    Attributes:
        low, high: by name, in the units of the tensor.
        source: one phrase that says which data the ranges come from.
        synthetic: whether that data was made up and not recorded.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    source: str = ""
    synthetic: bool = False

    def amax(self, tensor: gs.Tensor) -> float | None:
        """The largest absolute value of `tensor`, None where it was not calibrated.

        Follows operators that only move values back to the tensor that was; constants are read.
        """
        while True:
            if isinstance(tensor, gs.Constant):
                return weight_of(tensor).amax()
            if tensor.name in self.high:
                return max(abs(self.low[tensor.name]), abs(self.high[tensor.name]))
            node = producer(tensor)
            if node is None or node.op not in RANGE_PRESERVING or not node.inputs:
                return None
            tensor = node.inputs[0]


def finite(amax: float | None) -> bool:
    """Whether a range was measured and is a number."""
    return amax is not None and math.isfinite(amax)
