"""Derived weights as nodes: what onnxruntime makes of them has the bits of what is evaluated here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32, to_onnx
from pi05c.graph.runner import Array
from pi05c.graph.sort import constants_first
from pi05c.graph.weight_nodes import WeightNodes, widen_for_each_reader
from pi05c.graph.weights import (
    Cast,
    InMemory,
    Joined,
    Projected,
    Quantized,
    Reshaped,
    Scaled,
    Selected,
    Stored,
    Transposed,
    Weight,
)

A = np.random.default_rng(0).standard_normal((6, 4)).astype(BFLOAT16)
B = np.random.default_rng(1).standard_normal((3, 4)).astype(BFLOAT16)
FACTOR = np.random.default_rng(2).standard_normal(9).astype(np.float32)


def nodes() -> WeightNodes:
    numbers = itertools.count()
    return WeightNodes(lambda what: f"{what}.{next(numbers)}")


def run(built: WeightNodes, name: str, weight: Weight) -> Array:
    """The tensor `name` by onnxruntime, in float32, which holds bfloat16 exactly."""
    initializers = []
    for leaf, values in built.leaves.items():
        proto = numpy_helper.from_array(values.load(), leaf)
        initializers.append(proto)
    graph = helper.make_graph(
        [*built.nodes, helper.make_node("Cast", [name], ["result"], to=to_onnx(FLOAT32))],
        "graph",
        [],
        [helper.make_tensor_value_info("result", to_onnx(FLOAT32), weight.shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), disabled_optimizers=["ConstantFolding"], providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {})
    return np.asarray(result)


@pytest.mark.parametrize(
    "derive",
    [
        lambda a, b: Transposed(a, (1, 0)),
        lambda a, b: Reshaped(a, (2, 12)),
        lambda a, b: Joined([a, b], 0),
        lambda a, b: Joined([Transposed(a, (1, 0)), Transposed(b, (1, 0))], 1),
        lambda a, b: Joined([Transposed(a, (1, 0)), Reshaped(a, (4, 6))], 1),
        lambda a, b: Selected(a, 0, (5, 0, 0)),
        lambda a, b: Scaled(Joined([a, b], 0), FACTOR.reshape(9, 1)),
        lambda a, b: Scaled(Joined([Transposed(a, (1, 0)), Transposed(b, (1, 0))], 1), FACTOR),
        lambda a, b: Scaled(Transposed(a, (1, 0)), np.float32(0.3)),
        lambda a, b: Scaled(a, np.float32(0.3), FLOAT32),
        lambda a, b: Transposed(Scaled(Transposed(a, (1, 0)), FACTOR[:6]), (1, 0)),
        lambda a, b: Cast(Scaled(Cast(a, FLOAT32), FACTOR[:4]), BFLOAT16),
        lambda a, b: Cast(Transposed(Cast(a, FLOAT32), (1, 0)), BFLOAT16),
    ],
)
def test_the_bits_are_those_of_the_weight(derive: Callable[[Weight, Weight], Weight]) -> None:
    built, weight = nodes(), derive(InMemory(A), InMemory(B))
    assert built.add(weight, "w")
    np.testing.assert_array_equal(run(built, "w", weight), weight.load().astype(np.float32))


def test_a_weight_is_widened_before_it_is_transposed_wherever_it_is_read() -> None:
    built, float32 = nodes(), to_onnx(FLOAT32)
    joined = Joined([Transposed(InMemory(A), (1, 0)), Transposed(InMemory(B), (1, 0))], 1)
    assert built.add(joined, "w")
    assert built.add(Transposed(InMemory(A), (1, 0)), "v")
    body = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["inner"], to=float32)],
        "body",
        [],
        [helper.make_tensor_value_info("inner", float32, joined.shape)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["wide"], ["outer"])],
        "other",
        [],
        [helper.make_tensor_value_info("outer", float32, joined.shape)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["w"], ["wide"], to=float32, saturate=1),
            helper.make_node("If", ["flag"], ["branch"], then_branch=body, else_branch=other),
            helper.make_node("MatMul", ["x", "wide"], ["y"]),
            helper.make_node("Cast", ["v"], ["z"], to=to_onnx(FLOAT16)),
        ],
        "graph",
        [
            helper.make_tensor_value_info("x", float32, [2, 4]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ],
        [
            helper.make_tensor_value_info("y", float32, [2, 9]),
            helper.make_tensor_value_info("branch", float32, joined.shape),
            helper.make_tensor_value_info("z", to_onnx(FLOAT16), [4, 6]),
        ],
        [numpy_helper.from_array(values.load(), leaf) for leaf, values in built.leaves.items()],
    )
    built.widen_before_transposing(graph)
    assert [node.op_type for node in built.nodes] == ["Concat", "Transpose", "Identity"]
    assert built.nodes[-1].output == ["v"], "which is read in another type"
    assert [node.op_type for node in graph.node] == ["Cast", "Transpose", "If", "MatMul", "Cast"]
    constants_first(graph, built.nodes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), disabled_optimizers=["ConstantFolding"], providers=["CPUExecutionProvider"]
    )
    x = np.eye(2, 4, dtype=np.float32)
    for flag in (True, False):
        y, branch, z = session.run(None, {"x": x, "flag": np.array(flag)})
        np.testing.assert_array_equal(branch, joined.load().astype(np.float32))
        np.testing.assert_array_equal(y, joined.load().astype(np.float32)[:2])
        np.testing.assert_array_equal(z, A.T.astype(np.float16))


def test_each_reader_of_a_stored_weight_widens_it_for_itself() -> None:
    float32 = to_onnx(FLOAT32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["a"], ["wide"], to=float32),
            helper.make_node("Transpose", ["wide"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["y"]),
            helper.make_node("MatMul", ["y", "wide"], ["z"]),
            helper.make_node("MatMul", ["z", "turned"], ["out"]),
            helper.make_node("Cast", ["out"], ["narrow"], to=to_onnx(BFLOAT16)),
            helper.make_node("Cast", ["narrow"], ["rounded"], to=float32),
            helper.make_node("Add", ["rounded", "rounded"], ["last"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", float32, [2, 4])],
        [helper.make_tensor_value_info(name, float32, [2, 6]) for name in ("out", "last")],
        [numpy_helper.from_array(A, "a")],
    )
    numbers = itertools.count()
    widen_for_each_reader(graph, lambda what: f"{what}.{next(numbers)}", least=A.size + 1)
    assert len(graph.node) == 8, "a smaller one is widened once"
    widen_for_each_reader(graph, lambda what: f"{what}.{next(numbers)}", least=A.size)
    first, second = (node for node in graph.node if node.op_type == "Transpose")
    assert first.input[0] != second.input[0]
    assert [node.input[0] for node in graph.node if node.op_type == "Cast"].count("a") == 2
    assert sum(node.op_type == "Cast" for node in graph.node) == 4, "what is no weight is rounded once"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x, wide = np.eye(2, 4, dtype=np.float32), A.astype(np.float32)
    (out,) = session.run(["out"], {"x": x})
    np.testing.assert_allclose(out, x @ wide.T @ wide @ wide.T, rtol=1e-5)


@pytest.mark.parametrize(
    "weight",
    [
        InMemory(A),
        Quantized(InMemory(A), np.float32(0.5), ml_dtypes.float8_e4m3fn),
        Cast(InMemory(A), FLOAT16),
        Scaled(InMemory(A.astype(FLOAT16)), FACTOR[:4]),
        Joined([Quantized(InMemory(A), np.float32(0.5), ml_dtypes.float8_e4m3fn)], 0),
        Projected(InMemory(A), FACTOR[:6]),
    ],
)
def test_what_onnxruntime_would_round_otherwise_is_left(weight: Weight) -> None:
    built = nodes()
    assert not built.add(weight, "w")
    assert not built.nodes
    assert not built.leaves


def test_what_is_stored_once_is_a_leaf_once(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(A.tobytes())
    twins = [Stored(path, 0, A.shape, BFLOAT16) for _ in range(2)]
    built = nodes()
    assert built.add(Transposed(twins[0], (1, 0)), "w")
    assert built.add(Joined(twins, 0), "v")
    assert len(built.leaves) == 1
