"""Threads that make requests to servers, and that nobody has to wait for.

A server may answer late or never. The threads of `concurrent.futures` are waited for
whatever happens; these are daemons, and whoever waits for a request is told when it is
given up. Knows nothing of what is asked.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import suppress
from typing import Any

from swa_avg.errors import FileError

_Job = tuple[Future[Any], Callable[[], Any]]


class RequestPool(Executor):
    """Up to so many threads. At the end of the context what is under way is given up."""

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._unfinished: set[Future[Any]] = set()
        self._threads = 0
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, ask: Callable[..., Any], /, *details: Any, **more: Any) -> Future[Any]:
        """Have a thread make a request."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("no more requests are made")
            self._unfinished.add(future)
            self._jobs.put((future, lambda: ask(*details, **more)))
            start = len(self._unfinished) > self._threads < self._most
            self._threads += start
        if start:
            threading.Thread(target=self._work, name="swa-avg-request", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Give up what is under way. It is never waited for."""
        with self._lock:
            self._closed = True
            left, threads = list(self._unfinished), self._threads
        for future in left:
            if not future.cancel():
                with suppress(InvalidStateError):  # it is answered in this moment
                    future.set_exception(FileError("was given up before the server answered"))
        for _ in range(threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, ask = job
            if future.set_running_or_notify_cancel():
                _settle(future, ask)
            with self._lock:
                self._unfinished.discard(future)


def _settle(future: Future[Any], ask: Callable[[], Any]) -> None:
    """Give a future what comes of a request, unless that was given up."""
    try:
        answer = ask()
    except BaseException as error:
        with suppress(InvalidStateError):
            future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            future.set_result(answer)
