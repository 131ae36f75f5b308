"""`pi05c.graph.evaluate`: parts of a graph, cut out and run."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from models import small_model

from pi05c.graph.errors import Pi05cError
from pi05c.graph.evaluate import Evaluator, slice_of
from pi05c.graph.io import load, save
from pi05c.graph.text import canonical_text

TIME = """
    time (float[2,4] x) => (float[2,4] y) <float minus_dt = {-0.1}, float one = {1}> {
      t = Add(one, minus_dt)
      phase = Mul(t, frequencies)
      embedding = Sin(phase)
      hidden = MatMul(embedding, w)
      y = Add(x, hidden)
    }"""
WEIGHTS = {"frequencies": np.array([1, 2, 3, 4], np.float32), "w": np.eye(4, dtype=np.float32)}


def test_what_constants_determine() -> None:
    model = small_model(TIME, WEIGHTS)
    before = canonical_text(model.graph)
    embedding, constant = model.graph.nodes[2].outputs[0], model.graph.nodes[1].inputs[1]
    values, frequencies = Evaluator(model.graph, [embedding, constant])()
    expected = np.sin(np.float32(1 + np.float32(-0.1)) * WEIGHTS["frequencies"])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_array_equal(frequencies, WEIGHTS["frequencies"])
    assert canonical_text(model.graph) == before


def test_cut_at_an_input_it_runs_as_often_as_asked() -> None:
    model = small_model(TIME, WEIGHTS)
    t, phase = model.graph.nodes[0].outputs[0], model.graph.nodes[1].outputs[0]
    run = Evaluator(model.graph, [phase], [t])
    for value in (0.5, 2.0):
        np.testing.assert_array_equal(
            run({"t": np.array(value, np.float32)})[0], value * WEIGHTS["frequencies"]
        )


def test_nothing_to_compute() -> None:
    model = small_model(TIME, WEIGHTS)
    assert Evaluator(model.graph, [])() == []


def test_a_tensor_asked_for_twice() -> None:
    model = small_model(TIME, WEIGHTS)
    t = model.graph.nodes[0].outputs[0]
    first, second = Evaluator(model.graph, [t, t])()
    assert first == second == np.float32(0.9)


def test_a_part_of_a_body_with_what_it_captures() -> None:
    text = """
    loop (float[4] x) => (float[4] y) <int64 n = {3}, float two = {2}> {
      scale = Mul(two, two)
      y = Loop(n, , x) <body = step (int64 i, bool c, float[4] carried) => (bool going, float[4] leaving) {
        number = Cast<to = 1>(i)
        factor = Mul(number, scale)
        leaving = Mul(carried, factor)
        going = Identity(c)
      }>
    }"""
    model = small_model(text)
    body = model.graph.nodes[1].attrs["body"]
    run = Evaluator(model.graph, [body.nodes[1].outputs[0]], [body.inputs[0]])
    assert [run({"i": np.array(step)})[0].item() for step in range(3)] == [0, 4, 8]


def test_a_node_with_bodies() -> None:
    text = """
    branch (float[1] x) => (float[1] y) <bool yes = {1}, float[1] a = {3}> {
      value = If(yes) <
        then_branch = t () => (float[1] p) { p = Neg(a) },
        else_branch = e () => (float[1] q) { q = Exp(a) }
      >
      y = Add(x, value)
    }"""
    model = small_model(text)
    assert Evaluator(model.graph, [model.graph.nodes[0].outputs[0]])()[0].tolist() == [-3]


def test_mapped_bfloat16_weights(tmp_path: Path) -> None:
    text = (
        "m (float[1,64] x) => (float[1,64] y) { w32 = Cast<to = 1>(w) h = MatMul(ones, w32) y = Add(x, h) }"
    )
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(ml_dtypes.bfloat16)
    save(small_model(text, {"w": weight, "ones": np.ones((1, 64), np.float32)}), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    (value,) = Evaluator(model.graph, [model.graph.nodes[1].outputs[0]])()
    np.testing.assert_allclose(value, weight.astype(np.float32).sum(0, keepdims=True), rtol=1e-5, atol=1e-5)


def test_codes_of_which_a_byte_holds_two() -> None:
    text = "i (int4[5] x) => (int4[5] y, int4[5] z) { y = Cast<to = 22>(w) z = Identity(x) }"
    model = small_model(text, {"w": np.array([-8, 3, 7, 0, -1], np.float32)})
    (value,) = Evaluator(model.graph, [model.graph.nodes[0].outputs[0]])()
    assert value.dtype == ml_dtypes.int4
    assert value.astype(np.int8).tolist() == [-8, 3, 7, 0, -1]


def test_what_only_a_run_knows_is_named() -> None:
    model = small_model(TIME, WEIGHTS)
    with pytest.raises(Pi05cError, match="'x' is not known at compile time"):
        Evaluator(model.graph, [model.graph.nodes[4].outputs[0]])


def test_an_operator_that_onnxruntime_lacks() -> None:
    text = "b (bfloat16[2,2] x) => (bfloat16[2,2] y) { h = MatMul(w, w) y = Add(x, h) }"
    model = small_model(text, {"w": np.eye(2).astype(ml_dtypes.bfloat16)})
    with pytest.raises(Pi05cError, match="'h' cannot be evaluated at compile time"):
        Evaluator(model.graph, [model.graph.nodes[0].outputs[0]])


def test_a_slice_holds_each_node_once() -> None:
    model = small_model("s (float[2] x) => (float[2] y) { a = Relu(x) b = Neg(a) c = Exp(a) y = Add(b, c) }")
    nodes = slice_of(model.graph.outputs, model.graph.inputs)
    assert sorted(node.op for node in nodes) == ["Add", "Exp", "Neg", "Relu"]


def test_a_type_that_the_file_leaves_open() -> None:
    model = small_model(TIME, WEIGHTS)
    t = model.graph.nodes[0].outputs[0]
    t.dtype = t.shape = None
    assert Evaluator(model.graph, [t])()[0] == np.float32(0.9)
