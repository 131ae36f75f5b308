"""A specialized graph through the command line: its contract in the manifest, and what happens to samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi05c.cli.main import main
from pi05c.graph.io import load
from pi05c.graph.runner import Array
from pi05c.manifest import Manifest, read_manifest

PASSES = "specialize{views=1,1,0,prompt=16},exact"
TOKENS = 24
EXACT = 1e-5


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model in a folder without samples."""
    path = tmp_path_factory.mktemp("specialized") / "model.onnx"
    path.write_bytes(tiny_model.read_bytes())
    path.with_name("model.onnx.data").write_bytes(tiny_model.with_name("model.onnx.data").read_bytes())
    return path


@pytest.fixture(scope="module")
def observations(tiny_model: Path) -> dict[str, Array]:
    """Eight observations, the last two of which lack the third camera and have prompts of at most 16 tokens."""
    found = dict(np.load(tiny_model.with_name("model.calibration.npz")))
    found["image_masks"][:] = True
    found["image_masks"][6:, :, 2] = False
    found["token_masks"] = (
        np.arange(TOKENS)[None, None] < np.array([24, 20, 18, 12, 9, 6, 16, 7])[:, None, None]
    )
    return found


def _write(path: Path, samples: dict[str, Array], keep: slice = slice(None), without: str = "") -> Path:
    np.savez(path, **{name: array[keep] for name, array in samples.items() if name != without})
    return path


@pytest.fixture(scope="module")
def engine(model: Path, observations: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    samples = _write(folder / "observations.npz", observations)
    output = folder / "engine"
    arguments = ["--calibration", str(samples), "--backend", "onnxruntime", "--max-error", str(EXACT)]
    assert main(["compile", str(model), "--passes", PASSES, "-o", str(output), *arguments]) == 0
    return output


def _inputs(manifest: Manifest) -> dict[str, Any]:
    return {record.name: record for record in manifest.inputs}


def test_the_manifest_states_the_contract(engine: Path) -> None:
    manifest = read_manifest(engine)
    records = _inputs(manifest)
    assert list(records) == ["images", "image_masks", "tokens", "token_masks", "noise"]
    assert records["image_masks"].fixed == [True, True, False]
    assert not records["image_masks"].fed
    assert records["token_masks"].fixed == [None] * 16 + [False] * 8
    assert records["token_masks"].fed
    assert records["images"].fixed is None
    assert records["images"].shape == [1, 3, 3, 56, 56]
    fed = [tensor.name for tensor in load(engine / "model.onnx").graph.inputs]
    assert fed == [name for name, record in records.items() if record.fed]
    assert manifest.verification is not None
    assert manifest.verification.passed
    assert len(manifest.verification.errors) == 1, "of two samples that fit, one is held back"


def test_inspect_and_report_show_it(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (engine, engine / "model.onnx"):
        assert main(["inspect", str(path)]) == 0
        shown = capsys.readouterr().out
        assert "image_masks: bool[1,3], fixed to 1,1,0, not fed" in shown
        assert f"token_masks: bool[1,24], fixed to {'*,' * 16}0,0,0,0,0,0,0,0 (* is given)" in shown
    assert "fixed to 1,1,0, not fed" in (engine / "report.html").read_text()


def test_samples_that_do_not_fit_are_counted(
    model: Path, observations: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = _write(tmp_path / "all.npz", observations)
    arguments = ["--calibration", str(samples), "--backend", "onnxruntime"]
    assert main(["compile", str(model), "--passes", PASSES, "-o", str(tmp_path / "out"), *arguments]) == 0
    warning = "6 of 8 samples do not fit what the graph is specialized for and are left out"
    assert warning in capsys.readouterr().err


def test_no_sample_that_fits(
    model: Path, observations: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = _write(tmp_path / "three_views.npz", observations, slice(0, 6))
    arguments = ["--calibration", str(samples), "--backend", "onnxruntime"]
    assert main(["compile", str(model), "--passes", PASSES, "-o", str(tmp_path / "out"), *arguments]) == 1
    message = capsys.readouterr().err
    assert "none of the 6 samples of three_views.npz fits what the graph is specialized for" in message
    assert "--calibration FILE.npz" in message
    assert not (tmp_path / "out").exists()


def test_verify_takes_the_samples_of_the_folder(
    engine: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "image_masks" in np.load(engine / "samples.npz").files
    assert main(["verify", str(engine), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["passed"]
    assert verdict["simulated"]["worst"]["relative_l2"] < EXACT


def test_run_with_and_without_the_fixed_input(
    engine: Path, model: Path, observations: dict[str, Array], tmp_path: Path
) -> None:
    whole = _write(tmp_path / "whole.npz", observations, slice(6, 8))
    partial = _write(tmp_path / "partial.npz", observations, slice(6, 8), without="image_masks")
    found = []
    for index, (path, source) in enumerate(
        [(model, whole), (engine, whole), (engine, partial), (engine / "model.onnx", whole)]
    ):
        out = tmp_path / f"{index}.npz"
        assert main(["run", str(path), "--inputs", str(source), "-o", str(out)]) == 0
        found.append(np.load(out)["actions"])
    expected = found[0]
    assert all(np.linalg.norm(other - expected) / np.linalg.norm(expected) < EXACT for other in found)


@pytest.mark.parametrize("command", ["run", "verify"])
@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (5, "input 'image_masks' holds True at [0, 2], but the graph was specialized for False there"),
        (0, "input 'image_masks' holds True at [0, 2], but the graph was specialized for False there"),
        (None, "input 'token_masks' holds True at [0, 16], but the graph was specialized for False there"),
    ],
)
def test_samples_that_contradict_the_contract_are_refused(
    command: str,
    sample: int | None,
    message: str,
    engine: Path,
    observations: dict[str, Array],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = {name: array.copy() for name, array in observations.items()}
    if sample is None:
        sample = 2
        samples["image_masks"][sample, :, 2] = False
    samples["actions"] = np.zeros((8, 1, 10, 32), np.float32)
    source = _write(
        tmp_path / "other.npz", samples, slice(sample, sample + 1), without="actions" * (command == "run")
    )
    option = (
        ["--inputs", str(source), "-o", str(tmp_path / "o.npz")]
        if command == "run"
        else ["--samples", str(source)]
    )
    assert main([command, str(engine), *option]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "sample 0" in error
    assert "give an observation that fits, or compile with other options of specialize" in error


def test_calibrated_in_float16(model: Path, observations: dict[str, Array], tmp_path: Path) -> None:
    """Ranges are measured on the graph that has lost an input."""
    samples = _write(tmp_path / "all.npz", observations)
    arguments = ["--calibration", str(samples), "--backend", "onnxruntime"]
    passes = "specialize{views=1,1,0,prompt=16},fp16"
    assert main(["compile", str(model), "--passes", passes, "-o", str(tmp_path / "out"), *arguments]) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.calibration is not None
    assert (manifest.calibration.used, manifest.calibration.held_back) == (1, 1)


def test_a_specialized_graph_is_compiled_again(
    engine: Path, observations: dict[str, Array], tmp_path: Path
) -> None:
    """Its metadata holds the contract, so its samples are held to it and its manifest states it."""
    samples = _write(tmp_path / "all.npz", observations)
    arguments = ["--calibration", str(samples), "--backend", "onnxruntime", "--passes", "exact"]
    assert main(["compile", str(engine / "model.onnx"), "-o", str(tmp_path / "out"), *arguments]) == 0
    records = _inputs(read_manifest(tmp_path / "out"))
    assert records["image_masks"].fixed == [True, True, False]
    assert records["token_masks"].fixed == [None] * 16 + [False] * 8


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("prompt=25", 2, "option prompt=25 of pass specialize must be between 1 and 24"),
        ("views=1,0", 2, "option views=1,0 of pass specialize must hold 3 numbers"),
        ("prompt=9,prompt_mask=text_masks", 1, "name it with the option prompt_mask=NAME"),
        ("cameras=2", 2, "pass specialize has no option 'cameras'"),
    ],
)
def test_refusals(
    options: str, status: int, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = f"specialize{{{options}}},exact"
    command = [
        "compile",
        str(model),
        "--passes",
        passes,
        "-o",
        str(tmp_path / "out"),
        "--backend",
        "onnxruntime",
    ]
    assert main(command) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
