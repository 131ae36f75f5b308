"""Golden tests: a graph, what a pass makes of it, and the numbers of both.

`pytest --update-golden` writes `golden/`; nothing else does.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from every_case import CASES, GoldenCase
from pass_graphs import fitted, outputs_of_each, relative_error, seeded_inputs, text_of

from pi05c.golden import METADATA_KEY, PassCase, after_text, before_text, run_pass_case
from pi05c.graph.check import problems
from pi05c.graph.io import load, save
from pi05c.graph.ranges import Ranges
from pi05c.passes import REGISTRY

GOLDEN = Path(__file__).parents[2] / "golden"

SAMPLES = 3
"""Seeded inputs that the numbers are compared on."""


def drawn_from(case: PassCase) -> dict[str, tuple[float, float]]:
    """The ranges from which inputs are drawn; one that is not a range of numbers is left out."""
    ranges = case.ranges or Ranges({}, {})
    pairs = {name: (low, ranges.high[name]) for name, low in ranges.low.items()}
    return {name: pair for name, pair in pairs.items() if float("-inf") < pair[0] < pair[1] < float("inf")}


def _path(case: GoldenCase) -> Path:
    return GOLDEN / case.graph_pass / f"{case.name}.onnx"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.graph_pass}/{case.name}")
def test_builder_makes_the_stored_graph(case: GoldenCase, request: pytest.FixtureRequest) -> None:
    path = _path(case)
    content = case.model().SerializeToString(deterministic=True)
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        model = load(path)
        path.with_suffix(".before.txt").write_text(before_text(model))
        result = run_pass_case(model, case.graph_pass)
        path.with_suffix(".after.txt").write_text(after_text(model, result))
    assert path.read_bytes() == content


def test_every_file_has_a_builder() -> None:
    built = {f"{case.graph_pass}/{case.name}" for case in CASES}
    stored = {str(path.relative_to(GOLDEN)).split(".")[0] for path in GOLDEN.glob("*/*")}
    assert stored == built


def test_every_pass_shows_a_point_a_variant_and_a_refusal() -> None:
    for name in REGISTRY:
        results = [run_pass_case(load(_path(case)), name) for case in CASES if case.graph_pass == name]
        assert sum(bool(result.changes) for result in results) >= 2, name
        assert any(not result.changes and result.skips for result in results), name


@pytest.fixture(params=CASES, ids=lambda case: f"{case.graph_pass}/{case.name}")
def golden(request: pytest.FixtureRequest) -> Path:
    return _path(request.param)


def test_texts(golden: Path) -> None:
    model = load(golden)
    assert before_text(model) == golden.with_suffix(".before.txt").read_text()
    result = run_pass_case(model, golden.parent.name)
    assert after_text(model, result) == golden.with_suffix(".after.txt").read_text()
    assert problems(model) == []


def test_twice_is_once(golden: Path) -> None:
    model = load(golden)
    run_pass_case(model, golden.parent.name)
    once = text_of(model)
    again = run_pass_case(model, golden.parent.name)
    assert text_of(model) == once
    assert again.changes == ()


def test_saved_and_loaded_it_is_the_same(golden: Path, tmp_path: Path) -> None:
    model = load(golden)
    run_pass_case(model, golden.parent.name)
    save(model, tmp_path / "after.onnx")
    assert text_of(load(tmp_path / "after.onnx")) == text_of(model)


def test_numbers(golden: Path) -> None:
    name = golden.parent.name
    before, after = load(golden), load(golden)
    result = run_pass_case(after, name)
    stored = PassCase.of(before)
    limit = min(stored.limit, 1e-6) if REGISTRY[name].exact else stored.limit
    if not result.changes:
        assert text_of(after) == text_of(before)
    samples = [fitted(after, seeded_inputs(before, seed, drawn_from(stored))) for seed in range(SAMPLES)]
    for expected, actual in zip(
        outputs_of_each(before, samples), outputs_of_each(after, samples), strict=True
    ):
        types = [{key: value.dtype for key, value in outputs.items()} for outputs in (expected, actual)]
        assert types[0] == types[1]
        assert relative_error(actual, expected) <= limit


def test_metadata_is_readable_without_this_package(golden: Path) -> None:
    props = {prop.key: prop.value for prop in onnx.load(golden).metadata_props}
    assert json.loads(props[METADATA_KEY])["shows"].endswith(".")
