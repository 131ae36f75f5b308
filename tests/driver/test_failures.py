"""Runs that go wrong with the real builder and in the middle of a stage, and what a user finds afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from small_policy import BUILDS, policy, pretend_installed, use_worker, write_policy

from pi05c import cli, compilation, folder
from pi05c.backend.targets import Flavour
from pi05c.folder import CHECKPOINT, FAILED_BUILD, GRAPH, MANIFEST, PLAN, SAMPLES, SCRIPT
from pi05c.graph.errors import BuildError
from pi05c.manifest import read_manifest

__all__ = ["policy"]


def write_unbuildable(path: Path) -> Path:
    """A graph that onnxruntime runs and TensorRT-RTX has no layer for."""
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["actions"], name="determinant")],
        "unbuildable",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 3])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def main(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_graph_that_the_real_builder_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="building needs the extra [rtx]")
    model, output = write_unbuildable(tmp_path / "model.onnx"), tmp_path / "engine"
    assert main(model, "--passes", "none", "-o", output, "--backend", "onnxruntime") == 0
    before = content(output)
    capsys.readouterr()
    arguments = (model, "--passes", "none", "-o", output, "--target", "sm120", "--backend", "tensorrt-rtx")
    assert main(*arguments) == BuildError.exit_code == 4
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    kept = tmp_path / "engine.failed"
    assert "Det" in error
    assert str(kept / FAILED_BUILD / "reproduce.sh") in error
    assert content(output) == before
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "engine", "engine.failed"}
    manifest = read_manifest(kept)
    assert manifest.pipeline.resolved == "none"
    assert {"pi05c", "onnx", "onnxruntime"} <= manifest.versions.keys()

    moved = kept.rename(tmp_path / "elsewhere")  # what was kept works wherever it is copied
    again = subprocess.run(
        [moved / FAILED_BUILD / "reproduce.sh"], capture_output=True, text=True, timeout=120
    )
    assert again.returncode != 0
    assert "Det" in again.stdout + again.stderr


def test_sizes_that_an_exporter_calls_by_a_question_mark_need_not_be_equal(tmp_path: Path) -> None:
    """As paddle2onnx writes them; TensorRT-RTX took them for one size of that name."""
    pytest.importorskip("tensorrt_rtx", reason="building needs the extra [rtx]")
    shape = ["?", 3, "?", "?"]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "direction", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    words = ("--passes", "none", "--target", "sm120", "--backend", "tensorrt-rtx")
    shapes = ("--shapes", "x=1x3x8x16:1x3x8x16:1x3x8x16")
    assert main(tmp_path / "model.onnx", *words, *shapes, "-o", tmp_path / "engine") == 0
    assert (tmp_path / "engine" / PLAN).is_file()


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python, and the builder's process, look there first."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    )


@pytest.mark.parametrize("broken", ["missing", "truncated"])
def test_a_builder_whose_library_does_not_load(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: str,
) -> None:
    """A package of the builder's name stands for one of which a shared library was lost."""
    packages, output = tmp_path / "packages", tmp_path / "out" / "engine"
    library = packages / "tensorrt_rtx" / "libtensorrt_rtx.so.1"
    library.parent.mkdir(parents=True)
    (library.parent / "__init__.py").write_text(f"import ctypes\nctypes.CDLL({str(library)!r})\n")
    if broken == "truncated":
        library.write_bytes(Path(sys.executable).resolve().read_bytes()[:100])
    assert main(policy, "--passes", "none", "-o", output, "--backend", "onnxruntime") == 0
    before = content(output)
    put_on_path(packages, monkeypatch)
    arguments = (policy, "--passes", "none", "-o", output, "--target", "sm120", "--backend", "tensorrt-rtx")
    capsys.readouterr()
    assert main(*arguments) == 4
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert f"TensorRT-RTX is installed but does not load ({library}: " in error
    assert "pip install --force-reinstall tensorrt-rtx" in error
    kept = output.with_name("engine.failed")
    assert str(kept / FAILED_BUILD / "reproduce.sh") in error
    assert content(output) == before
    assert {path.name for path in output.parent.iterdir()} == {"engine", "engine.failed"}
    again = subprocess.run(
        [kept / FAILED_BUILD / "reproduce.sh"], capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 1
    assert "does not load" in again.stdout


@pytest.mark.parametrize("command", ["compile", "build"])
def test_a_builder_of_a_version_that_is_not_supported_is_refused_at_once(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    output = tmp_path / "out" / "engine"
    arguments = (policy, "--passes", "none", "-o", output, "--target", "sm120")
    if command == "build":
        assert main(*arguments) == 0
        arguments = ("build", output)
    before = content(output)
    installed = tmp_path / "packages" / "tensorrt_rtx-1.0.0.21.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-rtx\nVersion: 1.0.0.21\n")
    put_on_path(installed.parent, monkeypatch)
    capsys.readouterr()
    assert main(*arguments) == 4
    said = capsys.readouterr().err
    assert "error: tensorrt-rtx 1.0.0.21 is installed, but pi05c needs tensorrt-rtx>=" in said
    assert "pip install 'tensorrt-rtx>=" in said
    assert content(output) == before
    assert output.parent.exists() == (command == "build")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize(
    ("stage", "finished"),
    [
        ("plain_run", None),
        ("save", None),
        ("precision_of", "the rewritten graph"),
        ("write_report", "the rewritten graph and its verification"),
    ],
)
def test_whatever_ends_a_stage_the_old_folder_stays_and_the_next_run_goes_on_with_what_is_finished(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    finished: str | None,
    error: type[BaseException],
) -> None:
    output, unfinished = tmp_path / "engine", tmp_path / "engine.unfinished"
    arguments = (policy, "--passes", "none", "-o", output, "--backend", "onnxruntime")
    assert main(*arguments) == 0
    before, places = content(output), set(tmp_path.iterdir())
    capsys.readouterr()

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(compilation, stage, fail)
        assert main(*arguments) == (130 if error is KeyboardInterrupt else 1)
    assert "Traceback" not in capsys.readouterr().err
    assert content(output) == before
    assert set(tmp_path.iterdir()) == places | ({unfinished} if finished else set())
    if finished:
        files = {GRAPH, f"{GRAPH}.data", CHECKPOINT}
        assert set(content(unfinished)) == files | ({SAMPLES} if "verification" in finished else set())

    assert main(*arguments) == 0
    said = capsys.readouterr().err
    assert (f"goes on with what an earlier run of this finished: {finished}" in said) == bool(finished)
    assert content(output).keys() == before.keys()
    assert content(output)[GRAPH] == before[GRAPH]
    assert set(tmp_path.iterdir()) == places


@pytest.mark.parametrize(("first", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_comes_twice_lets_what_is_half_done_be_put_away(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int, status: int
) -> None:
    """As where a terminal and a parent process both pass on a Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("Ctrl-C is ignored here")
    put_away = folder._set_aside

    def interrupted(*arguments: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        put_away(*arguments)

    monkeypatch.setattr(folder, "_set_aside", interrupted)
    monkeypatch.setattr(compilation, "plain_run", lambda *_: os.kill(os.getpid(), first))
    arguments = (policy, "--passes", "none", "-o", tmp_path / "engine", "--backend", "onnxruntime")
    assert main(*arguments) == status
    assert {path.name for path in tmp_path.iterdir()} == {"policy"}


@pytest.mark.parametrize("target", ["thor", "h100", "h100,sm100"])
def test_a_folder_for_a_device_is_complete_but_for_its_plan(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    target: str,
) -> None:
    pretend_installed(monkeypatch, Flavour.TENSORRT_RTX)
    output = tmp_path / "engine"
    assert main(policy, "--passes", "default", "-o", output, "--target", target) == 0
    assert PLAN not in content(output)
    assert SCRIPT in read_manifest(output).files
    for shell in ("sh", "bash"):
        assert subprocess.run([shell, "-n", output / SCRIPT], timeout=60).returncode == 0
    capsys.readouterr()
    before = content(output)
    assert main("build", output) == 4
    assert "run this on the device" in capsys.readouterr().err
    assert content(output) == before


def test_the_script_on_a_machine_without_the_tool_says_what_to_install(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if Path("/usr/src/tensorrt/bin/trtexec").exists() or shutil.which("trtexec", path="/usr/bin:/bin"):
        pytest.skip("this machine has the tool")
    pretend_installed(monkeypatch, Flavour.TENSORRT_RTX)
    output = tmp_path / "engine"
    assert main(policy, "--passes", "exact", "-o", output, "--target", "thor") == 0
    before = content(output)
    environment = {"PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        ["/bin/sh", output / SCRIPT], capture_output=True, text=True, timeout=60, env=environment
    )
    assert result.returncode == 1
    assert "TRTEXEC=" in result.stderr
    assert content(output) == before


def test_a_folder_with_a_plan_that_its_script_made_may_be_compiled_again(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, Flavour.TENSORRT_RTX)
    output = tmp_path / "engine"
    arguments = (policy, "--passes", "exact", "-o", output, "--target", "thor")
    assert main(*arguments) == 0
    (output / PLAN).write_bytes(b"plan")
    (output / "timing.cache").write_bytes(b"timings")
    assert main("verify", output) == 0
    assert main(*arguments) == 0
    assert PLAN not in content(output)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--max-error", "-1", "is no limit"),
        ("--max-error", "nan", "is no limit"),
        ("--max-error", "inf", "is no limit"),
        ("--time-limit", "0", "leaves no time"),
        ("--time-limit", "nan", "leaves no time"),
    ],
)
def test_numbers_that_make_no_sense_are_usage_errors(
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    said: str,
) -> None:
    use_worker(monkeypatch, tmp_path, BUILDS)
    output = tmp_path / "out" / "engine"
    assert main(policy, "--passes", "none", "-o", output, "--target", "sm120", option, value) == 2
    assert said in capsys.readouterr().err
    assert not output.parent.exists()


def test_float16_without_ranges_goes_on_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = write_policy(tmp_path / "model.onnx"), tmp_path / "engine"
    assert main(model, "--passes", "fp16", "-o", output, "--backend", "onnxruntime") == 0
    said = capsys.readouterr().err
    assert said.count("lower_precision ran without ranges") == 1
    assert "nothing was verified" in said
    assert main(model, "--passes", "exact", "-o", output, "--backend", "onnxruntime") == 0
    assert "without ranges" not in capsys.readouterr().err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engine"
    arguments = (policy, "--passes", "fp16", "--max-error", "1e-9", "-o", output, "--backend", "onnxruntime")
    assert main(*arguments) == 3
    assert "Traceback" not in capsys.readouterr().err
    assert main(*arguments, "--debug") == 3
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: ")
    assert not output.exists()
    assert {MANIFEST, GRAPH} <= set(content(tmp_path / "engine.rejected"))
