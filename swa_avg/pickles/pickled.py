"""The values that a pickle is read into: plain containers, and placeholders for other objects.

A placeholder keeps the pickled data of an object and has none of its behaviour. This module
does not read pickles.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swa_avg.errors import FormatError
from swa_avg.tensors import DTYPES, DType, Record, Stored


@dataclass(frozen=True)
class Global:
    """The name of a class or function in a pickle. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def described(value: object) -> str:
    """Return a short description of any value; the repr of an unpickled value can be huge."""
    return str(value) if isinstance(value, Global | str | int) else f"<{type(value).__name__}>"


@dataclass(eq=False, repr=False)
class Inert:
    """A placeholder for an object of any other class: its pickled data without behaviour."""

    cls: object
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"object of {described(self.cls)}"


class Dict(dict[Any, Any]):
    """An OrderedDict or defaultdict, with the attributes that were pickled with it."""

    state: Any = None


@dataclass(eq=False, repr=False)
class Stream:
    """A pickled `io.BytesIO`. Some modules store their extra state in one.

    Attributes:
        state: Its pickled state: its bytes, its position, and its attributes.
    """

    state: Any = None

    @property
    def content(self) -> bytes | None:
        """Its bytes, or None if its state has another form."""
        state = self.state
        known = isinstance(state, tuple) and len(state) == 3 and isinstance(state[0], bytes)
        return state[0] if known and state[2] is None else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.content == other.content

    def __hash__(self) -> int:
        return hash(Stream)  # equal streams have equal hashes; streams are rarely keys

    def __repr__(self) -> str:
        return f"io.BytesIO({self.content!r})"


@dataclass(frozen=True)
class UnreadableTensor:
    """A tensor that cannot be averaged: sparse, quantized, or without data."""

    what: str


def rebuilt(value: object, leaf: Callable[[object], object]) -> object:
    """Return a plain value in containers of Python, with everything else in it changed.

    Args:
        value: The value.
        leaf: Returns what replaces a value that is not a container.
    """
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, Dict | OrderedDict) else dict
        return kind((key, rebuilt(item, leaf)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(rebuilt(item, leaf) for item in value)
    return leaf(value)


def leaves(value: object) -> Iterator[object]:
    """Yield everything in a plain value that is not a container."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from leaves(item)
    else:
        yield value


def holds_stream(value: object) -> bool:
    """Return whether a plain value is a stream or contains one."""
    return any(isinstance(one, Stream) for one in leaves(value))


@dataclass(frozen=True)
class Storage:
    """A reference to a storage in a pickle.

    Attributes:
        stored: The name and size of the storage.
        kind: The name of its class.
        dtype: The element type of that class; None for an untyped storage.
        start: The first element, if the reference is to a part of the storage.
        numel: The number of elements.
    """

    stored: Stored
    kind: str
    dtype: DType | None
    start: int
    numel: int


@dataclass(frozen=True)
class Pickled:
    """The content of a pickle, independent of where its storages are.

    Attributes:
        tree: Plain containers, numbers and strings, `View`s, and `Inert` for other objects.
        storages: The storages that the pickle refers to, by name.
    """

    tree: object
    storages: Mapping[str, Stored]

    def located(self, records: Mapping[str, Record], file: Path) -> dict[Stored, Record]:
        """Find the storages in a file.

        Args:
            records: The records of the file, by the names of the storages.
            file: The path of the file, used in messages.

        Raises:
            FormatError: A storage is missing or has the wrong size.
        """
        found: dict[Stored, Record] = {}
        for name, stored in self.storages.items():
            there = records.get(name)
            if there is None:
                raise FormatError(f"has no record for storage {name}", file=file)
            if there.length != stored.nbytes:
                raise FormatError(
                    f"storage {name} has {there.length} bytes",
                    file=file,
                    expected=f"{stored.nbytes}",
                    remedy="The file is damaged",
                )
            found[stored] = there
        return found


def storage_dtype(kind: object) -> DType | None:
    """Return the dtype of a storage class, or None if the class does not determine it.

    Raises:
        FormatError: The class is not a known storage class.
    """
    if not isinstance(kind, Global) or kind.module.split(".")[0] != "torch":
        raise FormatError(f"holds a storage of {described(kind)}")
    if kind.name in ("UntypedStorage", "_UntypedStorage"):
        return None
    if kind.name not in STORAGE_DTYPES:
        raise FormatError(f"holds a storage of {kind}, which is not a known type")
    return STORAGE_DTYPES[kind.name]


STORAGE_DTYPES: Mapping[str, DType | None] = {
    name: DTYPES.get(dtype)
    for name, dtype in {
        "DoubleStorage": "float64",
        "FloatStorage": "float32",
        "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16",
        "ComplexDoubleStorage": "complex128",
        "ComplexFloatStorage": "complex64",
        "LongStorage": "int64",
        "IntStorage": "int32",
        "ShortStorage": "int16",
        "CharStorage": "int8",
        "ByteStorage": "uint8",
        "BoolStorage": "bool",
        # Quantized: their rebuild function returns an UnreadableTensor.
        "QInt8Storage": "int8",
        "QUInt8Storage": "uint8",
        "QInt32Storage": "int32",
        "QUInt4x2Storage": "uint8",
        "QUInt2x4Storage": "uint8",
    }.items()
}
