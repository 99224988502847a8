"""The command line: parse, call, print, exit codes. The only module that prints.

Imports nothing heavy before it must, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from swa_avg.cli import messages
from swa_avg.cli.options import (
    GroupedCommand,
    Run,
    Search,
    check_beside,
    check_usage,
    declared,
    run_of,
)
from swa_avg.cli.progress import advance, bar, move
from swa_avg.errors import MismatchError, SelectionError, SwaAvgError, printable

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Report
    from swa_avg.ranks import ProcessRanks
    from swa_avg.search import Found


# Where one of these is in use, others than we may have something to do at the end.
_WITH_OTHERS = frozenset({"swa_avg.batchnorm", "swa_avg.ranks"})


@click.command(
    cls=GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@declared
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Average the checkpoints of a finished training run into one.

    Every weight becomes its exact mean over the CHECKPOINTS (.pt, .pth, .ckpt, .bin,
    .safetensors), rounded once. Nothing in them is executed; they are never changed.
    With --recompute-bn the average gets the BatchNorm statistics that belong to it; without
    CHECKPOINTS it gives them to the output that is there already.

    \b
    Examples:
      swa-avg ckpts/epoch_*.pt -o swa.pt
      swa-avg --recompute-bn --data mod:loader
      swa-avg ckpts/*.ckpt -o swa.safetensors --recompute-bn --data mod:loader
      swa-avg ckpts/ --best 5 --metric val_loss
      swa-avg ckpts/*.ckpt --dry-run -v
    """  # noqa: D301 - \b is click's mark: do not wrap the next paragraph
    check_usage(ctx)
    if options["show"]:
        _show(options["show"], as_json=options["as_json"])
        return
    run = run_of(options)
    if run.dry_run:
        if _leads():
            with _planned(run) as averaging:
                _show_plan(averaging, run)
        return
    with _joined() as ranks:
        if run.search:
            _search(run, run.search)
        elif run.recompute is not None:
            _recompute(run, run.recompute, ranks)
        else:
            _average(run, ranks)


@contextmanager
def _joined() -> Iterator[ProcessRanks | None]:
    """Join the other ranks, if torchrun has started several; the first of them speaks for all."""
    world = os.environ.get("WORLD_SIZE", "")
    if not (world.isdecimal() and int(world) > 1):
        yield None
        return
    from swa_avg.ranks import ranks

    with ranks() as joined:
        try:
            yield joined
        except (Exception, KeyboardInterrupt) as error:
            # Told before anybody ends: torchrun then ends the others, which would tell nothing.
            joined.fail(error)
            verbose = click.get_current_context().params["verbose"]
            code = _told(error, everything=verbose, silent=joined.rank > 0)
            raise click.exceptions.Exit(code) from error


def _planned(run: Run) -> AbstractContextManager[Averaging]:
    """Open the checkpoints and plan their average."""
    from swa_avg.averaging import planned

    force = run.options.force or run.dry_run
    options = replace(run.options, force=force, by_sample=run.dry_run)
    return planned(run.checkpoints, run.output, options)


def _average(run: Run, ranks: ProcessRanks | None) -> None:
    """Average checkpoints, and nothing else."""
    with _planned(run) as averaging:
        if _leads():
            check_beside(run, averaging)
        with _written(averaging, run, ranks) as made:
            if made:
                file, report = made
                file.commit()
            if ranks:
                ranks.meet()
        if not made:
            return
    content = report.to_dict() | _tensors(averaging, run)
    _write_report(content, run)
    if run.as_json:
        click.echo(_json(content))
    elif not run.quiet:
        _show_average(report, averaging, run)
        if report.stale:
            _note_stale()
        _say([messages.of_output(report.output, report.bytes_written)])


@contextmanager
def _written(
    averaging: Averaging, run: Run, ranks: ProcessRanks | None
) -> Iterator[tuple[Any, Report] | None]:
    """Average into a file or folder; it becomes the output when it is committed.

    Of several ranks only the first one is given it.
    """
    quiet = run.quiet or not _leads()
    size = averaging.plan.bytes_to_read // (ranks.world if ranks else 1)
    with ExitStack() as entered:
        with bar(size, quiet, unit="B", desc="averaging") as shown:
            how = {"threads": run.threads, "progress": shown and shown.update}
            if ranks:
                from swa_avg.averaging import joint

                made = entered.enter_context(joint.written(averaging, ranks, **how))
            else:
                file: Any = entered.enter_context(averaging.open_output())
                made = file, averaging.write(file, **how)
        yield made


def _recompute(run: Run, bn_options: dict[str, Any], ranks: ProcessRanks | None) -> None:
    """Recompute BatchNorm: of the average of checkpoints, or of the output that is there."""
    averages = run.checkpoints or run.options.start_from
    with ExitStack() as entered:
        # Planned first: what the headers tell needs none of the user's code.
        averaging = entered.enter_context(_planned(run)) if averages else None
        if averaging and averaging.is_folder:
            raise click.UsageError("--recompute-bn writes a file, not a folder: name one with -o.")
        if _leads():
            check_beside(run, averaging)
        from swa_avg.batchnorm import Recompute, copy_of, session
        from swa_avg.storage import path_of

        bn = entered.enter_context(session(Recompute(**bn_options), ranks))
        written = averaging and entered.enter_context(_written(averaging, run, ranks))
        if not bn.leads:
            bn.follow()
            return
        report, key, ema = None, run.options.key, run.options.ema
        if written:
            file, report = written
            if not run.options.keep_wrapper:
                key, ema = (), False  # our own output holds nothing but the state_dict
        else:
            file = entered.enter_context(copy_of(path_of(run.output), key))
        with bar(bn.batches, run.quiet, unit="batch", desc="recomputing BatchNorm") as shown:
            progress = shown and partial(advance, shown)
            batchnorm, notes = bn.recompute(file, key, ema=ema, progress=progress)
        file.commit()
    averaged = report.to_dict() if report else {"output": run.output}
    made = {"stale": bool(batchnorm.unreached), "batchnorm": batchnorm.to_json()}
    tensors = _tensors(averaging, run) if averaging else {}
    content = averaged | made | {"batchnorm_notes": list(notes)} | tensors
    _write_report(content, run)
    if run.as_json:
        click.echo(_json(content))
    elif not run.quiet:
        if report and averaging:
            _show_average(report, averaging, run)
        _say(messages.of_recompute(batchnorm, layers=run.verbose))
        _note(notes)
        _say([messages.of_output(run.output, path_of(run.output).stat().st_size)])


def _search(run: Run, wanted: Search) -> None:
    """Find out which average is best, and write that one."""
    from swa_avg.batchnorm import Recompute
    from swa_avg.search import candidates, judged, plot, sweeping

    suffix = plot.check_plot(Path(wanted.plot)) if wanted.plot else ""
    with ExitStack() as entered:
        averaging = entered.enter_context(_planned(run))
        if averaging.is_folder:
            raise click.UsageError(f"{wanted.option} writes a file, no folder: name one with -o.")
        check_beside(run, averaging)
        bn = Recompute(**run.recompute) if run.recompute is not None else None
        judge = entered.enter_context(judged(wanted.evaluate, bn, **wanted.told))
        search = sweeping.greedy if wanted.greedy else sweeping.swept
        steps = 2 * len(averaging.inputs) + (not wanted.greedy)
        with bar(steps, run.quiet, unit="model", desc="judging") as shown:
            bench = candidates.Bench(*judge, shown and partial(move, shown))
            best = entered.enter_context(search(averaging, bench, run.threads))
        picture = plot.drawn(best.report, suffix) if wanted.plot else b""
        best.file.commit()
    if wanted.plot:
        _write(wanted.plot, picture)
    content = best.report.to_dict() | _tensors(best.averaging, run)
    _write_report(content, run)
    if run.as_json:
        click.echo(_json(content))
    elif not run.quiet:
        _show_search(best, run)
        if wanted.plot:
            _say([messages.of_output(wanted.plot, len(picture))])


def _tensors(averaging: Averaging, run: Run) -> dict[str, object]:
    return {"tensors": averaging.to_dict()["tensors"]} if run.verbose else {}


def _write_report(content: object, run: Run) -> None:
    if run.report is not None:
        _write(run.report, f"{_json(content)}\n".encode())


def _write(path: str, data: bytes) -> None:
    from swa_avg.storage import AtomicFile

    with AtomicFile(Path(path), len(data)) as file:
        file.write(data, 0)
        file.commit()


def _show(path: str, as_json: bool) -> None:
    """Print how an average was made."""
    from swa_avg.checkpoints import made_from

    said = made_from(path)
    if as_json:
        click.echo(_json(said.to_dict()))
    else:
        _say(messages.of_provenance(path, said))


def _leads() -> bool:
    """Tell whether this process is the only one, or the first of those torchrun started."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (world.isdecimal() and int(world) > 1 and rank.isdecimal() and int(rank) > 0)


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(printable(line))


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        click.echo(printable(f"note: {note}"), err=True)


def _note_stale() -> None:
    _note(["BatchNorm statistics do not fit the average; --recompute-bn makes them fit"])


def _show_plan(averaging: Averaging, run: Run) -> None:
    """Print what would be done."""
    if run.as_json:
        searched = {"search": run.search.evaluate if run.search else None}
        planned = averaging.to_dict() | {"recompute_bn": run.recompute is not None} | searched
        click.echo(_json(planned))
        return
    if run.quiet:
        return
    _say(messages.of_plan(averaging, tensors=run.verbose or len(averaging.inputs) == 1))
    if run.recompute is not None:
        _say([f"would recompute BatchNorm over {run.recompute['data']}"])
    if run.search:
        _say(messages.of_search_plan(averaging, run.search.evaluate, run.search.greedy))
    _note(averaging.notes)


def _show_search(best: Found, run: Run) -> None:
    """Print which averages were tried, and what became the output."""
    report = best.report
    _say(messages.of_search(report))
    _show_average(report.average, best.averaging, run)
    if report.batchnorm:
        _say(messages.of_recompute(report.batchnorm, layers=run.verbose))
        _note(report.notes)
    elif report.average.stale:
        _note_stale()
    _say([messages.of_output(report.average.output, report.average.bytes_written)])


def _show_average(report: Report, averaging: Averaging, run: Run) -> None:
    """Print what was averaged."""
    if run.verbose:
        _say(messages.of_tensors(averaging))
    _say(messages.of_average(report))
    if report.distances:
        _say(messages.of_distances(report, report.distances, modules=run.verbose))
    if averaging.options.verify:
        _say(["verified: all of it read again, and a sample averaged anew"])
    _note(report.notes)


def _json(content: object) -> str:
    import json

    return json.dumps(content, indent=2)


@dataclass
class _Signals:
    """What ends the command from outside.

    Attributes:
        received: The number of the signal that came, 0 if none did.
    """

    received: int = 0

    def heed(self) -> None:
        """Unwind as for an error when one comes, so that no temporary file remains."""
        for name in ("SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._end)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        raise SystemExit(128 + number)


def main() -> None:
    """Run the command; the entry point of `swa-avg`."""
    # torch says so at its import, and means nothing by it that matters here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    signals = _Signals()
    signals.heed()
    _leave(_run(signals))


def _leave(code: int) -> NoReturn:
    """End the process; at once if all is done.

    Python takes a quarter of a second to take torch apart, which is longer than it takes to
    average small checkpoints. The user's code, other ranks and threads are given the time.
    """
    alone = _WITH_OTHERS.isdisjoint(sys.modules) and threading.active_count() == 1
    if code == 0 and alone:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # closed, or nobody reads it
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _run(signals: _Signals) -> int:
    """Run the command and turn whatever it raises into an exit code."""
    ctx: click.Context | None = None
    try:
        # Not command.main: it ends the process itself when nobody reads its output.
        with command.make_context("swa-avg", sys.argv[1:]) as ctx:
            command.invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if signals.received:  # Python drops what is raised within a finalizer
            return 128 + signals.received
        return _told(error, everything=bool(ctx and ctx.params["verbose"]))


def _told(error: BaseException, *, everything: bool, silent: bool = False) -> int:
    """Say what went wrong, unless somebody else does; return the exit code.

    What is nobody's mistake but ours is raised again.
    """
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # Nobody reads our output: not worth a message, and none must come at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    code, lines = 1, [f"error: {str(error) or type(error).__name__}."]
    if isinstance(error, SwaAvgError):
        code = 2 if isinstance(error, SelectionError) else 1
        all_of_it = error.disagreements if isinstance(error, MismatchError) else ()
        lines = [f"error: {one}" for one in (all_of_it if everything and all_of_it else [error])]
    elif isinstance(error, click.ClickException):
        code, lines = error.exit_code, []
        if not silent:
            error.show()
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        code, lines = 130, ["interrupted"]
    elif not isinstance(error, OSError | MemoryError):
        raise error
    for line in () if silent else lines:
        click.echo(printable(line), err=True)
    return code
