"""insert_attention_qdq: FP8 on the MatMuls of attention, so that TensorRT can fuse it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, to_numpy
from pi05c.graph.edit import Editor, producer
from pi05c.graph.io import scopes
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.attention import Attention, find_attention
from pi05c.passes.patterns.parts import parts_of
from pi05c.passes.patterns.walk import origin
from pi05c.passes.quantize import E4M3_MAX, Quantizer, is_quantized, scale_of, working_precision

PROBABILITY_AMAX = 1.0
"""Softmax never exceeds 1, whatever the data, so its scale is 1/448."""


def _factors(graph: gs.Graph, **options: object) -> Iterator[gs.Tensor]:
    attentions, _ = find_attention(graph)
    for attention in attentions:
        yield from (*attention.qk.inputs, attention.av.inputs[1])


@graph_pass(
    exact=False, after=("lower_precision", "pin_fp32", "quantize_linears"), min_opset=19, ranges=_factors
)
def insert_attention_qdq(graph: gs.Graph, ctx: PassContext, *, vision: bool = False) -> None:
    """Quantize Q, K, V and the probabilities of each attention to FP8, all four or none.

    K's transpose stays above its quantize and 1/sqrt(d) moves above Q's, so that nothing stands between a
    dequantize and its MatMul. The probabilities' scale is 1/448. The vision tower's attention is left alone unless
    `vision` says otherwise: with head sizes such as 72 its fused kernels gain nothing from FP8.
    """
    parts = parts_of(graph)
    quantizers = {id(scope): Quantizer(ctx.editor(scope)) for scope in scopes(graph)}
    attentions, others = find_attention(graph)
    for other in others:
        ctx.skip(other.softmax.name, other.reason)
    for attention in attentions:
        reason = _obstacle(attention)
        if not reason and not vision and parts[id(attention.qk)] == "vision":
            reason = "it belongs to the vision tower"
        if reason:
            ctx.skip(attention.name, reason)
            continue
        assert ctx.ranges is not None
        factor = float(np.prod([value for _, value in attention.scales]))
        tensors = {"q": attention.qk.inputs[0], "k": attention.qk.inputs[1], "v": attention.av.inputs[1]}
        scales: dict[str, np.ndarray] = {}
        for key, tensor in tensors.items():
            dtype = working_precision(attention.qk if key in "qk" else attention.av)
            amax = ctx.ranges.amax(tensor)
            scale = None
            if amax is not None and dtype is not None:
                scale = scale_of(amax * abs(factor) if key == "q" else amax, dtype)
            if scale is not None:
                scales[key] = scale
        missing = [key for key in tensors if key not in scales]
        if missing:
            names = ", ".join(repr(tensors[key].name) for key in missing)
            ctx.skip(attention.name, f"{names} has no usable range")
            continue
        _quantize(attention, quantizers[id(attention.scope)], factor, scales)
        ctx.changed(attention.name)


def _obstacle(attention: Attention) -> str:
    factors = (*attention.qk.inputs, *attention.av.inputs)
    quantized = [is_quantized(tensor) for tensor in factors]
    if all(quantized):
        return "it is quantized already"
    if any(quantized):
        return "some of Q, K, V and the probabilities are quantized already, not all"
    if any(isinstance(tensor, gs.Constant) for tensor in factors):
        return "one of its factors is a constant"
    return ""


def _quantize(
    attention: Attention, quantizer: Quantizer, factor: float, scales: dict[str, np.ndarray]
) -> None:
    editor = quantizer.editor
    qk, av = attention.qk, attention.av
    for node, _ in attention.scales:
        source = node.inputs[0] if _leads_to_logits(node.inputs[0], attention) else node.inputs[1]
        editor.replace_uses(node.outputs[0], source)
    query = qk.inputs[0]
    if factor != 1.0:
        query = _scaled(query, factor, editor)
    qk.inputs[0] = quantizer.activation(query, scales["q"])
    qk.inputs[1] = quantizer.activation(qk.inputs[1], scales["k"])
    dtype = working_precision(av)
    one = np.asarray(PROBABILITY_AMAX / E4M3_MAX).astype(dtype)
    av.inputs[0] = quantizer.activation(av.inputs[0], one)
    av.inputs[1] = quantizer.activation(av.inputs[1], scales["v"])


def _leads_to_logits(tensor: gs.Tensor, attention: Attention) -> bool:
    """Whether a tensor is the logits' side of a node between QK^T and the softmax."""
    node = producer(tensor)
    return node is not None and (node is attention.qk or any(node is other for other in attention.between))


def _scaled(query: gs.Tensor, factor: float, editor: Editor) -> gs.Tensor:
    """query * factor, in float32 where the query was float32 before its last Cast."""
    cast = producer(query)
    source = query
    if cast is not None and cast.op == "Cast" and to_numpy(cast.inputs[0].dtype) == FLOAT32:
        source = cast.inputs[0]
    name = origin(query).name
    constant = editor.constant(f"{name}.factor", np.asarray(factor, to_numpy(source.dtype)))
    scaled = editor.add("Mul", [source, constant], f"{name}.scaled", dtype=source.dtype, shape=source.shape)
    return editor.cast(scaled, query.dtype)
