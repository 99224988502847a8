"""The report of an average, and of the averages along a run."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import swa_avg
from swa_avg.averaging.distances import Distances
from swa_avg.checkpoints import UNKNOWN, Score, StateDict
from swa_avg.errors import as_parameters, counted, in_bytes

if TYPE_CHECKING:
    from swa_avg.batchnorm import BatchNormReport

STALE = "BatchNorm statistics do not fit the average; recompute them with --recompute-bn"


@dataclass(frozen=True)
class Input:
    """A checkpoint that took part.

    Attributes:
        path: Its path as given.
        epoch: The epoch that it records, or None.
        step: The step that it records, or None.
        where: The dotted path to its state_dict; empty for the root.
        prefix: The prefix that was stripped from its names.
        size: Its size in bytes.
        modified: The time of its last modification, in seconds since 1970, or None.
        score: The metric that it was chosen by, or None.
        count: The number of checkpoints that it counts as: more than one for an average,
            negative for one that is subtracted.
        fingerprint: A digest of its weights, or None if they have not been read yet.
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
        """The epoch and the step, if the checkpoint records them."""
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
    """Return the versions of swa-avg, torch and Python, without importing torch."""
    from importlib import metadata

    return {
        "swa_avg": swa_avg.__version__,
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Report:
    """The report of an average.

    Attributes:
        output: The path of the output.
        inputs: The checkpoints that were averaged, in order.
        counts: The number of tensors by treatment: averaged, kept (from one checkpoint),
            reset, copied (no mean).
        stale: Whether BatchNorm statistics do not belong to the averaged weights.
        bytes_read: The number of tensor bytes that were read.
        bytes_written: The size of the output.
        notes: Notes for the user.
        distances: The distances of the checkpoints from the mean, or None.
        options: The options that differ from the defaults.
        families: The number of tensors of each family that were kept or reset.
        batchnorm: The report of the recomputed BatchNorm statistics, or None.
        batchnorm_notes: Notes about them.
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
    batchnorm: BatchNormReport | None = None
    batchnorm_notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        count = sum(source.count for source in self.inputs)
        stale = "; BatchNorm statistics are stale" if self.stale else ""
        notes = len(self.notes) + len(self.batchnorm_notes)
        return (
            f"Report({self.output}: average of {counted(count, 'checkpoint')}, "
            f"{in_bytes(self.bytes_written)}{stale}"
            f"{'; ' + counted(notes, 'note') if notes else ''})"
        )

    @property
    def versions(self) -> dict[str, str]:
        """The versions of swa-avg, torch and Python."""
        return versions()

    def recomputed(self, batchnorm: BatchNormReport, notes: tuple[str, ...]) -> Report:
        """Return the report after the BatchNorm statistics of the average were recomputed."""
        return replace(
            self,
            stale=bool(batchnorm.unreached),
            notes=tuple(one for one in self.notes if one not in (STALE, as_parameters(STALE))),
            batchnorm=batchnorm,
            batchnorm_notes=notes,
        )

    def to_dict(self) -> dict[str, object]:
        """Return the report as a dict for JSON."""
        content = asdict(replace(self, batchnorm=None)) | {"versions": self.versions}
        if self.batchnorm is None:
            del content["batchnorm"], content["batchnorm_notes"]
            return content
        return content | {"batchnorm": self.batchnorm.to_dict()}


@dataclass(frozen=True)
class WindowsReport:
    """The report of averages along a run.

    Attributes:
        averages: The report of each average, in the order of the run. Its `bytes_read` are
            the bytes of its checkpoints, which other averages share.
        bytes_read: The number of tensor bytes that were read for all averages together.
        notes: Notes for the user on the choice of checkpoints; those on an average are in
            its own report.
    """

    averages: tuple[Report, ...]
    bytes_read: int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        last = self.averages[-1].output
        size = in_bytes(self.bytes_written)
        written = f"{size}, the last one {last}" if last else "not written"
        averages, stale = counted(len(self.averages), "average"), "; BatchNorm statistics are stale"
        return f"{type(self).__name__}({averages}, {written}{stale if self.stale else ''})"

    @property
    def stale(self) -> bool:
        """Whether BatchNorm statistics of some average do not belong to its weights."""
        return any(report.stale for report in self.averages)

    @property
    def bytes_written(self) -> int:
        """The size of all outputs together."""
        return sum(report.bytes_written for report in self.averages)

    def to_dict(self) -> dict[str, object]:
        """Return the report as a dict for JSON."""
        averages = [report.to_dict() for report in self.averages]
        for content in averages:
            del content["versions"]
        return {
            "averages": averages,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "notes": list(self.notes),
            "versions": versions(),
        }
