"""What a model holds, to be compared before and after it went through a file."""

from __future__ import annotations

import hashlib
from typing import Any

import onnx
from onnx import numpy_helper


def contents(proto: onnx.ModelProto) -> dict[str, Any]:
    """What a model holds, whatever order it is in, and whether a constant is an initializer or a node."""
    return {
        "model": (
            proto.domain,
            proto.model_version,
            proto.doc_string,
            proto.producer_name,
            proto.producer_version,
        ),
        "metadata": entries(proto),
        "opsets": sorted((entry.domain, entry.version) for entry in proto.opset_import),
        "ir": proto.ir_version,
        "inputs": [value.SerializeToString(deterministic=True) for value in proto.graph.input],
        "graph": graph_contents(proto.graph),
        "functions": [function.SerializeToString(deterministic=True) for function in proto.functions],
    }


def graph_contents(graph: onnx.GraphProto) -> dict[str, Any]:
    """Its name, what it takes and gives, and its nodes."""
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    return {
        "name": (graph.name, graph.doc_string, entries(graph)),
        "inputs": [(value.name, value.doc_string, entries(value)) for value in graph.input],
        "outputs": [(value.name, value.doc_string, entries(value)) for value in graph.output],
        "nodes": [node_contents(node) for node in nodes],
    }


def node_contents(node: onnx.NodeProto) -> tuple[Any, ...]:
    """Its operator, the names that it reads and makes, its texts and attributes."""
    attributes = {attribute.name: attribute_contents(attribute) for attribute in node.attribute}
    texts = (node.name, node.doc_string, entries(node))
    return (node.op_type, node.domain, tuple(node.input), tuple(node.output), texts, attributes)


def attribute_contents(attribute: onnx.AttributeProto) -> Any:
    """Its value; of a tensor, in whichever field its numbers are."""
    if attribute.HasField("g"):
        return graph_contents(attribute.g)
    if attribute.HasField("t"):
        return (attribute.t.name, tensor_contents(attribute.t, attribute.t))
    return attribute.SerializeToString(deterministic=True)


def tensor_contents(tensor: onnx.TensorProto, described_by: Any) -> tuple[Any, ...]:
    """Type, shape, hash and texts of a tensor; the latter are those of `described_by`."""
    values = numpy_helper.to_array(tensor)
    raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
    texts = (described_by.doc_string, entries(described_by))
    return (tensor.data_type, tuple(tensor.dims), hashlib.sha256(raw).hexdigest(), texts)


def entries(holder: Any) -> dict[str, str]:
    """The metadata of whatever has such."""
    return {entry.key: entry.value for entry in holder.metadata_props}
