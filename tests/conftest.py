"""Fixtures that several parts share: the reference data, and a graph exported from the small reference checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"

REFERENCE_PROMPT_LENGTH = 24
"""Tokens of the reference cases, padding included."""

CALIBRATION_SEED = 20
CALIBRATION_SAMPLES = 8


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The small checkpoint with its reference cases (see `tests/data/README.md`)."""
    return DATA / "pi05_tiny"


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one run see, under pytest-xdist too."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def tiny_model(reference_dir: Path, shared_tmp: Path) -> Path:
    """`model.onnx`, exported from the reference checkpoint with batch 1, its calibration samples beside it.

    The samples are seeded, and not marked synthetic: to a test they are observations like any other. The file is
    shared: a test that writes beside it works on a copy.
    """
    return _exported(reference_dir, shared_tmp / "tiny_model")


@pytest.fixture(scope="session")
def brief_model(reference_dir: Path, shared_tmp: Path) -> Path:
    """As `tiny_model`, of three denoising steps: a third of the graph, where no stored value is compared."""
    return _exported(reference_dir, shared_tmp / "brief_model", steps=3)


def _exported(checkpoint: Path, folder: Path, **sizes: int) -> Path:
    pytest.importorskip("torch", reason="exporting the model needs the extra [torch]")
    pytest.importorskip("onnxscript", reason="exporting the model needs the extra [torch]")
    from filelock import FileLock  # a dependency of torch

    from pi05c.frontend.config import CONFIGS
    from pi05c.frontend.export import export_model
    from pi05c.frontend.samples import synthetic_samples, write_samples

    model, done = folder / "model.onnx", folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.is_file():
            folder.mkdir(exist_ok=True)
            observations = folder / "observations.npz"
            samples = synthetic_samples(CONFIGS["pi05_tiny"], CALIBRATION_SEED, CALIBRATION_SAMPLES)
            write_samples(observations, samples, synthetic=False)
            export_model(
                checkpoint, model, prompt_length=REFERENCE_PROMPT_LENGTH, calibration=[observations], **sizes
            )
            done.touch()
    return model


@pytest.fixture(scope="session")
def deep_model(shared_tmp: Path) -> Path:
    """`model.onnx` with random weights, deeper than the reference (7 layers), with two KV heads and a batch of two.

    Made-up samples lie beside it. The file is shared like `tiny_model`.
    """
    pytest.importorskip("torch", reason="exporting the model needs the extra [torch]")
    pytest.importorskip("onnxscript", reason="exporting the model needs the extra [torch]")
    from filelock import FileLock  # a dependency of torch

    from pi05c.frontend.config import Architecture, GemmaSizes, LanguageSizes, VisionSizes
    from pi05c.frontend.export import export_model

    layers, heads = 7, {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    architecture = Architecture(
        VisionSizes(width=32, depth=2, mlp_dim=64, num_heads=2, image_size=28, patch_size=14),
        LanguageSizes(width=64, depth=layers, mlp_dim=128, vocab_size=64, **heads),
        GemmaSizes(width=48, depth=layers, mlp_dim=96, **heads),
    )
    sizes = {"batch": 2, "prompt_length": 12, "horizon": 5, "steps": 3}
    folder = shared_tmp / "deep_model"
    model, config, done = folder / "model.onnx", folder / "config.json", folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.is_file():
            folder.mkdir(exist_ok=True)
            config.write_text(json.dumps({"architecture": asdict(architecture)}))
            export_model(None, model, config=str(config), random=True, **sizes)
            done.touch()
    return model


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` rewrites `golden/` (see `tests/passes/test_golden.py`)."""
    parser.addoption("--update-golden", action="store_true", help="write golden/ anew instead of comparing")
