"""quantize_linears: FP8 on both sides of each linear."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.io import scopes
from pi05c.graph.weights import weight_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.flow import flow_linears
from pi05c.passes.patterns.linear import Linear, find_linears
from pi05c.passes.patterns.walk import static_shape
from pi05c.passes.quantize import Quantizer, activation_scale, is_quantized, weight_scale, working_precision

MIN_SIZE = ALIGNMENT = 16
"""FP8 GEMM kernels take inner and outer sizes that are multiples of 16 bytes (TensorRT, ModelOpt's own rule)."""


def _activations(graph: gs.Graph, *, keep: tuple[str, ...] = (), **options: object) -> Iterator[gs.Tensor]:
    kept = _kept(graph)
    for linear in find_linears(graph):
        if not _obstacle(linear, kept, keep):
            yield linear.activation


@graph_pass(
    exact=False,
    after=("lower_precision", "pin_fp32"),
    min_opset=19,
    ranges=_activations,
    formats=("float8e4m3fn",),
)
def quantize_linears(graph: gs.Graph, ctx: PassContext, *, keep: tuple[str, ...] = ()) -> None:
    """Put FP8 (E4M3) Q/DQ on both factors of each linear, weights stored in FP8.

    One scale a tensor, in the working precision: for the activation the power of two from which on its calibrated
    range fits, for the weight the best of eight between amax / 448 and twice that, by squared rounding error; its
    codes are computed from the weight as the checkpoint stores it. A tensor
    that several linears read is quantized once, and so is a weight that several steps share. The linears at the
    two ends of the flow (action_in_proj, action_out_proj) and those that a pattern of `keep` names stay as they
    are.
    """
    kept = _kept(graph)
    quantizers = {id(scope): Quantizer(ctx.editor(scope)) for scope in scopes(graph)}
    stored_scales: dict[int, np.ndarray | None] = {}
    for linear in find_linears(graph):
        reason = _obstacle(linear, kept, keep)
        if reason:
            ctx.skip(linear.node, reason)
            continue
        assert ctx.ranges is not None
        dtype = working_precision(linear.node)
        amax = ctx.ranges.amax(linear.activation)
        if amax is None or dtype is None:
            ctx.skip(linear.node, f"the range of {linear.activation.name!r} was not measured")
            continue
        scale = activation_scale(amax, dtype)
        if id(linear.weight) not in stored_scales:
            stored_scales[id(linear.weight)] = weight_scale(weight_of(linear.weight), dtype)
        stored_scale = stored_scales[id(linear.weight)]
        if scale is None or stored_scale is None:
            which = linear.activation if scale is None else linear.weight
            ctx.skip(linear.node, f"the range of {which.name!r} gives no usable scale in {dtype}")
            continue
        quantizer = quantizers[id(linear.scope)]
        linear.node.inputs[0] = quantizer.activation(linear.activation, scale)
        linear.node.inputs[1] = quantizer.weight(linear, stored_scale)
        if linear.node.op == "Gemm":
            linear.node.attrs.pop("transB", None)
        ctx.changed(linear.node)


def _kept(graph: gs.Graph) -> set[int]:
    into, out = flow_linears(graph)
    return {id(linear.node) for linear in (*into, *out)}


def _obstacle(linear: Linear, kept: set[int], patterns: tuple[str, ...]) -> str:
    """Why a linear is not quantized, empty where nothing speaks against it."""
    if is_quantized(linear.node.inputs[0]) or any(node.op == "DequantizeLinear" for node in linear.path):
        return "it is quantized already"
    if id(linear.node) in kept:
        return "it is an end of the flow, which the recipe keeps in higher precision"
    if any(
        fnmatch.fnmatch(name, pattern)
        for pattern in patterns
        for name in (linear.node.name, linear.weight.name)
    ):
        return "an option keeps it"
    for size, what in ((linear.rows, "inner"), (linear.columns, "outer")):
        if size < MIN_SIZE or size % ALIGNMENT:
            return f"its {what} size {size} is not a multiple of {ALIGNMENT}"
    shape = static_shape(linear.activation)
    if shape is not None and all(dim == 1 for dim in shape[:-1]):
        return "it multiplies a single row, which reads the weight once either way"
    return ""
