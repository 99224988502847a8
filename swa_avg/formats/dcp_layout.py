"""The writer of `torch.distributed.checkpoint` folders, in the form that one rank writes.

One file holds all tensors in sequence, each in the format of `torch.save` for one tensor;
`.metadata` holds the location of each. It is a pickle that is written opcode by opcode, without
torch. It names torch's classes as torch does (protocol 2, with the fields that every version
since 2.4 has), so that any of these versions can load it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from swa_avg.formats import torch_zip
from swa_avg.formats.checkpoint import PROVENANCE, OutputStateDict
from swa_avg.formats.torch_zip import ZipLayout

_DATA = "__0_0.distcp"
_METADATA = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"
_CONTIGUOUS = 0  # of _MEM_FORMAT_ENCODING: the value that torch's planner always writes


@dataclass(frozen=True)
class DcpLayout:
    """The layout of a folder; positions count through its files as if they were one file.

    Attributes:
        items: The torch zip of each storage.
        metadata: The bytes of `.metadata`.
        provenance: The provenance text used for the layout, as bytes; empty for none.
    """

    items: tuple[ZipLayout, ...]
    metadata: bytes
    provenance: bytes

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file."""
        sizes = {_DATA: sum(item.size for item in self.items), _METADATA: len(self.metadata)}
        return sizes | ({PROVENANCE: len(self.provenance)} if self.provenance else {})

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(self.files.values())

    @property
    def places(self) -> Sequence[int]:
        """The position of the first byte of each storage."""
        starts = _starts(self.items)
        return [at + item.places[0] for at, item in zip(starts, self.items, strict=True)]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the storages, with their positions."""
        starts = _starts(self.items)
        for at, item, checksum in zip(starts, self.items, checksums, strict=True):
            for place, data in item.headers([checksum]):
                yield at + place, data
        after = sum(item.size for item in self.items)
        yield after, self.metadata
        if self.provenance:
            yield after + len(self.metadata), provenance.encode()


def layout(state_dict: OutputStateDict, where: str) -> DcpLayout:
    """Lay out a folder.

    Args:
        state_dict: The state_dict to write. Its tensors are contiguous, and a storage is
            shared only by several names of one tensor.
        where: The dotted path of the state_dict in the nested dict that is given to `load`.
    """
    shapes = {tensor.storage: tensor.shape for tensor in state_dict.tensors.values()}
    items = tuple(
        torch_zip.layout_tensor(storage, shapes[number])
        for number, storage in enumerate(state_dict.storages)
    )
    metadata = dump(_entries(state_dict, items, where), _DATA)
    return DcpLayout(items, metadata, state_dict.provenance.encode())


def _starts(items: Sequence[ZipLayout]) -> list[int]:
    """Return the position of each item in its file."""
    return [0, *accumulate(item.size for item in items)][: len(items)]


def _entries(
    state_dict: OutputStateDict, items: Sequence[ZipLayout], where: str
) -> Iterator[Entry]:
    """Yield each tensor with the range of the file that holds it."""
    parents = tuple(where.split(".")) if where else ()
    starts = _starts(items)
    for name, tensor in state_dict.tensors.items():
        dtype, size = state_dict.storages[tensor.storage].dtype.name, items[tensor.storage].size
        yield Entry((*parents, name), dtype, tensor.shape, starts[tensor.storage], size)


class Entry(NamedTuple):
    """A tensor of a folder, stored in one range of one file.

    Attributes:
        path: Its path in the nested dict that is given to `load`.
        dtype: The name of its dtype in torch.
        shape: Its shape.
        start: The first byte of the range.
        length: The length of the range in bytes.
    """

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def key(self) -> str:
        """The name of the tensor in the folder."""
        return ".".join(self.path)


def dump(entries: Iterable[Entry], file: str) -> bytes:
    """Return the pickle that torch's planner writes for tensors.

    Args:
        entries: The tensors.
        file: The name of the file that holds them.
    """
    every = list(entries)
    metadata = {
        "state_dict_metadata": _dict({_plain(entry.key): _tensor(entry) for entry in every}),
        "planner_data": _plain({entry.key: entry.path for entry in every}),
        "storage_data": _dict({_index(entry): _stored(entry, file) for entry in every}),
        "storage_meta": _plain(None),
    }
    return pickle.PROTO + b"\x02" + _object(_CLASSES, "Metadata", metadata) + pickle.STOP


def _tensor(entry: Entry) -> bytes:
    layout = _call("torch.serialization", "_get_layout", _plain("torch.strided"))
    memory_format = _call(_CLASSES, "_MEM_FORMAT_ENCODING", _plain(_CONTIGUOUS))
    dtype, false = _global("torch", entry.dtype), _plain(False)
    properties = b"".join((pickle.MARK, dtype, layout, false, memory_format, false, pickle.TUPLE))
    chunk = {"offsets": _size((0,) * len(entry.shape)), "sizes": _size(entry.shape)}
    chunks = pickle.EMPTY_LIST + _object(_CLASSES, "ChunkStorageMetadata", chunk) + pickle.APPEND
    fields = {
        "properties": _new(_CLASSES, "TensorProperties") + properties + pickle.BUILD,
        "size": _size(entry.shape),
        "chunks": chunks,
    }
    return _object(_CLASSES, "TensorStorageMetadata", fields)


def _index(entry: Entry) -> bytes:
    offset = _size((0,) * len(entry.shape))
    fields = {"fqn": _plain(entry.key), "offset": offset, "index": _plain(None)}
    return _object(_CLASSES, "MetadataIndex", fields)


def _stored(entry: Entry, file: str) -> bytes:
    places = {"relative_path": file, "offset": entry.start, "length": entry.length}
    fields = {name: _plain(value) for name, value in places.items()}
    return _object("torch.distributed.checkpoint.filesystem", "_StorageInfo", fields)


def _size(shape: tuple[int, ...]) -> bytes:
    return _call("torch", "Size", _plain(shape))


def _call(module: str, name: str, argument: bytes) -> bytes:
    return _global(module, name) + argument + pickle.TUPLE1 + pickle.REDUCE


def _object(module: str, name: str, fields: Mapping[str, bytes]) -> bytes:
    """Return the opcodes of an object whose fields are set without calling `__init__`."""
    state = _dict({_plain(field): value for field, value in fields.items()})
    return _new(module, name) + state + pickle.BUILD


def _new(module: str, name: str) -> bytes:
    return _global(module, name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ


def _dict(items: Mapping[bytes, bytes]) -> bytes:
    pairs = b"".join(key + value for key, value in items.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def _plain(value: object) -> bytes:
    """Return the opcodes of a plain value, without the protocol header and the final STOP."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
