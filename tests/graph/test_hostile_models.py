"""Models that lie, and models that ask for more than they hold: refused in one sentence, before anything is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pi05c.graph.check import problems
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import load, save
from pi05c.graph.text import canonical_text
from pi05c.graph.weights import weight_of
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run

FILE = "weights.bin"
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)


def value(name: str, shape: Any = (2, 4), dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    """`y` of `x`, both float32 [2, 4]."""
    graph = helper.make_graph(nodes, "graph", [value("x")], [value("y")], weights or [])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions or [])


def linear(weight: onnx.TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("MatMul", ["x", "w"], ["y"], name="project")], [weight])


def external(
    name: str = "w", shape: Any = (4, 4), dtype: int = TensorProto.FLOAT, **entries: Any
) -> onnx.TensorProto:
    """A tensor whose bytes lie in a file."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, entry in {"location": FILE, **entries}.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def inline(shape: Any = (4, 4), dtype: int = TensorProto.FLOAT, size: int = 64) -> onnx.TensorProto:
    return TensorProto(name="w", data_type=dtype, dims=shape, raw_data=bytes(size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder with a file of 64 bytes in it; another lies beside the folder."""
    made = tmp_path / "model"
    (made / "sub").mkdir(parents=True)
    for place in (made, tmp_path):
        (place / FILE).write_bytes(WEIGHT.tobytes())
    return made


def refused(folder: Path, proto: onnx.ModelProto | bytes) -> str:
    """What is said of a model that is not loaded."""
    path = folder / "model.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    with pytest.raises(Pi05cError) as caught:
        load(path)
    assert len(str(caught.value)) < 1500
    return str(caught.value)


# Where weights lie


@pytest.mark.parametrize(
    "location",
    [f"../{FILE}", f"sub/../../{FILE}", f"sub/../{FILE}", "/etc/passwd", "/", "", f"{FILE}\0"],
)
def test_weights_outside_of_the_folder(folder: Path, location: str) -> None:
    assert "outside the model's folder" in refused(folder, linear(external(location=location)))


def test_weights_in_a_subfolder_are_fine(folder: Path) -> None:
    (folder / FILE).rename(folder / "sub" / FILE)
    path = folder / "model.onnx"
    path.write_bytes(linear(external(location=f"sub/{FILE}")).SerializeToString())
    np.testing.assert_array_equal(weight_of(load(path).graph.nodes[0].inputs[1]).load(), WEIGHT)


@pytest.mark.parametrize("linked", [FILE, f"sub/{FILE}"])
def test_weights_behind_a_link(folder: Path, linked: str) -> None:
    (folder / "sub").rmdir()
    (folder / FILE).unlink()
    (folder / linked.split("/")[0]).symlink_to(folder.parent / FILE if linked == FILE else folder.parent)
    assert "is a symbolic link" in refused(folder, linear(external(location=linked)))


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("sub", "is no file"),
        (".", "is no file"),
        ("absent", "does not exist"),
        (f"{FILE}/x", "does not exist"),
        ("n" * 5000, "too long"),
    ],
)
def test_what_is_no_file(folder: Path, location: str, said: str) -> None:
    assert said in refused(folder, linear(external(location=location)))


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    assert "is no file" in refused(folder, linear(external(location="pipe")))
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(Pi05cError, match="a pipe or a device"):
        load(folder / "model.onnx")


def test_a_device_is_not_read(folder: Path) -> None:
    (folder / "model.onnx").symlink_to("/dev/zero")
    with pytest.raises(Pi05cError, match="a pipe or a device"):
        load(folder / "model.onnx")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": -4}, "no number of bytes"),
        ({"offset": "abc"}, "no number of bytes"),
        ({"offset": "1e3"}, "no number of bytes"),
        ({"offset": "9" * 5000}, "no number of bytes"),
        ({"offset": 2**62}, "truncated"),
        ({"offset": 1}, "truncated"),
        ({"length": -64}, "no number of bytes"),
        ({"length": 60}, "said to hold 60"),
        ({"length": 2**62}, "said to hold"),
    ],
)
def test_ranges_that_no_file_has(folder: Path, entries: dict[str, Any], said: str) -> None:
    assert said in refused(folder, linear(external(**entries)))


def test_a_truncated_file(folder: Path) -> None:
    (folder / FILE).write_bytes(bytes(60))
    assert "truncated" in refused(folder, linear(external()))


def test_a_file_that_holds_more_is_fine(folder: Path) -> None:
    (folder / FILE).write_bytes(WEIGHT.tobytes() + bytes(10_000))
    (folder / "model.onnx").write_bytes(linear(external()).SerializeToString())
    save(load(folder / "model.onnx"), folder / "saved.onnx")
    assert (folder / "saved.onnx").stat().st_size < 1000


@pytest.mark.parametrize("place", ["input", "output"])
def test_a_type_that_is_of_no_kind_is_none(folder: Path, place: str) -> None:
    """Found by atheris: onnx-graphsurgeon takes such a type for an opaque one."""
    proto = model([helper.make_node("Relu", ["x"], ["y"])], [])
    getattr(proto.graph, place)[0].type.Clear()
    getattr(proto.graph, place)[0].type.SetInParent()
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    loaded = load(folder / "model.onnx")
    assert canonical_text(loaded.graph).startswith(
        "inputs: %x: " + ("?[?]" if place == "input" else "float32")
    )
    save(loaded, folder / "saved.onnx")


def test_overlapping_ranges(folder: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "b"], ["y"])]
    (folder / FILE).write_bytes(bytes(128))
    proto = model(nodes, [external("a"), external("b", offset=32)])
    assert "'a' and 'b' overlap" in refused(folder, proto)
    proto.graph.initializer[1].CopyFrom(external("b"))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    load(folder / "model.onnx")  # the same range is one weight that both share


def test_weights_that_change_while_they_are_used(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(linear(external()).SerializeToString())
    loaded = load(folder / "model.onnx")
    weight = weight_of(loaded.graph.nodes[0].inputs[1])
    with (folder / FILE).open("r+b") as file:
        file.truncate(8)
    with pytest.raises(Pi05cError, match="changed while it was used"):
        weight.load()
    with pytest.raises(Pi05cError, match="changed while it was used"):
        save(loaded, folder / "saved.onnx")
    assert not list(folder.glob("*saved*"))


def test_weights_whose_file_is_gone_or_replaced_are_those_that_were_loaded(folder: Path) -> None:
    """As when somebody exports anew, by rename, while the old model is compiled."""
    large = np.arange(4096, dtype=np.float32).reshape(4, 1024)
    (folder / FILE).write_bytes(large.tobytes())
    proto = linear(external(shape=large.shape))
    proto.graph.output[0].CopyFrom(value("y", (2, 1024)))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    for replaced in (True, False):
        loaded = load(folder / "model.onnx")
        (folder / "new").write_bytes(bytes(len(large.tobytes())))
        (folder / "new").replace(folder / FILE) if replaced else (folder / FILE).unlink()
        save(loaded, folder / "saved.onnx")
        saved = weight_of(load(folder / "saved.onnx").graph.nodes[0].inputs[1])
        np.testing.assert_array_equal(saved.load(), large)
        (folder / FILE).write_bytes(large.tobytes())


# What tensors hold


@pytest.mark.parametrize(
    "shape", [(-4, 4), (-4, -4), (2**62, 4), (2**31, 2**31, 2**31), (0, 2**62), (1,) * 300, (5, 4), (0, 4)]
)
@pytest.mark.parametrize("make", [inline, external])
def test_sizes_that_are_not_those_of_the_bytes(
    folder: Path, make: Callable[..., onnx.TensorProto], shape: Any
) -> None:
    tensor = make(shape=shape)
    if make is external and shape == (0, 4):
        tensor.external_data.add(key="length", value="64")
    refused(folder, linear(tensor))


@pytest.mark.parametrize("dtype", [TensorProto.UNDEFINED, TensorProto.STRING, 99, -1])
@pytest.mark.parametrize("make", [inline, external])
def test_types_that_are_none(folder: Path, make: Callable[..., onnx.TensorProto], dtype: int) -> None:
    assert "holds texts" in (said := refused(folder, linear(make(dtype=dtype)))) or "element type" in said


def test_tensors_in_places_that_are_easily_forgotten(folder: Path) -> None:
    outside = external(location=f"../{FILE}")
    constant = helper.make_node("Constant", [], ["w"], value=outside)
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert "outside the model's folder" in refused(folder, model([constant, multiply]))
    bodies = {
        name: helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], [name])], name, [], [value(name)], [outside]
        )
        for name in ("then_branch", "else_branch")
    }
    condition = numpy_helper.from_array(np.array(True), "c")
    branch = model([helper.make_node("If", ["c"], ["y"], **bodies)], [condition])
    assert "outside the model's folder" in refused(folder, branch)
    sparse = model([multiply])
    sparse.graph.sparse_initializer.add().values.name = "w"
    assert "'w' is sparse" in refused(folder, sparse)


def test_a_size_of_minus_one_is_one_that_may_vary(folder: Path) -> None:
    """As paddle2onnx writes it."""
    proto = model([helper.make_node("Neg", ["x"], ["y"])])
    for declared in (*proto.graph.input, *proto.graph.output):
        declared.type.tensor_type.shape.dim[0].dim_value = -1
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    loaded = load(folder / "model.onnx")
    assert problems(loaded) == []
    assert not isinstance(loaded.graph.inputs[0].shape[0], int)


# Nodes


@pytest.mark.parametrize(
    ("node", "said"),
    [
        (helper.make_node("MatMul", ["x"], ["y"], name="n"), "MatMul 'n' has 1 input, where its operator has 2"),
        (helper.make_node("MatMul", ["x", "x", "x"], ["y"], name="n"), "has 3 inputs"),
        (helper.make_node("MatMul", ["x", ""], ["y"], name="n"), "lacks its input 'B'"),
        (helper.make_node("Softmax", [], ["y"], name="n"), "has 0 inputs"),
        (helper.make_node("Identity", ["x"], ["y", "z"], name="n"), "has 2 outputs"),
        (helper.make_node("Cast", ["x"], ["y"], name="n"), "lacks its attribute 'to'"),
        (helper.make_node("Cast", ["x"], ["y"], name="n", to="FLOAT"), "is of type STRING, where its operator takes INT"),
        (helper.make_node("Loop", ["", "", "x"], ["y"], name="n"), "lacks its attribute 'body'"),
        (helper.make_node("Constant", [], ["y"], name="n"), "does not hold one value"),
        (helper.make_node("Constant", [], ["y"], value_int=1, value_float=1.0, name="n"), "does not hold one value"),
        (helper.make_node("Constant", [], ["y"], name="n", value="text"), "is of type STRING, where its operator takes TENSOR"),
        (helper.make_node("Nonsense", ["x"], ["y"], name="n"), "has no operator 'Nonsense' at opset 21"),
        (helper.make_node("", ["x"], ["y"], name="n"), "cannot be computed"),
    ],
)  # fmt: skip
def test_nodes_that_are_not_of_their_operator(folder: Path, node: onnx.NodeProto, said: str) -> None:
    assert said in refused(folder, model([node]))


def test_texts_that_go_in(folder: Path) -> None:
    proto = model([helper.make_node("Identity", ["x"], ["y"], name="n")])
    for each in (*proto.graph.input, *proto.graph.output):
        each.type.tensor_type.elem_type = TensorProto.STRING
    assert "'x' holds texts" in refused(folder, proto)


def test_a_scan_that_has_an_axis_of_a_batch(folder: Path) -> None:
    """That of opset 8 gives its body other tensors than later ones."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["e"], ["r"])], "body", [value("e", [4])], [value("r", [4])]
    )
    proto = model([helper.make_node("Scan", ["", "x"], ["y"], name="n", num_scan_inputs=1, body=body)])
    proto.opset_import[0].version = 8
    assert "Scan 'n' is of opset 8" in refused(folder, proto)


@pytest.mark.parametrize("version", [-5, 0, 1, 6, 99, 2**62])
def test_opsets_that_nobody_knows(folder: Path, version: int) -> None:
    proto = linear(numpy_helper.from_array(WEIGHT, "w"))
    proto.opset_import[0].version = version
    assert f"is of opset {version}" in refused(folder, proto)


def test_names_that_are_no_text(folder: Path) -> None:
    text = model(
        [helper.make_node("Neg", ["x"], ["MIDDLE"], name="NODE"), helper.make_node("Abs", ["MIDDLE"], ["y"])]
    )
    for name in (b"NODE", b"MIDDLE", b"Neg"):
        broken = text.SerializeToString().replace(name, b"\xff\xfe" + name[2:])
        assert "is not UTF-8 text" in refused(folder, broken)


def test_long_names_are_cut_in_messages(folder: Path) -> None:
    assert "aaa...'" in refused(
        folder, model([helper.make_node("MatMul", ["x"], ["y"], name="a" * 1_000_000)])
    )


@pytest.mark.parametrize(
    "nodes",
    [
        [helper.make_node("Add", ["x", "y"], ["y"], name="n")],
        [helper.make_node("Add", ["x", "b"], ["a"], name="n"), helper.make_node("Neg", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["y"])],
    ],
)  # fmt: skip
def test_cycles(folder: Path, nodes: list[onnx.NodeProto]) -> None:
    assert "has a cycle" in refused(folder, model(nodes))


def test_types_that_do_not_fit_are_refused_before_any_pass(folder: Path) -> None:
    for node in (
        helper.make_node("Transpose", ["x"], ["y"], name="n", perm=[5, 7]),
        helper.make_node("Concat", ["x", "x"], ["y"], name="n", axis=99),
        helper.make_node("Cast", ["x"], ["y"], name="n", to=99),
        helper.make_node("Einsum", ["x", "x"], ["y"], name="n", equation="zz->"),
        helper.make_node("Neg", ["nowhere"], ["y"], name="n"),
    ):
        (folder / "model.onnx").write_bytes(model([node]).SerializeToString())
        loaded = load(folder / "model.onnx")
        with pytest.raises(Pi05cError, match="is not valid ONNX"):
            run(loaded, parse("exact", PRESETS))


# Bombs


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["a"], ["b"], nodes, opsets)


def call(name: str, source: str, result: str) -> onnx.NodeProto:
    return helper.make_node(name, [source], [result], domain="own")


def test_functions_that_call_themselves(folder: Path) -> None:
    alone = [function("F", [call("F", "a", "b")])]
    both = [function("F", [call("G", "a", "b")]), function("G", [call("F", "a", "b")])]
    for functions in (alone, both):
        assert "calls itself" in refused(folder, model([call("F", "x", "y")], functions=functions))


def test_functions_that_pass_for_operators(folder: Path) -> None:
    for name in ("Gelu", "Unheard"):
        own = function(name, [helper.make_node("Neg", ["a"], ["b"])])
        own.domain = ""
        proto = model([helper.make_node(name, ["x"], ["y"])], functions=[own])
        assert "is of ONNX's own domain" in refused(folder, proto)


def test_functions_that_unfold_to_more_than_anybody_holds(folder: Path) -> None:
    functions = [function("F0", [helper.make_node("Neg", ["a"], ["b"])])]
    for level in range(1, 60):
        below = f"F{level - 1}"
        functions.append(function(f"F{level}", [call(below, "a", "t"), call(below, "t", "b")]))
    assert "unfold to" in refused(folder, model([call("F59", "x", "y")], functions=functions))


def test_functions_that_call_each_other_too_deep(folder: Path) -> None:
    functions = [function("F0", [helper.make_node("Neg", ["a"], ["b"])])]
    functions += [function(f"F{level}", [call(f"F{level - 1}", "a", "b")]) for level in range(1, 2000)]
    for order in (functions, functions[::-1]):
        assert "levels deep" in refused(folder, model([call("F1999", "x", "y")], functions=order))


def test_bodies_in_bodies_without_end(folder: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2]) + _varint(len(content)) + content

    graph = b""
    for _ in range(5000):
        attribute = field(1, b"then_branch") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute))
    assert "cannot be read as an ONNX model" in refused(folder, field(7, graph) + b"\x08\x0a")


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


@pytest.mark.parametrize(
    "big",
    [
        helper.make_node("ConstantOfShape", ["sizes"], ["big"]),
        helper.make_node("Expand", ["one", "sizes"], ["big"]),
        helper.make_node("Tile", ["one", "sizes"], ["big"]),
        helper.make_node("OneHot", ["index", "sizes", "values"], ["big"]),
    ],
    ids=lambda node: node.op_type,
)
def test_folding_constants_allocates_no_more_than_they_warrant(folder: Path, big: onnx.NodeProto) -> None:
    weights = {
        "sizes": np.array([2**33]),
        "one": np.ones(1, np.float32),
        "index": np.array([0]),
        "values": np.array([0, 1], np.float32),
    }
    nodes = [
        big,
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Add", ["x", "sum"], ["y"]),
    ]
    proto = model(nodes, [numpy_helper.from_array(array, name) for name, array in weights.items()])
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    loaded = load(folder / "model.onnx")
    run(loaded, parse("canonicalize", PRESETS))
    assert [node.op for node in loaded.graph.nodes] == [big.op_type, "ReduceSum", "Add"]
