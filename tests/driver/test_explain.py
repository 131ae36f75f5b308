"""`pi05c explain` as a user types it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from full_size import write_full_size
from small_policy import policy

from pi05c.passes import PRESETS

__all__ = ["policy"]


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_size(tmp_path_factory.mktemp("full"))


def explained(pi05c: Command, *words: str | Path) -> Any:
    result = pi05c("explain", *words, "--json")
    assert result.status == 0, result.err
    return json.loads(result.out)


def test_each_rewrite_is_a_line_with_its_place_and_what_becomes_of_it(pi05c: Command, policy: Path) -> None:
    result = pi05c("explain", policy, "--pass", "quantize_linears")
    assert result.status == 0
    first, *_, last = result.out.splitlines()
    assert first.split()[:4] == ["1", "prefix", "MatMul", "project"]
    assert first.endswith(
        "reads %x.dequantized; reads %w.dequantized; adds 2 DequantizeLinear, 1 QuantizeLinear"
    )
    assert "quantize_linears: 1 rewrite, 0 places left alone, 3 -> 6 nodes" in result.out
    assert "ranges: assumed" in result.out
    assert last == (
        "on the graph as it is: in a pipeline it comes behind lower_precision, pin_fp32 "
        "(--passes default runs what precedes it)"
    )


def test_a_rewrite_as_canonical_text(pi05c: Command, policy: Path) -> None:
    out = pi05c("explain", policy, "--pass", "canonicalize", "--diff").out
    assert "    - %same: float32[1,8,32] = Identity(%product)" in out
    assert "    + %actions: float32[1,8,32] = Add(%product, %bias)" in out
    assert "removed: %product of MatMul takes its place; edits 1 Add" in out
    assert "    - " not in pi05c("explain", policy, "--pass", "canonicalize").out


def test_nothing_on_the_disk_is_touched(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    def content() -> dict[Path, tuple[bytes, int]]:
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}

    before = content()
    for name in PRESETS["default"]:
        assert pi05c("explain", policy, "--pass", name, "--passes", "default").status == 0
    assert content() == before


@pytest.mark.slow
def test_what_is_told_is_what_the_pipeline_does(pi05c: Command, brief_model: Path, tmp_path: Path) -> None:
    samples = brief_model.with_name("model.calibration.npz")
    run = pi05c(brief_model, "--calibration", samples, "--dump", tmp_path / "stages", "--json")
    told = {entry["name"]: entry for entry in json.loads(run.out)["passes"][:-1]}
    for name in PRESETS["default"][1:-1]:
        found = explained(pi05c, brief_model, "--pass", name, "--passes", "default", "--calibration", samples)
        assert found["behind"] == list(PRESETS["default"][: PRESETS["default"].index(name)])
        assert len(found["rewrites"]) == told[name]["rewrites"]
        assert [{"where": place["name"], "reason": place["reason"]} for place in found["skipped"]] == told[
            name
        ]["skipped"]
        assert (found["nodes_before"], found["nodes_after"]) == (
            told[name]["nodes_before"],
            told[name]["nodes_after"],
        )
        stage = next((tmp_path / "stages").glob(f"{len(found['behind']):02d}-*.onnx"))
        again = explained(pi05c, brief_model, "--pass", name, "--start-from", stage, "--calibration", samples)
        assert again["rewrites"] == found["rewrites"], name
        assert again["skipped"] == found["skipped"], name


def test_each_place_has_its_part_and_scope(pi05c: Command, brief_model: Path) -> None:
    found = explained(pi05c, brief_model, "--pass", "fold_gqa")
    places = [changed for rewrite in found["rewrites"] for changed in rewrite["changed"]]
    assert {(place["operator"], place["part"], bool(place["scope"])) for place in places} == {
        ("Softmax", "prefix", False),
        ("Softmax", "denoise", True),
    }
    assert all(rewrite["beside"].count("MatMul") == 1 for rewrite in found["rewrites"])
    assert all(rewrite["added"] and rewrite["removed"] for rewrite in found["rewrites"])


def test_ranges_beside_a_stage_are_used_where_they_hold(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    assert pi05c(policy, "--dump", stages).status == 0
    files = {path.name[3:-5]: path for path in stages.glob("*.onnx") if path.name[:2] < "13"}
    behind = explained(pi05c, policy, "--pass", "quantize_linears", "--start-from", files["pin_fp32"])
    assert behind["ranges"].startswith("recorded beside")
    early = explained(pi05c, policy, "--pass", "quantize_linears", "--start-from", files["canonicalize"])
    assert early["ranges"].startswith("assumed")
    assert explained(pi05c, policy, "--pass", "dedupe")["ranges"] is None


def test_ranges_are_measured_by_the_method_that_is_named(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PI05C_CACHE", str(tmp_path))
    samples = policy.with_name("model.calibration.npz")
    run = ("--pass", "quantize_linears", "--calibration", samples)
    kept = []
    for method in ("max", "percentile{percent=50}", "max"):
        found = explained(pi05c, policy, *run, "--calibration-method", method)
        assert found["ranges"].endswith(f", by {method}")
        kept.append(len(list(tmp_path.rglob("ranges/*.json"))))
    assert kept[0] < kept[1] == kept[2]
    assert pi05c("explain", policy, *run, "--calibration-method", "nothing").status == 2


def test_a_pass_of_a_plugin_with_an_option(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        textwrap.dedent(
            """
            from pi05c.passes import graph_pass

            @graph_pass(exact=False)
            def soften(graph, ctx, *, to: str = "Relu"):
                "Replace what adds."
                for node in graph.nodes:
                    if node.op == "Add":
                        node.op, node.inputs = to, node.inputs[:1]
                        ctx.changed(node)
                    else:
                        ctx.skip(node, "it does not add")
            """
        )
    )
    found = explained(pi05c, policy, "--plugin", plugin, "--pass", "soften{to=Tanh}")
    assert found["pass"] == "soften{to=Tanh}"
    (rewrite,) = found["rewrites"]
    assert rewrite["changed"][0]["becomes"] == "Add -> Tanh"
    assert [(place["name"], place["reason"]) for place in found["skipped"]] == [
        ("project", "it does not add"),
        ("nothing", "it does not add"),
    ]


@pytest.mark.parametrize("text", ["default", "dedupe,fold_gqa", "-dedupe", "dedup", "dedupe{x=1}", ""])
def test_what_is_not_one_pass_is_refused(pi05c: Command, policy: Path, text: str) -> None:
    result = pi05c("explain", policy, f"--pass={text}")
    assert result.status == 2
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("fuse_projections", "quantize_linears") else pytest.mark.slow)
        for name in PRESETS["default"][:-1]
    ],
)
def test_the_full_size_without_its_weights(pi05c: Command, full_size: Path, name: str) -> None:
    found = explained(pi05c, full_size, "--pass", name)
    assert found["rewrites"] or found["skipped"] or name == "pin_fp32"
    for place in (*(c for r in found["rewrites"] for c in r["changed"]), *found["skipped"]):
        assert place["part"] in ("vision", "prefix", "denoise") or place["operator"] == ""
