"""In which type each kind of operator of each part of the model computes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT4E2M1, is_float, name_of, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.errors import UsageError
from pi05c.manifest import OperatorRecord, PrecisionRecord
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.flow import find_flow
from pi05c.passes.patterns.layers import OPERATORS, OTHERS, Layers
from pi05c.passes.patterns.linear import find_linears
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.parts import PARTS, Part, parts_of
from pi05c.passes.patterns.rope import find_rope
from pi05c.passes.patterns.softmax import find_softmaxes
from pi05c.passes.patterns.walk import MOVING, QDQ, each_node

KINDS = ("convolution", "linear", "attention", "softmax", "norm", "RoPE", "flow accumulation", "other")
"""What is told apart, in the order in which it is shown. Attention stands for its two MatMuls. Other operators are counted
where none of the first ones is of their type, and it is narrower than float32."""

LIMITS = {
    "float64": 1e-5,
    "float32": 1e-5,
    "float16": 0.005,
    "bfloat16": 0.02,
    "int8": 0.08,
    "uint8": 0.08,
    "float8e4m3fn": 0.08,
    "float4e2m1": 0.1,
}
"""Largest relative L2 error of the actions that passes by default, by the narrowest type that computes.

Exact rewrites measure 1e-6 and float16 0.0003 to 0.001 on small models; bfloat16 keeps 8 significant bits where
float16 keeps 11. FP8 lies between a published FP8 deployment (cosine 0.9995, an error of 0.032) and the FP8 and NVFP4
recipe whose cosine of 0.9946 (0.104) went with a fall from 92% to 80% task success. INT8 that a graph brings is given as
much: rounding in float16 before it turns codes into their neighbours (0.03 on a small ResNet of random weights).
"""

_NARROW = {"float16", "bfloat16"}

_MOVED = (
    MOVING
    | QDQ
    | {"Concat", "Gather", "GatherElements", "GatherND", "Pad", "Slice", "Split", "Tile", "Where"}
)
"""Operators that hand on what they are given, whatever its type."""

RANDOM_WEIGHTS_FACTOR = 4.0
"""By how much a limit is wider for a model with random weights, where it can only tell a defect from rounding.

Such a network does not damp rounding as a trained one does: FP8 measures 0.03 to 0.06 on small ones and 0.125 at full
size, where float16 stays within its limit.
"""


def precision_of(*graphs: gs.Graph) -> list[PrecisionRecord]:
    """Count operators by part, kind and type, of all graphs that make up a policy. A MatMul between two DequantizeLinear computes in what they read.

    A type that is spelled `float16 x float8e4m3fn` is that of a MatMul with one side quantized; `mixed` stands for
    a norm, softmax or RoPE whose nodes compute in several types.
    """
    counts: Counter[tuple[str, str, str]] = Counter()
    others: Counter[tuple[str, str]] = Counter()
    for graph in graphs:
        parts = parts_of(graph)
        operators = list(_operators(graph))
        counts.update((parts[id(node)], kind, dtype) for node, kind, dtype in operators)
        counted = {id(node) for node, _, _ in operators}
        rest = (node for _, node in each_node(graph) if node.op not in _MOVED and id(node) not in counted)
        others.update((parts[id(node)], arithmetic_dtype([node])) for node in rest)
    known = {part for _, _, dtype in counts for part in dtype.split(" x ")}
    counts.update(
        {(part, "other", dtype): n for (part, dtype), n in others.items() if dtype in _NARROW - known}
    )
    order: dict[str, int] = {part: index for index, part in enumerate(PARTS)}
    return [
        PrecisionRecord(part=part, kind=kind, dtype=dtype, count=count)
        for (part, kind, dtype), count in sorted(
            counts.items(), key=lambda item: (order[item[0][0]], KINDS.index(item[0][1]), item[0][2])
        )
    ]


def operators_of(*graphs: gs.Graph) -> list[OperatorRecord]:
    """Each operator of each layer with the type that it computes in, of all graphs that make up a policy."""
    nodes: dict[tuple[Part, int | None, str, str], list[str]] = {}
    for graph in graphs:
        for found in Layers(graph).operators:
            single = found.node.op in ("MatMul", "Gemm", "Conv")
            dtype = product_dtype(found.node) if single else arithmetic_dtype(found.nodes)
            key = found.place.part, found.place.layer, found.name, dtype
            nodes.setdefault(key, []).append(str(found.node.name))
    order = {name: index for index, name in enumerate((*PARTS, *OTHERS, *OPERATORS))}
    return [
        OperatorRecord(part=key[0], layer=key[1], operator=key[2], dtype=key[3], nodes=names)
        for key, names in sorted(
            nodes.items(),
            key=lambda item: (
                order[item[0][0]],
                -1 if item[0][1] is None else item[0][1],
                order[item[0][2]],
                item[0][3],
            ),
        )
    ]


def narrowest(records: Iterable[PrecisionRecord]) -> str:
    """The type with the largest limit that anything computes in; float32 where nothing was found."""
    used = {dtype for record in records for dtype in record.dtype.split(" x ") if dtype in LIMITS}
    return max(used, key=LIMITS.__getitem__, default="float32")


def default_limit(records: Iterable[PrecisionRecord], *, weights_random: bool | None = None) -> float:
    """The relative L2 error that a graph of this precision may have; see `LIMITS`."""
    limit = LIMITS[narrowest(records)]
    return limit * RANDOM_WEIGHTS_FACTOR if weights_random and limit > LIMITS["float32"] else limit


def refuse_limit(max_error: float | None) -> None:
    """Refuse a limit that no error can be held against, before time is spent on measuring one.

    Raises:
        UsageError: it is negative, infinite or nan.
    """
    if max_error is not None and not (math.isfinite(max_error) and max_error >= 0):
        raise UsageError(f"--max-error {max_error:g} is no limit: give a number from 0 on, such as 0.05")


def dtypes_of(graph: gs.Graph) -> set[str]:
    """Every element type that a node of the graph or its bodies reads or makes, by ONNX's name.

    A stored weight counts even where it is only cast: builders refuse types that the target lacks (TensorRT-RTX 1.7
    does so for bfloat16 weights on SM75).
    """
    return {
        name_of(tensor.dtype)
        for _, node in each_node(graph)
        for tensor in (*node.inputs, *node.outputs)
        if tensor.dtype is not None
    }


def _operators(graph: gs.Graph) -> Iterator[tuple[gs.Node, str, str]]:
    for _, node in each_node(graph, "Conv"):
        yield node, "convolution", product_dtype(node)
    for linear in find_linears(graph):
        yield linear.node, "linear", product_dtype(linear.node)
    for attention in find_attention(graph)[0]:
        yield attention.qk, "attention", product_dtype(attention.qk)
        yield attention.av, "attention", product_dtype(attention.av)
    for softmax in find_softmaxes(graph):
        yield softmax.nodes[-1], "softmax", arithmetic_dtype(softmax.nodes)
    for norm in find_norms(graph):
        yield norm.nodes[-1], "norm", arithmetic_dtype(norm.nodes)
    for rope in find_rope(graph):
        yield rope.nodes[-1], "RoPE", arithmetic_dtype(rope.nodes)
    for step in find_flow(graph):
        yield step.add, "flow accumulation", arithmetic_dtype((step.add,))


def product_dtype(node: gs.Node) -> str:
    """The type in which a MatMul, Gemm or Conv multiplies."""
    sides = [_quantized_type(tensor) for tensor in node.inputs[:2]]
    own = name_of(node.outputs[0].dtype)
    if sides[0] == sides[1]:
        return sides[0] or own
    return " x ".join(side or own for side in sides)


def _quantized_type(tensor: gs.Tensor) -> str | None:
    """What a factor is dequantized from; None where anything but the spelling of NVFP4 stands between, for then the
    product is computed in the working precision."""
    first = node = producer(tensor)
    while node is not None and node.op in ("Cast", "Transpose"):
        node = producer(node.inputs[0])
    if node is None or node.op != "DequantizeLinear":
        return None
    codes = node.inputs[0].dtype
    return name_of(codes) if node is first or to_numpy(codes) == FLOAT4E2M1 else None


def arithmetic_dtype(nodes: Iterable[gs.Node]) -> str:
    """The type of the outputs of nodes that are not casts."""
    found = {
        name_of(tensor.dtype)
        for node in nodes
        if node.op != "Cast"
        for tensor in node.outputs
        if is_float(tensor.dtype)
    }
    return found.pop() if len(found) == 1 else "mixed" if found else "?"
