"""Weights that ModelOpt's exporter marked for FP4: the codes, scales and graph that its own post-processing makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import pi05c as api
from pi05c.backend.onnxruntime import load_runner
from pi05c.graph.check import problems
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, load, save
from pi05c.graph.nvfp4 import BLOCK
from pi05c.graph.runner import Array
from pi05c.graph.weights import stored_bytes, weight_of
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run
from pi05c.samples import save_samples

DATA = Path(__file__).parents[1] / "data"

VECTORS = np.load(DATA / "nvfp4.npz")
"""What ModelOpt 0.47 makes of two weights."""

ROWS = 4


def exported(
    path: Path, weight: Array, *, transposed: bool = True, block: int = BLOCK, dynamic: bool = False
) -> Path:
    """`actions = x @ weight.T`, in the weight's type, as ModelOpt's torch exporter leaves it at opset 20.

    Args:
        transposed: a Transpose stands between the placeholder and the MatMul; else `weight` is what is multiplied.
        dynamic: x is quantized when the engine runs, and comes out of that in float32.
    """
    dtype = helper.np_dtype_to_tensor_dtype(weight.dtype)
    width = weight.shape[1 if transposed else 0]
    columns = weight.shape[0 if transposed else 1]
    factor = "wt" if transposed else "wd"
    quantize = helper.make_node(
        "TRT_FP4DynamicQuantize", ["x", "s"], ["x4", "xs"], "q", domain="trt", axis=-1, block_size=BLOCK
    )
    quantize.attribute.append(helper.make_attribute("scale_type", TensorProto.FLOAT8E4M3FN))
    nodes = [
        *([quantize] if dynamic else []),
        *([helper.make_node("DequantizeLinear", ["xs", "s"], ["xw"], "d1", domain="trt")] if dynamic else []),
        *(
            [
                helper.make_node(
                    "DequantizeLinear", ["x4", "xw"], ["xd"], "d2", domain="trt", axis=-1, block_size=BLOCK
                )
            ]
            if dynamic
            else []
        ),
        helper.make_node("TRT_FP4QDQ", ["w"], ["wd"], "fp4", domain="trt", block_size=block),
        *([helper.make_node("Transpose", ["wd"], ["wt"], "turn", perm=[1, 0])] if transposed else []),
        helper.make_node("MatMul", ["xd" if dynamic else "x", factor], ["actions"], "product"),
    ]
    typed = {"wd": (dtype, weight.shape), "wt": (dtype, weight.shape[::-1])}
    typed |= {"xd": (dtype, (ROWS, width)), "x4": (TensorProto.FLOAT4E2M1, (ROWS, width))}
    typed |= {"xs": (TensorProto.FLOAT8E4M3FN, (ROWS, width // BLOCK))}
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", dtype, [ROWS, width])],
        [helper.make_tensor_value_info("actions", dtype, [ROWS, columns])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32(0.002), "s")],
        value_info=[
            helper.make_tensor_value_info(name, *kind)
            for name, kind in typed.items()
            if any(name in node.output for node in nodes)
        ],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("trt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), path)
    return path


def parts_of(model: Model) -> dict[str, Array]:
    """Bytes of codes and scales of the one weight by kind."""
    (parts,) = all_parts_of(model)
    return parts


def all_parts_of(model: Model) -> list[dict[str, Array]]:
    """Bytes of codes and scales of each weight by kind."""
    found = [
        (node.inputs[0], node.inputs[1].inputs[0].inputs)
        for node in model.graph.nodes
        if node.op == "DequantizeLinear" and "block_size" in node.attrs and not node.inputs[0].inputs
    ]
    return [
        {
            "codes": np.frombuffer(stored_bytes(weight_of(codes).load()), np.uint8),
            "scales": weight_of(scales[0]).load().view(np.uint8),
            "global": weight_of(scales[1]).load(),
        }
        for codes, scales in found
    ]


def inputs(width: int, dtype: object) -> Mapping[str, Array]:
    return {"x": np.random.default_rng(1).standard_normal((ROWS, width)).astype(dtype)}  # type: ignore[call-overload]


@pytest.mark.parametrize("number", [0, 1])
def test_codes_and_scales_are_modelopts(number: int, tmp_path: Path) -> None:
    weight, codes, scales, scale = (
        VECTORS[f"{name}_{number}"] for name in ("weight", "codes", "scales", "global")
    )
    found = parts_of(load(exported(tmp_path / "m.onnx", weight)))
    np.testing.assert_array_equal(found["codes"], codes.reshape(-1))
    np.testing.assert_array_equal(found["scales"], scales)
    assert found["global"].tobytes() == scale.tobytes()


def test_what_modelopts_exporter_wrote(tmp_path: Path) -> None:
    stored = np.load(DATA / "modelopt_nvfp4.npz")
    path = DATA / "modelopt_nvfp4.onnx"
    for name, found in zip(("0_weight", "2_weight"), all_parts_of(load(path)), strict=True):
        np.testing.assert_array_equal(found["codes"], stored[f"{name}_f4"])
        np.testing.assert_array_equal(found["scales"].reshape(-1), stored[f"{name}_f8_scale"])
        scale = stored[f"{name}_f8_scale_f32_scale"]
        assert found["global"].tobytes() == scale.tobytes()
    x = {"x": stored["x"]}
    np.testing.assert_array_equal(load_runner(path).run(x)["actions"], stored["actions"])
    save_samples(tmp_path / "x.npz", [x, {"x": -x["x"]}])
    result = api.compile(
        path, tmp_path / "engine", calibration=[tmp_path / "x.npz"], backend="onnxruntime", cache=tmp_path
    )
    assert result.manifest.verification is not None
    assert result.manifest.verification.worst().relative_l2 < 1e-3
    compiled = load_runner(tmp_path / "engine" / "model.onnx").run(x)["actions"]
    np.testing.assert_allclose(compiled, stored["actions"], rtol=1e-2, atol=1e-3)
    graph = load(tmp_path / "engine" / "model.onnx").graph
    assert [node.op for node in graph.nodes].count("TRT_FP4DynamicQuantize") == 2
    assert len(all_parts_of(load(tmp_path / "engine" / "model.onnx"))) == 2


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_it_computes_with_the_weight_in_fp4_and_compiles_as_it_is(
    dtype: object, dynamic: bool, transposed: bool, tmp_path: Path
) -> None:
    weight = VECTORS["weight_1"][:16].astype(dtype)
    path = exported(tmp_path / "m.onnx", weight, transposed=transposed, dynamic=dynamic)
    model = load(path)
    assert not problems(model)
    assert "TRT_FP4QDQ" not in {node.op for node in model.graph.nodes}
    x = inputs(weight.shape[1 if transposed else 0], dtype)
    plain = load_runner(path).run(x)["actions"]
    steps = parse("exact,pin_fp32,quantize_linears", PRESETS)
    assert any("quantized already" in skip.reason for result in run(model, steps) for skip in result.skips)
    save(model, tmp_path / "compiled.onnx")
    compiled = load_runner(tmp_path / "compiled.onnx").run(x)["actions"]
    np.testing.assert_array_equal(plain, compiled)
    onnx.checker.check_model(onnx.load(tmp_path / "compiled.onnx"), full_check=not dynamic)
    if not dynamic:
        parts = parts_of(load(path))
        wide = parts["scales"].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * parts["global"]
        codes = np.stack([parts["codes"] & 15, parts["codes"] >> 4], axis=1).reshape(weight.shape)
        values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        rounded = (values * np.repeat(wide, BLOCK, axis=1)).astype(dtype).astype(np.float32)
        expected = x["x"].astype(np.float32) @ (rounded.T if transposed else rounded)
        np.testing.assert_allclose(plain.astype(np.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_installed_modelopt_makes_the_same(transposed: bool, dynamic: bool, tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="comparing with ModelOpt needs the extra [modelopt]")
    from modelopt.onnx.export import NVFP4QuantExporter

    weight = np.random.default_rng(5).standard_normal((48, 96)).astype(np.float16) ** 3
    path = exported(tmp_path / "m.onnx", weight, transposed=transposed, dynamic=dynamic)
    converted = NVFP4QuantExporter.process_model(onnx.load(path))
    onnx.save(converted, tmp_path / "converted.onnx")
    ours, theirs = parts_of(load(path)), parts_of(load(tmp_path / "converted.onnx"))
    for kind, values in theirs.items():
        np.testing.assert_array_equal(ours[kind].reshape(values.shape), values)
    x = inputs(weight.shape[1 if transposed else 0], np.float16)
    results = [load_runner(each).run(x)["actions"] for each in (path, tmp_path / "converted.onnx")]
    np.testing.assert_array_equal(*results)


def test_weights_that_are_inputs_with_a_value_run_too(tmp_path: Path) -> None:
    """ModelOpt lists the codes and scales that it makes among the inputs."""
    path = exported(tmp_path / "m.onnx", VECTORS["weight_1"].astype(np.float16))
    save(load(path), tmp_path / "stored.onnx")
    proto = onnx.load(tmp_path / "stored.onnx")
    values = [value for value in proto.graph.initializer if "w." in value.name]
    assert len(values) == 3
    proto.graph.input.extend(helper.make_tensor_value_info(v.name, v.data_type, v.dims) for v in values)
    onnx.save(proto, tmp_path / "listed.onnx")
    x = inputs(64, np.float16)
    results = [load_runner(tmp_path / name).run(x)["actions"] for name in ("m.onnx", "listed.onnx")]
    np.testing.assert_array_equal(*results)


def test_a_weight_that_a_body_reads_is_turned_too(tmp_path: Path) -> None:
    weight = VECTORS["weight_1"].astype(np.float16)
    body = helper.make_graph(
        [
            helper.make_node("TRT_FP4QDQ", ["w"], ["wd"], "inner", domain="trt", block_size=BLOCK),
            helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "wt"], ["y"], "product"),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [ROWS, 24])],
    )
    other = helper.make_graph(
        [
            helper.make_node("TRT_FP4QDQ", ["w"], ["wd"], "inner", domain="trt", block_size=BLOCK),
            helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "wt"], ["z"], "product"),
            helper.make_node("Neg", ["z"], ["y"]),
        ],
        "else",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [ROWS, 24])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["which"], ["actions"], "choose", then_branch=body, else_branch=other)],
        "both",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, [ROWS, 64]),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT16, [ROWS, 24])],
        [numpy_helper.from_array(weight, "w")],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("trt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path / "both.onnx")
    x = inputs(64, np.float16)
    expected = load_runner(exported(tmp_path / "m.onnx", weight)).run(x)["actions"]
    runner = load_runner(tmp_path / "both.onnx")
    for which in (True, False):
        result = runner.run({**x, "which": np.array(which)})["actions"]
        np.testing.assert_array_equal(result, expected if which else -expected)


def test_a_weight_of_zeros(tmp_path: Path) -> None:
    path = exported(tmp_path / "m.onnx", np.zeros((16, 32), np.float16))
    assert parts_of(load(path))["global"] == 1
    assert not load_runner(path).run(inputs(32, np.float16))["actions"].any()


def refused(path: Path, reason: str) -> None:
    with pytest.raises(Pi05cError, match=reason):
        load(path)


def test_what_cannot_be_fp4_is_refused_by_name(tmp_path: Path) -> None:
    weight = np.ones((16, 64), np.float16)
    refused(exported(tmp_path / "a.onnx", weight, block=32), r"^TRT_FP4QDQ 'fp4' asks for blocks of 32")
    refused(exported(tmp_path / "b.onnx", weight[:, :24]), r"'fp4' asks for blocks of 16 in .* \[16, 24\]")
    weight[0, 0] = np.inf
    refused(
        exported(tmp_path / "c.onnx", weight), "'fp4' stands behind a weight in float16 that is no finite"
    )
    path = exported(tmp_path / "d.onnx", np.ones((16, 64), np.float16))
    proto = onnx.load(path)
    proto.graph.node[0].input[0] = "x"
    onnx.save(proto, path)
    refused(path, "'fp4' does not stand behind a stored weight")
