"""FP4 in onnxruntime: each operator against its definition in numpy."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graphs import node

from pi05c.backend.onnxruntime import load_runner
from pi05c.graph.errors import Pi05cError
from pi05c.graph.nvfp4 import BLOCK, BlockCodes, BlockScales, global_scale
from pi05c.graph.runner import Array
from pi05c.graph.weights import InMemory, stored_bytes

TIES = np.array(
    [0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, -0.25, -0.75, -2.5, -5, -0.1, 7, -100], np.float32
)
"""Halfway values, both ends, and what lies beyond."""

ROUNDED = np.array([0, 0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -2, -4, 0, 6, -6], np.float32)


def fp4_initializer(name: str, codes: Array) -> TensorProto:
    return helper.make_tensor(name, TensorProto.FLOAT4E2M1, codes.shape, bytes(stored_bytes(codes)), raw=True)


def run(
    folder: Path,
    nodes: list[onnx.NodeProto],
    x: Array,
    outputs: dict[str, tuple[int, tuple[int, ...]]],
    weights: list[TensorProto],
    typed: dict[str, tuple[int, tuple[int, ...]]] | None = None,
) -> dict[str, Array]:
    graph = helper.make_graph(
        nodes,
        "fp4",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        weights,
        value_info=[helper.make_tensor_value_info(name, *kind) for name, kind in (typed or {}).items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
    path = folder / "fp4.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), path)
    return load_runner(path).run({"x": x})


def dynamic(x: Array, factor: float, axis: int, folder: Path) -> Array:
    """What TensorRT's dynamic quantization followed by its two DequantizeLinear makes of `x`."""
    shape = list(x.shape)
    shape[axis] //= BLOCK
    quantize = helper.make_node(
        "TRT_FP4DynamicQuantize", ["x", "factor"], ["codes", "scales"], name="quantize", domain="trt"
    )
    attributes = {"axis": axis, "block_size": BLOCK, "scale_type": TensorProto.FLOAT8E4M3FN}
    quantize.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    nodes = [
        quantize,
        node("DequantizeLinear", ["scales", "factor"], ["wide"]),
        node("DequantizeLinear", ["codes", "wide"], ["y"], axis=axis % x.ndim, block_size=BLOCK),
    ]
    typed = {"codes": (TensorProto.FLOAT4E2M1, x.shape), "scales": (TensorProto.FLOAT8E4M3FN, tuple(shape))}
    factor_proto = onnx.numpy_helper.from_array(np.asarray(factor, np.float32), "factor")
    return run(folder, nodes, x, {"y": (TensorProto.FLOAT, x.shape)}, [factor_proto], typed)["y"]


def test_ties_go_to_even_and_what_is_beyond_six_becomes_six(tmp_path: Path) -> None:
    one = onnx.numpy_helper.from_array(np.float32(1), "one")
    nodes = [
        node("QuantizeLinear", ["x", "one"], ["codes"], output_dtype=TensorProto.FLOAT4E2M1),
        node("DequantizeLinear", ["codes", "one"], ["y"]),
        node("Cast", ["x"], ["cast"], to=TensorProto.FLOAT4E2M1),
        node("Cast", ["cast"], ["z"], to=TensorProto.FLOAT),
    ]
    outputs = dict.fromkeys(("y", "z"), (TensorProto.FLOAT, TIES.shape))
    result = run(tmp_path, nodes, TIES, outputs, [one])
    np.testing.assert_array_equal(result["y"], ROUNDED)
    np.testing.assert_array_equal(result["z"], ROUNDED)


def test_rounding_is_that_of_ml_dtypes(tmp_path: Path) -> None:
    x = np.random.default_rng(0).uniform(-8, 8, 4096).astype(np.float32)
    nodes = [
        node("Cast", ["x"], ["codes"], to=TensorProto.FLOAT4E2M1),
        node("Cast", ["codes"], ["y"], to=TensorProto.FLOAT),
    ]
    result = run(tmp_path, nodes, x, {"y": (TensorProto.FLOAT, x.shape)}, [])["y"]
    expected = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dynamic_quantization(dtype: type[np.floating], tmp_path: Path) -> None:
    """Against the weight's own arithmetic, which ModelOpt's vectors hold."""
    x = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(dtype)
    x[0, 0, :BLOCK] = TIES
    x[0, 1] = 0
    factor = global_scale(float(np.abs(x).max()))
    base = InMemory(x.astype(np.float32))
    scales = BlockScales(base, factor)
    wide = np.repeat(scales.load().astype(np.float32) * factor, BLOCK, axis=-1)
    expected = BlockCodes(base, scales, factor).load().astype(np.float32) * wide
    np.testing.assert_array_equal(dynamic(x, float(factor), -1, tmp_path), expected)


def test_dynamic_quantization_along_the_last_axis_but_one(tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((2, 32, 5)).astype(np.float32)
    factor = float(global_scale(float(np.abs(x).max())))
    (tmp_path / "turned").mkdir()
    turned = dynamic(np.ascontiguousarray(x.transpose(0, 2, 1)), factor, -1, tmp_path / "turned")
    np.testing.assert_array_equal(dynamic(x, factor, -2, tmp_path), turned.transpose(0, 2, 1))


def test_a_block_whose_scale_vanishes_becomes_zero(tmp_path: Path) -> None:
    x = np.full((1, 32), 1e-6, np.float32)
    x[0, 16:] = 100
    result = dynamic(x, float(global_scale(100)), -1, tmp_path)
    np.testing.assert_array_equal(result[0, :16], 0)
    np.testing.assert_array_equal(result[0, 16:], 100)


@pytest.mark.parametrize("blocks", ["rows", "columns", "channels", "tensor"])
def test_stored_codes(blocks: str, tmp_path: Path) -> None:
    codes = np.resize(ROUNDED, (32, 32)).astype(ml_dtypes.float4_e2m1fn)
    rng = np.random.default_rng(3)
    shape, attributes, axis = {
        "rows": ((2, 32), {"axis": 0, "block_size": BLOCK}, 0),
        "columns": ((32, 2), {"axis": 1, "block_size": BLOCK}, 1),
        "channels": ((32,), {"axis": 1}, 1),
        "tensor": ((), {}, 0),
    }[blocks]
    scale = rng.uniform(0.5, 2, shape).astype(np.float16)
    nodes = [
        node("DequantizeLinear", ["codes", "scale"], ["w"], **attributes),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    x = np.eye(32, dtype=np.float16)
    weights = [fp4_initializer("codes", codes), onnx.numpy_helper.from_array(scale, "scale")]
    result = run(tmp_path, nodes, x, {"y": (TensorProto.FLOAT16, (32, 32))}, weights)["y"]
    wide = np.repeat(scale, BLOCK, axis=axis) if attributes.get("block_size") else scale
    np.testing.assert_array_equal(result, codes.astype(np.float16) * wide)


def test_codes_that_a_body_reads(tmp_path: Path) -> None:
    codes = np.resize(ROUNDED, (16, 16)).astype(ml_dtypes.float4_e2m1fn)
    body = helper.make_graph(
        [node("DequantizeLinear", ["codes", "one"], ["inner"]), node("Add", ["x", "inner"], ["sum"])],
        "body",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [16, 16])],
    )
    branch = node("If", ["yes"], ["y"], then_branch=body, else_branch=_renamed(body))
    weights = [
        fp4_initializer("codes", codes),
        onnx.numpy_helper.from_array(np.float32(1), "one"),
        onnx.numpy_helper.from_array(np.asarray(True), "yes"),
    ]
    x = np.ones((16, 16), np.float32)
    result = run(tmp_path, [branch], x, {"y": (TensorProto.FLOAT, (16, 16))}, weights)["y"]
    np.testing.assert_array_equal(result, codes.astype(np.float32) + 1)


def _renamed(body: onnx.GraphProto) -> onnx.GraphProto:
    other = onnx.GraphProto()
    other.CopyFrom(body)
    other.name = "other"
    for each in other.node:
        each.name = f"other_{each.name}"
        for names in (each.input, each.output):
            names[:] = [f"other_{name}" if name in ("inner", "sum") else name for name in names]
    other.output[0].name = "other_sum"
    return other


def test_other_operators_on_fp4_are_refused_by_name(tmp_path: Path) -> None:
    codes = np.zeros((4, 16), ml_dtypes.float4_e2m1fn)
    nodes = [
        node("Concat", ["codes", "codes"], ["w"], axis=0),
        node("Cast", ["w"], ["y"], to=TensorProto.FLOAT),
    ]
    x = np.zeros((1,), np.float32)
    with pytest.raises(Pi05cError, match=r"node 'make_w' \(Concat\) computes in float4e2m1"):
        run(tmp_path, nodes, x, {"y": (TensorProto.FLOAT, (8, 16))}, [fp4_initializer("codes", codes)])
