"""pin_fp32: what a robot's accuracy hangs on computes in float32."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, FLOAT64, is_float, to_numpy
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.attention import attention_operators, find_attention
from pi05c.passes.patterns.flow import find_flow
from pi05c.passes.patterns.loop_form import loop_form
from pi05c.passes.patterns.loops import each_loop
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.rope import find_angles, find_rope
from pi05c.passes.patterns.softmax import find_softmaxes
from pi05c.passes.patterns.time import find_time_path
from pi05c.passes.retype import Retyper, others_than, remove_redundant_casts


@graph_pass(exact=False, after=("lower_precision",))
def pin_fp32(graph: gs.Graph, ctx: PassContext) -> None:
    """Run softmax, RMSNorm, adaRMS, LayerNorm, RoPE, the time path and x += dt * v in float32.

    A region is cast at its border and nowhere inside; its constants are read as they were before
    `lower_precision` put casts behind them. A loop carries x and the time in float32 as well. The scale and the
    mask between QK^T and softmax belong to the softmax, the weight, scale and shift to the norm, and the
    arithmetic of positions and of the denoising time to the cosine and sine that read it. Works on any graph in
    16-bit precision, whoever made it.
    """
    regions = list(_regions(graph))
    operators = attention_operators(graph)
    for node in operators:
        ctx.skip(node, "it is attention as one operator, whose softmax computes in the type that it chooses")
    if not regions and not operators:
        ctx.skip("graph", "it has no softmax, norm, RoPE, time path or flow accumulation")
    every = {id(node): node for _, _, region in regions for node in region}
    low = {id(node) for node in others_than(every.values(), FLOAT32) if _is_low(node)}
    retyper = Retyper(graph, ctx.names)
    loops = [form for scope, node in each_loop(graph) if not isinstance(form := loop_form(scope, node), str)]
    steps = {id(node) for kind, _, region in regions if kind in ("time", "flow") for node in region}
    low |= steps & {id(node) for form in loops for node in retyper.narrowed(form, FLOAT32).values()}
    pinned = ctx.first(regions, lambda region: any(id(node) in low for node in region[2]))
    nodes = {id(node): node for _, _, region in pinned for node in region}
    retyper.run_in(nodes.values(), FLOAT32, loops, steps & nodes.keys())
    remove_redundant_casts(graph)
    for kind, name, region in pinned:
        if any(id(node) in low for node in region):
            ctx.changed(f"{kind} {name}")


def _regions(graph: gs.Graph) -> Iterator[tuple[str, str, tuple[gs.Node, ...]]]:
    attentions, _ = find_attention(graph)
    logits = {id(attention.softmax.nodes[0]): attention.between for attention in attentions}
    for softmax in find_softmaxes(graph):
        between = logits.get(id(softmax.nodes[0]), ())
        yield "softmax", softmax.name, (*between, *softmax.nodes)
    for norm in find_norms(graph):
        yield norm.kind, norm.name, norm.nodes
    for rope in find_rope(graph):
        yield "RoPE", rope.name, rope.nodes
    for _, nodes in find_angles(graph):
        yield "angles", nodes[-1].name, nodes
    for _, nodes in find_time_path(graph):
        yield "time", nodes[-1].name, nodes
    for step in find_flow(graph):
        yield "flow", step.add.name, step.nodes


def _is_low(node: gs.Node) -> bool:
    return any(
        is_float(tensor.dtype) and to_numpy(tensor.dtype) not in (FLOAT32, FLOAT64)
        for tensor in node.outputs
        if tensor.name
    )
