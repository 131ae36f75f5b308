"""What passes must leave alone, and that they never leave half a rewrite behind."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from every_case import CASES, GoldenCase
from pass_graphs import (
    editable,
    fitted,
    graph_text,
    make_output,
    node_of,
    normal,
    outputs_of,
    ranges_of,
    relative_error,
    run_pass,
    seeded_inputs,
    text_of,
)

from pi05c.graph.dtypes import name_of, to_onnx
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, scopes
from pi05c.graph.ranges import Ranges
from pi05c.graph.weights import array_of
from pi05c.passes import REGISTRY

NAN, INF = float("nan"), float("inf")


def quantized_on_one_side(model: Model) -> list[str]:
    """MatMuls and Gemms of which one factor comes from a DequantizeLinear and the other does not."""
    found = []
    for scope in scopes(model.graph):
        for node in scope.nodes:
            if node.op in ("MatMul", "Gemm"):
                makers = [producer(tensor) for tensor in node.inputs[:2]]
                sides = {maker is not None and maker.op == "DequantizeLinear" for maker in makers}
                if len(sides) == 2:
                    found.append(node.name)
    return found


def quantizers(model: Model) -> list[gs.Node]:
    return [node for scope in scopes(model.graph) for node in scope.nodes if node.op == "QuantizeLinear"]


# Another consumer, or an output


def _inner_tensors(proto: onnx.ModelProto) -> list[str]:
    """What nodes of the main graph make, outputs excepted; an output must have a type, so what has none is left out."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    typed = {value.name for value in inferred.value_info if value.type.tensor_type.HasField("shape")}
    return [name for node in proto.graph.node for name in node.output if name in typed]


def _variants() -> Iterator[tuple[GoldenCase, str]]:
    for case in CASES:
        for name in _inner_tensors(case.model()):
            yield case, name


def _second_reader(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The same model with a node that reads `name`, and its result as an output."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.node.append(onnx.helper.make_node("Identity", [name], ["second"], "second.Identity"))
    copy.graph.node.append(
        onnx.helper.make_node("Reshape", ["second", "second.shape"], ["third"], "third.Reshape")
    )
    copy.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "second.shape"))
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(copy).graph.value_info}
    copy.graph.output.append(inferred["third"])
    return copy


@pytest.mark.parametrize("extend", [make_output, _second_reader], ids=["output", "consumer"])
@pytest.mark.parametrize(
    ("case", "tensor"), list(_variants()), ids=lambda value: value if isinstance(value, str) else value.name
)
def test_another_reader_of_an_inner_tensor(case: GoldenCase, tensor: str, extend) -> None:  # type: ignore[no-untyped-def]
    """Whatever the pass then does or leaves, every output keeps its value and no product is quantized by half."""
    proto = extend(case.model(), tensor)
    before, after = editable(proto), editable(proto)
    ranges = None if case.ranges is None else ranges_of(case.ranges)
    result = run_pass(after, case.graph_pass, ranges, **case.options)
    if not result.changes:
        assert text_of(after) == text_of(before)
    assert quantized_on_one_side(after) == []
    drawn = {name: pair for name, pair in (case.ranges or {}).items() if -INF < pair[0] < pair[1] < INF}
    inputs = fitted(after, seeded_inputs(before, 7, drawn))
    limit = 1e-6 if REGISTRY[case.graph_pass].exact else 1.5 * case.limit
    assert relative_error(outputs_of(after, inputs), outputs_of(before, inputs)) <= limit
    once = text_of(after)
    assert run_pass(after, case.graph_pass, ranges, **case.options).changes == ()
    assert text_of(after) == once


# Attention: all of Q, K, V and the probabilities, or none


ATTENTION = """
    g (float16[1,2,4,16] q, float16[1,2,16,6] k, float16[1,2,6,16] v, float16[1,1,4,6] mask, float16[1,2,4,6] head_mask)
      => (float16[1,2,4,16] y) <float16 scale = {0.25}, float16 unit = {0.01}> {
      logits = MatMul(QUERY, KEY)
      scaled = Mul(logits, scale)
      masked = Add(scaled, MASK)
      probs = Softmax<axis = -1>(masked)
      y = MatMul(probs, VALUE)
    }"""
KNOWN = {"q": (-2.0, 2.0), "k": (-2.0, 2.0), "v": (-3.0, 3.0)}


def _attention(q: str = "q", k: str = "k", v: str = "v", mask: str = "mask") -> onnx.ModelProto:
    text = ATTENTION.replace("QUERY", q).replace("KEY", k).replace("VALUE", v).replace("MASK", mask)
    constants = {
        "ck": normal(1, 1, 2, 16, 6, dtype=np.float16),
        "cv": normal(2, 1, 2, 6, 16, dtype=np.float16),
        "cq": normal(3, 1, 2, 4, 16, dtype=np.float16),
    }
    return graph_text(text, {name: value for name, value in constants.items() if name in (q, k, v)})


@pytest.mark.parametrize(
    ("proto", "ranges", "reason"),
    [
        (_attention(), {key: KNOWN[key] for key in "kv"}, "'q' has no usable range"),
        (_attention(), {key: KNOWN[key] for key in "qv"}, "'k' has no usable range"),
        (_attention(), {key: KNOWN[key] for key in "qk"}, "'v' has no usable range"),
        (_attention(), {**KNOWN, "k": (-INF, 2.0)}, "'k' has no usable range"),
        (_attention(), {**KNOWN, "k": (NAN, NAN)}, "'k' has no usable range"),
        (_attention(), {**KNOWN, "v": (1.0, NAN)}, "'v' has no usable range"),
        (_attention(), {**KNOWN, "v": (0.0, 0.0)}, "'v' has no usable range"),
        (_attention(), {**KNOWN, "q": (-1e-8, 1e-8)}, "'q' has no usable range"),
        (_attention(), {**KNOWN, "v": (-1e8, 1e8)}, "'v' has no usable range"),
        (_attention(k="ck"), KNOWN, "constant"),
        (_attention(v="cv"), KNOWN, "constant"),
        (_attention(q="cq"), KNOWN, "constant"),
    ],
    ids=[
        "no range of q",
        "no range of k",
        "no range of v",
        "k is infinite",
        "k is not a number",
        "v's maximum is not a number",
        "v is zero",
        "q's scale underflows",
        "v's scale overflows",
        "constant k",
        "constant v",
        "constant q",
    ],
)
def test_attention_that_cannot_be_quantized(
    proto: onnx.ModelProto, ranges: dict[str, tuple[float, float]], reason: str
) -> None:
    model = editable(proto)
    before = text_of(model)
    result = run_pass(model, "insert_attention_qdq", ranges_of(ranges))
    assert quantizers(model) == []
    assert result.changes == ()
    assert [skip for skip in result.skips if reason in skip.reason], result.skips
    assert text_of(model) == before


@pytest.mark.parametrize("quantized", ["q", "k", "v"])
def test_attention_that_is_quantized_by_half(quantized: str) -> None:
    proto = _attention(**{quantized: f"{quantized}_dq"})
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int8), "zero"))
    for node in (
        onnx.helper.make_node("DequantizeLinear", ["codes", "unit", "zero"], [f"{quantized}_dq"], "dq"),
        onnx.helper.make_node("QuantizeLinear", [quantized, "unit", "zero"], ["codes"], "q"),
    ):
        proto.graph.node.insert(0, node)
    model = editable(proto)
    before = text_of(model)
    result = run_pass(model, "insert_attention_qdq", ranges_of(KNOWN))
    assert text_of(model) == before
    assert "some of its factors are quantized already" in result.skips[0].reason


def test_mask_per_head_is_kept() -> None:
    proto = _attention(mask="head_mask")
    model = editable(proto)
    assert run_pass(model, "insert_attention_qdq", ranges_of(KNOWN)).changes == ("probs.Softmax",)
    assert node_of(model, "masked").inputs[1].name == "head_mask"
    inputs = seeded_inputs(proto, within=KNOWN)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 0.08


GROUPED = """
    g (float[1,4,3,8] q, float[1,2,5,8] k, float[1,2,5,8] v, float[1,4,3,5] head_mask) => (float[1,4,3,8] y)
      <int64[1] two = {2}, int64[5] wide = {1, 2, 2, 5, 8}, int64[4] heads = {1, 4, 5, 8}> {
      k1 = Unsqueeze(k, two)
      k2 = Expand(k1, wide)
      k3 = Reshape(k2, heads)
      v1 = Unsqueeze(v, two)
      v2 = Expand(v1, wide)
      v3 = Reshape(v2, heads)
      kt = Transpose<perm = [0, 1, 3, 2]>(k3)
      logits = MatMul(q, kt)
      masked = Add(logits, head_mask)
      probs = Softmax<axis = -1>(masked)
      y = MatMul(probs, v3)
    }"""


def test_heads_with_masks_of_their_own_can_share_keys() -> None:
    proto = graph_text(GROUPED)
    model = editable(proto)
    assert run_pass(model, "fold_gqa").changes == ("probs.Softmax",)
    assert not [node for node in model.graph.nodes if node.op == "Expand"]
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-6


# Ranges and scales


LINEAR = "g (float16[4,32] x) => (float16[4,16] y) { y = MatMul(x, w) }"


def _linear(weight: np.ndarray) -> Model:
    return editable(graph_text(LINEAR, {"w": weight}))


@pytest.mark.parametrize(
    "pair",
    [(-INF, INF), (NAN, NAN), (-1.0, NAN), (NAN, 1.0), (0.0, 0.0), (-1e-8, 1e-8), (-4e7, 4e7)],
    ids=["infinite", "nan", "nan above", "nan below", "zero", "scale underflows", "scale overflows"],
)
def test_activation_without_a_scale(pair: tuple[float, float]) -> None:
    model = _linear(normal(1, 32, 16, dtype=np.float16))
    before = text_of(model)
    result = run_pass(model, "quantize_linears", ranges_of({"x": pair}))
    assert text_of(model) == before
    assert [skip.where for skip in result.skips] == ["y.MatMul"]
    assert "'x'" in result.skips[0].reason


@pytest.mark.parametrize("value", [0.0, INF, NAN], ids=["zero", "infinite", "nan"])
def test_weight_without_a_scale(value: float) -> None:
    weight = normal(1, 32, 16, dtype=np.float16)
    weight[...] = value if value == 0 else weight
    weight[3, 5] = value
    model = _linear(weight)
    before = text_of(model)
    result = run_pass(model, "quantize_linears", ranges_of({"x": (-1, 1)}))
    assert text_of(model) == before
    assert "'w'" in result.skips[0].reason


def test_range_that_was_not_measured() -> None:
    model = _linear(normal(1, 32, 16, dtype=np.float16))
    result = run_pass(model, "quantize_linears", ranges_of({}))
    assert quantizers(model) == []
    assert "was not measured" in result.skips[0].reason


@pytest.mark.parametrize("pair", [(2.0, 2.0), (-2.0, -2.0)])
def test_constant_activation_has_a_scale(pair: tuple[float, float]) -> None:
    """A tensor that calibration saw with one value has a range like any other."""
    model = _linear(normal(1, 32, 16, dtype=np.float16))
    assert run_pass(model, "quantize_linears", ranges_of({"x": pair})).changes == ("y.MatMul",)
    scale = quantizers(model)[0].inputs[1]._values.load()
    assert scale == np.float16(2**-7)  # the first power of two from which on 2 fits 448


@pytest.mark.parametrize("amax", [0.01, 1e-4])
def test_codes_follow_the_scale_as_stored(amax: float) -> None:
    """A float16 scale below 2^-14 is coarse; codes made from it, not from the exact one, lose nothing more."""
    weight = normal(1, 32, 16, scale=1.0)
    weight = (weight / np.abs(weight).max() * amax).astype(np.float16)
    proto = graph_text(LINEAR, {"w": weight})
    model = editable(proto)
    run_pass(model, "quantize_linears", ranges_of({"x": (-4, 4)}))
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 0.06


SCALAR_PRODUCT = """
    g (float[4,8] x) => (float[4,8] y) {
      up = Mul(x, factor)
      small = Relu(up)
      y = Mul(small, back)
    }"""


@pytest.mark.parametrize(
    ("pair", "low"),
    [
        ((-100.0, 65504.0), True),
        ((-65520.0, 0.0), False),
        ((-INF, INF), False),
        ((NAN, NAN), False),
        ((1.0, NAN), False),
        ((-1e-5, 1e-5), False),
        ((0.0, 0.0), True),
    ],
)
def test_what_float16_cannot_hold_stays(pair: tuple[float, float], low: bool) -> None:
    weights = {"factor": np.float32(2), "back": np.float32(0.5)}
    model = editable(graph_text(SCALAR_PRODUCT, weights))
    result = run_pass(model, "lower_precision", ranges_of({"x": (-1, 1), "up": pair, "y": (-1, 1)}))
    assert (node_of(model, "up").outputs[0].dtype == np.float16) is low
    reasons = {skip.where: skip.reason for skip in result.skips}
    assert ("up.Mul" in reasons) is not low
    assert low or "'up'" in reasons["up.Mul"]


@pytest.mark.parametrize(("factor", "low"), [(1e5, False), (-2.4e38, False), (1e-6, False), (100.0, True)])
def test_constants_guard_without_ranges(factor: float, low: bool) -> None:
    model = editable(graph_text(SCALAR_PRODUCT, {"factor": np.float32(factor), "back": np.float32(1)}))
    result = run_pass(model, "lower_precision")
    assert (node_of(model, "up").op, node_of(model, "up").outputs[0].dtype == np.float16) == ("Mul", low)
    assert any("no ranges" in note for note in result.notes)


@pytest.mark.parametrize("headroom", ["1.0", "4.0"])
def test_headroom(headroom: str) -> None:
    model = editable(graph_text(SCALAR_PRODUCT, {"factor": np.float32(2), "back": np.float32(1)}))
    ranges = ranges_of({"x": (-1, 1), "up": (0, 30000), "y": (0, 1)})
    run_pass(model, "lower_precision", ranges, headroom=headroom)
    assert (node_of(model, "up").outputs[0].dtype == np.float32) is (headroom == "4.0")


def test_fully_masked_row_stays_a_number() -> None:
    """-2.38e38 in float16 is -inf, and softmax of a row of -inf is not a number."""
    text = """
    g (float[1,4,32] q, float[1,32,6] k, bool[1,1,6] valid) => (float[1,4,6] probs)
      <float zero = {0}, float lowest = {-2.3819763e38}> {
      logits = MatMul(q, k)
      mask = Where(valid, zero, lowest)
      masked = Add(logits, mask)
      probs = Softmax<axis = -1>(masked)
    }"""
    proto = graph_text(text)
    model = editable(proto)
    run_pass(model, "lower_precision")
    inputs = {**seeded_inputs(proto), "valid": np.zeros((1, 1, 6), bool)}
    np.testing.assert_allclose(outputs_of(model, inputs)["probs"], 1 / 6, atol=1e-3)


# Casts, fixed inputs and branches in the region that becomes float16


@pytest.mark.parametrize(
    ("to", "opset", "low"), [("bfloat16", 21, False), ("bfloat16", 22, True), ("float16", 21, True)]
)
def test_operators_without_the_type_stay(to: str, opset: int, low: bool) -> None:
    """Conv and Sin know bfloat16 from opset 22 on."""
    text = """
    g (float[1,3,8,8] image) => (float[1,4,6,6] y) {
      conv = Conv(image, w)
      wave = Sin(conv)
      y = Mul(conv, wave)
    }"""
    proto = graph_text(text, {"w": normal(1, 4, 3, 3, 3)}, opset=opset)
    model = editable(proto)
    result = run_pass(model, "lower_precision", to=to)
    for name in ("conv", "wave"):
        assert (name_of(node_of(model, name).outputs[0].dtype) == to) is low
    assert [skip.where for skip in result.skips if to in skip.reason] == (
        [] if low else ["conv.Conv", "wave.Sin"]
    )
    inputs = seeded_inputs(proto)
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 0.02


def test_resize_keeps_float32_scales_that_are_computed() -> None:
    text = """
    g (float[1,1,4,4] x, float[4] ratio) => (float[1,1,8,8] y) <float two = {2}> {
      scales = Mul(ratio, two)
      a = Relu(x)
      y = Resize<mode = "nearest">(a, , scales)
    }"""
    proto = graph_text(text)
    model = editable(proto)
    run_pass(
        model, "lower_precision", ranges_of({"x": (-3, 3), "ratio": (0, 1), "scales": (0, 2), "y": (-3, 3)})
    )
    resize = next(node for node in model.graph.nodes if node.op == "Resize")
    assert resize.inputs[0].dtype == np.float16
    assert resize.inputs[2].dtype == np.float32
    inputs = {"x": normal(1, 1, 1, 4, 4), "ratio": np.array([0.5, 0.5, 1, 1], np.float32)}
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-3


@pytest.mark.parametrize("condition", [True, False])
def test_both_branches_of_an_if(condition: bool) -> None:
    (case,) = (case for case in CASES if case.name == "if_branch")
    proto = case.model()
    model = editable(proto)
    assert case.ranges is not None
    run_pass(model, case.graph_pass, ranges_of(case.ranges))
    for scope in scopes(model.graph):
        for node in scope.nodes:
            if node.op in ("Gemm", "Relu"):
                floats = {np.dtype(tensor.dtype) for tensor in (*node.inputs, *node.outputs)}
                assert floats == {np.dtype(np.float16)}, node.name
    inputs = {**seeded_inputs(proto), "c": np.array(condition)}
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 1e-3


def test_casts_agree_with_what_they_make() -> None:
    (case,) = (case for case in CASES if case.name == "existing_cast")
    model = editable(case.model())
    assert case.ranges is not None
    run_pass(model, case.graph_pass, ranges_of(case.ranges))
    casts = [node for node in model.graph.nodes if node.op == "Cast"]
    for node in casts:
        assert onnx.helper.tensor_dtype_to_np_dtype(node.attrs["to"]) == np.dtype(node.outputs[0].dtype)
        assert np.dtype(node.inputs[0].dtype) != np.dtype(node.outputs[0].dtype)


@pytest.mark.parametrize(
    ("number", "use", "expected"),
    [
        (16, "Add(cast, x)", [1, 2, 3.5, 101]),
        (17, "DequantizeLinear(cast, scale)", [1, 2, 3.5, 104]),
        (2, "DequantizeLinear(cast, scale)", [1, 2, 3, 101]),
    ],
    ids=["bfloat16", "float8e4m3fn", "uint8"],
)
def test_folded_constants_keep_a_type_that_numpy_lacks(number: int, use: str, expected: list[float]) -> None:
    """onnxruntime's arrays know no bfloat16, and take FP8 for unsigned integers."""
    text = f"""
    g (bfloat16[4] x, float scale) => (float[4] y) <float[4] a = {{0, 1, 2.5, 100}}, float one = {{1}}> {{
      sum = Add(a, one)
      cast = Cast<to = {number}>(sum)
      used = {use}
      wide = Cast<to = 1>(used)
      y = Neg(wide)
    }}"""
    model = editable(graph_text(text))
    run_pass(model, "canonicalize")
    folded = node_of(model, "used").inputs[0]
    assert isinstance(folded, gs.Constant)
    assert to_onnx(folded.dtype) == number
    assert array_of(folded).astype(np.float32).tolist() == expected


def test_what_onnxruntime_cannot_compute_stays() -> None:
    """It has no bfloat16 Add, which is no reason to fail, nor to leave what it can compute."""
    text = """
    g (float[4] x) => (float[4] y) <float[4] a = {0, 1, 2, 3}, float one = {1}> {
      low = Cast<to = 16>(a)
      odd = Add(low, low)
      wide = Cast<to = 1>(odd)
      sum = Add(a, one)
      both = Mul(x, sum)
      y = Add(both, wide)
    }"""
    model = editable(graph_text(text))
    run_pass(model, "canonicalize")
    assert isinstance(node_of(model, "both").inputs[1], gs.Constant)
    inputs = {"x": np.array([1, 2, 3, 4], np.float32)}
    assert outputs_of(model, inputs)["y"].tolist() == [1, 6, 13, 22]


# Quantizers whose scale 16 bits cannot hold


QUANTIZED = """
    g (float[4,32] x) => (float[4,16] y) <float x_scale = {0.01}, int8 zero = {0}, int8 weight_zero = {0}> {
      codes = QuantizeLinear(x, x_scale, zero)
      factor = DequantizeLinear(codes, x_scale, zero)
      weight = DequantizeLinear<axis = 1>(w, w_scale)
      product = MatMul(factor, weight)
      y = Relu(product)
    }"""


@pytest.mark.parametrize(("smallest", "low"), [(1e-3, True), (1e-9, False)], ids=["fits", "underflows"])
def test_quantized_product_has_one_precision(smallest: float, low: bool) -> None:
    scale = np.linspace(smallest, 0.02, 16).astype(np.float32)
    codes = np.random.default_rng(1).integers(-127, 128, (32, 16)).astype(np.int8)
    proto = graph_text(QUANTIZED, {"w": codes, "w_scale": scale})
    model = editable(proto)
    result = run_pass(
        model, "lower_precision", ranges_of({"x": (-1.2, 1.2), "product": (-40, 40), "y": (0, 40)})
    )
    product = node_of(model, "product")
    assert [tensor.inputs[0].op for tensor in product.inputs] == ["DequantizeLinear"] * 2
    assert {np.dtype(tensor.dtype) for tensor in product.inputs} == {
        np.dtype(np.float16 if low else np.float32)
    }
    assert any("scale" in skip.reason for skip in result.skips) is not low
    inputs = seeded_inputs(proto, within={"x": (-1.2, 1.2)})
    assert relative_error(outputs_of(model, inputs), outputs_of(proto, inputs)) < 5e-3


@pytest.mark.parametrize("pair", [(NAN, 1.0), (1.0, NAN), (NAN, NAN)])
def test_a_range_with_nan_is_no_range(pair: tuple[float, float]) -> None:
    ranges = Ranges({"x": pair[0]}, {"x": pair[1]})
    assert math.isnan(ranges.amax(gs.Variable("x", np.float32, [1])) or 0)


@pytest.mark.parametrize(("scale", "amax"), [(0.01, 1.27), (3.0, 381.0)])
def test_range_of_a_weight_that_is_stored_quantized(scale: float, amax: float) -> None:
    """It is that of what the codes stand for, not of the codes."""
    codes = np.array([[-127, 5], [0, 100]], np.int8)
    text = f"g (float[4,2] x) => (float[4,2] y) <float scale = {{{scale}}}> {{ w = DequantizeLinear(codes, scale) y = MatMul(x, w) }}"
    model = editable(graph_text(text.replace(" y = ", "\n y = "), {"codes": codes}))
    assert ranges_of({}).amax(node_of(model, "w").outputs[0]) == pytest.approx(amax)


def test_a_node_that_makes_an_initializer_is_refused() -> None:
    text = "g (float[4] x) => (float[4] y) { a = Relu(x)\n y = Neg(a) }"
    with pytest.raises(Pi05cError, match="'a' is produced twice"):
        editable(graph_text(text, {"a": np.ones(4, np.float32)}))
