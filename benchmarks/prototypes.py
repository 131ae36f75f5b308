"""Recipes that were tried and are no passes, as the bench simulates them: what they reach is what a pass would.

- `smooth`: SmoothQuant's migration (Xiao et al., 2022, arXiv:2211.10438). Each channel of what a weight multiplies is
  divided by max|x|^alpha / max|w|^(1 - alpha), and the weight's row multiplied by it. A pass would fold the division into
  the norm or the weight before; here it is a Mul, which in float16 rounds once more.
- `rotate`: an orthogonal rotation (QuaRot, Ashkboos et al., 2024, arXiv:2404.00456). What a weight multiplies, and its
  rows, are rotated by a Hadamard matrix with random signs, in blocks of the largest power of two that divides the channels,
  up to `size`. A pass would fold what it can into the weights before; here it is a MatMul in float16.

Both run before ranges are measured for good, so that quantizers see what they make.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from pi05c.graph.runner import Array
from pi05c.graph.weights import InMemory, weight_of
from pi05c.passes import PassContext, graph_pass
from pi05c.passes.patterns.flow import flow_linears
from pi05c.passes.patterns.linear import Linear, find_linears

ROTATION = "rotation"
"""What names of the rotations begin with, so that `keep=rotation*` leaves them alone."""

AHEAD = (
    "canonicalize,batch_views,drop_dead_prefix,fuse_denoise_loop,fuse_projections,fold_gqa,split_prefix_attention,"
    "fold_scales,dedupe"
)
"""What `default` does before it looks at ranges."""

BEHIND = "canonicalize,lower_precision,pin_fp32,quantize_linears{{{options}}},insert_attention_qdq,disable_conv2d_quant,canonicalize"


def _by_weight(graph: gs.Graph) -> dict[int, list[Linear]]:
    ends = {id(linear.node) for group in flow_linears(graph) for linear in group}
    found: dict[int, list[Linear]] = defaultdict(list)
    for linear in find_linears(graph):
        if id(linear.node) not in ends and linear.rows >= 16:
            found[id(linear.weight)].append(linear)
    return found


def _activations(graph: gs.Graph, **options: object) -> Iterator[gs.Tensor]:
    yield from (linear.activation for group in _by_weight(graph).values() for linear in group)


def _rows(graph: gs.Graph, **options: object) -> Iterator[tuple[gs.Tensor, int]]:
    yield from ((tensor, 256) for tensor in _activations(graph))


@graph_pass(exact=True, ranges=_activations, rows=_rows)
def smooth(graph: gs.Graph, ctx: PassContext, *, alpha: float = 0.5) -> None:
    """Move outlier scale from activations into weights."""
    assert ctx.ranges is not None
    for group in _by_weight(graph).values():
        sampled = [ctx.ranges.rows_of(linear.activation) for linear in group]
        rows = np.concatenate([each.load().astype(np.float32) for each in sampled if each is not None])
        weight = _rows_of_weight(group[0])
        x, w = np.abs(rows).max(axis=0), np.abs(weight).max(axis=1)
        usable = (x > 0) & (w > 0)
        scale = np.ones_like(x)
        scale[usable] = x[usable] ** alpha / w[usable] ** (1 - alpha)
        _set(group[0], weight * scale[:, None])
        for linear in group:
            editor = ctx.editor(linear.scope)
            by = editor.constant(f"{linear.node.name}.smoothing", 1 / scale)
            tensor = linear.activation
            linear.node.inputs[0] = editor.add(
                "Mul", [tensor, by], f"{linear.node.name}.smoothed", dtype=tensor.dtype, shape=tensor.shape
            )
            ctx.changed(linear.node)


@graph_pass(exact=True)
def rotate(graph: gs.Graph, ctx: PassContext, *, size: int = 128) -> None:
    """Rotate what linears multiply."""
    for group in _by_weight(graph).values():
        rotation = _rotation(group[0].rows, size)
        _set(group[0], rotation.T @ _rows_of_weight(group[0]))
        for linear in group:
            editor = ctx.editor(linear.scope)
            by = editor.constant(ctx.names.unique(f"{ROTATION}.weight"), rotation)
            tensor = linear.activation
            node = gs.Node("MatMul", ctx.names.unique(ROTATION), {}, [tensor, by])
            turned = gs.Variable(ctx.names.unique(f"{ROTATION}.output"), tensor.dtype, list(tensor.shape))
            node.outputs = [turned]
            linear.scope.nodes.append(node)
            linear.node.inputs[0] = turned
            ctx.changed(linear.node)


def _rotation(channels: int, size: int) -> Array:
    """A block-diagonal orthogonal matrix, float32."""
    block = min(size, channels & -channels)
    hadamard = np.ones((1, 1))
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.random.default_rng(channels).choice([-1.0, 1.0], channels)
    whole = np.kron(np.eye(channels // block), hadamard / np.sqrt(block))
    rotated: Array = (signs[:, None] * whole).astype(np.float32)
    return rotated


def _rows_of_weight(linear: Linear) -> Array:
    """The weight as it is multiplied, [K, N] in float32."""
    values = weight_of(linear.weight).load().astype(np.float32)
    return values.T if linear.transposed else values


def _set(linear: Linear, values: Array) -> None:
    stored = values.T if linear.transposed else values
    linear.weight.values = InMemory(np.ascontiguousarray(stored, np.float32))


__all__ = ["AHEAD", "BEHIND", "rotate", "smooth"]
