"""Linears: an activation times a stored weight, as MatMul or Gemm, in any spelling."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer
from pi05c.passes.patterns.walk import QDQ, each_node

_WEIGHT_PATH = frozenset({"Cast", "Identity", "Transpose"}) | QDQ


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
    found = []
    for scope, node in each_node(graph, "MatMul", "Gemm"):
        if node.domain not in (None, "", "ai.onnx") or len(node.inputs) < 2:
            continue
        tensor, path = node.inputs[1], []
        while (above := producer(tensor)) is not None and above.op in _WEIGHT_PATH:
            path.append(above)
            tensor = above.inputs[0]
        if not isinstance(tensor, gs.Constant) or tensor.shape is None or len(tensor.shape) != 2:
            continue
        if isinstance(node.inputs[0], gs.Constant) or (node.op == "Gemm" and node.attrs.get("transA")):
            continue
        transposes = sum(above.op == "Transpose" and _swaps(above) for above in path)
        transposed = bool((transposes + int(bool(node.op == "Gemm" and node.attrs.get("transB")))) % 2)
        rows, columns = tensor.shape[::-1] if transposed else tensor.shape
        found.append(
            Linear(
                scope, node, node.inputs[0], tensor, tuple(path[::-1]), transposed, int(rows), int(columns)
            )
        )
    return found


def _swaps(transpose: gs.Node) -> bool:
    return list(transpose.attrs.get("perm", [1, 0])) == [1, 0]
