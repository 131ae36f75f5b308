"""`fuse_denoise_loop`: the same numbers without the loop, or without what its body need not compute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper
from pass_graphs import (
    editable,
    graph_text,
    node_of,
    normal,
    outputs_of,
    relative_error,
    run_pass,
    seeded_inputs,
    text_of,
)

from pi05c.graph.check import problems
from pi05c.graph.edit import Names
from pi05c.graph.errors import UsageError
from pi05c.graph.io import Model, load, save, scopes
from pi05c.graph.weights import array_of
from pi05c.passes import PassContext
from pi05c.passes.fuse_denoise_loop import fuse_denoise_loop
from pi05c.passes.pipeline import StepResult

EXACT = 1e-6
"""Relative error that float32 rounding explains in graphs of this size."""

TINY_ACTIONS = 1e-5
"""The same for the actions of the small model after ten steps."""

MODES = ("unroll", "loop")


# The graphs. Each is a case that a golden test can store.


def while_loop(steps: int = 3) -> onnx.ModelProto:
    """Denoising as torch's while_loop exports it: no trip count, the condition counts on a counter of the body's own.

    t runs from 1 down; an embedding of t goes through a time MLP and one adaRMS dense layer.
    """
    return graph_text(
        f"""
        denoise (float[1,4,8] noise, float[1,4,8] context) => (float[1,4,8] actions)
          <int64 zero = {{0}}, float start = {{1}}, bool yes = {{1}}, float minus_dt = {{{-1 / steps}}}, int64 n = {{{steps}}},
           int64 one_step = {{1}}, float one = {{1}}> {{
          counter_end, t_end, actions = Loop(, yes, zero, start, noise) <body = step
            (int64 i, bool going_on, int64 counter, float t, float[1,4,8] x)
            => (bool go_on, int64 counter_next, float t_next, float[1,4,8] x_next) {{
            phase = Mul(t, frequencies)
            embedding = Sin(phase)
            time_hidden = MatMul(embedding, time_mlp)
            gate_hidden = Sigmoid(time_hidden)
            cond = Mul(time_hidden, gate_hidden)
            modulation = MatMul(cond, ada_dense)
            scale, shift = Split<axis = 1, num_outputs = 2>(modulation)
            scale_one = Add(scale, one)
            key = MatMul(context, w_key)
            scaled = Mul(x, scale_one)
            shifted = Add(scaled, shift)
            attended = Add(shifted, key)
            v = MatMul(attended, w_out)
            moved = Mul(v, minus_dt)
            x_next = Add(x, moved)
            t_next = Add(t, minus_dt)
            counter_next = Add(counter, one_step)
            go_on = Less(counter_next, n)
          }}>
        }}""",
        {
            "frequencies": np.linspace(0.5, 6, 8, dtype=np.float32).reshape(1, 8),
            "time_mlp": normal(1, 8, 32),
            "ada_dense": normal(2, 32, 16),
            "w_key": normal(3, 8, 8),
            "w_out": normal(4, 8, 8),
        },
    )


def for_loop(steps: int = 3) -> onnx.ModelProto:
    """A constant trip count, and a body that reads the number of the step."""
    return graph_text(
        f"""
        for_loop (float[2,4] x) => (float[2,4] y) <int64 n = {{{steps}}}, bool yes = {{1}}> {{
          y = Loop(n, yes, x) <body = step (int64 i, bool c, float[2,4] h) => (bool going, float[2,4] next) {{
            number = Cast<to = 1>(i)
            moved = Add(h, number)
            product = MatMul(moved, w)
            next = Tanh(product)
            going = Identity(c)
          }}>
        }}""",
        {"w": normal(1, 4, 4)},
    )


def stops_early() -> onnx.ModelProto:
    """A trip count of 10 and a condition of constants that turns false after 4 steps."""
    return graph_text(
        """
        early (float[2] x) => (float[2] y) <int64 n = {10}, int64 last = {3}, float half = {0.5}> {
          y = Loop(n, , x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
            next = Mul(h, half)
            going = Less(i, last)
          }>
        }"""
    )


def collected() -> onnx.ModelProto:
    """A loop that stacks what varies, what depends on the step alone, what does not change, and a constant."""
    return graph_text(
        """
        collect (float[2,3] x) => (float[2,3] y, float[4,2,3] xs, float[4] ts, float[4,2,3] bases, float[4,1] ones)
          <int64 n = {4}, float start = {1}, float dt = {-0.1}> {
          y, t_end, xs, ts, bases, ones = Loop(n, , x, start) <body = step
            (int64 i, bool c, float[2,3] h, float t)
            => (bool going, float[2,3] next, float t_next, float[2,3] row, float t_row, float[2,3] base, float[1] one)
            <float[1] one = {1}> {
            base = Relu(x)
            moved = Mul(base, t)
            next = Add(h, moved)
            row = Neg(next)
            t_next = Add(t, dt)
            t_row = Identity(t_next)
            going = Identity(c)
          }>
        }"""
    )


def carried_oddly() -> onnx.ModelProto:
    """Carried values that nobody changes, that change places, that leave twice, that become a constant or a capture."""
    return graph_text(
        """
        odd (float[2] x, float[2] other) => (float[2] kept, float[2] a, float[2] b, float[2] twice, float[2] fixed, float[2] outer)
          <int64 n = {3}, float[2] start = {1, 2}> {
          captured = Exp(other)
          kept, a, b, twice, fixed, outer, unread = Loop(n, , other, x, start, x, x, x, x) <body = step
            (int64 i, bool c, float[2] k, float[2] p, float[2] q, float[2] r, float[2] f, float[2] o, float[2] u)
            => (bool going, float[2] k_out, float[2] q, float[2] sum, float[2] sum, float[2] f_out, float[2] o_out, float[2] u)
            <float[2] f_out = {7, 8}> {
            k_out = Identity(k)
            part = Add(p, k)
            more = Add(part, u)
            rest = Sub(r, f)
            all = Add(more, rest)
            sum = Add(all, o)
            o_out = Identity(captured)
            going = Identity(c)
          }>
        }"""
    )


def scan() -> onnx.ModelProto:
    """A Scan over an activation along axis 1, and over constants from the end; its output grows backward on axis 1."""
    return graph_text(
        """
        scan (float[2,3,4] x, float[2,4] first) => (float[2,4] last, float[2,3,4] states) <float minus = {-1}> {
          times = Mul(factors, minus)
          last, states = Scan <num_scan_inputs = 2, scan_input_axes = [-2, 0], scan_input_directions = [0, 1],
            scan_output_axes = [1], scan_output_directions = [1], body = step
            (float[2,4] h, float[2,4] row, float[4] factor) => (float[2,4] next, float[2,4] seen) {
            size = Exp(factor)
            scaled = Mul(row, size)
            mixed = MatMul(h, w)
            next = Add(mixed, scaled)
            seen = Identity(next)
          }> (first, x, times)
        }""",
        {"w": normal(1, 4, 4), "factors": normal(2, 3, 4)},
    )


def nested_bodies() -> onnx.ModelProto:
    """A body with an If, whose branches capture what varies and what depends on the step, and with another Loop."""
    return graph_text(
        """
        nested (float[2] x) => (float[2] y) <int64 n = {3}, int64 two = {2}, int64 one = {1}, float half = {0.5}> {
          y = Loop(n, , x) <body = outer (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
            number = Cast<to = 1>(i)
            factor = Mul(number, half)
            odd = Equal(i, one)
            branched = If(odd) <
              then_branch = t () => (float[2] p) { p = Mul(h, factor) },
              else_branch = e () => (float[2] q) { minus = Neg(h) q = Sub(minus, factor) }
            >
            inner_steps = Add(i, one)
            next = Loop(inner_steps, , branched) <body = inner (int64 j, bool d, float[2] g) => (bool on, float[2] g_next) {
              grown = Add(g, w)
              j_number = Cast<to = 1>(j)
              g_next = Sub(grown, j_number)
              on = Identity(d)
            }>
            going = Identity(c)
          }>
        }""",
        {"w": normal(1, 2)},
    )


def loops_in_branches() -> onnx.ModelProto:
    """Two branches of an If, each with a loop and the same names inside."""
    loop = """
        {y} = Loop(n, , start) <body = b (int64 i, bool c, float[2] h) => (bool going, float[2] next) <float two = {{{value}}}> {{
          doubled = Mul(x, two)
          next = Add(h, doubled)
          going = Identity(c)
        }}>"""
    return graph_text(
        f"""
        branches (float[2] x, bool which) => (float[2] y) <int64 n = {{2}}, float[2] start = {{0, 1}}> {{
          y = If(which) <
            then_branch = t () => (float[2] p) {{ {loop.format(y="p", value=2)} }},
            else_branch = e () => (float[2] q) {{ {loop.format(y="q", value=3)} }}
          >
        }}"""
    )


def shared_weight() -> onnx.ModelProto:
    """One weight inside and outside of the body, large enough to lie beside the model."""
    return graph_text(
        """
        shared (float[2,32] x) => (float[2,32] y) <int64 n = {4}> {
          first = MatMul(x, w)
          last = Loop(n, , first) <body = step (int64 i, bool c, float[2,32] h) => (bool going, float[2,32] next) {
            product = MatMul(h, w)
            next = Tanh(product)
            going = Identity(c)
          }>
          y = MatMul(last, w)
        }""",
        {"w": normal(1, 32, 32)},
    )


def data_dependent() -> onnx.ModelProto:
    """A loop that runs until the values are small: only a run knows how often."""
    return graph_text(
        """
        until (float[2] x) => (float[2] y) <int64 n = {100}, float half = {0.5}, float small = {0.1}, int64 keep = {0}> {
          y = Loop(n, , x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
            next = Mul(h, half)
            size = ReduceMax<keepdims = 0>(next)
            going = Greater(size, small)
          }>
        }"""
    )


def no_loop() -> onnx.ModelProto:
    """A graph that is straight already."""
    return graph_text("straight (float[2] x) => (float[2] y) { y = Relu(x) }")


STATIC: dict[str, Callable[[], onnx.ModelProto]] = {
    "one step": lambda: while_loop(1),
    "three steps": lambda: while_loop(3),
    "ten steps": lambda: while_loop(10),
    "for loop": for_loop,
    "stops early": stops_early,
    "collected": collected,
    "carried oddly": carried_oddly,
    "scan": scan,
    "nested bodies": nested_bodies,
    "loops in branches": loops_in_branches,
    "shared weight": shared_weight,
}


# What holds for all of them


def _error(before: onnx.ModelProto, after: Model) -> float:
    worst = 0.0
    for seed in range(3):
        inputs = seeded_inputs(before, seed)
        worst = max(worst, relative_error(outputs_of(after, inputs), outputs_of(before, inputs)))
    return worst


def _fused(proto: onnx.ModelProto, mode: str = "unroll", **options: str) -> tuple[Model, StepResult]:
    model = editable(proto)
    result = run_pass(model, "fuse_denoise_loop", mode=mode, **options)
    assert problems(model) == []
    return model, result


def _operators(model: Model) -> list[str]:
    return [node.op for scope in scopes(model.graph) for node in scope.nodes]


def _constants(model: Model) -> dict[str, gs.Constant]:
    used = [t for scope in scopes(model.graph) for node in scope.nodes for t in node.inputs]
    return {tensor.name: tensor for tensor in used if isinstance(tensor, gs.Constant)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATIC)
def test_the_same_numbers(name: str, mode: str) -> None:
    proto = STATIC[name]()
    model, result = _fused(proto, mode)
    assert result.changes or (name, mode) == ("shared weight", "loop")  # which computes only what varies
    assert _error(proto, model) <= EXACT
    assert [output.name for output in model.graph.outputs] == [output.name for output in proto.graph.output]


@pytest.mark.parametrize("name", STATIC)
def test_no_loop_is_left(name: str) -> None:
    model, result = _fused(STATIC[name]())
    assert not {"Loop", "Scan"} & set(_operators(model))
    assert result.skips == ()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATIC)
def test_twice_is_once(name: str, mode: str) -> None:
    model, _ = _fused(STATIC[name](), mode)
    once = text_of(model)
    again = run_pass(model, "fuse_denoise_loop", mode=mode)
    assert again.changes == ()
    assert text_of(model) == once


@pytest.mark.parametrize("name", STATIC)
def test_unrolled_after_tables(name: str) -> None:
    """A graph in the other form still unrolls."""
    proto = STATIC[name]()
    model, _ = _fused(proto, "loop")
    run_pass(model, "fuse_denoise_loop")
    assert not {"Loop", "Scan"} & set(_operators(model))
    assert problems(model) == []
    assert _error(proto, model) <= EXACT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATIC)
def test_saved_and_loaded_it_is_the_same(name: str, mode: str, tmp_path: Path) -> None:
    model, _ = _fused(STATIC[name](), mode)
    save(model, tmp_path / "m.onnx")
    assert text_of(load(tmp_path / "m.onnx")) == text_of(model)


@pytest.mark.parametrize("name", STATIC)
def test_the_result_is_the_same_each_time(name: str) -> None:
    assert text_of(_fused(STATIC[name]())[0]) == text_of(_fused(STATIC[name]())[0])


# What unrolling makes of a body


def test_what_depends_on_the_step_leaves_the_graph() -> None:
    model, _ = _fused(while_loop(3))
    assert {"time_mlp", "ada_dense", "frequencies"} & set(_constants(model)) == set()
    assert not {"Sin", "Sigmoid", "Split", "Less"} & set(_operators(model))
    assert _operators(model).count("MatMul") == 1 + 3  # the key, which no step changes, and w_out in each


def test_what_does_not_change_stands_once_in_front() -> None:
    model, _ = _fused(while_loop(3))
    key = node_of(model, "key")
    assert [node.name for node in key.outputs[0].outputs] == [
        f"step_{step}/attended.Add" for step in range(3)
    ]
    assert model.graph.nodes[0] is key


def test_t_accumulates_in_float32_as_the_graph_says() -> None:
    """1 - i/10 computed anew is another number than 1 - 1/10 - 1/10 ..."""
    model, _ = _fused(while_loop(10))
    t = np.float32(1)
    frequencies = np.linspace(0.5, 6, 8, dtype=np.float32).reshape(1, 8)
    for step in range(10):
        cond = np.sin(t * frequencies) @ normal(1, 8, 32)
        cond = cond / (1 + np.exp(-cond))
        scale = (cond @ normal(2, 32, 16))[:, :8] + 1
        np.testing.assert_allclose(array_of(_constants(model)[f"step_{step}/scale_one"]), scale, atol=2e-6)
        t += np.float32(-0.1)
    assert t != np.float32(0)


def test_weights_are_shared_by_the_steps() -> None:
    model, _ = _fused(shared_weight())
    weights = [node.inputs[1] for node in model.graph.nodes if node.op == "MatMul"]
    assert len(weights) == 6
    assert all(weight is weights[0] for weight in weights)


def test_names_say_which_step() -> None:
    model, _ = _fused(while_loop(3))
    assert [n.outputs[0].name for n in model.graph.nodes if n.op == "MatMul"] == [
        *("key", "step_0/v", "step_1/v", "step_2/v")
    ]
    last = model.graph.nodes[-1]
    assert (last.name, last.outputs[0].name) == ("step_2/x_next.Add", "actions")


def test_names_that_are_taken() -> None:
    proto = for_loop(2)
    proto.graph.node.insert(0, helper.make_node("Neg", ["x"], ["step_0/product"], name="step_0/moved.Add"))
    proto.graph.output.append(helper.make_tensor_value_info("step_0/product", onnx.TensorProto.FLOAT, [2, 4]))
    model, _ = _fused(proto)
    assert _error(proto, model) <= EXACT
    assert node_of(model, "step_0/product_1").op == "MatMul"


def test_metadata_of_nodes_is_copied() -> None:
    proto = for_loop(2)
    body = proto.graph.node[0].attribute[0].g
    body.node[2].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="out_proj")
    model, _ = _fused(proto)
    scope = {"pkg.torch.onnx.name_scopes": "out_proj"}
    assert [node.metadata for node in model.graph.nodes if node.op == "MatMul"] == [scope, scope]


def test_branches_are_copied_with_names_of_their_own() -> None:
    model, _ = _fused(nested_bodies())
    names = [t.name for scope in scopes(model.graph) for node in scope.nodes for t in node.outputs]
    assert len(names) == len(set(names))
    assert _operators(model).count("If") == 3
    assert _operators(model).count("Sub") == 3 + 1 + 2 + 3  # in each else branch; in 1, 2 and 3 inner steps


# What mode=loop makes of a body


def test_tables_hold_a_row_a_step() -> None:
    model, _ = _fused(while_loop(5), "loop")
    (loop,) = (node for node in model.graph.nodes if node.op == "Loop")
    assert array_of(loop.inputs[0]).item() == 5
    assert array_of(loop.inputs[1]).item() is True
    assert [tensor.name for tensor in loop.inputs[2:]] == ["noise"]
    body = loop.attrs["body"]
    assert [node.op for node in body.nodes[:2]] == ["Gather", "Gather"]
    assert {tuple(node.inputs[0].shape) for node in body.nodes[:2]} == {(5, 1, 8)}
    assert {"time_mlp", "ada_dense"} & set(_constants(model)) == set()
    assert "Less" not in _operators(model)
    assert node_of(model, "key") in model.graph.nodes


def test_a_scan_gets_tables_as_scanned_inputs() -> None:
    model, _ = _fused(scan(), "loop")
    (node,) = (node for node in model.graph.nodes if node.op == "Scan")
    assert node.attrs["num_scan_inputs"] == 3
    assert "Exp" not in _operators(model)


def test_a_step_number_of_rank_1() -> None:
    proto = for_loop(3)
    body = proto.graph.node[0].attribute[0].g
    body.input[0].type.tensor_type.shape.dim.add(dim_value=1)
    del body.value_info[:]
    for mode in MODES:
        model, _ = _fused(proto, mode)
        assert _error(proto, model) <= EXACT


# What is left alone


def _refused(proto: onnx.ModelProto, mode: str = "unroll", **options: str) -> str:
    model = editable(proto)
    before = text_of(model)
    result = run_pass(model, "fuse_denoise_loop", mode=mode, **options)
    assert result.changes == ()
    assert text_of(model) == before
    (skip,) = result.skips
    return skip.reason


@pytest.mark.parametrize("mode", MODES)
def test_a_condition_that_only_a_run_knows(mode: str) -> None:
    assert _refused(data_dependent(), mode) == "its condition 'going' depends on what only a run knows"


def test_a_trip_count_that_only_a_run_knows() -> None:
    text = """
    m (float[2] x, int64 steps) => (float[2] y) {
      y = Loop(steps, , x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
        next = Neg(h) going = Identity(c)
      }>
    }"""
    assert _refused(graph_text(text)) == "its trip count 'steps' depends on the model's inputs"


def test_an_initial_condition_that_only_a_run_knows() -> None:
    text = """
    m (float[2] x, bool go) => (float[2] y) <int64 n = {3}> {
      y = Loop(n, go, x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
        next = Neg(h) going = Identity(c)
      }>
    }"""
    assert _refused(graph_text(text)) == "its initial condition 'go' depends on the model's inputs"


def test_a_loop_without_an_end() -> None:
    text = """
    m (float[2] x) => (float[2] y) {
      y = Loop(, , x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
        next = Neg(h) going = Identity(c)
      }>
    }"""
    assert _refused(graph_text(text)) == "it has neither a trip count nor a condition that ends it"
    proto = while_loop(3)
    body = proto.graph.node[0].attribute[0].g
    body.node[-1].op_type, body.node[-1].input[0] = "LessOrEqual", "n"
    assert _refused(proto, max_steps="50") == "its condition stays true for more than max_steps=50 steps"


def test_more_steps_than_allowed() -> None:
    assert _refused(for_loop(20), max_steps="19") == "it runs 20 steps, more than max_steps=19"
    assert _refused(while_loop(20), max_steps="19") == (
        "its condition stays true for more than max_steps=19 steps"
    )
    assert _fused(for_loop(20), max_steps="20")[1].changes


def test_a_scan_of_a_length_that_only_a_run_knows() -> None:
    text = """
    m (float[N,2] x, float[2] s) => (float[2] y, float[N,2] z) {
      y, z = Scan <num_scan_inputs = 1, body = step (float[2] h, float[2] row) => (float[2] next, float[2] seen) {
        next = Add(h, row) seen = Neg(next)
      }> (s, x)
    }"""
    assert _refused(graph_text(text)) == "the length of its scanned axis is not static"


def test_a_loop_inside_one_that_is_left_alone_is_unrolled() -> None:
    text = """
    m (float[2] x, int64 steps) => (float[2] y) <int64 two = {2}> {
      y = Loop(steps, , x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next) {
        next = Loop(two, , h) <body = inner (int64 j, bool d, float[2] g) => (bool on, float[2] g_next) {
          g_next = Neg(g) on = Identity(d)
        }>
        going = Identity(c)
      }>
    }"""
    model, result = _fused(graph_text(text))
    assert [skip.where for skip in result.skips] == ["y.Loop"]
    assert result.changes == ("next.Loop",)
    assert _operators(model).count("Loop") == 1
    assert _operators(model).count("Neg") == 2


def test_a_graph_without_a_loop() -> None:
    model = editable(no_loop())
    result = run_pass(model, "fuse_denoise_loop")
    assert result.changes == ()
    assert result.notes == ("the graph has no Loop or Scan",)


def test_a_maximum_below_one() -> None:
    model = editable(for_loop())
    with pytest.raises(UsageError, match="max_steps=0"):
        fuse_denoise_loop(model.graph, PassContext(Names(model.graph)), max_steps=0)


# Zero steps


@pytest.mark.parametrize("mode", MODES)
def test_no_step(mode: str) -> None:
    proto = for_loop(0)
    model, result = _fused(proto, mode)
    assert result.changes
    assert "Loop" not in _operators(model)
    inputs = seeded_inputs(proto)
    np.testing.assert_array_equal(outputs_of(model, inputs)["y"], inputs["x"])


def test_no_step_and_stacked_outputs() -> None:
    text = """
    m (float[2] x) => (float[2] y, float[N,2] z) <int64 n = {5}, bool no = {0}> {
      y, z = Loop(n, no, x) <body = step (int64 i, bool c, float[2] h) => (bool going, float[2] next, float[2] row) {
        next = Neg(h) row = Exp(h) going = Identity(c)
      }>
    }"""
    proto = graph_text(text)
    model, _ = _fused(proto)
    inputs = seeded_inputs(proto)
    actual, expected = outputs_of(model, inputs), outputs_of(proto, inputs)
    assert actual["z"].shape == expected["z"].shape == (0, 2)
    np.testing.assert_array_equal(actual["y"], expected["y"])


# What stays computed


def test_large_values_of_the_step_stay_computed() -> None:
    text = """
    m (float[512,512] x) => (float[512,512] y) <int64 n = {3}, int64[2] wide = {512, 512}, float half = {0.5}> {
      y = Loop(n, , x) <body = step (int64 i, bool c, float[512,512] h) => (bool going, float[512,512] next) {
        number = Cast<to = 1>(i)
        factor = Mul(number, half)
        grown = Expand(factor, wide)
        next = Add(h, grown)
        going = Identity(c)
      }>
    }"""
    proto = graph_text(text)
    model, _ = _fused(proto)
    assert _operators(model).count("Expand") == 3
    assert _operators(model).count("Mul") == 0
    assert _error(proto, model) <= EXACT


def test_large_values_that_replace_larger_weights_do_not() -> None:
    text = """
    m (float[600,600] x) => (float[600,600] y) <int64 n = {2}> {
      y = Loop(n, , x) <body = step (int64 i, bool c, float[600,600] h) => (bool going, float[600,600] next) {
        number = Cast<to = 1>(i)
        first = Mul(w, number)
        second = Add(first, v)
        next = Add(h, second)
        going = Identity(c)
      }>
    }"""
    proto = graph_text(text, {"w": normal(1, 600, 600), "v": normal(2, 600, 600)})
    model, _ = _fused(proto)
    assert _operators(model) == ["Add", "Add"]
    assert _error(proto, model) <= EXACT


def test_a_large_carried_value_stays_carried() -> None:
    text = """
    m (float[512,512] x) => (float[512,512] y) <int64 n = {3}, int64[2] wide = {512, 512}, float one = {1}> {
      start = Expand(one, wide)
      y, end = Loop(n, , x, start) <body = step
        (int64 i, bool c, float[512,512] h, float[512,512] s) => (bool going, float[512,512] next, float[512,512] s_next) {
        next = Mul(h, s)
        s_next = Add(s, s)
        going = Identity(c)
      }>
    }"""
    proto = graph_text(text)
    for mode in MODES:
        model, _ = _fused(proto, mode)
        assert "Expand" in _operators(model)
        assert _error(proto, model) <= EXACT


def test_what_onnxruntime_cannot_run_stays_computed() -> None:
    """It has no bfloat16 MatMul."""
    text = """
    m (float[1,2] x) => (float[1,2] y) <int64 n = {2}, int64 last = {1}> {
      y = Loop(n, , x) <body = step (int64 i, bool c, float[1,2] h) => (bool going, float[1,2] next) {
        number = Cast<to = 16>(i)
        scaled = Mul(ones, number)
        product = MatMul(scaled, w)
        wide = Cast<to = 1>(product)
        next = Add(h, wide)
        going = Less(i, last)
      }>
    }"""
    weights = {"w": normal(1, 2, 2).astype("bfloat16"), "ones": np.ones((1, 2)).astype("bfloat16")}
    model, result = _fused(graph_text(text, weights))
    assert _operators(model).count("MatMul") == 2
    assert "Loop" not in _operators(model)
    assert any("stays computed" in note for note in result.notes)


def test_random_numbers_are_drawn_in_each_step() -> None:
    text = """
    m (float[64] x) => (float[64] y, float[3,64] z) <int64 n = {3}> {
      y, z = Loop(n, , x) <body = step (int64 i, bool c, float[64] h) => (bool going, float[64] next, float[64] drawn) {
        drawn = RandomNormalLike(x)
        next = Add(h, drawn)
        going = Identity(c)
      }>
    }"""
    proto = graph_text(text)
    model, _ = _fused(proto)
    drawn = outputs_of(model, seeded_inputs(proto))["z"]
    assert not np.allclose(drawn[0], drawn[1])


# Size and work


def _deep_loop(steps: int, layers: int) -> onnx.ModelProto:
    nodes, level = [], "h"
    for layer in range(layers):
        names = [f"{name}{layer}" for name in ("product", "scaled", "level")]
        nodes += [
            helper.make_node("MatMul", [level, "w"], [names[0]], name=f"{names[0]}.MatMul"),
            helper.make_node("Mul", [names[0], "factor"], [names[1]], name=f"{names[1]}.Mul"),
            helper.make_node("Add", [names[1], level], [names[2]], name=f"{names[2]}.Add"),
        ]
        level = names[2]
    proto = for_loop(steps)
    body = proto.graph.node[0].attribute[0].g
    body.node[1].input[0] = level
    number = body.node[0]
    factor = helper.make_node("Sin", ["number"], ["factor"], name="factor.Sin")
    rest = list(body.node[1:])
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (number, *rest)]
    del body.node[:]
    body.node.extend([kept[0], factor, *nodes, *kept[1:]])
    return proto


def _calls(steps: int, mode: str) -> int:
    """How many Python functions the pass calls on a body of 180 nodes."""
    model = editable(_deep_loop(steps, 60))
    ctx = PassContext(Names(model.graph))
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(seen)
    try:
        fuse_denoise_loop(model.graph, ctx, mode=mode)  # type: ignore[arg-type]
    finally:
        sys.setprofile(None)
    assert ctx.changes
    return count


@pytest.mark.parametrize("mode", MODES)
def test_work_is_linear_in_the_steps(mode: str) -> None:
    assert _calls(40, mode) < 6 * _calls(10, mode)  # linear is 4 at most, quadratic 16


# The model


@pytest.mark.parametrize("mode", MODES)
def test_the_tiny_model(tiny_model: Path, mode: str) -> None:
    before, model = load(tiny_model), load(tiny_model)
    time_path = {name for name in _constants(before) if name.startswith("time_mlp") or ".dense." in name}
    assert len(time_path) == 2 * (
        2 + 2 * 3 + 1
    )  # weight and bias of the time MLP and of 3 layers' and the last norm
    result = run_pass(model, "fuse_denoise_loop", mode=mode)
    assert len(result.changes) == 1
    assert result.skips == ()
    assert ("Loop" in _operators(model)) == (mode == "loop")
    assert time_path & set(_constants(model)) == set()
    with np.load(tiny_model.with_name("observations.npz")) as samples:
        inputs = {
            tensor.name: samples[tensor.name][:1].reshape(tensor.shape).astype(tensor.dtype)
            for tensor in before.graph.inputs
        }
    assert relative_error(outputs_of(model, inputs), outputs_of(before, inputs)) <= TINY_ACTIONS
