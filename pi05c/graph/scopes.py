"""Graphs inside graphs: the bodies of Loop, Scan, If and their like, in protos and in onnx-graphsurgeon's objects."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs

from pi05c.graph.walk import bodies_of, graphs_in


def scopes(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and every subgraph inside it, outer before inner."""
    yield graph
    for node in graph.nodes:
        for value in node.attrs.values():  # `scopes_of` would make a generator for each node
            if isinstance(value, gs.Graph):
                yield from scopes(value)


def scopes_of(node: gs.Node) -> Iterator[gs.Graph]:
    """Every subgraph of a node, outer before inner."""
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            yield from scopes(value)


def nodes_of(graph: gs.Graph) -> Iterator[gs.Node]:
    """Every node, those of bodies behind the node that holds them; the order of `nodes_in`."""
    for node in graph.nodes:
        yield node
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from nodes_of(value)


def nodes_in(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of bodies behind the node that holds them."""
    for node in graph.node:
        yield node
        for body in bodies_of(node):
            yield from nodes_in(body)


__all__ = ["bodies_of", "graphs_in", "nodes_in", "nodes_of", "scopes", "scopes_of"]
