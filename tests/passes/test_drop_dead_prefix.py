"""Rows that nobody reads: where they go, where they stay, and that the numbers are the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from foreign_policy import Style, last_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import (
    editable,
    graph_text,
    node_of,
    normal,
    outputs_of,
    relative_error,
    run_pass,
    run_passes,
    seeded_inputs,
    text_of,
)

from pi05c.graph.io import Model, scopes

STYLES = {
    "matmul": Style(),
    "two dimensions, tile, batch 2": Style(
        linear="gemm", repeat="tile", batch=2, heads=4, kv_heads=2, mask="where"
    ),
    "broadcast heads, scaled queries": Style(repeat="broadcast", scale="query", rope="parts"),
    "transposed weights": Style(linear="transposed", scale="div"),
    "opset 23 operators": Style(opset=23, operators=True),
}

ROWS = 3


def _shapes(model: Model, op: str) -> list[list[int]]:
    return [list(n.outputs[0].shape) for scope in scopes(model.graph) for n in scope.nodes if n.op == op]


@pytest.mark.parametrize("name", STYLES)
def test_last_layer_in_every_spelling(name: str) -> None:
    """Queries, attention, output projection and MLP run on the rows that are returned; keys and values on all."""
    style = STYLES[name]
    proto = last_layer(style, ROWS)
    model = editable(proto)
    run_passes(model, "canonicalize")
    assert run_pass(model, "drop_dead_prefix").changes
    every, few = style.batch * style.prefix, style.batch * ROWS
    rows = [int(np.prod(shape[:-1])) for shape in _shapes(model, "MatMul") if shape[-1] in (32, 64)]
    linears = [count for count in rows if count in (every, few)]
    wide = [count for count in linears if count == every]
    assert len(wide) <= 2, "no linear but those of keys and values sees every row"
    assert len(linears) - len(wide) >= 4
    softmax = _shapes(model, "Softmax")
    assert softmax == [[style.batch, style.heads, ROWS, style.prefix]]
    for seed in range(2):
        inputs = seeded_inputs(proto, seed)
        assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-5
    once = text_of(model)
    assert run_pass(model, "drop_dead_prefix").changes == ()
    assert text_of(model) == once


MOVES = """
    moves (float[2,3,4,8] x) => (float[2,RETURNED] y) <int64[3] merged = {2, 12, 8}, int64[4] split = {2, 12, 2, 8}> {
      flat = Reshape(x, merged)
      wide = MatMul(flat, w)
      heads = Reshape(wide, split)
      turned = Transpose<perm = [0, 2, 1, 3]>(heads)
      soft = Softmax<axis = -1>(turned)
      y = Gather<axis = 2>(soft, chosen)
    }"""


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-12, 11), min_size=1, max_size=12))
def test_any_choice_of_rows_through_moves(chosen: list[int]) -> None:
    """Rows in any order, some twice, through reshapes that merge and split axes."""
    proto = graph_text(
        MOVES.replace("RETURNED", f"2,{len(chosen)},8"),
        {"w": normal(1, 8, 16), "chosen": np.array(chosen, np.int64)},
    )
    model = editable(proto)
    run_pass(model, "drop_dead_prefix")
    count = len({index % 12 for index in chosen})
    assert node_of(model, "wide").outputs[0].shape == [2, count, 16]
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-6
    once = text_of(model)
    assert run_pass(model, "drop_dead_prefix").changes == ()
    assert text_of(model) == once


LOW = -2.3819763e38
SELF_ATTENTION = """
    layers (float[1,5,16] x, bool[1,5] valid, float[1,2,16] q) => (OUTPUTS)
      <int64[1] one = {1}, float open = {0}, float closed = {-2.3819763e38}, bool[1,5] ever = {1, 1, 1, 1, 0}> {
      seen = And(valid, ever)
      row = Unsqueeze(seen, one)
      column = Transpose<perm = [0, 2, 1]>(row)
      pairs = And(row, column)
      mask = Where(pairs, open, closed)
      xq = MatMul(x, w)
      xt = Transpose<perm = [0, 2, 1]>(x)
      logits = MatMul(xq, xt)
      masked = Add(logits, mask)
      probs = Softmax<axis = -1>(masked)
      mixed = MatMul(probs, x)
      x1 = Add(x, mixed)
      kt = Transpose<perm = [0, 2, 1]>(x1)
      logits1 = MatMul(q, kt)
      mask1 = Where(row, open, closed)
      masked1 = Add(logits1, mask1)
      probs1 = Softmax<axis = -1>(masked1)
      y = MatMul(probs1, x1)
      EXTRA
    }"""


def _layers(outputs: str = "float[1,2,16] y", extra: str = "", ever: str | None = None) -> onnx.ModelProto:
    text = SELF_ATTENTION.replace("OUTPUTS", outputs).replace("EXTRA", extra)
    return graph_text(text if ever is None else text.replace("1, 1, 1, 1, 0", ever), {"w": normal(1, 16, 16)})


def test_a_row_that_may_be_masked_whole_keeps_its_keys() -> None:
    """Nothing says that one of the keys is seen, so a row may be the mean of all values, dead ones too."""
    proto = _layers()
    model = editable(proto)
    result = run_pass(model, "drop_dead_prefix")
    assert result.changes == ()
    assert {skip.reason for skip in result.skips} == {"a row of its mask may leave out every key"}
    inputs = {**seeded_inputs(proto), "valid": np.zeros((1, 5), bool)}
    assert np.isfinite(outputs_of(model, inputs)["y"]).all()


def _with_a_sure_key(**kwargs: str) -> onnx.ModelProto:
    """The first token is valid in any run: the mask is a concatenation of a constant and of an input."""
    proto = _layers(**kwargs)
    for node in proto.graph.node:
        if node.output[0] == "seen":
            node.input[:] = ["given", "ever"]
    proto.graph.node.insert(0, onnx.helper.make_node("Concat", ["sure", "rest"], ["given"], "given", axis=1))
    proto.graph.node.insert(
        0, onnx.helper.make_node("Slice", ["valid", "c1", "c5", "one"], ["rest"], "rest.Slice")
    )
    for name, value in (
        ("sure", np.ones((1, 1), bool)),
        ("c1", np.array([1], np.int64)),
        ("c5", np.array([5], np.int64)),
    ):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return proto


@pytest.mark.parametrize("valid", [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 1], [0, 1, 1, 0, 0]])
def test_padding_goes_though_other_tokens_are_known_at_run_time_only(valid: list[int]) -> None:
    """Tokens that a run masks out have rows of their own that nothing reads: their values may change."""
    proto = _with_a_sure_key()
    model = editable(proto)
    assert run_pass(model, "drop_dead_prefix").changes
    assert node_of(model, "x1").outputs[0].shape == [1, 4, 16]
    inputs = {**seeded_inputs(proto), "valid": np.array([valid], bool)}
    expected = outputs_of(proto, inputs)
    assert np.isfinite(expected["y"]).all()
    assert relative_error(outputs_of(model, inputs), expected) < 1e-6


@pytest.mark.parametrize(
    ("outputs", "extra"),
    [
        ("float[1,2,16] y, float[1,5,16] x1", ""),
        ("float[1,2,16] y, float[1,1,16] m", "m = ReduceMean<keepdims = 1>(x1, one)"),
        ("float[1,2,16] y, float[1,1,16] m", "m = ReduceMax<keepdims = 1>(x1, one)"),
    ],
    ids=["returned", "mean", "maximum"],
)
def test_rows_that_something_without_the_mask_reads_keep_their_values(outputs: str, extra: str) -> None:
    proto = _with_a_sure_key(outputs=outputs, extra=extra)
    model = editable(proto)
    run_pass(model, "drop_dead_prefix")
    inputs = {**seeded_inputs(proto), "valid": np.array([[1, 0, 1, 0, 0]], bool)}
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-6


@pytest.mark.parametrize("low", [-65504.0, -1e8])
def test_a_mask_that_logits_could_exceed_stays(low: float) -> None:
    mask = np.array([[[0, 0, low]]], np.float32)
    text = """
    attention (float[1,2,16] q, float[1,3,16] k) => (float[1,2,16] y) {
      kt = Transpose<perm = [0, 2, 1]>(k)
      logits = MatMul(q, kt)
      masked = Add(logits, mask)
      probs = Softmax<axis = -1>(masked)
      y = MatMul(probs, k)
    }"""
    model = editable(graph_text(text, {"mask": mask}))
    assert run_pass(model, "drop_dead_prefix").changes == ()


def test_a_row_of_zeros_and_a_row_of_low_values_stay_numbers() -> None:
    """A constant mask with a row that leaves out every key: that row is the mean of all values, and stays it."""
    mask = np.array([[[0, 0, LOW], [LOW, LOW, LOW]]], np.float32)
    text = """
    attention (float[1,2,16] q, float[1,3,16] k) => (float[1,2,16] y) {
      kt = Transpose<perm = [0, 2, 1]>(k)
      logits = MatMul(q, kt)
      masked = Add(logits, mask)
      probs = Softmax<axis = -1>(masked)
      y = MatMul(probs, k)
    }"""
    proto = graph_text(text, {"mask": mask})
    model = editable(proto)
    result = run_pass(model, "drop_dead_prefix")
    assert result.changes == ()
    assert result.skips[0].reason == "a row of its mask may leave out every key"
    inputs = seeded_inputs(proto)
    np.testing.assert_allclose(outputs_of(model, inputs)["y"][0, 1], inputs["k"][0].mean(0), rtol=1e-5)


DECOMPOSED = """
    attention (float[1,2,16] q, float[1,3,16] x) => (float[1,2,16] y) <int64[1] last = {-1}> {
      k = MatMul(x, w)
      kt = Transpose<perm = [0, 2, 1]>(k)
      logits = MatMul(q, kt)
      masked = MASK
      largest = ReduceMax<keepdims = 1>(masked, last)
      centred = Sub(masked, largest)
      e = Exp(centred)
      total = ReduceSum<keepdims = 1>(e, last)
      probs = Div(e, total)
      y = MatMul(probs, k)
    }"""


@pytest.mark.parametrize("mask", ["Add(logits, mask)", "Where(valid, logits, low)"])
def test_softmax_in_parts_and_mask_by_selection(mask: str) -> None:
    proto = graph_text(
        DECOMPOSED.replace("MASK", mask),
        {
            "w": normal(1, 16, 16),
            "mask": np.array([[[0, LOW, 0]]], np.float32),
            "valid": np.array([[[True, False, True]]]),
            "low": np.float32(LOW),
        },
    )
    model = editable(proto)
    run_pass(model, "drop_dead_prefix")
    assert node_of(model, "k").outputs[0].shape == [1, 2, 16]
    assert not [node for node in model.graph.nodes if node.outputs[0].name == "masked"]
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-6


def test_outputs_of_if_and_scan_that_nobody_reads() -> None:
    proto = graph_text(
        """
        g (float[3,4] rows, bool c, float[4] x) => (float[4] y, float[4,3] kept) {
          y, other = If(c) <
            then_branch = yes () => (float[4] a, float[4] b) { a = Exp(x)
              b = Sin(x) },
            else_branch = no () => (float[4] d, float[4] e) { d = Neg(x)
              e = Cos(x) }>
          last, dropped, kept = Scan<num_scan_inputs = 1, scan_output_axes = [0, 1], scan_output_directions = [0, 1],
            body = step (float[4] s, float[4] row) => (float[4] s1, float[4] n, float[4] t) {
              s1 = Add(s, row)
              n = Neg(s1)
              t = Tanh(row)
            }>(x, rows)
        }"""
    )
    model = editable(proto)
    result = run_pass(model, "drop_dead_prefix")
    assert result.changes == ("y.If: other", "last.Scan: s", "last.Scan: n")
    ops = {node.op for scope in scopes(model.graph) for node in scope.nodes}
    assert ops == {"If", "Scan", "Exp", "Neg", "Tanh"}
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) == 0


def test_a_reader_in_a_body_counts() -> None:
    """The branch reads all rows of what the main graph needs two of."""
    proto = graph_text(
        """
        g (float[6,8] x, bool c) => (float[2,8] y, float[1,8] z)
          <int64[1] start = {0}, int64[1] end = {2}, int64[1] axis = {0}> {
          h = MatMul(x, w)
          y = Slice(h, start, end, axis)
          z = If(c) <
            then_branch = yes () => (float[1,8] a) { a = ReduceSum(h, axis) },
            else_branch = no () => (float[1,8] b) { b = ReduceMax(h, axis) }>
        }""",
        {"w": normal(1, 8, 8)},
    )
    model = editable(proto)
    before = text_of(model)
    assert run_pass(model, "drop_dead_prefix").changes == ()
    assert text_of(model) == before
