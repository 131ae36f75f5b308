"""Raises the opset of a model with onnx's own converter, without reading its weights."""

from __future__ import annotations

import onnx
import onnx.version_converter

from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import Model, model_from_proto, to_proto


def raise_opset(model: Model, opset: int) -> bool:
    """Convert `model` in place up to `opset`; a model that is there already is left as it is.

    Returns:
        Whether anything was converted.

    Raises:
        Pi05cError: onnx has no conversion for an operator.
    """
    if model.graph.opset >= opset:
        return False
    proto, pending = to_proto(model)
    by_name = {}
    for tensor in proto.graph.initializer:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if location in pending:
            by_name[tensor.name] = pending[location]
    return _convert(model, proto, by_name, opset)


def _convert(model: Model, proto: onnx.ModelProto, by_name: dict[str, object], opset: int) -> bool:
    try:
        converted = onnx.version_converter.convert_version(proto, opset)
    except RuntimeError as error:
        raise Pi05cError(
            f"the graph cannot be raised from opset {model.graph.opset} to {opset}: {error}"
        ) from error
    model.graph = model_from_proto(converted, None, by_name).graph  # type: ignore[arg-type]
    return True
