"""What every test of the driver needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Command, Result

from pi05c import cli
from pi05c.passes import REGISTRY


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep measured ranges out of the user's cache, and each test from what another measured."""
    folder: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PI05C_CACHE", str(folder))


@pytest.fixture(autouse=True)
def _no_passes_left() -> Iterator[None]:
    """Take the passes of plug-ins out again."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


@pytest.fixture
def pi05c(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line."""

    def run(*arguments: str | Path) -> Result:
        status = cli.main([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def dask_cluster() -> Iterator[Any]:
    """A Dask cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed", reason="needs the extra [dask]")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as running:
        yield running
