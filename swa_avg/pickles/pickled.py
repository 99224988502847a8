"""What a pickle is read into: plain containers, and stand-ins for all that is not plain.

Nothing here reads a pickle. A stand-in does nothing, whatever it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swa_avg.errors import FormatError
from swa_avg.tensors import DTYPES, DType, Record, Stored


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def described(value: object) -> str:
    """Return a few words for anything; what a pickle builds can have an endless repr."""
    return str(value) if isinstance(value, Global | str | int) else f"<{type(value).__name__}>"


@dataclass(eq=False, repr=False)
class Inert:
    """An object whose class is not ours: what the pickle says of it, and no behaviour."""

    cls: object
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"object of {described(self.cls)}"


class Dict(dict[Any, Any]):
    """An OrderedDict or defaultdict, with the attributes pickled beside its items."""

    state: Any = None


@dataclass(eq=False, repr=False)
class Stream:
    """An `io.BytesIO`, as modules keep extra state in one.

    Attributes:
        state: What the pickle says of it: its bytes, where it is read next, and attributes.
    """

    state: Any = None

    @property
    def content(self) -> bytes | None:
        """Its bytes, or None where the pickle says something else of it."""
        state = self.state
        known = isinstance(state, tuple) and len(state) == 3 and isinstance(state[0], bytes)
        return state[0] if known and state[2] is None else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.content == other.content

    def __hash__(self) -> int:
        return hash(Stream)  # equal ones have equal hashes; as a key it is rare

    def __repr__(self) -> str:
        return f"io.BytesIO({self.content!r})"


@dataclass(frozen=True)
class UnreadableTensor:
    """A tensor of a kind that cannot be averaged: sparse, quantized, without data."""

    what: str


def holds_stream(value: object) -> bool:
    """Tell whether a plain value is a stream, or has one inside."""
    if isinstance(value, dict):
        return any(map(holds_stream, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds_stream, value))
    return isinstance(value, Stream)


@dataclass(frozen=True)
class Storage:
    """A storage as a pickle refers to it.

    Attributes:
        stored: Its name and its size.
        kind: The class that the pickle gives it.
        dtype: The element type of that class; None for an untyped one.
        start: The element at which it begins, if it is a part of that storage.
        numel: How many elements it has.
    """

    stored: Stored
    kind: str
    dtype: DType | None
    start: int
    numel: int


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds, wherever its storages are.

    Attributes:
        tree: Plain containers, numbers and strings, `View`s, and `Inert` for the rest.
        storages: The storages that it refers to, by name.
    """

    tree: object
    storages: Mapping[str, Stored]

    def located(self, records: Mapping[str, Record], file: Path) -> dict[Stored, Record]:
        """Find the storages in a file.

        Args:
            records: Its records by the names of the storages.
            file: The file's name for messages.

        Raises:
            FormatError: One is not there, or is not as large as it must be.
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
    """Return the dtype of a storage class; None where it has none of its own.

    Raises:
        FormatError: It is no storage class that is known here.
    """
    if not isinstance(kind, Global) or kind.module.split(".")[0] != "torch":
        raise FormatError(f"holds a storage of {described(kind)}")
    if kind.name in ("UntypedStorage", "_UntypedStorage"):
        return None
    if kind.name not in STORAGE_DTYPES:
        raise FormatError(f"holds a storage of {kind}, a type unknown here")
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
        # Quantized: the rebuild function that uses them makes the tensor unreadable.
        "QInt8Storage": "int8",
        "QUInt8Storage": "uint8",
        "QInt32Storage": "int32",
        "QUInt4x2Storage": "uint8",
        "QUInt2x4Storage": "uint8",
    }.items()
}
