"""BatchNorm recompute of a file: between checkpoints, the user's code and `batchnorm.py`.

The weights of a file are loaded into the user's model, the model's BatchNorm
statistics are recomputed over the user's batches, and the new statistics go
into their places in the file. Every other byte of it stays as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from swa_avg.batchnorm.batches import Alone, Ranks, same_draws
from swa_avg.batchnorm.foreign import users_code
from swa_avg.batchnorm.statistics import (
    Amp,
    BatchNormReport,
    Estimator,
    recompute_batchnorm,
    recomputed_buffers,
)
from swa_avg.batchnorm.userdata import Fit, UserCode, load_weights, user_code
from swa_avg.checkpoints import StateDict, check_choice, find_state_dict, provenance
from swa_avg.errors import (
    DataError,
    LayoutError,
    NotFiniteError,
    OutputError,
    SwaAvgError,
    listed,
)
from swa_avg.formats import Checkpoint, open_checkpoint, patch
from swa_avg.kernel import default_arithmetic
from swa_avg.storage import AtomicFile, InputFile, RemoteFile, is_remote
from swa_avg.tensors import Record, TensorRef, is_dense, read_tensor, verify


@dataclass(frozen=True)
class Recompute:
    """What to recompute BatchNorm statistics with.

    Attributes:
        data: `MOD:ATTR` of the batches.
        model: `MOD:ATTR` of the model; by default `model` of the data's module.
        forward: `MOD:ATTR` of the forward function; by default `forward` of the
            data's module, where it has one.
        device: auto, cpu, cuda, cuda:i or mps.
        estimator: population or torch.
        amp: off, bf16 or fp16.
        batches: Stop after so many batches; None takes all.
        folder: Where the modules are looked for; by default the current folder.
    """

    data: str
    model: str | None = None
    forward: str | None = None
    device: str = "auto"
    estimator: Estimator = "population"
    amp: Amp = "off"
    batches: int | None = None
    folder: Path = field(default_factory=Path.cwd)


class Session:
    """The user's code, loaded, and the processes that share the work.

    Attributes:
        leads: Whether this process reads and writes the file. The others have
            no file; they `follow`.
        batches: How many batches there will be, or None where nobody knows.
        model: The model; after a recompute it has the file's weights.
    """

    def __init__(self, options: Recompute, code: UserCode, ranks: Ranks) -> None:
        self._options = options
        self._code = code
        self._ranks = ranks
        self._read = False
        self.leads = ranks.rank == 0
        self.model = code.model
        self.batches = _length(code.batches, options.batches)

    def recompute(
        self,
        file: AtomicFile | RemoteFile,
        key: Sequence[str] = (),
        ema: bool | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[BatchNormReport, tuple[str, ...]]:
        """Replace the BatchNorm statistics in a file that is not committed yet.

        May be called for several files: each gets the same batches, in the same order.

        Args:
            file: A whole checkpoint.
            key: The dotted path to its state_dict, or the paths, where it is not found.
            ema: Take the averaged weights that it holds.
            progress: Called after each batch with its number of samples.

        Returns:
            What changed, and notes for the user.

        Raises:
            DataError: The user's code failed or does not fit the file.
        """
        with ExitStack() as opened:
            opened.enter_context(_named_after(file))
            checkpoint = open_checkpoint(file.path)
            opened.callback(checkpoint.close)
            state = find_state_dict(checkpoint, key, ema)
            fit = load_weights(self._code.model, read_state(state))
            batches = self._batches()
            with same_draws(batches):
                report = self._run(batches, progress)
            buffers = recomputed_buffers(self._code.model, report)
            with default_arithmetic():
                contents = _replaced(state, fit, buffers)
            patches = list(patch(checkpoint, contents, self._said(checkpoint, report)))
            for place, data in patches:
                file.write(data, place)
            _read_back(file.path, patches, key, ema)
        return report, tuple(_notes(report, fit))

    def _said(self, checkpoint: Checkpoint, report: BatchNormReport) -> str:
        """Return what a file of ours says from now on of how it was made."""
        said = provenance.of(checkpoint)
        if said is None:
            return checkpoint.provenance
        made = {"estimator": self._options.estimator, "batches": report.batches}
        if report.samples is not None:
            made["samples"] = report.samples
        try:
            return replace(said, batchnorm=made).text(checkpoint.provenance)
        except ValueError:  # somebody has taken out the room that we left
            return checkpoint.provenance

    def follow(self) -> None:
        """Take this process's share of the batches, with the leader's weights."""
        self._run(self._batches(), None)

    def _batches(self) -> Iterable[Any]:
        """Return the batches from the first on: what can be read once only is made anew."""
        batches = self._code.batches
        if self._read and isinstance(batches, Iterator):
            batches = self._code.again()
        self._read = True
        return batches

    def _run(
        self, batches: Iterable[Any], progress: Callable[[int], None] | None
    ) -> BatchNormReport:
        model, options = self._code.model, self._options
        self._ranks.broadcast(list(model.state_dict(keep_vars=True).values()))
        return recompute_batchnorm(
            model,
            batches,
            device=options.device,
            estimator=options.estimator,
            forward=self._code.forward,
            amp=options.amp,
            max_batches=options.batches,
            progress=progress,
            ranks=self._ranks,
        )


@contextmanager
def _named_after(file: AtomicFile | RemoteFile) -> Iterator[None]:
    """Have errors name the file that is to come, not the temporary one it still is."""
    try:
        yield
    except SwaAvgError as error:
        if error.file == str(file.path):
            error.file = str(file.target)
        raise


@contextmanager
def session(options: Recompute, ranks: Ranks | None = None) -> Iterator[Session]:
    """Load the user's code.

    Args:
        options: Says where it is.
        ranks: The processes that share the work, if there are several.

    Raises:
        DataError: Something that the options name is not there, or of no use.
    """
    ranks = ranks or Alone()
    with user_code(
        options.data,
        model=options.model,
        forward=options.forward,
        once=ranks.once,
        folder=options.folder,
    ) as code:
        yield Session(options, code, ranks)


def choice_of(
    path: Path, key: Sequence[str] = (), ema: bool | None = None
) -> tuple[Sequence[str], bool | None]:
    """Return which weights of a file are meant: those that its average was put in, if it says so.

    Args:
        path: The file.
        key: The dotted path to its state_dict, or the paths, as the user gave them.
        ema: Whether the averaged weights are meant, as the user said.
    """
    if key or ema is not None or not path.is_file():
        return key, ema
    checkpoint = open_checkpoint(path)
    try:
        said = provenance.of(checkpoint)
        if said is None:
            return key, ema
        places, half = said.options.get("key", ()), said.options.get("ema")
        places = (places,) if isinstance(places, str) else places
        if isinstance(places, list | tuple) and half in (None, True, False):
            kept = tuple(map(str, places))
            find_state_dict(checkpoint, kept, half)
            return kept, half
    except LayoutError:  # the average was written without its wrapper
        pass
    finally:
        checkpoint.close()
    return key, ema


@contextmanager
def copy_of(
    path: Path, key: Sequence[str] = (), ema: bool | None = None
) -> Iterator[AtomicFile | RemoteFile]:
    """Give a copy of a checkpoint that takes its place when it is committed.

    Its bytes are checked against the checksums that it carries.

    Raises:
        SwaAvgError: It is not there, is no checkpoint, or is damaged.
    """
    if not path.exists():
        raise OutputError(
            "does not exist",
            file=path,
            expected="an average whose BatchNorm is to be recomputed",
            remedy="Give the checkpoints to average, or name a file with -o",
        )
    if path.is_dir():
        raise OutputError("is a folder", file=path, expected="a file that holds the average")
    checkpoint = open_checkpoint(path)
    try:
        state = find_state_dict(checkpoint, key, ema)
        check_choice(state, key, ema)
        (source,) = checkpoint.files
        verify((ref.record, name) for name, ref in state.tensors.items())
        with _replacement(path, source) as file:
            place = 0
            for chunk in source.chunks(0, source.size):
                file.write(chunk, place)
                place += len(chunk)
            source.check_unchanged()
            yield file
    finally:
        checkpoint.close()


def _replacement(path: Path, read: InputFile) -> AtomicFile | RemoteFile:
    """Open what takes the place of a file, as long as that is the one that was read."""
    if is_remote(path):
        return RemoteFile(path, read.size, over=read.source)
    return AtomicFile(path, read.size, over=read.source.state)


def read_state(state: StateDict) -> OrderedDict[str, Any]:
    """Read a state_dict, its values and its `_metadata` included."""
    read: dict[TensorRef, torch.Tensor] = {}
    made: OrderedDict[str, Any] = OrderedDict()
    for name in state.order:
        ref = state.tensors.get(name)
        if ref is None:
            made[name] = state.values[name]
            continue
        if ref not in read:
            read[ref] = read_tensor(ref)
        made[name] = read[ref]
    if state.metadata is not None:
        made._metadata = state.metadata  # type: ignore[attr-defined]
    return made


def _replaced(
    state: StateDict, fit: Fit, buffers: Mapping[str, torch.Tensor]
) -> dict[Record, bytes]:
    """Return the records that hold new BatchNorm buffers, with those in place."""
    contents: dict[Record, bytearray] = {}
    taken: dict[tuple[Record, int], tuple[TensorRef, str]] = {}
    for key, buffer in buffers.items():
        name = fit.in_state_dict(key)
        ref = state.tensors.get(name)
        if ref is None:  # num_batches_tracked, which files from before torch 0.4.1 lack
            continue
        record = ref.record
        if record not in contents:
            contents[record] = bytearray(record.file.read(record.offset, record.length))
        _check_own_place(name, ref, taken)
        dtype = getattr(torch, ref.dtype.name)
        new = buffer.detach().to("cpu", dtype)
        if not torch.isfinite(new).all():
            raise NotFiniteError(
                f"has a new statistic that {ref.dtype} cannot hold",
                tensor=name,
                remedy="Write a wider --dtype",
            )
        flat = torch.frombuffer(contents[record], dtype=dtype)
        flat.as_strided(ref.shape, ref.stride, ref.offset).copy_(new)
    return {record: bytes(data) for record, data in contents.items()}


def _read_back(
    path: Path, patches: Sequence[tuple[int, bytes]], key: Sequence[str], ema: bool | None
) -> None:
    """Read again what was replaced, and open the file as anybody will.

    Raises:
        SwaAvgError: It is not what was to be written.
    """
    checkpoint = open_checkpoint(path)
    try:
        find_state_dict(checkpoint, key, ema)
        (file,) = checkpoint.files
        for place, data in patches:
            if file.read(place, len(data)) != data:
                raise OutputError(f"is not what was to be written, at byte {place}", file=path)
    finally:
        checkpoint.close()


def _check_own_place(
    name: str, ref: TensorRef, taken: dict[tuple[Record, int], tuple[TensorRef, str]]
) -> None:
    """Refuse a buffer whose elements are another's too: there is no room for new ones.

    The same buffer of a layer that has several names is no other.
    """
    own = (ref, name.rpartition(".")[2])
    places = [(ref.record, ref.offset + at) for at in range(ref.extent)]
    shared = any(taken.get(place, own) != own for place in places)
    if shared or not is_dense(ref.shape, ref.stride):
        raise OutputError(
            "shares its elements, so that it has no room for new statistics",
            tensor=name,
            remedy="Average it to a new file with -o, or save it contiguous",
        )
    taken.update(dict.fromkeys(places, own))


def _notes(report: BatchNormReport, fit: Fit) -> Iterator[str]:
    """Yield what the user should know about the statistics."""
    if fit.dropped:
        yield f"the prefix {fit.dropped} of the file's names was dropped to fit the model"
    if fit.added:
        yield f"the prefix {fit.added} was put before the file's names to fit the model"
    for names, what in (
        (report.unreached, "reached by no batch; its statistics are as they were"),
        (report.frozen, "tracks no statistics; left alone"),
        (report.instance_norms, "InstanceNorm with running statistics; left alone"),
    ):
        if names:
            yield f"{listed(names)}: {what}"


def _length(batches: object, most: int | None) -> int | None:
    """Return how many batches there will be, where that can be known."""
    try:
        with users_code():
            count = len(batches)  # type: ignore[arg-type]
    except DataError:  # whatever a user's __len__ raises, a bar can do without it
        return most
    return count if most is None else min(count, most)
