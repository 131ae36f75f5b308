"""Ranges by ModelOpt's calibrators in torch: those of onnxruntime but for rounding, found by compile."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from test_calibration import model_of, value

from pi05c import calibration
from pi05c.calibration import MeasuredRanges, cached_ranges
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import Model, load, save
from pi05c.graph.ranges import Wanted
from pi05c.passes import PRESETS
from pi05c.passes.pipeline import parse, run
from pi05c.samples import find_samples, save_samples, split
from pi05c.thresholds import parse_method

pytest.importorskip("modelopt.torch.quantization", reason="needs the extra [modelopt]")

from onnx import helper

from pi05c.modelopt_calibration import calibrate_with_modelopt

WIDTH = 32


@pytest.fixture
def shallow_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The small reference model with two samples, one to measure on."""
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(tiny_model.with_name(name), path.with_name(name))
    samples = find_samples(load(tiny_model))
    assert samples is not None
    save_samples(path.with_name("model.calibration.npz"), list(samples[:2]))
    return path


class _Stop(Exception):  # noqa: N818
    pass


def asked_by_compile(path: Path, method: str, cache: Path) -> MeasuredRanges:
    """What the default pipeline is given."""
    found: list[MeasuredRanges] = []

    def calibrate(model: Model, wanted: Wanted) -> None:
        samples = find_samples(load(path))
        assert samples is not None
        fed = split(samples)[0].only(tensor.name for tensor in model.graph.inputs)
        found.append(
            cached_ranges(
                model, wanted.tensors, fed, cache, quantized=wanted.quantized, method=parse_method(method)
            )
        )
        raise _Stop

    with pytest.raises(_Stop):
        run(load(path), parse("default", PRESETS), calibrate=calibrate)
    return found[0]


@pytest.mark.parametrize(("method", "bin_width"), [("max", 1e-4), ("percentile{percent=99.5}", 0.015)])
def test_both_ways_agree_and_compile_finds_what_was_kept(
    method: str, bin_width: float, shallow_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = calibrate_with_modelopt(shallow_model, calibration_method=method, cache=tmp_path / "kept")
    assert done.file.is_file()
    ours = asked_by_compile(shallow_model, method, tmp_path / "own")
    monkeypatch.setattr(calibration, "_measure", None)
    theirs = asked_by_compile(shallow_model, method, tmp_path / "kept")
    assert theirs.low == done.ranges.low
    assert set(theirs.low) == set(ours.low)
    for name in ours.low:
        amax = max(abs(ours.low[name]), abs(ours.high[name]))
        assert theirs.low[name] == pytest.approx(ours.low[name], abs=2e-4 * amax)
        assert theirs.high[name] == pytest.approx(ours.high[name], abs=2e-4 * amax)
    assert len(theirs.thresholds) > 100
    for name, threshold in theirs.thresholds.items():
        amax = max(abs(ours.low[name]), abs(ours.high[name]))
        expected = ours.thresholds.get(name, amax)
        assert threshold == pytest.approx(expected, rel=bin_width, abs=amax / 1000)


def test_export_measures_and_compile_goes_on(
    pi05c: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.onnx"
    made = pi05c(
        *("export", "--random", "--config", "pi05_tiny", "--steps", "1", "--views", "1", "-o", model),
        *("--calibrate-with", "modelopt"),
    )
    assert made.status == 0, made.err
    assert "by ModelOpt's calibrators, on 6 samples on c" in made.out
    monkeypatch.setattr(calibration, "_measure", None)
    result = pi05c(model, "--passes", "default", "--backend", "onnxruntime", "-o", tmp_path / "engine")
    assert result.status == 0, result.err


def linear(tmp_path: Path, *arrays: np.ndarray) -> Path:
    """The squares of `x` through a linear, with samples beside it; the last one is held back."""
    weight = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    model = model_of(
        [
            helper.make_node("Mul", ["x", "x"], ["z"]),
            helper.make_node("MatMul", ["z", "w"], ["y"]),
        ],
        [value("x", [4, WIDTH])],
        [value("y", [4, WIDTH])],
        {"w": weight},
    )
    save(model, tmp_path / "linear.onnx")
    samples = [{"x": array.astype(np.float32)} for array in (*arrays, arrays[0])]
    save_samples(tmp_path / "linear.calibration.npz", samples)
    return tmp_path / "linear.onnx"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def test_a_range_that_grows_from_almost_nothing_has_not_too_many_bins(tmp_path: Path, kept: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((4, WIDTH)) * scale for scale in (1e-15, 0.0, 1e-10)]
    path = linear(tmp_path, *arrays)
    done = calibrate_with_modelopt(path, calibration_method="percentile{percent=100}", cache=kept)
    assert done.ranges.thresholds["z"] == pytest.approx(np.square(arrays[2]).max(), rel=1e-3)


def test_zeros_have_a_range(tmp_path: Path, kept: Path) -> None:
    path = linear(tmp_path, np.zeros((4, WIDTH)))
    done = calibrate_with_modelopt(path, calibration_method="percentile", cache=kept)
    assert done.ranges.thresholds["z"] == 0.0


def test_infinity_is_an_error_that_names_the_tensor(tmp_path: Path, kept: Path) -> None:
    path = linear(tmp_path, np.full((4, WIDTH), 1e20))
    with pytest.raises(Pi05cError, match="'z', which is to be quantized, holds infinity on sample 0"):
        calibrate_with_modelopt(path, cache=kept)
    assert not kept.exists()


@pytest.mark.parametrize("method", ["mse", "entropy", "max{steps=joint}"])
def test_other_methods_are_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max, percentile"):
        calibrate_with_modelopt(tmp_path / "missing.onnx", calibration_method=method)


def test_passes_that_ask_for_nothing_are_refused(tmp_path: Path, kept: Path) -> None:
    path = linear(tmp_path, np.ones((4, WIDTH)))
    with pytest.raises(Pi05cError, match="no pass of canonicalize asks for ranges"):
        calibrate_with_modelopt(path, "canonicalize", cache=kept)


def test_a_method_without_a_calibrator_is_a_usage_error(pi05c: Command, tmp_path: Path) -> None:
    made = pi05c("export", "--random", "--config", "pi05_tiny", "--passes", "fp16", "-o", tmp_path / "m.onnx")
    assert made.status == 2
    assert "--calibrate-with" in made.err
