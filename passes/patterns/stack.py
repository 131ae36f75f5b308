"""Tensors that together are another, cut along one of its axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.batch import RESHAPES
from pi05c.passes.patterns.walk import constant_integers, static_shape


@dataclass(frozen=True)
class Stack:
    """A tensor that is cut into equal parts along one axis.

    Attributes:
        tensor: static shape.
        outer: the product of its dimensions before that axis.
    """

    tensor: gs.Tensor
    outer: int


def find_stack(parts: Sequence[gs.Tensor]) -> Stack | None:
    """The tensor that Slices, Gathers or a Split cut into `parts`, in their order, of one size and without a gap.

    Reshapes of the parts may follow: each has the elements of its part of the stack in their order.
    """
    cuts = [_cut(part) for part in parts]
    first = cuts[0]
    shape = None if first is None else static_shape(first.tensor)
    if first is None or shape is None:
        return None
    size = first.stop - first.start
    for index, cut in enumerate(cuts):
        if cut is None or cut.tensor is not first.tensor or cut.axis != first.axis:
            return None
        if (cut.start, cut.stop) != (index * size, (index + 1) * size):
            return None
    if len(cuts) * size != shape[first.axis]:
        return None
    return Stack(first.tensor, math.prod(shape[: first.axis]))


@dataclass(frozen=True)
class _Cut:
    """The entries from `start` to `stop` of `tensor` along `axis`."""

    tensor: gs.Tensor
    axis: int
    start: int
    stop: int


def _cut(part: gs.Tensor) -> _Cut | None:
    """What a tensor is a part of, if its elements are those of the part in their order."""
    node = producer(part)
    while node is not None and node.op in RESHAPES:
        part = node.inputs[0]
        node = producer(part)
    if node is None or node.op not in ("Gather", "Slice", "Split"):
        return None
    source = node.inputs[0]
    shape = static_shape(source)
    if not shape:
        return None
    if node.op == "Slice":
        return _slice(node, shape)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    if node.op == "Gather":
        indices = constant_integers(node.inputs[1])
        if indices is None or len(indices) != 1:
            return None
        start = indices[0] % shape[axis]
        return _Cut(source, axis, start, start + 1)
    start = 0
    for output in node.outputs:
        size = static_shape(output)
        if size is None:
            return None
        if output is part:
            return _Cut(source, axis, start, start + size[axis])
        start += size[axis]
    return None


def _slice(node: gs.Node, shape: tuple[int, ...]) -> _Cut | None:
    """Of a Slice along one axis in steps of 1."""
    if len(node.inputs) < 4:
        return None
    starts, stops, axes = (constant_integers(tensor) for tensor in node.inputs[1:4])
    steps = constant_integers(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if starts is None or stops is None or axes is None or len(axes) != 1 or steps != (1,):
        return None
    axis = axes[0] % len(shape)
    start, stop, _ = slice(starts[0], stops[0]).indices(shape[axis])
    return _Cut(node.inputs[0], axis, start, stop)
