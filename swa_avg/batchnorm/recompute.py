"""Recomputes the BatchNorm statistics in a checkpoint with the user's model and batches.

The weights of a file or folder are loaded into the user's model, the BatchNorm statistics of
the model are recomputed over the user's batches, and the new statistics are written into the
checkpoint. All other bytes except the provenance are unchanged.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swa_avg.batchnorm.batches import Alone, Ranks, same_draws
from swa_avg.batchnorm.calling import Forward
from swa_avg.batchnorm.loading import batches_of
from swa_avg.batchnorm.settings import Recompute, Settings
from swa_avg.batchnorm.statistics import (
    Amp,
    BatchNormReport,
    Estimator,
    check_model,
    check_values,
    recompute_batchnorm,
    recomputed_buffers,
)
from swa_avg.batchnorm.userdata import Fit, UserCode, load_weights, user_code
from swa_avg.checkpoints import StateDict, find_state_dict, provenance
from swa_avg.errors import NotFiniteError, OutputError, SwaAvgError, kind_of, listed
from swa_avg.formats import Checkpoint, open_checkpoint, patch
from swa_avg.kernel import default_arithmetic
from swa_avg.pickles import Stream, rebuilt
from swa_avg.planning import suggesting
from swa_avg.progress import Watch
from swa_avg.storage import AtomicFolder, InputFile, OutputFile
from swa_avg.tensors import Record, TensorRef, View, is_dense, read_tensor


@suggesting
@dataclass(frozen=True)
class BatchNorm:
    """The batches and the model with which the BatchNorm statistics of an average are recomputed.

    Attributes:
        data: The training batches: what `--data` may name, such as a DataLoader, a list or a
            function that returns one. A generator is read once, which is enough for one
            average.
        model: The network. Afterwards it has the weights and the statistics of the average.
            `sweep` has its own parameter for it.
        forward: `forward(model, batch)` runs the model; the default is `default_forward`.
        device: auto, cpu, cuda, cuda:i or mps.
        estimator: population, or torch, which equals `torch.optim.swa_utils.update_bn`.
        amp: off, bf16 or fp16.
        max_batches: The maximum number of batches; None uses all.

    Raises:
        TypeError: The model or `forward` is of the wrong type, or a field has an unknown name.
        ValueError: A field has an invalid value.
    """

    data: Any
    model: nn.Module | None = None
    forward: Forward | None = None
    device: str = "auto"
    estimator: Estimator = "population"
    amp: Amp = "off"
    max_batches: int | None = None

    def __post_init__(self) -> None:
        check_values(self.estimator, self.amp, self.max_batches)
        if self.model is not None:
            check_model(self.model)
        if self.forward is not None and not callable(self.forward):
            kind = kind_of(self.forward)
            raise TypeError(f"forward must be a function forward(model, batch), not {kind}")

    def network(self, model: nn.Module | None = None) -> nn.Module:
        """Return a model, by default its own.

        Raises:
            ValueError: There is no model, or there are two.
        """
        if model is not None and self.model not in (None, model):
            raise ValueError("batchnorm has another model than the one that is scored")
        network = model if model is not None else self.model
        if network is None:
            raise ValueError("batchnorm needs a model: BatchNorm(data=..., model=...)")
        return network

    def session(self, model: nn.Module | None = None) -> Session:
        """Return a session of these batches and a model, by default its own.

        Raises:
            DataError: The data does not give batches.
            ValueError: There is no model, or there are two.
        """
        network = self.network(model)
        again = partial(batches_of, self.data, "data")
        settings = Settings(self.device, self.estimator, self.amp, self.max_batches)
        return Session(settings, UserCode(again(), network, self.forward, again), Alone())


class Session:
    """The user's loaded code, and the processes that share the work.

    Rank 0 reads and writes the file. The other ranks have no file and call `follow`.

    Attributes:
        model: The model; after a recompute it has the weights of the file.
    """

    def __init__(self, settings: Settings, code: UserCode, ranks: Ranks) -> None:
        self._settings = settings
        self._code = code
        self._ranks = ranks
        self._read = False
        self.model = code.model

    def recompute(
        self,
        file: OutputFile,
        key: Sequence[str] = (),
        ema: bool | None = None,
        progress: Watch | None = None,
    ) -> tuple[BatchNormReport, tuple[str, ...]]:
        """Replace the BatchNorm statistics in a file that is not committed yet.

        The method can be called for several files. Each gets the same batches in the same
        order.

        Args:
            file: A complete checkpoint, either a file or a folder.
            key: The dotted paths of its state_dict, if it is not found automatically.
            ema: Use the averaged weights in the checkpoint.
            progress: Called with the progress after each batch.

        Returns:
            The report of the recompute, and notes for the user.

        Raises:
            DataError: The user's code fails or does not match the file.
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
            patches = list(patch(checkpoint, contents, self._provenance(checkpoint, report)))
            starts = _starts(file)
            for path, place, data in patches:
                file.write(data, starts[path] + place)
            _read_back(file.path, patches, key, ema)
        return report, tuple(_notes(report, fit))

    def _provenance(self, checkpoint: Checkpoint, report: BatchNormReport) -> str:
        """Return the new provenance text of a checkpoint; empty if it has none."""
        before = provenance.of(checkpoint)
        if before is None:
            return checkpoint.provenance
        made = {"estimator": self._settings.estimator, "batches": report.batches}
        if report.samples is not None:
            made["samples"] = report.samples
        try:
            return replace(before, batchnorm=made).text(checkpoint.provenance)
        except ValueError:  # another program removed the padding of the provenance
            return checkpoint.provenance

    def follow(self) -> None:
        """Process the batches of this rank, with the weights of the leader."""
        self._run(self._batches(), None)

    def _batches(self) -> Iterable[Any]:
        """Return all batches from the start; an iterator that was read is created again."""
        batches = self._code.batches
        if self._read and isinstance(batches, Iterator):
            batches = self._code.again()
        self._read = True
        return batches

    def _run(self, batches: Iterable[Any], progress: Watch | None) -> BatchNormReport:
        model, settings = self._code.model, self._settings
        self._ranks.broadcast(list(model.state_dict(keep_vars=True).values()))
        return recompute_batchnorm(
            model,
            batches,
            device=settings.device,
            estimator=settings.estimator,
            forward=self._code.forward,
            amp=settings.amp,
            max_batches=settings.max_batches,
            progress=progress,
            ranks=self._ranks,
        )


def _starts(file: OutputFile) -> dict[Path, int]:
    """Return the start of each file of an output; positions count through all files."""
    if not isinstance(file, AtomicFolder):
        return {file.path: 0}
    paths = [file.path / name for name in file.files]
    return dict(zip(paths, accumulate(file.files.values(), initial=0), strict=False))


@contextmanager
def _named_after(file: OutputFile) -> Iterator[None]:
    """Make errors name the final path of a file instead of its temporary path."""
    try:
        yield
    except SwaAvgError as error:
        if error.file is not None and (error.file + "/").startswith(f"{file.path}/"):
            error.file = f"{file.target}{error.file.removeprefix(str(file.path))}"
        raise


@contextmanager
def session(options: Recompute, ranks: Ranks | None = None) -> Iterator[Session]:
    """Load the user's code.

    Args:
        options: The options of the recompute.
        ranks: The processes that share the work, if there are several.

    Raises:
        DataError: An object that the options name does not exist or has the wrong type.
    """
    ranks = ranks or Alone()
    with user_code(
        options.data,
        model=options.model,
        forward=options.forward,
        once=ranks.once,
        folder=options.folder,
    ) as code:
        yield Session(options.settings, code, ranks)


def read_state(state: StateDict) -> OrderedDict[str, Any]:
    """Read a state_dict, with its plain values and its `_metadata`."""
    read: dict[TensorRef, torch.Tensor] = {}
    made: OrderedDict[str, Any] = OrderedDict()

    def loaded(value: object) -> object:
        """Return what is in a value as `torch.load` would."""
        if isinstance(value, View):
            return read_tensor(state.checkpoint.located(value))
        return io.BytesIO(value.content or b"") if isinstance(value, Stream) else value

    for name in state.order:
        ref = state.tensors.get(name)
        if ref is None:
            made[name] = rebuilt(state.values[name], loaded)
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
    """Return the records that hold BatchNorm buffers, with the new values."""
    contents: dict[Record, bytearray] = {}
    taken: dict[tuple[Record, int], tuple[TensorRef, str]] = {}
    for key, buffer in buffers.items():
        name = fit.in_state_dict(key)
        ref = state.tensors.get(name)
        if ref is None:  # files from before torch 0.4.1 have no num_batches_tracked
            continue
        if ref.parts:
            raise OutputError(
                "is stored in several parts, which cannot be replaced in place",
                tensor=name,
                remedy="Average to a file with -o, and recompute it there",
            )
        record = ref.record
        if record not in contents:
            contents[record] = bytearray(record.file.read(record.offset, record.length))
        _check_own_place(name, ref, taken)
        dtype = getattr(torch, ref.dtype.name)
        new = buffer.detach().to("cpu", dtype)
        if not torch.isfinite(new).all():
            raise NotFiniteError(
                f"has a new statistic that {ref.dtype} cannot represent",
                tensor=name,
                remedy="Average again to a new file, with a wider --dtype",
            )
        flat = torch.frombuffer(contents[record], dtype=dtype)
        flat.as_strided(ref.shape, ref.stride, ref.offset).copy_(new)
    return {record: bytes(data) for record, data in contents.items()}


def _read_back(
    path: Path, patches: Sequence[tuple[Path, int, bytes]], key: Sequence[str], ema: bool | None
) -> None:
    """Open the changed checkpoint again, and compare the replaced bytes.

    Raises:
        SwaAvgError: The file does not contain the new bytes.
    """
    checkpoint = open_checkpoint(path)
    try:
        find_state_dict(checkpoint, key, ema)
    finally:
        checkpoint.close()
    for inner, place, data in patches:
        file = InputFile(inner)
        try:
            if file.read(place, len(data)) != data:
                raise OutputError(f"differs from the data written, at byte {place}", file=inner)
        finally:
            file.close()


def _check_own_place(
    name: str, ref: TensorRef, taken: dict[tuple[Record, int], tuple[TensorRef, str]]
) -> None:
    """Refuse a buffer whose elements are shared, in an expanded view or with another tensor.

    Several names of the same buffer of one layer are allowed.
    """
    own = (ref, name.rpartition(".")[2])
    places = [(ref.record, ref.offset + at) for at in range(ref.extent)]
    shared = any(taken.get(place, own) != own for place in places)
    if shared or not is_dense(ref.shape, ref.stride):
        raise OutputError(
            "has shared elements in its storage, so its statistics cannot be replaced",
            tensor=name,
            remedy="Save the checkpoint again with its clone()",
        )
    taken.update(dict.fromkeys(places, own))


def _notes(report: BatchNormReport, fit: Fit) -> Iterator[str]:
    """Yield notes for the user about the statistics."""
    if fit.dropped:
        yield f"the prefix {fit.dropped} was removed from the names in the file to match the model"
    if fit.added:
        yield f"the prefix {fit.added} was added to the names in the file to match the model"
    for names, what in (
        (report.unreached, "reached by no batch; statistics unchanged"),
        (report.frozen, "tracks no statistics; unchanged"),
        (report.instance_norms, "InstanceNorm with running statistics; unchanged"),
    ):
        if names:
            yield f"{listed(names)}: {what}"
