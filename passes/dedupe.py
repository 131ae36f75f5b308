"""dedupe: nothing is stored or computed twice."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_graphsurgeon as gs

from pi05c.graph.edit import replace_input
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.identity import fingerprint, is_function, operation
from pi05c.passes.patterns.walk import output_ids


@graph_pass(exact=True, after=("canonicalize", "fuse_denoise_loop"))
def dedupe(graph: gs.Graph, ctx: PassContext) -> None:
    """Let equal initializers be one, and nodes that do the same with the same tensors, in bodies too.

    Initializers are equal by their bytes where those are few or their checksum is recorded, otherwise by the place
    they come from; large weights are not read. A node in a body that repeats one of the graph around it goes. A
    node whose output is an output of a graph stays, and so does one with a body or a random result.
    """
    outputs = output_ids(graph)
    _in_scope(graph, ctx, outputs, {}, {})


def _in_scope(
    scope: gs.Graph,
    ctx: PassContext,
    outputs: set[int],
    constants: dict[Hashable, gs.Constant],
    nodes: dict[Hashable, gs.Node],
) -> None:
    """`constants` and `nodes` hold what the scopes around this one have, by what they hold and do."""
    nodes = dict(nodes)
    kept = []
    for node in scope.nodes:
        for tensor in list(node.inputs):
            if isinstance(tensor, gs.Constant):
                first = constants.setdefault(fingerprint(tensor), tensor)
                if first is not tensor:
                    replace_input(node, tensor, first)
                    ctx.changed(tensor.name)
        for body in node.subgraphs():
            _in_scope(body, ctx, outputs, constants, nodes)
        key = _key(node)
        twin = None if key is None else nodes.setdefault(key, node)
        if twin is None or twin is node:
            kept.append(node)
            continue
        if any(id(tensor) in outputs for tensor in node.outputs):
            ctx.skip(node, f"it repeats {twin.name!r}, but makes an output of the graph")
            kept.append(node)
            continue
        for mine, other in zip(node.outputs, twin.outputs, strict=True):
            for user in list(mine.outputs):
                replace_input(user, mine, other)
        node.inputs.clear()
        node.outputs.clear()
        ctx.changed(node)
    scope.nodes = kept


def _key(node: gs.Node) -> Hashable | None:
    """What a node does with which tensors; None where that does not settle its result."""
    if not is_function(node):
        return None
    return operation(node), tuple(id(tensor) if tensor.name else None for tensor in node.inputs)
