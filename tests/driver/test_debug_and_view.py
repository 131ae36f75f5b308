"""`pi05c debug`, which runs Polygraphy on one pass, and `pi05c view`, which opens Netron."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Command
from small_policy import policy, wrecking_pass, write_policy

__all__ = ["policy", "wrecking_pass"]


def printed(out: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith("polygraphy run "))
    return shlex.split(line)


def test_debug_prints_and_runs_the_command_of_one_pass(
    pi05c: Command, policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy.parent)
    done = pi05c("debug", "canonicalize", "model.onnx", "--atol", "1e-4")
    assert done.status == 0, done.out
    assert "PASSED | Output: 'actions'" in done.out
    assert printed(done.out) == shlex.split(
        "polygraphy run model.onnx --onnxrt --pi05c --pi05c-passes canonicalize "
        "--data-loader-script pi05c_samples.py --atol 1e-4"
    )
    assert (policy.parent / "pi05c_samples.py").exists()


def test_debug_exits_as_polygraphy_does(
    pi05c: Command, policy: Path, wrecking_pass: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(policy.parent)
    done = pi05c("debug", f"{wrecking_pass}{{factor=1.5}}", policy)
    assert done.status == 1
    assert "FAILED | Output: 'actions'" in done.out
    assert pi05c("debug", f"{wrecking_pass}{{factor=1.5}}", policy, "--rtol", "9", "--atol", "99").status == 0


def test_debug_without_samples_lets_polygraphy_make_inputs(
    pi05c: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = pi05c("debug", "canonicalize", write_policy(tmp_path / "model.onnx"))
    assert done.status == 0, done.out
    assert "--data-loader-script" not in printed(done.out)


def test_debug_names_what_is_wrong(pi05c: Command, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(policy.parent)
    several = pi05c("debug", "exact", policy)
    assert several.status == 2
    assert "'exact' is not one pass" in several.err
    assert pi05c("debug", "nothing", policy).status == 2
    mine = policy.parent / "pi05c_samples.py"
    mine.write_text("mine")
    done = pi05c("debug", "canonicalize", policy)
    assert done.status == 1
    assert "pi05c_samples.py is here already" in done.err
    assert mine.read_text() == "mine"


def test_view_opens_the_graph_of_a_file_and_of_a_folder(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    netron = SimpleNamespace(start=shown.append, wait=lambda: None)
    monkeypatch.setitem(sys.modules, "netron", netron)
    output = tmp_path / "engine"
    assert pi05c(policy, "--passes", "none", "-o", output, "--backend", "onnxruntime").status == 0
    assert pi05c("view", policy).status == pi05c("view", output).status == 0
    assert shown == [str(policy), str(output / "model.onnx")]


def test_view_names_the_remedy(
    pi05c: Command, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "netron", None)
    done = pi05c("view", policy)
    assert done.status == 1
    assert "pip install 'pi05c[view]'" in done.err
    assert "holds no model.onnx" in pi05c("view", tmp_path).err
    assert "there is no file" in pi05c("view", tmp_path / "none.onnx").err
