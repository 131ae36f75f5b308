"""Bugs that people reported elsewhere, each on the smallest graph that shows it; `README.md` lists them all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import pytest
from kernels import skip_without_kernels
from onnx import TensorProto, helper, numpy_helper

from pi05c.backend.onnxruntime import OnnxRuntimeRunner
from pi05c.graph.check import problems
from pi05c.graph.domains import DYNAMIC
from pi05c.graph.edit import producer
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, model_from_proto, save
from pi05c.graph.nvfp4 import BLOCK, BlockCodes, BlockScales
from pi05c.graph.ranges import Ranges
from pi05c.graph.weights import InMemory, array_of
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import StepResult, parse, run

Array = npt.NDArray[Any]

HERE = Path(__file__).parent
FLOAT8 = ml_dtypes.float8_e4m3fn
FLOAT4 = ml_dtypes.float4_e2m1fn


def proto(text: str, weights: Mapping[str, Array] | None = None, *, opset: int = 21) -> onnx.ModelProto:
    """A model of ONNX's text form; nodes are called after their operator and first output."""
    made = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": {opset}, "trt": 1]>\n{text}')
    for name, array in (weights or {}).items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    for node in made.graph.node:
        node.name = f"{node.output[0]}.{node.op_type}"
    return made


def graph(text: str, weights: Mapping[str, Array] | None = None, *, opset: int = 21) -> Model:
    return model_from_proto(proto(text, weights, opset=opset))


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return (np.random.default_rng(seed).standard_normal(shape) * shape[-1] ** -0.5).astype(dtype)


def rewrite(model: Model, passes: str, amax: float = 4.0) -> list[StepResult]:
    """Run passes; every tensor has the same range."""

    def ranges(_: Model, wanted: Any) -> Ranges:
        return Ranges(dict.fromkeys(wanted.tensors, -amax), dict.fromkeys(wanted.tensors, amax))

    results = run(model, parse(passes, PRESETS), calibrate=ranges)
    assert problems(model) == []
    return results


def outputs(model: Model | onnx.ModelProto, folder: Path, **inputs: Array) -> list[Array]:
    """What onnxruntime makes of a model, as it stands in a file."""
    path = folder / "model.onnx"
    if isinstance(model, Model):
        save(model, path)
    else:
        onnx.save(model, path)
    skip_without_kernels(onnx.load(path))
    return list(OnnxRuntimeRunner(path, threads=1).run(inputs).values())


def error(actual: Array, expected: Array) -> float:
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(actual.astype(np.float64) - wide) / np.linalg.norm(wide))


# 8: Model-Optimizer PR 1289

CAST_AROUND_QDQ = """
    g (float16[4,32] x) => (float16[4,16] y) <float scale = {0.03125}, int8 zero = {0}> {
      wide = Cast<to = 1>(x)
      codes = QuantizeLinear(wide, scale, zero)
      back = DequantizeLinear(codes, scale, zero)
      narrow = Cast<to = 10>(back)
      y = MatMul(narrow, w)
    }"""


@pytest.mark.parametrize("opset", [17, 18, 19, 21, 23])
@pytest.mark.parametrize("passes", ["exact", "fp16", "default", "nvfp4"])
def test_8_casts_around_quantizers(opset: int, passes: str, tmp_path: Path) -> None:
    """Below opset 19 a quantizer takes float32 alone: the Casts stay, or the opset is raised with them gone."""
    before = proto(CAST_AROUND_QDQ, {"w": normal(1, 32, 16, dtype=np.float16)}, opset=opset)
    x = normal(2, 4, 32, dtype=np.float16)
    (expected,) = outputs(before, tmp_path, x=x)
    model = model_from_proto(before)
    rewrite(model, passes)
    assert error(outputs(model, tmp_path, x=x)[0], expected) < (1e-3 if passes in ("exact", "fp16") else 0.1)


# 10: Model-Optimizer's FP8 exporter tests


@pytest.mark.parametrize("passes", ["exact", "fp16", "default", "nvfp4"])
def test_10_a_dequantizer_with_another_reader_stays_quantized(passes: str, tmp_path: Path) -> None:
    text = """
        g (float[4,32] x) => (float[4,16] y, float[32,16] z) <float scale = {0.03125}> {
          wide = DequantizeLinear(codes, scale)
          y = MatMul(x, wide)
          z = Relu(wide)
        }"""
    codes = np.random.default_rng(1).integers(-127, 128, (32, 16)).astype(np.int8)
    model = graph(text, {"codes": codes})
    rewrite(model, passes)
    (dequantize,) = [
        n for n in model.graph.nodes if n.op == "DequantizeLinear" and n.inputs[0].name == "codes"
    ]
    np.testing.assert_array_equal(array_of(dequantize.inputs[0]), codes)
    x = normal(2, 4, 32)
    y, z = outputs(model, tmp_path, x=x)
    np.testing.assert_allclose(z, np.maximum(codes * np.float32(0.03125), 0), rtol=1e-3)
    assert error(y, x @ (codes * np.float32(0.03125))) < 0.05


# 12: Model-Optimizer PR 1985


def test_12_two_fp4_products_of_one_activation_quantize_it_once() -> None:
    text = """
        g (float16[1,4,32] x) => (float16[1,4,32] y) {
          gate = MatMul(x, mlp_gate)
          up = MatMul(x, mlp_up)
          y = Mul(gate, up)
        }"""
    weights = {name: normal(i, 32, 32, dtype=np.float16) for i, name in enumerate(("mlp_gate", "mlp_up"))}
    model = graph(text, weights, opset=23)
    rewrite(model, "quantize_linears{nvfp4=*}")
    names = [node.name for node in model.graph.nodes]
    assert [node.op for node in model.graph.nodes].count(DYNAMIC) == 1
    assert len(names) == len(set(names))
    places = {id(node): place for place, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        for tensor in node.inputs:
            above = producer(tensor)
            assert above is None or places[id(above)] < places[id(node)]


# 13: Model-Optimizer PR 2243


def test_13_codes_follow_the_scale_that_is_stored() -> None:
    """amax / 6 lies between two E4M3 numbers: codes of the exact scale would differ from those of the stored one."""
    values = np.linspace(-6.4, 6.4, 4 * BLOCK, dtype=np.float32).reshape(4, BLOCK)
    values[:, 0] = 6 * (
        1 + np.array([1, 1.01, 3, 3.01], np.float32) / 16
    )  # 1, 1.125 and 1.25 are E4M3 numbers
    one = np.float32(1)
    scales = BlockScales(InMemory(values), one)
    stored = scales.load().astype(np.float32)
    assert stored.reshape(-1).tolist() == [1, 1.125, 1.25, 1.25]
    codes = BlockCodes(InMemory(values), scales, one).load()
    np.testing.assert_array_equal(codes, (values / stored).clip(-6, 6).astype(FLOAT4))
    exact = np.abs(values).max(axis=1, keepdims=True) / 6
    assert (codes != (values / exact).clip(-6, 6).astype(FLOAT4)).any()


# 14: Model-Optimizer #1424

FP4_TEXT = """
    g (float[4,16] x) => (float[4,8] y) <float scale = {0.5}> {
      wide = DequantizeLinear(CODES, scale)
      y = MatMul(x, wide)
    }"""


@pytest.mark.parametrize("where", ["a Constant node", "a Constant node in a file", "behind a Reshape"])
def test_14_an_fp4_weight_in_other_places(where: str, tmp_path: Path) -> None:
    codes = normal(1, 16, 8).astype(FLOAT4)
    x = normal(2, 4, 16)
    if where == "behind a Reshape":
        text = FP4_TEXT.replace("wide =", "codes = Reshape(flat, shape)\n wide =").replace("CODES", "codes")
        before = proto(text, {"flat": codes.reshape(-1), "shape": np.array([16, 8])}, opset=23)
    else:
        before = proto(FP4_TEXT.replace("CODES", "codes"), opset=23)
        constant = helper.make_node(
            "Constant", [], ["codes"], "codes.Constant", value=numpy_helper.from_array(codes)
        )
        before.graph.node.insert(0, constant)
    expected = x @ (codes.astype(np.float32) * np.float32(0.5))
    if where != "a Constant node in a file":
        model = model_from_proto(before)
        rewrite(model, "nvfp4")
        assert error(outputs(model, tmp_path, x=x)[0], expected) < 0.05
    else:
        np.testing.assert_allclose(outputs(before, tmp_path, x=x)[0], expected, rtol=1e-5)


# 15: Model-Optimizer PR 2415


@pytest.mark.parametrize("passes", ["exact", "fp16", "default", "nvfp4"])
def test_15_one_bfloat16_weight_in_a_float16_model(passes: str, tmp_path: Path) -> None:
    text = """
        g (float16[4,32] x) => (float16[4,16] y) {
          wide = Cast<to = 10>(w)
          made = MatMul(x, wide)
          y = Add(made, b)
        }"""
    weights = {"w": normal(1, 32, 16, dtype=ml_dtypes.bfloat16), "b": normal(2, 16, dtype=np.float16)}
    model = graph(text, weights)
    rewrite(model, passes)
    x = normal(3, 4, 32, dtype=np.float16)
    expected = x.astype(np.float32) @ weights["w"].astype(np.float32) + weights["b"]
    assert error(outputs(model, tmp_path, x=x)[0], expected) < (2e-3 if passes in ("exact", "fp16") else 0.15)


# 16: TensorRT-Edge-LLM #192


def test_16_a_vector_of_scales_for_dynamic_quantization_is_refused(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3, 16])
    quantize = helper.make_node(
        *(DYNAMIC, ["x", "scales"], ["codes", "blocks"], "qkv.quantize"),
        domain="trt",
        axis=-1,
        block_size=16,
        scale_type=TensorProto.FLOAT8E4M3FN,
    )
    read = [
        helper.make_node("DequantizeLinear", ["blocks", "one"], ["wide"]),
        helper.make_node("DequantizeLinear", ["codes", "wide"], ["y"], axis=2, block_size=16),
    ]
    made = helper.make_graph(
        [quantize, *read],
        "g",
        [x],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 3, 16])],
        [
            numpy_helper.from_array(np.array([1, 2, 3], np.float32), "scales"),
            numpy_helper.from_array(np.float32(1), "one"),
        ],
        value_info=[
            helper.make_tensor_value_info("codes", TensorProto.FLOAT4E2M1, [4, 3, 16]),
            helper.make_tensor_value_info("blocks", TensorProto.FLOAT8E4M3FN, [4, 3, 1]),
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=11)
    with pytest.raises(Pi05cError, match=r"'scales' of node 'qkv.quantize' .* takes one"):
        outputs(model, tmp_path, x=normal(1, 4, 3, 16))


# 23: onnxruntime 32719, onnx PR 6531

MIXED = """
    g (float16[4,32] x) => (float16[4,16] y) <float scale = {0.03125}, int8 zero = {0}> {
      codes = QuantizeLinear(x, scale, zero)
      back = DequantizeLinear<OUT>(codes, scale, zero)
      narrow = Cast<to = 10>(back)
      y = MatMul(narrow, w)
    }"""


@pytest.mark.parametrize("passes", ["exact", "fp16", "default", "nvfp4"])
@pytest.mark.parametrize("stated", [False, True])
def test_23_float16_with_a_float32_scale(passes: str, stated: bool, tmp_path: Path) -> None:
    """Opset 23 allows it; the type of what is dequantized follows from the scale or is stated."""
    text = MIXED.replace("<OUT>", "<output_dtype = 10>" if stated else "")
    before = proto(text, {"w": normal(1, 32, 16, dtype=np.float16)}, opset=23)
    model = model_from_proto(before)
    assert problems(model) == []
    x = normal(2, 4, 32, dtype=np.float16)
    rewrite(model, passes)
    expected = np.rint(x.astype(np.float32) * 32).clip(-128, 127) / 32 @ array_f32(before)
    assert error(outputs(model, tmp_path, x=x)[0], expected) < (2e-3 if passes in ("exact", "fp16") else 0.15)


def test_23_below_opset_23_it_is_an_error() -> None:
    before = proto(MIXED.replace("<OUT>", ""), {"w": normal(1, 32, 16, dtype=np.float16)}, opset=21)
    assert problems(model_from_proto(before))


def array_f32(model: onnx.ModelProto) -> Array:
    stored = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    return numpy_helper.to_array(stored).astype(np.float32)


# The list


def test_every_case_is_listed_with_tests_that_exist() -> None:
    rows: Sequence[str] = [
        line for line in (HERE / "README.md").read_text().splitlines() if re.match(r"\| \d+ ", line)
    ]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 31))
    for row in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (HERE.parent / file).read_text(), (file, name)
