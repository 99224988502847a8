"""Scores along a run: each window's average and each checkpoint alone is scored by `evaluate`.

The averages are those of `along`, complete in temporary files while they are scored. Whether
they become outputs is up to the caller. Does not print.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from swa_avg.averaging import WindowsReport, along
from swa_avg.batchnorm import BatchNorm
from swa_avg.checkpoints import Number, metrics
from swa_avg.planning import OptionFields, Paths, axis_of, check_arguments, options_of
from swa_avg.progress import Watch
from swa_avg.search.candidates import Bench, Candidate, Tried
from swa_avg.search.scores import Evaluate, Judge, Scale

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class WindowScores:
    """The scores of the averages along a run, and of its checkpoints.

    Attributes:
        scale: The name of the score, and whether low or high is better.
        axis: What the numbers of the checkpoints are: epoch, step, number (in the name), or
            checkpoint (counted from 1) if none of these increases along the run.
        numbers: The number of each checkpoint.
        paths: The checkpoints, in order.
        singles: The score of each checkpoint on its own.
        tried: The averages, in the order of the run.
        best: The index of the best average in `tried`: of equally good ones that of the most
            checkpoints, and of these the latest.
        is_recomputed: Whether the averages have recomputed BatchNorm statistics.
    """

    scale: Scale
    axis: str
    numbers: tuple[Number, ...]
    paths: tuple[str, ...]
    singles: tuple[float, ...]
    tried: tuple[Tried, ...]
    best: int
    is_recomputed: bool

    @property
    def winner(self) -> Tried:
        """The best average."""
        return self.tried[self.best]

    @property
    def lasts(self) -> tuple[int, ...]:
        """The lengths of the windows, in order."""
        return tuple(sorted({len(one.members) for one in self.tried}))

    def to_dict(self) -> dict[str, object]:
        """Return a dict for JSON, like that of the search in `SweepReport.to_dict`."""
        singles = zip(self.paths, self.numbers, self.singles, strict=True)
        return {
            "greedy": False,
            "metric": self.scale.name,
            "mode": self.scale.mode,
            "axis": self.axis,
            "singles": [
                {"path": path, self.axis: number, "score": score} for path, number, score in singles
            ],
            "tried": [
                {"checkpoints": [self.paths[number] for number in one.members]}
                | {"count": len(one.members), self.axis: self.numbers[one.members[-1]]}
                | {"score": one.score, "best": one is self.winner}
                for one in self.tried
            ],
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class ScoredWindows(WindowsReport):
    """The report of averages along a run that were scored.

    The reports in `averages` are in the order of `scores.tried`. Their `output` is empty if
    nothing was written.

    Attributes:
        scores: The scores.
    """

    scores: WindowScores

    def to_dict(self) -> dict[str, object]:
        """Return the report as a dict for JSON."""
        return super().to_dict() | {"search": self.scores.to_dict()}


@dataclass(frozen=True)
class Scored:
    """Scored averages, in files that are not committed yet.

    Attributes:
        drafts: The averages, in the order of the run.
        bytes_read: The number of tensor bytes that were read to average.
        scores: The scores.
    """

    drafts: tuple[along.Draft, ...]
    bytes_read: int
    scores: WindowScores

    @property
    def best(self) -> along.Draft:
        """The best average."""
        return self.drafts[self.scores.best]


@contextmanager
def scored(plan: along.Windows, bench: Bench, threads: int | None = None) -> Iterator[Scored]:
    """Average all windows while reading the files once; score them and the checkpoints.

    Args:
        plan: The windows.
        bench: Scores checkpoints and averages.
        threads: The number of workers; by default one per usable core.

    Raises:
        SwaAvgError: A disk is full, or averaging or scoring fails.
    """
    with plan.opened() as files:
        singles = bench.singles(plan.states, len(files))
        drafts, bytes_read = plan.compute(files, threads, bench.watch)
        candidates: list[Candidate] = []
        for draft, span in zip(drafts, plan.spans, strict=True):
            end = plan.states[span[-1]].checkpoint.path
            label = f"the average of the last {len(span)} at {end}"
            candidates.append(
                bench.candidate(draft.file, draft.averaging, draft.report, span, label)
            )
        completed = (
            replace(draft, report=candidate.report)
            for draft, candidate in zip(drafts, candidates, strict=True)
        )
        axis, numbers = axis_of(plan.states)
        scores = WindowScores(
            scale=bench.scale,
            axis=axis,
            numbers=numbers,
            paths=tuple(str(state.checkpoint.path) for state in plan.states),
            singles=singles,
            tried=tuple(Tried(one.members, one.score) for one in candidates),
            best=_best(candidates, bench.scale),
            is_recomputed=any(one.report.batchnorm is not None for one in candidates),
        )
        yield Scored(tuple(completed), bytes_read, scores)


def _best(candidates: Sequence[Candidate], scale: Scale) -> int:
    """Return the number of the best average."""

    def rank(number: int) -> tuple[float, int, int]:
        one = candidates[number]
        return scale.merit(one.score), len(one.members), number

    return max(range(len(candidates)), key=rank)


def score_windows(
    checkpoints: Paths,
    evaluate: Evaluate,
    last: int | Sequence[int],
    *,
    model: nn.Module,
    output: str | os.PathLike[str] | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    batchnorm: BatchNorm | None = None,
    threads: int | None = None,
    progress: Watch | None = None,
    **options: Unpack[OptionFields],
) -> ScoredWindows:
    """Score the mean of the latest checkpoints at every checkpoint, and each checkpoint alone.

    Each file is read once to average, and once to be scored alone. The averages need temporary
    files, all together: beside the outputs, or in the temporary folder (`TMPDIR`).

    Args:
        checkpoints: Files, folders or patterns.
        evaluate: `evaluate(model)` returns a number, or a mapping of names to numbers. The
            model is in eval mode; its device and dtype are not changed.
        last: The number of checkpoints in a window, or several such numbers.
        model: The model into which the weights are loaded. Afterwards it holds the best
            average, BatchNorm statistics included, and is in eval mode.
        output: The pattern of the outputs' names, as for `windows`; None writes no averages.
        metric: The name of the score, or its key if `evaluate` returns a mapping.
        mode: Whether low (min) or high (max) scores are better. Needed if the name of the
            metric or of `evaluate` does not imply it.
        batchnorm: The batches with which to recompute the BatchNorm statistics of each
            average: `BatchNorm(data=loader)`. They are iterated over once for each average.
        threads: The number of workers; by default one per usable core.
        progress: Called with a `Progress` at the start of each step and as it proceeds.
        **options: The fields of `Options`, by name, as for `windows`.

    Returns:
        The report of all averages, with the scores.

    Raises:
        SwaAvgError: Averaging or scoring failed. Nothing was written, unless a commit failed:
            the outputs before it are complete then.
        TypeError: An option has an unknown name.
        ValueError: An option has an invalid value or cannot be combined with windows.
    """
    wanted = options_of(score_windows, options)
    metrics.check_mode(mode)
    check_arguments(batchnorm, threads, model)
    judge = Judge.of(evaluate, model, metric, mode)
    bench = Bench(judge, batchnorm.session(model) if batchnorm else None, progress)
    with (
        along.planned_windows(checkpoints, output, last, wanted, progress) as plan,
        scored(plan, bench, threads) as found,
    ):
        bench.load(found.best.file, found.best.averaging)
        if plan.is_named:
            reports = along.committed(found.drafts, progress)
        else:
            reports = tuple(draft.unwritten() for draft in found.drafts)
        return ScoredWindows(reports, found.bytes_read, plan.notes, scores=found.scores)
