"""The conductor: from the names of checkpoints to one averaged file and a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import swa_avg
from swa_avg import continuing, wrapper
from swa_avg.continuing import Base, base_of
from swa_avg.cutting import buffer_bytes
from swa_avg.distances import distances, groups
from swa_avg.errors import MismatchError, OutputError, SwaAvgError
from swa_avg.files import ROOM, announce, reading_ahead
from swa_avg.formats import Form, Headers, Layout, form_of, layout_for, open_checkpoint
from swa_avg.layout import Finder, StateDict
from swa_avg.output import (
    AtomicFile,
    AtomicFolder,
    Output,
    check_replaceable,
    check_target,
)
from swa_avg.plan import Plan, Rules, make_plan
from swa_avg.provenance import Provenance, fingerprints, refuse_repeats, sources_of
from swa_avg.remote import is_remote, path_of
from swa_avg.report import Input, Report, input_of
from swa_avg.select import ALL, Choice, Selection, expand, select
from swa_avg.tensors import DTYPES, Kind, Record
from swa_avg.upload import RemoteFile, check_remote_target
from swa_avg.verification import Written, read_back, verify

if TYPE_CHECKING:
    from swa_avg.mean import Outcome

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
_FOLDERS = (Form.FOLDER, Form.DCP)
_OPENERS = 16  # URLs that are opened at once
BN_BUFFERS = ("last", "first", "mean", "reset")
OUTPUT_DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Options:
    """How checkpoints are averaged; each default is what most want.

    Attributes:
        bn_buffers: Where BatchNorm statistics come from: last, first, mean or reset.
        dtype: What floating tensors are written in: keep, float32, bfloat16 or float16.
        force: Replace an output that exists.
        key: The dotted path to the state_dict in each checkpoint, where it is not found;
            or several paths, which make up one model.
        ema: Average the averaged weights (EMA, SWA) that the run has kept instead.
        keep_wrapper: Write the last checkpoint's own file, whatever its form, with only
            the averaged tensors replaced in it.
        max_shard_size: The most bytes of tensors in one file of a folder; by default 5 GB.
        choice: Which of the checkpoints are wanted; by default all.
        start_from: Averages to go on from, each of which weighs as much as all the
            checkpoints that it was made from.
        distances: Report how far the checkpoints lie from their mean.
        verify: Read all of the output again before it takes its place, and average a
            sample of its elements anew.

    Raises:
        ValueError: There is no such option, or two do not go together.
    """

    bn_buffers: str = "last"
    dtype: str = "keep"
    force: bool = False
    key: str | Sequence[str] = ()
    ema: bool = False
    keep_wrapper: bool = False
    max_shard_size: int | None = None
    choice: Choice = ALL
    start_from: Paths = ()
    distances: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.bn_buffers not in BN_BUFFERS or self.dtype not in OUTPUT_DTYPES:
            raise ValueError(f"no such option: {self.bn_buffers!r}, {self.dtype!r}")
        if self.keep_wrapper and self.dtype != "keep":
            raise ValueError("a file that is kept keeps its dtypes too")

    @property
    def described(self) -> dict[str, object]:
        """Those that the output's tensors depend on, where they are not the defaults."""
        names = ("bn_buffers", "dtype", "key", "ema")
        return {name: getattr(self, name) for name in names if self._is_set(name)}

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != getattr(Options, name))


@dataclass(frozen=True)
class Averaging:
    """An average that is planned: all headers are read and agree, no tensor is.

    Attributes:
        output: The file that will be written.
        options: How it is averaged.
        bases: The averages to go on from.
        selection: The checkpoints, in their order.
        rules: How tensors are treated.
        plan: What happens to each tensor.
        layout: Where everything goes in the output.
    """

    output: Path
    options: Options
    bases: tuple[Base, ...]
    selection: Selection
    rules: Rules
    plan: Plan
    layout: Layout

    @property
    def states(self) -> tuple[StateDict, ...]:
        """All that is averaged, in order: the averages to go on from, then the checkpoints."""
        return (*(base.state for base in self.bases), *self.selection.chosen)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many checkpoints each of `states` stands for."""
        return _counts(self.bases, self.selection.chosen)

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What is averaged, for people."""
        return self._inputs({})

    def _inputs(self, crcs: Mapping[Record, int]) -> tuple[Input, ...]:
        scores = self.selection.scores
        found = fingerprints(self.states, crcs)
        return tuple(
            input_of(state, scores.get(state.checkpoint.path), count, fingerprint)
            for state, count, fingerprint in zip(self.states, self.counts, found, strict=True)
        )

    @property
    def buffer_bytes(self) -> int:
        """The memory that averaging takes with a thread for each core, beside torch's own."""
        return buffer_bytes(self.plan.works, usable_cores())

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of files."""
        return bool(self.layout.files)

    def open_output(self) -> AtomicFile | AtomicFolder | RemoteFile:
        """Make room for the output, which comes into being when it is committed.

        Raises:
            OutputError: It cannot be written there, or there is no room.
        """
        if is_remote(self.output):
            return RemoteFile(self.output, self.layout.size)
        if self.is_folder:
            check_replaceable(self.output, self.layout.files)
            return AtomicFolder(self.output, self.layout.files)
        return AtomicFile(self.output, self.layout.size)

    def write(
        self,
        file: Output,
        *,
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Report:
        """Average into a file that is not committed yet.

        Raises:
            SwaAvgError: Damage, or numbers that have no mean.
        """
        return self.complete(file, self.compute(file, threads=threads, progress=progress))

    def compute(
        self,
        file: Output,
        *,
        partials: Sequence[Output] = (),
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Outcome:
        """Write all tensors; what is between them is missing yet: see `complete`.

        Args:
            file: Where to.
            partials: What takes the means of the last 1, 2, … checkpoints, if they are
                wanted: one less than there are checkpoints.
            threads: How many threads work; by default one for each usable core.
            progress: Called with the number of bytes read since the last call.

        Raises:
            SwaAvgError: Damage, or numbers that have no mean.
        """
        with ThreadPoolExecutor(1, "swa-avg-ahead") as pool:
            # The import of torch takes a second, in which a disk can read.
            pool.submit(announce, self.plan.ranges)
            from swa_avg.mean import Kernel, run

        _, groups = self._modules()
        works, places = self.plan.works, self.layout.places
        kernel = Kernel(file, places, works, groups=groups, partials=partials)
        threads = threads or usable_cores()
        with reading_ahead(self.plan.ranges, threads, len(self.states), ROOM):
            return run(kernel, threads, progress)

    def complete(self, file: Output, outcome: Outcome) -> Report:
        """Write what is no tensor, and make sure of the whole.

        Raises:
            SwaAvgError: An input has changed, or the file is not what it should be.
        """
        made = _provenance(self.bases, self.selection.chosen, self.options, outcome.crcs)
        said = made.text(self.plan.state_dict.provenance)
        for place, data in self.layout.headers(outcome.checksums, said):
            file.write(data, place)
        for state in self.states:
            for source in state.checkpoint.files:
                source.check_unchanged()
        self._prove(file, outcome.checksums, said)
        return self._report(outcome)

    def _prove(self, file: Output, checksums: Sequence[int], said: str) -> None:
        """Compare what is written with what was to be: the headers, or if wanted all of it."""
        written = Written(
            path=file.path,
            target=self.output,
            states=self.states,
            plan=self.plan,
            layout=self.layout,
            wrapped=isinstance(self.layout, wrapper.WrapperLayout),
            checksums=checksums,
            headers=lambda: self.layout.headers(checksums, said),
        )
        if not self.options.verify:
            read_back(written)
            return
        file.sync()
        verify(written)

    def _modules(self) -> tuple[list[str], list[int]]:
        """Return the modules whose distances are wanted, and the number of each work's."""
        if not self.options.distances:
            return [], []
        return groups([work.name for work in self.plan.works])

    def _differing(self, names: tuple[str, ...]) -> list[str]:
        """Say which copied tensors are not the same everywhere; refuse those of no meaning."""
        dtypes = {tensor.name: tensor.dtype for tensor in self.plan.tensors}
        last = self.states[-1].checkpoint.path
        for name in names:
            if dtypes[name].kind is Kind.OPAQUE:
                raise MismatchError(
                    [
                        SwaAvgError(
                            f"differs between checkpoints, and {dtypes[name]} cannot be averaged",
                            file=last,
                            tensor=name,
                        )
                    ]
                )
        return [f"{name}: differs between checkpoints; taken from {last}" for name in names]

    def _report(self, outcome: Outcome) -> Report:
        inputs = self._inputs(outcome.crcs)
        modules, _ = self._modules()
        found = None
        if self.options.distances:
            grams = {modules[group]: gram for group, gram in outcome.grams.items()}
            squares = {modules[group]: square for group, square in outcome.squares.items()}
            found = distances(grams, squares, self.counts)
        far = found.notes([source.path for source in inputs]) if found else ()
        return Report(
            output=str(self.output),
            inputs=inputs,
            counts=self.plan.counts,
            stale=self.plan.stale,
            bytes_read=outcome.bytes_read,
            bytes_written=self.layout.size,
            notes=(*self.notes, *self._differing(outcome.differing), *far),
            distances=found,
            options=self.options.described,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before anything is averaged."""
        last = self.states[-1].checkpoint.path
        kept = f"what else is in the file (optimizer state, for one) is that of {last}"
        wrapped = isinstance(self.layout, wrapper.WrapperLayout)
        return (*self.selection.notes, *self.plan.notes, *([kept] if wrapped else []))

    def to_dict(self) -> dict[str, object]:
        """Return it as what JSON can hold."""
        return {
            "output": str(self.output),
            "inputs": [asdict(source) for source in self.inputs],
            "counts": self.plan.counts,
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "treatment": tensor.treatment.value,
                    "reason": tensor.reason,
                }
                for tensor in self.plan.tensors
            ],
            "stale": self.plan.stale,
            "bytes_to_read": self.plan.bytes_to_read,
            "bytes_to_write": self.layout.size,
            "buffer_bytes": self.buffer_bytes,
            "notes": list(self.notes),
            "options": self.options.described,
            "version": swa_avg.__version__,
        }


def _counts(bases: Sequence[Base], chosen: Sequence[StateDict]) -> tuple[int, ...]:
    return (*(base.count for base in bases), *(1 for _ in chosen))


def _provenance(
    bases: Sequence[Base],
    chosen: Sequence[StateDict],
    options: Options,
    crcs: Mapping[Record, int],
) -> Provenance:
    """Say how the average is made; once tensors are read, for all that is in them.

    Raises:
        ProvenanceError: A checkpoint would count twice.
    """
    before = [source for base in bases for source in base.sources]
    added = sources_of(chosen, crcs)
    paths = [str(state.checkpoint.path) for state in chosen]
    refuse_repeats(before, zip(added, paths, strict=True))
    kept: object = options.bn_buffers
    if kept == "last":
        kept = "of the last checkpoint" if chosen else bases[-1].batchnorm
    return Provenance(swa_avg.__version__, (*before, *added), options.described, kept)


@contextmanager
def planned(
    checkpoints: Paths, output: str | os.PathLike[str], options: Options | None = None
) -> Iterator[Averaging]:
    """Open checkpoints and plan their average; they are closed at the end of the context.

    Args:
        checkpoints: Files, or patterns of them; none where averages are merged.
        output: What to write. `.safetensors` gives safetensors; `.pt`, `.pth`, `.ckpt`,
            `.bin` and `.tar` a torch zip; another name the form of the inputs.
        options: How to average; by default with the defaults.

    Raises:
        SwaAvgError: Anything that makes the average impossible.
    """
    options = options or Options()
    target = path_of(output)
    with ExitStack() as opened:
        averages = expand(_listed(options.start_from), ()) if options.start_from else []
        bases = tuple(map(base_of, _opened(averages, options, opened)))
        continuing.refuse_repeats(bases)
        given = _listed(checkpoints)
        paths = expand(given, options.choice.exclude) if given or not bases else []
        candidates = _without(_opened(paths, options, opened), bases)
        selection = select(candidates, options.choice) if candidates else Selection(())
        states = [*(base.state for base in bases), *selection.chosen]
        _check_target(target, states, options)
        form = form_of(target, states[-1].checkpoint)
        strides = options.keep_wrapper or form is Form.TORCH
        rules = Rules(options.bn_buffers, DTYPES.get(options.dtype), strides)
        plan = make_plan(states, rules, _counts(bases, selection.chosen))
        said = _provenance(bases, selection.chosen, options, {}).text()
        plan = replace(plan, state_dict=replace(plan.state_dict, provenance=said))
        layout = _layout(form, plan, states[-1], options, opened)
        yield Averaging(target, options, bases, selection, rules, plan, layout)


def _listed(paths: Paths) -> list[str | os.PathLike[str]]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)


def _opened(paths: Iterable[Path], options: Options, opened: ExitStack) -> list[StateDict]:
    """Open checkpoints and find their state_dicts."""
    paths, states = list(paths), []
    # What their headers have in common is read once.
    read, finder = partial(open_checkpoint, headers=Headers()), Finder(options.key, options.ema)
    with ThreadPoolExecutor(_OPENERS) as pool:
        # A request takes its time, so URLs are opened side by side.
        side_by_side = any(map(is_remote, paths))
        for checkpoint in (pool.map if side_by_side else map)(read, paths):
            opened.callback(checkpoint.close)
            states.append(finder.find(checkpoint))
    return states


def _without(states: Sequence[StateDict], bases: Sequence[Base]) -> list[StateDict]:
    """Leave out what is an average to go on from, as a pattern for both may say."""
    taken = {_identity(base.state) for base in bases}
    return [state for state in states if _identity(state) not in taken]


def _identity(state: StateDict) -> tuple[object, ...]:
    return tuple(file.identity for file in state.checkpoint.files)


def _layout(form: Form, plan: Plan, last: StateDict, options: Options, opened: ExitStack) -> Layout:
    """Give everything its place in the output."""
    if options.keep_wrapper:
        return wrapper.layout(last, plan, lambda file: opened.callback(file.close))
    return layout_for(form, plan.state_dict, last.checkpoint, last.where, options.max_shard_size)


def _check_target(target: Path, states: Sequence[StateDict], options: Options) -> None:
    """Refuse an output that is an input, exists, or is not of the form that its name says."""
    last = states[-1]
    form = form_of(target, last.checkpoint)
    keeps = options.keep_wrapper
    if keeps and last.checkpoint.provenance:
        raise OutputError(
            "is an average, and no checkpoint is given that could be kept",
            file=last.checkpoint.path,
            remedy="Leave out --keep-wrapper",
        )
    _check_form(target, last, form, keeps, options.max_shard_size)
    files = [file for state in states for file in state.checkpoint.files]
    folder = last.checkpoint.path.is_dir() if keeps else form in _FOLDERS
    check = check_remote_target if is_remote(target) else check_target
    check(target, files, force=options.force, folder=folder)


def _check_form(
    target: Path, last: StateDict, form: Form, keep_wrapper: bool, max_shard_size: int | None
) -> None:
    """Refuse a name that says another form than the output will have, and shards of one file."""
    safe = last.checkpoint.format == "safetensors"
    unlike = last.checkpoint.path.is_dir() and form not in _FOLDERS
    if keep_wrapper and (unlike or (form is Form.SAFETENSORS and not safe)):
        raise OutputError(
            f"would not be what its name says, but like {last.checkpoint.path}",
            file=target,
            remedy="Choose a name like its own, or leave out --keep-wrapper",
        )
    if max_shard_size and (keep_wrapper or form is not Form.FOLDER):
        raise OutputError(
            "will be no Hugging Face folder, which alone is written in shards",
            file=target,
            remedy="Leave out --max-shard-size, or give such folders",
        )


def average(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Report:
    """Average checkpoints into one file.

    Each floating tensor becomes the equal-weight mean over the checkpoints
    (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization", section 3; the mean that `torch.optim.swa_utils.AveragedModel`
    keeps running), computed exactly and rounded once.

    Args:
        checkpoints: Files, or patterns of them; none where averages are merged.
        output: What to write. `.safetensors` gives safetensors; `.pt`, `.pth`, `.ckpt`,
            `.bin` and `.tar` a torch zip; another name the form of the inputs.
        threads: How many threads work; by default one for each usable core.
        progress: Called with the number of bytes read since the last call.
        **options: The fields of `Options`, by name: `dtype="bfloat16"`.

    Returns:
        What was done.

    Raises:
        SwaAvgError: Nothing was written; the error says why.
        ValueError: An option has no such value.
    """
    with (
        planned(checkpoints, output, Options(**options)) as averaging,
        averaging.open_output() as file,
    ):
        report = averaging.write(file, threads=threads, progress=progress)
        file.commit()
    return report


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
