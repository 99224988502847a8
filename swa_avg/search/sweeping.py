"""Which average is best: candidates are averaged, judged, and the best becomes the output.

The sweep tries the last 1, 2, 3, … of the chosen checkpoints, all of them averaged in
one reading of the files; the greedy soup tries whether one more makes it better. Each
single checkpoint is judged beside them, as it is. Candidates are temporary files beside
the output; all but the best of them vanish. Prints nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from torch import nn

from swa_avg.averaging import Averaging, planned
from swa_avg.batchnorm import Alone, Amp, Estimator, Forward, Recompute, Session, UserCode
from swa_avg.checkpoints import StateDict
from swa_avg.errors import OutputError, counted, in_bytes
from swa_avg.planning import ALL, Options, Paths, make_plan
from swa_avg.search.candidates import Bench, Candidate, File, Found, Progress, SweepReport, Tried
from swa_avg.search.scores import Evaluate, Judge, Scale
from swa_avg.storage import AtomicFolder, is_remote


@contextmanager
def swept(averaging: Averaging, bench: Bench, threads: int | None = None) -> Iterator[Found]:
    """Average the last 1, 2, 3, … checkpoints, all in one reading, and find the best.

    Of equal scores that of more checkpoints counts as the best.

    Raises:
        SwaAvgError: There is no room, or something cannot be averaged or judged.
    """
    chosen = averaging.selection.chosen
    count = len(chosen)
    _check_room(averaging, count)
    with ExitStack() as opened:
        files = [_output(averaging, opened) for _ in chosen]
        singles = bench.singles(chosen)
        bench.begin("averaging")
        outcome = averaging.compute(files[-1], partials=files[:-1], threads=threads)
        checksums = (*outcome.partial_checksums, outcome.checksums)
        candidates: list[Candidate] = []
        for number, file in enumerate(files, 1):
            average = ending(averaging, number)
            report = average.complete(file, replace(outcome, checksums=checksums[number - 1]))
            members = range(count - number, count)
            whose = f"the average of the last {number}"
            candidates.append(bench.candidate(file, average, report, members, whose))
        best = candidates[0]
        for candidate in candidates:
            if not bench.scale.is_better(best.score, candidate.score):
                best = candidate
        yield _found(False, bench.scale, chosen, singles, candidates, best)


@contextmanager
def greedy(averaging: Averaging, bench: Bench, threads: int | None = None) -> Iterator[Found]:
    """Add one checkpoint after the other, the best first, as long as the average gets better.

    The greedy soup of Wortsman et al. 2022, "Model soups: averaging weights of multiple
    fine-tuned models improves accuracy without increasing inference time", recipe 1. Unlike
    there, a checkpoint that changes nothing does not join. Each average is made anew from
    the files, so it is exact. Of checkpoints that are equally good the later comes first.

    Raises:
        SwaAvgError: There is no room, or something cannot be averaged or judged.
    """
    chosen = averaging.selection.chosen
    _check_room(averaging, 2)
    singles = bench.singles(chosen)
    sign = 1 if bench.scale.mode == "max" else -1
    ranked = sorted(range(len(chosen)), key=lambda n: (sign * singles[n], n), reverse=True)
    options = replace(averaging.options, choice=ALL)
    candidates: list[Candidate] = []
    best: Candidate | None = None
    with ExitStack() as kept:
        for number in ranked:
            members = sorted((*(best.members if best else ()), number))
            paths = [chosen[member].checkpoint.path for member in members]
            with ExitStack() as trial:
                average = trial.enter_context(planned(paths, averaging.output, options))
                file = _output(average, trial)
                report = average.write(file, threads=threads)
                whose = f"the average with {chosen[number].checkpoint.path}"
                candidates.append(bench.candidate(file, average, report, members, whose))
                if best is None or bench.scale.is_better(candidates[-1].score, best.score):
                    best = candidates[-1]
                    kept.close()
                    kept.enter_context(trial.pop_all())
        assert best is not None, "there is at least one checkpoint"
        yield _found(True, bench.scale, chosen, singles, candidates, best)


def ending(averaging: Averaging, count: int) -> Averaging:
    """Return the average of the last `count` checkpoints, laid out as that of all."""
    chosen = averaging.selection.chosen[-count:]
    # What is copied or kept is the last one's, or the same in all, whatever the count.
    works = tuple(replace(work, sources=work.sources[-count:]) for work in averaging.plan.works)
    state_dict = averaging.plan.state_dict
    plan = replace(make_plan(chosen, averaging.rules), works=works, state_dict=state_dict)
    selection, known = replace(averaging.selection, chosen=chosen), averaging.known[-len(chosen) :]
    return replace(averaging, selection=selection, plan=plan, known=known)


def _check_room(averaging: Averaging, count: int) -> None:
    """Refuse, before anything is read, what does not fit on the disk."""
    output = averaging.output
    place = gettempdir() if is_remote(output) else Path(os.path.realpath(output)).parent
    needed = count * averaging.layout.size
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return  # no such folder: who opens the file says so
    if needed > free:
        raise OutputError(
            f"needs {in_bytes(needed)} beside it to compare {counted(count, 'average')}, and "
            f"{in_bytes(free)} are free",
            file=output,
            remedy="Compare fewer with --last, or write to another place with -o",
        )


def _output(averaging: Averaging, opened: ExitStack) -> File:
    """Open a temporary file for an average."""
    file = averaging.open_output()
    assert not isinstance(file, AtomicFolder), "folders are refused before"
    opened.enter_context(file)
    return file


def _found(
    greedy: bool,
    scale: Scale,
    chosen: Sequence[StateDict],
    singles: tuple[float, ...],
    candidates: Sequence[Candidate],
    best: Candidate,
) -> Found:
    batchnorm, notes = best.batchnorm or (None, ())
    report = SweepReport(
        greedy=greedy,
        scale=scale,
        paths=tuple(str(state.checkpoint.path) for state in chosen),
        singles=singles,
        tried=tuple(Tried(one.members, one.score) for one in candidates),
        best=candidates.index(best),
        average=best.report,
        batchnorm=batchnorm,
        notes=notes,
    )
    return Found(best.file, best.averaging, report)


def sweep(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    evaluate: Evaluate,
    *,
    model: nn.Module,
    soup: bool = False,
    metric: str | None = None,
    mode: str | None = None,
    batches: Iterable[Any] | None = None,
    forward: Forward | None = None,
    device: str = "auto",
    estimator: Estimator = "population",
    amp: Amp = "off",
    max_batches: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SweepReport:
    """Find out which average of checkpoints is best, and write that one.

    The averages of the last 1, 2, 3, … checkpoints are made in one reading of the files
    and judged; so is each checkpoint by itself. As many files as there are checkpoints,
    each of the output's size, lie beside the output meanwhile; with `soup` two.

    Args:
        checkpoints: Files, folders, or patterns of them.
        output: The file to write.
        evaluate: `evaluate(model)` returns a number, or a mapping of names to numbers. The
            model is in eval mode, where and as it was given.
        model: Takes the weights; afterwards it has those that were judged last.
        soup: Make a greedy soup instead: a checkpoint joins, the best first, if the
            average gets better (Wortsman et al. 2022, "Model soups", recipe 1).
        metric: What the number is called, or which entry of a mapping counts.
        mode: Whether a small (min) or a large (max) one is good; needed where neither
            `metric` nor the name of `evaluate` or of the only entry tells.
        batches: Recompute the BatchNorm statistics of each average over these; something
            that can be iterated over again and again.
        forward: As for `recompute_batchnorm`; so are `device`, `estimator`, `amp` and
            `max_batches`.
        device: Where BatchNorm statistics are recomputed.
        estimator: population or torch.
        amp: off, bf16 or fp16.
        max_batches: Use only so many batches.
        threads: How many processes or threads average; by default one for each usable core.
        progress: Called before each step with how many are done, and what comes now.
        **options: The fields of `Options`, by name, but for `start_from`, `distances`
            and the BatchNorm statistics of the first checkpoint.

    Returns:
        What was tried, and how the output was made.

    Raises:
        SwaAvgError: Nothing was written; the error says why.
        ValueError: An option has no such value, or does not go with a search.
    """
    wanted = Options(**options)
    if wanted.start_from or wanted.distances or wanted.bn_buffers == "first":
        raise ValueError("start_from, distances and bn_buffers=first do not go with a search")
    called = getattr(evaluate, "__name__", "score")
    judge = Judge(evaluate, model, called, metric, mode)
    bn = None
    if batches is not None:
        given = batches
        how = Recompute("", None, None, device, estimator, amp, max_batches)
        bn = Session(how, UserCode(given, model, forward, lambda: given), Alone())
    with planned(checkpoints, output, wanted) as averaging:
        if averaging.is_folder:
            raise OutputError("would be a folder", file=output, expected="the name of a file")
        search = greedy if soup else swept
        with search(averaging, Bench(judge, bn, progress), threads) as best:
            notes = best.file.commit()
    return best.report.noting(notes)
