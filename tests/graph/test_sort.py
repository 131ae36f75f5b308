"""`pi05c.graph.sort`: topological order without recursion, stable, aware of captures (CASES 1)."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
from models import model_proto, small_model
from onnx import TensorProto, helper

from pi05c.graph.check import problems
from pi05c.graph.errors import Pi05cError
from pi05c.graph.io import model_from_proto
from pi05c.graph.sort import captured_by, constants_first, sort_graph, sort_proto

LEVELS = 5_000

BRANCH = """
    choose (float[2] x, bool c) => (float[2] y) {
      y = If(c) <
        then_branch = with_bias () => (float[2] a) { a = Add(shared, w) },
        else_branch = without () => (float[2] b) { b = Neg(shared) }
      >
      shared = Relu(x)
    }"""


def test_diamond_listed_backward() -> None:
    model = small_model("d (float[2] x) => (float[2] y) { y = Mul(t, n) n = Neg(t) t = Identity(x) }")
    assert [node.op for node in model.graph.nodes] == ["Identity", "Neg", "Mul"]
    assert problems(model) == []


def _levels(count: int) -> onnx.ModelProto:
    """`count` levels of two nodes, each reading both of the level before, listed from the last to the first."""
    nodes, level = [], ["x", "x"]
    for index in range(count):
        outputs = [f"a{index}", f"b{index}"]
        nodes += [helper.make_node("Add", level, [output], name=f"make_{output}") for output in outputs]
        level = outputs
    nodes.append(helper.make_node("Add", level, ["y"], name="make_y"))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph(nodes[::-1], "levels", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_levels_of_fully_connected_nodes_reversed() -> None:
    model = model_from_proto(_levels(LEVELS))
    model.graph.nodes.reverse()
    sort_graph(model.graph)
    place = {node.outputs[0].name: index for index, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        for tensor in node.inputs:
            assert place.get(tensor.name, -1) < place[node.outputs[0].name]


def test_work_is_linear() -> None:
    calls = []
    for count in (LEVELS // 16, LEVELS // 4):
        proto = _levels(count)
        seen = []
        sys.setprofile(lambda frame, event, argument, seen=seen: seen.append(event == "call"))
        try:
            sort_proto(proto.graph)
        finally:
            sys.setprofile(None)
        calls.append(sum(seen))
    assert calls[1] < 6 * calls[0]  # four times the nodes: linear is 4, quadratic 16


def test_a_sorted_graph_stays_as_it_is() -> None:
    proto = model_proto("two (float[2] x) => (float[2] y, float[2] z) { z = Neg(x) a = Relu(x) y = Exp(a) }")
    before = proto.SerializeToString()
    sort_proto(proto.graph)
    assert proto.SerializeToString() == before
    model = model_from_proto(proto)
    nodes = list(model.graph.nodes)
    sort_graph(model.graph)
    assert all(old is new for old, new in zip(nodes, model.graph.nodes, strict=True))


def test_only_what_must_move_moves() -> None:
    model = small_model("m (float[2] x) => (float[2] y) { a = Relu(x) c = Add(a, b) b = Neg(x) y = Exp(c) }")
    assert [node.outputs[0].name for node in model.graph.nodes] == ["a", "b", "c", "y"]


def test_what_a_body_captures_comes_first() -> None:

    model = small_model(BRANCH, {"w": np.ones(2, np.float32)})
    assert [node.op for node in model.graph.nodes] == ["Relu", "If"]
    assert {tensor.name for tensor in captured_by(model.graph.nodes[1])} >= {"shared", "w"}
    model.graph.nodes.reverse()
    sort_graph(model.graph)
    assert [node.op for node in model.graph.nodes] == ["Relu", "If"]


def test_a_cycle_is_named() -> None:
    proto = model_proto("c (float[2] x) => (float[2] y) { a = Add(x, b) b = Neg(a) y = Exp(b) }")
    with pytest.raises(Pi05cError, match=r"cycle through node '[ab]\."):
        sort_proto(proto.graph)


def test_constants_come_first_and_the_rest_keeps_its_order() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w32"], ["y"]),
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["y", "v32"], ["z"]),
        helper.make_node("Cast", ["v"], ["v32"], to=TensorProto.FLOAT),
    ]
    nodes = [nodes[1], nodes[0], nodes[3], nodes[2]]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [],
        [helper.make_tensor(name, TensorProto.FLOAT16, [2, 2], [0.0] * 4) for name in ("w", "v")],
    )
    constants_first(graph, [helper.make_node("Identity", ["v"], ["u"])])
    assert [node.output[0] for node in graph.node] == ["u", "w32", "v32", "y", "z"]
