"""Numbered tasks that are done side by side, by threads or by forked processes.

Python's threads hand the interpreter's lock to each other at each call of torch, which costs
as much as the calls where these are short; processes do not. torch's DataLoader forks its
workers in the same way. Knows nothing of what is done.
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
Task = Callable[[int], _T]  # is given a task's number
Results = Iterator[tuple[int, _T]]
# What a terminal sends to all its processes.
_FOR_ALL = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
_ENDING = [*_FOR_ALL, signal.SIGTERM]
_FAREWELL = 0.5  # seconds for threads that must not write any more
_IN_STORE = 2  # tasks that a process has, so that it need not wait for the next one


def can_fork() -> bool:
    """Tell whether processes may do the work.

    Not where there are other threads: a forked process would wait for their locks for ever.
    """
    alone = threading.active_count() == 1 and not multiprocessing.current_process().daemon
    return sys.platform == "linux" and alone


@contextmanager
def in_threads(do: Task[_T], count: int, workers: int) -> Iterator[Results[_T]]:
    """Do tasks 0, 1, … `count` - 1 in threads.

    Args:
        do: Does one of them.
        count: How many there are.
        workers: How many are done at once.

    Yields:
        What gives the number of each task when it is done, and what came of it. It raises
        what the earliest of the tasks that failed has raised.
    """
    pool = ThreadPoolExecutor(workers, "swa-avg")
    numbers = {pool.submit(do, number): number for number in range(count)}
    try:
        yield _done(numbers)
    except BaseException as error:
        # Ctrl-C does not wait for a thread that waits for a server.
        stays = isinstance(error, Exception)
        pool.shutdown(wait=stays, cancel_futures=True)
        futures.wait([one for one in numbers if one.running()], None if stays else _FAREWELL)
        raise
    pool.shutdown()


def _done(numbers: Mapping[Future[_T], int]) -> Results[_T]:
    for future in as_completed(numbers):
        if future.exception():
            # An earlier one may be about to fail too: what is raised must not be chance.
            for earlier in numbers:
                earlier.result()
        yield numbers[future], future.result()


@contextmanager
def in_processes(do: Task[_T], count: int, workers: int) -> Iterator[Results[_T]]:
    """Do tasks 0, 1, … `count` - 1 in processes, which have what this one has in memory.

    Arguments and what is yielded are those of `in_threads`. What comes of a task must be
    small, for it is sent. Where a process is killed, `SwaAvgError` is raised.

    Raises:
        OSError: The system has no room for more processes.
    """
    crew: list[_Worker] = []
    try:
        for _ in range(min(workers, count)):
            crew.append(_Worker.start(do))
        yield _answers(crew, count)
    finally:
        for worker in crew:
            worker.end()


def _answers(crew: Sequence[_Worker], count: int) -> Results[Any]:
    """Deal out tasks, and yield what comes of them."""
    numbers = iter(range(count))
    failed: dict[int, Exception] = {}
    for worker in [*crew] * _IN_STORE:
        worker.give(next(numbers, None))
    while busy := {worker.line: worker for worker in crew if worker.busy}:
        for line in wait([*busy]):
            assert isinstance(line, Connection)
            number, result, error = busy[line].take()
            if error is not None:
                failed[number] = error
                continue
            # Those that are given out are done to their end: an earlier one may fail too.
            busy[line].give(None if failed else next(numbers, None))
            yield number, result
    if failed:
        raise failed[min(failed)]


@dataclass
class _Worker:
    """A forked process.

    Attributes:
        process: It.
        line: What it is told through, and tells.
        busy: How many tasks it has.
    """

    process: BaseProcess
    line: Connection
    busy: int = 0

    @classmethod
    def start(cls, do: Task[_T]) -> _Worker:
        """Fork it."""
        context = multiprocessing.get_context("fork")
        mine, its = context.Pipe()
        process = context.Process(target=_serve, args=(do, its, mine), daemon=True)
        # One that comes now is heeded when it is clear whose it is.
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            with warnings.catch_warnings():
                # Of threads that Python knows nothing of, as numpy's: they take part in no fork.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        its.close()
        return cls(process, mine)

    def give(self, number: int | None) -> None:
        """Give it a task, if there is one."""
        if number is not None:
            self.busy += 1
            with suppress(OSError):  # it has died: that is seen when its answer is taken
                self.line.send(number)

    def take(self) -> tuple[int, Any, Exception | None]:
        """Return the number of a task, what came of it, and what it has raised."""
        try:
            number, result, error = self.line.recv()
        except (EOFError, OSError) as gone:
            self.process.join()
            raise SwaAvgError(
                f"a process that did a part of the work has died (exit code "
                f"{self.process.exitcode})",
                remedy="Is there too little memory? --threads 1 needs the least",
            ) from gone
        self.busy -= 1
        return number, result, error

    def end(self) -> None:
        """End it; what it is doing is not needed any more."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self.line.close()


def _serve(do: Task[_T], line: Connection, other: Connection) -> None:
    """Do tasks until no more come."""
    for number in _FOR_ALL:  # who has forked us ends us, and says what has happened
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
