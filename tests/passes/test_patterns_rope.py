"""Rotary embedding in each of its spellings, and the angles that it reads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pass_graphs import editable, graph_text, outputs_of, seeded_inputs

from pi05c.passes.patterns.rope import find_angles, find_rope

HALVES = """
    x1 = Slice(x, zero, half, last)
    x2 = Slice(x, half, end, last)"""
SPLIT = "    x1, x2 = Split<axis = -1>(x, sizes)"
ROTATE_HALF = """
    minus = Neg(x2)
    turned = Concat<axis = -1>(minus, x1)
    straight = Mul(x, cos)
    crossed = Mul(turned, sin)
    y = Add(straight, crossed)"""
PARTS = """
    a = Mul(x1, cos_half)
    b = Mul(x2, sin_half)
    left = Sub(a, b)
    c = Mul(x2, cos_half)
    d = Mul(x1, sin_half)
    right = Add(c, d)
    y = Concat<axis = -1>(left, right)"""
OPERATOR = "    y = RotaryEmbedding(x, cos_half, sin_half, positions)"


def _model(body: str, opset: int = 21) -> onnx.ModelProto:
    operator = "RotaryEmbedding" in body
    rank = "" if operator else "1,1,"
    return graph_text(
        f"""
        g (float[1,2,3,8] x, float[1,1,3,8] cos, float[1,1,3,8] sin, float[{rank}3,4] cos_half, float[{rank}3,4] sin_half,
           int64[1,3] positions) => (float[1,2,3,8] y)
          <int64[1] zero = {{0}}, int64[1] half = {{4}}, int64[1] end = {{8}}, int64[1] last = {{-1}}, int64[2] sizes = {{4, 4}}> {{
          {body}
        }}""",
        opset=opset,
    )


@pytest.mark.parametrize("halves", [HALVES, SPLIT], ids=["slice", "split"])
@pytest.mark.parametrize("rotation", [ROTATE_HALF, PARTS], ids=["rotate half", "parts"])
@pytest.mark.parametrize("casts", [False, True], ids=["plain", "casts"])
def test_found(halves: str, rotation: str, casts: bool) -> None:
    body = f"{halves}\n{rotation}"
    for product in ("straight", "crossed", "a", "d") if casts else ():
        body = body.replace(f"({product}, ", f"({product}_32, ").replace(f", {product})", f", {product}_32)")
        body = body.replace(f" {product} = Mul(", f" {product}_16 = Mul(")
    if casts:
        for product in ("straight", "crossed", "a", "d"):
            if f"{product}_16" in body:
                body = f"{body}\n {product}_half = Cast<to = 10>({product}_16)\n {product}_32 = Cast<to = 1>({product}_half)"
    graph = editable(_model(body)).graph
    (found,) = find_rope(graph)
    assert found.input.name == "x"
    assert found.output.name == "y"
    rotation_ops = {"Slice", "Split", "Neg", "Concat", "Mul", "Add", "Sub"}
    inside = {node.name for node in found.nodes}
    assert inside == {node.name for node in graph.nodes if node.op in rotation_ops}
    assert len(found.nodes) == len(inside)


def test_operator() -> None:
    proto = _model(OPERATOR, 23)
    for name in ("cos_half", "sin_half"):
        assert name in {value.name for value in proto.graph.input}
    (found,) = find_rope(editable(proto).graph)
    assert [node.op for node in found.nodes] == ["RotaryEmbedding"]
    assert (found.input.name, found.output.name) == ("x", "y")


def test_spellings_are_one_function() -> None:
    angle = np.random.default_rng(0).uniform(0, 3, (1, 1, 3, 4)).astype(np.float32)
    both = np.concatenate([angle, angle], -1)
    tables = {"cos": np.cos(both), "sin": np.sin(both), "cos_half": np.cos(angle), "sin_half": np.sin(angle)}
    results = []
    for body in (f"{HALVES}\n{ROTATE_HALF}", f"{SPLIT}\n{PARTS}"):
        proto = _model(body)
        results.append(outputs_of(proto, {**seeded_inputs(proto), **tables})["y"])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [
        f"{HALVES}\n{ROTATE_HALF}".replace("minus = Neg(x2)", "minus = Abs(x2)"),
        f"{HALVES}\n{ROTATE_HALF}".replace("straight = Mul(x, cos)", "straight = Mul(sin, cos)"),
        f"{HALVES}\n{PARTS}".replace("left = Sub(a, b)", "left = Add(a, b)"),
        "a = Mul(x, cos)\n b = Mul(x, sin)\n y = Add(a, b)",
        "y = Concat<axis = -1>(cos_half, sin_half)",
    ],
    ids=["no negation", "other tensor", "sum on both sides", "no halves", "tables"],
)
def test_no_rope(body: str) -> None:
    assert find_rope(editable(_model(body)).graph) == []


def test_angles_reach_back_to_integers_and_constants() -> None:
    graph = editable(
        graph_text(
            """
            g (int64[1,6] positions, float16[1,6] other) => (float16[1,6,4] cos, float16[1,6,4] sin, float16[1,6] twice)
              <float16[4] frequency = {1, 0.1, 0.01, 0.001}, int64[1] two = {2}> {
              p = Cast<to = 10>(positions)
              column = Unsqueeze(p, two)
              angle = Mul(column, frequency)
              cos = Cos(angle)
              sin = Sin(angle)
              twice = Add(other, other)
            }"""
        )
    ).graph
    found = find_angles(graph)
    assert [[node.op for node in nodes] for _, nodes in found] == [
        ["Cast", "Unsqueeze", "Mul", "Cos"],
        ["Cast", "Unsqueeze", "Mul", "Sin"],
    ]
