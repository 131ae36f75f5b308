"""`build_engine.sh`, run against a stand-in for NVIDIA's tool."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pi05c.backend.targets import Flavour, parse_targets
from pi05c.backend.tensorrt import BuildOptions, ShapeProfile, trtexec_script

THOR = BuildOptions(Flavour.TENSORRT, parse_targets("thor"))
FAKE_TOOL = """#!/bin/sh
if [ "$1" = --help ]; then echo '&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec --help'; exit 0; fi
printf '%s\\n' "$@" > arguments.txt
for argument; do case "$argument" in --saveEngine=*) printf plan > "${{argument#--saveEngine=}}";; esac; done
exit {status}
"""


def folder_with_script(tmp_path: Path, options: BuildOptions, model: str = "model.onnx") -> Path:
    folder = tmp_path / "engine folder"
    folder.mkdir()
    script = folder / "build_engine.sh"
    script.write_text(trtexec_script(model, options.targets, options))
    script.chmod(0o755)
    subprocess.run(["bash", "-n", script], check=True)
    (folder / model).write_bytes(b"graph")
    return folder


def run_script(folder: Path, tool: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"]}
    if tool is not None:
        environment["TRTEXEC"] = environment["TENSORRT_RTX"] = str(tool)
    return subprocess.run(
        [folder / "build_engine.sh"], env=environment, cwd="/", capture_output=True, text=True, timeout=30
    )


def fake_tool(tmp_path: Path, *, version: int = 101303, status: int = 0) -> Path:
    tool = tmp_path / "tool"
    tool.write_text(FAKE_TOOL.format(version=version, status=status))
    tool.chmod(0o755)
    return tool


def arguments_of(folder: Path) -> list[str]:
    return (folder / "arguments.txt").read_text().splitlines()


def test_trtexec_is_called_with_everything(tmp_path: Path) -> None:
    options = replace(
        THOR,
        profiles=(
            ShapeProfile("images", (1, 3), (1, 3), (2, 3)),
            ShapeProfile("tokens", (1, 200), (1, 200), (2, 200)),
        ),
        version_compatible=True,
        hardware_compatible=True,
        strip_weights=True,
        optimization_level=4,
        workspace=2**30,
    )
    folder = folder_with_script(tmp_path, options, model="my model.onnx")
    done = run_script(folder, fake_tool(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (folder / "model.engine").read_text() == "plan"
    assert not (folder / ".model.engine.partial").exists()
    assert arguments_of(folder) == [
        "--onnx=my model.onnx",
        "--saveEngine=.model.engine.partial",
        "--stronglyTyped",
        "--noTF32",
        "--profilingVerbosity=detailed",
        "--skipInference",
        "--minShapes=images:1x3,tokens:1x200",
        "--optShapes=images:1x3,tokens:1x200",
        "--maxShapes=images:2x3,tokens:2x200",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--stripWeights",
        "--builderOptimizationLevel=4",
        "--memPoolSize=workspace:1024",
        "--timingCacheFile=timing.cache",
    ]


def test_tensorrt_rtx_takes_compute_capabilities(tmp_path: Path) -> None:
    options = BuildOptions(Flavour.TENSORRT_RTX, parse_targets("sm89,sm120"))
    folder = folder_with_script(tmp_path, options)
    assert run_script(folder, fake_tool(tmp_path)).returncode == 0
    assert "--computeCapabilities=89,120" in arguments_of(folder)
    assert not any("timingCache" in argument for argument in arguments_of(folder))


def test_missing_tool_says_what_to_install(tmp_path: Path) -> None:
    folder = folder_with_script(tmp_path, THOR)
    done = run_script(folder)
    if done.returncode == 0:
        pytest.skip("trtexec is installed here")
    assert "trtexec is not on the PATH: install TensorRT 10.13 or later" in done.stderr
    assert "TRTEXEC=/path/to/trtexec" in done.stderr


@pytest.mark.parametrize(
    ("version", "passes"), [(8601, False), (101200, False), (101300, True), (110401, True)]
)
def test_old_tensorrt_is_refused(tmp_path: Path, version: int, passes: bool) -> None:
    folder = folder_with_script(tmp_path, THOR)
    done = run_script(folder, fake_tool(tmp_path, version=version))
    assert (done.returncode == 0) is passes
    assert ("too old for this graph" in done.stderr) is not passes


def test_missing_model_is_named(tmp_path: Path) -> None:
    folder = folder_with_script(tmp_path, THOR)
    (folder / "model.onnx").unlink()
    done = run_script(folder, fake_tool(tmp_path))
    assert done.returncode == 1
    assert "there is no model.onnx here" in done.stderr


def test_failed_build_leaves_the_old_plan(tmp_path: Path) -> None:
    folder = folder_with_script(tmp_path, THOR)
    (folder / "model.engine").write_text("old")
    assert run_script(folder, fake_tool(tmp_path, status=3)).returncode == 3
    assert (folder / "model.engine").read_text() == "old"
    assert not (folder / ".model.engine.partial").exists()
