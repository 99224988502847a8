"""The command line: parse, call, print, exit codes. The only module that prints.

Imports nothing heavy before it must, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from swa_avg.cli import messages
from swa_avg.cli.beside import Beside, opened_beside
from swa_avg.cli.options import (
    GroupedCommand,
    Run,
    Search,
    check_usage,
    declared,
    run_of,
)
from swa_avg.cli.progress import advance, bar, move
from swa_avg.cli.show import (
    current_streams,
    json_text,
    note,
    note_stale,
    print_json,
    printing,
    say,
    show_average,
    show_plan,
    show_search,
    tensors_of,
)
from swa_avg.cli.streams import Streams
from swa_avg.errors import (
    DataError,
    MismatchError,
    SelectionError,
    SwaAvgError,
    printable,
)
from swa_avg.signals import Signals

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging, Report, torchrun
    from swa_avg.storage import Output


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
                show_plan(averaging, run)
        return
    with _joined() as ranks:
        if run.search:
            _search(run, run.search)
        elif run.recompute is not None:
            _recompute(run, run.recompute, ranks)
        else:
            _average(run, ranks)


@contextmanager
def _joined() -> Iterator[torchrun.ProcessRanks | None]:
    """Join the other ranks, if torchrun has started several; the first of them speaks for all."""
    world = os.environ.get("WORLD_SIZE", "")
    if not (world.isdecimal() and int(world) > 1):
        yield None
        return
    from swa_avg.averaging import torchrun

    with torchrun.ranks() as joined:
        try:
            yield joined
        except (Exception, KeyboardInterrupt) as error:
            # Told before anybody ends: torchrun then ends the others, which would tell nothing.
            joined.fail(error)
            ctx = click.get_current_context()
            if ctx.obj.received:
                raise
            code = _told(error, ctx.obj, current_streams(), everything=ctx.params["verbose"])
            raise click.exceptions.Exit(code) from error


def _planned(run: Run) -> AbstractContextManager[Averaging]:
    """Open the checkpoints and plan their average."""
    from swa_avg.averaging import planned

    force = run.options.force or run.dry_run
    options = replace(run.options, force=force, by_sample=run.dry_run)
    output = click.get_current_context().params["output"]  # a slash at its end is a folder's
    return planned(run.checkpoints, output, options)


def _average(run: Run, ranks: torchrun.ProcessRanks | None) -> None:
    """Average checkpoints, and nothing else."""
    with _planned(run) as averaging, opened_beside(run, averaging, leads=_leads()) as beside:
        with _one_blas_thread(), _written(averaging, run, ranks) as made:
            if made:
                file, report = made
                report = replace(report, notes=(*report.notes, *_commit(file)))
            if ranks:
                ranks.meet()
        if not made:
            return
        content: dict[str, object] = {}
        if run.as_json or run.report is not None:
            content = report.to_dict() | tensors_of(averaging, run)
            _write_report(content, run, beside)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        show_average(report, averaging, run)
        if report.stale:
            note_stale()
        say([messages.of_output(report.output, report.bytes_written)])


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Have numpy, where it is imported now, start no threads for matrices that we do not have.

    Only where none of the user's code runs in this process, and where the user has not said.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


@contextmanager
def _written(
    averaging: Averaging, run: Run, ranks: torchrun.ProcessRanks | None
) -> Iterator[tuple[Any, Report] | None]:
    """Average into a file or folder; it becomes the output when it is committed.

    Of several ranks only the first one is given it.
    """
    quiet = run.quiet or not _leads()
    size = averaging.plan.bytes_to_read // (ranks.world if ranks else 1)
    with ExitStack() as entered:
        with bar(size, quiet, "B", "averaging", current_streams().err) as shown:
            how = {"threads": run.threads, "progress": shown and shown.update}
            if ranks:
                from swa_avg.averaging import joint

                made = entered.enter_context(joint.written(averaging, ranks, **how))
            else:
                file: Any = entered.enter_context(averaging.open_output())
                made = file, averaging.write(file, **how)
        yield made


def _recompute(run: Run, bn_options: dict[str, Any], ranks: torchrun.ProcessRanks | None) -> None:
    """Recompute BatchNorm: of the average of checkpoints, or of the output that is there."""
    averages = run.checkpoints or run.options.start_from
    with ExitStack() as entered:
        # Planned first: what the headers tell needs none of the user's code.
        averaging = entered.enter_context(_planned(run)) if averages else None
        beside = entered.enter_context(opened_beside(run, averaging, leads=_leads()))
        from swa_avg.batchnorm import Recompute, copy_of, session

        report, key, ema = None, run.options.key, run.options.ema
        if not averages and _leads():
            # Before any of the user's code: what may not be replaced is refused at once.
            there = copy_of(run.output, key, ema=ema, force=run.options.force)
            copy = entered.enter_context(there)
            file, key, ema = copy.file, copy.key, copy.ema
        entered.enter_context(_apart(run))
        bn = entered.enter_context(session(Recompute(**bn_options), ranks))
        written = averaging and entered.enter_context(_written(averaging, run, ranks))
        if not bn.leads:
            bn.follow()
            return
        if written:
            file, report = written
            if not run.options.keep_wrapper:
                key, ema = (), None  # our own output holds nothing but the state_dict
        with bar(
            bn.batches, run.quiet, "batch", "recomputing BatchNorm", current_streams().err
        ) as shown:
            progress = shown and partial(advance, shown)
            batchnorm, notes = bn.recompute(file, key, ema=ema, progress=progress)
        size = file.size
        notes = (*notes, *_commit(file))
        averaged = report.to_dict() if report else {"output": str(run.output)}
        made = {"stale": bool(batchnorm.unreached), "batchnorm": batchnorm.to_json()}
        tensors = tensors_of(averaging, run) if averaging else {}
        content = averaged | made | {"batchnorm_notes": list(notes)} | tensors
        _write_report(content, run, beside)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        if report and averaging:
            show_average(report, averaging, run)
        say(messages.of_recompute(batchnorm, layers=run.verbose))
        note(notes)
        say([messages.of_output(str(run.output), size)])


def _search(run: Run, wanted: Search) -> None:
    """Find out which average is best, and write that one."""
    from swa_avg.batchnorm import Recompute
    from swa_avg.search import candidates, judged, plot, sweeping

    suffix = plot.check_plot(wanted.plot) if wanted.plot else ""
    with ExitStack() as entered:
        averaging = entered.enter_context(_planned(run))
        if averaging.is_folder:
            raise click.UsageError(f"{wanted.option} writes a file, no folder: name one with -o.")
        beside = entered.enter_context(opened_beside(run, averaging, leads=_leads()))
        bn = Recompute(**run.recompute) if run.recompute is not None else None
        entered.enter_context(_apart(run))
        judge = entered.enter_context(judged(wanted.evaluate, bn, **wanted.told))
        search = sweeping.greedy if wanted.greedy else sweeping.swept
        steps = 2 * len(averaging.inputs) + (not wanted.greedy)
        with bar(steps, run.quiet, "model", "judging", current_streams().err) as shown:
            bench = candidates.Bench(*judge, shown and partial(move, shown))
            best = entered.enter_context(search(averaging, bench, run.threads))
        picture = plot.drawn(best.report, suffix) if wanted.plot else b""
        best = replace(best, report=best.report.noting(_commit(best.file)))
        if wanted.plot:
            beside.write(wanted.plot, picture)
        content = best.report.to_dict() | tensors_of(best.averaging, run)
        _write_report(content, run, beside)
    if run.as_json:
        print_json(content)
    elif not run.quiet:
        show_search(best, run)
        if wanted.plot:
            say([messages.of_output(str(wanted.plot), len(picture))])


def _write_report(content: object, run: Run, beside: Beside) -> None:
    if run.report is not None:
        beside.write(run.report, f"{json_text(content)}\n".encode())


def _commit(file: Output) -> tuple[str, ...]:
    """Put the output in its place; what goes wrong from then on says that it is there."""
    signals: Signals = click.get_current_context().obj
    signals.check()
    notes = file.commit()
    signals.after = f" {click.get_current_context().params['output']} is written."
    return notes


def _show(path: str, as_json: bool) -> None:
    """Print how an average was made."""
    from swa_avg.checkpoints import made_from

    said = made_from(path)
    if as_json:
        print_json(said.to_dict())
    else:
        say(messages.of_provenance(path, said))


def _leads() -> bool:
    """Tell whether this process is the only one, or the first of those torchrun started."""
    rank, world = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (world.isdecimal() and int(world) > 1 and rank.isdecimal() and int(rank) > 0)


def _apart(run: Run) -> AbstractContextManager[None]:
    """Keep our output apart from that of the user's code, which runs from here on."""
    return current_streams().apart(silent=run.quiet)


def run(signals: Signals) -> int:
    """Run the command and turn whatever it raises into an exit code."""
    # torch says so at its import, and means nothing by it that matters here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    signals.silent = not _leads()
    streams = Streams()
    ctx: click.Context | None = None
    try:
        # Not command.main: it ends the process itself when nobody reads its output.
        with command.make_context("swa-avg", sys.argv[1:], obj=signals) as ctx:
            ctx.meta[Streams.__name__] = streams
            command.invoke(ctx)
            with printing():
                if (out := streams.out or sys.stdout) is not None:
                    out.flush()
        if streams.watch:
            streams.watch.begin(partial(_told, signals=signals, streams=streams, everything=False))
        return 0
    except BaseException as error:
        if signals.received:  # whatever came of it
            raise
        return _told(error, signals, streams, everything=bool(ctx and ctx.params["verbose"]))


def _told(error: BaseException, signals: Signals, streams: Streams, *, everything: bool) -> int:
    """Say what went wrong, unless another rank does; return the exit code.

    What is nobody's mistake but ours is raised again.
    """
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        streams.silence()  # nobody reads it: not worth a message
        return 0
    code, lines = 1, [f"error: {str(error) or type(error).__name__}."]
    if isinstance(error, SwaAvgError):
        code = 2 if isinstance(error, SelectionError) else 1
        all_of_it = error.disagreements if isinstance(error, MismatchError) else ()
        lines = [f"error: {one}" for one in (all_of_it if everything and all_of_it else [error])]
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
    """Return the lines of an exception that the user's code raised where no gate was.

    What this package raised itself is raised again.
    """
    from swa_avg.batchnorm import frames_of, is_foreign, theirs

    if not is_foreign(error):
        raise error
    return [*(frames_of(error) if everything else ()), f"error: {theirs(error)}."]
