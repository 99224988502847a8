"""The streams for results and messages, separate from the output of the user's code.

The user's code may print, start programs that print, replace `sys.stdout` or close it.
Before it runs, the original descriptors 1 and 2 are duplicated for swa-avg's own output,
and descriptor 1 is redirected to stderr until the process ends.
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
    """Ends the process with code 1 if a function registered with atexit raises.

    Python itself ignores such an error. An instance is created before the user's code runs,
    so that its own exit function runs last.
    """

    def __init__(self) -> None:
        self._failures: list[DataError] = []
        self._report: Callable[[DataError], object] = lambda error: None
        atexit.register(self._end)

    def begin(self, report: Callable[[DataError], object]) -> None:
        """Start watching; called when the command is done.

        Args:
            report: Called with the first error.
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

        self._report = report
        sys.unraisablehook = note

    def _end(self) -> None:
        if self._failures:
            self._report(self._failures[0])
            os._exit(1)


class Streams:
    """The streams of swa-avg itself.

    Attributes:
        out: The stream for results; None means the current `sys.stdout`.
        err: The stream for messages; None means the current `sys.stderr`.
        watch: Watches the exit of the process; None until the streams are separated.
    """

    def __init__(self) -> None:
        self.out: TextIO | None = None
        self.err: TextIO | None = None
        self.watch: ExitWatch | None = None

    @contextmanager
    def separated(self, *, silent: bool) -> Iterator[None]:
        """Redirect what the user's code prints to stderr; restore `sys.stdout` afterwards.

        Args:
            silent: Whether to discard what the user's code prints to stdout.
        """
        if self.watch:
            yield
            return
        out, err = sys.stdout, sys.stderr
        self.out, self.err = out, err
        if _number(out) == 1 and _number(err) == 2:
            self._separate(silent)
            try:
                yield
            finally:
                sys.stdout, sys.stderr = out, err
        else:  # stdout is captured, as in a notebook or a test
            nowhere = StringIO()
            with redirect_stdout(nowhere if silent else err):
                yield
            sys.stderr = err

    def _separate(self, silent: bool) -> None:
        out, err = sys.stdout, sys.stderr
        out.flush()
        self.out, self.err = _copied(out), _copied(err)
        target = os.open(os.devnull, os.O_WRONLY) if silent else 2
        os.dup2(target, 1)
        if silent:
            os.close(target)
        # Line buffering keeps the order of what the user's code prints to stdout and stderr.
        out.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        self.watch = ExitWatch()

    def silence(self) -> None:
        """Discard results from now on: the reader has closed stdout."""
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
