"""The `swa-avg` command: calls the library, prints the results, returns the exit code.

Heavy modules are imported where they are used, so that `--help` is fast.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli import messages, ranks
from swa_avg.cli.beside import opened_beside
from swa_avg.cli.blas import one_blas_thread
from swa_avg.cli.failures import reported
from swa_avg.cli.options import (
    GroupedCommand,
    Run,
    Search,
    declared,
    run_of,
)
from swa_avg.cli.progress import watching
from swa_avg.cli.show import (
    current_streams,
    print_json,
    printing,
    say,
    say_picture,
    show_average,
    show_plan,
    show_recomputed,
    show_search,
    tensors_of,
)
from swa_avg.cli.streams import Streams
from swa_avg.cli.torch_import import import_torch
from swa_avg.cli.usage import check_usage
from swa_avg.errors import AlreadyAveragedError, SelectionError
from swa_avg.progress import Counter, Watch
from swa_avg.signals import Signals

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Report, torchrun
    from swa_avg.batchnorm import Copy, Session
    from swa_avg.storage import Output, OutputFile

# Set by the shell when it completes a command line, and by the user to get the script.
_COMPLETION = "_SWA_AVG_COMPLETE"


@click.command(
    cls=GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@declared
@click.pass_context
def command(ctx: click.Context, /, **options: Any) -> None:
    """Average the checkpoints of a finished training run into one.

    CHECKPOINTS are files (.pt, .pth, .ckpt, .bin, .safetensors), folders, patterns or URLs.
    Every weight becomes its exact mean over the checkpoints, rounded once. No code in a
    checkpoint is executed, and no input is changed. --recompute-bn computes the BatchNorm
    statistics of the average, or without CHECKPOINTS those of an existing output.

    \b
    Examples:
      swa-avg ckpts/epoch_*.pt -o swa.pt
      swa-avg --recompute-bn --data mod:loader
      swa-avg ckpts/*.ckpt -o swa.safetensors --recompute-bn --data mod:loader
      swa-avg ckpts/ --best 5 --metric val_loss
      swa-avg ckpts/*.ckpt --dry-run -v
    """  # noqa: D301 - \b stops click from wrapping the next paragraph
    check_usage(ctx)
    if options["show"]:
        if ranks.is_first():
            _show(options["show"], as_json=options["as_json"])
        return
    run = run_of(options)
    if run.plot:
        _check_plot(run.plot)
    if run.each:
        from swa_avg.cli.along import average_each

        average_each(run)
        return
    if run.dry_run:
        if ranks.is_first():
            with _planned(run) as averaging:
                show_plan(averaging, run)
        return
    with _joined() as joined:
        if run.search:
            _search(run, run.search)
        elif run.recompute is None:
            _average(run, joined)
        elif run.checkpoints or run.options.start_from:
            _recompute_average(run, run.recompute, joined)
        else:
            _recompute_in_place(run, run.recompute, joined)


def _check_plot(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before any work."""
    from swa_avg.averaging import pictures

    pictures.check_plot(path)


@contextmanager
def _joined() -> Iterator[torchrun.ProcessRanks | None]:
    """Join the other ranks, if torchrun has started several; only rank 0 prints."""
    if not ranks.are_several():
        yield None
        return
    import_torch()
    from swa_avg.averaging import torchrun

    with torchrun.ranks() as joined:
        try:
            yield joined
        except (Exception, KeyboardInterrupt) as error:
            # Report to the other ranks first: torchrun ends them as soon as this one ends.
            joined.fail(error)
            ctx = click.get_current_context()
            if ctx.obj.received:
                raise
            code = reported(error, ctx.obj, current_streams(), everything=ctx.params["verbose"])
            raise click.exceptions.Exit(code) from error


@contextmanager
def _planned(run: Run) -> Iterator[Averaging]:
    """Open the checkpoints and plan their average."""
    from swa_avg.averaging import planned

    force = run.options.force or run.dry_run
    options = replace(run.options, force=force, by_sample=run.dry_run, of_command=True)
    output = click.get_current_context().params["output"]  # `run.output` drops a final slash
    with ExitStack() as opened:
        with _watching(run) as watch:
            plan = planned(run.checkpoints, output, options, progress=watch)
            try:
                averaging = opened.enter_context(plan)
            except AlreadyAveragedError as error:
                if run.recompute is None:
                    raise
                raise _in_place(error) from error
        yield averaging


def _in_place(error: AlreadyAveragedError) -> SelectionError:
    """Return the error for an average that was given as a checkpoint, to recompute BatchNorm."""
    path = quote(str(error.file))
    return SelectionError(
        error.texts.found,
        file=error.file,
        remedy=f"To recompute its BatchNorm statistics in place, give no checkpoints and -o {path}",
    )


def _watching(run: Run) -> AbstractContextManager[Watch | None]:
    """Show the progress of a step, unless another rank shows it."""
    return watching(run.quiet or not ranks.is_first(), current_streams().err)


def _average(run: Run, joined: torchrun.ProcessRanks | None) -> None:
    """Average checkpoints without recomputing BatchNorm."""
    with _planned(run) as averaging, opened_beside(run, averaging) as beside:
        with (
            one_blas_thread(),
            _watching(run) as watch,
            _written(averaging, run, joined, watch) as written,
        ):
            if written:
                file, report = written
                picture = _drawn(report, run)
                report = replace(report, notes=(*report.notes, *_commit(file, watch)))
            if joined:
                joined.meet()
        if not written:
            return
        beside.write_picture(picture)
        content: dict[str, object] = {}
        if run.as_json or run.report is not None:
            content = report.to_dict() | tensors_of(averaging, run)
            beside.write_report(content)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        show_average(report, averaging, run)
        say([messages.of_output(report.output, report.bytes_written)])
        say_picture(picture, run)


@contextmanager
def _written(
    averaging: Averaging, run: Run, joined: torchrun.ProcessRanks | None, watch: Watch | None
) -> Iterator[tuple[OutputFile, Report] | None]:
    """Average into a file or folder, which becomes the output when it is committed.

    Yields:
        The file and the report; None on every rank but the first.
    """
    threads = run.threads
    with ExitStack() as entered:
        if joined:
            from swa_avg.averaging import joint

            together = joint.written(averaging, joined, threads=threads, progress=watch)
            yield entered.enter_context(together)
        else:
            file = averaging.open_output()
            entered.enter_context(file)
            yield file, averaging.write_to(file, threads=threads, progress=watch)


def _recompute_average(
    run: Run, bn_options: dict[str, Any], joined: torchrun.ProcessRanks | None
) -> None:
    """Average checkpoints, and recompute BatchNorm in the average."""
    with ExitStack() as entered:
        # Plan first: errors in the headers are found before the user's code runs.
        averaging = entered.enter_context(_planned(run))
        beside = entered.enter_context(opened_beside(run, averaging))
        entered.enter_context(_separate_output(run))
        with _watching(run) as watch:
            bn = entered.enter_context(_session(bn_options, joined, watch))
            written = entered.enter_context(_written(averaging, run, joined, watch))
            if not written:
                bn.follow()
                return
            file, report = written
            batchnorm, notes = bn.recompute(file, *averaging.found_at, watch)
            picture = _drawn(report, run)
            notes = (*notes, *_commit(file, watch))
        report = report.recomputed(batchnorm, notes)
        content = report.to_dict() | tensors_of(averaging, run)
        beside.write_picture(picture)
        beside.write_report(content)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        show_average(report, averaging, run)
        show_recomputed(batchnorm, notes, file.size, run)
        say_picture(picture, run)


def _recompute_in_place(
    run: Run, bn_options: dict[str, Any], joined: torchrun.ProcessRanks | None
) -> None:
    """Recompute BatchNorm in an existing output."""
    with ExitStack() as entered:
        beside = entered.enter_context(opened_beside(run, None))
        copy = _copy(run, entered) if ranks.is_first() else None
        entered.enter_context(_separate_output(run))
        with _watching(run) as watch:
            bn = entered.enter_context(_session(bn_options, joined, watch))
            if not copy:
                bn.follow()
                return
            batchnorm, notes = bn.recompute(copy.file, copy.key, copy.ema, watch)
            notes = (*notes, *_commit(copy.file, watch))
        content = {"output": str(run.output), "stale": bool(batchnorm.unreached)}
        content |= {"batchnorm": batchnorm.to_dict(), "batchnorm_notes": list(notes)}
        beside.write_report(content)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        show_recomputed(batchnorm, notes, copy.file.size, run)


def _copy(run: Run, entered: ExitStack) -> Copy:
    """Copy an existing output; one that may not be replaced is refused."""
    import_torch()
    from swa_avg.batchnorm import copy_of

    key, ema, force = run.options.key, run.options.ema, run.options.force
    with _watching(run) as watch:
        return entered.enter_context(copy_of(run.output, key, ema=ema, force=force, progress=watch))


def _session(
    bn_options: dict[str, Any], joined: torchrun.ProcessRanks | None, watch: Watch | None
) -> AbstractContextManager[Session]:
    """Load the user's batches and model."""
    Counter(watch, f"loading {bn_options['data']}")
    import_torch()
    from swa_avg.batchnorm import Recompute, session

    return session(Recompute(**bn_options), joined)


def _search(run: Run, wanted: Search) -> None:
    """Find the best average and write it."""
    with ExitStack() as entered:
        # Plan first: errors in the headers are found before torch is imported.
        averaging = entered.enter_context(_planned(run))
        if averaging.is_folder:
            raise click.UsageError(f"{wanted.option} cannot write a folder: name a file with -o.")
        beside = entered.enter_context(opened_beside(run, averaging))
        import_torch()
        from swa_avg.batchnorm import Recompute
        from swa_avg.search import candidates, judged, plot, sweeping

        bn = Recompute(**run.recompute) if run.recompute is not None else None
        entered.enter_context(_separate_output(run))
        search = sweeping.greedy_soup if wanted.greedy else sweeping.swept
        with _watching(run) as watch:
            Counter(watch, f"loading {wanted.evaluate}")
            judge = entered.enter_context(judged(wanted.evaluate, bn, **wanted.score_options))
            bench = candidates.Bench(*judge, watch)
            best = entered.enter_context(search(averaging, bench, run.threads))
            picture = plot.drawn(best.report, run.plot.suffix.lower()) if run.plot else b""
            best = replace(best, report=best.report.noting(_commit(best.file, watch)))
        beside.write_picture(picture)
        content = best.report.to_dict() | tensors_of(best.averaging, run)
        beside.write_report(content)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        show_search(best, run)
        say_picture(picture, run)


def _drawn(report: Report | None, run: Run) -> bytes:
    """Return the picture of the distances, if it is wanted."""
    if not (run.plot and report and report.distances):
        return b""
    from swa_avg.averaging import pictures

    return pictures.of_distances(report, report.distances, run.plot.suffix.lower())


def _commit(file: Output, watch: Watch | None) -> tuple[str, ...]:
    """Commit the output; messages of later failures add that it is written."""
    signals: Signals = click.get_current_context().obj
    signals.check()
    notes = file.commit(watch)
    signals.after = f" {click.get_current_context().params['output']} is written."
    return notes


def _show(path: str, *, as_json: bool) -> None:
    """Print how an average was made."""
    from swa_avg.checkpoints import made_from

    provenance = made_from(path)
    if as_json:
        print_json(provenance.to_dict())
    else:
        say(messages.of_provenance(path, provenance))


def _separate_output(run: Run) -> AbstractContextManager[None]:
    """Send the output of the user's code to stderr, away from the results on stdout."""
    return current_streams().separated(silent=run.quiet)


def run(signals: Signals) -> int:
    """Run the command and turn exceptions into exit codes."""
    # torch warns on import if it cannot use numpy, which does not matter here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    signals.silent = not ranks.is_first()
    if shell := os.environ.get(_COMPLETION):
        from click.shell_completion import shell_complete

        return shell_complete(command, {}, "swa-avg", _COMPLETION, shell)
    streams = Streams()
    ctx: click.Context | None = None
    try:
        # Not `command.main`, which exits by itself on a broken pipe.
        with command.make_context("swa-avg", sys.argv[1:], obj=signals) as ctx:
            ctx.meta[Streams.__name__] = streams
            command.invoke(ctx)
            with printing():
                if (out := streams.out or sys.stdout) is not None:
                    out.flush()
        if streams.watch:
            report = partial(reported, signals=signals, streams=streams, everything=False)
            streams.watch.begin(report)
        return 0
    except BaseException as error:
        if signals.received:  # the error follows from the signal
            raise
        return reported(error, signals, streams, everything=bool(ctx and ctx.params["verbose"]))
