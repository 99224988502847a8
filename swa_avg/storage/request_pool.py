"""A pool of daemon threads for requests to servers.

A server may answer late or never. Python waits at exit for the threads of
`concurrent.futures`, so this pool uses daemon threads. When the pool is closed, a caller
that waits for a request gets an error. The pool does not know what a request does.
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
    """A pool of up to `threads` threads. Unfinished requests are cancelled when it is closed."""

    def __init__(self, threads: int) -> None:
        self._most = threads
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._unfinished: set[Future[Any]] = set()
        self._threads = 0
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a request in one of the threads."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the request pool is closed")
            self._unfinished.add(future)
            self._jobs.put((future, lambda: call(*args, **kwargs)))
            start = len(self._unfinished) > self._threads < self._most
            self._threads += start
        if start:
            threading.Thread(target=self._work, name="swa-avg-request", daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancel all unfinished requests, without waiting for them."""
        with self._lock:
            self._closed = True
            left, threads = list(self._unfinished), self._threads
        for future in left:
            if not future.cancel():
                with suppress(InvalidStateError):  # the response has just arrived
                    future.set_exception(FileError("was cancelled before the server answered"))
        for _ in range(threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if future.set_running_or_notify_cancel():
                _complete(future, call)
            with self._lock:
                self._unfinished.discard(future)


def _complete(future: Future[Any], call: Callable[[], Any]) -> None:
    """Store the result or the error of a request in its future, unless it was cancelled."""
    try:
        result = call()
    except BaseException as error:
        with suppress(InvalidStateError):
            future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            future.set_result(result)
