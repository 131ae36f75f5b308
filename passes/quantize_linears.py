"""quantize_linears: FP8 on both sides of each linear, or NVFP4."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import TENSORRT_DOMAIN
from pi05c.graph.dtypes import FLOAT4E2M1, FLOAT8E4M3FN, name_of
from pi05c.graph.edit import declare_domain
from pi05c.graph.io import scopes
from pi05c.graph.ranges import Ranges
from pi05c.graph.weights import Weight, weight_of
from pi05c.passes.blocks import DYNAMIC_RANKS, BlockQuantizer
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.flow import flow_linears
from pi05c.passes.patterns.linear import Linear, find_linears
from pi05c.passes.patterns.named import Named
from pi05c.passes.patterns.parts import parts_of
from pi05c.passes.patterns.walk import static_shape
from pi05c.passes.quantize import (
    Quantizer,
    activation_scale,
    is_quantized,
    precision_obstacle,
    weight_scale,
    working_precision,
)
from pi05c.passes.two_terms import TwoTerms

MIN_SIZE = ALIGNMENT = 16
"""FP8 GEMM kernels take inner and outer sizes that are multiples of 16 bytes (TensorRT, ModelOpt's own rule)."""


Format = Literal["fp8", "nvfp4", "nvfp4_w4a16"]
"""E4M3 on both sides; NVFP4 on both, activations as they come (W4A4); NVFP4 weights and float16 activations (W4A16)."""


ROWS = 256
"""Rows that the rounding of a weight is made up for on, of all linears that read it together."""


def _quantizable(graph: gs.Graph, keep: tuple[str, ...]) -> list[Linear]:
    kept, named = _kept(graph), Named(graph, keep)
    return [linear for linear in find_linears(graph) if not _obstacle(linear, kept, named(linear, keep))]


def _activations(
    graph: gs.Graph,
    *,
    llm: Format = "fp8",
    nvfp4: tuple[str, ...] = (),
    fp8: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    **options: object,
) -> Iterator[gs.Tensor]:
    formats = _formats_of(graph, llm, nvfp4, fp8, Named(graph, nvfp4, fp8))
    for linear in _quantizable(graph, keep):
        if formats[id(linear.node)] != "nvfp4_w4a16":
            yield linear.activation


def _rows(
    graph: gs.Graph, *, keep: tuple[str, ...] = (), rounding: str = "nearest", **options: object
) -> Iterator[tuple[gs.Tensor, int]]:
    if rounding == "compensated":
        for tensors in _fed_to(_quantizable(graph, keep)).values():
            yield from ((tensor, -(-ROWS // len(tensors))) for tensor in tensors)


def _fed_to(linears: Sequence[Linear]) -> dict[int, list[gs.Tensor]]:
    """The activations that each weight multiplies, by `id` of the weight."""
    fed: dict[int, dict[int, gs.Tensor]] = defaultdict(dict)
    for linear in linears:
        fed[id(linear.weight)][id(linear.activation)] = linear.activation
    return {key: list(tensors.values()) for key, tensors in fed.items()}


def _opset(*, llm: Format = "fp8", nvfp4: tuple[str, ...] = (), **options: object) -> int:
    return 23 if llm != "fp8" or nvfp4 else 19  # FLOAT8E4M3FN since 19, FLOAT4E2M1 since 23 (ONNX)


def _formats(*, llm: Format = "fp8", nvfp4: tuple[str, ...] = (), **options: object) -> tuple[str, ...]:
    fp4 = (FLOAT4E2M1,) if llm != "fp8" or nvfp4 else ()
    return tuple(name_of(dtype) for dtype in (FLOAT8E4M3FN, *fp4))


@graph_pass(
    exact=False,
    after=("lower_precision", "pin_fp32"),
    min_opset=_opset,
    ranges=_activations,
    rows=_rows,
    formats=_formats,
)
def quantize_linears(
    graph: gs.Graph,
    ctx: PassContext,
    *,
    llm: Format = "fp8",
    nvfp4: tuple[str, ...] = (),
    fp8: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    two_terms: tuple[str, ...] = (),
    rounding: Literal["nearest", "compensated"] = "nearest",
) -> None:
    """Put FP8 (E4M3) Q/DQ on both factors of each linear, weights stored in FP8.

    One scale a tensor, in the working precision: for the activation the power of two from which on its calibrated
    range fits, for the weight the best of eight between amax / 448 and twice that, by squared rounding error; its
    codes are computed from the weight as the checkpoint stores it. With `rounding=compensated` they are chosen, from
    256 sampled rows of what the weight multiplies, so that later weights of a column make up for the rounding errors
    of earlier ones (GPTQ); where no rows were sampled, and with `rounding=nearest`, each weight is rounded by itself.
    A tensor that several linears read is quantized once, and so is a weight that several steps share. The linears at
    the two ends of the flow (action_in_proj, action_out_proj) and those that a pattern of `keep` names stay as they
    are.

    With `llm=nvfp4` the linears of the language model compute in NVFP4: FP4 (E2M1) weights with an FP8 scale for each 16
    that are summed, activations quantized in such blocks when the engine runs. `llm=nvfp4_w4a16` leaves activations in
    the working precision. Patterns of `nvfp4` bring in other linears, patterns of `fp8` take some out. A pattern is
    held against the names of the MatMul and of the weight, and against the place: `vision.0.qkv`, `prefix.17.down`,
    `denoise.3.gate/up`, `vision.linear` for the projector. `prefix.*.down` names those of all layers.

    Rounding of activations is the larger part of the error, and no choice of weights takes it back. The linears that
    a pattern of `two_terms` names multiply what rounding leaves of their activation too, as further rows of the same
    MatMul: the weight is stored and read once, and the activation is as exact as in float16, for twice the
    multiplications.
    """
    kept = _kept(graph)
    named = Named(graph, nvfp4, fp8, keep, two_terms)
    formats = _formats_of(graph, llm, nvfp4, fp8, named)
    fed = _fed_to(_quantizable(graph, keep)) if rounding == "compensated" else {}
    unsampled = [key for key, tensors in fed.items() if not _sampled(tensors, ctx.ranges)]
    if unsampled:
        ctx.note(
            f"no rows were sampled for {len(unsampled)} of {len(fed)} weights, which are rounded to the nearest"
        )
    quantizers = {id(scope): Quantizer(ctx.editor(scope)) for scope in scopes(graph)}
    blocks = {id(scope): BlockQuantizer(ctx.editor(scope)) for scope in scopes(graph)}
    stored_scales: dict[int, np.ndarray | None] = {}
    terms = TwoTerms()
    for linear in find_linears(graph):
        reason = _obstacle(linear, kept, named(linear, keep))
        rows = _sampled(fed.get(id(linear.weight), ()), ctx.ranges)
        doubled = terms if named(linear, two_terms) else None
        reason = reason or (_two_terms_obstacle(linear) if doubled else "")
        if not reason and formats[id(linear.node)] == "fp8":
            reason = _to_fp8(linear, ctx, quantizers[id(linear.scope)], stored_scales, rows, doubled)
        elif not reason:
            reason = _to_nvfp4(linear, ctx, blocks[id(linear.scope)], formats[id(linear.node)], rows, doubled)
        if reason:
            ctx.skip(linear.node, reason)
            continue
        if formats[id(linear.node)] == "nvfp4":
            declare_domain(graph, TENSORRT_DOMAIN, 1)
        ctx.changed(linear.node)


def _to_fp8(
    linear: Linear,
    ctx: PassContext,
    quantizer: Quantizer,
    scales: dict[int, np.ndarray | None],
    rows: Sequence[Weight],
    doubled: TwoTerms | None,
) -> str:
    """Quantize both factors to FP8, or say why not; `scales` are those of the weights so far, by `id`."""
    assert ctx.ranges is not None
    amax, dtype = ctx.ranges.threshold(linear.activation), working_precision(linear.node)
    if amax is None or dtype is None:
        return f"the range of {linear.activation.name!r} was not measured"
    key = id(linear.weight)
    if key not in scales:
        scales[key] = weight_scale(weight_of(linear.weight), dtype, fitted=not ctx.dry)
    scale, stored_scale = activation_scale(amax, dtype), scales[key]
    if scale is None or stored_scale is None:
        which = linear.activation if scale is None else linear.weight
        return f"the range of {which.name!r} gives no usable scale in {dtype}"
    if doubled:
        doubled.multiply(linear, lambda tensor: quantizer.activation(tensor, scale), quantizer.editor)
    else:
        linear.node.inputs[0] = quantizer.activation(linear.activation, scale)
    linear.node.inputs[1] = quantizer.weight(linear, stored_scale, rows)
    linear.node.attrs.pop("transB", None)
    return ""


def _to_nvfp4(
    linear: Linear,
    ctx: PassContext,
    quantizer: BlockQuantizer,
    chosen: Format,
    rows: Sequence[Weight],
    doubled: TwoTerms | None,
) -> str:
    """Quantize the weight, and with `nvfp4` the activation, in blocks, or say why not."""
    dtype = working_precision(linear.node)
    if dtype is None:
        return f"the type of {linear.activation.name!r} is not known"
    if not 0 < weight_of(linear.weight).amax() < np.inf:
        return "its weight is zero or not finite"
    if chosen == "nvfp4":
        assert ctx.ranges is not None
        amax = ctx.ranges.amax(linear.activation)
        if amax is None:
            return f"the range of {linear.activation.name!r} was not measured"
        if not 0 < amax < np.inf:
            return "its activation is zero or not finite"
        shape = static_shape(linear.activation)
        if shape is None or len(shape) not in DYNAMIC_RANKS:
            return (
                f"{linear.activation.name!r} has not two or three static axes, as dynamic quantization needs"
            )
        if doubled:
            doubled.multiply(
                linear, lambda tensor: quantizer.activation(tensor, amax, dtype), quantizer.editor
            )
        else:
            linear.node.inputs[0] = quantizer.activation(linear.activation, amax, dtype)
    linear.node.inputs[1] = quantizer.weight(linear, dtype, rows)
    linear.node.attrs.pop("transB", None)
    return ""


def _two_terms_obstacle(linear: Linear) -> str:
    """Why the rows of a linear cannot be doubled, empty where nothing speaks against it."""
    shape = static_shape(linear.activation)
    if shape is None or len(shape) < 2:
        return f"{linear.activation.name!r} has no static rows to put a second term beside"
    if len(linear.node.inputs) > 2:
        return f"{linear.node.name!r} is a Gemm that would add its bias to both terms"
    return ""


def _formats_of(
    graph: gs.Graph, llm: Format, nvfp4: Collection[str], fp8: Collection[str], named: Named
) -> dict[int, Format]:
    """The format that each linear is to compute in, by `id` of its node."""
    parts = parts_of(graph)

    def chosen(linear: Linear) -> Format:
        if named(linear, fp8):
            return "fp8"
        if named(linear, nvfp4):
            return "nvfp4" if llm == "fp8" else llm
        return llm if parts[id(linear.node)] == "prefix" else "fp8"

    return {id(linear.node): chosen(linear) for linear in find_linears(graph)}


def _sampled(tensors: Sequence[gs.Tensor], ranges: Ranges | None) -> list[Weight]:
    found = (ranges.rows_of(tensor) for tensor in tensors) if ranges is not None else ()
    return [rows for rows in found if rows is not None and rows.shape[0]]


def _kept(graph: gs.Graph) -> set[int]:
    into, out = flow_linears(graph)
    return {id(linear.node) for linear in (*into, *out)}


def _obstacle(linear: Linear, kept: set[int], named: bool) -> str:
    """Why a linear is not quantized, empty where nothing speaks against it."""
    if is_quantized(linear.node.inputs[0]) or any(node.op == "DequantizeLinear" for node in linear.path):
        return "it is quantized already"
    if id(linear.node) in kept:
        return "it is an end of the flow, which the recipe keeps in higher precision"
    if reason := precision_obstacle(linear.node):
        return reason
    if named:
        return "an option keeps it"
    for size, what in ((linear.rows, "inner"), (linear.columns, "outer")):
        if size < MIN_SIZE or size % ALIGNMENT:
            return f"its {what} size {size} is not a multiple of {ALIGNMENT}"
    shape = static_shape(linear.activation)
    if shape is not None and all(dim == 1 for dim in shape[:-1]):
        return "it multiplies a single row, which reads the weight once either way"
    return ""
