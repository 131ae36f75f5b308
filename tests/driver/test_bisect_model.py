"""`pi05c bisect` on whole models: wrong passes are found to the node, and the reproducer shows what they did."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Command

from pi05c.cutout import run_cutout
from pi05c.graph.io import load
from pi05c.passes import REGISTRY

WRONG_PASSES = Path(__file__).with_name("wrong_passes.py")
SWAPPED = "canonicalize,swap_modulation"

Find = Callable[..., dict[str, Any]]


@pytest.fixture
def find(pi05c: Command, tmp_path: Path) -> Find:
    """Bisects to the folder `found`, and gives what was found."""

    def run(*words: str | Path, plugins: tuple[Path, ...] = (WRONG_PASSES,)) -> dict[str, Any]:
        named = (word for plugin in plugins for word in ("--plugin", plugin))
        result = pi05c("bisect", *words, *named, "-o", tmp_path / "found", "--json")
        assert result.status == 1, result.err
        found: dict[str, Any] = json.loads(result.out)
        return found

    return run


def place(guilty: dict[str, Any]) -> tuple[str, int, int]:
    return guilty["stage"], guilty["rewrite"], guilty["rewrites"]


def replayed(folder: Path) -> list[int]:
    """Exit statuses of the README's commands, run in order in its folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    blocks = re.findall(r"```sh\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return [
        subprocess.run(
            ["bash", "-c", line], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True
        ).returncode
        for block in blocks
        for line in block.splitlines()
    ]


def test_swapped_modulation(find: Find, pi05c: Command, brief_model: Path, tmp_path: Path) -> None:
    guilty = find(brief_model, "--passes", SWAPPED)["guilty"]
    assert place(guilty) == ("02-swap_modulation", 7, 7)
    assert guilty["names"] == ["expert.norm.Add_2"]
    cut = guilty["cutout"]
    for side in ("before", "after"):
        assert (cut[side]["loop"], cut[side]["nodes"]) == (
            "denoise.Loop",
            ["expert.norm.Add_1", "expert.norm.Add_2"],
        )
    assert min(cut["relative_l2"].values()) > 0.1

    folder = tmp_path / "found"
    given = {name: run_cutout(folder / f"{name}.min.onnx") for name in ("before", "after")}
    *made, compared = replayed(folder)
    assert made == [0, 0, 0, 0]
    assert compared == 1
    assert pi05c("diff", folder / "after.onnx", folder / "again" / "02-swap_modulation.onnx").status == 0
    for name, outputs in given.items():
        extracted = run_cutout(folder / f"{name}.min.onnx")
        assert all((extracted[output] == outputs[output]).all() for output in outputs)


@pytest.mark.slow
def test_swapped_modulation_of_a_deeper_model(find: Find, deep_model: Path) -> None:
    guilty = find(deep_model, "--passes", SWAPPED, "--calibration", "synthetic")["guilty"]
    assert place(guilty) == ("02-swap_modulation", 7, 15)
    assert guilty["names"] == ["expert.layers.3.input_layernorm.Add_2"]
    assert guilty["cutout"]["before"]["nodes"] == [
        "expert.layers.3.input_layernorm.Add_1",
        "expert.layers.3.input_layernorm.Add_2",
    ]


def test_dropped_key_scale(find: Find, brief_model: Path) -> None:
    guilty = find(brief_model, "--passes", "canonicalize,insert_attention_qdq,share_key_scales")["guilty"]
    assert place(guilty) == ("03-share_key_scales", 4, 5)
    cut = guilty["cutout"]
    assert cut["before"]["nodes"] == cut["after"]["nodes"] == guilty["names"]
    assert guilty["names"] == ["expert.layers.1.self_attn.Transpose_1.dequantized.DequantizeLinear"]
    assert next(iter(cut["relative_l2"].values())) > 1


def test_dumped_stages(find: Find, pi05c: Command, brief_model: Path, tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    plugin = ("--plugin", WRONG_PASSES)
    assert pi05c(brief_model, "--passes", f"{SWAPPED},dedupe", *plugin, "--dump", stages).status == 0
    guilty = find(stages)["guilty"]
    assert place(guilty) == ("02-swap_modulation", 7, 7)
    folder = tmp_path / "found"
    assert replayed(folder)[0] == 0
    assert pi05c("diff", folder / "after.onnx", folder / "again" / "02-swap_modulation.onnx").status == 0


def test_stages_without_their_plugin(
    find: Find, pi05c: Command, brief_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tmp_path / "stages"
    plugin = ("--plugin", WRONG_PASSES)
    assert pi05c(brief_model, "--passes", SWAPPED, *plugin, "--dump", stages).status == 0
    for name in ("swap_modulation", "share_scales"):
        monkeypatch.delitem(REGISTRY, name)
    guilty = find(stages, plugins=())["guilty"]
    assert (guilty["stage"], guilty["rewrite"], guilty["cutout"]) == ("02-swap_modulation", None, None)
    assert guilty["trouble"] == (
        "the rewrite was not looked for, since swap_modulation is a pass of a plug-in: give the --plugin that the stages "
        "were dumped with"
    )
    nowhere = pi05c("bisect", stages, "--plugin", tmp_path / "nowhere.py")
    assert nowhere.status == 2
    assert (
        nowhere.err
        == f"error: there is no plug-in {tmp_path / 'nowhere.py'}: name a Python file that registers passes\n"
    )


def test_start_from(find: Find, pi05c: Command, brief_model: Path, tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    assert pi05c(brief_model, "--passes", "canonicalize", "--dump", stages).status == 0
    found = find(brief_model, "--start-from", stages / "01-canonicalize.onnx", "--passes", SWAPPED)
    assert place(found["guilty"]) == ("02-swap_modulation", 7, 7)
    assert found["trials"][0]["graph"] == "01-canonicalize"
    assert replayed(tmp_path / "found")[0] == 0


def test_crashing_pass(find: Find, brief_model: Path, tmp_path: Path) -> None:
    guilty = find(brief_model, "--passes", "crash,dedupe")["guilty"]
    assert (guilty["stage"], guilty["rewrite"], guilty["rewrites"]) == ("01-crash", 4, None)
    assert guilty["after"]["reason"] == "IndexError: list index out of range"
    folder = tmp_path / "found"
    assert not (folder / "after.onnx").exists()
    named = [node.name.endswith(".anew") for node in load(folder / "before.onnx").graph.nodes]
    assert named == [index < 3 for index in range(len(named))]
    assert replayed(folder) == [1]


def test_pass_that_leaves_an_invalid_graph(find: Find, brief_model: Path, tmp_path: Path) -> None:
    guilty = find(brief_model, "--passes", "lose_tensor,dedupe")["guilty"]
    assert (guilty["stage"], guilty["rewrite"]) == ("01-lose_tensor", 3)
    assert "pass lose_tensor left a graph that is not valid" in guilty["after"]["reason"]
    assert ".lost" in guilty["trouble"]
    assert replayed(tmp_path / "found") == [1]


def test_target(find: Find, brief_model: Path) -> None:
    command = (brief_model, "--passes", "canonicalize,quantize_linears", "--target", "orin")
    guilty = find(*command)["guilty"]
    assert guilty["stage"] == "02-quantize_linears"
    assert guilty["rewrite"] == 1
    assert "has no FP8 tensor cores" in guilty["after"]["reason"]
