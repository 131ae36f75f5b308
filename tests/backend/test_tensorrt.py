"""Engines by TensorRT-RTX, which builds without a GPU, and what becomes of a builder that fails."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from onnx import TensorProto
from small_graphs import node, write_fp8_linear, write_model

from pi05c.backend import tensorrt
from pi05c.backend.child import BuildProgress
from pi05c.backend.targets import Flavour, parse_targets
from pi05c.backend.tensorrt import (
    BuildOptions,
    ShapeProfile,
    build,
    can_build,
    find_flavour,
)
from pi05c.graph.errors import BuildError, Pi05cError, UsageError

RTX = BuildOptions(Flavour.TENSORRT_RTX, parse_targets("sm89"), time_limit_s=60)

needs_rtx = pytest.mark.skipif(
    Flavour.TENSORRT_RTX not in tensorrt.installed_flavours(), reason="TensorRT-RTX is not installed"
)
needs_no_gpu = pytest.mark.skipif(
    bool(tensorrt.compute_capabilities()),
    reason="this machine has a GPU, so nothing is refused for want of one",
)


def replace_worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a Python script that does `code` stand in for the worker; its argument is the request's path."""
    prelude = "import json, os, signal, sys, time; request = json.load(open(sys.argv[1]))\n"
    monkeypatch.setattr(tensorrt, "WORKER_COMMAND", (sys.executable, "-c", prelude + code))
    monkeypatch.setattr(tensorrt, "can_build", lambda targets, flavour: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An FP8 linear with external weights."""
    return write_fp8_linear(tmp_path / "model.onnx")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Where the plan goes: in a folder of its own, over an older plan."""
    path = tmp_path / "out" / "model.engine"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path


def assert_untouched(plan: Path) -> None:
    assert [path.name for path in plan.parent.iterdir()] == ["model.engine"]
    assert plan.read_bytes() == b"old"


@needs_rtx
@pytest.mark.parametrize("targets", ["sm89", "sm120", "sm89,sm120"])
def test_fp8_linear_builds_without_a_gpu(model: Path, plan: Path, targets: str) -> None:
    seen: list[BuildProgress] = []
    options = replace(RTX, targets=parse_targets(targets))
    result = build(model, plan, options, progress=seen.append)
    assert result.plan_bytes == plan.stat().st_size > 64 * 32
    assert plan.read_bytes()[:3] != b"old"
    assert [path.name for path in plan.parent.iterdir()] == ["model.engine"]
    assert result.version == tensorrt.installed_version(Flavour.TENSORRT_RTX)
    assert result.peak_memory > 50e6
    assert 0 < result.seconds < 60
    assert seen[0].phase == "Building engine"
    assert result.log_tail


@needs_rtx
def test_dynamic_input_builds_with_a_profile(tmp_path: Path, plan: Path) -> None:
    model = write_fp8_linear(tmp_path / "model.onnx", batch="batch")
    profile = ShapeProfile("x", (1, 64), (16, 64), (32, 64))
    result = build(model, plan, replace(RTX, profiles=(profile,), version_compatible=True))
    assert result.plan_bytes == plan.stat().st_size


@needs_rtx
def test_dynamic_input_without_a_profile_is_named(tmp_path: Path, plan: Path) -> None:
    model = write_fp8_linear(tmp_path / "model.onnx", batch="batch")
    with pytest.raises(Pi05cError, match=r"input x: float16\[batch,64\] has dimensions that are not fixed"):
        build(model, plan, RTX)
    assert_untouched(plan)


@needs_rtx
@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (ShapeProfile("y", (1,), (1,), (1,)), "names y, which is no input"),
        (ShapeProfile("x", (16, 64), (16, 64), (16, 65)), r"do not fit input x: float16\[16,64\]"),
        (ShapeProfile("x", (16,), (16,), (16,)), "do not fit input x"),
    ],
)
def test_profile_that_does_not_fit(model: Path, plan: Path, profile: ShapeProfile, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(model, plan, replace(RTX, profiles=(profile,)))
    assert_untouched(plan)


@needs_rtx
def test_descending_profile_is_refused(tmp_path: Path, plan: Path) -> None:
    model = write_fp8_linear(tmp_path / "model.onnx", batch="batch")
    with pytest.raises(UsageError, match="must not descend"):
        build(model, plan, replace(RTX, profiles=(ShapeProfile("x", (8, 64), (4, 64), (16, 64)),)))


@needs_rtx
def test_builder_error_is_the_message_and_can_be_reproduced(model: Path, plan: Path, tmp_path: Path) -> None:
    """FP8 for SM86 is refused by the table before; here the builder itself refuses, and logs why."""
    reproducer = tmp_path / "failed"
    with pytest.raises(BuildError, match=r"sm86.*HW-specific datatypes: fp8_e4m3.*reproduce\.sh") as error:
        build(model, plan, replace(RTX, targets=parse_targets("sm86")), reproducer_dir=reproducer)
    assert error.value.exit_code == 4
    assert_untouched(plan)
    assert {path.name for path in reproducer.iterdir()} == {
        *("build.log", "reproduce.sh", "request.json", "versions.txt")
    }
    assert "tensorrt-rtx " in (reproducer / "versions.txt").read_text()
    assert json.loads((reproducer / "request.json").read_text())["model"] == "../model.onnx"
    again = subprocess.run([reproducer / "reproduce.sh"], capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "[E]" in again.stdout
    assert "fp8_e4m3" in again.stdout


@needs_rtx
def test_graph_that_the_parser_refuses(tmp_path: Path, plan: Path) -> None:
    model = write_model(
        tmp_path / "model.onnx",
        [node("Sin", ["x"], ["s"]), node("NoSuchOperator", ["s"], ["y"])],
        [("x", TensorProto.FLOAT, [4])],
        [("y", TensorProto.FLOAT, [4])],
    )
    with pytest.raises(BuildError, match=r"make_y and operator: NoSuchOperator"):
        build(model, plan, RTX)
    assert_untouched(plan)


def test_error_line_is_a_failure_whatever_the_builder_returns(
    model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(
        monkeypatch,
        "open(request['plan'], 'wb').write(b'plan'); print('[E] something is off')\n"
        """print('@pi05c {"event": "built", "version": "1", "peak_memory": 1}')""",
    )
    with pytest.raises(BuildError, match="something is off"):
        build(model, plan, RTX)
    assert_untouched(plan)


def test_a_defect_of_the_builder_is_called_one(
    model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TensorRT-RTX 1.7 says of a graph of silero-vad."""
    said = "[E] [graphScope.cpp::analyze::471] Error Code 2: Internal Error (Assertion kUNDEFINED failed)"
    replace_worker(monkeypatch, f"print({said!r}); sys.exit(1)")
    with pytest.raises(
        BuildError, match=r"kUNDEFINED failed\); this is a defect of the builder, which another"
    ):
        build(model, plan, RTX)
    assert_untouched(plan)


def test_crash_names_the_signal(
    model: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(
        monkeypatch, "open(request['plan'], 'wb').write(b'half'); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    with pytest.raises(BuildError, match=r"the builder crashed \(SIGSEGV\)"):
        build(model, plan, RTX, reproducer_dir=tmp_path / "failed")
    assert_untouched(plan)
    assert (tmp_path / "failed" / "reproduce.sh").stat().st_mode & 0o100


def test_kill_is_explained_by_memory(model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_worker(monkeypatch, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(BuildError, match=r"killed \(SIGKILL\).*memory runs out"):
        build(model, plan, RTX)
    assert_untouched(plan)


def test_time_limit(model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_worker(
        monkeypatch,
        """print('@pi05c {"event": "progress", "phase": "Timing", "step": 1, "steps": 2}', flush=True)\n"""
        "time.sleep(30)",
    )
    with pytest.raises(BuildError, match=r"stopped after its time limit of 0\.5 s, in the phase 'Timing'"):
        build(model, plan, replace(RTX, time_limit_s=0.5))
    assert_untouched(plan)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is watched on Linux only")
def test_memory_limit(model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_worker(monkeypatch, "held = bytearray(b'x' * 2**28); time.sleep(30)")
    with pytest.raises(BuildError, match=r"stopped at its memory limit of 0\.1 GiB"):
        build(model, plan, replace(RTX, memory_limit=2**27))
    assert_untouched(plan)


def test_silent_failure_shows_the_exit_status(
    model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(monkeypatch, "print('last words'); sys.exit(7)")
    with pytest.raises(BuildError, match="exit status 7 and said last: last words"):
        build(model, plan, RTX)
    assert_untouched(plan)


BUILT = """print('@pi05c {"event": "built", "version": "1", "peak_memory": 1}', flush=True)"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (BUILT, "it had ended well, and wrote nothing"),
        (f"os.unlink(request['plan']); {BUILT}", "it had ended well, and wrote nothing"),
        ("print('@pi05c {'); sys.exit(1)", "exit status 1 and said last: @pi05c {"),
        ("print('@pi05c [3]'); sys.exit(1)", "exit status 1"),
        ("""print('@pi05c {"event": "built", "peak_memory": 1e999}'); sys.exit(1)""", "exit status 1"),
        ("print('@pi05c ' + '[' * 9000); sys.exit(1)", "exit status 1"),
        ("sys.stdout.buffer.write(b'[E] \\xff\\x00' + b'x' * 2**26); sys.exit(1)", "x\\.\\.\\.$"),
        ("sys.stderr.write('y' * 2**26); sys.exit(1)", "exit status 1 and said last: yyy"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(30)", "its time limit of 1.5 s"),
        ("os.fork() or time.sleep(30); sys.exit(7)", "exit status 7"),
        ("os.fork() or os.setsid() and time.sleep(9); sys.exit(7)", "exit status 7"),
        (
            "os.fork() or os.setsid() and [print(time.sleep(0.01), flush=True) for _ in range(900)]; sys.exit(7)",
            "exit status 7",
        ),
        ("os.fork() or os.setsid() and time.sleep(9); time.sleep(30)", "its time limit of 1.5 s"),
    ],
    ids=range(13),
)
def test_builders_of_every_bad_kind(
    model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    """They write nothing or no JSON, flood the log, take no notice of signals, leave processes that hold the log open."""
    replace_worker(monkeypatch, code)
    started = time.monotonic()
    with pytest.raises(BuildError, match=said) as error:
        build(model, plan, replace(RTX, time_limit_s=1.5))
    assert time.monotonic() - started < 6
    assert len(str(error.value)) < 1200
    assert_untouched(plan)


def test_caller_that_gives_up_leaves_nothing(
    model: Path, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_worker(
        monkeypatch,
        "open(request['plan'], 'wb').write(b'half')\n"
        """print('@pi05c {"event": "progress", "phase": "Timing", "step": 1, "steps": 2}', flush=True)\n"""
        "time.sleep(30)",
    )

    def interrupt(progress: BuildProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(model, plan, RTX, progress=interrupt)
    assert_untouched(plan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(RTX, timing_cache=Path("timing.cache")), "leave the timing cache to TensorRT"),
        (replace(RTX, hardware_compatible=True), "name them as targets"),
    ],
)
def test_options_that_the_flavour_lacks(model: Path, plan: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(model, plan, options)
    assert_untouched(plan)


@needs_no_gpu
def test_stripping_weights_without_a_gpu_is_refused(model: Path, plan: Path) -> None:
    with pytest.raises(UsageError, match="needs a GPU, and this machine has none"):
        build(model, plan, replace(RTX, strip_weights=True))


@needs_rtx
@pytest.mark.parametrize("name", ["thor", "h100", "orin", "b200"])
def test_targets_that_rtx_does_not_build_for(name: str, model: Path, plan: Path) -> None:
    targets = parse_targets(name)
    assert can_build(targets, Flavour.TENSORRT_RTX) == f"TensorRT-RTX does not build for {targets[0].name}"
    with pytest.raises(Pi05cError, match=r"build it on the device itself, with build_engine\.sh"):
        build(model, plan, replace(RTX, targets=targets))


def test_choice_of_the_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    here: dict[str, ModuleSpec] = {}
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: here.get(name))
    monkeypatch.setattr(tensorrt, "compute_capabilities", lambda: ((9, 0),))
    with pytest.raises(BuildError, match=r"pi05c\[rtx\].*pi05c\[tensorrt\]"):
        find_flavour()
    here["tensorrt_rtx"] = ModuleSpec("tensorrt_rtx", None, origin="__init__.py")
    assert find_flavour() is Flavour.TENSORRT_RTX
    with pytest.raises(BuildError, match=r"TensorRT is not installed: pip install 'pi05c\[tensorrt\]'"):
        find_flavour("tensorrt")
    here["tensorrt"] = ModuleSpec("tensorrt", None)  # a folder named tensorrt
    assert find_flavour() is Flavour.TENSORRT_RTX
    here["tensorrt"] = ModuleSpec("tensorrt", None, origin="__init__.py")
    assert find_flavour() is Flavour.TENSORRT
    assert find_flavour("tensorrt-rtx") is Flavour.TENSORRT_RTX
    assert find_flavour(targets=parse_targets("h100")) is Flavour.TENSORRT
    assert find_flavour(targets=parse_targets("sm120,sm89")) is Flavour.TENSORRT_RTX
    assert find_flavour(targets=parse_targets("thor")) is Flavour.TENSORRT, "neither can: its script will"
    reason = can_build(parse_targets("thor"), Flavour.TENSORRT)
    assert reason == "TensorRT builds for the GPU at hand, which is sm90, not sm110"
    with pytest.raises(UsageError, match="unknown builder 'tvm'"):
        find_flavour("tvm")
