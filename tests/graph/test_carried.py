"""`pi05c.graph.carried`: what onnx-graphsurgeon cannot represent goes through load and save, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import run_proto
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import load, model_from_proto, save, to_whole_proto
from pi05c.graph.text import canonical_text

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])


def model(
    *nodes: onnx.NodeProto,
    inputs: Any = (X,),
    outputs: Any = (Y,),
    weights: Any = (),
    functions: Any = (),
    opset: int = 21,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "g", inputs, outputs, list(weights))
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=domains, functions=list(functions), ir_version=10)


def through(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    loaded = model_from_proto(copy)
    assert canonical_text(loaded.graph)
    return to_whole_proto(loaded)


@pytest.mark.parametrize("kind", ["FLOATS", "INTS", "STRINGS"])
def test_an_empty_list_keeps_its_type(kind: str) -> None:
    node = helper.make_node("Odd", ["x"], ["y"], domain="local")
    node.attribute.append(AttributeProto(name="items", type=AttributeProto.AttributeType.Value(kind)))
    assert list(through(model(node)).graph.node[0].attribute) == list(node.attribute)


def test_bytes_that_are_no_text_and_other_attributes_without_a_place() -> None:
    node = helper.make_node("Odd", ["x"], ["y"], domain="local", raw=b"\xff\xfe", many=[b"\xff", b"a"])
    node.attribute.append(AttributeProto(name="type", type=AttributeProto.TYPE_PROTO, tp=X.type))
    tensors = [numpy_helper.from_array(np.ones(3, np.float32))]
    node.attribute.append(AttributeProto(name="tensors", type=AttributeProto.TENSORS, tensors=tensors))
    after = through(model(node)).graph.node[0]
    assert sorted(after.attribute, key=lambda a: a.name) == sorted(node.attribute, key=lambda a: a.name)


def test_a_sparse_constant() -> None:
    """`Constant` with `sparse_value`."""
    values, places = helper.make_tensor("v", 1, [1], [3.0]), helper.make_tensor("i", 7, [1], [1])
    sparse = helper.make_node(
        "Constant", [], ["s"], sparse_value=helper.make_sparse_tensor(values, places, [3])
    )
    proto = model(sparse, helper.make_node("Add", ["x", "s"], ["y"]))
    x = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(run_proto(through(proto), {"x": x})[0], [[0, 3, 0]] * 2)


def test_a_sparse_initializer_is_refused() -> None:
    values, places = helper.make_tensor("s", 1, [1], [3.0]), helper.make_tensor("i", 7, [1], [1])
    proto = model(helper.make_node("Add", ["x", "s"], ["y"]))
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3]))
    with pytest.raises(Pi05cError, match="initializer 's' is sparse"):
        through(proto)


@pytest.mark.parametrize("size", [2, 600])
def test_strings(size: int) -> None:
    """ONNX stores them in a field of their own, however many there are."""
    weight = helper.make_tensor("s", TensorProto.STRING, [size], [f"ä{i}".encode() for i in range(size)])
    out = helper.make_tensor_value_info("y", TensorProto.STRING, [size])
    proto = model(helper.make_node("Identity", ["s"], ["y"]), inputs=[], outputs=[out], weights=[weight])
    assert list(through(proto).graph.initializer[0].string_data) == list(weight.string_data)


def test_texts_and_metadata_of_everything() -> None:
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    proto = model(
        helper.make_node("Add", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"]), weights=[weight]
    )
    graph = proto.graph
    graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 3]))
    holders: list[Callable[[onnx.GraphProto], Any]] = [
        lambda g: g,
        lambda g: g.input[0],
        lambda g: g.output[0],
        lambda g: g.value_info[0],
        lambda g: g.initializer[0],
        lambda g: g.node[1],
    ]
    for index, holder in enumerate(holders):
        holder(graph).doc_string = f"text {index}"
        holder(graph).metadata_props.add(key="key", value=f"value {index}")
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.quantization_annotation.add(tensor_name="h").quant_parameter_tensor_names.add(
        key="SCALE_TENSOR", value="w"
    )
    after = through(proto).graph
    for index, holder in enumerate(holders):
        assert (holder(after).doc_string, holder(after).metadata_props[0].value) == (
            f"text {index}",
            f"value {index}",
        )
    assert after.input[0] == graph.input[0]
    assert list(after.quantization_annotation) == list(graph.quantization_annotation)


def test_functions_with_overloads_and_defaults() -> None:
    """Two functions of one name differ in their overload, and so do their calls."""
    functions = []
    for overload, op in (("a", "Relu"), ("b", "Neg")):
        nodes = [helper.make_node(op, ["p"], ["q"], doc_string="inner")]
        function = helper.make_function("local", "F", ["p"], ["q"], nodes, [helper.make_opsetid("", 21)])
        function.overload = overload
        function.metadata_props.add(key="key", value=overload)
        function.attribute_proto.append(helper.make_attribute("alpha", 0.5))
        functions.append(function)
    calls = [
        helper.make_node("F", ["x"], ["h"], domain="local"),
        helper.make_node("F", ["h"], ["y"], domain="local"),
    ]
    calls[0].overload, calls[1].overload = "a", "b"
    after = through(model(*calls, functions=functions))
    assert [node.overload for node in after.graph.node] == ["a", "b"]
    assert list(after.functions) == functions


OPTIONAL = helper.make_value_info("y", helper.make_optional_type_proto(X.type))
MAP = helper.make_value_info("y", helper.make_map_type_proto(TensorProto.INT64, X.type))


@pytest.mark.parametrize(("output", "named"), [(OPTIONAL, "optional"), (MAP, "map")])
def test_values_that_are_no_tensors_are_refused(output: onnx.ValueInfoProto, named: str) -> None:
    with pytest.raises(Pi05cError, match=f"'y' is of type {named}"):
        through(model(helper.make_node("Odd", ["x"], ["y"], domain="local"), outputs=[output]))


def _graphs(node: onnx.NodeProto) -> None:
    node.attribute.append(AttributeProto(name="a", type=AttributeProto.GRAPHS))


def _twice(node: onnx.NodeProto) -> None:
    node.attribute.extend([helper.make_attribute("a", 1), helper.make_attribute("a", 2)])


def _untyped(node: onnx.NodeProto) -> None:
    node.attribute.append(AttributeProto(name="a", i=1))


def _other_type(node: onnx.NodeProto) -> None:
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "b", [], [])
    node.attribute.append(AttributeProto(name="a", type=AttributeProto.INT, g=body))


def _empty(node: onnx.NodeProto) -> None:
    node.attribute.append(AttributeProto(name="a", type=AttributeProto.GRAPH))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_graphs, "list of graphs"),
        (_twice, "there twice"),
        (_untyped, "no type"),
        (_other_type, "another type"),
        (_empty, "no value"),
    ],
)
def test_attributes_that_cannot_be_are_refused(spoil: Callable[[onnx.NodeProto], None], named: str) -> None:
    node = helper.make_node("Odd", ["x"], ["y"], "n", domain="local")
    spoil(node)
    with pytest.raises(Pi05cError, match=f"attribute 'a' of Odd 'n' .*{named}"):
        through(model(node))


def test_equal_names_in_sibling_branches_keep_their_shapes() -> None:
    """onnx's inference lends the values of a shape to whatever has its name in another branch."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m", 4]),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    bodies = (
        [helper.make_node("Shape", ["x"], ["t"]), helper.make_node("Reshape", ["x", "t"], ["r"])],
        [
            helper.make_node("Unsqueeze", ["x", "axes"], ["t"]),
            helper.make_node("Squeeze", ["t", "axes"], ["r"]),
        ],
    )
    result = helper.make_tensor_value_info("r", TensorProto.FLOAT, None)
    branches = [helper.make_graph(nodes, "b", [], [result]) for nodes in bodies]
    choice = helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    axes = numpy_helper.from_array(np.array([1]), "axes")
    loaded = model_from_proto(model(choice, inputs=inputs, outputs=[out], weights=[axes])).graph.nodes[0]
    shapes = [loaded.attrs[name].nodes[0].outputs[0].shape for name in ("then_branch", "else_branch")]
    assert [len(shape) for shape in shapes] == [1, 4]
    assert [loaded.attrs[name].nodes[0].outputs[0].name for name in ("then_branch", "else_branch")] == [
        "t",
        "t",
    ]


def test_external_data_of_a_function_is_found(tmp_path: Any) -> None:
    """Its constants move with the model like any other weight."""
    from pi05c.graph.io import load, save

    weight = numpy_helper.from_array(np.arange(600, dtype=np.float32).reshape(200, 3), "w")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("ReduceMean", ["w"], ["m"], keepdims=0),
        helper.make_node("Add", ["p", "m"], ["q"]),
    ]
    function = helper.make_function("local", "F", ["p"], ["q"], nodes, [helper.make_opsetid("", 21)])
    proto = model(helper.make_node("F", ["x"], ["y"], domain="local"), functions=[function])
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    onnx.save(proto, tmp_path / "first" / "m.onnx")
    save(load(tmp_path / "first" / "m.onnx"), tmp_path / "second" / "m.onnx")
    assert (tmp_path / "second" / "m.onnx.data").is_file()
    save(load(tmp_path / "second" / "m.onnx"), tmp_path / "third" / "m.onnx")
    stored = (
        onnx.load(tmp_path / "third" / "m.onnx", load_external_data=False).functions[0].node[0].attribute[0].t
    )
    assert (
        numpy_helper.to_array(stored, str(tmp_path / "third")).tolist()
        == numpy_helper.to_array(weight).tolist()
    )


def test_a_size_below_zero_is_unknown() -> None:
    """Some write -1 for what only a run knows; onnx's inference ends the process over one that is sliced."""
    first, last, axis = (
        numpy_helper.from_array(np.array([n]), name) for n, name in ((0, "f"), (2, "l"), (1, "a"))
    )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, -1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    node = helper.make_node("Slice", ["x", "f", "l", "a"], ["y"])
    loaded = model_from_proto(model(node, inputs=[x], outputs=[out], weights=[first, last, axis]))
    assert loaded.graph.inputs[0].shape[0] == 2
    assert not isinstance(loaded.graph.inputs[0].shape[1], int)


@pytest.mark.parametrize("kind", [0, 99])
def test_a_type_that_onnx_lacks(kind: int) -> None:
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    weight.data_type = kind
    with pytest.raises(Pi05cError, match="initializer 'w' is of a type that ONNX does not have"):
        through(model(helper.make_node("Add", ["x", "w"], ["y"]), weights=[weight]))
    proto = model(helper.make_node("Relu", ["x"], ["y"]))
    proto.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(Pi05cError, match="tensor 'x' is of a type that ONNX does not have, 99"):
        through(proto)


def test_a_constant_that_holds_less_than_its_shape() -> None:
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    weight.raw_data = weight.raw_data[:8]
    with pytest.raises(
        Pi05cError, match=r"initializer 'w' of type float32 and shape \[3\] does not hold the values of one"
    ):
        through(model(helper.make_node("Add", ["x", "w"], ["y"]), weights=[weight]))


def test_what_the_size_of_an_input_denotes_is_not_handed_on(tmp_path: Path) -> None:
    """Inference gives it to an output that states no type, and would not the next time, when it states one."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    nodes = [
        helper.make_node("SequenceConstruct", ["x"], ["several"]),
        helper.make_node("SequenceAt", ["several", "zero"], ["y"]),
    ]
    zero = numpy_helper.from_array(np.array(0), "zero")
    graph = helper.make_graph(nodes, "g", [x], [onnx.ValueInfoProto(name="y")], [zero])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    paths = [tmp_path / f"{count}.onnx" for count in range(3)]
    onnx.save(proto, paths[0])
    for before, after in pairwise(paths):
        save(load(before), after)
    assert paths[1].read_bytes() == paths[2].read_bytes()
    saved = onnx.load(paths[2]).graph
    assert saved.input[0].type.tensor_type.shape.dim[0].denotation == "DATA_BATCH"
    assert not saved.output[0].type.tensor_type.shape.dim[0].denotation
