"""Isolates the user's code: every call of it runs inside `users_code`.

Any exception of the user's code, including `sys.exit()`, becomes a `DataError` with the
traceback of the user's frames as text. Changes to the process are undone where later steps
depend on them: signal handlers, the umask, `sys.argv` and `sys.path`. Changes to torch's
settings are not undone, because the computations of this package name their dtypes and
devices.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from swa_avg.errors import DataError, SwaAvgError

_PACKAGE = str(Path(__file__).parent.parent) + os.sep
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE")
    if hasattr(signal, name)
]
_LONGEST = 500  # characters of a message that are shown in a line


def error_line(error: BaseException) -> str:
    """Return an exception as one line: `ExceptionType: message`.

    An exception from a DataLoader worker has the whole traceback as its message, of which the
    last line is used. From any other message of several lines the first line is used, with
    the second line if the first ends with a colon.
    """
    try:
        text = str(error)
    except BaseException:  # the user's __str__ may raise
        text = ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    if "DataLoader worker" in lines[0] and "Traceback" in "".join(lines[:2]):
        return _shortened(lines[-1])
    announced = len(lines) > 1 and lines[0].endswith(":")
    return f"{kind}: {_shortened(' '.join(lines[: 2 if announced else 1]))}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def frames_of(error: BaseException) -> tuple[str, ...]:
    """Return the lines of a traceback, without the frames of this package."""
    report = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    waiting: list[traceback.TracebackException | None] = [report]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not _is_ours(frame.filename)]
        waiting += [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]
    return tuple(line for part in report.format() for line in part.splitlines())


def is_foreign(error: BaseException) -> bool:
    """Return whether an exception was raised by code outside this package.

    This package raises `SystemExit` and other non-`Exception`s only for signals.
    """
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    inside = where is not None and _is_ours(where.tb_frame.f_code.co_filename)
    return not (inside and isinstance(error, Exception))


def _is_ours(filename: str) -> bool:
    """Return whether a frame belongs to this package or to the import system."""
    ours = filename.startswith(_PACKAGE) and not filename.endswith(f"{os.sep}demo.py")
    return ours or filename.startswith("<frozen importlib") or filename == importlib.__file__


def signal_in(error: BaseException) -> BaseException | None:
    """Return the exception that a signal handler raised, if it caused the error.

    If a signal handler of this package raised it, its innermost frame is in this package.
    Without such a handler, as in a notebook, every KeyboardInterrupt counts.
    """
    if isinstance(error, KeyboardInterrupt) and not _handles_interrupts():
        return error
    one: BaseException | None = error
    for _ in range(50):  # a chain of exceptions can be a cycle
        if one is None:
            break
        if isinstance(one, (KeyboardInterrupt, SystemExit)) and one.__traceback__ is not None:
            inner = one.__traceback__
            while inner.tb_next is not None:
                inner = inner.tb_next
            if _is_ours(inner.tb_frame.f_code.co_filename):
                return one
        one = one.__cause__ or one.__context__
    return None


def _handles_interrupts() -> bool:
    """Return whether the handler of Ctrl-C is defined in this package."""
    handler = signal.getsignal(signal.SIGINT)
    code = getattr(getattr(handler, "__func__", handler), "__code__", None)
    return code is not None and _is_ours(code.co_filename)


class users_code:  # noqa: N801 - reads as a statement: with users_code("mod:loader: ")
    """A context manager in which the user's code runs.

    Args:
        doing: The prefix of the error message, which names the current step.
        batch: The number of the current batch, from 0, or None.

    Raises:
        DataError: The user's code raises. Errors of this package and exceptions from
            signals are passed on unchanged.
    """

    def __init__(self, doing: str = "", batch: int | None = None) -> None:
        self._doing = doing
        self._batch = batch

    def __enter__(self) -> None:
        self._handlers = _handlers()
        # Reading the umask means setting it. This is not done for each batch, because a
        # thread of the user's code may be creating files.
        self._umask = _umask() if self._batch is None else None
        self._path = list(sys.path)

    def __exit__(
        self, kind: object, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) != handler:
                signal.signal(number, handler)
        if self._umask is not None:
            os.umask(self._umask)
        if len(sys.path) < len(self._path):  # later imports of this package need them
            sys.path += [one for one in self._path if one not in sys.path]
        if error is None or isinstance(error, SwaAvgError):
            return
        from_outside = signal_in(error)
        if from_outside is error:
            return
        if from_outside is not None:  # the user's code raised another exception instead
            raise from_outside
        raise DataError(
            self._doing + error_line(error), batch=self._batch, frames=frames_of(error)
        ) from error


def _handlers() -> dict[int, signal.Handlers]:
    """Return the handlers of the signals that end the command; empty outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    return {number: one for number, one in found.items() if one is not None}  # type: ignore[misc]


def _umask() -> int:
    umask = os.umask(0o077)
    os.umask(umask)
    return umask


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Make the modules in a folder importable.

    `sys.path` and `sys.argv` are restored on exit. Inside, Ctrl-C raises a KeyboardInterrupt
    that `signal_in` recognises.
    """
    path, argv = list(sys.path), sys.argv
    sys.path.insert(0, str(folder))
    main = threading.current_thread() is threading.main_thread()
    replaced = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if replaced:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if replaced and signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.path[:] = path
        sys.argv = argv


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
