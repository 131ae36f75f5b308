"""`pi05c bisect`: the guilty pass and rewrite, by errors, by a command, and from dumped stages."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command_line import Command
from small_policy import policy, wrecking_pass

from pi05c.cutout import run_cutout

__all__ = ["policy", "wrecking_pass"]

PASSES = "canonicalize,wreck,dedupe"


def test_nothing_is_wrong(pi05c: Command, policy: Path) -> None:
    result = pi05c("bisect", policy, "--passes", "exact")
    assert result.status == 0, result.err
    assert "nothing is wrong" in result.out


def test_a_wrong_rewrite_is_found_and_cut_out(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path
) -> None:
    folder = tmp_path / "found"
    result = pi05c("bisect", policy, "--passes", PASSES, "-o", folder, "--json")
    assert result.status == 1, result.err
    guilty = json.loads(result.out)["guilty"]
    assert (guilty["stage"], guilty["rewrite"], guilty["rewrites"]) == ("02-wreck", 1, 1)
    assert guilty["names"] == ["project"]
    assert guilty["cutout"]["before"]["nodes"] == ["project"]
    before, after = (run_cutout(folder / f"{name}.min.onnx") for name in ("before", "after"))
    assert all((before[name] * 1.5 == pytest.approx(after[name], rel=1e-5)) for name in before)


def test_dumped_stages(pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path) -> None:
    assert pi05c(policy, "--passes", PASSES, "--dump", tmp_path / "stages").status == 0
    result = pi05c("bisect", tmp_path / "stages", "-o", tmp_path / "found", "--json")
    assert result.status == 1, result.err
    assert json.loads(result.out)["guilty"]["stage"] == "02-wreck"


@pytest.mark.parametrize("limit", [("--max-error", "-1"), ("--fail-code", "3")])
def test_trouble(pi05c: Command, policy: Path, limit: tuple[str, str]) -> None:
    assert pi05c("bisect", policy, *limit).status == 2


def test_a_command_decides(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check = ("--check", sys.executable, "-m", "pi05c", "diff", "--quiet", policy)
    run = ("bisect", policy, "--passes", "dedupe,wreck", "-o", "found", "--json")
    for place, taken in (("{}", "found"), ("polygraphy_debug.onnx", "again")):
        result = pi05c(*(taken if word == "found" else word for word in run), *check, place)
        assert result.status == 1, result.err
        assert json.loads(result.out)["guilty"]["names"] == ["project"]
    assert not Path("polygraphy_debug.onnx").exists()
    bad = pi05c("bisect", policy, "--passes", "dedupe", "--check", "false")
    assert bad.status == 2
    assert "before any pass has run" in bad.err
