"""Printing: results on stdout, notes on stderr, or one JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from swa_avg.cli import messages
from swa_avg.cli.options import Run
from swa_avg.cli.streams import Streams
from swa_avg.errors import OutputError, printable

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Report
    from swa_avg.batchnorm import BatchNormReport
    from swa_avg.search import Found


def current_streams() -> Streams:
    """Return the streams for results and messages."""
    streams: Streams = click.get_current_context().meta[Streams.__name__]
    return streams


def say(lines: Iterable[str]) -> None:
    """Print lines of results."""
    with printing():
        for line in lines:
            click.echo(printable(line), file=current_streams().out)


def print_json(content: object) -> None:
    """Print the one JSON document of a run."""
    with printing():
        click.echo(json_text(content), file=current_streams().out)


@contextmanager
def printing() -> Iterator[None]:
    """Turn a failed write to stdout into an `OutputError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        current_streams().silence()
        raise OutputError(
            f"cannot be written: {error.strerror or error}", file="standard output"
        ) from error


def note(notes: Iterable[str]) -> None:
    """Print notes on stderr."""
    for text in notes:
        click.echo(printable(f"note: {text}"), file=current_streams().err, err=True)


def tensors_of(averaging: Averaging, run: Run) -> dict[str, object]:
    """Return the treatment of each tensor for the JSON document; empty without `-v`."""
    return {"tensors": averaging.to_dict()["tensors"]} if run.verbose else {}


def show_plan(averaging: Averaging, run: Run) -> None:
    """Print the plan of a dry run."""
    if run.as_json:
        searched = {"search": run.search.evaluate if run.search else None}
        planned = averaging.to_dict() | {"recompute_bn": run.recompute is not None} | searched
        print_json(planned)
        return
    if run.quiet:
        return
    say(messages.of_plan(averaging, tensors=run.verbose or len(averaging.inputs) == 1))
    if run.recompute is not None:
        say([f"would recompute BatchNorm over {run.recompute['data']}"])
    if run.search:
        say(messages.of_search_plan(averaging, run.search.evaluate, run.search.greedy))
    note(averaging.notes)


def show_search(best: Found, run: Run) -> None:
    """Print the scores of a search and the average that became the output."""
    report = best.report
    say(messages.of_search(report))
    show_average(report.average, best.averaging, run)
    if report.batchnorm:
        say(messages.of_recompute(report.batchnorm, layers=run.verbose))
        note(report.average.batchnorm_notes)
    say([messages.of_output(report.output, report.average.bytes_written)])


def say_picture(picture: bytes, run: Run) -> None:
    """Print that a picture was written, if one was."""
    if picture:
        say([messages.of_output(str(run.plot), len(picture))])


def show_average(report: Report, averaging: Averaging, run: Run) -> None:
    """Print the result of averaging."""
    if run.verbose:
        say(messages.of_tensors(averaging))
    say(messages.of_average(report))
    if report.distances:
        say(messages.of_distances(report, report.distances, modules=run.verbose))
    if averaging.options.verify:
        say(["verified: the output was read again and a sample of it recomputed"])
    note(report.notes)


def show_recomputed(batchnorm: BatchNormReport, notes: Iterable[str], size: int, run: Run) -> None:
    """Print the result of recomputing BatchNorm statistics, and the output with its size."""
    say(messages.of_recompute(batchnorm, layers=run.verbose))
    note(notes)
    say([messages.of_output(str(run.output), size)])


def json_text(content: object) -> str:
    """Return the text of a JSON document."""
    import json

    return json.dumps(content, indent=2)
