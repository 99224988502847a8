"""The two searches: both average and score candidates, and keep the best as the output.

The sweep averages the last 1, 2, 3, … of the chosen checkpoints while it reads the files
once. The greedy soup adds a checkpoint if that improves the score. Each checkpoint is also
scored on its own. Candidates are temporary files beside the output; all but the best are
removed. Does not print.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Literal

from torch import nn

from swa_avg.averaging import Averaging, planned
from swa_avg.batchnorm import BatchNorm
from swa_avg.checkpoints import metrics
from swa_avg.errors import OutputError, counted, in_bytes
from swa_avg.planning import (
    ALL,
    OptionFields,
    Paths,
    check_arguments,
    make_plan,
    options_of,
)
from swa_avg.progress import Counter, Watch
from swa_avg.search.candidates import Bench, Candidate, Found, SweepReport, Tried
from swa_avg.search.scores import Evaluate, Judge
from swa_avg.storage import AtomicFolder, OutputFile, is_remote

if TYPE_CHECKING:
    from typing_extensions import Unpack


@contextmanager
def swept(averaging: Averaging, bench: Bench, threads: int | None = None) -> Iterator[Found]:
    """Average the last 1, 2, 3, … checkpoints while reading the files once; find the best.

    Of equally good averages, the one of more checkpoints is the best.

    Raises:
        SwaAvgError: The disk is full, or averaging or scoring fails.
    """
    chosen = averaging.selection.chosen
    count = len(chosen)
    _check_room(averaging, count, fewer=True)
    with ExitStack() as opened:
        files = [_output(averaging, opened) for _ in chosen]
        singles = bench.singles(chosen, count)
        count_bytes = Counter(bench.watch, "averaging", averaging.plan.bytes_to_read)
        outcome = averaging.compute(
            files[-1], partials=files[:-1], threads=threads, progress=count_bytes
        )
        checksums = (*outcome.partial_checksums, outcome.checksums)
        candidates: list[Candidate] = []
        for number, file in enumerate(files, 1):
            average = ending(averaging, number)
            report = average.complete(file, replace(outcome, checksums=checksums[number - 1]))
            members = range(count - number, count)
            label = f"the average of the last {number}"
            candidates.append(bench.candidate(file, average, report, members, label))
        best = candidates[0]
        for candidate in candidates:
            if not bench.scale.is_better(best.score, candidate.score):
                best = candidate
        scores = _report(bench, averaging, singles, candidates, best)
        yield Found(best.file, best.averaging, scores)


@contextmanager
def greedy_soup(averaging: Averaging, bench: Bench, threads: int | None = None) -> Iterator[Found]:
    """Try the checkpoints from best to worst; add each one that improves the average.

    The greedy soup of Wortsman et al. 2022, "Model soups: averaging weights of multiple
    fine-tuned models improves accuracy without increasing inference time", recipe 1. In
    contrast to the paper, a checkpoint that leaves the score equal is not added. Each
    average is computed from the files, so it is exact. Of equally good checkpoints, the
    later one is tried first.

    Raises:
        SwaAvgError: The disk is full, or averaging or scoring fails.
    """
    chosen = averaging.selection.chosen
    _check_room(averaging, 2, fewer=False)
    singles = bench.singles(chosen, len(chosen))
    merits = [bench.scale.merit(score) for score in singles]
    ranked = sorted(range(len(chosen)), key=lambda n: (merits[n], n), reverse=True)
    options = replace(averaging.options, choice=ALL)
    candidates: list[Candidate] = []
    best: Candidate | None = None
    with ExitStack() as kept:
        for number in ranked:
            members = sorted((*(best.members if best else ()), number))
            paths = [chosen[member].checkpoint.path for member in members]
            with ExitStack() as trial:
                plan = trial.enter_context(planned(paths, averaging.output, options))
                average = _noting(averaging, plan)
                file = _output(average, trial)
                report = average.write_to(file, threads=threads, progress=bench.watch)
                label = f"the average with {chosen[number].checkpoint.path}"
                candidates.append(bench.candidate(file, average, report, members, label))
                if best is None or bench.scale.is_better(candidates[-1].score, best.score):
                    best = candidates[-1]
                    kept.close()
                    kept.enter_context(trial.pop_all())
        assert best is not None, "there is at least one checkpoint"
        scores = _report(bench, averaging, singles, candidates, best)
        yield Found(best.file, best.averaging, replace(scores, greedy=True))


def _noting(averaging: Averaging, plan: Averaging) -> Averaging:
    """Return the plan of some checkpoints, with what was found out about all of them."""
    whole, own = averaging.selection, plan.selection
    notes = tuple(dict.fromkeys((*whole.notes, *own.notes)))
    return replace(plan, selection=replace(own, scores=whole.scores, notes=notes))


def ending(averaging: Averaging, count: int) -> Averaging:
    """Return the average of the last `count` checkpoints, with the layout of the whole one."""
    chosen = averaging.selection.chosen[-count:]
    # Copied and kept tensors come from the last checkpoint, whatever the count.
    works = tuple(replace(work, sources=work.sources[-count:]) for work in averaging.plan.works)
    state_dict = averaging.plan.state_dict
    plan = replace(make_plan(chosen, averaging.rules), works=works, state_dict=state_dict)
    selection, known = replace(averaging.selection, chosen=chosen), averaging.known[-len(chosen) :]
    return replace(averaging, selection=selection, plan=plan, known=known)


def _check_room(averaging: Averaging, count: int, *, fewer: bool) -> None:
    """Refuse a search whose temporary files do not fit on the disk, before reading.

    Args:
        averaging: The planned average.
        count: The number of averages on the disk at once.
        fewer: Whether the search of fewer checkpoints has fewer of them.
    """
    output = averaging.output
    if is_remote(output):
        folder, where = Path(gettempdir()), "in the temporary folder"
        elsewhere = "Set TMPDIR to a folder on another disk"
    else:
        folder, where = Path(os.path.realpath(output)).parent, "beside the output"
        elsewhere = "Write to another disk with -o"
    needed = count * averaging.layout.size
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # a missing folder is reported when the file is opened
    if needed > free:
        raise OutputError(
            f"comparing {counted(count, 'average')} needs {in_bytes(needed)} of disk space "
            f"{where}, but {in_bytes(free)} are free",
            file=output,
            remedy=f"{elsewhere}, or compare fewer with --last" if fewer else elsewhere,
        )


def _output(averaging: Averaging, opened: ExitStack) -> OutputFile:
    """Open a temporary file for an average."""
    file = averaging.open_output()
    assert not isinstance(file, AtomicFolder), "folders have been refused before"
    opened.enter_context(file)
    return file


def _report(
    bench: Bench,
    averaging: Averaging,
    singles: tuple[float, ...],
    candidates: Sequence[Candidate],
    best: Candidate,
) -> SweepReport:
    """Return the report of a sweep.

    Args:
        bench: What has scored the candidates.
        averaging: The average of all checkpoints.
        singles: The score of each checkpoint on its own.
        candidates: The averages, in the order in which they were scored.
        best: The average that becomes the output.
    """
    return SweepReport(
        greedy=False,
        scale=bench.scale,
        paths=tuple(str(state.checkpoint.path) for state in averaging.selection.chosen),
        singles=singles,
        tried=tuple(Tried(one.members, one.score) for one in candidates),
        best=candidates.index(best),
        average=best.report,
    )


def sweep(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    evaluate: Evaluate,
    *,
    model: nn.Module,
    greedy: bool = False,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    batchnorm: BatchNorm | None = None,
    threads: int | None = None,
    progress: Watch | None = None,
    **options: Unpack[OptionFields],
) -> SweepReport:
    """Find the best average of checkpoints and write it.

    The files are read once to average the last 1, 2, 3, … checkpoints. Each average and
    each single checkpoint is scored. The search needs one temporary file of the output's
    size for each checkpoint, or two with `greedy`.

    Args:
        checkpoints: Files, folders, or patterns of them.
        output: The file to write.
        evaluate: `evaluate(model)` returns a number, or a mapping of names to numbers. The
            model is in eval mode; its device and dtype are not changed.
        model: The model into which the weights are loaded. Afterwards it holds the best
            average, BatchNorm statistics included, and is in eval mode.
        greedy: Make a greedy soup instead: try the checkpoints from best to worst and add each
            one that improves the average (Wortsman et al. 2022, "Model soups", recipe 1).
        metric: The name of the score, or its key if `evaluate` returns a mapping.
        mode: Whether low (min) or high (max) scores are better. Needed if the name of the
            metric or of `evaluate` does not imply it.
        batchnorm: The batches with which to recompute the BatchNorm statistics of each
            average: `BatchNorm(data=loader)`. They are iterated over once for each average.
        threads: The number of worker processes or threads; by default one per usable core.
        progress: Called with a `Progress` at the start of each step and as it proceeds.
        **options: The fields of `Options`, by name, except `start_from`, `distances` and
            `bn_buffers="first"`.

    Returns:
        The report of the search.

    Raises:
        SwaAvgError: The search failed, and nothing was written.
        TypeError: An option has an unknown name.
        ValueError: An option has an invalid value or cannot be combined with a search.
    """
    wanted = options_of(sweep, options)
    check_arguments(batchnorm, threads, model)
    if wanted.start_from or wanted.distances or wanted.bn_buffers == "first":
        raise ValueError(
            'start_from, distances and bn_buffers="first" cannot be combined with a search'
        )
    metrics.check_mode(mode)
    judge = Judge.of(evaluate, model, metric, mode)
    bench = Bench(judge, batchnorm.session(model) if batchnorm else None, progress)
    with planned(checkpoints, output, wanted, progress=progress) as averaging:
        if averaging.is_folder:
            raise OutputError("would be a folder", file=output, expected="the name of a file")
        search = greedy_soup if greedy else swept
        with search(averaging, bench, threads) as best:
            bench.load(best.file, best.averaging)
            notes = best.file.commit(progress)
    return best.report.noting(wanted.worded(notes))
