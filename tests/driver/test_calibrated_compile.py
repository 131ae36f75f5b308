"""Calibration as a compile asks for it: methods, samples from Python, and more than one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Command
from small_policy import ROWS, SAMPLES, WIDTH, policy

import pi05c as package
from pi05c.folder import GRAPH
from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.io import load
from pi05c.graph.runner import Array
from pi05c.graph.weights import array_of
from pi05c.manifest import read_manifest
from pi05c.samples import Samples, find_samples

__all__ = ["policy"]

PASSES = ["--passes", "default", "--backend", "onnxruntime", "--max-error", "1"]


def activation_scales(folder: Path) -> list[float]:
    graph = load(folder / GRAPH).graph
    return [
        float(array_of(node.inputs[1]).astype(np.float64))
        for node in graph.nodes
        if node.op == "QuantizeLinear"
    ]


@pytest.fixture
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the next command measure anew."""
    return lambda: monkeypatch.setenv("PI05C_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_the_method_sets_the_scales_and_is_recorded(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    scales, folders = {}, {}
    for name, method in (("max", "max"), ("half", "percentile{percent=50}")):
        folders[name] = tmp_path / name
        result = pi05c(policy, *PASSES, "--calibration-method", method, "-o", folders[name])
        assert result.status == 0, result.err
        assert (" by percentile{percent=50} on 3 samples" in result.out) == (name == "half")
        record = read_manifest(folders[name]).calibration
        assert record is not None
        assert record.method == method
        (scales[name],) = activation_scales(folders[name])
    sizes = np.abs(np.stack([sample["x"] for sample in samples(policy)][:-1]))
    expected = {"max": sizes.max(), "half": np.median(sizes)}
    assert scales == {name: 2.0 ** math.ceil(math.log2(amax / 448)) for name, amax in expected.items()}
    assert scales["half"] < scales["max"]


def test_an_unknown_method_is_a_usage_error(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    result = pi05c(policy, *PASSES, "--calibration-method", "mean", "-o", tmp_path / "out")
    assert result.status == 2
    assert "--calibration-method mean is not known" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", ["jobs", "dask"])
def test_workers_give_the_same_graph(
    workers: str,
    pi05c: Command,
    policy: Path,
    tmp_path: Path,
    fresh_cache: Any,
    request: pytest.FixtureRequest,
) -> None:
    options = [*PASSES, "--calibration-method", "percentile{percent=99}"]
    assert pi05c(policy, *options, "-o", tmp_path / "alone").status == 0
    fresh_cache()
    where = "2"
    if workers == "dask":
        where = request.getfixturevalue("dask_cluster").scheduler_address
    result = pi05c(policy, *options, f"--{workers}", where, "-o", tmp_path / "spread")
    assert result.status == 0, result.err
    assert (tmp_path / "alone" / GRAPH).read_bytes() == (tmp_path / "spread" / GRAPH).read_bytes()


def test_workers_serve_runs_of_passes_alone(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    result = pi05c(policy, "--passes", "default", "--jobs", "2", "--dump", tmp_path / "stages")
    assert result.status == 0, result.err
    assert (tmp_path / "stages").is_dir()


def test_jobs_and_dask_exclude_each_other(pi05c: Command, policy: Path, tmp_path: Path) -> None:
    for options in (["--jobs", "0"], ["--jobs", "2", "--dask", "tcp://nowhere:1"]):
        result = pi05c(policy, *PASSES, *options, "-o", tmp_path / "out")
        assert result.status == 2
        assert "--jobs" in result.err


def samples(policy: Path) -> Samples:
    found = find_samples(load(policy))
    assert found is not None
    return found


def test_samples_may_come_from_an_iterator(policy: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"passes": "default", "backend": "onnxruntime", "max_error": 1.0}
    package.compile(policy, tmp_path / "file", cache=tmp_path / "one", **options)
    drawn: list[int] = []

    def iterator() -> Iterator[dict[str, Array]]:
        for index, sample in enumerate(samples(policy)):
            drawn.append(index)
            yield sample

    result = package.compile(
        policy, tmp_path / "new" / "engine", calibration=iterator(), cache=tmp_path / "two", **options
    )
    assert drawn == list(range(SAMPLES))
    assert (tmp_path / "file" / GRAPH).read_bytes() == (tmp_path / "new" / "engine" / GRAPH).read_bytes()
    record = result.manifest.calibration
    assert record is not None
    assert (record.source, record.used, record.held_back) == ("an iterator", SAMPLES - 1, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new", "one", "policy", "two"]
    again = package.compile(
        policy, tmp_path / "list", calibration=list(samples(policy)), cache=tmp_path / "two", **options
    )
    assert again.manifest.calibration == record


def test_a_sample_of_an_iterator_is_checked_like_one_of_a_file(policy: Path, tmp_path: Path) -> None:
    good = {"x": np.zeros((1, ROWS, WIDTH), np.float32)}
    for bad, error, message in (
        ({"y": good["x"]}, Pi05cError, "'x'"),
        ({"x": np.full((1, ROWS, WIDTH), np.inf, np.float32)}, Pi05cError, "infinity"),
        (good["x"], UsageError, "sample 1 of calibration is a ndarray"),
    ):
        with pytest.raises(error, match=message):
            package.compile(
                policy,
                tmp_path / "out",
                passes="default",
                backend="onnxruntime",
                calibration=iter([good, bad]),
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def test_files_and_arrays_cannot_be_mixed(policy: Path, tmp_path: Path) -> None:
    mixed: Any = [tmp_path / "file.npz", {"x": np.zeros((1, ROWS, WIDTH), np.float32)}]
    for given in (mixed, mixed[::-1]):
        with pytest.raises(UsageError, match="calibration"):
            package.compile(policy, tmp_path / "out", calibration=given)
