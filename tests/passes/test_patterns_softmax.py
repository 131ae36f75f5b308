"""Softmax in each of its spellings."""

from __future__ import annotations

import pytest
from pass_graphs import editable, graph_text

from pi05c.passes.patterns.softmax import find_softmaxes

OPERATOR = "y = Softmax<axis = -1>(x)"
BETWEEN_CASTS = "wide = Cast<to = 1>(x)\n probs = Softmax<axis = -1>(wide)\n y = Cast<to = 10>(probs)"
STABLE = """
    largest = ReduceMax<keepdims = 1>(x, last)
    centred = Sub(x, largest)
    e = Exp(centred)
    total = ReduceSum<keepdims = 1>(e, last)
    y = Div(e, total)"""
STABLE_WITH_CASTS = """
    largest = ReduceMax<keepdims = 1>(x, last)
    centred = Sub(x, largest)
    wide = Cast<to = 1>(centred)
    e = Exp(wide)
    narrow = Cast<to = 10>(e)
    total = ReduceSum<keepdims = 1>(narrow, last)
    y = Div(narrow, total)"""
PLAIN = "e = Exp(x)\n total = ReduceSum<keepdims = 1>(e, last)\n y = Div(e, total)"

OTHER_SUM = """
    e = Exp(x)
    square = Mul(e, e)
    total = ReduceSum<keepdims = 1>(square, last)
    y = Div(e, total)"""
OTHER_MAXIMUM = """
    half = Mul(x, x)
    largest = ReduceMax<keepdims = 1>(half, last)
    centred = Sub(x, largest)
    e = Exp(centred)
    total = ReduceSum<keepdims = 1>(e, last)
    y = Div(e, total)"""
RATIO = "total = ReduceSum<keepdims = 1>(x, last)\n y = Div(x, total)"


def _graph(body: str, dtype: str = "float16"):  # type: ignore[no-untyped-def]
    text = f"g ({dtype}[2,4] x) => ({dtype}[2,4] y) <int64[1] last = {{-1}}> {{\n{body}\n}}"
    return editable(graph_text(text)).graph


@pytest.mark.parametrize(
    ("body", "ops", "read", "made"),
    [
        (OPERATOR, ["Softmax"], "x", "y"),
        (BETWEEN_CASTS, ["Softmax"], "wide", "probs"),
        (STABLE, ["ReduceMax", "Sub", "Exp", "ReduceSum", "Div"], "x", "y"),
        (STABLE_WITH_CASTS, ["ReduceMax", "Sub", "Exp", "ReduceSum", "Div"], "x", "y"),
        (PLAIN, ["Exp", "ReduceSum", "Div"], "x", "y"),
    ],
    ids=["operator", "between casts", "decomposed", "decomposed with casts", "without a maximum"],
)
def test_found(body: str, ops: list[str], read: str, made: str) -> None:
    (found,) = find_softmaxes(_graph(body))
    assert [node.op for node in found.nodes] == ops
    assert found.input.name == read
    assert found.output.name == made
    assert found.name == found.nodes[-1].name


@pytest.mark.parametrize(
    "body", [OTHER_SUM, OTHER_MAXIMUM, RATIO], ids=["other sum", "other maximum", "ratio"]
)
def test_no_softmax(body: str) -> None:
    assert find_softmaxes(_graph(body)) == []


def test_in_a_branch() -> None:
    text = """
    g (float[2,4] x, bool c) => (float[2,4] y) {
      y = If(c) <
        then_branch = yes () => (float[2,4] p) { p = Softmax(x) },
        else_branch = no () => (float[2,4] q) { q = Relu(x) }>
    }"""
    graph = editable(graph_text(text)).graph
    (found,) = find_softmaxes(graph)
    assert found.scope is not graph
    assert found.name == "p.Softmax"
