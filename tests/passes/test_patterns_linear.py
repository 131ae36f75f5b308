"""Linears: MatMul or Gemm, the weight stored in any way and reached through any casts and transposes."""

from __future__ import annotations

import itertools

import ml_dtypes
import pytest
from pass_graphs import editable, graph_text, normal

from pi05c.passes.patterns.linear import Linear, find_linears

INNER, OUTER = 8, 12


def _find(body: str, stored: tuple[int, ...] = (INNER, OUTER), **more: tuple[int, ...]) -> list[Linear]:
    weights = {"w": normal(1, *stored, dtype=ml_dtypes.bfloat16)}
    weights |= {name: normal(2, *shape) for name, shape in more.items()}
    text = f"g (float[4,{INNER}] x, float[4,{INNER},4] batched) => (float[4,{OUTER}] y) {{\n{body}\n}}"
    return find_linears(editable(graph_text(text, weights)).graph)


STEPS = {"cast": "Cast<to = 1>", "transpose": "Transpose<perm = [1, 0]>", "identity": "Identity"}


@pytest.mark.parametrize(
    "path", [path for n in range(1, 4) for path in itertools.permutations(STEPS, n) if "cast" in path]
)
@pytest.mark.parametrize("spelling", ["MatMul(x, {})", "Gemm(x, {})", "Gemm<transB = 1>(x, {})"])
def test_every_order(path: tuple[str, ...], spelling: str) -> None:
    lines, last = [], "w"
    for index, step in enumerate(path):
        lines.append(f"t{index} = {STEPS[step]}({last})")
        last = f"t{index}"
    turned = ("transpose" in path) != ("transB" in spelling)
    stored = (OUTER, INNER) if turned else (INNER, OUTER)
    (found,) = _find("\n".join([*lines, f"y = {spelling.format(last)}"]), stored)
    assert found.weight.name == "w"
    assert found.transposed is turned
    assert (found.rows, found.columns) == (INNER, OUTER)
    assert [node.op for node in found.path] == [STEPS[step].split("<")[0] for step in path]
    assert found.activation.name == "x"


def test_two_transposes_cancel() -> None:
    body = "a = Transpose<perm = [1, 0]>(v)\n b = Transpose(a)\n y = MatMul(x, b)"
    (found,) = _find(body, v=(INNER, OUTER))
    assert not found.transposed
    assert len(found.path) == 2


def test_identity_permutation_turns_nothing() -> None:
    (found,) = _find("a = Transpose<perm = [0, 1]>(v)\n y = MatMul(x, a)", v=(INNER, OUTER))
    assert not found.transposed


def test_through_quantizers() -> None:
    body = """
    codes = QuantizeLinear(v, scale, zero)
    factor = DequantizeLinear(codes, scale, zero)
    y = MatMul(x, factor)"""
    text = f"g (float[4,{INNER}] x) => (float[4,{OUTER}] y) <float scale = {{0.1}}, int8 zero = {{0}}> {{{body}}}"
    (found,) = find_linears(editable(graph_text(text, {"v": normal(1, INNER, OUTER)})).graph)
    assert [node.op for node in found.path] == ["QuantizeLinear", "DequantizeLinear"]


def test_in_a_loop_with_a_captured_weight() -> None:
    text = f"""
    g (float[4,{INNER}] x0) => (float[4,{INNER}] x) <int64 trip = {{3}}, bool go = {{1}}> {{
      wide = Cast<to = 1>(w)
      x = Loop(trip, go, x0) <
        body = step (int64 i, bool again, float[4,{INNER}] x_in) => (bool keep, float[4,{INNER}] x_out) {{
          keep = Identity(again)
          x_out = MatMul(x_in, wide)
        }}>
    }}"""
    graph = editable(graph_text(text, {"w": normal(1, INNER, INNER, dtype=ml_dtypes.bfloat16)})).graph
    (found,) = find_linears(graph)
    assert found.scope is not graph
    assert found.weight.name == "w"


@pytest.mark.parametrize(
    "body",
    [
        "z = Transpose<perm = [1, 0]>(x)\n y = MatMul(x, z)",
        "y = MatMul(batched, cube)",
        "y = MatMul(left, w32)",
        "y = Gemm<transA = 1>(x, side)",
        "y = Mul(x, row)",
    ],
    ids=[
        "two activations",
        "batch of weights",
        "constant on both sides",
        "left factor transposed",
        "no product",
    ],
)
def test_no_linear(body: str) -> None:
    shapes = {
        "cube": (4, 4, 4),
        "left": (4, INNER),
        "w32": (INNER, OUTER),
        "side": (4, OUTER),
        "row": (INNER,),
    }
    assert _find(body, **{name: shape for name, shape in shapes.items() if name in body}) == []
