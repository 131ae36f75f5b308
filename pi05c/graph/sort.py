"""Topological order: stable, iterative, linear, and aware of what subgraphs capture.

onnx-graphsurgeon's own sort recurses (it fails at about 900 levels) and orders by level, which scatters the nodes
of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.errors import Pi05cError
from pi05c.graph.scopes import scopes
from pi05c.graph.walk import bodies_of

_Node = TypeVar("_Node")


def sort_proto(graph: onnx.GraphProto) -> None:
    """Sort the nodes of one graph in place (not of its subgraphs); a sorted graph stays as it is."""
    order = _order(
        graph.node,
        lambda node: node.output,
        lambda node: [*node.input, *_captured(node)],
        lambda node: node.name,
    )
    if order != list(range(len(order))):
        nodes = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
        del graph.node[:]
        graph.node.extend(nodes)


def constants_first(graph: onnx.GraphProto, ahead: Sequence[onnx.NodeProto] = ()) -> None:
    """List what depends on nothing but constants and outer tensors before the rest of one sorted graph, in place.

    onnxruntime executes depth first, of several inputs the one that is listed last first (`ReverseDFSFrom` in
    onnxruntime/core/graph/graph_viewer.cc). A cast of a weight that is listed in front of its MatMul therefore runs before
    all that the MatMul's other factor depends on, and so do those above it: all weights are widened before the first
    MatMul. Listed first, each is widened when it is read.

    Args:
        ahead: further nodes of that kind, sorted, which come first of all.
    """
    constant = {tensor.name for tensor in graph.initializer}
    varying = {value.name for value in graph.input if value.name not in constant}
    first, rest = list(ahead), []
    for node in graph.node:
        if varying.isdisjoint(node.input) and varying.isdisjoint(_captured(node)):
            first.append(node)
        else:
            rest.append(node)
            varying.update(node.output)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*first, *rest)]
    del graph.node[:]
    graph.node.extend(nodes)


def sort_graph(graph: gs.Graph) -> None:
    """Sort the nodes of a graph and of every subgraph in place; a sorted graph stays as it is."""
    for scope in scopes(graph):
        _sort_nodes(scope)


def _sort_nodes(graph: gs.Graph) -> None:
    order = _order(
        graph.nodes,
        lambda node: [tensor.name for tensor in node.outputs],
        lambda node: [tensor.name for tensor in node.inputs + captured_by(node)],
        lambda node: node.name,
    )
    graph.nodes = [graph.nodes[index] for index in order]


def captured_by(node: gs.Node) -> list[gs.Tensor]:
    """Tensors that the subgraphs of a node read, whichever scope they come from."""
    found: list[gs.Tensor] = []
    for value in node.attrs.values():
        for subgraph in scopes(value) if isinstance(value, gs.Graph) else ():
            found.extend(tensor for inner in subgraph.nodes for tensor in inner.inputs)
            found.extend(subgraph.outputs)
    return found


def _captured(node: onnx.NodeProto) -> Iterable[str]:
    for graph in bodies_of(node):
        for inner in graph.node:
            yield from inner.input
            yield from _captured(inner)
        for output in graph.output:
            yield output.name


def _order(
    nodes: Sequence[_Node],
    outputs: Callable[[_Node], Iterable[str]],
    inputs: Callable[[_Node], Iterable[str]],
    name: Callable[[_Node], str],
) -> list[int]:
    """Depth-first: each node in its place unless something that it needs comes later, which then moves up."""
    producer = {output: index for index, node in enumerate(nodes) for output in outputs(node) if output}
    entered, emitted = bytearray(len(nodes)), bytearray(len(nodes))
    order: list[int] = []
    for root in range(len(nodes)):
        stack = [root]
        while stack:
            index = stack[-1]
            if not entered[index]:
                entered[index] = 1
                needed = map(producer.get, inputs(nodes[index]))
                later = [other for other in needed if other is not None and not emitted[other]]
                if later:
                    if any(entered[other] for other in later):
                        raise Pi05cError(
                            f"the graph has a cycle through node {name(nodes[index])!r}: it cannot be ordered"
                        )
                    stack.extend(reversed(later))
                    continue
            stack.pop()
            if not emitted[index]:
                emitted[index] = 1
                order.append(index)
    return order
