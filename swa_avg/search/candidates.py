"""Candidate averages: scores each one in its temporary file and reports all of them.

Does not choose the candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from swa_avg.averaging import Averaging, Report
from swa_avg.batchnorm import BatchNormReport, Session
from swa_avg.checkpoints import StateDict, find_state_dict
from swa_avg.errors import counted
from swa_avg.formats import open_checkpoint
from swa_avg.progress import Progress, Watch
from swa_avg.search.scores import Judge, Scale
from swa_avg.storage import OutputFile


@dataclass(frozen=True)
class Tried:
    """The score of a candidate average.

    Attributes:
        members: The numbers of its checkpoints, from 0, in order.
        score: Its score.
    """

    members: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class SweepReport:
    """The scores of a search, and the average that became the output.

    Attributes:
        greedy: Whether the search was a greedy soup; otherwise a sweep over the last 1, 2, 3, …
        scale: The name of the score, and whether low or high is better.
        paths: The checkpoints, in order.
        singles: The score of each checkpoint on its own.
        tried: The averages, in the order in which they were scored.
        best: The index of the output in `tried`.
        average: The report of the output, BatchNorm statistics included.
    """

    greedy: bool
    scale: Scale
    paths: tuple[str, ...]
    singles: tuple[float, ...]
    tried: tuple[Tried, ...]
    best: int
    average: Report

    def __repr__(self) -> str:
        count = len(self.winner.members)
        return (
            f"SweepReport({self.output}: {counted(count, 'checkpoint')} of {len(self.paths)}, "
            f"{self.scale.name} {self.winner.score:.6g})"
        )

    def noting(self, notes: tuple[str, ...]) -> SweepReport:
        """Return a copy with more notes about the output."""
        average = replace(self.average, notes=(*self.average.notes, *notes))
        return replace(self, average=average)

    @property
    def output(self) -> str:
        """The path of the output."""
        return self.average.output

    @property
    def stale(self) -> bool:
        """Whether BatchNorm statistics of the output do not belong to its weights."""
        return self.average.stale

    @property
    def batchnorm(self) -> BatchNormReport | None:
        """The report of the output's BatchNorm statistics, or None if they are as they were."""
        return self.average.batchnorm

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the output, its BatchNorm statistics included."""
        return (*self.average.notes, *self.average.batchnorm_notes)

    @property
    def winner(self) -> Tried:
        """The average that is the output."""
        return self.tried[self.best]

    def added(self, place: int) -> int:
        """Return the one checkpoint of an average that no earlier average contains."""
        before = {member for one in self.tried[:place] for member in one.members}
        (new,) = set(self.tried[place].members) - before
        return new

    def to_dict(self) -> dict[str, object]:
        """Return a dict for JSON: the report of the output, and the search."""
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
        return self.average.to_dict() | {"search": search}


@dataclass(frozen=True)
class Found:
    """The best average, in a file that is not committed yet.

    Attributes:
        file: The temporary file, which becomes the output when it is committed.
        averaging: The plan of the average.
        report: The report of the search.
    """

    file: OutputFile
    averaging: Averaging
    report: SweepReport


@dataclass(frozen=True)
class Candidate:
    """A scored average, in a file that is not committed."""

    file: OutputFile
    averaging: Averaging
    report: Report
    members: tuple[int, ...]
    score: float


class Bench:
    """Scores checkpoints and averages, one after the other.

    Args:
        judge: Loads weights into the model and calls `evaluate`.
        bn: Recomputes the BatchNorm statistics of each average; None leaves them as they are.
        watch: Called with the progress.

    Attributes:
        watch: Called with the progress.
    """

    def __init__(self, judge: Judge, bn: Session | None = None, watch: Watch | None = None) -> None:
        self._judge = judge
        self._bn = bn
        self.watch = watch
        self._scored = 0
        self._total = 0
        self._alone: dict[str, float] = {}

    @property
    def scale(self) -> Scale:
        """The scale of the scores; known after the first one."""
        return self._judge.scale

    def singles(self, states: Sequence[StateDict], averages: int) -> tuple[float, ...]:
        """Return the score of each checkpoint on its own.

        Args:
            states: The checkpoints.
            averages: The number of averages that will be scored after them.
        """
        self._total = len(states) + averages
        paths = [str(state.checkpoint.path) for state in states]
        for path, state in zip(paths, states, strict=True):
            self._alone[path] = self._score(state, path)
        return tuple(self._alone[path] for path in paths)

    def _score(self, state: StateDict, label: str) -> float:
        """Return the score of a state_dict, and report what is being scored."""
        if self.watch:
            self.watch(Progress(f"scoring {label}", self._scored, self._total, "model"))
        self._scored += 1
        return self._judge.score(state, label)

    def candidate(
        self,
        file: OutputFile,
        averaging: Averaging,
        report: Report,
        members: Iterable[int],
        label: str,
    ) -> Candidate:
        """Score an average, after recomputing its BatchNorm statistics if that is wanted.

        The average of one checkpoint is that checkpoint, which has been scored already, unless
        its BatchNorm statistics or its dtype are others.
        """
        options = averaging.options
        if self._bn:
            report = report.recomputed(*self._bn.recompute(file, *averaging.found_at, self.watch))
        if len(averaging.states) == 1 and not self._bn and options.keeps_values:
            self._scored += 1
            score = self._alone[str(averaging.states[0].checkpoint.path)]
        else:
            with _stored(file, averaging) as state:
                score = self._score(state, label)
        return Candidate(file, averaging, report, tuple(members), score)

    def load(self, file: OutputFile, averaging: Averaging) -> None:
        """Load an average into the model."""
        with _stored(file, averaging) as state:
            self._judge.load(state)


@contextmanager
def _stored(file: OutputFile, averaging: Averaging) -> Iterator[StateDict]:
    """Open the state_dict of an average in its file."""
    checkpoint = open_checkpoint(file.path)
    try:
        yield find_state_dict(checkpoint, *averaging.found_at)
    finally:
        checkpoint.close()
