"""Where results and messages go, apart from what the user's code prints.

The user's code may print, start programs that print, replace `sys.stdout` or close it.
From the moment it runs, descriptor 1 is its own and leads to stderr, until the process
ends; ours are copies of the two descriptors as they were.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from typing import TextIO

from swa_avg.errors import DataError


class ExitWatch:
    """Has the process end with code 1 if a function that runs at its exit raises.

    Python ignores such an error. It is made before the user's code runs, so that it
    comes last at exit.
    """

    def __init__(self) -> None:
        self._failures: list[DataError] = []
        self._tell: Callable[[DataError], object] = lambda error: None
        atexit.register(self._end)

    def begin(self, tell: Callable[[DataError], object]) -> None:
        """Watch from now on, when all else is done.

        Args:
            tell: Is called with the first error.
        """
        from swa_avg.batchnorm import error_line, frames_of

        before = sys.unraisablehook

        def note(failed: sys.UnraisableHookArgs) -> None:
            error = failed.exc_value
            if "atexit" not in (failed.err_msg or "") or error is None:
                before(failed)
                return
            found = f"a function that runs at exit: {error_line(error)}"
            self._failures.append(DataError(found, frames=frames_of(error)))

        self._tell = tell
        sys.unraisablehook = note

    def _end(self) -> None:
        if self._failures:
            self._tell(self._failures[0])
            os._exit(1)


class Streams:
    """Our stdout and stderr.

    Attributes:
        out: Where results go; None stands for `sys.stdout` of the moment.
        err: Where messages go; None stands for `sys.stderr` of the moment.
        watch: Watches the exit of the process, once its own descriptors are the user's
            code's.
    """

    def __init__(self) -> None:
        self.out: TextIO | None = None
        self.err: TextIO | None = None
        self.watch: ExitWatch | None = None

    @contextmanager
    def apart(self, *, silent: bool) -> Iterator[None]:
        """Let the user's code print to stderr; afterwards `sys.stdout` is what it was.

        Args:
            silent: Whether what it prints is shown nowhere instead.
        """
        if self.watch:
            yield
            return
        out, err = sys.stdout, sys.stderr
        self.out, self.err = out, err
        if _number(out) == 1 and _number(err) == 2:
            self._part(silent)
            try:
                yield
            finally:
                sys.stdout, sys.stderr = out, err
        else:  # somebody reads what this process prints, as a notebook or a test does
            nowhere = StringIO()
            with redirect_stdout(nowhere if silent else err):
                yield
            sys.stderr = err

    def _part(self, silent: bool) -> None:
        out, err = sys.stdout, sys.stderr
        out.flush()
        self.out, self.err = _copied(out), _copied(err)
        target = os.open(os.devnull, os.O_WRONLY) if silent else 2
        os.dup2(target, 1)
        if silent:
            os.close(target)
        # In the order in which it is printed, beside what goes to stderr.
        out.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        self.watch = ExitWatch()

    def silence(self) -> None:
        """Let results go nowhere from now on: nobody reads them."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        if self.watch and self.out is not None:
            os.dup2(nowhere, self.out.fileno())
        os.close(nowhere)


def _number(stream: TextIO | None) -> int | None:
    with suppress(AttributeError, OSError, ValueError):
        return stream.fileno() if stream is not None else None
    return None


def _copied(stream: TextIO) -> TextIO:
    return os.fdopen(
        os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors=stream.errors
    )
