"""Generated models through load and save: nothing that they hold is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from random_graphs import Generated, described, examples, generated

from pi05c.graph.io import load, save

DESCRIBED = st.tuples(generated(), st.randoms(use_true_random=False)).map(lambda drawn: described(*drawn))


@examples(200)
@given(DESCRIBED)
def test_load_and_save_lose_nothing(tmp_path_factory: Any, graph: Generated) -> None:
    folder = tmp_path_factory.getbasetemp() / "generated"
    for name in ("first", "second", "third"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    first, second, third = (folder / name / "model.onnx" for name in ("first", "second", "third"))
    onnx.save(graph.proto, first)
    save(load(first), second)
    assert contents(onnx.load(second)) == contents(graph.proto)
    save(load(second), third)
    assert third.read_bytes() == second.read_bytes()
    data = [path.with_name("model.onnx.data") for path in (second, third)]
    assert [path.is_file() and path.read_bytes() for path in data].count(data_of(second)) == 2


def data_of(path: Path) -> bytes | bool:
    data = path.with_name("model.onnx.data")
    return data.is_file() and data.read_bytes()


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
    nodes = [node for node in graph.node if node.op_type != "Constant"]
    return {
        "name": (graph.name, graph.doc_string, entries(graph)),
        "inputs": [(value.name, value.doc_string, entries(value)) for value in graph.input],
        "outputs": [(value.name, value.doc_string, entries(value)) for value in graph.output],
        "nodes": [node_contents(node) for node in nodes],
    }


def node_contents(node: onnx.NodeProto) -> tuple[Any, ...]:
    attributes = {
        a.name: graph_contents(a.g) if a.HasField("g") else a.SerializeToString(deterministic=True)
        for a in node.attribute
    }
    texts = (node.name, node.doc_string, entries(node))
    return (node.op_type, node.domain, tuple(node.input), tuple(node.output), texts, attributes)


def entries(holder: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in holder.metadata_props}


@examples(200)
@given(DESCRIBED)
def test_constants_keep_type_bytes_and_texts(tmp_path_factory: Any, graph: Generated) -> None:
    folder = tmp_path_factory.getbasetemp() / "generated"
    folder.mkdir(exist_ok=True)
    onnx.save(graph.proto, folder / "from.onnx")
    save(load(folder / "from.onnx"), folder / "to.onnx")
    before, after = constants(graph.proto), constants(onnx.load(folder / "to.onnx"))
    read = before.keys() & {name for node in graph.proto.graph.node for name in node.input}
    assert {name: after[name] for name in read} == {name: before[name] for name in read}


def constants(proto: onnx.ModelProto) -> dict[str, tuple[Any, ...]]:
    """Type, shape, hash and texts of the constants of the main graph."""
    found = {tensor.name: tensor_contents(tensor, tensor) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = tensor_contents(node.attribute[0].t, node)
    return found


def tensor_contents(tensor: onnx.TensorProto, described_by: Any) -> tuple[Any, ...]:
    values = numpy_helper.to_array(tensor)
    raw = repr(values.tolist()).encode() if values.dtype == object else values.tobytes()
    texts = (described_by.doc_string, entries(described_by))
    return (tensor.data_type, tuple(tensor.dims), hashlib.sha256(raw).hexdigest(), texts)
