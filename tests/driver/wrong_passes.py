"""A plug-in with passes that are wrong on purpose, for tests of what finds them."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from pi05c.graph.edit import producer, replace_input
from pi05c.graph.weights import array_of
from pi05c.passes import PassContext, graph_pass
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.walk import each_node, scalar


@graph_pass(exact=True)
def swap_modulation(graph: gs.Graph, ctx: PassContext, *, which: int = 7) -> None:
    """Give each adaRMS its operands in one order, and in one, counted by `which` from 1, swap scale and shift."""
    modulated = [norm for norm in find_norms(graph) if norm.kind == "adaRMS"]
    for number, norm in enumerate(modulated, 1):
        inside = {id(node) for node in norm.nodes}
        plus_one = next(node for node in norm.nodes if node.op == "Add" and _adds_one(node))
        add = norm.nodes[-1]
        add.inputs = sorted(add.inputs, key=lambda tensor: id(producer(tensor)) not in inside)
        if number == which:
            scale = next(tensor for tensor in plus_one.inputs if scalar(tensor) is None)
            shift = add.inputs[1]
            replace_input(plus_one, scale, shift)
            replace_input(add, shift, scale)
        ctx.changed(add)


def _adds_one(node: gs.Node) -> bool:
    return any(scalar(tensor) == 1 for tensor in node.inputs)


@graph_pass(exact=False)
def share_scales(graph: gs.Graph, ctx: PassContext, *, which: int = 3) -> None:
    """Give each dequantized activation a scale of its own, and drop one, counted by `which` from 1: it becomes 1."""
    editor = ctx.editor(graph)
    pairs = [node for _, node in each_node(graph, "DequantizeLinear") if producer(node.inputs[0]) is not None]
    for number, node in enumerate(pairs, 1):
        scale = node.inputs[1]
        value = array_of(scale)
        node.inputs[1] = editor.constant(f"{scale.name}.own", value * 0 + 1 if number == which else value)
        ctx.changed(node)


@graph_pass(exact=False)
def share_key_scales(graph: gs.Graph, ctx: PassContext, *, which: int = 4) -> None:
    """Give the dequantized keys of each attention a scale of their own, and drop one, counted by `which` from 1."""
    attentions, _ = find_attention(graph)
    chunks = [(attention.scope, chunk) for attention in attentions for chunk in attention.chunks]
    keys = [(scope, producer(chunk.qk.inputs[1])) for scope, chunk in chunks]
    quantized = [(scope, node) for scope, node in keys if node is not None and node.op == "DequantizeLinear"]
    for number, (scope, node) in enumerate(quantized, 1):
        scale = node.inputs[1]
        value = array_of(scale)
        own = value * 0 + 1 if number == which else value
        node.inputs[1] = ctx.editor(scope).constant(f"{scale.name}.own", own)
        ctx.changed(node)


@graph_pass(exact=True)
def crash(graph: gs.Graph, ctx: PassContext, *, behind: int = 3) -> None:
    """Name nodes anew, and crash behind some."""
    for number, node in enumerate(graph.nodes):
        if number == behind:
            raise IndexError("list index out of range")
        node.name = f"{node.name}.anew"
        ctx.changed(node)


@graph_pass(exact=True)
def lose_tensor(graph: gs.Graph, ctx: PassContext, *, which: int = 3) -> None:
    """Read the first input of each linear in place, and of one, counted by `which` from 1, a tensor that nothing makes."""
    for number, (_, node) in enumerate(each_node(graph, "MatMul"), 1):
        tensor = node.inputs[0]
        lost = gs.Variable(f"{tensor.name}.lost", tensor.dtype, tensor.shape)
        node.inputs[0] = lost if number == which else tensor
        ctx.changed(node)
