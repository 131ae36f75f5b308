"""Where constant factors go, what stops them, and that the numbers stay."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from golden_cases_fold_scales import fold_scales__attention
from pass_graphs import (
    Array,
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

from pi05c.graph.dtypes import BFLOAT16, FLOAT32, to_numpy
from pi05c.graph.weights import array_of
from pi05c.passes.patterns.walk import constant, each_node

LIMIT = 1e-6
"""Relative error that float32 rounding explains in graphs of this size."""


def _folded(proto: onnx.ModelProto, changes: int, **options: str) -> onnx.ModelProto:
    """Fold, hold the result to the numbers of `proto` and to its own, and return it."""
    model = editable(proto)
    assert len(run_pass(model, "fold_scales", **options).changes) == changes
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= LIMIT
    once = text_of(model)
    assert run_pass(model, "fold_scales", **options).changes == ()
    assert text_of(model) == once
    return model


def _left(proto: onnx.ModelProto, reason: str, **options: str) -> None:
    model = editable(proto)
    before = text_of(model)
    result = run_pass(model, "fold_scales", **options)
    assert result.changes == ()
    assert [skip.reason for skip in result.skips if reason in skip.reason], result.skips
    assert text_of(model) == before


# What Q is made of

ATTENTION = """
    attention (float[2,6,32] x, float[2,1,6,16] cos, float[2,1,6,16] sin) => (float[2,2,6,16] y{outputs})
      <int64[3] sizes = {{32, 32, 32}}, int64[4] heads = {{2, 6, 2, 16}}, float scale = {{{scale}}}> {{
      qkv = MatMul(x, w)
      biased = Add(qkv, bias)
      q0, k0, v0 = Split<axis = -1>(biased, sizes)
      q1 = Reshape(q0, heads)
      q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
      cosine = Mul(q2, cos)
      left, right = Split<axis = -1, num_outputs = 2>(q2)
      minus = Neg(right)
      turned = Concat<axis = -1>(minus, left)
      sine = Mul(turned, sin)
      q = Add(cosine, sine)
      k1 = Reshape(k0, heads)
      kt = Transpose<perm = [0, 2, 3, 1]>(k1)
      v1 = Reshape(v0, heads)
      v = Transpose<perm = [0, 2, 1, 3]>(v1)
      {logits}
      probs = Softmax<axis = -1>(logits)
      y = MatMul(probs, v){more}
    }}"""

LOGITS = {
    "Mul": "raw = MatMul(q, kt)\n logits = Mul(raw, scale)",
    "Div": "raw = MatMul(q, kt)\n logits = Div(raw, scale)",
    "on Q": "scaled = Mul(q, scale)\n logits = MatMul(scaled, kt)",
    "on Q and K": "qs = Mul(scale, q)\n ks = Mul(scale, kt)\n logits = MatMul(qs, ks)",
}


def _attention(
    logits: str = "Mul", scale: float = 0.2357, more: str = "", outputs: str = ""
) -> onnx.ModelProto:
    text = ATTENTION.format(logits=LOGITS[logits], scale=scale, more=f"\n{more}", outputs=outputs)
    return graph_text(text, {"w": normal(1, 32, 96), "bias": normal(2, 96)})


@pytest.mark.parametrize("logits", LOGITS)
def test_spellings_of_the_attention_scale(logits: str) -> None:
    model = _folded(_attention(logits), 2 if logits == "on Q and K" else 1)
    weight, bias = (constant(node_of(model, name).inputs[1]) for name in ("qkv", "biased"))
    factor = 1 / 0.2357 if logits == "Div" else 0.2357
    expected = np.full(96, 1.0)
    expected[:32] = factor
    expected[32:64] = factor if logits == "on Q and K" else 1.0
    assert weight is not None
    assert bias is not None
    np.testing.assert_allclose(array_of(weight), normal(1, 32, 96) * expected, rtol=1e-6)
    np.testing.assert_allclose(array_of(bias), normal(2, 96) * expected, rtol=1e-6)


def test_a_power_of_two_changes_no_bit() -> None:
    proto = fold_scales__attention()
    model = _folded(proto, 1)
    (weight,) = (node.inputs[0] for _, node in each_node(model.graph, "Cast"))
    assert to_numpy(weight.dtype) == BFLOAT16
    inputs = seeded_inputs(proto)
    assert np.array_equal(outputs_of(model, inputs)["y"], outputs_of(proto, inputs)["y"])


@pytest.mark.parametrize(
    ("more", "outputs", "reason"),
    [
        ("z = Relu(q)", ", float[2,2,6,16] z", "'z.Relu' reads 'q' without it"),
        ("z = Relu(q1)", ", float[2,6,2,16] z", "'z.Relu' reads 'q1' without it"),
        ("z = Relu(turned)", ", float[2,2,6,16] z", "the rotation 'q.Add' has another reader"),
        ("z = Relu(biased)", ", float[2,6,96] z", "'z.Relu' reads 'biased' without it"),
        ("z = Relu(w)", ", float[32,96] z", "the readers of the weight 'w' do not all ask for it"),
        ("", ", float[2,6,32] q0", "'q0', which it multiplies, is an output of the graph"),
    ],
)
def test_another_reader_on_the_way_to_q(more: str, outputs: str, reason: str) -> None:
    _left(_attention(more=more, outputs=outputs), reason)


def test_q_that_no_weight_makes() -> None:
    text = """
    attention (float[1,2,6,16] q, float[1,2,16,6] kt, float[1,2,6,16] v) => (float[1,2,6,16] y) <float scale = {0.25}> {
      raw = MatMul(q, kt)
      logits = Mul(raw, scale)
      probs = Softmax<axis = -1>(logits)
      y = MatMul(probs, v)
    }"""
    _left(graph_text(text), "its Q comes from no weight that could take it")


def test_joined_weights_are_not_scaled_too_far_apart() -> None:
    _left(_attention(scale=0.05), "20-fold apart, more than 16")
    _folded(_attention(scale=0.05), 1, max_scale_ratio="32")
    _folded(_attention(), 1, max_scale_ratio="5")
    _left(_attention(), "more than 4", max_scale_ratio="4")


# A factor beside a linear


def _linear(
    body: str, weights: dict[str, Array] | None = None, inputs: str = "float[4,16] x"
) -> onnx.ModelProto:
    text = f"g ({inputs}) => (float[4,16] y) <float c = {{0.3}}, float two = {{2}}> {{\n{body}\n}}"
    return graph_text(text, {"w": normal(1, 16, 16), **(weights or {})})


VECTOR = {"v": np.linspace(0.5, 1.5, 16, dtype=np.float32)}


@pytest.mark.parametrize(
    ("body", "changes"),
    [
        ("a = MatMul(x, w)\n b = Mul(c, a)\n y = Relu(b)", 1),
        ("t = Transpose<perm = [1, 0]>(w)\n a = MatMul(x, t)\n b = Mul(a, v)\n y = Relu(b)", 1),
        ("t = Transpose<perm = [1, 0]>(w)\n a = Mul(x, v)\n y = MatMul(a, t)", 1),
        ("a = Div(x, v)\n y = MatMul(a, w)", 1),
        ("a = MatMul(x, w)\n b = Mul(a, c)\n d = Div(b, v)\n y = Mul(d, two)", 2),
        ("a = Mul(x, c)\n b = Mul(a, v)\n y = MatMul(b, w)", 2),
        ("a = Mul(x, v)\n b = MatMul(a, w)\n d = Mul(b, v)\n y = Relu(d)", 2),
    ],
    ids=[
        "behind",
        "vector behind a transposed weight",
        "vector in front of a transposed weight",
        "divisor in front",
        "three behind, the last an output",
        "two in front",
        "on both sides",
    ],
)
def test_beside_a_linear(body: str, changes: int) -> None:
    _folded(_linear(body, VECTOR if "v" in body else None), changes)


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (_linear("a = MatMul(x, w)\n y = Mul(a, c)"), "it makes 'y', an output of the graph"),
        (_linear("a = MatMul(x, w)\n b = Mul(a, c)\n y = Add(a, b)"), "'y.Add' reads 'a' without it"),
        (_linear("a = Mul(x, c)\n b = MatMul(a, w)\n y = Add(a, b)"), "'y.Add' reads 'a' too"),
        (_linear("a = Gemm(x, w)\n b = Mul(a, c)\n y = Relu(b)"), "'a.Gemm' is a Gemm"),
        (
            _linear("a = MatMul(x, w)\n b = Mul(a, f)\n y = Relu(b)", inputs="float[4,16] x, float f"),
            "no constant factor in it stands beside a weight",
        ),
        (
            _linear(
                "n = Cast<to = 10>(c)\n m = Cast<to = 1>(n)\n a = MatMul(x, w)\n b = Mul(a, m)\n y = Relu(b)"
            ),
            "no constant factor in it stands beside a weight",
        ),
        (
            _linear("a = MatMul(x, w)\n b = Mul(a, z)\n y = Relu(b)", {"z": np.zeros(16, np.float32)}),
            "no constant factor in it stands beside a weight",
        ),
        (
            _linear(
                "n = Cast<to = 10>(w)\n m = Cast<to = 1>(n)\n a = MatMul(x, m)\n b = Mul(a, c)\n y = Relu(b)"
            ),
            "it computes in another type than float32",
        ),
        (
            _linear(
                "a = MatMul(x, w)\n n = Cast<to = 10>(a)\n m = Cast<to = 1>(n)\n b = Mul(m, c)\n y = Relu(b)"
            ),
            "rounds between the weight and the factor",
        ),
    ],
    ids=[
        "output",
        "unscaled result read",
        "scaled input read",
        "Gemm",
        "no constant",
        "constant rounded",
        "zero",
        "weight rounded",
        "result rounded",
    ],
)
def test_left_beside_a_linear(proto: onnx.ModelProto, reason: str) -> None:
    _left(proto, reason)


def test_a_factor_goes_into_all_linears_behind_it_or_none() -> None:
    body = "a = Mul(x, c)\n b = MatMul(a, w)\n d = MatMul(a, u)\n {}\n y = Add(e, d)"
    weights = {"u": normal(2, 16, 16)}
    _folded(_linear(body.format("e = Relu(b)"), weights), 1)
    _left(
        _linear(body.format("e = MatMul(b, u)"), weights),
        "the readers of the weight 'u' do not all ask for it",
    )


def test_one_refused_factor_refuses_those_that_share_its_weights() -> None:
    """The first and the second share w, the second and the output of the graph u."""
    text = """
    g (float[4,16] x) => (float[4,16] y, float[4,16] z) <float c = {0.3}> {
      a = Mul(x, c)
      b = MatMul(a, w)
      r = Relu(b)
      d = Mul(r, c)
      e = MatMul(d, w)
      y = MatMul(d, u)
      z = MatMul(e, u)
    }"""
    _left(graph_text(text, {"w": normal(1, 16, 16), "u": normal(2, 16, 16)}), "the weight 'u'")


# The embedding

TEXT = """
    text (int64[2,5] tokens) => (float[2,5,32] y) <float root = {ROOT}> {
      rows = Gather(table, tokens)
      wide = Cast<to = 1>(rows)
      scaled = Mul(wide, root)
      y = Relu(scaled)
    }"""


def _text(root: float) -> onnx.ModelProto:
    return graph_text(TEXT.replace("ROOT", str(root)), {"table": normal(1, 16, 32, dtype=ml_dtypes.bfloat16)})


def test_a_table_that_would_grow() -> None:
    _left(_text(5.656854), "the weight 'table' would be stored in float32, 0 MiB more", max_growth="0")
    grown, kept = _folded(_text(5.656854), 1), _folded(_text(4), 1, max_growth="0")
    assert [to_numpy(node_of(model, "rows").inputs[0].dtype) for model in (grown, kept)] == [
        FLOAT32,
        BFLOAT16,
    ]
