"""The flow accumulation, unrolled and in a loop, the linears at its ends, and the parts of a policy."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pass_graphs import editable, graph_text, node_of, normal, run_pass

from pi05c.passes.patterns.flow import find_flow, flow_linears
from pi05c.passes.patterns.layers import Layers
from pi05c.passes.patterns.parts import parts_of

STEP = """
    h{i} = MatMul({x}, w_in)
    a{i} = Relu(h{i})
    o{i} = MatMul(a{i}, w_out)
    v{i} = Add(o{i}, bias)
    d{i} = {scaled}
    x{i} = {add}"""

SPELLINGS = {
    "x + dt * v": ("Mul(dt, v{i})", "Add({x}, d{i})"),
    "v * dt + x": ("Mul(v{i}, dt)", "Add(d{i}, {x})"),
    "x - dt * v": ("Mul(v{i}, dt)", "Sub({x}, d{i})"),
}


def _unrolled(spelling: str, steps: int = 3, tail: str = "actions = Identity({x})") -> onnx.ModelProto:
    scaled, add = SPELLINGS[spelling]
    lines, x = [], "noise"
    for i in range(steps):
        lines.append(STEP.format(i=i, x=x, scaled=scaled.format(i=i), add=add.format(i=i, x=x)))
        x = f"x{i}"
    body = "\n".join([*lines, tail.format(x=x)])
    text = f"g (float[1,4,16] noise) => (float[1,4,16] actions) <float dt = {{-0.25}}> {{\n{body}\n}}"
    return graph_text(text, {"w_in": normal(1, 16, 24), "w_out": normal(2, 24, 16), "bias": normal(3, 16)})


LOOP = """
    g (float[1,4,16] noise) => (float[1,4,16] actions) <int64 trip = {3}, bool go = {1}, float t0 = {1}, float dt = {-0.25}> {
      t, actions = Loop(trip, go, t0, noise) <
        body = step (int64 i, bool again, float t_in, float[1,4,16] x_in) => (bool keep, float t_out, float[1,4,16] x_out) {
          keep = Identity(again)
          h = MatMul(x_in, w_in)
          shifted = Add(h, t_in)
          a = Relu(shifted)
          v = MatMul(a, w_out)
          d = Mul(v, dt)
          x_out = Add(x_in, d)
          t_out = Add(t_in, dt)
        }>
    }"""


def _loop() -> onnx.ModelProto:
    return graph_text(LOOP, {"w_in": normal(1, 16, 24), "w_out": normal(2, 24, 16)})


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled(spelling: str, steps: int) -> None:
    found = find_flow(editable(_unrolled(spelling, steps)).graph)
    assert [step.add.outputs[0].name for step in found] == [f"x{i}" for i in range(steps)]
    assert [step.scaled.outputs[0].name for step in found] == [f"d{i}" for i in range(steps)]
    assert [step.velocity.name for step in found] == [f"v{i}" for i in range(steps)]
    assert found[0].state.name == "noise"


def test_steps_without_attention_have_no_layers() -> None:
    found = Layers(editable(_unrolled("x + dt * v", 2)).graph).operators
    assert {operator.place.layer for operator in found} == {None}
    assert [operator.place.step for operator in found if operator.name == "flow accumulation"] == [0, 1]


def test_through_casts() -> None:
    proto = _unrolled("x + dt * v", 2, tail="half = Cast<to = 10>({x})\n actions = Cast<to = 1>(half)")
    assert len(find_flow(editable(proto).graph)) == 2


def test_in_a_loop() -> None:
    graph = editable(_loop()).graph
    (step,) = find_flow(graph)
    assert step.scope is not graph
    assert step.add.outputs[0].name == "x_out"
    assert step.state.name == "x_in"
    assert step.velocity.name == "v"


def test_time_is_no_flow() -> None:
    """t + dt has no product with a velocity."""
    assert "t_out" not in {step.add.outputs[0].name for step in find_flow(editable(_loop()).graph)}


@pytest.mark.parametrize(
    "tail",
    ["squared = Mul({x}, {x})\n actions = Add(squared, noise)", "actions = Tanh({x})"],
    ids=["not linear", "squashed at the end"],
)
def test_not_a_chain_to_an_output(tail: str) -> None:
    assert find_flow(editable(_unrolled("x + dt * v", 2, tail)).graph) == []


def test_residual_blocks_are_no_flow() -> None:
    text = """
    g (float[1,4,16] x) => (float[1,4,16] y) {
      a = MatMul(x, w_a)
      b = Add(x, a)
      c = MatMul(b, w_c)
      y = Add(b, c)
    }"""
    weights = {"w_a": normal(1, 16, 16), "w_c": normal(2, 16, 16)}
    assert find_flow(editable(graph_text(text, weights)).graph) == []


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_with_dt_in_the_weight(spelling: str) -> None:
    """The weight that all steps share tells them from residual blocks; of one step nothing does."""
    model = editable(_unrolled(spelling))
    assert run_pass(model, "fold_scales").changes == ("d0.Mul", "d1.Mul", "d2.Mul")
    found = find_flow(model.graph)
    assert [step.add.outputs[0].name for step in found] == ["x0", "x1", "x2"]
    assert {step.scaled for step in found} == {None}
    into, out = flow_linears(model.graph)
    assert ({linear.weight.name for linear in into}, {linear.weight.name for linear in out}) == (
        {"w_in"},
        {"w_out"},
    )
    single = editable(_unrolled(spelling, 1))
    (skip,) = run_pass(single, "fold_scales").skips
    assert skip.reason == "it is dt of a single step"
    assert len(find_flow(single.graph)) == 1


def test_with_dt_in_the_weight_of_a_body() -> None:
    model = editable(_loop())
    assert run_pass(model, "fold_scales").changes == ("d.Mul",)
    (step,) = find_flow(model.graph)
    assert (step.scaled, step.state.name, step.velocity.name) == (None, "x_in", "v")
    assert set(parts_of(model.graph).values()) == {"denoise"}


@pytest.mark.parametrize("proto", [_unrolled("x + dt * v"), _loop()], ids=["unrolled", "loop"])
def test_linears_at_the_ends(proto: onnx.ModelProto) -> None:
    into, out = flow_linears(editable(proto).graph)
    assert {linear.weight.name for linear in into} == {"w_in"}
    assert {linear.weight.name for linear in out} == {"w_out"}
    assert len(into) == len(out) == (1 if len(proto.graph.node) == 1 else 3)


POLICY = """
    g (float[2,3,8,8] images, int64[1,4] tokens, bool[1,1,1,12] valid, float[1,4,16] noise) => (float[1,4,16] actions)
      <int64[3] patches = {2, 16, 4}, int64[3] one_batch = {1, 8, 16}, float root = {4}, float zero = {0}, float lowest = {-1e9},
       float dt = {-0.5}> {
      conv = Conv<strides = [4, 4]>(images, patch_weight)
      rows = Reshape(conv, patches)
      columns = Transpose<perm = [0, 2, 1]>(rows)
      positioned = Add(columns, position)
      seen = Relu(positioned)
      features = Reshape(seen, one_batch)
      embedded = Gather(table, tokens)
      text = Mul(embedded, root)
      prefix = Concat<axis = 1>(features, text)
      keys = MatMul(prefix, wk)
      mask = Where(valid, zero, lowest)
      q0 = MatMul(noise, w_in)
      kt = Transpose<perm = [0, 2, 1]>(keys)
      logits0 = MatMul(q0, kt)
      probs0 = Softmax<axis = -1>(logits0)
      v0 = MatMul(probs0, keys)
      d0 = Mul(v0, dt)
      x0 = Add(noise, d0)
      q1 = MatMul(x0, w_in)
      logits1 = MatMul(q1, kt)
      probs1 = Softmax<axis = -1>(logits1)
      v1 = MatMul(probs1, keys)
      d1 = Mul(v1, dt)
      actions = Add(x0, d1)
    }"""


def _policy() -> onnx.ModelProto:
    return graph_text(
        POLICY,
        {
            "patch_weight": normal(1, 16, 3, 4, 4),
            "position": normal(2, 1, 4, 16),
            "table": normal(3, 16, 16),
            "wk": normal(4, 16, 16),
            "w_in": normal(5, 16, 16),
        },
    )


def test_parts() -> None:
    model = editable(_policy())
    parts = parts_of(model.graph)
    by_part: dict[str, set[str]] = {}
    for node in model.graph.nodes:
        by_part.setdefault(parts[id(node)], set()).add(node.outputs[0].name)
    assert by_part == {
        "vision": {"conv", "rows", "columns", "positioned", "seen", "features"},
        "prefix": {"embedded", "text", "prefix", "keys", "kt", "mask"},
        "denoise": {f"{name}{i}" for name in ("q", "logits", "probs", "v", "d") for i in (0, 1)}
        | {"x0", "actions"},
    }


def test_a_loop_that_denoises_is_one_part() -> None:
    model = editable(_loop())
    parts = parts_of(model.graph)
    assert set(parts.values()) == {"denoise"}
    assert parts[id(node_of(model, "v"))] == "denoise"


def test_dt_is_one_number() -> None:
    """A step size for each action dimension is not the flow that pi0.5 integrates."""
    text = "g (float[1,4,16] x, float[1,4,16] v) => (float[1,4,16] y) {\n d = Mul(v, dt)\n y = Add(x, d)\n}"
    assert find_flow(editable(graph_text(text, {"dt": np.full(16, 0.1, np.float32)})).graph) == []
    assert len(find_flow(editable(graph_text(text, {"dt": np.full(1, 0.1, np.float32)})).graph)) == 1
