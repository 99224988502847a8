"""Numbered tasks that run in parallel, in threads or in forked processes.

Python's threads pass the GIL to each other at each call of numpy. For short calls that costs
as much as the calls themselves, so processes are faster. torch's DataLoader forks its workers
in the same way. This module does not know what a task does.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from swa_avg.errors import SwaAvgError

_T = TypeVar("_T")
Task = Callable[[int], _T]  # is called with a task's number
Results = Iterator[tuple[int, _T]]
# The signals that a terminal sends to all its processes.
_FOR_ALL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
_ENDING = [*_FOR_ALL, signal.SIGTERM]
_GRACE = 0.5  # seconds to wait for running threads after an interrupt
_QUEUED = 2  # tasks given to a process at once, so that it never waits for the next one


def can_fork() -> bool:
    """Return whether the work can be done in forked processes.

    It cannot if there are other threads: a forked process could wait forever for their locks.
    """
    alone = threading.active_count() == 1 and not multiprocessing.current_process().daemon
    return sys.platform == "linux" and alone


@contextmanager
def in_threads(do: Task[_T], count: int, workers: int) -> Iterator[Results[_T]]:
    """Run tasks 0, 1, … `count` - 1 in threads.

    Args:
        do: Runs one task.
        count: The number of tasks.
        workers: How many tasks run at once.

    Yields:
        An iterator over the number and the result of each task, in the order in which they
        finish. If tasks fail, it raises the error of the one with the lowest number.
    """
    pool = ThreadPoolExecutor(workers, "swa-avg")
    numbers = {pool.submit(do, number): number for number in range(count)}
    try:
        yield _done(numbers)
    except BaseException as error:
        # Ctrl-C must not wait for a thread that waits for a server.
        stays = isinstance(error, Exception)
        pool.shutdown(wait=stays, cancel_futures=True)
        futures.wait([one for one in numbers if one.running()], None if stays else _GRACE)
        raise
    pool.shutdown()


def _done(numbers: Mapping[Future[_T], int]) -> Results[_T]:
    for future in as_completed(numbers):
        if future.exception():
            # An earlier task may still fail: the same error must be raised in every run.
            for earlier in numbers:
                earlier.result()
        yield numbers[future], future.result()


@contextmanager
def in_processes(do: Task[_T], count: int, workers: int) -> Iterator[Results[_T]]:
    """Run tasks 0, 1, … `count` - 1 in forked processes, which see the memory of this one.

    Arguments and yielded values are those of `in_threads`. The result of a task should be
    small, because it is sent through a pipe. If a process is killed, the iterator raises
    `SwaAvgError`.

    Raises:
        OSError: The system does not allow more processes.
    """
    processes: list[_Worker] = []
    try:
        for _ in range(min(workers, count)):
            processes.append(_Worker.start(do))
        yield _results(processes, count)
    finally:
        for worker in processes:
            worker.end()


def _results(workers: Sequence[_Worker], count: int) -> Results[Any]:
    """Send tasks to the workers, and yield the results."""
    numbers = iter(range(count))
    failed: dict[int, Exception] = {}
    for worker in [*workers] * _QUEUED:
        worker.send(next(numbers, None))
    while busy := {worker.pipe: worker for worker in workers if worker.tasks}:
        for pipe in wait([*busy]):
            assert isinstance(pipe, Connection)
            number, result, error = busy[pipe].receive()
            if error is not None:
                failed[number] = error
                continue
            # After a failure the tasks already sent still run: an earlier one may fail too.
            busy[pipe].send(None if failed else next(numbers, None))
            yield number, result
    if failed:
        raise failed[min(failed)]


@dataclass
class _Worker:
    """A forked process.

    Attributes:
        process: The process.
        pipe: The connection for task numbers and results.
        tasks: The number of tasks that it has not finished.
    """

    process: BaseProcess
    pipe: Connection
    tasks: int = 0

    @classmethod
    def start(cls, do: Task[_T]) -> _Worker:
        """Fork a process."""
        context = multiprocessing.get_context("fork")
        mine, its = context.Pipe()
        process = context.Process(target=_serve, args=(do, its, mine), daemon=True)
        # A signal that arrives during the fork is delivered after both processes are set up.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            with warnings.catch_warnings():
                # The warning is for threads unknown to Python, such as numpy's: they are not used.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        its.close()
        return cls(process, mine)

    def send(self, number: int | None) -> None:
        """Send a task to the process, if there is one."""
        if number is not None:
            self.tasks += 1
            with suppress(OSError):  # the process has died; `receive` reports it
                self.pipe.send(number)

    def receive(self) -> tuple[int, Any, Exception | None]:
        """Return the number of a finished task, its result, and its error."""
        try:
            number, result, error = self.pipe.recv()
        except (EOFError, OSError) as gone:
            self.process.join()
            raise SwaAvgError(
                f"a worker process died (exit code {self.process.exitcode})",
                remedy="If the machine ran out of memory, use --threads 1, which needs the least",
            ) from gone
        self.tasks -= 1
        return number, result, error

    def end(self) -> None:
        """Kill the process; its unfinished tasks are no longer needed."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.pipe.close()


def _serve(do: Task[_T], line: Connection, other: Connection) -> None:
    """Run tasks until the pipe is closed."""
    for number in _FOR_ALL:  # the parent process handles these, and kills its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    other.close()
    with suppress(EOFError, OSError):
        while True:
            number = line.recv()
            line.send((number, *_outcome(do, number)))


def _outcome(do: Task[_T], number: int) -> tuple[_T | None, Exception | None]:
    try:
        return do(number), None
    except (SwaAvgError, OSError, MemoryError) as error:
        return None, error
    except Exception:
        return None, RuntimeError(traceback.format_exc())
