"""`pi05c.graph.edit`: names, casts, replacing, removing what is dead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from models import run_file, small_model

from pi05c.graph.check import problems
from pi05c.graph.clone import clone_node
from pi05c.graph.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pi05c.graph.edit import Editor, Names, detach, producer, remove_dead, replace_input
from pi05c.graph.io import Model, save, scopes
from pi05c.graph.sort import sort_graph
from pi05c.graph.text import canonical_text

CAPTURE = """
    choose (float[2] x, bool c) => (float[2] y) {
      kept = Identity(x)
      y = If(c) <
        then_branch = with_bias () => (float[2] a) { a = Add(kept, w) },
        else_branch = without () => (float[2] b) { b = Neg(x) }
      >
    }"""
WEIGHTS = {"w": np.array([1, 2], np.float32)}


def _editor(model: Model) -> Editor:
    return Editor(model.graph, Names(model.graph))


def test_names_are_unique_over_all_scopes() -> None:
    names = Names(small_model(CAPTURE, WEIGHTS).graph)
    assert names.unique("a") == "a_1"
    assert names.unique("a") == "a_2"
    assert names.unique("w") == "w_1"
    assert names.unique("new") == "new"
    assert names.unique("new") == "new_1"


def test_many_names_take_linear_time() -> None:
    names = Names(gs.Graph())
    made = {names.unique("x") for _ in range(100_000)}
    assert len(made) == 100_000


def test_one_cast_for_a_tensor_and_type() -> None:
    model = small_model("r (float[2] x) => (float[2] y) { y = Relu(x) }")
    editor = _editor(model)
    x = model.graph.inputs[0]
    half = editor.cast(x, FLOAT16)
    assert editor.cast(x, FLOAT16) is half
    assert editor.cast(x, FLOAT32) is x
    assert editor.cast(x, BFLOAT16) is not half
    assert Editor(model.graph, editor.names).cast(x, FLOAT16) is half
    assert half.dtype == FLOAT16
    assert half.shape == [2]


def test_a_removed_cast_is_not_reused() -> None:
    model = small_model("r (float[2] x) => (float[2] y) { y = Relu(x) }")
    editor = _editor(model)
    x = model.graph.inputs[0]
    half = editor.cast(x, FLOAT16)
    node = producer(half)
    assert node is not None
    editor.remove(node)
    assert editor.cast(x, FLOAT16) is not half


def test_uses_in_bodies_are_replaced() -> None:
    model = small_model(CAPTURE, WEIGHTS)
    editor = _editor(model)
    kept = model.graph.nodes[0].outputs[0]
    editor.replace_uses(kept, model.graph.inputs[0])
    assert not kept.outputs
    assert remove_dead(model.graph) == 1
    assert [node.op for node in model.graph.nodes] == ["If"]
    assert problems(model) == []


def test_a_tensor_used_twice_by_one_node() -> None:
    model = small_model("s (float[2] x) => (float[2] y) { a = Relu(x) y = Mul(a, a) }")
    editor = _editor(model)
    editor.replace_uses(model.graph.nodes[0].outputs[0], model.graph.inputs[0])
    assert all(tensor is model.graph.inputs[0] for tensor in model.graph.nodes[1].inputs)


def test_replacing_by_what_is_made_of_it() -> None:
    """A node put behind a tensor keeps reading it."""
    model = small_model("s (float[2] x) => (float[2] y) { a = Relu(x) y = Neg(a) }")
    editor = _editor(model)
    a = model.graph.nodes[0].outputs[0]
    doubled = editor.add("Add", [a, a], "doubled", dtype=FLOAT32, shape=[2])
    editor.replace_uses(a, doubled)
    sort_graph(model.graph)
    assert [node.op for node in model.graph.nodes] == ["Relu", "Add", "Neg"]
    assert problems(model) == []


def test_what_only_a_body_needs_is_kept() -> None:
    """CASES 11: a weight and an Identity whose only consumer is inside an If."""
    model = small_model(CAPTURE, WEIGHTS)
    assert remove_dead(model.graph) == 0
    text = canonical_text(model.graph)
    assert "%kept: float32[2] = Identity(%x)" in text
    assert "%w: float32[2] = [1, 2]" in text


def test_a_removed_loop_leaves_no_consumers() -> None:
    model = small_model(CAPTURE, WEIGHTS)
    node = model.graph.nodes[1]
    kept = model.graph.nodes[0].outputs[0]
    model.graph.outputs = [kept]
    detach(node)
    model.graph.nodes.remove(node)
    assert list(kept.outputs) == []
    assert not [*model.graph.inputs[0].outputs[1:]]


def test_dead_nodes_in_bodies_free_what_they_captured() -> None:
    text = """
    d (float[2] x, bool c) => (float[2] y) {
      captured = Exp(x)
      y = If(c) <
        then_branch = t () => (float[2] a) { dead = Neg(captured) a = Relu(x) },
        else_branch = e () => (float[2] b) { b = Neg(x) }
      >
    }"""
    model = small_model(text)
    assert remove_dead(model.graph) == 2
    assert [node.op for scope in scopes(model.graph) for node in scope.nodes] == ["If", "Relu", "Neg"]


def test_what_fed_a_tensor_that_became_an_input_is_gone() -> None:
    """CASES 5."""
    model = small_model("m (float[2] x) => (float[2] y) { a = Exp(x) t = Relu(a) y = Neg(t) }")
    model.graph.inputs = [model.graph.nodes[1].outputs[0]]
    assert remove_dead(model.graph) == 2
    assert [node.op for node in model.graph.nodes] == ["Neg"]
    assert problems(model) == []


def test_one_output_of_several_becomes_an_input() -> None:
    model = small_model("m (float[4] x) => (float[2] y, float[2] z) { y0, t = Split<axis = 0, num_outputs = 2>(x) y = Neg(y0) z = Neg(t) }")  # fmt: skip
    split = model.graph.nodes[0]
    model.graph.inputs.append(split.outputs[1])
    assert remove_dead(model.graph) == 0
    assert [tensor.name for tensor in split.outputs] == ["y0", ""]
    assert problems(model) == []


def test_replace_input_compares_by_identity() -> None:
    """Tensors of equal name are equal to onnx-graphsurgeon, and may be different tensors of two scopes."""
    one, other, new = (gs.Variable(name, np.float32, [1]) for name in ("same", "same", "new"))
    node = gs.Node("Add", "add", inputs=[one, other], outputs=[gs.Variable("sum")])
    replace_input(node, other, new)
    assert node.inputs[0] is one
    assert node.inputs[1] is new


def test_a_clone_with_its_body_computes_the_same(tmp_path: Path) -> None:
    model = small_model(CAPTURE, WEIGHTS)
    names = Names(model.graph)
    original = model.graph.nodes[1]
    original.metadata = {"scope": "m"}
    relu = Editor(model.graph, names).add("Relu", [model.graph.inputs[0]], "relu", dtype=FLOAT32, shape=[2])
    tensors: dict[int, gs.Tensor] = {id(model.graph.nodes[0].outputs[0]): relu}
    clone = clone_node(original, tensors, names, "copy/")
    model.graph.nodes.append(clone)
    model.graph.outputs.append(clone.outputs[0])
    assert clone.metadata == {"scope": "m"}
    assert clone.attrs["then_branch"].nodes[0].inputs[1] is original.attrs["then_branch"].nodes[0].inputs[1]
    assert problems(model) == []
    path = tmp_path / "clone.onnx"
    save(model, path)
    x = np.array([-1, 3], np.float32)
    kept, cloned = run_file(path, {"x": x, "c": np.array(True)})
    np.testing.assert_array_equal(kept, x + WEIGHTS["w"])
    np.testing.assert_array_equal(cloned, np.maximum(x, 0) + WEIGHTS["w"])
