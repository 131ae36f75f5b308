"""Packages by AOTInductor: compiled for real on the CPU, and what becomes of a compiler that fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from small_graphs import node, write_model

torch = pytest.importorskip("torch", reason="compiling by Inductor needs the extra [torch]")

from pi05c.backend import inductor  # noqa: E402
from pi05c.backend.inductor import InductorOptions, build, cannot_compile  # noqa: E402
from pi05c.backend.inductor_engine import InductorEngine  # noqa: E402
from pi05c.backend.onnxruntime import load_runner  # noqa: E402
from pi05c.backend.targets import parse_targets  # noqa: E402
from pi05c.backend.torch_device import TorchCpu, TorchCuda  # noqa: E402
from pi05c.graph.errors import BuildError, Pi05cError  # noqa: E402

CPU = InductorOptions(cpu=True, time_limit_s=300)

needs_fp8_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="this machine has no NVIDIA GPU with FP8 (SM89 or later)",
)


def write_linear(path: Path) -> Path:
    """y = tanh(x @ w), float32, with the weight in a file beside it, and s, a constant of no dimensions.

    Inductor would make a number of s, and, since an output has to be in memory, a constant that no weight fills.
    """
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    return write_model(
        path,
        [
            node("MatMul", ["x", "w"], ["product"]),
            node("Tanh", ["product"], ["y"]),
            node("Identity", ["scale"], ["s"]),
        ],
        [("x", TensorProto.FLOAT, [16, 64])],
        [("y", TensorProto.FLOAT, [16, 32]), ("s", TensorProto.FLOAT, [])],
        {"w": weight, "scale": np.array(0.75, np.float32)},
        external=True,
    )


def write_row_linear(path: Path) -> Path:
    """What one Triton kernel computes on a GPU: an FP8 linear of 10 rows."""
    codes = np.random.default_rng(0).standard_normal((64, 32)) * 50
    return write_model(
        path,
        [
            node("QuantizeLinear", ["x", "scale", "zero"], ["x_codes"]),
            node("DequantizeLinear", ["x_codes", "scale", "zero"], ["x_back"]),
            node("DequantizeLinear", ["w", "scale", "zero"], ["w_back"]),
            node("MatMul", ["x_back", "w_back"], ["y"]),
        ],
        [("x", TensorProto.FLOAT16, [1, 10, 64])],
        [("y", TensorProto.FLOAT16, [1, 10, 32])],
        {
            "w": codes.astype(ml_dtypes.float8_e4m3fn),
            "scale": np.array(0.0125, np.float16),
            "zero": np.array(0, ml_dtypes.float8_e4m3fn),
        },
    )


def run(model: Path, package: Path, x: object, device: TorchCpu | TorchCuda) -> dict[str, np.ndarray]:
    engine = InductorEngine(model, package, device)
    buffer = device.allocate(engine.inputs[0])
    device.copy_in(buffer, x)
    return {name: device.copy_out(value) for name, value in engine.run({"x": buffer}).items()}


def test_a_package_gives_what_onnxruntime_gives_and_takes_its_weights_from_beside_it(tmp_path: Path) -> None:
    model, package = write_linear(tmp_path / "model.onnx"), tmp_path / "out" / "model.pt2"
    package.parent.mkdir()
    phases: list[str] = []
    result = build(model, package, (), CPU, progress=lambda state: phases.append(state.phase))
    assert phases == ["translate", "export", "compile", "load and run"]
    assert result.version == torch.__version__
    assert [path.name for path in package.parent.iterdir()] == ["model.pt2"]
    x = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    found, expected = run(model, package, x, TorchCpu()), load_runner(model).run({"x": x})
    np.testing.assert_allclose(found["y"], expected["y"], rtol=1e-5, atol=1e-6)
    assert found["s"] == expected["s"]

    changed = write_linear(tmp_path / "changed.onnx")
    data = changed.with_name("changed.onnx.data")
    data.write_bytes(bytes(reversed(data.read_bytes())))
    with pytest.raises(Pi05cError, match=r"compiled from another graph than .*, or by another pi05c"):
        run(changed, package, x, TorchCpu())
    package.write_bytes(package.read_bytes()[:1000])
    with pytest.raises(Pi05cError, match=r"model\.pt2 does not load with torch .* on the CPU .*pi05c build"):
        run(model, package, x, TorchCpu())


def test_an_operator_outside_the_table_is_named_and_the_failure_can_be_repeated(tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model.onnx",
        [node("Det", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, [1, 3, 3])],
        [("y", TensorProto.FLOAT, [1])],
    )
    package = tmp_path / "model.pt2"
    package.write_bytes(b"old")
    with pytest.raises(BuildError, match=r"the torch backend does not translate Det \(1\).*reproduce\.sh"):
        build(model, package, (), CPU, reproducer_dir=tmp_path / "failed")
    assert package.read_bytes() == b"old"
    assert {path.name for path in (tmp_path / "failed").iterdir()} == {
        *("build.log", "reproduce.sh", "request.json", "versions.txt")
    }
    assert f"torch {torch.__version__}" in (tmp_path / "failed" / "versions.txt").read_text()
    assert "Traceback" in (tmp_path / "failed" / "build.log").read_text()


def test_a_time_limit_ends_the_compiler_with_the_processes_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import subprocess, time; inner = subprocess.Popen(['sleep', '600']); "
        f"open({str(tmp_path / 'inner')!r}, 'w').write(str(inner.pid)); time.sleep(600)"
    )
    monkeypatch.setattr(inductor, "WORKER_COMMAND", (sys.executable, "-c", code))
    model = write_linear(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"stopped after its time limit of 2 s"):
        build(model, tmp_path / "model.pt2", (), InductorOptions(cpu=True, time_limit_s=2))
    inner = int((tmp_path / "inner").read_text())
    deadline = time.monotonic() + 10
    while is_running(inner):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not list(tmp_path.glob("partial-*"))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def test_what_this_machine_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "compute_capabilities", lambda: ((9, 0),))
    assert cannot_compile(parse_targets("h100"), InductorOptions()) is None
    assert cannot_compile(parse_targets("sm120"), InductorOptions()) == (
        "Inductor compiles for the GPU at hand, which is sm90, not sm120"
    )
    monkeypatch.setattr(inductor, "compute_capabilities", lambda: ())
    assert "this machine has none" in (cannot_compile(parse_targets("h100"), InductorOptions()) or "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler" in (cannot_compile((), CPU) or "")
    compiler = tmp_path / "static-g++"
    compiler.write_text(
        "#!/bin/sh\ncase $1 in *.a) echo /opt/lib/libstdc++.a;; *) echo libstdc++.so;; esac\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "static-g++ has the standard C++ library only as libstdc++.a" in (cannot_compile((), CPU) or "")
    monkeypatch.delenv("CXX")
    assert cannot_compile((), CPU) is None
    monkeypatch.setattr(inductor, "is_installed", lambda: False)
    assert "pip install 'pi05c[torch]'" in (cannot_compile((), CPU) or "")


@pytest.mark.gpu
@needs_fp8_gpu
def test_a_package_with_triton_kernels_runs_in_a_cuda_graph(tmp_path: Path) -> None:
    model, package = write_row_linear(tmp_path / "model.onnx"), tmp_path / "model.pt2"
    build(model, package, (), InductorOptions(time_limit_s=300))
    x = np.random.default_rng(1).standard_normal((1, 10, 64)).astype(np.float16)
    expected = load_runner(model).run({"x": x})["y"].astype(np.float32)
    device = TorchCuda()
    engine = InductorEngine(model, package, device)
    buffer, results = device.allocate(engine.inputs[0]), {}
    device.copy_in(buffer, x)
    engine.run({"x": buffer})
    device.synchronize()
    replay = device.capture(lambda: results.update(engine.run({"x": buffer})) or results)
    replay()
    found = device.copy_out(results["y"]).astype(np.float32)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
