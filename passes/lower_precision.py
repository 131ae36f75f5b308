"""lower_precision: from float32 to a 16-bit working precision, except where values would not survive it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.domains import bare_name
from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32, LARGEST, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.ranges import Ranges, bounding_tensors
from pi05c.graph.scopes import nodes_of
from pi05c.graph.weights import array_of
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.walk import MOVING, QDQ, constant, each_node, made_by, scalar
from pi05c.passes.retype import CONTROL_FLOW, Retyper, others_than, remove_redundant_casts, states_type, takes

SMALLEST_NORMAL = {FLOAT16: 2.0**-14, BFLOAT16: 2.0**-126}
"""Smallest positive number with the full significand (IEEE 754 binary16; bfloat16)."""

SCALE_ERROR = 2.0**-8
"""Relative error that rounding may give a quantizer's scale: a sixteenth of E4M3's half step, 2^-4."""

_FILLING = frozenset(
    {"ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Operators whose values come from none that are given."""

_STATING = _FILLING | frozenset(
    {
        *(
            "Bernoulli",
            "BlackmanWindow",
            "HammingWindow",
            "HannWindow",
            "MelWeightMatrix",
            "BitCast",
            "Range",
        ),
        *("Cast", "Constant", "QuantizeLinear", "DequantizeLinear"),
    }
)
"""Operators by which a function of the model holds to the types that it was written for."""

_COMPARED = frozenset({"Equal", "OneHot", "Mod", "Floor", "Ceil", "Round"})
"""Operators on floats that stand for whole numbers, which 16 bits merge beyond their significand."""

_OF_A_GUARD = frozenset({"Sqrt", "Pow", "Reciprocal", "Exp"})
"""Operators behind a summand or bound that keeps a number away from zero, whose result is as small or as large."""

WHOLE = {FLOAT16: 2048.0, BFLOAT16: 256.0}
"""Up to here every whole number is one of the type (IEEE 754 binary16; bfloat16)."""

SMALLEST = {FLOAT16: 2.0**-25, BFLOAT16: 2.0**-134}
"""What is not larger than this becomes zero in the type: half of its smallest subnormal number."""

_PRODUCTS = ("Mul", "Div", "MatMul", "Gemm", "Conv", "Einsum")
"""Operators whose result is as inaccurate as their least accurate factor, however small that is."""


def _computed_tensors(graph: gs.Graph, **options: object) -> Iterator[gs.Tensor]:
    """What arithmetic makes in float32; values that are only moved have the range of what they come from."""
    yield from (tensor for tensor in graph.inputs if to_numpy(tensor.dtype) == FLOAT32)
    for _, node in each_node(graph):
        if node.op in CONTROL_FLOW or node.op in _FILLING:
            continue
        for tensor in node.outputs:
            if (
                tensor.name
                and to_numpy(tensor.dtype) == FLOAT32
                and not _is_sequence(tensor)
                and not _is_bounded(tensor)
            ):
                yield tensor


def _is_sequence(tensor: gs.Tensor) -> bool:
    return getattr(tensor, "type", "tensor_type") != "tensor_type"


def _is_bounded(tensor: gs.Tensor) -> bool:
    """Whether the range of a tensor follows from that of others that are measured, of constants, or from its operator.

    That of a Sigmoid is measured: a map of probabilities that are all close to zero is not one that 16 bits hold.
    """
    sources = None if made_by(tensor, "Sigmoid", through=()) else bounding_tensors(tensor)
    return sources is not None and all(
        isinstance(source, gs.Constant) or to_numpy(source.dtype) == FLOAT32 for source in sources
    )


@graph_pass(
    exact=False, after=("canonicalize", "fuse_denoise_loop"), ranges=_computed_tensors, ranges_optional=True
)
def lower_precision(
    graph: gs.Graph,
    ctx: PassContext,
    *,
    to: Literal["float16", "bfloat16"] = "float16",
    headroom: float = 1.0,
) -> None:
    """Compute in float16 (or bfloat16) whatever float32 arithmetic fits, inputs and outputs staying float32.

    A node stays in float32 where a measured output, or a constant that it reads, times `headroom` exceeds the
    largest 16-bit number, or where its output or a factor that it multiplies is so small everywhere that it would
    be subnormal. So does one that reads a value of unknown range from a node that stays, a quantizer, with its
    MatMul, whose scale 16 bits would round too far, an operator that has no such type or states another, and one
    that compares or rounds whole numbers which 16 bits do not hold. Where a constant that keeps a number away from
    zero would become zero itself, as 1e-12 in float16, everything stays up to the division or logarithm.
    Without ranges only constants guard. Constants are not rewritten: each gets a Cast behind it, so that
    `pin_fp32` finds the original value; `canonicalize` bakes the casts that are left. Values carried by Loop,
    Scan and If keep their type.
    """
    dtype = FLOAT16 if to == "float16" else BFLOAT16
    ranges = ctx.ranges or Ranges({}, {})
    if ctx.ranges is None:
        ctx.note("no ranges: nothing guards activations against overflow except constants")
    low = []
    fixed = _functions_of_fixed_type(graph)
    stuck, kept, guarded = _stuck_quantizers(graph, dtype), set[int](), set[int]()
    for _, node in each_node(graph):
        if not any(
            to_numpy(tensor.dtype) == FLOAT32 for tensor in (*node.inputs, *node.outputs) if tensor.name
        ):
            continue
        if node.op in CONTROL_FLOW:
            ctx.skip(node, f"{node.op} carries values whose type its body fixes")
            continue
        if any(map(_is_sequence, (*node.inputs, *node.outputs))):
            ctx.skip(node, "it puts tensors into a sequence or takes them out")
            kept.update(id(t) for t in node.outputs if ranges.amax(t) is None)
            continue
        guard = _guards(node, dtype) or _follows(node, guarded, ", which is kept away from zero")
        reason = _obstacle(node, ranges, dtype, headroom, stuck) or guard or _follows(node, kept)
        if reason:
            ctx.skip(node, reason)
            kept.update(id(t) for t in node.outputs if id(node) in stuck or ranges.amax(t) is None)
            if guard and (_guards(node, dtype) or _hands_on(node)):
                guarded.update(id(t) for t in node.outputs)
        elif states_type(node):
            ctx.skip(node, f"{node.op} makes values of the type that it states")
            kept.update(id(t) for t in node.outputs if ranges.amax(t) is None)
        elif (node.domain, bare_name(node)) in fixed:
            ctx.skip(node, "it is a function of the model, inside which types are stated")
        elif not takes(node, dtype, graph.opset):
            ctx.skip(node, f"{node.op} has no {dtype} at opset {graph.opset}")
        else:
            low.append(node)
    changing = {id(node) for node in others_than(low, dtype)}
    groups = ctx.first(_with_casts(low), lambda group: any(id(node) in changing for node in group))
    Retyper(graph, ctx.names).run_in(chain.from_iterable(groups), dtype)
    remove_redundant_casts(graph)
    for group in groups:
        if changed := [node for node in group if id(node) in changing]:
            ctx.changed(*changed)


def _functions_of_fixed_type(graph: gs.Graph) -> set[tuple[str | None, str]]:
    """Domains and names of functions that hold numbers of a type, or state one: they do not take any other."""
    fixed = {
        (function.domain, function.name)
        for function in graph.functions
        for node in nodes_of(function)
        if node.op in _STATING or any(isinstance(tensor, gs.Constant) for tensor in node.inputs)
    }
    size = -1
    while size != len(fixed):
        size = len(fixed)
        fixed |= {
            (function.domain, function.name)
            for function in graph.functions
            for node in nodes_of(function)
            if (node.domain, bare_name(node)) in fixed
        }
    return fixed


def _with_casts(nodes: list[gs.Node]) -> list[list[gs.Node]]:
    """Each node that is no Cast behind the Casts that it is the first to read, which are retyped for its sake."""
    left = {id(node) for node in nodes if node.op == "Cast"}
    groups = []
    for node in nodes:
        if node.op == "Cast":
            continue
        group, stack = [node], list(node.inputs)
        while stack:
            cast = producer(stack.pop())
            if cast is not None and id(cast) in left:
                left.remove(id(cast))
                group.insert(0, cast)
                stack.extend(cast.inputs)
        groups.append(group)
    return groups


def _obstacle(node: gs.Node, ranges: Ranges, dtype: np.dtype[Any], headroom: float, stuck: set[int]) -> str:
    """Why a node must stay in float32, empty where nothing speaks against it."""
    if id(node) in stuck:
        return f"a scale that its MatMul or it reads is not one that {dtype} holds"
    for tensor in (*node.inputs, *node.outputs):
        if not tensor.name or to_numpy(tensor.dtype) not in (FLOAT32, BFLOAT16):
            continue
        if node.op in QDQ and tensor is node.inputs[1]:
            continue
        amax = ranges.amax(tensor)
        if amax is None:
            continue
        if not amax * headroom <= LARGEST[dtype]:
            return f"{tensor.name!r} reaches {amax:.3g}, beyond {LARGEST[dtype]:.5g}"
        counts = node.op in _PRODUCTS or any(tensor is output for output in node.outputs)
        if counts and 0 < amax < SMALLEST_NORMAL[dtype]:
            return f"{tensor.name!r} stays below {amax:.3g}, where {dtype} loses precision"
        if node.op in _COMPARED and amax > WHOLE[dtype]:
            return f"{tensor.name!r} reaches {amax:.3g}, where {dtype} has not every whole number"
    return ""


def _follows(node: gs.Node, kept: set[int], why: str = ", which stays in float32") -> str:
    found = next((tensor for tensor in node.inputs if id(tensor) in kept), None)
    return "" if found is None else f"it reads {found.name!r}{why}"


def _guards(node: gs.Node, dtype: np.dtype[Any]) -> str:
    """Whether a node keeps values away from zero by a constant that is zero in `dtype`: 1e-12 before a division."""
    if node.op not in ("Add", "Max", "Clip"):
        return ""
    for tensor in node.inputs:
        value = scalar(tensor)
        if value is not None and 0 < value <= SMALLEST[dtype]:
            return f"{tensor.name!r}, {value:.3g}, would be zero in {dtype}"
    return ""


def _hands_on(node: gs.Node) -> bool:
    """Whether a value close to zero is close to zero, or very large, behind a node too."""
    by_constant = node.op in ("Mul", "Div") and any(scalar(tensor) is not None for tensor in node.inputs)
    return node.op in _OF_A_GUARD or node.op in MOVING or by_constant


def _stuck_quantizers(graph: gs.Graph, dtype: np.dtype[Any]) -> set[int]:
    """Q/DQ whose scale `dtype` cannot hold, and those that share a product with one: its factors have one type."""
    stuck = {id(node) for _, node in each_node(graph, *QDQ) if not _holds_scale(node.inputs[1], dtype)}
    products = [
        [above for tensor in node.inputs if (above := producer(tensor)) is not None and above.op in QDQ]
        for _, node in each_node(graph, "MatMul", "Gemm", "Conv")
    ]
    size = -1
    while size != len(stuck):
        size = len(stuck)
        for factors in products:
            if any(id(factor) in stuck for factor in factors):
                stuck.update(id(factor) for factor in factors)
    return stuck


def _holds_scale(scale: gs.Tensor, dtype: np.dtype[Any]) -> bool:
    found = constant(scale)
    if found is None:
        return True
    exact = array_of(found).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        rounded = exact.astype(dtype).astype(np.float64)
    return bool((np.abs(rounded - exact) <= SCALE_ERROR * exact).all())
