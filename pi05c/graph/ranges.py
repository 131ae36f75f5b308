"""Ranges and typical rows of tensors: what calibration measures and what passes decide by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.graph.weights import Weight, weight_of

RANGE_PRESERVING = frozenset(
    {"Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Slice"}
    | {"Split", "Gather", "GatherElements", "QuantizeLinear", "DequantizeLinear", "Neg", "Abs", "ReduceMax"}
)
"""Operators whose output is not larger in magnitude than their first input (up to rounding)."""

_SAME_VALUES = frozenset({"Cast", "Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})

UNIT = frozenset({"Softmax", "Sigmoid", "Tanh", "Sin", "Cos", "Erf"})
"""Operators whose output lies in [-1, 1]."""


@dataclass(frozen=True)
class Wanted:
    """What passes ask calibration for, by tensor name.

    Attributes:
        tensors: whose range is measured.
        rows: how many rows, vectors along the last axis, are sampled at most.
        quantized: those whose range gives the scale of a quantizer, which a calibration method may choose.
    """

    tensors: tuple[str, ...] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    quantized: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest value of each calibrated tensor over all samples, by tensor name.

    Attributes:
        low, high: by name, in the units of the tensor.
        source: one phrase that says which data the ranges come from.
        synthetic: whether that data was made up and not recorded.
        rows: of tensors that were sampled, some vectors along the last axis, [any number, size of that axis].
        thresholds: magnitudes at which a calibration method has quantizers clip; of other tensors the largest one.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    source: str = ""
    synthetic: bool = False
    rows: Mapping[str, Weight] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)

    def rows_of(self, tensor: gs.Tensor) -> Weight | None:
        """The sampled rows of `tensor`, or of what it is a Cast of; None where there are none."""
        while tensor.name not in self.rows:
            node = producer(tensor)
            if node is None or node.op not in ("Cast", "Identity"):
                return None
            tensor = node.inputs[0]
        return self.rows[tensor.name]

    def threshold(self, tensor: gs.Tensor) -> float | None:
        """The magnitude that a quantizer of `tensor` is to reach: chosen for it, or for what it holds the values of; else
        `amax`."""
        source: gs.Tensor = tensor
        while source.name not in self.thresholds:
            node = producer(source)
            if node is None or node.op not in _SAME_VALUES:
                return self.amax(tensor)
            source = node.inputs[0]
        return self.thresholds[source.name]

    def amax(self, tensor: gs.Tensor) -> float | None:
        """The largest absolute value of `tensor`, None where neither it nor what bounds it was calibrated.

        Follows operators that only move values, or choose among them, back to tensors that were; constants are
        read.
        """
        stack, seen, found = [tensor], set[int](), list[float]()
        while stack:
            current = stack.pop()
            if id(current) in seen:
                continue
            seen.add(id(current))
            node = producer(current)
            amax: float | None = None
            if isinstance(current, gs.Constant):
                amax = weight_of(current).amax()
            elif current.name in self.high:
                amax = _largest([self.low[current.name], self.high[current.name]])
            elif (
                node is not None and node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant)
            ):
                amax = self._of_stored_codes(node)
            else:
                bounds = bounding_tensors(current)
                if bounds:
                    stack.extend(bounds)
                    continue
                amax = None if bounds is None else 1.0
            if amax is None:
                return None
            found.append(amax)
        return _largest(found)

    def _of_stored_codes(self, dequantize: gs.Node) -> float | None:
        """A bound of (codes - zero point) * scale, which is not that of the codes."""
        codes, scale, *zero = [self.amax(tensor) for tensor in dequantize.inputs]
        if codes is None or scale is None or None in zero:
            return None
        return (codes + sum(point for point in zero if point is not None)) * scale


def _largest(values: Sequence[float]) -> float:
    """The largest magnitude; not a number where one of the values is none."""
    return float(np.max(np.abs(values)))


def bounding_tensors(tensor: gs.Tensor) -> list[gs.Tensor] | None:
    """The tensors whose largest magnitude bounds that of `tensor`, none where 1 does; None where nothing is known."""
    node = producer(tensor)
    if node is None:
        return None
    if node.op in UNIT:
        return []
    if node.op in RANGE_PRESERVING:
        return [node.inputs[0]]
    if node.op in ("Concat", "Max", "Min"):
        return list(node.inputs)
    if node.op == "Where":
        return list(node.inputs[1:])
    return None
