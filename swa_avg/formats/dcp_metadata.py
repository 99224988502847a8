"""The writer of the `.metadata` pickle of a DCP folder, opcode by opcode, without torch.

The pickle names torch's classes as torch does (protocol 2, with the fields that every version
since 2.4 has), so that any of these versions can load it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_METADATA = "torch.distributed.checkpoint.metadata"
_CONTIGUOUS = 0  # of _MEM_FORMAT_ENCODING: the value that torch's planner always writes


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
    return pickle.PROTO + b"\x02" + _object(_METADATA, "Metadata", metadata) + pickle.STOP


def _tensor(entry: Entry) -> bytes:
    layout = _call("torch.serialization", "_get_layout", _plain("torch.strided"))
    memory_format = _call(_METADATA, "_MEM_FORMAT_ENCODING", _plain(_CONTIGUOUS))
    dtype, false = _global("torch", entry.dtype), _plain(False)
    properties = b"".join((pickle.MARK, dtype, layout, false, memory_format, false, pickle.TUPLE))
    chunk = {"offsets": _size((0,) * len(entry.shape)), "sizes": _size(entry.shape)}
    chunks = pickle.EMPTY_LIST + _object(_METADATA, "ChunkStorageMetadata", chunk) + pickle.APPEND
    fields = {
        "properties": _new(_METADATA, "TensorProperties") + properties + pickle.BUILD,
        "size": _size(entry.shape),
        "chunks": chunks,
    }
    return _object(_METADATA, "TensorStorageMetadata", fields)


def _index(entry: Entry) -> bytes:
    offset = _size((0,) * len(entry.shape))
    fields = {"fqn": _plain(entry.key), "offset": offset, "index": _plain(None)}
    return _object(_METADATA, "MetadataIndex", fields)


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
