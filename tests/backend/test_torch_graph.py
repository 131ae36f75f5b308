"""The torch backend on the CPU: each operator against onnxruntime, and whole pipelines against the simulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

import pi05c
from pi05c.backend.onnxruntime import load_runner
from pi05c.comparison import compare
from pi05c.folder import GRAPH, SAMPLES
from pi05c.graph.errors import Pi05cError

torch = pytest.importorskip("torch", reason="the torch backend needs the extra [torch]")

from pi05c.backend.torch_device import TorchCpu  # noqa: E402
from pi05c.backend.torch_engine import TorchEngine  # noqa: E402
from pi05c.backend.torch_graph import translate  # noqa: E402
from pi05c.backend.torch_operators import to_numpy, to_torch  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 6)).astype(np.float32)
Y = RNG.standard_normal((2, 4, 6)).astype(np.float32) + 3
FLAGS = X > 0
INTS = np.arange(1, 9).reshape(2, 4)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def run(engine: TorchEngine, feeds: dict[str, Any]) -> dict[str, Any]:
    """Numpy arrays through an engine on the CPU."""
    results = engine.run({name: to_torch(np.asarray(value)) for name, value in feeds.items()})
    return {name: to_numpy(value) for name, value in results.items()}


CASES: list[tuple[str, list[Any], list[Any], dict[str, Any]]] = [
    *[(op, [X, Y], [], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "Greater", "Equal")],
    *[
        (op, [Y], [], {})
        for op in ("Sqrt", "Reciprocal", "Neg", "Exp", "Sin", "Cos", "Tanh", "Sigmoid", "Erf")
    ],
    *[(op, [FLAGS, ~FLAGS], [], {}) for op in ("And", "Or")],
    ("Not", [FLAGS], [], {}),
    ("Div", [INTS, INTS[::-1].copy()], [], {}),
    ("Pow", [X], [np.float32(2)], {}),
    ("Pow", [Y], [np.float32(0.5)], {}),
    ("Where", [FLAGS, X, Y], [], {}),
    ("Cast", [X], [], {"to": TensorProto.FLOAT16}),
    ("Cast", [FLAGS], [], {"to": TensorProto.INT64}),
    ("Clip", [X], [np.float32(-0.5), np.float32(0.5)], {}),
    ("Concat", [X, Y], [], {"axis": -1}),
    ("CumSum", [INTS], [ints(1)[0]], {}),
    ("Expand", [X[:, :1]], [ints(2, 4, 6)], {}),
    ("Flatten", [X], [], {"axis": 2}),
    ("Gather", [X], [ints(2, 0)], {"axis": 1}),
    ("Gather", [X[0]], [INTS % 4], {"axis": 0}),
    ("Gelu", [X], [], {"approximate": "tanh"}),
    ("Gelu", [X], [], {}),
    ("Gemm", [X[0], Y[0]], [X[1, :, :4]], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Identity", [X], [], {}),
    ("LayerNormalization", [X], [Y[0, 0], X[0, 0]], {"axis": -1, "epsilon": 1e-6}),
    ("MatMul", [X, Y.transpose(0, 2, 1).copy()], [], {}),
    (
        "Conv",
        [RNG.standard_normal((1, 3, 8, 8)).astype(np.float32)],
        [np.ones((4, 3, 2, 2), np.float32)],
        {"strides": [2, 2]},
    ),
    ("ReduceMean", [X], [ints(-1)], {"keepdims": 1}),
    ("ReduceSum", [INTS], [ints(1)], {"keepdims": 0}),
    ("Reshape", [X], [ints(0, -1)], {}),
    ("Slice", [X], [ints(1), ints(2**62), ints(2), ints(2)], {}),
    ("Softmax", [X], [], {"axis": 1}),
    ("Split", [X], [ints(2, 4)], {"axis": 2}),
    ("Squeeze", [X[:, None]], [ints(1)], {}),
    ("Tile", [X], [ints(1, 2, 1)], {}),
    ("Transpose", [X], [], {"perm": [2, 0, 1]}),
    ("Unsqueeze", [X], [ints(0, -1)], {}),
]


@pytest.mark.parametrize(
    ("op", "inputs", "constants", "attributes"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_operator_is_onnxruntimes(
    op: str, inputs: list[Any], constants: list[Any], attributes: dict[str, Any], tmp_path: Path
) -> None:
    names = [f"x{index}" for index in range(len(inputs))]
    fixed = [numpy_helper.from_array(np.asarray(value), f"c{index}") for index, value in enumerate(constants)]
    results = ["y", "z"] if op == "Split" else ["y"]
    graph = helper.make_graph(
        [helper.make_node(op, [*names, *(tensor.name for tensor in fixed)], results, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in zip(names, inputs, strict=True)
        ],
        [helper.make_empty_tensor_value_info(name) for name in results],
        fixed,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    import onnx

    save_model(onnx.shape_inference.infer_shapes(model), tmp_path / "model.onnx")
    feeds = dict(zip(names, inputs, strict=True))
    expected = load_runner(tmp_path / "model.onnx").run(feeds)
    found = run(TorchEngine(tmp_path / "model.onnx", TorchCpu()), feeds)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=2e-6)


LIMITS = {"exact": 1e-6, "fp16": 1e-3, "default": 0.04}
"""Relative L2 distance of the torch result from the simulation. FP8 rounding is a draw: sums that differ in the last
bit of float16 fall on different codes, so two correct ways differ by about the error of each (0.024 here)."""


@pytest.mark.parametrize("passes", LIMITS)
def test_a_pipeline_gives_what_the_simulation_gives(passes: str, brief_model: Path, tmp_path: Path) -> None:
    folder = pi05c.compile(
        brief_model, tmp_path / "engine", passes=passes, backend="onnxruntime", max_error=1
    ).folder
    with np.load(folder / SAMPLES) as file:
        samples = [{name: file[name][0] for name in file.files if name != "synthetic"}]
    reference = [{"actions": sample.pop("actions")} for sample in samples]
    simulated = [load_runner(folder / GRAPH).run(sample) for sample in samples]
    plain = TorchEngine(folder / GRAPH, TorchCpu(), translate(folder / GRAPH, fuse=False))
    fused = TorchEngine(folder / GRAPH, TorchCpu(), module := translate(folder / GRAPH))
    unfused_distance = compare(simulated, [run(plain, sample) for sample in samples]).worst.relative_l2
    results = [run(fused, sample) for sample in samples]
    assert unfused_distance <= LIMITS[passes]
    assert compare(simulated, results).worst.relative_l2 <= LIMITS[passes]
    error = compare(reference, simulated).worst.relative_l2
    assert compare(reference, results).worst.relative_l2 <= 2 * error + 1e-6
    tensors = {name: torch.from_numpy(samples[0][name]) for name in module.inputs}
    prefix, steps = module.halves("noise")
    assert "noise" not in prefix.inputs
    assert "images" not in steps.inputs
    tensors |= dict(zip(prefix.outputs, prefix(*(tensors[name] for name in prefix.inputs)), strict=True))
    (actions,) = steps(*(tensors[name] for name in steps.inputs))
    np.testing.assert_array_equal(actions.numpy(), results[0]["actions"])
    if passes != "exact":
        assert module.fused["RowAttention"] == 9  # three layers in three steps
        assert module.fused["RowLinear"] >= 3 * 12


def test_an_operator_outside_the_table_is_named(brief_model: Path) -> None:
    with pytest.raises(Pi05cError, match=r"does not translate Loop \(1\).*fuse_denoise_loop unrolls"):
        TorchEngine(brief_model, TorchCpu())
