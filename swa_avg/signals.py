"""Signals: Ctrl-C, SIGTERM and SIGHUP end the command from its first instruction on.

The first signal unwinds the command as an error does, so that no temporary file remains.
Later ones are ignored: they would cut the unwinding short. A command that does not unwind
(the user's code caught the exception, or waits for something) ends after a few seconds.
Imports little, because nothing is heeded before it is imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

_ENDING = ("SIGINT", "SIGTERM", "SIGHUP")
_PATIENCE = 5.0  # seconds to unwind
_LAST_PATIENCE = 2.0  # seconds for what is registered for the exit, once unwinding has failed


class Signals:
    """What has come from outside.

    Attributes:
        received: The number of the first signal, 0 if none has come.
        silent: Whether another process tells the user (of several ranks, the first one).
        after: What to add to the message: that the output is written, once it is.
    """

    def __init__(self) -> None:
        self.received = 0
        self.silent = False
        self.after = ""
        self._over = False
        self._leaving = False
        self._process = os.getpid()

    @property
    def code(self) -> int:
        """The exit code that a shell gives a process which this signal ended."""
        return 128 + self.received

    def heed(self) -> None:
        """From now on unwind when a signal comes; one that is ignored (nohup) stays ignored."""
        for name in _ENDING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._end)

    def end(self) -> None:
        """From now on nothing is left to unwind: a first signal ends the process at once."""
        self._over = True

    def check(self) -> None:
        """Unwind, if a signal has come and somebody has caught what it raised."""
        if self.received:
            raise KeyboardInterrupt

    def leave(self, code: int) -> NoReturn:
        """Run what is registered for the exit, and end the process without waiting for threads.

        A thread may wait for a server that does not answer.
        """
        self._leaving = True
        self.end()
        self._tell()
        atexit._run_exitfuncs()
        flush()
        os._exit(code)

    def _end(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process of the user's code: not ours to unwind
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received:
            return
        self.received = number
        if self._over:  # Python waits for a thread of the user's code
            self._tell()
            os._exit(self.code)
        _silence()
        self._limit(_PATIENCE)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.code)

    def _limit(self, seconds: float) -> None:
        """End the process if it has not ended by itself so many seconds from now."""
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:  # something that is registered for the exit does not end
            os._exit(self.code)
        self._limit(_LAST_PATIENCE)
        self.leave(self.code)

    def _tell(self) -> None:
        """Say that Ctrl-C was heeded; who sends another signal knows."""
        if self.received == signal.SIGINT and not self.silent:
            line = f"interrupted.{self.after}" if self.after else "interrupted"
            with suppress(OSError):  # nobody is there to read it
                os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def flush() -> None:
    """Write out what was printed; if that is impossible, it is too late to say so."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it
            stream.flush()


def _silence() -> None:
    """Keep Python from reporting what is raised where nobody can catch it.

    torch's DataLoader raises in a handler of its own when a worker ends: it has ended
    because of the same signal.
    """
    sys.unraisablehook = _nothing
    if "threading" in sys.modules:
        sys.modules["threading"].excepthook = _nothing  # type: ignore[attr-defined]
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _nothing(_: object) -> None:
    pass
