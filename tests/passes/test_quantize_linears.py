"""What quantize_linears rounds weights on: the rows of all linears that read a weight, as calibration keeps them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from pass_graphs import editable, graph_text, normal, outputs_of, run_pass

from pi05c.graph.compensation import Compensated
from pi05c.graph.edit import keep_between
from pi05c.graph.io import Model
from pi05c.graph.ranges import Ranges, Wanted
from pi05c.graph.weights import InMemory, Quantized, Weight, weight_of
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run
from pi05c.passes.quantize_linears import ROWS

TWO_STEPS = """
    steps (float[4,32] x) => (float[4,32] y, float[4,16] z) {
      first = MatMul(x, w)
      act = Relu(first)
      y = MatMul(act, w)
      z = MatMul(act, other)
    }"""


def two_steps() -> Model:
    weights = {"w": normal(1, 32, 32), "other": normal(2, 32, 16)}
    return editable(graph_text(TWO_STEPS, weights))


def known(**rows: Weight) -> Ranges:
    return Ranges({"x": -3, "act": 0, "first": -9}, {"x": 3, "act": 9, "first": 9}, "tests", rows=rows)


def drawn(seed: int, count: int) -> InMemory:
    return InMemory(normal(seed, count, 32, scale=1.0).astype(ml_dtypes.bfloat16))


def codes_of(model: Model) -> dict[str, Weight]:
    nodes = [node for node in model.graph.nodes if node.op == "DequantizeLinear"]
    weights = {node.inputs[0].name: node.inputs[0] for node in nodes if node.inputs[0].name.endswith("w.fp8")}
    weights |= {node.inputs[0].name: node.inputs[0] for node in nodes if "other" in node.inputs[0].name}
    return {name: weight_of(constant) for name, constant in weights.items()}


@pytest.mark.parametrize("rounding", ["compensated", "nearest"])
def test_rows_are_asked_for_of_every_linear_that_reads_a_weight(rounding: str) -> None:
    asked: list[Wanted] = []

    def calibrate(model: Model, wanted: Wanted) -> Ranges:
        asked.append(wanted)
        return known(x=drawn(3, 8), act=drawn(4, 8))

    steps = parse(f"lower_precision,quantize_linears{{rounding={rounding}}}", PRESETS)
    run(two_steps(), steps, calibrate=calibrate)
    expected = {"x": ROWS // 2, "act": ROWS} if rounding == "compensated" else {}
    assert asked[0].rows == expected


def test_a_shared_weight_is_rounded_on_the_rows_of_all_its_linears() -> None:
    model, rows = two_steps(), {"x": drawn(3, 8), "act": drawn(4, 8)}
    result = run_pass(model, "quantize_linears", known(**rows), rounding="compensated")
    shared, other = codes_of(model)["w.fp8"], codes_of(model)["other.fp8"]
    assert isinstance(shared, Compensated)
    assert isinstance(other, Compensated)
    assert {id(each) for each in shared.rows} == {id(each) for each in rows.values()}
    assert [id(each) for each in other.rows] == [id(rows["act"])]
    assert result.notes == ()


def test_rows_are_found_behind_casts_to_the_working_precision() -> None:
    model = two_steps()
    steps = parse("lower_precision,quantize_linears{rounding=compensated}", PRESETS)
    run(model, steps, calibrate=lambda _, wanted: known(x=drawn(3, 8), act=drawn(4, 8)))
    assert len(codes_of(model)["w.fp8"].rows) == 2  # type: ignore[attr-defined]


def test_weights_without_rows_are_rounded_to_the_nearest_and_that_is_said() -> None:
    model = two_steps()
    result = run_pass(model, "quantize_linears", known(x=drawn(3, 8)), rounding="compensated")
    assert isinstance(codes_of(model)["w.fp8"], Compensated)
    assert isinstance(codes_of(model)["other.fp8"], Quantized)
    assert result.notes == ("no rows were sampled for 1 of 2 weights, which are rounded to the nearest",)
    model = two_steps()
    result = run_pass(model, "quantize_linears", known(x=drawn(3, 8)))
    assert {type(weight) for weight in codes_of(model).values()} == {Quantized}
    assert result.notes == ()


def test_products_of_sampled_rows_come_closer() -> None:
    rows = drawn(3, 64)
    weight = normal(1, 32, 32)
    found = {}
    for rounding in ("compensated", "nearest"):
        model = two_steps()
        run_pass(model, "quantize_linears", known(x=rows, act=rows), rounding=rounding)
        codes = codes_of(model)["w.fp8"]
        scale = np.float32(codes.scale.reshape(()) if rounding == "nearest" else codes.scale.load())  # type: ignore[attr-defined]
        found[rounding] = np.linalg.norm(
            rows.load().astype(np.float32) @ (weight - codes.load().astype(np.float32) * scale)
        )
    assert found["compensated"] < 0.9 * found["nearest"]


def test_nvfp4_weights_are_rounded_on_rows_too() -> None:
    rows, weight, found = drawn(3, 64), normal(1, 32, 32), {}
    for rounding in ("compensated", "nearest"):
        model = editable(graph_text(BATCHED, {"w": weight}))
        run_pass(model, "quantize_linears", known(x=rows), rounding=rounding, nvfp4="*")
        (turned,) = [node.outputs[0] for node in model.graph.nodes if node.op == "Transpose"]
        keep_between(model.graph, [], [turned])
        stored = outputs_of(model, {})[turned.name]
        found[rounding] = np.linalg.norm(rows.load().astype(np.float32) @ (weight - stored))
    assert found["compensated"] < 0.9 * found["nearest"]


BATCHED = """
    linear (float[1,4,32] x) => (float[1,4,32] y) {
      y = MatMul(x, w)
    }"""


@pytest.mark.parametrize(("options", "limit"), [({}, 0.005), ({"nvfp4": "*"}, 0.02)])
def test_two_terms_leave_the_error_of_the_weight_alone(options: dict[str, str], limit: float) -> None:
    """The weight is exact in either format, so that all of the error is that of the activation."""
    weight = np.where(normal(1, 32, 32) > 0, 1, -1).astype(np.float32)
    x = normal(5, 1, 4, 32, scale=1.0)
    errors = {}
    for two_terms in ("", "y.*"):
        model = editable(graph_text(BATCHED, {"w": weight}))
        run_pass(model, "quantize_linears", known(), two_terms=two_terms, **options)
        result = outputs_of(model, {"x": x})["y"]
        errors[two_terms] = np.linalg.norm(result - x @ weight) / np.linalg.norm(x @ weight)
    assert errors["y.*"] < limit
    assert errors["y.*"] < errors[""] / 5


def test_linears_that_share_an_activation_share_its_terms() -> None:
    text = """
        projections (float[4,32] x) => (float[4,32] q, float[4,16] k) {
          q = MatMul(x, wq)
          k = MatMul(x, wk)
        }"""
    model = editable(graph_text(text, {"wq": normal(1, 32, 32), "wk": normal(2, 32, 16)}))
    run_pass(model, "quantize_linears", known(), two_terms="*")
    operators = [node.op for node in model.graph.nodes]
    assert (operators.count("Concat"), operators.count("MatMul"), operators.count("Split")) == (1, 2, 2)
    assert run_pass(model, "quantize_linears", known(), two_terms="*").changes == ()


def test_a_gemm_with_a_bias_is_not_given_two_terms() -> None:
    text = """
        linear (float[4,32] x) => (float[4,32] y) {
          y = Gemm(x, w, b)
        }"""
    model = editable(graph_text(text, {"w": normal(1, 32, 32), "b": normal(2, 32)}))
    (skip,) = run_pass(model, "quantize_linears", known(), two_terms="w").skips
    assert skip.reason == "'y.Gemm' is a Gemm that would add its bias to both terms"


def test_a_pattern_may_name_a_place() -> None:
    text = """
        tower (float[1,3,32,32] image) => (float[4,32] y) {
          patches = Conv<strides = [16, 16]>(image, filter)
          rows = Reshape(patches, shape)
          first = MatMul(rows, w)
          y = MatMul(first, w)
        }"""
    weights = {"filter": normal(3, 32, 3, 16, 16), "shape": np.array([4, 32]), "w": normal(1, 32, 32)}
    model = editable(graph_text(text, weights))
    ranges = Ranges({"rows": -3, "first": -9}, {"rows": 3, "first": 9}, "tests")
    result = run_pass(model, "quantize_linears", ranges, keep="vision.linear")
    assert [skip.reason for skip in result.skips] == ["an option keeps it"] * 2


def test_weights_in_fp4_beside_float16_activations_need_no_samples() -> None:
    model = editable(graph_text(BATCHED, {"w": normal(1, 32, 32)}))
    (result,) = run(model, parse("quantize_linears{llm=nvfp4_w4a16,nvfp4=*}", PRESETS))
    assert result.changes == ("y.MatMul",)


def test_rows_are_sampled_where_no_range_is_asked_for() -> None:
    asked: list[Wanted] = []

    def calibrate(_: Model, wanted: Wanted) -> Ranges:
        asked.append(wanted)
        return known(x=drawn(3, 8))

    steps = parse("quantize_linears{llm=nvfp4_w4a16,nvfp4=*,rounding=compensated}", PRESETS)
    (result,) = run(editable(graph_text(BATCHED, {"w": normal(1, 32, 32)})), steps, calibrate=calibrate)
    assert (asked[0].tensors, asked[0].rows) == ((), {"x": ROWS})
    assert result.notes == ()
