"""Errors of an engine folder against the float32 reference, and running a folder or a graph on samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_policy import ROWS, WIDTH, policy, wrecking_pass

import pi05c
from pi05c.backend.onnxruntime import load_runner
from pi05c.folder import GRAPH, SAMPLES
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.manifest import read_manifest
from pi05c.verification import SIMULATION

__all__ = ["policy", "wrecking_pass"]


@pytest.fixture
def half_precision(policy: Path, tmp_path: Path) -> Path:
    """A folder without a plan whose graph computes in float16, so that it has an error to measure."""
    return pi05c.compile(
        policy, tmp_path / "engine", passes="fp16", backend="onnxruntime", cache=tmp_path / "cache"
    ).folder


def recorded(policy: Path) -> Path:
    return policy.with_name("model.calibration.npz")


def with_reference(policy: Path, path: Path, *, scale: float = 1.0) -> Path:
    """The recorded samples of a policy with its own actions, each `scale` times as large."""
    x = np.load(recorded(policy))["x"]
    runner = load_runner(policy)
    actions = np.stack([runner.run({"x": sample})["actions"] for sample in x])
    np.savez(path, x=x, actions=actions * np.float32(scale))
    return path


def test_the_error_is_that_of_the_graph_against_the_plain_one(half_precision: Path, policy: Path) -> None:
    samples = np.load(half_precision / SAMPLES)
    reference = load_runner(policy).run({"x": samples["x"]})["actions"]
    result = load_runner(half_precision / GRAPH).run({"x": samples["x"]})["actions"]
    expected = np.linalg.norm(result - reference) / np.linalg.norm(reference)
    verdict = pi05c.verify(half_precision)
    assert verdict.simulated.worst.relative_l2 == pytest.approx(expected, rel=1e-3)
    assert 1e-5 < expected < 5e-3


def test_the_figures_are_those_of_the_manifest_and_the_same_twice(half_precision: Path) -> None:
    verification = read_manifest(half_precision).verification
    assert verification is not None
    first, second = pi05c.verify(half_precision), pi05c.verify(half_precision)
    assert first.simulated == second.simulated
    assert first.simulated.worst.relative_l2 == verification.worst().relative_l2
    assert first.limit == verification.limit
    assert first.passed


def test_without_a_plan_the_reason_is_given(half_precision: Path) -> None:
    verdict = pi05c.verify(half_precision)
    assert verdict.measured is None
    assert verdict.why_not_measured == f"{half_precision} has no model.engine yet"


def test_the_limit_decides_and_nothing_else(half_precision: Path) -> None:
    error = pi05c.verify(half_precision).simulated.worst.relative_l2
    assert not pi05c.verify(half_precision, max_error=error * 0.99).passed
    assert pi05c.verify(half_precision, max_error=error).passed
    assert not pi05c.verify(half_precision, max_error=0.0).passed


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
def test_a_limit_that_holds_nothing_is_refused_before_anything_runs(
    half_precision: Path, policy: Path, tmp_path: Path, limit: float
) -> None:
    with pytest.raises(UsageError, match="is no limit"):
        pi05c.verify(half_precision, max_error=limit)
    with pytest.raises(UsageError, match="is no limit"):
        pi05c.compile(policy, tmp_path / "other", passes="exact", backend="onnxruntime", max_error=limit)
    assert not (tmp_path / "other").exists()


def test_a_large_error_in_one_of_many_samples_fails(
    half_precision: Path, policy: Path, tmp_path: Path
) -> None:
    path = with_reference(policy, tmp_path / "reference.npz")
    assert pi05c.verify(half_precision, samples=path).passed
    arrays = dict(np.load(path))
    arrays["actions"][2] *= np.float32(1.5)
    np.savez(path, **arrays)
    verdict = pi05c.verify(half_precision, samples=path)
    assert not verdict.passed
    assert verdict.simulated.worst.sample == 2
    assert verdict.simulated.worst.relative_l2 == pytest.approx(1 / 3, rel=1e-2)


def test_a_graph_that_pretends_to_be_exact_is_found_out(
    policy: Path, tmp_path: Path, wrecking_pass: str
) -> None:
    pi05c.compile(policy, tmp_path / "wide", passes=wrecking_pass, backend="onnxruntime", max_error=10.0)
    assert pi05c.verify(tmp_path / "wide").passed
    assert not pi05c.verify(tmp_path / "wide", max_error=0.1).passed


def test_samples_that_cannot_serve_are_refused_by_name(
    half_precision: Path, policy: Path, tmp_path: Path
) -> None:
    with pytest.raises(Pi05cError, match="no reference outputs"):
        pi05c.verify(half_precision, samples=recorded(policy))
    with pytest.raises(Pi05cError, match=r"there is no .*missing"):
        pi05c.verify(half_precision, samples=tmp_path / "missing.npz")
    wide = tmp_path / "wide.npz"
    np.savez(wide, x=np.zeros((1, ROWS, WIDTH + 8), np.float32))
    with pytest.raises(Pi05cError, match=rf"\b{WIDTH + 8}\b.*\b{WIDTH}\b"):
        pi05c.verify(half_precision, samples=wide)
    (half_precision / SAMPLES).unlink()
    with pytest.raises(Pi05cError, match=r"samples\.npz is missing"):
        pi05c.verify(half_precision)


def test_a_folder_without_samples_of_its_own_takes_those_named(policy: Path, tmp_path: Path) -> None:
    reference = with_reference(policy, tmp_path / "reference.npz")
    recorded(policy).unlink()
    folder = pi05c.compile(policy, tmp_path / "engine", passes="exact", backend="onnxruntime").folder
    with pytest.raises(Pi05cError, match=r"--samples FILE\.npz"):
        pi05c.verify(folder)
    verdict = pi05c.verify(folder, samples=reference)
    assert verdict.passed
    assert verdict.limit == 1e-5


@pytest.mark.parametrize("count", [1, 3])
def test_run_gives_as_many_outputs_as_samples(half_precision: Path, tmp_path: Path, count: int) -> None:
    x = np.random.default_rng(5).standard_normal((count, 1, ROWS, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", x=x)
    result = pi05c.run(half_precision, tmp_path / "inputs.npz", tmp_path / "outputs.npz")
    assert (result.samples, result.ran) == (count, SIMULATION)
    actions = np.load(tmp_path / "outputs.npz")["actions"].reshape(x.shape)
    runner = load_runner(half_precision / GRAPH)
    for sample, found in zip(x, actions, strict=True):
        np.testing.assert_array_equal(found, runner.run({"x": sample})["actions"])
