"""What is kept of a pass that fails in a compile, and that its command fails again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from command_line import Command
from small_policy import policy, wrecking_pass

from pi05c import reproducer
from pi05c.graph.io import load
from pi05c.graph.text import canonical_text

__all__ = ["policy", "wrecking_pass"]

FAILING = Path(__file__).with_name("failing_passes.py")
NO_PLAN = ("--backend", "onnxruntime")


def replay(script: Path, tools: Path) -> tuple[int, str]:
    """Exit status and error of the one command, run from elsewhere as a user would."""
    tools.mkdir()
    command = tools / "pi05c"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pi05c "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    done = subprocess.run(
        [script], capture_output=True, text=True, timeout=120, cwd=tools, env={**os.environ, "PATH": path}
    )
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    return done.returncode, error


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("break_down", "ValueError: project has no inputs"),
        ("leave_invalid", "pass leave_invalid left a graph that is not valid: "),
        ("break_by_ranges", "ValueError: product reaches "),
    ],
)
def test_the_command_of_a_failed_pass_fails_again(
    pi05c: Command, policy: Path, tmp_path: Path, name: str, said: str
) -> None:
    passes = f"canonicalize,{name},dedupe"
    output = tmp_path / "engine"
    result = pi05c(policy, "--passes", passes, "--plugin", FAILING, "-o", output, *NO_PLAN)
    kept = tmp_path / "engine.failed-pass"
    assert result.status == 1
    assert said in result.err
    assert str(kept / "reproduce.sh") in result.err
    assert not output.exists()

    assert pi05c(policy, "--passes", "canonicalize", "--dump", tmp_path / "stages").status == 0
    assert canonical_text(load(kept / "01-canonicalize.onnx").graph) == canonical_text(
        load(tmp_path / "stages" / "01-canonicalize.onnx").graph
    )
    onnx.checker.check_model(kept / "01-canonicalize.onnx", full_check=True)
    assert (kept / "pipeline.txt").read_text() == f"{passes}\n"
    record = json.loads((kept / "failure.json").read_text())
    assert (record["pass"], record["number"]) == (name, 2)
    assert {"pi05c", "onnx", "onnxruntime"} <= record["versions"].keys()

    moved = kept.rename(tmp_path / "elsewhere")
    policy.rename(policy.with_name("gone.onnx"))
    status, error = replay(moved / "reproduce.sh", tmp_path / "tools")
    assert status != 0
    reason = record["error"].removeprefix(f"pass {name} broke down (").removesuffix(")")
    assert reason in error


def test_numbers_that_an_exact_pass_moves_are_kept_too(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "scaling.py"
    plugin.write_text(
        "import numpy as np\n"
        "from pi05c.graph.weights import Scaled, weight_of\n"
        "from pi05c.passes import graph_pass\n"
        "@graph_pass(exact=True)\n"
        "def enlarge(graph, ctx):\n"
        '    """Make a weight larger."""\n'
        '    node = next(node for node in graph.nodes if node.op == "MatMul")\n'
        "    node.inputs[1]._values = Scaled(weight_of(node.inputs[1]), np.float32(1.5))\n"
        "    ctx.changed(node)\n"
    )
    arguments = (policy, "--passes", "canonicalize,enlarge", "--plugin", plugin, "--verify-each=numbers")
    result = pi05c(*arguments, "-o", tmp_path / "engine", *NO_PLAN)
    assert result.status == 3
    assert "said to be exact" in result.err
    status, error = replay(tmp_path / "engine.failed-pass" / "reproduce.sh", tmp_path / "tools")
    assert status == 3
    assert "said to be exact, but moved actions" in error


def test_weights_that_are_too_large_are_named_where_they_are(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproducer, "COPIED_BYTES", 1000)
    passes = "canonicalize,break_by_ranges"
    pi05c(policy, "--passes", passes, "--plugin", FAILING, "-o", tmp_path / "engine", *NO_PLAN)
    kept = tmp_path / "engine.failed-pass"
    assert {path.name for path in kept.iterdir()} == {
        "01-canonicalize.txt",
        "failure.json",
        "pipeline.txt",
        "reproduce.sh",
    }
    record = json.loads((kept / "failure.json").read_text())
    status, error = replay(kept / "reproduce.sh", tmp_path / "tools")
    assert status == 1
    assert record["error"].removeprefix("pass break_by_ranges broke down (").removesuffix(")") in error


def test_a_part_is_kept_with_its_weights(
    pi05c: Command, brief_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reproducer, "COPIED_BYTES", 1000)
    arguments = ("--split", "vision+prefix,denoise", "--passes", "none,denoise=break_down")
    result = pi05c(brief_model, *arguments, "--plugin", FAILING, "-o", tmp_path / "engine", *NO_PLAN)
    kept = tmp_path / "engine.failed-pass"
    assert str(kept / "reproduce.sh") in result.err
    assert json.loads((kept / "failure.json").read_text())["part"] == "denoise"
    status, error = replay(kept / "reproduce.sh", tmp_path / "tools")
    assert status == 1
    assert "has no inputs" in error


@pytest.mark.parametrize("passes", ["refuse", "quantize_linears", "canonicalize{nothing=1}"])
def test_nothing_is_kept_of_what_the_user_must_change(
    pi05c: Command, policy: Path, tmp_path: Path, passes: str
) -> None:
    policy.with_name("model.calibration.npz").unlink()
    result = pi05c(policy, "--passes", passes, "--plugin", FAILING, "-o", tmp_path / "engine", *NO_PLAN)
    assert result.status in (1, 2)
    assert "reproduce" not in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_the_last_failure_is_replaced_and_files_of_others_are_not(
    pi05c: Command, policy: Path, tmp_path: Path
) -> None:
    arguments = (policy, "--plugin", FAILING, "-o", tmp_path / "engine", *NO_PLAN)
    kept = tmp_path / "engine.failed-pass"
    pi05c(*arguments, "--passes", "canonicalize,break_down")
    pi05c(*arguments, "--passes", "leave_invalid")
    assert (kept / "pipeline.txt").read_text() == "leave_invalid\n"
    (kept / "notes.txt").write_text("mine")
    result = pi05c(*arguments, "--passes", "break_down")
    assert str(tmp_path / "engine.failed-pass-2" / "reproduce.sh") in result.err
    assert (kept / "notes.txt").read_text() == "mine"
