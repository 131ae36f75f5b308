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
def _shared_cache(shared_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep measured ranges out of the user's cache; what one test measured serves all."""
    monkeypatch.setenv("PI05C_CACHE", str(shared_tmp / "cache"))


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which nothing is measured yet."""
    folder: Path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PI05C_CACHE", str(folder))
    return folder


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
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        env={"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"},  # else idle workers take processor time
    ) as running:
        yield running
