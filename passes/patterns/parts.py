"""Which part of the policy a node belongs to: vision tower, language prefix or denoising."""

from __future__ import annotations

from typing import Literal

import onnx_graphsurgeon as gs

from pi05c.graph.sort import captured_by
from pi05c.passes.patterns.flow import find_flow
from pi05c.passes.patterns.walk import origin

Part = Literal["vision", "prefix", "denoise"]

PARTS: tuple[Part, ...] = ("vision", "prefix", "denoise")


def parts_of(graph: gs.Graph) -> dict[int, Part]:
    """The part of each node of the graph and of its bodies, by `id(node)`.

    `denoise` is what depends on the state of the flow (a loop that accumulates it, whole); `vision` is what
    depends on a Conv's output and leads to nothing but the prefix; the rest is `prefix`. The vision tower ends
    where its values meet others: at the first Concat with a tensor that no Conv made.
    """
    steps = find_flow(graph)
    state = {id(origin(step.state)) for step in steps if step.scope is graph} & {
        id(tensor) for tensor in graph.inputs
    }
    bodies = {id(step.scope) for step in steps if step.scope is not graph}
    parts: dict[int, Part] = {}
    flowing, seeing = set(state), set[int]()
    for node in graph.nodes:
        read = [tensor for tensor in (*node.inputs, *captured_by(node)) if tensor.name]
        inner = list(node.subgraphs(recursive=True))
        if any(id(tensor) in flowing for tensor in read) or any(id(body) in bodies for body in inner):
            part: Part = "denoise"
            flowing.update(id(tensor) for tensor in node.outputs)
        elif node.op == "Conv" or (any(id(tensor) in seeing for tensor in read) and not _joins(node, seeing)):
            part = "vision"
            seeing.update(id(tensor) for tensor in node.outputs)
        else:
            part = "prefix"
        parts[id(node)] = part
        for body in inner:
            parts.update({id(nested): part for nested in body.nodes})
    return parts


def _joins(node: gs.Node, seeing: set[int]) -> bool:
    """Whether a Concat puts what the camera saw beside something else, as the prefix does with the text."""
    others = [
        tensor for tensor in node.inputs if id(tensor) not in seeing and not isinstance(tensor, gs.Constant)
    ]
    return node.op == "Concat" and bool(others)
