"""Linears: an activation times a stored weight, as MatMul or Gemm, in any spelling."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.domains import STANDARD_DOMAINS
from pi05c.graph.edit import producer
from pi05c.passes.patterns.walk import MOVING, QDQ, constant, each_node, static_shape

_STORAGE = frozenset({"Cast", "Identity", "Transpose"})
"""Operators between a weight as the checkpoint stores it and its MatMul."""

_WEIGHT_PATH = _STORAGE | QDQ

_MOVES_ROWS = MOVING - {"Cast"}
"""Operators that move values and round none."""


@dataclass(frozen=True)
class Linear:
    """One linear layer.

    Attributes:
        scope: the graph that holds the node.
        node: the MatMul or Gemm.
        activation: its activation input.
        weight: the initializer, as stored.
        path: the nodes from the initializer down to `node`: Cast, Transpose, Q/DQ in any order.
        transposed: whether an element (k, n) of the factor is stored at (n, k).
        rows: inner size K; columns: outer size N.
    """

    scope: gs.Graph
    node: gs.Node
    activation: gs.Tensor
    weight: gs.Constant
    path: tuple[gs.Node, ...]
    transposed: bool
    rows: int
    columns: int


@dataclass(frozen=True)
class Bias:
    """The addition of a constant vector to a linear's output, which nothing else reads.

    Attributes:
        node: the Add.
        index: which of its inputs is the vector.
        stored: the initializer behind that, casts skipped.
    """

    node: gs.Node
    index: int
    stored: gs.Constant


def find_linears(graph: gs.Graph) -> list[Linear]:
    """Every MatMul and Gemm with a constant right factor of rank 2, in execution order."""
    linears = (linear_at(scope, node) for scope, node in each_node(graph, "MatMul", "Gemm"))
    return [linear for linear in linears if linear is not None]


def linear_at(scope: gs.Graph, node: gs.Node) -> Linear | None:
    """The linear that a MatMul or Gemm of `scope` is, None where its right factor is no constant of rank 2."""
    if node.op not in ("MatMul", "Gemm") or node.domain not in STANDARD_DOMAINS or len(node.inputs) < 2:
        return None
    tensor, path = node.inputs[1], []
    while (above := producer(tensor)) is not None and above.op in _WEIGHT_PATH:
        path.append(above)
        tensor = above.inputs[0]
    if not isinstance(tensor, gs.Constant) or tensor.shape is None or len(tensor.shape) != 2:
        return None
    if isinstance(node.inputs[0], gs.Constant) or (node.op == "Gemm" and node.attrs.get("transA")):
        return None
    transposes = sum(above.op == "Transpose" and _swaps(above) for above in path)
    transposed = bool((transposes + int(bool(node.op == "Gemm" and node.attrs.get("transB")))) % 2)
    rows, columns = tensor.shape[::-1] if transposed else tensor.shape
    return Linear(scope, node, node.inputs[0], tensor, tuple(path[::-1]), transposed, int(rows), int(columns))


def _swaps(transpose: gs.Node) -> bool:
    return list(transpose.attrs.get("perm", [1, 0])) == [1, 0]


def bias_of(linear: Linear) -> Bias | None:
    """The Add of a constant vector that is the only reader of a linear's output."""
    users = linear.node.outputs[0].outputs
    if len(users) != 1 or users[0].op != "Add":
        return None
    for index, tensor in enumerate(users[0].inputs):
        found = constant(tensor)
        if found is not None and tuple(found.shape) == (linear.columns,):
            return Bias(users[0], index, found)
    return None


def weight_obstacle(weight: gs.Constant, path: Sequence[gs.Node], outputs: Collection[int]) -> str:
    """Why a weight that is read through `path` cannot be changed in place, empty where nothing speaks against it.

    Args:
        outputs: `id` of every tensor that the graph or one of its bodies returns.
    """
    if any(node.op not in _STORAGE for node in path):
        return f"the weight {weight.name!r} is quantized"
    stack: list[gs.Tensor] = [weight]
    while stack:
        tensor = stack.pop()
        if id(tensor) in outputs:
            return f"the weight {weight.name!r} is an output of the graph"
        stack += [node.outputs[0] for node in tensor.outputs if node.op in _STORAGE]
    return ""


def readers_of(weight: gs.Constant) -> list[gs.Node]:
    """The MatMuls and other nodes that read a weight, through casts and transposes, bodies included."""
    found, stack = [], [weight]
    while stack:
        for node in stack.pop().outputs:
            if node.op in _STORAGE:
                stack.append(node.outputs[0])
            else:
                found.append(node)
    return found


def linears_reading(
    tensor: gs.Tensor, linears: Mapping[int, Linear], outputs: Collection[int]
) -> tuple[list[Linear], str]:
    """The linears that read a tensor as their activation, and which other reader it has, empty where none.

    Operators that move whole rows (Reshape, Transpose, Expand and the like, the last axis kept) are followed.

    Args:
        linears: by `id` of their node.
        outputs: `id` of every tensor that the graph or one of its bodies returns.
    """
    found: list[Linear] = []
    stack = [tensor]
    while stack:
        source = stack.pop()
        if id(source) in outputs:
            return [], f"{source.name!r} is an output of the graph"
        for node in source.outputs:
            linear = linears.get(id(node))
            if linear is not None and linear.activation is source:
                found.append(linear)
            elif node.op in _MOVES_ROWS and node.inputs[0] is source and _keeps_rows(node):
                stack.append(node.outputs[0])
            else:
                return [], f"{node.name!r} reads it too"
    return found, ""


def _keeps_rows(node: gs.Node) -> bool:
    """Whether the values along the last axis stay together and in order."""
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if not before or not after or before[-1] != after[-1]:
        return False
    perm = node.attrs.get("perm", range(len(before))[::-1])
    return node.op != "Transpose" or bool(perm[-1] == len(before) - 1)
