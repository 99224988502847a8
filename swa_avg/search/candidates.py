"""Averages that are tried: each is judged in its temporary file, and all are reported.

Knows how a candidate is judged, not how candidates are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from swa_avg.averaging import Averaging, Report
from swa_avg.batchnorm import BatchNormReport, Session
from swa_avg.checkpoints import StateDict, find_state_dict
from swa_avg.formats import open_checkpoint
from swa_avg.search.scores import Judge, Scale
from swa_avg.storage import AtomicFile, RemoteFile

# Called before each step with how many are done, and what comes now.
Progress = Callable[[int, str], None]
File = AtomicFile | RemoteFile


@dataclass(frozen=True)
class Tried:
    """An average that was judged.

    Attributes:
        members: The numbers of its checkpoints, from 0, in their order.
        score: Its score.
    """

    members: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class SweepReport:
    """Which averages were tried, and what became the output.

    Attributes:
        greedy: Whether it was a greedy soup; else a sweep over the last 1, 2, 3, …
        scale: What was measured, and which way is better.
        paths: The checkpoints, in their order.
        singles: The score of each, as it is.
        tried: The averages, in the order in which they were tried.
        best: Which of them is the output.
        average: How the output was averaged.
        batchnorm: Its BatchNorm statistics, if they were recomputed.
        notes: What the user should know about these.
    """

    greedy: bool
    scale: Scale
    paths: tuple[str, ...]
    singles: tuple[float, ...]
    tried: tuple[Tried, ...]
    best: int
    average: Report
    batchnorm: BatchNormReport | None
    notes: tuple[str, ...] = ()

    def noting(self, notes: tuple[str, ...]) -> SweepReport:
        """Return the same, with more notes about the output."""
        average = replace(self.average, notes=(*self.average.notes, *notes))
        return replace(self, average=average)

    @property
    def winner(self) -> Tried:
        """The average that is the output."""
        return self.tried[self.best]

    def added(self, place: int) -> int:
        """Return which checkpoint an average has that those before it had not tried yet."""
        before = {member for one in self.tried[:place] for member in one.members}
        (new,) = set(self.tried[place].members) - before
        return new

    def to_dict(self) -> dict[str, object]:
        """Return it as what JSON can hold: the report of the output, and the search."""
        search = {
            "greedy": self.greedy,
            "metric": self.scale.name,
            "mode": self.scale.mode,
            "singles": [
                {"path": path, "score": score}
                for path, score in zip(self.paths, self.singles, strict=True)
            ],
            "tried": [
                {"checkpoints": [self.paths[number] for number in one.members]}
                | {"count": len(one.members), "score": one.score, "best": one is self.winner}
                for one in self.tried
            ],
        }
        content = self.average.to_dict() | {"search": search}
        if self.batchnorm is None:
            return content
        stale = {"stale": bool(self.batchnorm.unreached)}
        said = {"batchnorm": self.batchnorm.to_json(), "batchnorm_notes": list(self.notes)}
        return content | stale | said


@dataclass(frozen=True)
class Found:
    """The best average, in a file that is not committed yet.

    Attributes:
        file: Becomes the output when it is committed.
        averaging: How it was averaged.
        report: What was tried.
    """

    file: File
    averaging: Averaging
    report: SweepReport


@dataclass(frozen=True)
class Candidate:
    """An average that is judged, in a file that is not committed."""

    file: File
    averaging: Averaging
    report: Report
    members: tuple[int, ...]
    score: float
    batchnorm: tuple[BatchNormReport, tuple[str, ...]] | None


class Bench:
    """Where checkpoints and averages are judged, one after the other.

    Args:
        judge: Who judges.
        bn: Who recomputes the BatchNorm statistics of each average, if that is wanted.
        progress: Is told of each step.
    """

    def __init__(
        self, judge: Judge, bn: Session | None = None, progress: Progress | None = None
    ) -> None:
        self._judge = judge
        self._bn = bn
        self._progress = progress
        self._done = 0

    @property
    def scale(self) -> Scale:
        """What is measured; known when something has been."""
        return self._judge.scale

    def begin(self, step: str) -> None:
        """Say what comes now."""
        if self._progress:
            self._progress(self._done, step)
        self._done += 1

    def singles(self, states: Sequence[StateDict]) -> tuple[float, ...]:
        """Return the score of each checkpoint as it is."""
        scores = []
        for state in states:
            path = str(state.checkpoint.path)
            self.begin(path)
            scores.append(self._judge.score(state, path))
        return tuple(scores)

    def candidate(
        self, file: File, averaging: Averaging, report: Report, members: Iterable[int], whose: str
    ) -> Candidate:
        """Judge an average, when its BatchNorm statistics are recomputed."""
        self.begin(whose)
        options = averaging.options
        # Our own output holds nothing but the state_dict.
        key, ema = (options.key, options.ema) if options.keep_wrapper else ((), None)
        batchnorm = self._bn.recompute(file, key, ema) if self._bn else None
        checkpoint = open_checkpoint(file.path)
        try:
            score = self._judge.score(find_state_dict(checkpoint, key, ema), whose)
        finally:
            checkpoint.close()
        return Candidate(file, averaging, report, tuple(members), score, batchnorm)
