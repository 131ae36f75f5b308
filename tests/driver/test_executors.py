"""Tasks that run elsewhere: in order, once each, and again where whoever ran them died."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from pi05c.executors import LocalProcesses, executor_for, run_tasks
from pi05c.graph.errors import Pi05cError, UsageError


def square(number: int) -> int:
    return number * number


def where(_: int) -> int:
    return os.getpid()


def fail_at_two(number: int) -> int:
    if number == 2:
        raise ValueError("two")
    return number


def die_once(task: tuple[Path, int]) -> int:
    """Kills its process where it finds no file, and leaves the file there."""
    marker, number = task
    if number == 3:
        try:
            marker.open("x").close()
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_in(task: tuple[int, int]) -> int:
    """Kills its process unless that is the one named."""
    home, number = task
    if os.getpid() != home:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_without_an_executor_tasks_run_here_one_after_the_other() -> None:
    with executor_for() as executor:
        assert executor is None
        assert list(run_tasks(where, range(3), executor)) == [os.getpid()] * 3


def test_one_job_is_this_process() -> None:
    with executor_for(jobs=1) as executor:
        assert executor is None


@pytest.mark.parametrize("kind", [ThreadPoolExecutor, LocalProcesses])
def test_results_come_in_the_order_of_the_tasks(kind: type[Any]) -> None:
    with kind(2) as executor:
        assert list(run_tasks(square, range(20), executor)) == [number**2 for number in range(20)]


def test_tasks_are_handed_over_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi05c.executors.MOST_WAITING", 4)
    taken: list[int] = []

    def tasks() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    with ThreadPoolExecutor(2) as executor:
        results = run_tasks(square, tasks(), executor)
        assert [next(results), next(results)] == [0, 1]
        assert len(taken) <= 6
        assert list(results) == [number**2 for number in range(2, 20)]


def test_jobs_are_processes_of_their_own() -> None:
    with executor_for(jobs=2) as executor:
        assert os.getpid() not in run_tasks(where, range(4), executor)


def test_an_error_of_a_task_ends_the_map() -> None:
    with LocalProcesses(2) as executor:
        results = run_tasks(fail_at_two, range(8), executor)
        assert [next(results), next(results)] == [0, 1]
        with pytest.raises(ValueError, match="two"):
            next(results)


def test_a_local_process_that_dies_loses_no_task(tmp_path: Path) -> None:
    with executor_for(jobs=2) as executor:
        tasks = [(tmp_path / "died", number) for number in range(8)]
        assert list(run_tasks(die_once, tasks, executor)) == list(range(8))
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize("again", [False, True])
def test_a_local_process_that_dies_without_work_stops_nobody(again: bool) -> None:
    with LocalProcesses(2) as executor:
        assert list(run_tasks(square, range(8), executor)) == [number**2 for number in range(8)]
        os.kill(executor._workers()[0].pid or 0, signal.SIGKILL)
        assert not again or list(run_tasks(square, range(8), executor)) == [number**2 for number in range(8)]


def test_processes_that_keep_dying_are_an_error() -> None:
    with LocalProcesses(2) as executor, pytest.raises(Pi05cError, match="fewer --jobs"):
        list(run_tasks(die_in, [(os.getpid(), number) for number in range(3)], executor))


def test_what_a_broken_executor_leaves_runs_here() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        assert list(run_tasks(die_in, [(os.getpid(), number) for number in range(3)], executor)) == [0, 1, 2]
        assert list(run_tasks(square, [5], executor)) == [25]


def test_an_executor_that_is_given_stays_open() -> None:
    with ThreadPoolExecutor(1) as given:
        with executor_for(given) as executor:
            assert executor is given
        assert given.submit(square, 3).result() == 9


def test_a_dask_cluster_runs_tasks_on_its_workers(dask_cluster: Any) -> None:
    with executor_for(dask=dask_cluster.scheduler_address) as executor:
        assert isinstance(executor, Executor)
        assert list(run_tasks(square, range(20), executor)) == [number**2 for number in range(20)]
        assert os.getpid() not in run_tasks(where, range(4), executor)


def test_a_dask_worker_that_dies_loses_no_task(dask_cluster: Any, tmp_path: Path) -> None:
    with executor_for(dask=dask_cluster.scheduler_address) as executor:
        tasks = [(tmp_path / "died", number) for number in range(8)]
        assert list(run_tasks(die_once, tasks, executor)) == list(range(8))
    assert (tmp_path / "died").exists()


def test_a_scheduler_without_workers_is_an_error() -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra [dask]")
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        pytest.raises(Pi05cError, match="has no workers"),
        executor_for(dask=empty.scheduler_address),
    ):
        pass


def test_a_scheduler_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="needs the extra [dask]")
    monkeypatch.setattr("pi05c.executors.DASK_SECONDS", 1.0)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(Pi05cError, match="no Dask scheduler answers"), executor_for(dask=address):
            pass


def test_only_one_place_can_be_asked_for() -> None:
    with pytest.raises(UsageError, match="cannot be given together"), executor_for(jobs=2, dask="tcp://a:1"):
        pass
    with pytest.raises(UsageError, match="--jobs 0"), executor_for(jobs=0):
        pass
