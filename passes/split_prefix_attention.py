"""split_prefix_attention: what the denoising steps ask of the prefix is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.edit import Editor, producer
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.key_transposer import SWAP_LAST, KeyTransposer
from pi05c.passes.patterns.attention import Attention, find_attention
from pi05c.passes.patterns.parts import parts_of
from pi05c.passes.patterns.walk import static_shape


@graph_pass(exact=True, after=("canonicalize", "fuse_denoise_loop", "fold_gqa"), min_opset=13)
def split_prefix_attention(graph: gs.Graph, ctx: PassContext) -> None:
    """Split attention over Concat(prefix, suffix) into one pair of MatMuls for each part and one joint softmax.

    The logits of the parts are concatenated, the probabilities split, the products with V added. So the prefix's
    keys are transposed, cast and quantized once for all steps, and a step touches only its own few keys. Applies
    where a part of the keys does not depend on the flow's state and the attention does.
    """
    parts = parts_of(graph)
    transposer = KeyTransposer(graph, ctx)
    attentions, _ = find_attention(graph)
    candidates = 0
    for attention in attentions:
        if len(attention.chunks) > 1 or parts[id(attention.qk)] != "denoise":
            continue
        candidates += 1
        keys, values = _keys(attention), _concat(attention.av.inputs[1], 2)
        reason = _obstacle(attention, keys, values, parts)
        if reason:
            ctx.skip(attention.name, reason)
            continue
        assert keys is not None and values is not None  # noqa: PT018
        _split(attention, keys, values, transposer)
        ctx.changed(attention.name)
    if not candidates:
        ctx.skip("graph", "no attention in it belongs to denoising and reads its keys in one piece")


def _keys(attention: Attention) -> gs.Node | None:
    """The Concat of keys behind the transpose that QK^T reads."""
    node = producer(attention.qk.inputs[1])
    if node is None or node.op != "Transpose" or list(node.attrs.get("perm", ())) != SWAP_LAST:
        return None
    return _concat(node.inputs[0], 2)


def _concat(tensor: gs.Tensor, axis: int) -> gs.Node | None:
    node = producer(tensor)
    if node is None or node.op != "Concat" or node.attrs.get("axis") not in (axis, axis - 4):
        return None
    return node if all(len(static_shape(part) or ()) == 4 for part in node.inputs) else None


def _obstacle(
    attention: Attention, keys: gs.Node | None, values: gs.Node | None, parts: Mapping[int, str]
) -> str:
    if keys is None or values is None:
        return "its keys or values are not a concatenation that it reads directly (fold_gqa first)"
    lengths = [[(static_shape(part) or ())[2] for part in node.inputs] for node in (keys, values)]
    if lengths[0] != lengths[1]:
        return f"its keys are concatenated of {lengths[0]} positions, its values of {lengths[1]}"
    for tensor in (attention.qk.outputs[0], attention.av.inputs[0], attention.av.outputs[0]):
        if static_shape(tensor) is None:
            return f"the shape of {tensor.name!r} is not static"
    made = [producer(part) for part in keys.inputs]
    if all(node is not None and parts.get(id(node)) == "denoise" for node in made):
        return "no part of its keys is the same in all steps"
    return ""


def _split(attention: Attention, keys: gs.Node, values: gs.Node, transposer: KeyTransposer) -> None:
    qk, av, scope = attention.qk, attention.av, attention.scope
    editor = transposer.editors[id(scope)]
    lengths = [(static_shape(part) or ())[2] for part in keys.inputs]
    query, logits = qk.inputs[0], qk.outputs[0]
    rows = list(static_shape(logits) or ())[:-1]
    products = [
        editor.add(
            "MatMul",
            [query, transposer(part, scope)],
            f"{logits.name}.part",
            dtype=logits.dtype,
            shape=[*rows, length],
        )
        for part, length in zip(keys.inputs, lengths, strict=True)
    ]
    qk.op, qk.attrs = "Concat", {"axis": len(rows)}
    qk.inputs = products

    probabilities, mixed = av.inputs[0], av.outputs[0]
    pieces = _pieces(probabilities, lengths, editor)
    shape = list(static_shape(mixed) or ())
    sums = [
        editor.add("MatMul", [piece, part], f"{mixed.name}.part", dtype=mixed.dtype, shape=shape)
        for piece, part in zip(pieces, values.inputs, strict=True)
    ]
    total: gs.Tensor = sums[0]
    for term in sums[1:-1]:
        total = editor.add("Add", [total, term], f"{mixed.name}.sum", dtype=mixed.dtype, shape=shape)
    av.op, av.attrs = "Add", {}
    av.inputs = [total, sums[-1]]


def _pieces(tensor: gs.Tensor, lengths: Sequence[int], editor: Editor) -> list[gs.Variable]:
    sizes = editor.constant(f"{tensor.name}.sizes", np.asarray(lengths, np.int64))
    rows = list(static_shape(tensor) or ())[:-1]
    pieces = [
        gs.Variable(editor.names.unique(f"{tensor.name}.part"), dtype=tensor.dtype, shape=[*rows, length])
        for length in lengths
    ]
    name = editor.names.unique(f"{tensor.name}.Split")
    editor.scope.nodes.append(gs.Node("Split", name, {"axis": len(rows)}, [tensor, sizes], pieces))
    return pieces
