"""`--backend inductor`: a split policy compiled for this CPU for real, and every path around the compiler."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from small_policy import policy, worker

import pi05c as package
from pi05c.backend import inductor
from pi05c.folder import GRAPH, PACKAGE, SAMPLES, SCRIPT
from pi05c.manifest import read_manifest

__all__ = ["policy"]

COMPILES = """
    assert request["package"].endswith(".pt2"), "torch takes no other name"
    Path(request["package"]).write_bytes(b"package for " + request["device"].encode())
    print("@pi05c " + json.dumps({"event": "built", "version": "9.9", "peak_memory": 1}))
    """
FAILS = 'print("[E] no such instruction"); sys.exit(1)'


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, with torch and a C++ compiler."""
    for name in ("backend.inductor", "building", "runtime"):
        monkeypatch.setattr(f"pi05c.{name}.compute_capabilities", lambda: ())
    monkeypatch.setattr(inductor, "is_installed", lambda: True)
    monkeypatch.setattr(inductor.shutil, "which", lambda name: f"/usr/bin/{name}")


def use_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    monkeypatch.setattr(inductor, "WORKER_COMMAND", worker(folder, textwrap.dedent(body)))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pi0.5 of one layer a part, two steps."""
    pytest.importorskip("onnxscript", reason="exporting the model needs the extra [torch]")
    from pi05c.frontend.config import Architecture, GemmaSizes, LanguageSizes, VisionSizes

    heads = {"depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16}
    architecture = Architecture(
        VisionSizes(width=32, depth=1, mlp_dim=64, num_heads=2, image_size=28, patch_size=14),
        LanguageSizes(width=32, mlp_dim=64, vocab_size=64, **heads),
        GemmaSizes(width=32, mlp_dim=64, **heads),
    )
    folder = tmp_path_factory.mktemp("small_model")
    (folder / "config.json").write_text(json.dumps({"architecture": asdict(architecture)}))
    package.export(
        None,
        folder / "model.onnx",
        config=str(folder / "config.json"),
        random=True,
        views=1,
        prompt_length=8,
        horizon=4,
        steps=2,
    )
    return folder / "model.onnx"


@pytest.mark.slow
def test_a_split_policy_in_fp8_on_this_cpu(small_model: Path, tmp_path: Path, pi05c: Command) -> None:
    folder = tmp_path / "engine"
    arguments = (
        "--split",
        "vision+prefix,step",
        "--passes",
        "default",
        "--target",
        "cpu",
        "--max-error",
        "1",
    )
    compiled = pi05c(small_model, *arguments, "--backend", "inductor", "-o", folder)
    assert compiled.status == 0, compiled.err
    assert "model.pt2: " in compiled.out
    assert "MB for cpu, built in" in compiled.out
    manifest = read_manifest(folder)
    for place in manifest.places:
        engine = manifest.engine_of(place)
        assert (engine.flavour, engine.targets, engine.options) == (
            "inductor",
            ["cpu"],
            {"max_autotune": False},
        )
        assert engine.file == f"{place}/{PACKAGE}"
        assert engine.file in manifest.files
        assert engine.version

    verified = json.loads(pi05c("verify", folder, "--json").out)
    assert verified["ran"] == "the engine on the CPU"
    simulated, measured = (verified[key]["worst"]["relative_l2"] for key in ("simulated", "measured"))
    assert 0 < measured <= 2 * simulated  # FP8 rounding is a draw: both depart from float32, not alike

    with np.load(folder / SAMPLES) as file:
        sample = {name: file[name][0] for name in file.files if name not in ("synthetic", "actions")}
        expected = file["actions"][0]
    with package.load(folder) as loaded:
        assert (loaded.backend, loaded.ran) == ("inductor", "the engine on the CPU")
        first = loaded(sample)["actions"]
        assert np.linalg.norm(first - expected) <= 2 * simulated * np.linalg.norm(expected)
        other = loaded({**sample, "noise": sample["noise"] + np.float32(1)})["actions"]
        assert not np.allclose(first, other)
        np.testing.assert_array_equal(loaded(sample)["actions"], first)
        import torch

        tensors = {name: torch.from_numpy(value) for name, value in sample.items()}
        assert torch.equal(loaded(tensors)["actions"], torch.from_numpy(first))
    more = package.load(folder, steps=5)(sample)["actions"]
    reference = package.load(folder, steps=5, backend="onnxruntime")(sample)["actions"]
    assert np.linalg.norm(more - reference) <= 2 * simulated * np.linalg.norm(reference)


def test_without_a_gpu_it_compiles_for_the_cpu_and_says_so(
    policy: Path, tmp_path: Path, pi05c: Command, monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    use_compiler(monkeypatch, tmp_path, COMPILES)
    result = pi05c(policy, "--passes", "none", "--backend", "inductor", "-o", tmp_path / "engine")
    assert result.status == 0, result.err
    assert "no --target and no GPU here: compiling for this CPU" in result.err
    assert (tmp_path / "engine" / PACKAGE).read_bytes() == b"package for cpu"
    engine = read_manifest(tmp_path / "engine").engine
    assert (engine.flavour, engine.version, engine.file, engine.reason) == ("inductor", "9.9", PACKAGE, None)


def test_a_package_for_a_gpu_that_is_elsewhere_is_built_there(
    policy: Path, tmp_path: Path, pi05c: Command, monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    folder = tmp_path / "engine"
    arguments = ("--passes", "none", "--backend", "inductor", "--target", "h100", "-o", folder)
    result = pi05c(policy, *arguments)
    assert result.status == 0, result.err
    assert f"this machine has none: `pi05c build {folder}` makes the package on the device" in result.err
    assert not (folder / SCRIPT).exists()
    assert f"{folder}: no plan (Inductor compiles for the GPU at hand" in result.out
    refused = pi05c("build", folder)
    assert refused.status == 1
    assert "this machine has none: run this on the device" in refused.err
    assert f"{folder} has no {PACKAGE} yet" in pi05c("verify", folder).out

    for name in ("backend.inductor", "building"):
        monkeypatch.setattr(f"pi05c.{name}.compute_capabilities", lambda: ((9, 0),))
    use_compiler(monkeypatch, tmp_path, COMPILES)
    assert pi05c("build", folder).status == 0
    assert (folder / PACKAGE).read_bytes() == b"package for cuda"
    assert read_manifest(folder).engine.targets == ["sm90"]
    assert "not measured on a GPU: this machine has no NVIDIA GPU" in pi05c("verify", folder).out
    failed = pi05c("build", folder, "--target", "thor")
    assert "which is sm90, not sm110" in failed.err


def test_a_folder_without_a_plan_becomes_one_with_a_package(
    policy: Path, tmp_path: Path, pi05c: Command, monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    folder = tmp_path / "engine"
    assert pi05c(policy, "--passes", "none", "--backend", "onnxruntime", "-o", folder).status == 0
    use_compiler(monkeypatch, tmp_path, FAILS)
    failed = pi05c("build", folder, "--backend", "inductor")
    assert failed.status == 4
    assert "Inductor did not compile" in failed.err
    assert "no such instruction" in failed.err
    assert read_manifest(folder).engine.flavour is None
    use_compiler(monkeypatch, tmp_path, COMPILES)
    (folder / "model.engine").write_bytes(b"an older plan")
    built = pi05c("build", folder, "--backend", "inductor")
    assert built.status == 0, built.err
    assert (folder / PACKAGE).read_bytes() == b"package for cpu"
    assert not (folder / "model.engine").exists()
    again = pi05c("build", folder)
    assert again.status == 0, again.err


def test_a_failed_compilation_keeps_the_graph(
    policy: Path, tmp_path: Path, pi05c: Command, monkeypatch: pytest.MonkeyPatch, no_gpu: None
) -> None:
    use_compiler(monkeypatch, tmp_path, FAILS)
    result = pi05c(policy, "--passes", "none", "--backend", "inductor", "-o", tmp_path / "engine")
    assert result.status == 4
    kept = tmp_path / "engine.failed"
    assert str(kept / "failed-build" / "reproduce.sh") in result.err
    assert (kept / GRAPH).is_file()
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "inductor", "--strip-weights"), "--strip-weights is TensorRT's"),
        (("--backend", "inductor", "--shapes", "x=1:1:1"), "--shapes is TensorRT's"),
        (("--backend", "inductor", "--target", "sm999"), "unknown target sm999"),
        (("--backend", "tensorrt-rtx", "--max-autotune"), "--max-autotune is Inductor's"),
        (("--backend", "tvm"), "choose among tensorrt, tensorrt-rtx, inductor, onnxruntime"),
        (("--backend", "inductor", "--target", "orin", "--passes", "default"), "has no FP8 tensor cores"),
    ],
)
def test_what_the_backend_does_not_do_is_refused(
    policy: Path, tmp_path: Path, pi05c: Command, arguments: tuple[str, ...], message: str
) -> None:
    result = pi05c(policy, *arguments, "-o", tmp_path / "engine")
    assert result.status in (1, 2)
    assert message in result.err
    assert not (tmp_path / "engine").exists()
