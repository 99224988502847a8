"""A planned average, and its execution: writes the output and returns a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from swa_avg.averaging import wrapper
from swa_avg.averaging.computing import computed, usable_cores
from swa_avg.averaging.distances import distances, groups
from swa_avg.averaging.origin import counts_of, how_made
from swa_avg.averaging.report import STALE, Input, Report, input_of, versions
from swa_avg.averaging.verification import Written, read_back, verify
from swa_avg.checkpoints import (
    UNKNOWN,
    StateDict,
    fingerprints,
)
from swa_avg.errors import MismatchError, counted, in_bytes, listed
from swa_avg.formats import FolderLayout, Layout
from swa_avg.kernel import buffer_bytes
from swa_avg.planning import (
    Base,
    Options,
    Plan,
    Rules,
    Selection,
    check_arguments,
)
from swa_avg.progress import Counter, Watch
from swa_avg.storage import (
    AtomicFile,
    AtomicFolder,
    InputFile,
    Output,
    OutputFile,
    RemoteFile,
    check_replaceable,
    is_remote,
)

if TYPE_CHECKING:
    from swa_avg.batchnorm import BatchNorm
    from swa_avg.kernel import Kernel, Outcome


@dataclass(frozen=True)
class Averaging:
    """A planned average: all headers are read and agree, and no tensor has been read.

    Attributes:
        output: The path of the output.
        options: The options of the average.
        bases: The averages of `start_from`.
        selection: The checkpoints, in order.
        rules: The rules for the treatment of tensors.
        plan: The treatment of each tensor.
        layout: The places of tensors and headers in the output.
        known: The fingerprints of `states`, if the headers contain them.
    """

    output: Path
    options: Options
    bases: tuple[Base, ...]
    selection: Selection
    rules: Rules
    plan: Plan
    layout: Layout
    known: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"Averaging({self.output}: {counted(len(self.states), 'checkpoint')}, "
            f"{counted(len(self.plan.tensors), 'tensor')}, "
            f"{in_bytes(self.plan.bytes_to_read)} to read, {in_bytes(self.layout.size)} to write)"
        )

    @property
    def states(self) -> tuple[StateDict, ...]:
        """All inputs, in order: the averages of `start_from`, then the checkpoints."""
        return (*(base.state for base in self.bases), *self.selection.chosen)

    @property
    def files(self) -> Iterator[InputFile]:
        """The files of all inputs."""
        return (file for state in self.states for file in state.checkpoint.files)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of checkpoints that each of `states` counts as; negative if subtracted."""
        return counts_of(self.bases, self.selection.chosen)

    @property
    def found_at(self) -> tuple[Sequence[str], bool | None]:
        """The `key` and the `ema` with which the state_dict of the output is found.

        A copy of the last checkpoint has its state_dict where the checkpoint has it.
        """
        key = self.options.key
        keys = (key,) if isinstance(key, str) else tuple(key)
        return (keys, self.options.ema) if self._is_copy else ((), None)

    @property
    def _is_copy(self) -> bool:
        return isinstance(self.layout, wrapper.WrapperLayout)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """Descriptions of the inputs for the report."""
        return self._inputs(self.known)

    def _inputs(self, found: Iterable[str]) -> tuple[Input, ...]:
        scores = self.selection.scores
        return tuple(
            input_of(state, scores.get(state.checkpoint.path), count, fingerprint)
            for state, count, fingerprint in zip(self.states, self.counts, found, strict=True)
        )

    @property
    def buffer_bytes(self) -> int:
        """The memory for buffers, with one worker per core."""
        return buffer_bytes(self.plan.works, usable_cores())

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of files."""
        return bool(self.layout.files)

    def open_output(self) -> OutputFile:
        """Create the temporary file of the output; committing it creates the output.

        `write` does this too: only a caller that changes the file before the commit needs it.

        Raises:
            OutputError: The output cannot be written there, or the disk is full.
        """
        force = self.options.force
        if is_remote(self.output):
            return RemoteFile(self.output, self.layout.size, force=force)
        if self.is_folder:
            check_replaceable(self.output, self.layout.files)
            return AtomicFolder(self.output, self.layout.files, force=force)
        return AtomicFile(self.output, self.layout.size, force=force)

    def write(
        self,
        *,
        batchnorm: BatchNorm | None = None,
        threads: int | None = None,
        progress: Watch | None = None,
    ) -> Report:
        """Average, and write the output: it is complete when this method returns.

        Args:
            batchnorm: The batches and the model with which to recompute the BatchNorm
                statistics of the average; None leaves them as `bn_buffers` says.
            threads: The number of workers; by default one per usable core. Workers are
                forked processes if this process has no other thread, otherwise threads.
            progress: Called with a `Progress` at the start of each step and as it proceeds.

        Raises:
            SwaAvgError: Averaging failed, and nothing was written.
            TypeError: An argument is of the wrong type.
            ValueError: An argument is invalid, or the checkpoints are closed already.
        """
        check_arguments(batchnorm, threads)
        if any(file.closed for file in self.files):
            raise ValueError("the checkpoints are closed: call write() inside the with block")
        session = batchnorm.session() if batchnorm else None
        with self.open_output() as file:
            report = self.write_to(file, threads=threads, progress=progress)
            if session:
                recomputed = session.recompute(file, *self.found_at, progress)
                report = report.recomputed(*recomputed)
            notes = self.options.worded(file.commit(progress))
        return replace(report, notes=(*report.notes, *notes))

    def write_to(
        self, file: Output, *, threads: int | None = None, progress: Watch | None = None
    ) -> Report:
        """Average into a file that is not committed yet.

        Raises:
            SwaAvgError: An input is damaged, or its values have no mean.
        """
        count = Counter(progress, "averaging", self.plan.bytes_to_read)
        return self.complete(file, self.compute(file, threads=threads, progress=count), progress)

    def compute(
        self,
        file: Output,
        *,
        partials: Sequence[Output] = (),
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Compute and write all tensors; `complete` writes the headers afterwards.

        Args:
            file: The file to write to.
            partials: Files for the means of the last 1, 2, … checkpoints, one fewer than
                there are checkpoints; none by default.
            threads: The number of workers; by default one per usable core. Workers are
                forked processes if this process has no other thread, otherwise threads.
            progress: Called with the number of bytes read since the last call.

        Raises:
            SwaAvgError: An input is damaged, or its values have no mean.
        """
        works = self.plan.works
        return computed(works, self.files, lambda: self.kernel(file, partials), threads, progress)

    def kernel(self, file: Output, partials: Sequence[Output] = ()) -> Kernel:
        """Return the work for the kernel: what to compute and where to write it."""
        from swa_avg.kernel import Kernel

        _, groups = self._modules()
        works, places = self.plan.works, self.layout.places
        return Kernel(file, places, works, groups=groups, partials=partials)

    def complete(self, file: Output, outcome: Outcome, progress: Watch | None = None) -> Report:
        """Write the headers and verify the file.

        Args:
            file: The file, with all tensors.
            outcome: What `compute` returned.
            progress: Called with the progress.

        Raises:
            SwaAvgError: An input has changed, or the file was not written correctly.
        """
        from swa_avg.kernel import default_arithmetic

        with default_arithmetic():
            return self._completed(file, outcome, progress)

    def _completed(self, file: Output, outcome: Outcome, progress: Watch | None) -> Report:
        found = self.known
        if UNKNOWN in found:
            found = tuple(fingerprints(self.states, outcome.crcs))
        made = how_made(self.bases, self.selection.chosen, self.options, found[len(self.bases) :])
        provenance = made.text(self.plan.state_dict.provenance)
        count = Counter(progress, "writing headers")
        copied = self.layout.copied if isinstance(self.layout, wrapper.WrapperLayout) else ()
        try:
            for place, data in self.layout.headers(outcome.checksums, provenance):
                file.write(data, place)
                count(len(data))
        finally:  # a file that changed may look damaged
            for source in (*self.files, *copied):
                source.check_unchanged()
        self._verify(file, outcome.checksums, provenance, progress)
        return self._report(outcome, found)

    def _verify(
        self, file: Output, checksums: Sequence[int], provenance: str, progress: Watch | None
    ) -> None:
        """Compare the headers of the file with the plan; with `verify`, all of its bytes."""
        written = Written(
            path=file.path,
            target=self.output,
            states=self.states,
            plan=self.plan,
            layout=self.layout,
            wrapped=self._is_copy,
            checksums=checksums,
            headers=lambda: self.layout.headers(checksums, provenance),
        )
        if not self.options.verify:
            read_back(written)
            return
        file.sync(progress)
        verify(written, progress)

    def _modules(self) -> tuple[list[str], list[int]]:
        """Return the modules, and the module's number for each work; empty without distances."""
        if not self.options.distances:
            return [], []
        return groups([work.name for work in self.plan.works])

    def _differing(self, names: Sequence[str]) -> list[str]:
        """Return notes about copied tensors that differ; refuse those that must not."""
        planned = {tensor.name: tensor for tensor in self.plan.tensors}
        last = self.states[-1].checkpoint.path
        refused = [planned[name].refusal(last) for name in names if planned[name].must_agree]
        if refused:
            raise MismatchError(refused)
        return [
            f"{name}: differs between checkpoints; taken from {last}"
            for name in names
            if not planned[name].statistic
        ]

    def _frozen(self, differing: Sequence[str]) -> list[str]:
        """Return a note about layers that look frozen, if other layers do not."""
        same = self.plan.frozen_after(differing)
        if not same or not self.plan.stale_after(differing):
            return []
        moved = {name.rpartition(".")[0] for name in (*self.plan.statistics.unfit, *differing)}
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in same))
        layers = [layer for layer in layers if layer not in moved]
        if not layers:
            return []
        return [
            f"{listed(layers)}: BatchNorm statistics are the same in all checkpoints, so the "
            "layers may be frozen; --recompute-bn recomputes them too"
        ]

    def _report(self, outcome: Outcome, known: Sequence[str]) -> Report:
        differing = (*outcome.differing, *self.plan.unlike(outcome.crcs))
        inputs = self._inputs(known)
        modules, _ = self._modules()
        found = None
        if self.options.distances:
            grams = {modules[group]: gram for group, gram in outcome.grams.items()}
            squares = {modules[group]: square for group, square in outcome.squares.items()}
            found = distances(grams, squares, self.counts)
        far = found.notes([source.path for source in inputs]) if found else ()
        stale = self.plan.stale_after(differing)
        found_out = [*self._differing(differing), *self._frozen(differing), *far]
        found_out += [STALE] if stale else []
        return Report(
            output=str(self.output),
            inputs=inputs,
            counts=self.plan.counts,
            families=self.plan.families,
            stale=stale,
            bytes_read=outcome.bytes_read,
            bytes_written=self.layout.size,
            notes=(*self.notes, *self.options.worded(found_out)),
            distances=found,
            options=self.options.described,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user that are known before averaging."""
        last, folder = self.states[-1], self.is_folder
        around = wrapper.notes_on_bare(last, folder=folder)
        if self._is_copy:
            whole = self.options.keep_wrapper
            around = wrapper.notes_on_copy(last, folder=folder, whole=whole)
        layout = self.layout
        files = layout.notes if isinstance(layout, FolderLayout | wrapper.WrapperLayout) else ()
        return self.options.worded((*self.selection.notes, *self.plan.notes, *files, *around))

    def to_dict(self) -> dict[str, object]:
        """Return the plan as a dict for JSON."""
        return {
            "output": str(self.output),
            "inputs": [asdict(source) for source in self.inputs],
            "counts": self.plan.counts,
            "families": self.plan.families,
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "treatment": tensor.treatment.value,
                    "reason": tensor.reason,
                    "family": tensor.family,
                }
                for tensor in self.plan.tensors
            ],
            "stale": self.plan.stale,
            "bytes_to_read": self.plan.bytes_to_read,
            "bytes_to_write": self.layout.size,
            "buffer_bytes": self.buffer_bytes,
            "notes": list(self.notes),
            "options": self.options.described,
            "versions": versions(),
        }
