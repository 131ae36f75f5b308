"""The time path of a denoising loop that was not unrolled: what depends on the step alone."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import is_float
from pi05c.passes.patterns.walk import each_node


def find_time_path(graph: gs.Graph) -> list[tuple[gs.Graph, tuple[gs.Node, ...]]]:
    """For each Loop body: its float nodes that depend on constants and step-only carried values alone.

    A carried value is step-only where its start is a constant and its next value depends on step-only values: the
    counter, the time. In an unrolled graph the time path is constant and already folded.
    """
    found = []
    for _, loop in each_node(graph, "Loop"):
        body = loop.attrs["body"]
        carried = list(zip(body.inputs[2:], loop.inputs[2:], body.outputs[1:], strict=False))
        fixed = {id(inner) for inner, start, _ in carried if isinstance(start, gs.Constant)}
        while True:
            known = {id(tensor) for tensor in body.inputs[:1]} | fixed
            nodes = []
            for node in body.nodes:
                reads = [
                    tensor for tensor in node.inputs if tensor.name and not isinstance(tensor, gs.Constant)
                ]
                if not list(node.subgraphs()) and all(id(tensor) in known for tensor in reads):
                    known.update(id(tensor) for tensor in node.outputs)
                    nodes.append(node)
            stay = {
                id(inner)
                for inner, _, after in carried
                if id(inner) in fixed and (id(after) in known or isinstance(after, gs.Constant))
            }
            if stay == fixed:
                break
            fixed = stay
        path = tuple(node for node in nodes if any(is_float(tensor.dtype) for tensor in node.outputs))
        if path:
            found.append((body, path))
    return found
