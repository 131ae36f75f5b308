"""Generated models through load and save: nothing that they hold is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from contents import contents, tensor_contents
from hypothesis import given
from hypothesis import strategies as st
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
