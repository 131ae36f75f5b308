"""fold_gqa: no repeated key or value heads."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.key_transposer import KeyTransposer
from pi05c.passes.patterns.attention import Attention, find_attention
from pi05c.passes.patterns.gqa import Repeat, find_repeat
from pi05c.passes.patterns.walk import static_shape


@graph_pass(exact=True, after=("canonicalize", "fuse_denoise_loop"))
def fold_gqa(graph: gs.Graph, ctx: PassContext) -> None:
    """Turn query heads that share a key/value head into rows of one MatMul.

    [B, K * G, S, d] queries against G-fold repeated keys become [B, K, G * S, d] against the keys themselves, and
    the probabilities likewise against the values; the repetition goes. For mask and softmax the logits take the shape
    of the heads again.
    """
    transposer = KeyTransposer(graph, ctx)
    attentions, _ = find_attention(graph)
    repeated = 0
    for attention in attentions:
        keys, values = find_repeat(attention.qk.inputs[1]), find_repeat(attention.av.inputs[1])
        if keys is None and values is None:
            continue
        repeated += 1
        if keys is None or values is None:
            ctx.skip(attention.name, "its keys are repeated and its values are not, or the other way round")
            continue
        reason = _obstacle(attention, keys, values)
        if reason:
            ctx.skip(attention.name, reason)
            continue
        _fold(attention, keys, values, transposer)
        ctx.changed(attention.name)
    if not repeated:
        ctx.skip("graph", "no attention in it repeats key and value heads")


def _obstacle(attention: Attention, keys: Repeat, values: Repeat) -> str:
    if len(attention.chunks) > 1:
        return "its keys come in several chunks"
    if keys.groups != values.groups:
        return f"its keys are repeated {keys.groups} times, its values {values.groups} times"
    if values.moved is not None:
        return "its values are transposed"
    batch = (static_shape(attention.qk.inputs[0]) or (0,))[0]
    heads = (static_shape(keys.source) or (0, 0))[1] * keys.groups
    for tensor in (
        attention.qk.inputs[0],
        attention.qk.outputs[0],
        attention.av.inputs[0],
        attention.av.outputs[0],
    ):
        shape = static_shape(tensor)
        if shape is None or len(shape) != 4:
            return f"the shape of {tensor.name!r} is not static"
        if shape[:2] != (batch, heads):
            return f"{tensor.name!r} is not of the batch of the queries and of all heads"
    return ""


def _fold(attention: Attention, keys: Repeat, values: Repeat, transposer: KeyTransposer) -> None:
    editor = transposer.editors[id(attention.scope)]
    qk, av = attention.qk, attention.av
    query = qk.inputs[0]
    batch, heads, rows, width = static_shape(query) or ()
    groups = keys.groups
    grouped = [batch, heads // groups, groups * rows]
    columns = (static_shape(qk.outputs[0]) or ())[3]
    depth = (static_shape(av.outputs[0]) or ())[3]

    qk.inputs[0] = _reshaped(query, [*grouped, width], f"{query.name}.grouped", editor)
    qk.inputs[1] = keys.source if keys.moved is None else transposer(keys.source, attention.scope)
    logits = qk.outputs[0]
    product = gs.Variable(editor.names.unique(f"{logits.name}.grouped"), logits.dtype, [*grouped, columns])
    qk.outputs = [product]
    _reshape_into(product, logits, editor)

    probabilities = av.inputs[0]
    av.inputs[0] = _reshaped(probabilities, [*grouped, columns], f"{probabilities.name}.grouped", editor)
    av.inputs[1] = values.source
    mixed = av.outputs[0]
    result = gs.Variable(editor.names.unique(f"{mixed.name}.grouped"), mixed.dtype, [*grouped, depth])
    av.outputs = [result]
    _reshape_into(result, mixed, editor)


def _reshaped(tensor: gs.Tensor, shape: list[int], name: str, editor: Editor) -> gs.Variable:
    target = editor.constant(f"{name}.shape", np.asarray(shape, np.int64))
    return editor.add("Reshape", [tensor, target], name, dtype=tensor.dtype, shape=shape)


def _reshape_into(tensor: gs.Variable, result: gs.Variable, editor: Editor) -> None:
    """Make `result`, which keeps its readers, a Reshape of `tensor`."""
    target = editor.constant(f"{result.name}.shape", np.asarray(static_shape(result), np.int64))
    node = gs.Node("Reshape", editor.names.unique(f"{result.name}.Reshape"), {}, [tensor, target], [result])
    editor.scope.nodes.append(node)
