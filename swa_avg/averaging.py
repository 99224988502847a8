"""The conductor: from the names of checkpoints to one averaged file and a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from swa_avg import wrapper
from swa_avg.errors import MismatchError, OutputError, SwaAvgError
from swa_avg.formats import (
    Form,
    Layout,
    form_of,
    layout_for,
    open_checkpoint,
)
from swa_avg.layout import StateDict, find_state_dict
from swa_avg.metrics import Score
from swa_avg.output import (
    AtomicFile,
    AtomicFolder,
    Output,
    check_replaceable,
    check_target,
)
from swa_avg.plan import Plan, Rules, make_plan
from swa_avg.select import ALL, Choice, Selection, expand, select
from swa_avg.tensors import DTYPES, Kind

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
_FOLDERS = (Form.FOLDER, Form.DCP)
BN_BUFFERS = ("last", "first", "mean", "reset")
OUTPUT_DTYPES = ("keep", "float32", "bfloat16", "float16")


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
        score: The metric that it was chosen by, or None.
    """

    path: str
    epoch: int | None
    step: int | None
    where: str
    prefix: str
    size: int
    score: Score | None = None

    @property
    def recorded(self) -> dict[str, int]:
        """What the checkpoint records of its place in the run."""
        recorded = {"epoch": self.epoch, "step": self.step}
        return {name: value for name, value in recorded.items() if value is not None}


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        output: The file that was written.
        inputs: The checkpoints that were averaged, in their order.
        counts: How many tensors were treated how: averaged, kept (BatchNorm buffers
            of one checkpoint), reset, copied (no mean).
        stale: Whether BatchNorm statistics do not belong to the averaged weights.
        bytes_read: Bytes of tensors read.
        bytes_written: The size of the output.
        notes: What else the user should know.
    """

    output: str
    inputs: tuple[Input, ...]
    counts: dict[str, int]
    stale: bool
    bytes_read: int
    bytes_written: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, object]:
        """Return it as what JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Averaging:
    """An average that is planned: all headers are read and agree, no tensor is.

    Attributes:
        output: The file that will be written.
        selection: The checkpoints, in their order.
        plan: What happens to each tensor.
        layout: Where everything goes in the output.
    """

    output: Path
    selection: Selection
    plan: Plan
    layout: Layout

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The checkpoints that take part, for people."""
        return tuple(
            Input(
                path=str(state.checkpoint.path),
                epoch=state.epoch,
                step=state.step,
                where=state.where,
                prefix=state.prefix,
                size=sum(file.size for file in state.checkpoint.files),
                score=self.selection.scores.get(state.checkpoint.path),
            )
            for state in self.selection.chosen
        )

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of files."""
        return bool(self.layout.files)

    def open_output(self) -> AtomicFile | AtomicFolder:
        """Make room for the output, which comes into being when it is committed.

        Raises:
            OutputError: It cannot be written there, or there is no room.
        """
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
        from swa_avg.mean import Kernel, run

        kernel = Kernel(file, self.layout.places, self.plan.works)
        outcome = run(kernel, threads or usable_cores(), progress)
        for place, data in self.layout.headers(outcome.checksums):
            file.write(data, place)
        for state in self.selection.chosen:
            for source in state.checkpoint.files:
                source.check_unchanged()
        return self._report(outcome.bytes_read, self._differing(outcome.differing))

    def _differing(self, names: tuple[str, ...]) -> list[str]:
        """Say which copied tensors are not the same everywhere; refuse those of no meaning."""
        dtypes = {tensor.name: tensor.dtype for tensor in self.plan.tensors}
        for name in names:
            if dtypes[name].kind is Kind.OPAQUE:
                raise MismatchError(
                    [
                        SwaAvgError(
                            f"differs between checkpoints, and {dtypes[name]} cannot be averaged",
                            tensor=name,
                        )
                    ]
                )
        last = self.selection.chosen[-1].checkpoint.path
        return [f"{name}: differs between checkpoints; taken from {last}" for name in names]

    def _report(self, bytes_read: int, differing: list[str]) -> Report:
        return Report(
            output=str(self.output),
            inputs=self.inputs,
            counts=self.plan.counts,
            stale=self.plan.stale,
            bytes_read=bytes_read,
            bytes_written=self.layout.size,
            notes=(*self.notes, *differing),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before anything is averaged."""
        last = self.selection.chosen[-1].checkpoint.path
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
            "notes": list(self.notes),
        }


@contextmanager
def planned(
    checkpoints: Paths,
    output: str | os.PathLike[str],
    *,
    bn_buffers: str = "last",
    dtype: str = "keep",
    force: bool = False,
    key: str | Sequence[str] = (),
    ema: bool = False,
    keep_wrapper: bool = False,
    max_shard_size: int | None = None,
    choice: Choice = ALL,
) -> Iterator[Averaging]:
    """Open checkpoints and plan their average; they are closed at the end of the context.

    Args:
        checkpoints: Files, or patterns of them.
        output: What to write. `.safetensors` gives safetensors; `.pt`, `.pth`, `.ckpt`,
            `.bin` and `.tar` a torch zip; another name the form of the inputs.
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

    Raises:
        SwaAvgError: Anything that makes the average impossible.
        ValueError: An option has no such value.
    """
    if bn_buffers not in BN_BUFFERS or dtype not in OUTPUT_DTYPES:
        raise ValueError(f"no such option: bn_buffers={bn_buffers!r}, dtype={dtype!r}")
    if keep_wrapper and dtype != "keep":
        raise ValueError("a file that is kept keeps its dtypes too")
    given = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints
    target = Path(output)
    with ExitStack() as opened:
        states: list[StateDict] = []
        for path in expand(given, choice.exclude):
            checkpoint = open_checkpoint(path)
            opened.callback(checkpoint.close)
            states.append(find_state_dict(checkpoint, key, ema))
        selection = select(states, choice)
        files = [file for state in selection.chosen for file in state.checkpoint.files]
        last = selection.chosen[-1]
        form = form_of(target, last.checkpoint)
        folder = last.checkpoint.path.is_dir() if keep_wrapper else form in _FOLDERS
        _check_form(target, last, form, keep_wrapper, max_shard_size)
        check_target(target, files, force=force, folder=folder)
        strides = keep_wrapper or form is Form.TORCH
        plan = make_plan(selection.chosen, Rules(bn_buffers, DTYPES.get(dtype), strides))
        if keep_wrapper:
            layout: Layout = wrapper.layout(last, plan, lambda file: opened.callback(file.close))
        else:
            layout = layout_for(form, plan.state_dict, last.checkpoint, last.where, max_shard_size)
        yield Averaging(target, selection, plan, layout)


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
    bn_buffers: str = "last",
    dtype: str = "keep",
    force: bool = False,
    key: str | Sequence[str] = (),
    ema: bool = False,
    keep_wrapper: bool = False,
    max_shard_size: int | None = None,
    choice: Choice = ALL,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Average checkpoints into one file.

    Each floating tensor becomes the equal-weight mean over the checkpoints
    (Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization", section 3; the mean that `torch.optim.swa_utils.AveragedModel`
    keeps running), computed exactly and rounded once.

    Args:
        checkpoints: Files, or patterns of them.
        output: What to write. `.safetensors` gives safetensors; `.pt`, `.pth`, `.ckpt`,
            `.bin` and `.tar` a torch zip; another name the form of the inputs.
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
        threads: How many threads work; by default one for each usable core.
        progress: Called with the number of bytes read since the last call.

    Returns:
        What was done.

    Raises:
        SwaAvgError: Nothing was written; the error says why.
        ValueError: An option has no such value.
    """
    with (
        planned(
            checkpoints,
            output,
            bn_buffers=bn_buffers,
            dtype=dtype,
            force=force,
            key=key,
            ema=ema,
            keep_wrapper=keep_wrapper,
            max_shard_size=max_shard_size,
            choice=choice,
        ) as averaging,
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
