"""insert_attention_qdq: FP8 on the MatMuls of attention, so that TensorRT can fuse it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT32, to_numpy
from pi05c.graph.edit import Editor, producer
from pi05c.graph.io import scopes
from pi05c.graph.ranges import Ranges
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.attention import Attention, Chunk, attention_operators, find_attention
from pi05c.passes.patterns.parts import Part, parts_of
from pi05c.passes.patterns.walk import origin, scalar, static_shape
from pi05c.passes.quantize import (
    E4M3_MAX,
    Quantizer,
    activation_scale,
    is_quantized,
    precision_obstacle,
    working_precision,
)

PROBABILITY_AMAX = 1.0
"""Softmax never exceeds 1, whatever the data, so its scale is 1/448."""


def _factors(graph: gs.Graph, **options: object) -> Iterator[gs.Tensor]:
    attentions, _ = find_attention(graph)
    for attention in attentions:
        for chunk in attention.chunks:
            yield from (*chunk.qk.inputs, chunk.av.inputs[1])


@graph_pass(
    exact=False,
    after=("lower_precision", "pin_fp32", "quantize_linears"),
    min_opset=19,
    ranges=_factors,
    formats=("float8e4m3fn",),
)
def insert_attention_qdq(
    graph: gs.Graph,
    ctx: PassContext,
    *,
    vision: bool = False,
    min_keys: int = 64,
    keep: tuple[Part, ...] = (),
) -> None:
    """Quantize Q, K, V and the probabilities of each attention, or chunk of one, to FP8: all four or none.

    K's transpose stays above its quantize and 1/sqrt(d) moves above Q's, so that nothing stands between a
    dequantize and its MatMul. The probabilities' scale is 1/448. Where keys come in several chunks, a chunk of
    fewer than `min_keys` keys keeps the working precision: quantizing the few keys of the actions themselves costs
    more time than it saves. The vision tower's attention is left alone unless `vision` says otherwise, that of the parts
    in `keep` (`prefix`, `denoise`) in any case.
    """
    parts = parts_of(graph)
    quantizers = {id(scope): Quantizer(ctx.editor(scope)) for scope in scopes(graph)}
    attentions, others = find_attention(graph)
    for other in others:
        ctx.skip(other.softmax.name, other.reason)
    for node in attention_operators(graph):
        ctx.skip(node, "it is attention as one operator, which has no tensors inside to quantize")
    for attention in attentions:
        reason = _obstacle(attention)
        if not reason and not vision and parts[id(attention.qk)] == "vision":
            reason = "it belongs to the vision tower"
        if not reason and parts[id(attention.qk)] in keep:
            reason = "an option keeps it"
        if reason:
            ctx.skip(attention.name, reason)
            continue
        assert ctx.ranges is not None
        chosen: list[tuple[Chunk, _Scales]] = []
        for chunk in attention.chunks:
            keys = static_shape(chunk.qk.inputs[1])
            if len(attention.chunks) > 1 and keys is not None and keys[-1] < min_keys:
                ctx.skip(chunk.qk, f"its chunk of {keys[-1]} keys is too small to gain from FP8")
                continue
            scales = _scales(attention, chunk, ctx.ranges)
            if isinstance(scales, str):
                ctx.skip(chunk.qk, scales)
            else:
                chosen.append((chunk, scales))
        if chosen:
            _quantize(attention, chosen, quantizers[id(attention.scope)])
            ctx.changed(attention.name)


@dataclass(frozen=True)
class _Scales:
    """The scales of Q (1/sqrt(d) included), K and V."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


def _obstacle(attention: Attention) -> str:
    factors = [tensor for chunk in attention.chunks for tensor in (*chunk.qk.inputs, *chunk.av.inputs)]
    quantized = [is_quantized(tensor) for tensor in factors]
    if any(quantized):
        return "it is quantized already" if all(quantized) else "some of its factors are quantized already"
    if any(isinstance(tensor, gs.Constant) for tensor in factors):
        return "one of its factors is a constant"
    reasons = (precision_obstacle(node) for chunk in attention.chunks for node in (chunk.qk, chunk.av))
    return next(filter(None, reasons), "")


def _scales(attention: Attention, chunk: Chunk, ranges: Ranges) -> _Scales | str:
    factor = abs(_factor(attention))
    found = []
    for node, tensor, multiple in (
        (chunk.qk, chunk.qk.inputs[0], factor),
        (chunk.qk, chunk.qk.inputs[1], 1.0),
        (chunk.av, chunk.av.inputs[1], 1.0),
    ):
        amax, dtype = ranges.threshold(tensor), working_precision(node)
        scale = None if amax is None or dtype is None else activation_scale(amax * multiple, dtype)
        if scale is None:
            return f"{tensor.name!r} has no usable range"
        found.append(scale)
    return _Scales(*found)


def _factor(attention: Attention) -> float:
    return float(np.prod([value for _, value in attention.scales]))


def _quantize(attention: Attention, chosen: list[tuple[Chunk, _Scales]], quantizer: Quantizer) -> None:
    editor = quantizer.editor
    factor = _factor(attention)
    for node, _ in attention.scales:
        logits = next(tensor for tensor in node.inputs if scalar(tensor) is None)
        editor.replace_uses(node.outputs[0], logits)
    if factor != 1.0:
        scaled: dict[int, gs.Tensor] = {}
        for chunk in attention.chunks:
            query = chunk.qk.inputs[0]
            if id(query) not in scaled:
                scaled[id(query)] = _scaled(query, factor, editor)
            chunk.qk.inputs[0] = scaled[id(query)]
    for chunk, scales in chosen:
        qk, av = chunk.qk, chunk.av
        one = np.asarray(PROBABILITY_AMAX / E4M3_MAX).astype(working_precision(av))
        qk.inputs[0] = quantizer.activation(qk.inputs[0], scales.query)
        qk.inputs[1] = quantizer.activation(qk.inputs[1], scales.key)
        av.inputs[0] = quantizer.activation(av.inputs[0], one)
        av.inputs[1] = quantizer.activation(av.inputs[1], scales.value)


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
