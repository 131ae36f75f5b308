"""Small ONNX models for the tests of the graph layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
from onnx import numpy_helper

from pi05c.graph.io import Model, model_from_proto

Array = npt.NDArray[Any]


def model_proto(text: str, weights: Mapping[str, Array] | None = None, *, opset: int = 21) -> onnx.ModelProto:
    """A model of ONNX's text form without its header; nodes are called after their operator and first output."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{text}')
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    _name_nodes(model.graph)
    return model


def small_model(text: str, weights: Mapping[str, Array] | None = None, *, opset: int = 21) -> Model:
    """The same, as passes edit it."""
    return model_from_proto(model_proto(text, weights, opset=opset))


def run_proto(proto: onnx.ModelProto, inputs: Mapping[str, Array]) -> list[Array]:
    """The outputs in onnxruntime of a model without external data."""
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, dict(inputs))
    return outputs


def run_file(path: Path, inputs: Mapping[str, Array]) -> list[Array]:
    """The outputs in onnxruntime of a saved model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, dict(inputs))
    return outputs


def _name_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = node.name or f"{node.output[0]}.{node.op_type}"
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _name_nodes(attribute.g)
