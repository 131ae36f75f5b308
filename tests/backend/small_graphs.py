"""Graphs of a few nodes that the backend's tests build and run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

FP8_MAX = 448.0
SCALE = np.float16(0.0125)

Value = tuple[str, int, Sequence[int | str]]
"""Name, element type and shape of an input or output."""


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """A node named after its first output."""
    return helper.make_node(op, inputs, outputs, name=f"make_{outputs[0]}", **attributes)


def write_model(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: dict[str, npt.NDArray[Any]] | None = None,
    *,
    opset: int = 21,
    external: bool = False,
) -> Path:
    """Write a model, with `external` its weights in a file of their own beside it."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save_model(
        model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=64
    )
    return path


def quantized(values: npt.NDArray[Any], scale: npt.NDArray[Any] | np.float16) -> npt.NDArray[Any]:
    """QuantizeLinear to FP8 in numpy: divide in float32, saturate, round to nearest even."""
    scaled = values.astype(np.float32) / np.asarray(scale, np.float32)
    return np.clip(scaled, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)


def write_fp8_linear(path: Path, *, batch: int | str = 16) -> Path:
    """`y = dequantized(x) @ dequantized(w)` in float16 with an FP8 weight in external data."""
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    return write_model(
        path,
        [
            node("QuantizeLinear", ["x", "scale", "zero"], ["x_codes"]),
            node("DequantizeLinear", ["x_codes", "scale", "zero"], ["x_dequantized"]),
            node("DequantizeLinear", ["w", "scale", "zero"], ["w_dequantized"]),
            node("MatMul", ["x_dequantized", "w_dequantized"], ["y"]),
        ],
        [("x", TensorProto.FLOAT16, [batch, 64])],
        [("y", TensorProto.FLOAT16, [batch, 32])],
        {
            "w": quantized(weight, SCALE),
            "scale": np.asarray(SCALE),
            "zero": np.zeros((), ml_dtypes.float8_e4m3fn),
        },
        external=True,
    )
