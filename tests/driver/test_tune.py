"""`pi05c tune` on the reference model: what it measures, chooses, writes, and finds again."""

from __future__ import annotations

import io
import json
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from small_policy import policy

import pi05c as api
from pi05c import cli
from pi05c.graph.io import load
from pi05c.passes.patterns.linear import find_linears
from pi05c.passes.quantize import is_quantized
from pi05c.pipelinefile import read_pipeline_file

__all__ = ["policy"]  # a fixture

LIMIT = 0.03
OPTIONS = (
    "--formats",
    "fp8",
    "--resolution",
    "1",
    "--samples",
    "2",
    "--max-error",
    str(LIMIT),
    "--minimize",
    "stored",
)


@pytest.fixture(scope="module")
def folder(brief_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, its samples, and what one run of tune left."""
    place = tmp_path_factory.mktemp("tune")
    for path in brief_model.parent.glob("model.*"):
        shutil.copy(path, place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PI05C_CACHE", str(place / "cache"))
        assert cli.main(["tune", str(place / "model.onnx"), "-o", str(place / "r.toml"), *OPTIONS]) == 0
    return place


@pytest.fixture(scope="module")
def again(folder: Path) -> dict[str, Any]:
    """What a second run says."""
    before, told = (folder / "r.toml").read_text(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(told):
        patch.setenv("PI05C_CACHE", str(folder / "cache"))
        command = ["tune", str(folder / "model.onnx"), "-o", str(folder / "r.toml"), *OPTIONS, "--json"]
        assert cli.main(command) == 0
    return {**json.loads(told.getvalue()), "wrote_the_same": (folder / "r.toml").read_text() == before}


def test_a_second_run_measures_nothing_and_writes_the_same(again: dict[str, Any]) -> None:
    assert again["measured"] == 0
    assert again["reused"] > len(again["groups"])
    assert again["wrote_the_same"]


def test_the_choice_lies_between_float16_and_what_is_naive(again: dict[str, Any]) -> None:
    points = {point["name"]: point for point in again["points"]}
    chosen, naive, kept = points["chosen"], points["FP8"], points["float16"]
    assert naive["error"] > LIMIT >= max(chosen["error"], chosen["held_back_error"])
    assert naive["stored_bytes"] < chosen["stored_bytes"] < kept["stored_bytes"]
    formats = {group["name"]: group["format"] for group in again["groups"]}
    assert {"kept", "fp8"} == set(formats.values())
    assert {
        "vision 0-1 MLP",
        "LLM 0-2 attention",
        "LLM attention MatMuls",
        "expert attention MatMuls",
    } <= set(formats)


def test_squares_of_errors_alone_predict_errors_together(again: dict[str, Any]) -> None:
    for point in again["points"]:
        if point["kind"] in ("naive", "chosen"):
            assert point["predicted"] == pytest.approx(point["error"], rel=0.5), point["name"]


def test_the_recipe_compiles_to_what_was_measured(
    folder: Path, again: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PI05C_CACHE", str(folder / "cache"))
    result = api.compile(
        folder / "model.onnx", tmp_path / "engine", passes=f"@{folder / 'r.toml'}", backend="onnxruntime"
    )
    verified = result.manifest.verification
    assert verified is not None
    chosen = again["points"][-1]
    assert verified.worst().relative_l2 == pytest.approx(chosen["held_back_error"], rel=1e-3)
    kept = [group["name"] for group in again["groups"] if group["format"] == "kept"]
    graph = load(tmp_path / "engine" / "model.onnx").graph
    plain = {linear.node.name for linear in find_linears(graph) if not is_quantized(linear.node.inputs[0])}
    parts = {"vision": "vision.", "LLM": "prefix.", "expert": "expert."}
    halves = {"MLP": ".mlp.", "attention": ".self_attn."}
    for part, inside in parts.items():
        for half, word in halves.items():
            is_kept = any(name.startswith(part) and name.endswith(half) for name in kept)
            assert any(inside in name and word in name for name in plain) == is_kept, (part, half)


def test_the_recipe_says_what_it_was_made_of(folder: Path, again: dict[str, Any]) -> None:
    found = read_pipeline_file(folder / "r.toml").provenance
    assert found["model"] == "model.onnx"
    assert len(found["model_sha256"]) == len(found["samples_sha256"]) == 64
    assert found["figures"]["error"] == again["points"][-1]["error"]
    assert set(found["formats"]) == {group["name"] for group in again["groups"]}


def test_compiling_another_model_with_it_is_warned_of(
    folder: Path, pi05c: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PI05C_CACHE", str(folder / "cache"))
    text = (folder / "r.toml").read_text().replace('model_sha256 = "', 'model_sha256 = "0')
    (tmp_path / "other.toml").write_text(text)
    passes = f"@{tmp_path / 'other.toml'},-quantize_linears,-insert_attention_qdq"
    result = pi05c(
        *("compile", folder / "model.onnx", "--passes", passes, "--backend", "onnxruntime"),
        *("-o", tmp_path / "engine"),
    )
    assert result.status == 0, result.err
    assert "made for another model" in " ".join(result.err.split())


def test_the_page_stands_alone_and_shows_the_choice(folder: Path) -> None:
    text = (folder / "r.html").read_text()
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    start, end = text.index("<svg"), text.index("</svg>") + len("</svg>")
    circles = ET.fromstring(text[start:end]).findall(".//circle")
    kinds = [circle.get("class") for circle in circles]
    assert kinds.count("chosen") == 1
    assert kinds.count("naive") >= 2


class Breaks(Executor):
    """Runs some tasks, then is interrupted."""

    def __init__(self, tasks: int) -> None:
        self.left = tasks

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        found: Future[Any] = Future()
        if self.left:
            self.left -= 1
            found.set_result(fn(*args, **kwargs))
        else:
            found.set_exception(KeyboardInterrupt())
        return found


def test_an_interrupted_run_goes_on(policy: Path, pi05c: Command) -> None:
    output = policy.with_name("r.toml")
    api.tune(
        policy, policy.with_name("other.toml"), max_error=0.04
    )  # its ranges are in the cache from here on
    before = {path.name for path in policy.parent.iterdir()}
    for tasks in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            api.tune(policy, output, executor=Breaks(tasks), max_error=0.04)
    assert {path.name for path in policy.parent.iterdir()} - before == {"r.measurements.json"}
    assert len(json.loads(output.with_suffix(".measurements.json").read_text())["measurements"]) == 3
    result = pi05c("tune", policy, "-o", output, "--max-error", "0.04")
    assert result.status == 0
    assert "were measured by an earlier run" in result.err
    assert output.read_text() == policy.with_name("other.toml").read_text().replace("other.toml", "r.toml")


def test_the_choice_does_not_depend_on_where_it_is_measured(policy: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        spread = api.tune(policy, policy.with_name("a.toml"), executor=pool, max_error=0.04)
    alone = api.tune(policy, policy.with_name("b.toml"), max_error=0.04)
    assert spread.points == alone.points
    assert spread.chosen.choice == {"LLM linear": "fp8"}


def test_a_dask_cluster_measures_the_same(dask_cluster: Any, policy: Path, pi05c: Command) -> None:
    recipes = []
    for where in ((), ("--dask", dask_cluster.scheduler_address)):
        folder = policy.parent / f"cache{len(recipes)}"
        folder.mkdir()
        output = folder / "r.toml"
        result = pi05c("tune", policy, "-o", output, "--max-error", "0.03", *where, "--json")
        assert result.status == 0, result.err
        told = json.loads(result.out)
        assert told["measured"] > 2
        assert told["reused"] == 0
        recipes.append((output.read_text(), told["points"]))
    assert recipes[0] == recipes[1]


def test_two_terms_are_a_format_that_the_recipe_names(policy: Path, pi05c: Command) -> None:
    recipe = policy.with_name("r.toml")
    result = pi05c("tune", policy, "-o", recipe, "--max-error", "0.03", "--minimize", "read", "--json")
    assert result.status == 0, result.err
    told = json.loads(result.out)
    alone = {name: effect["error"] for name, effect in told["groups"][0]["alone"].items()}
    assert alone["fp8_two_terms"] < 0.03 < alone["fp8"]
    assert told["groups"][0]["format"] == "fp8_two_terms"
    text = "quantize_linears{two_terms=w}"
    assert text in read_pipeline_file(recipe).text
    graphs = []
    for name, passes in (("by_recipe", f"@{recipe}"), ("by_text", f"default,{text}")):
        engine = policy.with_name(name)
        assert pi05c(policy, "--passes", passes, "--backend", "onnxruntime", "-o", engine).status == 0
        graphs.append([path.read_bytes() for path in sorted(engine.glob("model.onnx*"))])
    assert graphs[0] == graphs[1]
    split = [node.op for node in load(policy.with_name("by_recipe") / "model.onnx").graph.nodes]
    assert split.count("Split") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (("--passes", "fp16"), 2, "quantize_linears"),
        (("--formats", "fp8,int8"), 2, "'int8'"),
        (("--formats", "nvfp4,nvfp4_w4a16"), 2, "nvfp4 and nvfp4_w4a16"),
        (("--formats", "nvfp4", "--target", "l4"), 2, "FP4"),
        (("--target", "a100"), 2, "--passes fp16"),
        (("--minimize", "speed"), 2, "'speed'"),
        (("--samples", "0"), 2, "--samples 0"),
        (("--max-error", "-1"), 2, "max-error"),
        (("-o", "r.json"), 2, ".toml"),
    ],
)
def test_requests_that_cannot_be_met(
    arguments: tuple[str, ...], status: int, named: str, policy: Path, pi05c: Command
) -> None:
    before = set(policy.parent.iterdir())
    output = () if "-o" in arguments else ("-o", policy.with_name("r.toml"))
    result = pi05c("tune", policy, *output, *arguments)
    assert result.status == status
    assert named in result.err
    assert set(policy.parent.iterdir()) == before


def test_a_limit_that_float16_does_not_meet(policy: Path, pi05c: Command) -> None:
    result = pi05c("tune", policy, "-o", policy.with_name("r.toml"), "--max-error", "1e-5")
    assert result.status == 3
    assert "nothing quantized" in result.err
    assert not policy.with_name("r.toml").exists()


def test_what_a_recipe_was_verified_at_is_what_its_compile_measures(policy: Path, pi05c: Command) -> None:
    recipe = policy.with_name("r.toml")
    told = pi05c("tune", policy, "-o", recipe, "--max-error", "0.04", "--json")
    assert told.status == 0, told.err
    result = api.compile(policy, policy.with_name("engine"), passes=f"@{recipe}", backend="onnxruntime")
    verified = result.manifest.verification
    assert verified is not None
    assert verified.worst().relative_l2 == pytest.approx(
        json.loads(told.out)["points"][-1]["held_back_error"]
    )
