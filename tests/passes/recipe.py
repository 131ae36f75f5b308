"""What the default pipeline promises about its result, as checks that name what breaks the promise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.dtypes import FLOAT8E4M3FN, FLOAT32, is_float, to_numpy
from pi05c.graph.edit import producer
from pi05c.graph.io import Model, scopes
from pi05c.graph.weights import weight_of
from pi05c.passes.patterns.attention import find_attention
from pi05c.passes.patterns.flow import find_flow, flow_linears
from pi05c.passes.patterns.linear import find_linears
from pi05c.passes.patterns.norm import find_norms
from pi05c.passes.patterns.parts import parts_of
from pi05c.passes.patterns.rope import find_rope
from pi05c.passes.patterns.softmax import find_softmaxes

MULTIPLE = 16
"""Inner and outer sizes that FP8 kernels take."""

FEW_KEYS = 64
"""A chunk of a split attention with fewer keys than this stays in the working precision."""


def counts(model: Model) -> dict[str, int]:
    """How many of each pattern there are, so that a finder which finds nothing proves nothing."""
    found = Counter(norm.kind for norm in find_norms(model.graph))
    found["softmax"] = len(find_softmaxes(model.graph))
    found["RoPE"] = len(find_rope(model.graph))
    found["flow"] = len(find_flow(model.graph))
    found["attention"] = len(find_attention(model.graph)[0])
    return dict(found)


def broken_promises(model: Model) -> list[str]:
    """Each promise of the default recipe that a graph breaks, in a sentence."""
    return [
        *_linears(model),
        *_attention(model),
        *_float32(model),
        *_convolutions(model),
        *_loops(model),
        *_stored_twice(model),
    ]


def _fp8(tensor: gs.Tensor) -> bool:
    """Whether a tensor is what a DequantizeLinear makes of E4M3 codes."""
    node = producer(tensor)
    return (
        node is not None and node.op == "DequantizeLinear" and to_numpy(node.inputs[0].dtype) == FLOAT8E4M3FN
    )


def _linears(model: Model) -> list[str]:
    into, out = flow_linears(model.graph)
    ends = {id(linear.node) for linear in (*into, *out)}
    broken = []
    for linear in find_linears(model.graph):
        rows = math.prod(int(dim) for dim in linear.activation.shape[:-1])
        sizes = (linear.rows, linear.columns)
        eligible = all(size >= MULTIPLE and size % MULTIPLE == 0 for size in sizes) and rows > 1
        both = [_fp8(tensor) for tensor in linear.node.inputs[:2]]
        if id(linear.node) in ends:
            if any(both):
                broken.append(f"{linear.node.name} is an end of the flow and quantized")
        elif eligible and not all(both):
            broken.append(f"{linear.node.name} ({linear.weight.name}) is not quantized on both sides: {both}")
    return broken


def _attention(model: Model) -> list[str]:
    parts = parts_of(model.graph)
    attentions, refused = find_attention(model.graph)
    broken = [f"{other.softmax.name} is no attention: {other.reason}" for other in refused]
    for attention in attentions:
        for chunk in attention.chunks:
            factors = (*chunk.qk.inputs, *chunk.av.inputs)
            both = [_fp8(tensor) for tensor in factors]
            small = len(attention.chunks) > 1 and int(chunk.qk.inputs[1].shape[-1]) < FEW_KEYS
            wanted = not small and parts[id(attention.qk)] != "vision"
            if set(both) != {wanted}:
                broken.append(f"{chunk.qk.name}: quantized {both}, wanted {wanted}")
        if any(_fp8(tensor) for tensor in attention.qk.inputs):
            broken += [f"{node.name} scales quantized logits" for node, _ in attention.scales]
    return broken


def _float32(model: Model) -> list[str]:
    regions: list[tuple[str, Iterable[gs.Node]]] = []
    regions += [(f"softmax {found.name}", found.nodes) for found in find_softmaxes(model.graph)]
    regions += [(f"{found.kind} {found.name}", found.nodes) for found in find_norms(model.graph)]
    regions += [(f"RoPE {found.name}", found.nodes) for found in find_rope(model.graph)]
    regions += [(f"flow {step.add.name}", step.nodes) for step in find_flow(model.graph)]
    return [
        f"{name}: {node.name} reads or makes {tensor.name} in {np.dtype(tensor.dtype)}"
        for name, nodes in regions
        for node in nodes
        for tensor in (*node.inputs, *node.outputs)
        if is_float(tensor.dtype) and to_numpy(tensor.dtype) != FLOAT32
    ]


def _convolutions(model: Model) -> list[str]:
    return [
        f"{node.name} is quantized"
        for scope in scopes(model.graph)
        for node in scope.nodes
        if node.op == "Conv"
        and any((above := producer(t)) is not None and above.op == "DequantizeLinear" for t in node.inputs)
    ]


def _loops(model: Model) -> list[str]:
    return [f"{node.name} is left" for node in model.graph.nodes if node.op in ("Loop", "Scan")]


def _stored_twice(model: Model) -> list[str]:
    """FP8 weights of the same bytes, and weights that are dequantized more than once."""
    codes: dict[int, gs.Constant] = {}
    readers: Counter[int] = Counter()
    for scope in scopes(model.graph):
        for node in scope.nodes:
            if node.op == "DequantizeLinear" and isinstance(node.inputs[0], gs.Constant):
                codes[id(node.inputs[0])] = node.inputs[0]
                readers[id(node.inputs[0])] += 1
    broken = [
        f"{codes[key].name} is dequantized {count} times" for key, count in readers.items() if count > 1
    ]
    hashes = Counter(weight_of(constant).checksum() for constant in codes.values())
    return broken + [f"a weight is stored {count} times" for count in hashes.values() if count > 1]
