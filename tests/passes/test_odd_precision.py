"""Legal graphs in which a narrower type means something else: the passes that lower precision see it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import pytest
from pass_graphs import (
    Array,
    editable,
    graph_text,
    node_of,
    normal,
    outputs_of,
    relative_error,
    run_passes,
)

from pi05c.calibration import measure_ranges
from pi05c.graph.check import problems
from pi05c.graph.dtypes import name_of
from pi05c.graph.io import Model
from pi05c.passes.patterns.loops import each_loop
from pi05c.samples import Samples

AXIS = {"axis": np.array([1])}

LOST_BY_FLOAT16: dict[str, tuple[str, Mapping[str, Array], Mapping[str, Array]]] = {
    "a division by a norm that Clip keeps from zero": (
        """(float[2,4] x) => (float[2,4] y) {
          size = ReduceL2<keepdims=1>(x, axis)
          kept = Clip(size, least)
          whole = Expand(kept, shape)
          y = Div(x, whole)
        }""",
        {**AXIS, "least": np.float32(1e-12), "shape": np.array([2, 4])},
        {"x": np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)},
    ),
    "a division by the root of a sum of squares and an epsilon": (
        """(float[2,4] x) => (float[2,4] y) {
          squares = Mul(x, x)
          total = ReduceSum<keepdims=1>(squares, axis)
          kept = Add(total, least)
          root = Sqrt(kept)
          inverse = Reciprocal(root)
          y = Mul(x, inverse)
        }""",
        {**AXIS, "least": np.float32(1e-12)},
        {"x": np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32)},
    ),
    "a logarithm of what may be zero": (
        """(float[2,4] x) => (float[2,4] y) {
          positive = Relu(x)
          kept = Add(positive, least)
          y = Log(kept)
        }""",
        {"least": np.float32(1e-10)},
        {"x": np.array([[1, 2, -3, 4], [0, -1, 0, 0]], np.float32)},
    ),
    "whole numbers that are compared": (
        """(int64[4] x) => (float[4] y) {
          number = Cast<to=1>(x)
          same = Equal(number, wanted)
          one = Cast<to=1>(same)
          y = Neg(one)
        }""",
        {"wanted": np.float32(4097)},
        {"x": np.array([4095, 4096, 4097, 4098])},
    ),
    "whole numbers beyond the range": (
        """(int64[4] x) => (float[4] y) {
          number = Cast<to=1>(x)
          scaled = Mul(number, factor)
          y = Neg(scaled)
        }""",
        {"factor": np.float32(1e-4)},
        {"x": np.array([0, 65504, 100_000, 1_000_000])},
    ),
    "codes beyond the range": (
        """(int32[4] x) => (float[4] y) {
          number = DequantizeLinear(x, scale)
          scaled = Mul(number, factor)
          y = Neg(scaled)
        }""",
        {"factor": np.float32(1e-4), "scale": np.float32(0.5)},
        {"x": np.array([0, 65504, 100_000, 10_000_000], np.int32)},
    ),
}


@pytest.mark.parametrize("passes", ["lower_precision", "fp16"])
@pytest.mark.parametrize("case", LOST_BY_FLOAT16)
def test_what_float16_would_lose_stays_in_float32(case: str, passes: str) -> None:
    text, weights, inputs = LOST_BY_FLOAT16[case]
    proto = graph_text(f"g {text}", weights)
    after = editable(proto)
    run_passes(after, passes, [inputs])
    assert relative_error(outputs_of(after, inputs), outputs_of(proto, inputs)) <= 2e-3


STATED: dict[str, str] = {
    "DequantizeLinear": """(int8[2,8] x) => (float[2,8] y) {
      values = DequantizeLinear<output_dtype=1>(x, scale)
      y = Tanh(values)
    }""",
    "HannWindow": """(float[8] x) => (float[8] y) {
      window = HannWindow<output_datatype=1>(size)
      y = Mul(window, x)
    }""",
    "Bernoulli": """(float[8] x) => (float[8] y) {
      nothing = Sub(x, x)
      drawn = Bernoulli<dtype=1>(nothing)
      y = Add(drawn, x)
    }""",
    "SequenceEmpty": """(float[8] x) => (float[8] y) {
      bent = Tanh(x)
      empty = SequenceEmpty<dtype=1>()
      one = SequenceInsert(empty, bent)
      first = SequenceAt(one, zero)
      y = Neg(first)
    }""",
}


@pytest.mark.parametrize("operator", STATED)
def test_types_that_an_attribute_states(operator: str) -> None:
    weights = {"scale": np.float32(0.1), "size": np.array(8), "zero": np.array(0)}
    opset = 23 if operator == "DequantizeLinear" else 21
    proto = graph_text(
        f"g {STATED[operator]}", {k: v for k, v in weights.items() if k in STATED[operator]}, opset=opset
    )
    model = editable(proto)
    inputs = {
        "x": np.arange(16, dtype=np.int8).reshape(2, 8) if operator == "DequantizeLinear" else normal(1, 8)
    }
    results = run_passes(model, "fp16", [inputs])
    assert any(result.step.spec.name == "lower_precision" and result.rewrites for result in results)
    assert problems(model) == []
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= 2e-3


def test_a_dequantizer_that_states_its_type_is_lowered() -> None:
    """Else a Cast would stand between it and its MatMul."""
    proto = graph_text(
        """
        g (int8[2,8] x) => (float[2,8] y) {
          values = DequantizeLinear<output_dtype=1>(x, scale)
          y = MatMul(values, w)
        }""",
        {"scale": np.float32(0.1), "w": normal(1, 8, 8)},
        opset=23,
    )
    model = editable(proto)
    run_passes(model, "fp16", [{"x": np.ones((2, 8), np.int8)}])
    assert node_of(model, "values").outputs[0].outputs[0].op == "MatMul"
    assert name_of(node_of(model, "values").outputs[0].dtype) == "float16"


BODIES = {
    "returns x as it was before the step": ("added, float16[1,8] s", ""),
    "returns x behind the step twice": ("added, float16[1,8] added", ""),
    "returns x under another name": ("other, float16[1,8] s", "other = Identity(added)"),
}


@pytest.mark.parametrize("body", BODIES)
def test_a_loop_carries_x_in_float32_whatever_else_its_body_returns(body: str) -> None:
    returned, more = BODIES[body]
    proto = graph_text(
        f"""
        g (float16[1,8] x) => (float16[1,8] y, float16[3,1,8] path) {{
          y, path = Loop(three, true, x)<body = step (int64 i, bool c, float16[1,8] s)
            => (bool on, float16[1,8] {returned}) {{
              on = Identity(c)
              made = MatMul(s, w)
              v = Tanh(made)
              moved = Mul(v, dt)
              added = Add(s, moved)
              {more}
            }}>
        }}""",
        {
            "three": np.array(3),
            "true": np.array(True),
            "w": normal(1, 8, 8, dtype=np.float16),
            "dt": np.float16(-0.1),
        },
    )
    model = editable(proto)
    inputs = {"x": normal(2, 1, 8, dtype=np.float16)}
    (result,) = run_passes(model, "pin_fp32")
    assert result.changes == ("flow added.Add",)
    assert _carried_types(model) == ["float32"]
    assert problems(model) == []
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= 2e-3
    assert run_passes(model, "pin_fp32")[0].changes == ()


def _carried_types(model: Model) -> list[str]:
    (loop,) = (node for _, node in each_loop(model.graph))
    return [name_of(tensor.dtype) for tensor in loop.attrs["body"].inputs[2:]]


@pytest.mark.parametrize(
    ("body", "type_"),
    [
        ("{ c = Constant<value_float = 2.0>() b = Mul(a, c) }", "float32"),
        ("{ c = Relu(a) b = Mul(a, c) }", "float16"),
    ],
    ids=["which holds a number", "of any type"],
)
def test_functions_of_the_model(body: str, type_: str) -> None:
    proto = graph_text("g (float[2,8] x) => (float[2,8] y) { called = Neg(x) y = Tanh(called) }")
    function = onnx.parser.parse_function(f'<domain: "own", opset_import: ["": 21]> F (a) => (b) {body}')
    proto.functions.append(function)
    proto.opset_import.append(onnx.helper.make_opsetid("own", 1))
    proto.graph.node[0].domain, proto.graph.node[0].op_type = "own", "F"
    model = editable(proto)
    inputs = {"x": normal(1, 2, 8)}
    run_passes(model, "fp16", [inputs])
    assert name_of(node_of(model, "called").outputs[0].dtype) == type_
    assert problems(model) == []
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= 2e-3


def test_statistics_of_a_norm_keep_the_type_that_it_states() -> None:
    proto = graph_text(
        "g (float[2,8] x) => (float[2,8] y, float[2,1] m) { y, m = LayerNormalization(x, w) }",
        {"w": normal(1, 8)},
    )
    model = editable(proto)
    inputs = {"x": normal(2, 2, 8)}
    run_passes(model, "lower_precision{to=bfloat16}", [inputs])
    assert problems(model) == []
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) <= 2e-2


def test_ranges_where_a_dequantizer_states_the_type_of_its_scale() -> None:
    """onnxruntime 1.32 refuses what it makes of one in float16 that nothing reads."""
    proto = graph_text(
        """
        g (float16[4] x) => (float16[4] y) {
          codes = QuantizeLinear(x, scale, zero)
          y = DequantizeLinear<output_dtype=10>(codes, scale, zero)
        }""",
        {"scale": np.float16(0.5), "zero": np.int8(0)},
        opset=23,
    )
    samples = Samples.of([{"x": np.array([1, -2, 3, 4], np.float16)}])
    ranges = measure_ranges(editable(proto), ["x"], samples, threads=1)
    assert (ranges.low["x"], ranges.high["x"]) == (-2, 4)
