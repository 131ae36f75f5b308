"""`pi05c bisect`: the guilty pass and rewrite, by errors, by a command, and from dumped stages."""

from __future__ import annotations

import errno
import importlib
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from small_policy import policy, wrecking_pass

from pi05c.cutout import run_cutout
from pi05c.stages import recorded_ranges

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


def test_ranges_are_measured_by_the_method_that_is_named(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path
) -> None:
    folder, method = tmp_path / "found", ("--calibration-method", "percentile{percent=50}")
    passes = "canonicalize,quantize_linears,wreck"
    result = pi05c("bisect", policy, "--passes", passes, *method, "-o", folder, "--json")
    assert result.status == 1, result.err
    ranges = recorded_ranges(folder)
    assert ranges is not None
    assert ranges.thresholds["x"] < max(-ranges.low["x"], ranges.high["x"])
    assert shlex.join(method) in (folder / "README.md").read_text()
    assert pi05c(policy, "--passes", passes, "--dump", tmp_path / "stages").status == 0
    assert pi05c("bisect", tmp_path / "stages", *method).status == 2


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


def test_only_what_the_command_prints_is_bad(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path
) -> None:
    compare = f"{sys.executable} -m pi05c diff {policy} {{}}"
    command = ("bisect", policy, "--passes", PASSES, "-o", tmp_path / "found", "--json")
    found = pi05c(*command, "--fail-regex", "initializers: .* changed", "--check", compare)
    assert found.status == 1, found.err
    assert json.loads(found.out)["guilty"]["names"] == ["project"]
    other = pi05c(*command[:-3], "--fail-regex", "no such words", "--check", compare)
    assert other.status == 0, other.out
    malformed = pi05c(*command[:-3], "--fail-regex", "(", "--check", compare)
    assert malformed.status == 2
    assert "'(' is no regular expression" in malformed.err


def test_artifacts_are_sorted(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check = f"sh -c '{sys.executable} -m pi05c diff {policy} {{}} > seen.txt'"
    options = ("--artifacts", "seen.txt", "--artifacts-dir", "sorted")
    command = (
        "bisect",
        policy,
        "--passes",
        "dedupe,wreck",
        "-o",
        "found",
        "--json",
        *options,
        "--check",
        check,
    )
    result = pi05c(*command)
    assert result.status == 1, result.err
    assert [path.name for path in Path("sorted/good").iterdir()] == ["seen_00-input.txt"]
    bad = Path("sorted/bad/seen_02-wreck.txt")
    assert list(bad.parent.iterdir()) == [bad]
    assert "1 changed" in bad.read_text()
    assert not Path("seen.txt").exists()


def test_equal_graphs_are_judged_once(
    pi05c: Command, policy: Path, wrecking_pass: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.txt"
    check = f"sh -c 'echo run >> {log}; {sys.executable} -m pi05c diff --quiet {policy} {{}}'"
    passes = "wreck,dedupe,disable_conv2d_quant"
    command = ("bisect", policy, "--passes", passes, "-o", tmp_path / "found", "--json")
    result = pi05c(*command, "--check", check)
    assert result.status == 1, result.err
    trials = [trial["graph"] for trial in json.loads(result.out)["trials"]]
    assert {"00-input", "01-wreck", "01-wreck.0", "01-wreck.1", "03-disable_conv2d_quant"} <= set(trials)
    assert log.read_text() == "run\n" * 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError()])
@pytest.mark.parametrize(
    "place",
    ["pi05c.bisection.save", "pi05c.stages.save", "pi05c.criterion.outputs_of", "pi05c.bisection.run_steps"],
)
def test_no_pass_is_to_blame_for_the_machine(
    pi05c: Command,
    policy: Path,
    wrecking_pass: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    error: Exception,
) -> None:
    module, _, name = place.rpartition(".")
    calls = itertools.count()
    itself = getattr(importlib.import_module(module), name)

    def fail(*arguments: Any, **named: Any) -> Any:
        if next(calls) >= (2 if name == "outputs_of" else 0):
            raise error
        return itself(*arguments, **named)

    monkeypatch.setattr(place, fail)
    result = pi05c("bisect", policy, "--passes", PASSES, "-o", tmp_path / "found")
    assert result.status == 2
    assert "disk is full" in result.err or "memory ran out" in result.err
    assert "defect" not in result.err
    assert not (tmp_path / "found").exists()
