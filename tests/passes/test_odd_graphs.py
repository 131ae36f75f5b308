"""Legal graphs that stretch what finders take for granted: an exact pass keeps the numbers or leaves them alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from pass_graphs import (
    Array,
    editable,
    graph_text,
    normal,
    outputs_of,
    ranges_of,
    relative_error,
    run_pass,
    seeded_inputs,
    text_of,
)

from pi05c.graph.check import problems
from pi05c.graph.dtypes import to_numpy
from pi05c.graph.io import model_from_proto, to_proto
from pi05c.graph.weights import array_of
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run

LOW = -1e9


@dataclass(frozen=True)
class Odd:
    """A graph in ONNX's text form, with its weights, for one pass; `returns` makes a weight an output."""

    graph_pass: str
    name: str
    text: str
    weights: dict[str, Array] = field(default_factory=dict)
    returns: str | None = None

    def model(self) -> onnx.ModelProto:
        proto = graph_text(f"g {self.text}", self.weights)
        if self.returns is not None:
            shape = self.weights[self.returns].shape
            proto.graph.output.append(onnx.helper.make_tensor_value_info(self.returns, 1, shape))
        return proto


def attention(mask: str, axis: int = -1, inputs: str = "") -> str:
    return f"""(float[1,2,3,4] q, float[1,2,4,5] k, float[1,2,5,6] v{inputs}) => (float[1,2,3,6] y) {{
      logits = MatMul(q, k)
      masked = {mask}
      probs = Softmax<axis={axis}>(masked)
      y = MatMul(probs, v)
    }}"""


BOTH_WAYS = """(float[2,8] x, float[2,8] z) => (float[2,8] y, float[2,8] v) {
  turned = Transpose<perm=[1,0]>(w)
  a = MatMul(x, w)
  scaled_a = Mul(a, c)
  b = MatMul(z, turned)
  scaled_b = Mul(b, c)
  y = Tanh(scaled_a)
  v = Tanh(scaled_b)
}"""

CASES = [
    Odd(
        "drop_dead_prefix",
        "a constant mask that sets logits to 0",
        attention("Where(seen, logits, zero)"),
        {"seen": np.array([1, 1, 0, 1, 0], np.bool_), "zero": np.float32(0)},
    ),
    Odd(
        "drop_dead_prefix",
        "a mask of the run that sets logits to 0",
        attention("Where(seen, logits, zero)", inputs=", bool[5] seen"),
        {"zero": np.float32(0)},
    ),
    Odd(
        "drop_dead_prefix",
        "a softmax over the queries",
        attention("Add(logits, mask)", axis=2),
        {"mask": np.array([0, 0, 0, 0, LOW], np.float32)},
    ),
    Odd(
        "drop_dead_prefix",
        "a Squeeze without axes of what becomes one row",
        """(float[1,5,8] x) => (float[1,4] y) {
          made = MatMul(x, w)
          rows = Squeeze(made)
          bent = Tanh(rows)
          y = Slice(bent, start, end, axis)
        }""",
        {"w": normal(1, 8, 4), "start": np.array([0]), "end": np.array([1]), "axis": np.array([0])},
    ),
    Odd(
        "batch_views",
        "views joined along an axis of one",
        """(float[2,3,8,8] a, float[2,3,8,8] b) => (float[2,2,4] y) {
          seen_a = Conv(a, w)
          seen_b = Conv(b, w)
          mean_a = GlobalAveragePool(seen_a)
          mean_b = GlobalAveragePool(seen_b)
          row_a = Reshape(mean_a, shape)
          row_b = Reshape(mean_b, shape)
          y = Concat<axis=1>(row_a, row_b)
        }""",
        {"w": normal(1, 4, 3, 3, 3), "shape": np.array([2, 1, 4])},
    ),
    Odd(
        "batch_views",
        "indices of a pooling",
        """(float[1,3,8,8] a, float[1,3,8,8] b)
          => (float[1,4,2,2] y, float[1,4,2,2] z, int64[1,4,2,2] i, int64[1,4,2,2] j) {
          seen_a = Conv(a, w)
          seen_b = Conv(b, w)
          y, i = MaxPool<kernel_shape=[3,3], strides=[3,3]>(seen_a)
          z, j = MaxPool<kernel_shape=[3,3], strides=[3,3]>(seen_b)
        }""",
        {"w": normal(1, 4, 3, 3, 3)},
    ),
    Odd(
        "canonicalize",
        "a weight that the graph returns",
        """(double[2,4] x) => (double[2,4] y) {
          wide = Cast<to=11>(w)
          turned = Transpose<perm=[1,0]>(wide)
          y = MatMul(x, turned)
        }""",
        {"w": normal(1, 4, 4)},
        returns="w",
    ),
    Odd(
        "fold_norms",
        "a weight that the graph returns",
        """(float[2,8] x) => (float[2,4] y) {
          normed = LayerNormalization(x, gain)
          y = MatMul(normed, w)
        }""",
        {"w": normal(1, 8, 4), "gain": normal(2, 8)},
        returns="w",
    ),
    Odd(
        "fold_scales",
        "a weight that the graph returns",
        """(float[2,8] x) => (float[2,4] y) {
          made = MatMul(x, w)
          scaled = Mul(made, c)
          y = Tanh(scaled)
        }""",
        {"w": normal(1, 8, 4), "c": np.float32(2)},
        returns="w",
    ),
    Odd(
        "fold_scales",
        "a weight read as it is and transposed",
        BOTH_WAYS,
        {"w": normal(1, 8, 8), "c": np.abs(normal(2, 8)) + np.float32(0.5)},
    ),
    Odd(
        "fold_scales",
        "a number behind a weight read as it is and transposed",
        BOTH_WAYS,
        {"w": normal(1, 8, 8), "c": np.float32(2.5)},
    ),
    Odd(
        "fold_scales",
        "Q that is K as well",
        """(float[1,4,4] x) => (float[1,4,4] y) {
          both = MatMul(x, w)
          logits = MatMul(both, both)
          scaled = Mul(logits, c)
          probs = Softmax<axis=-1>(scaled)
          y = MatMul(probs, x)
        }""",
        {"w": normal(1, 4, 4), "c": np.float32(0.5)},
    ),
    Odd(
        "fold_scales",
        "a bias that widens one column",
        """(float[2,8] x) => (float[2,5] y) {
          made = MatMul(x, w)
          wide = Add(made, b)
          scaled = Mul(wide, c)
          y = Tanh(scaled)
        }""",
        {"w": normal(1, 8, 1), "b": normal(3, 5), "c": np.abs(normal(2, 5)) + np.float32(0.5)},
    ),
]


@pytest.mark.parametrize("odd", CASES, ids=lambda odd: f"{odd.graph_pass}: {odd.name}")
def test_numbers_stay(odd: Odd) -> None:
    proto = odd.model()
    after = editable(proto)
    run_pass(after, odd.graph_pass)
    inputs = seeded_inputs(proto, 11)
    if "seen" in inputs:
        inputs["seen"] = np.array([1, 0, 1, 0, 1], np.bool_)
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_a_number_behind_both_readings_of_a_weight_is_folded_once() -> None:
    after = editable(graph_text(f"g {BOTH_WAYS}", {"w": normal(1, 8, 8), "c": np.float32(2.5)}))
    assert run_pass(after, "fold_scales").changes == ("scaled_a.Mul", "scaled_b.Mul")


def test_a_mask_that_broadcasts_the_heads_of_an_unknown_batch_stays() -> None:
    proto = graph_text(
        """
        g (float[n,1,3,4] q, float[n,1,4,5] k, float[n,1,5,6] v) => (float[n,h,3,6] y) {
          logits = MatMul(q, k)
          masked = Add(logits, mask)
          probs = Softmax<axis=-1>(masked)
          y = MatMul(probs, v)
        }""",
        {"mask": np.zeros((1, 2, 1, 1), np.float32)},
    )
    after = editable(proto)
    run_pass(after, "drop_dead_prefix")
    inputs = {"q": normal(1, 2, 1, 3, 4), "k": normal(2, 2, 1, 4, 5), "v": normal(3, 2, 1, 5, 6)}
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 1e-6


def test_factors_on_one_weight_count_together() -> None:
    weight = normal(1, 8, 4)
    after = editable(
        graph_text(
            """
            g (float[2,8] x) => (float[2,4] y) {
              made = MatMul(x, w)
              once = Mul(made, c)
              twice = Mul(once, c)
              y = Tanh(twice)
            }""",
            {"w": weight, "c": np.array([1, 16, 4, 1], np.float32)},
        )
    )
    result = run_pass(after, "fold_scales")
    assert result.changes == ("once.Mul",)
    assert "256-fold" in result.skips[0].reason
    assert run_pass(after, "fold_scales").changes == ()
    (stored,) = [tensor for tensor in after.graph.tensors().values() if tensor.name == "w"]
    np.testing.assert_allclose(np.abs(array_of(stored) / weight)[0], [1, 16, 4, 1], rtol=1e-6)


FOREIGN = """
    g (float[1,3,8] x) => (float[1,3,8] y) {
      a = other.Neg(x)
      b = other.Neg(a)
      made = other.MatMul(b, w)
      turned = other.Transpose(made)
      logits = other.MatMul(turned, w)
      probs = other.Softmax(logits)
      same = other.Identity(probs)
      y = other.Cast(same)
    }"""


@pytest.mark.parametrize("passes", ["exact", "fp16", "default", "nvfp4"])
def test_operators_of_another_domain_are_not_those_of_onnx_that_have_their_names(passes: str) -> None:
    proto = graph_text(FOREIGN.replace("other.", ""), {"w": normal(1, 8, 8)})
    proto.opset_import.append(onnx.helper.make_opsetid("other", 1))
    for node in proto.graph.node:
        node.domain = "other"
        del node.attribute[:]
    model = editable(proto)
    names = [tensor.name for node in model.graph.nodes for tensor in (*node.inputs, *node.outputs)]
    ranges = ranges_of(dict.fromkeys(names, (-4.0, 4.0)))
    results = run(model, parse(passes, PRESETS), calibrate=lambda *_: ranges)
    changed = [result.step.spec.name for result in results if result.rewrites]
    assert changed == ([] if passes == "exact" else ["lower_precision", "canonicalize"])
    after = [node for node in to_proto(model)[0].graph.node if node.domain]
    assert [(n.op_type, n.domain) for n in after] == [(n.op_type, n.domain) for n in proto.graph.node]
    assert "= other::MatMul(%" in text_of(model)


def test_empty_tensors_go_through_all_exact_passes() -> None:
    """A batch of nothing, cut and joined again, convolved and attended to."""
    text = """
        g (float[2,0,3,4,4] images, float[0,3,8] x) => (float[0,4,2,2] seen, float[0,3,8] y) {
          a = Gather<axis = 0>(images, first)
          b = Gather<axis = 0>(images, second)
          seen_a = Conv<strides = [2, 2]>(a, w)
          seen_b = Conv<strides = [2, 2]>(b, w)
          seen = Concat<axis = 0>(seen_a, seen_b)
          apart = Reshape(x, shape)
          turned = Transpose<perm = [0, 2, 1, 3]>(apart)
          keys = Transpose<perm = [0, 1, 3, 2]>(turned)
          logits = MatMul(turned, keys)
          probs = Softmax(logits)
          mixed = MatMul(probs, turned)
          back = Transpose<perm = [0, 2, 1, 3]>(mixed)
          y = Reshape(back, like)
        }"""
    weights = {
        "w": normal(1, 4, 3, 2, 2),
        "first": np.array(0),
        "second": np.array(1),
        "shape": np.array([-1, 3, 2, 4]),
        "like": np.array([-1, 3, 8]),
    }
    proto = graph_text(text, weights)
    after = editable(proto)
    run(after, parse("exact", PRESETS))
    inputs = seeded_inputs(proto)
    assert {name: array.shape for name, array in outputs_of(after, inputs).items()} == {
        name: array.shape for name, array in outputs_of(proto, inputs).items()
    }


def test_what_states_its_own_type_keeps_it() -> None:
    """As the state that a recurrent network starts from (Silero VAD)."""
    graph = helper.make_graph(
        [
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("ConstantOfShape", ["size"], ["start"], name="zeros"),
            helper.make_node("Add", ["x", "start"], ["sum"], name="add"),
            helper.make_node("MatMul", ["x", "w"], ["product"], name="project"),
            helper.make_node("Sub", ["product", "sum"], ["y"], name="difference"),
        ],
        "states",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    model = model_from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    run(model, parse("fp16", PRESETS))
    (made,) = (node for node in model.graph.nodes if node.op == "ConstantOfShape")
    assert to_numpy(made.outputs[0].dtype) == np.float32
    assert problems(model) == []
