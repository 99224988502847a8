"""Failures: an exception is printed as one line and becomes an exit code."""

from __future__ import annotations

import click

from swa_avg.cli.streams import Streams
from swa_avg.errors import DataError, MismatchError, SelectionError, SwaAvgError, printable
from swa_avg.signals import Signals


def reported(error: BaseException, signals: Signals, streams: Streams, *, everything: bool) -> int:
    """Print an error, unless another rank does, and return the exit code.

    An exception that points to a bug in swa-avg is raised again.
    """
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        streams.silence()  # the reader has closed the pipe: no message
        return 0
    code, lines = 1, [f"error: {str(error) or type(error).__name__}."]
    if isinstance(error, SwaAvgError):
        code = 2 if isinstance(error, SelectionError) else 1
        all_of_it = error.disagreements if isinstance(error, MismatchError) else ()
        shown = all_of_it if everything and all_of_it else [error]
        lines = [f"error: {one.of_command()}" for one in shown]
        frames = error.frames if isinstance(error, DataError) and everything else ()
        lines = [*frames, *lines]
    elif isinstance(error, click.ClickException):
        code, lines = error.exit_code, []
        if not signals.silent:
            error.show(streams.err)
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        code, lines = 130, ["interrupted"]
    elif not isinstance(error, OSError | MemoryError):
        if not streams.watch:  # none of the user's code has run
            raise error
        lines = _of_users_code(error, everything)
    for line in () if signals.silent else lines:
        click.echo(printable(line + signals.after), file=streams.err, err=True)
    return code


def _of_users_code(error: BaseException, everything: bool) -> list[str]:
    """Return the lines of an exception that the user's code raised outside `users_code`.

    An exception that this package raised is raised again.
    """
    from swa_avg.batchnorm import error_line, frames_of, is_foreign

    if not is_foreign(error):
        raise error
    return [*(frames_of(error) if everything else ()), f"error: {error_line(error)}."]
