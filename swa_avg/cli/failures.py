"""Failures: an exception is printed as one line and becomes an exit code."""

from __future__ import annotations

import click

from swa_avg.cli.streams import Streams
from swa_avg.errors import DataError, MismatchError, SelectionError, SwaAvgError, printable
from swa_avg.signals import Signals


def reported(error: BaseException, signals: Signals, streams: Streams, *, everything: bool) -> int:
    """Print an error, unless another rank does, and return the exit code.

    An exception that points to a bug in swa-avg is raised again.

    Args:
        error: The exception.
        signals: The signal handlers, which know whether another rank prints.
        streams: The streams for results and messages.
        everything: Whether to print all disagreements, and the traceback of the user's code.
    """
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        streams.silence()  # the reader has closed the pipe: no message
        return 0
    if isinstance(error, click.ClickException):
        if not signals.silent:
            error.show(streams.err)
        return error.exit_code
    code = 1
    if isinstance(error, SwaAvgError):
        code = 2 if isinstance(error, SelectionError) else 1
        lines = _of_swa_avg(error, everything=everything)
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        code, lines = 130, ["interrupted"]
    elif isinstance(error, OSError | MemoryError):
        lines = [f"error: {str(error) or type(error).__name__}."]
    elif streams.watch:
        lines = _of_users_code(error, everything=everything)
    else:  # none of the user's code has run
        raise error
    for line in () if signals.silent else lines:
        click.echo(printable(line + signals.after), file=streams.err, err=True)
    return code


def _of_swa_avg(error: SwaAvgError, *, everything: bool) -> list[str]:
    """Return the lines of an error that swa-avg raised on purpose."""
    disagreements = error.disagreements if isinstance(error, MismatchError) else ()
    frames = error.frames if isinstance(error, DataError) else ()
    if not everything:
        return [f"error: {error.of_command()}"]
    return [*frames, *(f"error: {one.of_command()}" for one in disagreements or [error])]


def _of_users_code(error: BaseException, *, everything: bool) -> list[str]:
    """Return the lines of an exception that the user's code raised outside `users_code`.

    An exception that this package raised is raised again.
    """
    from swa_avg.batchnorm import error_line, frames_of, is_foreign

    if not is_foreign(error):
        raise error
    return [*(frames_of(error) if everything else ()), f"error: {error_line(error)}."]
