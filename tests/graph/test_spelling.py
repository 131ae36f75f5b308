"""FP8 as ModelOpt's torch exporter spelled it computes, and compiles, as ONNX's own operators do."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pi05c.backend.onnxruntime import load_runner
from pi05c.graph.check import problems
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import load, save
from pi05c.graph.ranges import Ranges
from pi05c.graph.runner import Array
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run

SCALE, WEIGHT_SCALE = np.float16(0.0078), np.float16(0.002)


def weight() -> Array:
    drawn: Array = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float16) / 6
    return drawn


def inputs() -> dict[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((4, 32)).astype(np.float16)}


def exported(path: Path, *, old: bool, stored: bool, opset: int = 20) -> Path:
    """A linear with FP8 on both sides, in the old or the standard spelling.

    Args:
        stored: the codes of the weight are stored, in the old spelling as bytes; otherwise the graph makes them.
    """
    domain, prefix, zero = ("trt", "TRT_FP8", []) if old else ("", "", ["zero"])
    codes = (weight() / WEIGHT_SCALE).astype(ml_dtypes.float8_e4m3fn)

    def node(kind: str, source: str, scale: str, result: str) -> onnx.NodeProto:
        return helper.make_node(
            f"{prefix}{kind}Linear", [source, scale, *zero], [result], result, domain=domain
        )

    nodes = [
        node("Quantize", "x", "s", "x8"),
        node("Dequantize", "x8", "s", "xd"),
        *([] if stored else [node("Quantize", "w", "ws", "w8")]),
        node("Dequantize", "w8", "ws", "wd"),
        helper.make_node("MatMul", ["xd", "wd"], ["actions"], "product"),
    ]
    fp8 = TensorProto.UINT8 if old else TensorProto.FLOAT8E4M3FN
    known = [("x8", fp8, [4, 32]), *([] if stored else [("w8", fp8, [32, 16])])]
    bytes_of_weight = numpy_helper.from_array(codes.view(np.uint8) if old else codes, "w8")
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4, 32])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT16, [4, 16])],
        [
            numpy_helper.from_array(np.asarray(SCALE), "s"),
            numpy_helper.from_array(np.asarray(WEIGHT_SCALE), "ws"),
            bytes_of_weight if stored else numpy_helper.from_array(weight(), "w"),
            *([] if old else [numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "zero")]),
        ],
        value_info=[helper.make_tensor_value_info(*value) for value in known],
    )
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


@pytest.mark.parametrize("stored", [True, False])
def test_the_old_spelling_computes_what_the_standard_one_does(tmp_path: Path, stored: bool) -> None:
    old = exported(tmp_path / "old.onnx", old=True, stored=stored)
    new = exported(tmp_path / "new.onnx", old=False, stored=stored)
    results = [load_runner(path).run(inputs())["actions"] for path in (old, new)]
    assert (results[0] == results[1]).all()
    assert results[0].any()


@pytest.mark.parametrize("stored", [True, False])
def test_the_old_spelling_is_loaded_as_the_standard_one_and_compiles(tmp_path: Path, stored: bool) -> None:
    path = exported(tmp_path / "old.onnx", old=True, stored=stored)
    expected = load_runner(path).run(inputs())["actions"]
    model = load(path)
    assert {(node.op, node.domain or "") for node in model.graph.nodes} <= {
        ("QuantizeLinear", ""),
        ("DequantizeLinear", ""),
        ("MatMul", ""),
    }
    results = run(
        model,
        parse("default", PRESETS),
        calibrate=lambda _, wanted: Ranges(
            dict.fromkeys(wanted.tensors, -4.0), dict.fromkeys(wanted.tensors, 4.0), "tests"
        ),
    )
    (skip,) = [
        skip for result in results if result.step.spec.name == "quantize_linears" for skip in result.skips
    ]
    assert skip.reason == "it is quantized already"
    assert not problems(model)
    save(model, tmp_path / "compiled.onnx")
    assert (load_runner(tmp_path / "compiled.onnx").run(inputs())["actions"] == expected).all()
    onnx.checker.check_model(onnx.load(tmp_path / "compiled.onnx"), full_check=True)


def test_an_opset_without_fp8_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path / "old.onnx", old=True, stored=True, opset=18)
    with pytest.raises(
        Pi05cError, match="which opset 18 of the model does not have: export it at opset 19 or"
    ):
        load(path)
