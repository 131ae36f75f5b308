"""Small steps through a graph that every finder takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.io import scopes
from pi05c.graph.weights import array_of, weight_of

ROUNDING = frozenset({"Cast", "Identity"})
"""Operators that change a value's type, not the value (up to rounding)."""

QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})

MOVING = ROUNDING | {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Flatten"}
"""Operators that move values without changing them."""


def origin(tensor: gs.Tensor, through: Iterable[str] = ROUNDING) -> gs.Tensor:
    """The tensor that `tensor` was before operators of `through`."""
    while (node := producer(tensor)) is not None and node.op in through and node.inputs:
        tensor = node.inputs[0]
    return tensor


def made_by(tensor: gs.Tensor, *ops: str, through: Iterable[str] = ROUNDING) -> gs.Node | None:
    """The node of one of the given operators that `tensor` comes from, casts skipped."""
    node = producer(origin(tensor, through))
    return node if node is not None and node.op in ops else None


def constant(tensor: gs.Tensor) -> gs.Constant | None:
    """The initializer behind a tensor, casts skipped."""
    found = origin(tensor)
    return found if isinstance(found, gs.Constant) else None


def stored_vector(tensor: gs.Tensor, size: int) -> gs.Constant | None:
    """The initializer behind a float32 tensor with `size` values along its last axis and no other axis.

    Casts to float32 are skipped; what is rounded to a narrower type on the way is no longer what is stored.
    """
    if to_numpy(tensor.dtype) != FLOAT32:
        return None
    while (node := producer(tensor)) is not None and node.op in ROUNDING:
        if node.op == "Cast" and to_numpy(node.attrs["to"]) != FLOAT32:
            return None
        tensor = node.inputs[0]
    if not isinstance(tensor, gs.Constant):
        return None
    shape = weight_of(tensor).shape
    return tensor if shape and shape[-1] == size and math.prod(shape) == size else None


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant of one element, casts and reshapes skipped."""
    found = origin(tensor, MOVING)
    if isinstance(found, gs.Constant) and np.prod(weight_of(found).shape, dtype=int) == 1:
        return float(array_of(found).reshape(-1)[0])
    return None


def constant_integers(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The values of a constant that holds axes, sizes or indices; None where it is computed or left out."""
    if not isinstance(tensor, gs.Constant):
        return None
    return tuple(int(value) for value in array_of(tensor).reshape(-1))


def consumers(tensor: gs.Tensor, through: Iterable[str] = ROUNDING) -> list[gs.Node]:
    """The nodes that read a tensor's value, casts skipped, in the order in which they were connected."""
    found: list[gs.Node] = []
    stack = [tensor]
    while stack:
        for node in stack.pop().outputs:
            if node.op in through:
                stack.extend(node.outputs)
            else:
                found.append(node)
    return found


def output_ids(graph: gs.Graph) -> set[int]:
    """`id` of every tensor that is an output of the graph or of one of its bodies."""
    return {id(output) for scope in scopes(graph) for output in scope.outputs}


def static_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """The shape of a tensor where every dimension is a known number; None of a tensor without elements too.

    What computes nothing is not worth a rewrite, and sizes of zero would have to be thought of in every one.
    """
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, (int, np.integer)) and dim > 0 for dim in shape):
        return None
    return tuple(int(dim) for dim in shape)


def rank(tensor: gs.Tensor) -> int | None:
    """The number of dimensions, where known."""
    return None if tensor.shape is None else len(tensor.shape)


def each_node(graph: gs.Graph, *ops: str) -> Iterator[tuple[gs.Graph, gs.Node]]:
    """The nodes of the given operators (all where none is given) with the scope they are in."""
    for scope in scopes(graph):
        for node in scope.nodes:
            if not ops or node.op in ops:
                yield scope, node
