"""Graphs in which something is wrong: what a hand edit, a broken exporter or a damaged file leaves."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

from random_graphs.core import all_nodes


def spoiled(proto: onnx.ModelProto, rng: random.Random) -> onnx.ModelProto:
    """A copy with one to three things changed, which may leave it valid."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(_WAYS)(copy, rng)
    return copy


def _graph(proto: onnx.ModelProto, rng: random.Random) -> onnx.GraphProto:
    bodies = [a.g for node in all_nodes(proto.graph) for a in node.attribute if a.HasField("g")]
    return rng.choice([proto.graph, proto.graph, *bodies])


def _node(proto: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto | None:
    nodes = list(all_nodes(proto.graph))
    return rng.choice(nodes) if nodes else None


def _name(proto: onnx.ModelProto, rng: random.Random) -> str:
    names = [name for node in all_nodes(proto.graph) for name in (*node.input, *node.output)]
    return rng.choice([*names, "", "nowhere"])


def _drop_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(proto, rng)
    if graph.node:
        del graph.node[rng.randrange(len(graph.node))]


def _repeat_node(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(proto, rng)
    if graph.node:
        graph.node.add().CopyFrom(rng.choice(list(graph.node)))


def _shuffle_nodes(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(proto, rng)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend(rng.sample(nodes, len(nodes)))


def _operator(proto: onnx.ModelProto, rng: random.Random) -> None:
    if node := _node(proto, rng):
        kinds = [other.op_type for other in all_nodes(proto.graph)]
        node.op_type = rng.choice(
            [*kinds, *("Cast", "Loop", "If", "Constant", "Softmax", "Gemm", "Nothing", "")]
        )
        node.domain = rng.choice(("", "", "", "ai.onnx", "nowhere"))


def _inputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    if node := _node(proto, rng):
        names = list(node.input)
        way = rng.choice(("drop", "add", "other", "all", "shuffle"))
        if way == "drop" and names:
            names.pop(rng.randrange(len(names)))
        elif way == "add":
            names.append(_name(proto, rng))
        elif way == "other" and names:
            names[rng.randrange(len(names))] = _name(proto, rng)
        elif way == "all":
            names = []
        else:
            rng.shuffle(names)
        node.input[:] = names


def _outputs(proto: onnx.ModelProto, rng: random.Random) -> None:
    if node := _node(proto, rng):
        names = list(node.output)
        way = rng.choice(("drop", "add", "other"))
        if way == "drop" and names:
            names.pop()
        elif way == "add":
            names.append(rng.choice(("more", _name(proto, rng))))
        elif names:
            names[rng.randrange(len(names))] = _name(proto, rng)
        node.output[:] = names


def _attribute(proto: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in all_nodes(proto.graph) if node.attribute]
    if not nodes:
        return
    node = rng.choice(nodes)
    place = rng.randrange(len(node.attribute))
    attribute = node.attribute[place]
    way = rng.choice(("drop", "value", "type", "rename", "other"))
    if way == "drop":
        del node.attribute[place]
    elif way == "value":
        attribute.i, attribute.f = (
            rng.choice((-1, 0, 7, 2**40, -(2**63))),
            rng.choice((0.0, float("nan"), 1e38)),
        )
        attribute.ints[:] = rng.choice(([], [0], [-9], [2**40], [1, 0, 2], [5, 5, 5, 5, 5]))
    elif way == "type":
        attribute.type = rng.choice(list(AttributeProto.AttributeType.values()))
    elif way == "rename":
        attribute.name = rng.choice(("axis", "to", "value", "body", "nothing", ""))
    else:
        value: Any = rng.choice((1, 1.5, "text", [1], [1.5], ["a"]))
        node.attribute[place].CopyFrom(helper.make_attribute(attribute.name or "a", value))


def _weight(proto: onnx.ModelProto, rng: random.Random) -> None:
    weights = [*_graph(proto, rng).initializer]
    weights += [a.t for node in all_nodes(proto.graph) for a in node.attribute if a.HasField("t")]
    if not weights:
        return
    tensor = rng.choice(weights)
    way = rng.choice(("bytes", "dims", "type", "name", "external", "both"))
    if way == "bytes":
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif way == "dims":
        tensor.dims[:] = rng.choice(([], [0], [-1], [2**40], [2**62, 2**62], [3, 3]))
    elif way == "type":
        tensor.data_type = rng.choice((0, 1, 7, 8, 9, 10, 14, 16, 17, 22, 23, 99))
    elif way == "name":
        tensor.name = _name(proto, rng)
    elif way == "external":
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in rng.sample(
            [
                ("location", "model.onnx"),
                ("location", "nowhere"),
                ("offset", "-5"),
                ("offset", "x"),
                ("length", "99999999999"),
            ],
            3,
        ):
            tensor.external_data.add(key=key, value=value)
    else:
        tensor.float_data.append(1.0)


def _value(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(proto, rng)
    values = [*graph.input, *graph.output, *graph.value_info]
    if not values:
        return
    value = rng.choice(values)
    way = rng.choice(("type", "dims", "name", "none", "sequence"))
    if way == "type":
        value.type.tensor_type.elem_type = rng.choice((0, 1, 7, 8, 9, 10, 16, 17, 23, 99))
    elif way == "dims":
        shape = value.type.tensor_type.shape
        size = rng.choice((-1, 0, 3, 2**40))
        if shape.dim and rng.random() < 0.5:
            rng.choice(list(shape.dim)).dim_value = size
        else:
            shape.dim.add().dim_value = size
    elif way == "name":
        value.name = _name(proto, rng)
    elif way == "none":
        value.ClearField("type")
    else:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1


def _interface(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(proto, rng)
    held: Any = rng.choice((graph.input, graph.output, graph.initializer))
    if held and rng.random() < 0.5:
        del held[rng.randrange(len(held))]
    elif held:
        held.add().CopyFrom(rng.choice(list(held)))


def _header(proto: onnx.ModelProto, rng: random.Random) -> None:
    way = rng.choice(("opset", "none", "domain", "ir", "twice"))
    if way == "opset" and proto.opset_import:
        proto.opset_import[0].version = rng.choice((-1, 0, 1, 5, 11, 16, 30, 2**40))
    elif way == "none":
        del proto.opset_import[:]
    elif way == "domain" and proto.opset_import:
        proto.opset_import[0].domain = rng.choice(("ai.onnx", "nowhere"))
    elif way == "twice":
        proto.opset_import.append(helper.make_opsetid("", rng.choice((17, 23))))
    else:
        proto.ir_version = rng.choice((0, 1, 3, 99))


def _empty(proto: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(proto, rng)
    field = rng.choice(("node", "input", "output", "initializer", "name"))
    graph.ClearField(field)


_WAYS: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    *(
        _drop_node,
        _repeat_node,
        _shuffle_nodes,
        _operator,
        _inputs,
        _inputs,
        _outputs,
        _attribute,
        _attribute,
    ),
    *(_weight, _weight, _value, _value, _interface, _header, _empty),
)

__all__ = ["spoiled"]
