"""`--each`: averages along the run are computed, scored if wanted, committed and printed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import click

from swa_avg.cli import messages
from swa_avg.cli.beside import opened_beside
from swa_avg.cli.blas import one_blas_thread
from swa_avg.cli.options import Run
from swa_avg.cli.progress import watching
from swa_avg.cli.show import current_streams, note, print_json, say, say_picture
from swa_avg.cli.torch_import import import_torch
from swa_avg.errors import counted, in_bytes
from swa_avg.progress import Counter, Watch
from swa_avg.signals import Signals

if TYPE_CHECKING:
    from swa_avg.averaging import Report, WindowsReport, along
    from swa_avg.search import WindowScores


def average_each(run: Run) -> None:
    """Average the latest checkpoints at every checkpoint, or show what would be done."""
    from swa_avg.averaging import WindowsReport, along

    force = run.options.force or run.dry_run
    options = replace(run.options, force=force, by_sample=run.dry_run, of_command=True)
    with ExitStack() as entered:
        with watching(run.quiet, current_streams().err) as watch:
            given = run.checkpoints, _pattern(run), run.each, options
            plan = entered.enter_context(along.planned_windows(*given, watch))
        if run.dry_run:
            _show_plan(plan, run)
            return
        outputs = [one.output for one in plan.averages] if plan.is_named else []
        beside = entered.enter_context(opened_beside(run, plan, outputs))
        if run.recompute is not None or run.search:
            entered.enter_context(current_streams().separated(silent=run.quiet))
        with ExitStack() as inner:
            watch = inner.enter_context(watching(run.quiet, current_streams().err))
            done = _computed(plan, run, watch, inner)
            picture = _drawn(done, run)
            reports = _committed(plan, done.drafts, watch)
        report: WindowsReport
        if done.scores is None:
            report = WindowsReport(reports, done.bytes_read, plan.notes)
        else:
            from swa_avg.search import ScoredWindows

            report = ScoredWindows(reports, done.bytes_read, plan.notes, scores=done.scores)
        beside.write_picture(picture)
        beside.write_report(report.to_dict())
    if run.as_json:
        print_json(report.to_dict())
    elif not run.quiet:
        _show(report, run, done.scores)
        say_picture(picture, run)


def _pattern(run: Run) -> str | None:
    """Return the pattern of the outputs' names; None if the averages are only scored."""
    ctx = click.get_current_context()
    source = ctx.get_parameter_source("output")
    if run.search and source is click.core.ParameterSource.DEFAULT:
        return None
    pattern: str = ctx.params["output"]  # `run.output` drops a final slash
    return pattern


@dataclass(frozen=True)
class _Done:
    """Averages that are computed, and scored if that is wanted."""

    drafts: Sequence[along.Draft]
    bytes_read: int
    scores: WindowScores | None = None


def _computed(plan: along.Windows, run: Run, watch: Watch | None, entered: ExitStack) -> _Done:
    """Compute all averages; recompute their BatchNorm statistics and score them if wanted."""
    if run.search:
        import_torch()
        from swa_avg.batchnorm import Recompute
        from swa_avg.search import candidates, judged, scored

        bn = Recompute(**run.recompute) if run.recompute is not None else None
        Counter(watch, f"loading {run.search.evaluate}")
        judge = entered.enter_context(judged(run.search.evaluate, bn, **run.search.score_options))
        bench = candidates.Bench(*judge, watch)
        found = entered.enter_context(scored(plan, bench, run.threads))
        return _Done(found.drafts, found.bytes_read, found.scores)
    if run.recompute is None:
        entered.enter_context(one_blas_thread())
        return _Done(*entered.enter_context(plan.computed(run.threads, watch)))
    Counter(watch, f"loading {run.recompute['data']}")
    import_torch()
    from swa_avg.batchnorm import Recompute, session

    own = entered.enter_context(session(Recompute(**run.recompute)))
    drafts, bytes_read = entered.enter_context(plan.computed(run.threads, watch))
    return _Done([draft.recomputed(own, watch) for draft in drafts], bytes_read)


def _drawn(done: _Done, run: Run) -> bytes:
    """Return the picture of the scores, if it is wanted."""
    if run.plot is None or done.scores is None:
        return b""
    from swa_avg.search import plot

    return plot.drawn_along(done.scores, run.plot.suffix.lower())


def _committed(
    plan: along.Windows, drafts: Sequence[along.Draft], watch: Watch | None
) -> tuple[Report, ...]:
    """Commit all outputs; messages of later failures say how many are written."""
    from swa_avg.averaging import along

    if not plan.is_named:
        return tuple(draft.unwritten() for draft in drafts)
    signals: Signals = click.get_current_context().obj
    reports: list[Report] = []
    along.sync_all(drafts, watch)
    for draft in drafts:
        signals.check()
        reports.append(draft.commit(watch))
        done = counted(len(reports), "output")
        signals.after = f" {done} of {len(drafts)} {'is' if len(reports) == 1 else 'are'} "
        signals.after += f"written; the last one is {draft.averaging.output}."
    return tuple(reports)


def _show_plan(plan: along.Windows, run: Run) -> None:
    """Print the plan of a dry run."""
    if run.as_json:
        averages = [average.to_dict() for average in plan.averages]
        for content in averages if not plan.is_named else ():
            content["output"] = ""
        read = {"bytes_to_read": plan.bytes_to_read, "notes": list(plan.notes)}
        wanted: dict[str, object] = {"recompute_bn": run.recompute is not None}
        if run.search:
            wanted |= {"search": run.search.evaluate}
        print_json({"averages": averages, **read, **wanted})
        return
    if run.quiet:
        return
    for average in plan.averages:
        named = f"{average.output}: " if plan.is_named else ""
        say([f"{named}{_members([source.path for source in average.inputs])}"])
    size, count = in_bytes(plan.size), counted(len(plan.averages), "average")
    say([f"would read {in_bytes(plan.bytes_to_read)}, each checkpoint once"])
    if plan.is_named:
        say([f"would write {count}, together {size}"])
    else:
        say([f"would write nothing; {count} would need {size} in the temporary folder"])
    if run.recompute is not None:
        say([f"would recompute BatchNorm of each over {run.recompute['data']}"])
    if run.search:
        say([f"would score with {run.search.evaluate} each average, and each checkpoint alone"])
    note(dict.fromkeys([*plan.notes, *plan.averages[-1].notes]))


def _show(report: WindowsReport, run: Run, scores: WindowScores | None) -> None:
    """Print the averages, and the notes on the last one; with -v the notes on all."""
    last, written = report.averages[-1], bool(report.bytes_written)
    if scores:
        say(messages.of_window_scores(scores))
    for one in report.averages:
        paths = [source.path for source in one.inputs]
        if written:
            say([f"{one.output} ({in_bytes(one.bytes_written)}): {_members(paths)}"])
        if run.verbose and one.batchnorm:
            say(messages.of_recompute(one.batchnorm, layers=True))
    if last.batchnorm and not run.verbose:
        say(messages.of_recompute(last.batchnorm, layers=False))
    if written:
        count = counted(len(report.averages), "average")
        say([f"wrote {count} ({in_bytes(report.bytes_written)})"])
    note(dict.fromkeys([*report.notes, *_notes(report, run)]))


def _notes(report: WindowsReport, run: Run) -> Iterator[str]:
    from swa_avg.averaging import STALE

    for one in report.averages if run.verbose else report.averages[-1:]:
        yield from (*one.notes, *one.batchnorm_notes)
    if any(one.stale for one in report.averages):
        yield STALE


def _members(paths: list[str]) -> str:
    of = paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
    return f"mean of {counted(len(paths), 'checkpoint')}, {of}"
