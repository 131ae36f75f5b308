"""Linears: an activation times a stored weight, as MatMul or Gemm, in any spelling."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.walk import QDQ, each_node

_STORAGE = frozenset({"Cast", "Identity", "Transpose"})
"""Operators between a weight as the checkpoint stores it and its MatMul."""

_WEIGHT_PATH = _STORAGE | QDQ


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


def find_linears(graph: gs.Graph) -> list[Linear]:
    """Every MatMul and Gemm with a constant right factor of rank 2, in execution order."""
    linears = (linear_at(scope, node) for scope, node in each_node(graph, "MatMul", "Gemm"))
    return [linear for linear in linears if linear is not None]


def linear_at(scope: gs.Graph, node: gs.Node) -> Linear | None:
    """The linear that a MatMul or Gemm of `scope` is, None where its right factor is no constant of rank 2."""
    if node.op not in ("MatMul", "Gemm") or node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
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
