"""A plug-in with passes that fail, for tests of what is kept of a failure."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from pi05c.graph.errors import Pi05cError
from pi05c.passes import PassContext, graph_pass


@graph_pass(exact=True)
def break_down(graph: gs.Graph, ctx: PassContext) -> None:
    """Takes the first node's inputs away, then breaks down."""
    graph.nodes[0].inputs.clear()
    raise ValueError(f"{graph.nodes[0].name} has no inputs")


@graph_pass(exact=True)
def leave_invalid(graph: gs.Graph, ctx: PassContext) -> None:
    """Gives a MatMul one input only."""
    node = next(node for node in graph.nodes if node.op == "MatMul")
    del node.inputs[1]
    ctx.changed(node)


@graph_pass(exact=True)
def refuse(graph: gs.Graph, ctx: PassContext) -> None:
    """Finds that the request cannot be done."""
    raise Pi05cError("there is no third camera: leave it out")


def _projections(graph: gs.Graph, **_: object) -> Iterator[gs.Tensor]:
    yield from (node.outputs[0] for node in graph.nodes if node.op == "MatMul")


@graph_pass(exact=False, ranges=_projections)
def break_by_ranges(graph: gs.Graph, ctx: PassContext) -> None:
    """Breaks down with the ranges that it was given."""
    assert ctx.ranges is not None
    tensor = next(_projections(graph))
    raise ValueError(f"{tensor.name} reaches {ctx.ranges.amax(tensor)}")
