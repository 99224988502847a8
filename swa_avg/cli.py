"""The command line: parse, call, print, exit codes. The only module that prints.

Imports nothing heavy before it must, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

import swa_avg
from swa_avg import messages
from swa_avg.bars import advance, bar, move
from swa_avg.errors import MismatchError, SelectionError, SwaAvgError, printable
from swa_avg.options import GroupedCommand, Run, Search, check_beside, check_usage, run_of, size

if TYPE_CHECKING:
    from swa_avg.averaging import Averaging
    from swa_avg.report import Report
    from swa_avg.trials import Found


@click.command(
    cls=GroupedCommand,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.argument("checkpoints", nargs=-1)
@click.option("--last", type=int, metavar="N", help="Take only the N latest.")
@click.option("--epochs", metavar="A:B[:STEP]", help="Take epochs (or steps) A to B, B included.")
@click.option("--best", type=int, metavar="N", help="Take only the N best by --metric.")
@click.option("--metric", metavar="NAME", help="As the checkpoints or files beside them record it.")
@click.option("--mode", type=click.Choice(["min", "max"]), help="What is good, if NAME hides it.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Leave out these paths or names.")
@click.option("--key", metavar="PATH", multiple=True, help="Where the state_dict is (a.b.c).")
@click.option("--ema", is_flag=True, help="Take the EMA or SWA weights that the run kept.")
@click.option(
    "--bn-buffers",
    type=click.Choice(["last", "first", "mean", "reset"]),
    default="last",
    metavar="WHICH",
    help="BatchNorm statistics: last, first, mean or reset.  [default: last]",
)
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    metavar="NAME",
    help="Write as keep, float32, bfloat16 or float16.  [default: keep]",
)
@click.option("--start-from", metavar="AVERAGE", multiple=True, help="Go on from this average.")
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    default="swa.pt",
    help="The file to write; *.safetensors is one.  [default: swa.pt]",
)
@click.option("-f", "--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--keep-wrapper", is_flag=True, help="Keep the last file; replace only its weights.")
@click.option(
    "--max-shard-size", callback=size, metavar="SIZE", help="Of a folder.  [default: 5GB]"
)
@click.option("--recompute-bn", is_flag=True, help="Recompute BatchNorm statistics over --data.")
@click.option("--data", metavar="MOD:ATTR", help="Batches: a loader, or what gives one.")
@click.option("--model", metavar="MOD:ATTR", help="The network.  [default: model of --data's MOD]")
@click.option("--forward", metavar="MOD:ATTR", help="forward(model, batch), if batch[0] is not it.")
@click.option("--device", metavar="NAME", help="auto, cpu, cuda[:i] or mps.  [default: auto]")
@click.option(
    "--bn-estimator",
    "estimator",
    type=click.Choice(["population", "torch"]),
    metavar="NAME",
    help="population, or torch: as update_bn.  [default: population]",
)
@click.option(
    "--bn-batches", "batches", type=click.IntRange(1), metavar="N", help="Use only so many batches."
)
@click.option(
    "--amp",
    type=click.Choice(["off", "bf16", "fp16"]),
    help="Autocast the forward.  [default: off]",
)
@click.option("--sweep", metavar="MOD:ATTR", help="Average the last 1, 2, 3, …; keep the best.")
@click.option(
    "--greedy", metavar="MOD:ATTR", help="Average only what makes evaluate(model) better."
)
@click.option("--plot", metavar="FILE", help="Draw the scores: .png, .svg or .html.")
@click.option("--dry-run", is_flag=True, help="Show what would be done; read headers only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--report", metavar="FILE", help="Write the report, as JSON, to a file.")
@click.option("--distances", is_flag=True, help="Tell how far each checkpoint is from the mean.")
@click.option("--verify", is_flag=True, help="Read the output again; average a sample anew.")
@click.option("--show", metavar="FILE", help="Print how an average was made, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Show every tensor and every disagreement.")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="How many threads.  [default: cores]"
)
@click.version_option(swa_avg.__version__, prog_name="swa-avg", message="%(prog)s %(version)s")
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
    if run.search and not run.dry_run:
        _search(run, run.search)
    elif run.recompute is not None and not run.dry_run:
        _recompute(run, run.recompute)
    elif _leads():  # of several ranks one averages: it is as fast as the disk
        _average(run)


def _planned(run: Run) -> AbstractContextManager[Averaging]:
    """Open the checkpoints and plan their average."""
    from swa_avg.planning import planned

    options = replace(run.options, force=run.options.force or run.dry_run)
    return planned(run.checkpoints, run.output, options)


def _average(run: Run) -> None:
    """Average checkpoints, and nothing else."""
    with _planned(run) as averaging:
        if run.dry_run:
            _show_plan(averaging, run)
            return
        check_beside(run, averaging)
        with _written(averaging, run) as (file, report):
            file.commit()
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
def _written(averaging: Averaging, run: Run) -> Iterator[tuple[Any, Report]]:
    """Average into a file or folder; it becomes the output when it is committed."""
    with averaging.open_output() as file:
        with bar(averaging.plan.bytes_to_read, run.quiet, unit="B", desc="averaging") as shown:
            report = averaging.write(file, threads=run.threads, progress=shown and shown.update)
        yield file, report


def _recompute(run: Run, bn_options: dict[str, Any]) -> None:
    """Recompute BatchNorm: of the average of checkpoints, or of the output that is there."""
    averages = run.checkpoints or run.options.start_from
    with ExitStack() as entered:
        # Planned first: what the headers tell needs none of the user's code.
        averaging = entered.enter_context(_planned(run)) if averages and _leads() else None
        if averaging and averaging.is_folder:
            raise click.UsageError("--recompute-bn writes a file, not a folder: name one with -o.")
        check_beside(run, averaging)
        from swa_avg.recompute import Recompute, copy_of, session
        from swa_avg.remote import path_of

        bn = entered.enter_context(session(Recompute(**bn_options)))
        if not bn.leads:
            bn.follow()
            return
        report, key, ema = None, run.options.key, run.options.ema
        if averaging:
            file, report = entered.enter_context(_written(averaging, run))
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
    from swa_avg import plot, sweeping, trials
    from swa_avg.judging import judged
    from swa_avg.recompute import Recompute

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
            bench = trials.Bench(*judge, shown and partial(move, shown))
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
    from swa_avg.output import AtomicFile

    with AtomicFile(Path(path), len(data)) as file:
        file.write(data, 0)
        file.commit()


def _show(path: str, as_json: bool) -> None:
    """Print how an average was made."""
    from swa_avg.provenance import made_from

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


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    """Unwind as for an error, so that no temporary file remains."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command; the entry point of `swa-avg`."""
    # torch says so at its import, and means nothing by it that matters here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _end_on_signal)
    sys.exit(_run())


def _run() -> int:
    """Run the command and turn whatever it raises into an exit code."""
    ctx: click.Context | None = None
    try:
        # Not command.main: it ends the process itself when nobody reads its output.
        with command.make_context("swa-avg", sys.argv[1:]) as ctx:
            command.invoke(ctx)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except SwaAvgError as error:
        _show_error(error, everything=bool(ctx and ctx.params["verbose"]))
        return 2 if isinstance(error, SelectionError) else 1
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # Nobody reads our output: not worth a message, and none must come at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (OSError, MemoryError) as error:
        click.echo(printable(f"error: {error or type(error).__name__}."), err=True)
        return 1
    return 0


def _show_error(error: SwaAvgError, everything: bool) -> None:
    shown = error.disagreements if everything and isinstance(error, MismatchError) else (error,)
    for one in shown:
        click.echo(f"error: {one}", err=True)
