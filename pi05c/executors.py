"""Where a map over samples or configurations runs: in this process, in several of this machine, on a Dask cluster.

A task is a call of one function on one picklable argument, and tasks know nothing of each other, so that the results
are the same wherever and beside however many others each one ran.
"""

from __future__ import annotations

import itertools
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pi05c.graph.errors import Pi05cError, UsageError
from pi05c.graph.requirements import refuse_unsupported

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 3
"""So often in a row may processes die without any task being finished."""

MOST_WAITING = 256
"""So many tasks at most are handed to an executor before the first of them is done."""

DASK_SECONDS = 10.0
"""How long a Dask scheduler may take to answer."""


@contextmanager
def executor_for(
    executor: Executor | None = None, *, jobs: int | None = None, dask: str | None = None
) -> Iterator[Executor | None]:
    """The executor that was given or is asked for; what is made here ends with the block.

    Args:
        executor: any; it stays open.
        jobs: number of local processes; 1 is this one.
        dask: address of a Dask scheduler, `tcp://HOST:8786`. Its workers need pi05c, and the files that tasks name.

    Yields:
        None where everything is to run in this process.

    Raises:
        UsageError: more than one is asked for, or no process.
        Pi05cError: Dask is not installed, no scheduler answers, or it has no workers.
    """
    if sum(choice is not None for choice in (executor, jobs, dask)) > 1:
        raise UsageError("--jobs and --dask cannot be given together: tasks run in one place")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs} is not usable: give a number of processes from 1 on")
    if dask is not None:
        with _dask_client(dask) as client:
            yield _DaskExecutor(client)
    elif jobs is not None and jobs > 1:
        with LocalProcesses(jobs) as processes:
            yield processes
    else:
        yield executor


def run_tasks(
    function: Callable[[T], R], tasks: Iterable[T], executor: Executor | None = None
) -> Iterator[R]:
    """`function(task)` of each task, in their order, as they become ready.

    What an executor that broke leaves undone runs in this process. The first error ends all; what has not begun then
    is cancelled.

    Args:
        function: can be pickled by its name.
        executor: where the tasks run; None: here, one after the other.
    """
    if executor is None:
        yield from map(function, tasks)
        return
    ahead = iter(tasks)
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        while True:
            for task in itertools.islice(ahead, MOST_WAITING - len(waiting)):
                waiting.append((task, _submitted(executor, function, task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenExecutor:
                result = function(task)
            yield result
    finally:
        for _, future in waiting:
            future.cancel()


def _submitted(executor: Executor, function: Callable[[T], R], task: T) -> Future[R]:
    try:
        return executor.submit(function, task)
    except BrokenExecutor as error:
        failed: Future[R] = Future()
        failed.set_exception(error)
        return failed


@dataclass(frozen=True)
class _Call:
    result: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LocalProcesses(Executor):
    """Processes of this machine. Where one dies, all are started anew, and what was not finished runs again.

    They are spawned, not forked: onnxruntime's threads do not survive a fork.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()
        self._pool = self._started()
        self._died = 0
        self._unfinished: set[Future[Any]] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `Executor.submit`; fails with a Pi05cError where processes keep dying."""
        call = _Call(Future(), fn, args, kwargs)
        self._unfinished.add(call.result)
        call.result.add_done_callback(self._unfinished.discard)
        self._run(call)
        return call.result

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As `Executor.shutdown`. Processes without work are ended, not asked to end.

        One that died while it waited for work leaves the queue locked, and the others would wait for ever.
        """
        workers = self._workers()
        if cancel_futures:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if wait:
            futures.wait(list(self._unfinished))
            workers = self._workers() or workers
        self._pool.shutdown(wait=False)
        for worker in workers if wait else ():
            worker.terminate()

    def _workers(self) -> list[multiprocessing.process.BaseProcess]:
        return list((self._pool._processes or {}).values())

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._jobs, multiprocessing.get_context("spawn"))

    def _run(self, call: _Call) -> None:
        if call.result.cancelled():
            return
        pool = self._pool
        try:
            running = pool.submit(call.function, *call.args, **call.kwargs)
        except BrokenExecutor as error:
            self._again(call, pool, error)
        else:
            running.add_done_callback(lambda done: self._finished(call, pool, done))

    def _finished(self, call: _Call, pool: ProcessPoolExecutor, done: Future[Any]) -> None:
        error = None if done.cancelled() else done.exception()
        if isinstance(error, BrokenExecutor):
            self._again(call, pool, error)
            return
        self._died = 0
        if done.cancelled():
            call.result.cancel()
        elif call.result.set_running_or_notify_cancel():
            if error is not None:
                call.result.set_exception(error)
            else:
                call.result.set_result(done.result())

    def _again(self, call: _Call, pool: ProcessPoolExecutor, error: BrokenExecutor) -> None:
        """Run what a broken pool left, in a new one."""
        with self._lock:
            if pool is self._pool and self._died < ATTEMPTS:
                self._died += 1
                self._pool = self._started()
            renewed = pool is not self._pool
        if renewed:
            self._run(call)
        elif call.result.set_running_or_notify_cancel():
            failure = Pi05cError(
                f"{self._jobs} local processes ended {ATTEMPTS} times without finishing anything, as they do where "
                "memory runs out: give fewer --jobs"
            )
            failure.__cause__ = error
            call.result.set_exception(failure)


class _DaskExecutor(Executor):
    """Tasks of a Dask client.

    Dask's own executor (distributed 2026.8.0, cfexecutor.py) fails with a TypeError where the worker that holds a result
    dies while the result is fetched. `result()` of a Dask future waits until another worker has it.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As `Executor.submit`."""
        remote = self._client.submit(fn, *args, pure=False, **kwargs)
        local: Future[Any] = Future()
        local.add_done_callback(lambda done: remote.cancel() if done.cancelled() else None)
        remote.add_done_callback(lambda done: _copy(done, local))
        return local


def _copy(remote: Any, local: Future[Any]) -> None:
    """Hand on how a Dask future ended."""
    try:
        result = remote.result()
    except BaseException as error:
        if local.set_running_or_notify_cancel():
            local.set_exception(error)
    else:
        if local.set_running_or_notify_cancel():
            local.set_result(result)


@contextmanager
def _dask_client(address: str) -> Iterator[Any]:
    refuse_unsupported("pi05c[dask]")
    try:
        from distributed import Client
    except ImportError as error:
        raise Pi05cError("--dask needs Dask: pip install 'pi05c[dask]'") from error
    try:
        client = Client(address, timeout=DASK_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise Pi05cError(
            f"no Dask scheduler answers at {address}: start one with `dask scheduler`, and give the address that it prints"
        ) from error
    with client:
        if not client.ncores():
            raise Pi05cError(
                f"the Dask scheduler at {address} has no workers: start some with `dask worker {address}`"
            )
        yield client


__all__ = ["LocalProcesses", "executor_for", "run_tasks"]
