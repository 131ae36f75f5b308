"""Groups of the reference model: what they hold, and the pipelines that choices of their formats become."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import onnx_graphsurgeon as gs
import pytest

from pi05c.cost import AssumedRanges
from pi05c.graph.io import Model, load, save
from pi05c.passes import PRESETS, pipeline
from pi05c.passes.patterns.linear import find_linears
from pi05c.tunegroups import FORMATS, KEPT, MATMULS, NVFP4_W4A16, Base, Group, find_groups, whole

CHOSEN = {
    "vision 1 MLP": "fp8_two_terms",
    "vision 0 attention": KEPT,
    "LLM 0 MLP": "nvfp4_two_terms",
    "LLM 1 MLP": "nvfp4",
    "LLM 1 attention": KEPT,
    "expert 0 MLP": "nvfp4",
    "expert attention MatMuls": KEPT,
    "vision attention MatMuls": "fp8",
}
"""Formats of some groups; all others get FP8."""


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.of(pipeline.parse("default", PRESETS))


@pytest.fixture(scope="module")
def stage(brief_model: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph that choices start from; its ranges are assumed."""
    path = tmp_path_factory.mktemp("stage") / "stage.onnx"
    model = load(brief_model)
    pipeline.run(model, base.ahead, calibrate=lambda *_: AssumedRanges())
    save(model, path)
    return path


@pytest.fixture(scope="module")
def groups(stage: Path, base: Base) -> list[Group]:
    formats = [each for each in FORMATS if each != NVFP4_W4A16]
    return find_groups(lambda: load(stage), base, AssumedRanges(), formats)


def rewritten(stage: Path, base: Base, groups: list[Group], choice: dict[str, str]) -> Model:
    model = load(stage)
    steps = base.with_choice(groups, choice)[base.cut :]
    text = ",".join(step.text for step in steps)
    pipeline.run(model, pipeline.parse(text, PRESETS), calibrate=lambda *_: AssumedRanges())
    return model


def quantized(graph: gs.Graph) -> dict[str, set[str]]:
    """Names of the weights that are stored in FP8 and in FP4."""
    names = {
        "fp8": {str(t.name) for t in graph.tensors().values() if str(t.name).endswith(".fp8")},
        "fp4": {str(t.name) for t in graph.tensors().values() if str(t.name).endswith(".fp4")},
    }
    return {
        kind: {name.rsplit(".", 1)[0] for name in found if ".weight" in name} for kind, found in names.items()
    }


def test_groups_name_each_quantizable_weight_once(stage: Path, groups: list[Group]) -> None:
    weights = {linear.weight.name for linear in find_linears(load(stage).graph)}
    held = [
        [weight for weight in weights if any(fnmatch.fnmatch(weight, pattern) for pattern in group.patterns)]
        for group in groups
        if group.kind != MATMULS
    ]
    assert all(held)
    flat = [weight for found in held for weight in found]
    assert len(flat) == len(set(flat))
    assert weights - set(flat) == {"action_in_proj.weight", "action_out_proj.weight"}
    assert [group.name for group in groups][:3] == ["vision linear", "vision 0 attention", "vision 0 MLP"]
    assert all(group.formats == ("fp8",) for group in groups if group.kind == MATMULS)


def test_a_choice_becomes_these_formats(stage: Path, base: Base, groups: list[Group]) -> None:
    choice = {**whole(groups, "fp8"), **CHOSEN}
    assert set(CHOSEN) <= set(whole(groups, "fp8"))
    found = quantized(rewritten(stage, base, groups, choice).graph)
    for group in groups:
        if group.kind == MATMULS:
            continue
        for kind, wanted in (
            ("fp8", choice[group.name].startswith("fp8")),
            ("fp4", "fp4" in choice[group.name]),
        ):
            inside = [
                weight
                for weight in found[kind]
                if any(fnmatch.fnmatch(weight, pattern) for pattern in group.patterns)
            ]
            assert bool(inside) == wanted, (group.name, kind)


def test_a_choice_is_written_in_few_words(base: Base, groups: list[Group]) -> None:
    steps = {step.spec.name: step for step in base.with_choice(groups, {**whole(groups, "fp8"), **CHOSEN})}
    options = steps["quantize_linears"].options
    assert options["llm"] == "nvfp4"
    assert [name.split(".")[-3] for name in options["nvfp4"]] == ["0"]
    assert len(options["two_terms"]) == 2
    assert len(options["keep"]) == 2
    assert steps["insert_attention_qdq"].options == {"vision": True, "keep": ("denoise",)}
    assert base.with_choice(groups, whole(groups, "fp8")) == base.steps


def test_layers_share_groups_where_there_are_many(stage: Path, base: Base) -> None:
    groups = find_groups(lambda: load(stage), base, AssumedRanges(), ["fp8"], 1)
    assert [group.layers for group in groups if group.kind == "MLP"] == [(0, 1), (0, 2), (0, 2)]
    finer = find_groups(lambda: load(stage), base, AssumedRanges(), ["fp8"], 2)
    assert [group.layers for group in finer if group.name.startswith("expert")][:4] == [
        (0, 1),
        (0, 1),
        (2, 2),
        (2, 2),
    ]
