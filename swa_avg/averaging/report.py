"""What was averaged and how it went: the report, for people and for programs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import swa_avg
from swa_avg.averaging.distances import Distances
from swa_avg.checkpoints import UNKNOWN, Score, StateDict


@dataclass(frozen=True)
class Input:
    """A checkpoint that took part.

    Attributes:
        path: Its path as given.
        epoch: The epoch that it records, or None.
        step: The step that it records, or None.
        where: The dotted path to its state_dict; empty for the root.
        prefix: What was stripped from its names.
        size: Its bytes.
        modified: When it was last written, in seconds since 1970, where that is known.
        score: The metric that it was chosen by, or None.
        count: How many checkpoints it stands for: more than one if it is an average.
        fingerprint: What equal weights have in common, or None while they are not read.
    """

    path: str
    epoch: int | None
    step: int | None
    where: str
    prefix: str
    size: int
    modified: float | None
    score: Score | None = None
    count: int = 1
    fingerprint: str | None = None

    @property
    def recorded(self) -> dict[str, int]:
        """What the checkpoint records of its place in the run."""
        recorded = {"epoch": self.epoch, "step": self.step}
        return {name: value for name, value in recorded.items() if value is not None}


def input_of(state: StateDict, score: Score | None, count: int, fingerprint: str) -> Input:
    """Describe a checkpoint that takes part."""
    files = state.checkpoint.files
    return Input(
        path=str(state.checkpoint.path),
        epoch=state.epoch,
        step=state.step,
        where=state.where,
        prefix=state.prefix,
        size=sum(file.size for file in files),
        modified=max((file.modified for file in files if file.modified is not None), default=None),
        score=score,
        count=count,
        fingerprint=None if fingerprint == UNKNOWN else fingerprint,
    )


def versions() -> dict[str, str]:
    """Return the versions of what averages, without importing it."""
    from importlib import metadata

    return {
        "swa_avg": swa_avg.__version__,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        output: The file that was written.
        inputs: The checkpoints that were averaged, in their order.
        counts: How many tensors were treated how: averaged, kept (of one checkpoint), reset,
            copied (no mean).
        stale: Whether BatchNorm statistics do not belong to the averaged weights.
        bytes_read: Bytes of tensors read.
        bytes_written: The size of the output.
        notes: What else the user should know.
        distances: How far the checkpoints lie from the mean, if that was asked for.
        options: The options that were not the defaults.
        families: How many tensors of each family were taken from one checkpoint, or reset.
        versions: Those of swa-avg, torch and Python.
    """

    output: str
    inputs: tuple[Input, ...]
    counts: dict[str, int]
    stale: bool
    bytes_read: int
    bytes_written: int
    notes: tuple[str, ...]
    distances: Distances | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    families: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def to_dict(self) -> dict[str, object]:
        """Return it as what JSON can hold."""
        return asdict(self)
