"""The gate to the user's code: every call into it goes through `users_code`.

Whatever the user's code raises, `sys.exit()` included, leaves here as one `DataError`
that keeps the traceback of the user's frames as text. What the code changes in the
process is put back where a later step of ours depends on it: the handlers of signals,
the umask, `sys.argv` and `sys.path`. Nothing is put back of torch's settings: our own
computations name their dtypes and devices.
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
_LONGEST = 500  # characters of a message that are shown in the one line


def theirs(error: BaseException) -> str:
    """Return an exception of the user's code as one line: `ExceptionType: message`.

    Of an exception that a DataLoader worker re-raises with its whole traceback
    as the message, the last line is the one that says something; of any other
    message of several lines the first, and the second where that is announced.
    """
    try:
        text = str(error)
    except BaseException:  # an exception may fail to describe itself
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
    """Return the traceback of an exception as lines, without the frames of this package."""
    told = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    waiting: list[traceback.TracebackException | None] = [told]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.stack[:] = [frame for frame in one.stack if not _is_ours(frame.filename)]
        waiting += [one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ())]
    return tuple(line for part in told.format() for line in part.splitlines())


def is_foreign(error: BaseException) -> bool:
    """Whether an exception was raised by other code than this package.

    No code of this package raises `SystemExit` and its like, but for signals.
    """
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    inside = where is not None and _is_ours(where.tb_frame.f_code.co_filename)
    return not (inside and isinstance(error, Exception))


def _is_ours(filename: str) -> bool:
    """Whether a frame is of this package, or of the import system."""
    ours = filename.startswith(_PACKAGE) and not filename.endswith(f"{os.sep}demo.py")
    return ours or filename.startswith("<frozen importlib") or filename == importlib.__file__


def signal_in(error: BaseException) -> BaseException | None:
    """Return what a signal that this process got has raised, if that led to the error.

    A handler of ours raises it, so its innermost frame is one of ours. Where no handler of
    ours is set, as in a notebook, nothing tells, and a KeyboardInterrupt is taken for one.
    """
    if isinstance(error, KeyboardInterrupt) and not _handles_interrupts():
        return error
    one: BaseException | None = error
    for _ in range(50):  # a chain may be a circle
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
    """Whether the handler of Ctrl-C is one of ours."""
    handler = signal.getsignal(signal.SIGINT)
    code = getattr(getattr(handler, "__func__", handler), "__code__", None)
    return code is not None and _is_ours(code.co_filename)


class users_code:  # noqa: N801 - reads as a statement: with users_code("mod:loader: ")
    """A context in which the user's code runs.

    Args:
        doing: What is being done; stands before the exception's name in the error.
        batch: The number of the batch at hand, from 0, or None where there is none.

    Raises:
        DataError: For anything that is raised inside, unless it is an error of this
            package or comes from a signal.
    """

    def __init__(self, doing: str = "", batch: int | None = None) -> None:
        self._doing = doing
        self._batch = batch

    def __enter__(self) -> None:
        self._handlers = _handlers()
        # Reading the umask means setting it. That is not done for each batch, because a
        # thread of the user's may be writing files at that moment.
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
        if len(sys.path) < len(self._path):  # we may have something to import, too
            sys.path += [one for one in self._path if one not in sys.path]
        if error is None or isinstance(error, SwaAvgError):
            return
        from_outside = signal_in(error)
        if from_outside is error:
            return
        if from_outside is not None:  # their code has made another exception of it
            raise from_outside
        raise DataError(
            self._doing + theirs(error), batch=self._batch, frames=frames_of(error)
        ) from error


def _handlers() -> dict[int, signal.Handlers]:
    """Return the handlers of the signals that end the command; only the main thread sets them."""
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
    """Let modules in a folder be imported.

    Afterwards `sys.path` and `sys.argv` are what they were. Inside, Ctrl-C raises a
    KeyboardInterrupt that `signal_in` recognises.
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
