"""lower_precision: from float32 to a 16-bit working precision, except where values would not survive it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32, LARGEST, to_numpy
from pi05c.graph.ranges import Ranges, bounding_tensors
from pi05c.passes.contract import PassContext, graph_pass
from pi05c.passes.patterns.walk import each_node
from pi05c.passes.retype import CONTROL_FLOW, Retyper, remove_redundant_casts

SMALLEST_NORMAL = {FLOAT16: 2.0**-14, BFLOAT16: 2.0**-126}
"""Smallest positive number with the full significand (IEEE 754 binary16; bfloat16)."""


def _computed_tensors(graph: gs.Graph, **options: object) -> Iterator[gs.Tensor]:
    """What arithmetic makes in float32; values that are only moved have the range of what they come from."""
    yield from (tensor for tensor in graph.inputs if to_numpy(tensor.dtype) == FLOAT32)
    for _, node in each_node(graph):
        if node.op in CONTROL_FLOW:
            continue
        for tensor in node.outputs:
            if (
                to_numpy(tensor.dtype) == FLOAT32
                and bounding_tensors(tensor) is None
                and _is_float_made(node)
            ):
                yield tensor


def _is_float_made(node: gs.Node) -> bool:
    return any(to_numpy(tensor.dtype) == FLOAT32 for tensor in node.inputs)


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
    largest 16-bit number, or where its output is so small everywhere that it would be subnormal. Without ranges
    only constants guard. Constants are not rewritten: each gets a Cast behind it, so that `pin_fp32` finds the
    original value; `canonicalize` bakes the casts that are left. Values carried by Loop, Scan and If keep their
    type.
    """
    dtype = FLOAT16 if to == "float16" else BFLOAT16
    if ctx.ranges is None:
        ctx.note("no ranges: nothing guards activations against overflow except constants")
    low = []
    for _, node in each_node(graph):
        if not any(
            to_numpy(tensor.dtype) == FLOAT32 for tensor in (*node.inputs, *node.outputs) if tensor.name
        ):
            continue
        if node.op in CONTROL_FLOW:
            ctx.skip(node, f"{node.op} carries values whose type its body fixes")
            continue
        reason = _obstacle(node, ctx.ranges, dtype, headroom)
        if reason:
            ctx.skip(node, reason)
        else:
            low.append(node)
    for node in Retyper(graph, ctx.names).run_in(low, dtype):
        ctx.changed(node)
    remove_redundant_casts(graph)


def _obstacle(node: gs.Node, ranges: Ranges | None, dtype: object, headroom: float) -> str:
    """Why a node must stay in float32, empty where nothing speaks against it."""
    largest = LARGEST[dtype]
    known = ranges or Ranges({}, {})
    for tensor in (*node.inputs, *node.outputs):
        if not tensor.name or to_numpy(tensor.dtype) not in (FLOAT32, BFLOAT16):
            continue
        amax = known.amax(tensor)
        if amax is None:
            continue
        if not amax * headroom <= largest:
            return f"{tensor.name!r} reaches {amax:.3g}, beyond {largest:.5g}"
        if tensor in node.outputs and 0 < amax < SMALLEST_NORMAL[dtype]:
            return f"{tensor.name!r} stays below {amax:.3g}, where {dtype} loses precision"
    return ""
