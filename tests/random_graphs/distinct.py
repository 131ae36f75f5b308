"""Seeded graphs of which every edit is one difference."""

from __future__ import annotations

import random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from random_graphs.core import Array, all_nodes

DISTINCT_SHAPE = (3, 3)
UNARY = ("Relu", "Exp", "Tanh", "Neg", "Sigmoid")
BINARY = ("Add", "Mul", "MatMul", "Sub")


def distinct_model(seed: int, *, nodes: int = 24, steps: int = 0, loop: bool = False) -> onnx.ModelProto:
    """A seeded graph of [3, 3] tensors in which each node computes something else and reaches the output.

    So one edit of it is one difference.

    Args:
        nodes: operators before the steps.
        steps: so many identical blocks in a row follow, which share their weights.
        loop: a Loop whose body reads a tensor from outside ends the graph.
    """
    rng = random.Random(seed)
    made: list[onnx.NodeProto] = []
    weights = [numpy_helper.from_array(distinct_values(seed * 100 + i), f"w{i}") for i in range(4)]
    tensors, unread = ["x", "z"], ["x", "z"]
    computed: set[tuple[str, ...]] = set()
    while len(made) < nodes:
        op = rng.choice((*UNARY, *BINARY))
        inputs = [rng.choice(unread[-3:] or tensors[-6:])]
        if op in BINARY:
            inputs.append(rng.choice([*tensors[-6:], *(weight.name for weight in weights)]))
        if (op, *inputs) in computed:
            continue
        computed.add((op, *inputs))
        name = f"t{len(made)}"
        made.append(helper.make_node(op, inputs, [name], f"n{len(made)}"))
        tensors.append(name)
        unread = [tensor for tensor in unread if tensor not in inputs] + [name]
    last = _joined(made, unread)
    for step in range(steps):
        last = _step(made, last, step)
    if loop:
        made.append(_loop(last, tensors[-1]))
        last = "looped"
    made.append(helper.make_node("Identity", [last], ["y"], "end"))
    used = {name for node in all_nodes(onnx.GraphProto(node=made)) for name in node.input}
    graph = helper.make_graph(
        made,
        "random",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, DISTINCT_SHAPE) for name in ("x", "z")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, DISTINCT_SHAPE)],
        [weight for weight in weights if weight.name in used]
        + (
            [numpy_helper.from_array(distinct_values(seed * 100 + 50 + i), f"s{i}") for i in range(2)]
            if steps
            else []
        )
        + (
            [
                numpy_helper.from_array(np.asarray(3), "trip"),
                numpy_helper.from_array(np.asarray(True), "going_on"),
            ]
            if loop
            else []
        ),
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(proto)


def distinct_values(seed: int) -> Array:
    """The values of a weight of `distinct_model`."""
    values: Array = np.random.default_rng(seed).standard_normal(DISTINCT_SHAPE).astype(np.float32)
    return values


def _joined(made: list[onnx.NodeProto], tensors: list[str]) -> str:
    last = tensors[0]
    for index, tensor in enumerate(tensors[1:]):
        made.append(helper.make_node("Add", [last, tensor], [f"joined{index}"], f"join{index}"))
        last = f"joined{index}"
    return last


def _step(made: list[onnx.NodeProto], x: str, step: int) -> str:
    block = [("MatMul", ["s0"]), ("Tanh", []), ("MatMul", ["s1"]), ("Relu", [])]
    value = x
    for index, (op, extra) in enumerate(block):
        output = f"step{step}.{index}"
        made.append(helper.make_node(op, [value, *extra], [output], f"step{step}.node{index}"))
        value = output
    made.append(helper.make_node("Add", [x, value], [f"step{step}.out"], f"step{step}.add"))
    return f"step{step}.out"


def _loop(x: str, captured: str) -> onnx.NodeProto:
    def info(name: str, kind: int, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond_in"], ["cond_out"], "body.cond"),
            helper.make_node("Mul", ["x_in", captured], ["body.t0"], "body.mul"),
            helper.make_node("Tanh", ["body.t0"], ["body.t1"], "body.tanh"),
            helper.make_node("Sub", ["body.t1", "x_in"], ["x_out"], "body.sub"),
        ],
        "body",
        [
            info("i", TensorProto.INT64, ()),
            info("cond_in", TensorProto.BOOL, ()),
            info("x_in", 1, DISTINCT_SHAPE),
        ],
        [info("cond_out", TensorProto.BOOL, ()), info("x_out", 1, DISTINCT_SHAPE)],
    )
    return helper.make_node("Loop", ["trip", "going_on", x], ["looped"], "loop", body=body)
