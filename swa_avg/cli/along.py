"""`--each`: averages along the run are computed, committed and printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from swa_avg.cli import messages
from swa_avg.cli.beside import opened_beside
from swa_avg.cli.options import Run
from swa_avg.cli.progress import watching
from swa_avg.cli.show import current_streams, json_text, note, print_json, say
from swa_avg.errors import counted, in_bytes
from swa_avg.progress import Counter, Watch
from swa_avg.signals import Signals

if TYPE_CHECKING:
    from swa_avg.averaging import along


def average_each(run: Run) -> None:
    """Average the latest checkpoints at every checkpoint, or show what would be done."""
    from swa_avg.averaging import along

    force = run.options.force or run.dry_run
    options = replace(run.options, force=force, by_sample=run.dry_run, of_command=True)
    pattern = click.get_current_context().params["output"]  # `run.output` drops a final slash
    with ExitStack() as entered:
        with watching(run.quiet, current_streams().err) as watch:
            planned = along.planned_windows(run.checkpoints, pattern, run.each, options, watch)
            plan = entered.enter_context(planned)
        if run.dry_run:
            _show_plan(plan, run)
            return
        beside = entered.enter_context(
            opened_beside(run, plan, [one.output for one in plan.averages])
        )
        if run.recompute is not None:
            entered.enter_context(current_streams().separated(silent=run.quiet))
        with ExitStack() as inner:
            watch = inner.enter_context(watching(run.quiet, current_streams().err))
            drafts, bytes_read = _computed(plan, run, watch, inner)
            reports = []
            for draft in drafts:
                signals: Signals = click.get_current_context().obj
                signals.check()
                reports.append(draft.commit(watch))
                done = counted(len(reports), "output")
                signals.after = f" {done} of {len(drafts)} {'is' if len(reports) == 1 else 'are'} "
                signals.after += f"written, the last one is {draft.averaging.output}."
        report = along.WindowsReport(tuple(reports), bytes_read, plan.notes)
        if run.report is not None:
            beside.write(run.report, f"{json_text(report.to_dict())}\n".encode())
    if run.as_json:
        print_json(report.to_dict())
    elif not run.quiet:
        _show(report, run)


def _computed(
    plan: along.Windows, run: Run, watch: Watch | None, entered: ExitStack
) -> tuple[list[along.Draft], int]:
    """Compute all averages, and recompute their BatchNorm statistics if that is wanted."""
    if run.recompute is None:
        return entered.enter_context(plan.computed(run.threads, watch))
    from swa_avg.batchnorm import Recompute, session

    Counter(watch, f"loading {run.recompute['data']}")
    bn = entered.enter_context(session(Recompute(**run.recompute)))
    drafts, bytes_read = entered.enter_context(plan.computed(run.threads, watch))
    return [draft.recomputed(bn, watch) for draft in drafts], bytes_read


def _show_plan(plan: along.Windows, run: Run) -> None:
    """Print the plan of a dry run."""
    if run.as_json:
        averages = [average.to_dict() for average in plan.averages]
        read = {"bytes_to_read": plan.bytes_to_read, "notes": list(plan.notes)}
        print_json({"averages": averages, **read, "recompute_bn": run.recompute is not None})
        return
    if run.quiet:
        return
    for average in plan.averages:
        inputs = average.inputs
        say([f"{average.output}: {_members([source.path for source in inputs])}"])
    size = sum(average.layout.size for average in plan.averages)
    say([f"would read {in_bytes(plan.bytes_to_read)}, each checkpoint once"])
    say([f"would write {counted(len(plan.averages), 'average')}, together {in_bytes(size)}"])
    if run.recompute is not None:
        say([f"would recompute BatchNorm of each over {run.recompute['data']}"])
    note(dict.fromkeys([*plan.notes, *plan.averages[-1].notes]))


def _show(report: along.WindowsReport, run: Run) -> None:
    """Print the averages, and the notes on the last one; with -v the notes on all."""
    last = report.averages[-1]
    for one in report.averages:
        paths = [source.path for source in one.inputs]
        say([f"{one.output} ({in_bytes(one.bytes_written)}): {_members(paths)}"])
        if run.verbose and one.batchnorm:
            say(messages.of_recompute(one.batchnorm, layers=True))
    if last.batchnorm and not run.verbose:
        say(messages.of_recompute(last.batchnorm, layers=False))
    written = in_bytes(report.bytes_written)
    say([f"wrote {counted(len(report.averages), 'average')} ({written})"])
    note(dict.fromkeys([*report.notes, *_notes(report, run)]))


def _notes(report: along.WindowsReport, run: Run) -> Iterator[str]:
    from swa_avg.averaging import STALE

    for one in report.averages if run.verbose else report.averages[-1:]:
        yield from (*one.notes, *one.batchnorm_notes)
    if any(one.stale for one in report.averages):
        yield STALE


def _members(paths: list[str]) -> str:
    of = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
    return f"mean of {counted(len(paths), 'checkpoint')}, {of}"
