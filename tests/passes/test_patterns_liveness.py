"""Rows through each operator: whatever it is, what is returned keeps its value."""

from __future__ import annotations

import numpy as np
import pytest
from pass_graphs import (
    editable,
    graph_text,
    node_of,
    normal,
    outputs_of,
    relative_error,
    run_pass,
    seeded_inputs,
    text_of,
)

from pi05c.passes.patterns.row_flow import groups

WEIGHTS = {
    "w": normal(1, 8, 8),
    "bias": normal(2, 8),
    "rows": normal(3, 6, 8),
    "kernel": normal(4, 8, 8, 1),
    "scale": np.float32(0.1),
    "zero": np.int8(0),
    "flat": np.array([12, 8], np.int64),
    "back": np.array([2, 6, 8], np.int64),
    "thrice": np.array([1, 1, 3], np.int64),
    "wide": np.array([2, 6, 8], np.int64),
    "single": normal(5, 1, 1, 8),
    "parts": np.array([2, 4], np.int64),
    "one": np.array([1], np.int64),
    "axis1": np.array(1, np.int64),
    "last": np.array([-1], np.int64),
    "third": np.array(3, np.int64),
    "few": np.array([4, 0, 4, -1], np.int64),
    "s": np.array([1], np.int64),
    "e": np.array([100], np.int64),
    "stride": np.array([2], np.int64),
    "minus": np.array([-1], np.int64),
    "front": np.array([-100], np.int64),
    "cos": normal(6, 2, 6, 4),
    "sin": normal(7, 2, 6, 4),
    "two_axes": np.array([1, 2], np.int64),
    "heads": np.array([2, 6, 2, 4], np.int64),
}

OPERATORS = {
    "elementwise with a row of its own for each row": "t = Add(h, rows)",
    "a bias": "t = Mul(h, bias)",
    "Gemm on merged axes": "f = Reshape(h, flat)\n g1 = Gemm<transB = 1>(f, w, bias)\n t = Reshape(g1, back)",
    "layer normalization": "t = LayerNormalization<axis = -1>(h, bias, bias)",
    "softmax over the rows": "t = Softmax<axis = 1>(h)",
    "softmax over the columns": "t = Softmax<axis = -1>(h)",
    "a mean of columns": "m = ReduceMean<keepdims = 1>(h, last)\n t = Sub(h, m)",
    "a mean of rows": "m = ReduceMean<keepdims = 1>(h, one)\n t = Sub(h, m)",
    "a sum without its axis": "m = ReduceSum<keepdims = 0>(h, last)\n u = Unsqueeze(m, last)\n t = Sub(h, u)",
    "a running sum over rows": "t = CumSum(h, axis1)",
    "Split and Concat in another order": "p, q = Split<axis = 1>(h, parts)\n t = Concat<axis = 1>(q, p)",
    "Expand": "v = Expand(single, wide)\n t = Add(h, v)",
    "Tile": "m = ReduceMax<keepdims = 1>(h, last)\n v = Tile(m, thrice)\n c = Concat<axis = 2>(v, h)\n t = Relu(c)",
    "Transpose and back": (
        "f = Transpose<perm = [1, 0, 2]>(h)\n n = Neg(f)\n t = Transpose<perm = [1, 0, 2]>(n)"
    ),
    "heads and back": (
        "a = Reshape(h, heads)\n b = Transpose<perm = [0, 2, 1, 3]>(a)\n c = Tanh(b)\n"
        " d = Transpose<perm = [0, 2, 1, 3]>(c)\n t = Reshape(d, back)"
    ),
    "every second row": "v = Slice(h, s, e, one, stride)\n t = Concat<axis = 1>(v, h)",
    "rows backward": "v = Slice(h, e, front, one, minus)\n t = Exp(v)",
    "one row for all": "v = Gather<axis = 1>(h, third)\n u = Unsqueeze(v, one)\n t = Add(h, u)",
    "rows chosen twice": "v = Gather<axis = 1>(h, few)\n t = Concat<axis = 1>(v, h)",
    "quantized": "q = QuantizeLinear(h, scale, zero)\n t = DequantizeLinear(q, scale, zero)",
    "a convolution over rows": "t = Conv<pads = [1, 0]>(h, kernel6)",
    "attention over the rows": "kt = Transpose<perm = [0, 2, 1]>(h)\n l = MatMul(h, kt)\n p = Softmax(l)\n t = MatMul(p, h)",
    "a lookup": "i = Cast<to = 7>(h)\n m = ReduceMin<keepdims = 0>(i, last)\n c = Clip(m, lo, hi)\n t = Gather(rows, c)",
    "a rotation": "t = RotaryEmbedding<num_heads = 1>(h, cos, sin)",
    "an operator that nobody knows": "t = Hardmax<axis = 1>(h)",
}


SEES_ALL = {
    "softmax over the rows",
    "a mean of rows",
    "a running sum over rows",
    "rows backward",
    "a convolution over rows",
    "attention over the rows",  # its keys and values; its queries shrink
    "an operator that nobody knows",
}
"""What needs all rows of its input, or may."""


@pytest.mark.parametrize(("start", "end"), [(4, 6), (0, 1), (1, 5)])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_of_the_rows_that_are_returned(name: str, start: int, end: int) -> None:
    weights = {
        **WEIGHTS,
        "begin": np.array([start], np.int64),
        "until": np.array([end], np.int64),
        "kernel6": normal(9, 6, 6, 3),
        "lo": np.array(0, np.int64),
        "hi": np.array(5, np.int64),
    }
    text = f"g (float[2,6,8] x) => (float y) {{ h = MatMul(x, w)\n {OPERATORS[name]}\n y = Slice(t, begin, until, one) }}"
    used = {
        key: value
        for key, value in weights.items()
        if key in text.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }
    proto = graph_text(text, used, opset=23)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = editable(proto)
    run_pass(model, "drop_dead_prefix")
    rows = node_of(model, "h").outputs[0].shape[1]
    assert (rows == 6) == (name in SEES_ALL)
    for seed in range(2):
        inputs = seeded_inputs(proto, seed)
        assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-6
    once = text_of(model)
    assert run_pass(model, "drop_dead_prefix").changes == ()
    assert text_of(model) == once


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        ((1, 48, 8), (1, 3, 16, 8), [([0], [0]), ([1], [1, 2]), ([2], [3])]),
        ((6,), (2, 3), [([0], [0, 1])]),
        ((4, 1, 1), (4,), [([0], [0]), ([1, 2], [])]),
        ((4,), (4, 1), [([0], [0]), ([], [1])]),
        ((2, 6), (3, 4), [([0, 1], [0, 1])]),
        ((), (1,), [([], [0])]),
    ],
)
def test_axes_that_belong_together(
    inner: tuple[int, ...], outer: tuple[int, ...], expected: list[tuple[list[int], list[int]]]
) -> None:
    assert groups(inner, outer) == expected
