"""Averaging by several ranks: each computes a part of the output, and rank 0 completes it.

Every rank reads the headers and plans the average; the ranks compare their plans. Rank 0
creates the output file and the others open it. Each rank takes an equal part of the bytes,
which is one contiguous range of the output, writes its means, forces them to disk and sends
its checksums and other findings to rank 0. Rank 0 verifies the whole output as a single
process does, writes the headers and commits. An error on one rank ends all of them, and no
output is created.

If the output is a URL, rank 0 averages alone, because it writes to a local file first.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import swa_avg
from swa_avg.averaging.computing import usable_cores
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.report import Report
from swa_avg.averaging.torchrun import ProcessRanks
from swa_avg.checkpoints import StateDict
from swa_avg.errors import SwaAvgError
from swa_avg.kernel import Findings, Kernel, Records, compute, conclude, share, works_in
from swa_avg.planning import ranges_of
from swa_avg.progress import Counter, Watch
from swa_avg.storage import (
    ROOM,
    InputFile,
    JoinedOutput,
    OutputFile,
    RemoteFile,
    reading_ahead,
)

_CHECK_SECONDS = 0.5


@contextmanager
def written(
    averaging: Averaging,
    ranks: ProcessRanks,
    *,
    threads: int | None = None,
    progress: Watch | None = None,
) -> Iterator[tuple[OutputFile, Report] | None]:
    """Average on all ranks; an output that is not committed is removed at the end.

    Args:
        averaging: The average as this rank has planned it.
        ranks: The ranks, all of which call this function.
        threads: The number of threads of this rank; by default its part of the cores.
        progress: Called with the progress of this rank.

    Yields:
        On rank 0 the complete but uncommitted file and the report; on the others None, when
        their part is done.

    Raises:
        SwaAvgError: One of the ranks failed; raised on all ranks.
    """
    threads = threads or max(1, usable_cores() // ranks.neighbours)
    together = _Together(averaging, ranks, threads, _agreed(averaging, ranks, threads), progress)
    if ranks.rank == 0:
        with averaging.open_output() as file:
            yield file, together.lead(file)
    else:
        together.follow()
        yield None


@dataclass(frozen=True)
class _Together:
    """The work of one rank.

    Attributes:
        averaging: The average as this rank has planned it.
        ranks: The ranks of the run.
        threads: The number of threads of this rank.
        of_all: The number of threads of all ranks.
        progress: Called with the progress of this rank.
    """

    averaging: Averaging
    ranks: ProcessRanks
    threads: int
    of_all: int
    progress: Watch | None

    def lead(self, file: OutputFile) -> Report:
        """Share the output with the other ranks, and complete it from all parts (rank 0)."""
        if isinstance(file, RemoteFile):
            self.ranks.tell()
            outcome = self.averaging.compute(file, threads=self.threads, progress=self._watch())
            return self.averaging.complete(file, outcome, self.progress)
        # Some systems reserve space by writing zeros, which must end before other ranks write.
        file.sync()
        self.ranks.tell(os.fsencode(file.path.name))
        kernel = self.averaging.kernel(file)
        findings = self._compute(kernel)
        records = Records(kernel.works)
        for data in self.ranks.collect(b"")[1:]:
            findings.merge(json.loads(data), records)
        outcome = conclude(kernel, findings, self.threads)
        return self.averaging.complete(file, outcome, self.progress)

    def follow(self) -> None:
        """Compute and write this rank's part (all ranks but 0)."""
        name = os.fsdecode(self.ranks.tell())
        if not name:
            return
        target, layout = self.averaging.output, self.averaging.layout
        path = Path(os.path.realpath(target)).with_name(name)
        with JoinedOutput(path, target, dict(layout.files) or {"": layout.size}) as file:
            kernel = self.averaging.kernel(file)
            findings = self._compute(kernel).plain(Records(kernel.works))
            file.sync()
        for source in self.averaging.files:
            source.check_unchanged()
        self.ranks.collect(json.dumps(findings, separators=(",", ":")).encode())

    def _compute(self, kernel: Kernel) -> Findings:
        """Compute and write this rank's part."""
        works, ranks = kernel.works, self.ranks
        dealt = share(kernel.tasks(self.of_all), works, ranks.rank, ranks.world)
        ranges = ranges_of(works[number] for number in works_in(dealt))
        with reading_ahead(ranges, self.threads, len(self.averaging.states), ROOM):
            return compute(kernel, dealt, self.threads, self._watch())

    def _watch(self) -> Callable[[int], None]:
        """Return a function that counts bytes, and raises if another rank has failed."""
        size = self.averaging.plan.bytes_to_read // self.ranks.world
        counter = Counter(self.progress, "averaging", size)
        next_check = 0.0

        def watched(count: int) -> None:
            nonlocal next_check
            counter(count)
            if time.monotonic() >= next_check:
                self.ranks.check()
                next_check = time.monotonic() + _CHECK_SECONDS

        return watched


def _agreed(averaging: Averaging, ranks: ProcessRanks, threads: int) -> int:
    """Check that all ranks have the same plan; return the number of their threads.

    Raises:
        SwaAvgError: The files or the options differ between the ranks.
    """
    mine = {
        "version": swa_avg.__version__,
        "inputs": [_seen(state) for state in averaging.states],
        "plan": _digest(averaging),
        "threads": threads,
    }
    total = 0
    for rank, data in enumerate(ranks.collect(json.dumps(mine).encode())):
        other = json.loads(data)
        total += other["threads"]
        difference = _difference(mine, other)
        if difference:
            raise SwaAvgError(
                f"rank {rank} has another plan than rank 0: {difference}",
                remedy="Give all ranks the same files, options and version of swa-avg",
            )
    return int(ranks.tell(str(total).encode()))


def _difference(mine: dict[str, Any], other: dict[str, Any]) -> str:
    """Describe how two plans differ; return an empty string if they are the same."""
    if mine["version"] != other["version"]:
        return f"it runs swa-avg {other['version']}, not {mine['version']}"
    if len(mine["inputs"]) != len(other["inputs"]):
        return f"it averages {len(other['inputs'])} checkpoints, not {len(mine['inputs'])}"
    for one, another in zip(mine["inputs"], other["inputs"], strict=True):
        if one != another:
            return f"it reads {another[0]} of {another[1]} bytes, not {one[0]} of {one[1]}"
    return "" if mine["plan"] == other["plan"] else "the headers or the options differ"


def _seen(state: StateDict) -> list[object]:
    """Return the name and the size of a checkpoint, for the message."""
    checkpoint = state.checkpoint
    return [checkpoint.path.name, sum(file.size for file in checkpoint.files)]


def _digest(averaging: Averaging) -> str:
    """Return a digest that is equal only for the same inputs, computation and output.

    Paths are left out: machines may mount folders elsewhere or use copies. For records
    without a checksum the modification time is included, to detect different contents.
    """
    digest = hashlib.sha256()

    def note(*facts: object) -> None:
        digest.update(repr(facts).encode("utf-8", "surrogatepass"))

    note(averaging.options.described, averaging.options.distances, averaging.options.keep_wrapper)
    note(averaging.counts, averaging.layout.size, dict(averaging.layout.files))
    places: dict[InputFile, int] = {}
    for work, place in zip(averaging.plan.works, averaging.layout.places, strict=True):
        note(work.name, work.treatment.value, work.shape, work.dtype.name, work.weights, place)
        for source in work.sources:
            note(source.dtype.name, source.shape, source.stride, source.offset)
            note([(part.start, part.ref.shape, part.ref.offset) for part in source.parts])
            for record in source.records:
                file = places.setdefault(record.file, len(places))
                written = record.file.modified if record.crc32 is None else None
                note(file, record.file.start, record.offset, record.length, record.crc32, written)
    return digest.hexdigest()
