"""Precision by part: in which type a graph computes, and the limit that follows from it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pi05c.graph.io import load
from pi05c.manifest import PrecisionRecord
from pi05c.precision import LIMITS, default_limit, dtypes_of, narrowest, precision_of

FP8 = "float8e4m3fn"


def linear(path: Path, *, activation: bool, weight: bool) -> Path:
    """`actions = x @ w` in float16 with FP8 Q/DQ on neither, one or both sides."""
    codes = np.ones((16, 16), ml_dtypes.float8_e4m3fn)
    nodes, left, right = [], "x", "w"
    if activation:
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"], name="xq"),
            helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"], name="xd"),
        ]
        left = "xd"
    if weight:
        nodes.append(helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wd"], name="wd"))
        right = "wd"
    nodes.append(helper.make_node("MatMul", [left, right], ["actions"], name="project"))
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [16, 16])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT16, [16, 16])],
        [
            numpy_helper.from_array(codes if weight else codes.astype(np.float16), "w"),
            numpy_helper.from_array(np.array(0.5, np.float16), "scale"),
            numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "zero"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("activation", "weight", "dtype"),
    [
        (False, False, "float16"),
        (True, True, FP8),
        (True, False, f"{FP8} x float16"),
        (False, True, f"float16 x {FP8}"),
    ],
)
def test_a_matmul_computes_in_what_both_its_dequantizers_read(
    tmp_path: Path, activation: bool, weight: bool, dtype: str
) -> None:
    graph = load(linear(tmp_path / "model.onnx", activation=activation, weight=weight)).graph
    assert [(record.kind, record.dtype, record.count) for record in precision_of(graph)] == [
        ("linear", dtype, 1)
    ]
    assert (FP8 in dtypes_of(graph)) == (activation or weight)


def test_a_transpose_behind_a_dequantizer_keeps_the_product_from_fp8(tmp_path: Path) -> None:
    """Nothing may stand between a DequantizeLinear and its MatMul, but in the spelling of NVFP4."""
    path = linear(tmp_path / "model.onnx", activation=True, weight=True)
    proto = onnx.load(path)
    proto.graph.node[-1].input[1] = "wt"
    proto.graph.node.insert(3, helper.make_node("Transpose", ["wd"], ["wt"], name="wt", perm=[1, 0]))
    onnx.save(proto, path)
    assert [record.dtype for record in precision_of(load(path).graph)] == [f"{FP8} x float16"]


def record(dtype: str) -> PrecisionRecord:
    return PrecisionRecord(part="prefix", kind="linear", dtype=dtype, count=1)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([], "float32"),
        (["float32", "mixed"], "float32"),
        (["float32", "float16"], "float16"),
        (["float16", "bfloat16"], "bfloat16"),
        (["float32", "float16 x float8e4m3fn"], FP8),
    ],
)
def test_the_narrowest_type_sets_the_limit(dtypes: list[str], expected: str) -> None:
    records = [record(dtype) for dtype in dtypes]
    assert narrowest(records) == expected
    assert default_limit(records) == LIMITS[expected]


def test_random_weights_widen_every_limit_but_that_of_exact_rewrites() -> None:
    assert default_limit([record(FP8)], weights_random=True) > default_limit([record(FP8)])
    assert default_limit([record("float32")], weights_random=True) == LIMITS["float32"]


def test_the_plain_reference_policy_computes_in_float32_everywhere(tiny_model: Path) -> None:
    records = precision_of(load(tiny_model).graph)
    assert {found.dtype for found in records} == {"float32"}
    assert {found.part for found in records} == {"vision", "prefix", "denoise"}
    assert {found.kind for found in records} >= {
        "convolution",
        "linear",
        "attention",
        "softmax",
        "norm",
        "RoPE",
    }


@pytest.mark.parametrize("operator", ["Tanh", "Neg"])
def test_a_graph_of_other_operators_has_the_limit_of_their_type(tmp_path: Path, operator: str) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.FLOAT16),
        helper.make_node(operator, ["narrow"], ["bent"]),
        helper.make_node("Cast", ["bent"], ["y"], to=TensorProto.FLOAT),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "bent", values[:1], values[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    records = precision_of(load(path).graph)
    assert [(record.kind, record.dtype, record.count) for record in records] == [("other", "float16", 1)]
    assert default_limit(records) == LIMITS["float16"]
