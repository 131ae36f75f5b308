"""`pi05c.graph.check`: what must hold after every pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from models import model_proto, small_model

from pi05c.graph.check import problems
from pi05c.graph.io import Model, load, model_from_proto, save
from pi05c.graph.weights import InMemory, Stored

LOOP = """
    steps (float[4,64] x) => (float[4,64] y) <int64 n = {2}> {
      y = Loop(n, , x) <body = step (int64 i, bool c, float[4,64] carried) => (bool going, float[4,64] leaving) {
        leaving = MatMul(carried, w)
        going = Identity(c)
      }>
    }"""
QDQ = """
    qdq (float[4] x) => (float[4] y) {
      q = QuantizeLinear(x, s, z)
      y = DequantizeLinear(q, s, z)
    }"""
W = np.ones((64, 64), np.float32)


def _only(model: Model) -> str:
    (problem,) = problems(model)
    return problem


def test_a_good_model_with_external_weights_in_a_body(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(small_model(LOOP, {"w": W}), tmp_path / "m.onnx")
    model = load(tmp_path / "m.onnx")
    monkeypatch.setattr(Stored, "read", lambda *_: pytest.fail("a weight was read"))
    assert problems(model) == []


def test_node_names_are_unique_over_all_scopes() -> None:
    model = small_model(LOOP, {"w": W})
    model.graph.nodes[0].name = model.graph.nodes[0].attrs["body"].nodes[0].name
    assert _only(model) == "node name 'leaving.MatMul' is used twice"


def test_unsorted_nodes() -> None:
    model = small_model("s (float[2] x) => (float[2] y) { a = Relu(x) y = Neg(a) }")
    model.graph.nodes.reverse()
    assert "topologically sorted" in _only(model)


def test_an_output_of_another_type_than_declared() -> None:
    model = small_model("s (float[2] x) => (float[2] y) { y = Relu(x) }")
    model.graph.outputs[0].dtype = np.float16
    assert problems(model)


def test_a_type_that_an_operator_does_not_take() -> None:
    model = small_model(
        "s (float[2] x) => (float[2] y) { a = Relu(x) y = Add(a, c) }", {"c": np.ones(2, np.float32)}
    )
    model.graph.nodes[1].inputs[1] = gs.Constant("half", InMemory(np.ones(2, np.float16)))
    assert problems(model)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_must_be_positive_and_finite(scale: float) -> None:
    model = small_model(QDQ, {"s": np.array(scale, np.float32), "z": np.array(0, np.int8)})
    assert any("scale of QuantizeLinear 'q.QuantizeLinear'" in problem for problem in problems(model))


def test_good_scales() -> None:
    model = small_model(QDQ, {"s": np.array(0.5, np.float32), "z": np.array(0, np.int8)})
    assert problems(model) == []


def test_an_operator_that_the_opset_lacks() -> None:
    model = small_model("g (float[2] x) => (float[2] y) { y = Gelu(x) }", opset=21)
    model.graph.opset = 17
    model.graph.import_domains = None
    assert problems(model)


def _loop(inputs: int, outputs: int) -> Model:
    """A Loop that carries x, with a body that takes and gives so many tensors."""
    text = """
        g (float[2] x) => (float[2] y) <int64 n = {2}> {
          y = Loop(n, , x) <body = b (int64 i, bool c, float[2] q) => (bool going, float[2] made) {
            made = Neg(q)
            going = Identity(c)
          }>
        }"""
    proto = model_proto(text)
    body = proto.graph.node[0].attribute[0].g
    del body.input[inputs:], body.output[outputs:]
    return model_from_proto(proto)


@pytest.mark.parametrize(
    ("inputs", "outputs", "found"), [(2, 2, "takes 2"), (3, 1, "gives 1"), (3, 0, "gives 0")]
)
def test_a_body_that_does_not_fit_its_loop(inputs: int, outputs: int, found: str) -> None:
    assert problems(_loop(3, 2)) == []
    assert any(
        f"the body of Loop 'y.Loop' {found}" in problem for problem in problems(_loop(inputs, outputs))
    )
