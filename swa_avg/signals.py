"""Signal handling: Ctrl-C, SIGTERM and SIGHUP end the command cleanly.

The first signal raises an exception, which unwinds the command like an error, so that no
temporary file remains. Later signals are ignored: they would interrupt the unwinding. If
the command does not unwind (the user's code catches the exception, or waits), the process
ends after a few seconds. The module imports little, so that the handlers are installed early.
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
_UNWIND_SECONDS = 5.0
_EXIT_SECONDS = 2.0  # for the functions registered with atexit, after unwinding has failed


class Signals:
    """The signal handlers, and the signal that the process has received.

    Attributes:
        received: The number of the first signal; 0 if there was none.
        silent: Whether another process prints the message: with several ranks, rank 0 does.
        after: Text to add to the message, once the output is written.
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
        """The exit code that a shell reports for a process ended by this signal."""
        return 128 + self.received

    def install(self) -> None:
        """Install the handlers; a signal that is ignored (nohup) stays ignored."""
        for name in _ENDING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def end(self) -> None:
        """Declare the command finished: from now on a first signal ends the process at once."""
        self._over = True

    def check(self) -> None:
        """Raise again if a signal was received and its exception was caught elsewhere."""
        if self.received:
            raise KeyboardInterrupt

    def leave(self, code: int) -> NoReturn:
        """Run the functions registered with atexit and exit without waiting for threads.

        A thread may be waiting for a server that does not answer.
        """
        self._leaving = True
        self.end()
        self._print()
        atexit._run_exitfuncs()
        flush()
        os._exit(code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # the user's code forked this process: do not unwind it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.received:
            return
        self.received = number
        if self._over:  # Python is waiting for a thread of the user's code
            self._print()
            os._exit(self.code)
        _silence()
        self._limit(_UNWIND_SECONDS)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.code)

    def _limit(self, seconds: float) -> None:
        """End the process after this many seconds, unless it has ended before."""
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._give_up)
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:  # a function registered with atexit does not return
            os._exit(self.code)
        self._limit(_EXIT_SECONDS)
        self.leave(self.code)

    def _print(self) -> None:
        """Print that Ctrl-C interrupted the command; other signals print nothing."""
        if self.received == signal.SIGINT and not self.silent:
            line = f"interrupted.{self.after}" if self.after else "interrupted"
            with suppress(OSError):  # stderr is closed
                os.write(2, f"{line}\n".encode(errors="backslashreplace"))


def flush() -> None:
    """Flush stdout and stderr; errors are ignored, as the process is about to end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # closed, or a broken pipe
            stream.flush()


def _silence() -> None:
    """Stop Python from reporting exceptions raised in finalizers, threads and handlers.

    torch's DataLoader raises from its SIGCHLD handler when a worker ends, and the workers
    end because of the same signal.
    """
    sys.unraisablehook = _nothing
    if "threading" in sys.modules:
        sys.modules["threading"].excepthook = _nothing  # type: ignore[attr-defined]
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _nothing(_: object) -> None:
    pass
