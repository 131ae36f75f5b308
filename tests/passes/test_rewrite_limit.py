"""Every pass can be stopped after its first N rewrites, and what is left then is a whole, valid graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_graphsurgeon as gs
import pytest
from every_case import CASES, GoldenCase
from pass_graphs import (
    editable,
    fitted,
    graph_text,
    outputs_of,
    ranges_of,
    relative_error,
    seeded_inputs,
    text_of,
)

from pi05c.graph.check import problems
from pi05c.graph.errors import UsageError
from pi05c.graph.io import Model
from pi05c.passes import PRESETS, REGISTRY, PassContext, graph_pass
from pi05c.passes.pipeline import Step, StepResult, parse, run


def _limited(model: Model, case: GoldenCase, limit: int | None) -> StepResult:
    spec = REGISTRY[case.graph_pass]
    ranges = None if case.ranges is None else ranges_of(case.ranges)
    step = Step(spec, spec.parse_options(case.options), limit)
    return run(model, [step], calibrate=lambda _, names: ranges)[0]


def _drawn(ranges: Mapping[str, tuple[float, float]] | None) -> dict[str, tuple[float, float]]:
    infinite = float("inf")
    return {name: (a, b) for name, (a, b) in (ranges or {}).items() if -infinite < a < b < infinite}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.graph_pass}/{case.name}")
def test_each_limit_leaves_a_whole_graph(case: GoldenCase) -> None:
    plain, whole = editable(case.model()), editable(case.model())
    before = text_of(plain)
    every = _limited(whole, case, None).rewrites
    inputs = fitted(whole, seeded_inputs(plain, 0, _drawn(case.ranges)))
    expected = outputs_of(plain, inputs)
    seen = []
    for limit in range(len(every) + 2):
        model = editable(case.model())
        result = _limited(model, case, limit)
        assert result.rewrites == every[:limit]
        assert problems(model) == []
        if REGISTRY[case.graph_pass].exact:
            assert relative_error(outputs_of(model, inputs), expected) <= 1e-6
        seen.append(text_of(model))
    assert seen[0] == before
    assert seen[len(every)] == seen[-1] == text_of(whole), "the last rewrite completes the pass"


CHAIN = "g (float[4] x) => (float[4] y) { a = Neg(x)\n b = Neg(a)\n y = Neg(b) }"


@pytest.fixture
def sloppy_pass() -> Iterator[None]:
    """A pass that knows nothing of limits and catches what it can."""

    @graph_pass(exact=False)
    def sloppy(graph: gs.Graph, ctx: PassContext) -> None:
        """Turn each Neg into Abs."""
        for node in graph.nodes:
            if node.op == "Neg":
                try:
                    node.op = "Abs"
                    ctx.changed(node)
                except Exception:
                    raise AssertionError from None

    yield
    del REGISTRY["sloppy"]


@pytest.mark.usefixtures("sloppy_pass")
@pytest.mark.parametrize("limit", range(5))
def test_a_pass_needs_no_knowledge_of_limits(limit: int) -> None:
    model = editable(graph_text(CHAIN))
    (result,) = run(model, parse(f"sloppy{{rewrite_limit={limit}}}", PRESETS))
    assert [node.op for node in model.graph.nodes].count("Abs") == len(result.changes) == min(limit, 3)


def test_the_limit_is_part_of_the_text() -> None:
    text = "quantize_linears{keep=a,b,rewrite_limit=3},dedupe{rewrite_limit=0}"
    steps = parse(text, PRESETS)
    assert [step.limit for step in steps] == [3, 0]
    assert list(steps[0].options) == ["keep"]
    assert ",".join(step.text for step in steps) == text


@pytest.mark.parametrize("limit", ["-1", "x", "1.5", ""])
def test_a_limit_that_is_no_number_is_refused(limit: str) -> None:
    with pytest.raises(UsageError, match="rewrite_limit"):
        parse(f"dedupe{{rewrite_limit={limit}}}", PRESETS)
