"""The safetensors format: a JSON header, followed by the tensors without gaps.

The reader checks the guarantees of the format: no duplicate keys, no holes, no overlaps, no
trailing bytes. The writer produces the same bytes as `save_file` of the safetensors library
for the same tensors and the same (sorted) metadata. The format has no checksums.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_avg.errors import FormatError, OutputError
from swa_avg.formats.checkpoint import PROVENANCE, Checkpoint, Headers, OutputStateDict, Splice
from swa_avg.pickles import MOST_SAFETENSORS_HEADER, Budget, check_shape
from swa_avg.storage import InputFile
from swa_avg.tensors import SAFETENSORS_DTYPES, Record, Stored, View, contiguous_stride

_METADATA = "__metadata__"
# The order in which safetensors lays out dtypes: the largest alignment first.
_ORDER = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 "
    "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL"
)
_RANK = {name: rank for rank, name in enumerate(_ORDER.split())}


def read(file: InputFile, headers: Headers, budget: Budget) -> Checkpoint:
    """Read the header of a safetensors file.

    Args:
        file: The file.
        headers: The cache of headers.
        budget: Limits what is built from the header.

    Raises:
        FormatError: The header is damaged, or does not match the size of the file.
    """
    try:
        data, start = _raw_header(file)
        budget.read(len(data))
        header = headers.once(_parsed, data, budget)
    except FormatError as error:
        error.file = error.file or str(file.path)
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"has a header that cannot be read ({error})",
            file=file.path,
            expected="safetensors",
            remedy="The file is damaged or not a checkpoint",
        ) from error
    if start + header.size != file.size:
        raise FormatError(
            f"has {file.size} bytes",
            file=file.path,
            expected=f"{start + header.size}",
            remedy="The file is cut short, or something was appended to it",
        )
    return Checkpoint(
        file.path,
        "safetensors",
        header.tree,
        (file,),
        metadata=header.metadata,
        provenance=header.provenance,
        records={
            stored: Record(file, start + place, stored.nbytes)
            for stored, place in header.places.items()
        },
        budget=budget,
    )


@dataclass(frozen=True)
class _Header:
    """A parsed header, independent of its file.

    Attributes:
        tree: The tensors by name.
        places: The position of each storage, counted from the end of the header.
        size: The size of all storages in bytes.
        metadata: The metadata.
        provenance: The provenance text of an average that swa-avg wrote; otherwise empty.
    """

    tree: Mapping[str, View]
    places: Mapping[Stored, int]
    size: int
    metadata: Mapping[str, str]
    provenance: str


def _raw_header(file: InputFile) -> tuple[bytes, int]:
    """Return the bytes of the header, and the position at which the tensors begin."""
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(MOST_SAFETENSORS_HEADER, file.size - 8):
        raise ValueError(f"{length} bytes long")
    return file.read(8, length), 8 + length


def _entries(data: bytes) -> dict[str, Any]:
    """Return the entries of a header."""
    header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("not a JSON object")
    return header


def _parsed(data: bytes, budget: Budget) -> _Header:
    """Parse a header, and check that its tensors leave no holes and do not overlap."""
    budget.json(data)
    header = _entries(data)
    budget.hold(len(header))
    metadata = header.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is not a map of strings to strings")
    tree = {name: _tensor(name, entry) for name, entry in header.items()}
    places = {tree[name].stored: entry["data_offsets"][0] for name, entry in header.items()}
    end = 0
    for stored, place in sorted(places.items(), key=lambda item: (item[1], item[0].nbytes)):
        if place != end:
            raise ValueError("tensors that overlap or leave a hole")
        end += stored.nbytes
    provenance = metadata.pop(PROVENANCE, "")
    # save_model of safetensors leaves out tied names and records them as alias → kept name.
    # The key "format" is no alias: a file of format "pt" can hold a tensor named pt.
    for alias, kept in metadata.items():
        if alias != "format" and alias not in tree and kept in header:
            tree[alias] = tree[kept]
    return _Header(tree, places, end, metadata, provenance)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs of a JSON object as a dict; raise ValueError for a duplicate name."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _tensor(name: str, entry: Mapping[str, Any]) -> View:
    name.encode()  # raises for a lone surrogate, which safetensors does not allow
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"dtype {entry['dtype']}")
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("an impossible shape or offset")
    check_shape(shape)
    stored = Stored(name, math.prod(shape), end - begin)
    if stored.numel * dtype.itemsize != stored.nbytes:
        raise ValueError(f"{stored.nbytes} bytes for shape {shape} of {dtype}")
    return View(dtype, shape, contiguous_stride(shape), stored)


@dataclass(frozen=True)
class SafetensorsLayout:
    """The layout of a safetensors file.

    Attributes:
        entries: The content of the JSON header.
        places: The position of the first byte of each storage.
        size: The size of the whole file in bytes.
    """

    entries: Mapping[str, Any]
    places: tuple[int, ...]
    size: int

    @property
    def files(self) -> Mapping[str, int]:
        """Empty: the output is a single file."""
        return {}

    def headers(
        self, checksums: Sequence[int], provenance: str = ""
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the header; the format has no checksums."""
        text = self.entries.get(_METADATA, {})
        if PROVENANCE in text:
            text = text | {PROVENANCE: provenance}
            yield 0, _encoded({**self.entries, _METADATA: text})
        else:
            yield 0, _encoded(self.entries)


def layout(state_dict: OutputStateDict) -> SafetensorsLayout:
    """Lay out the safetensors file of a state_dict.

    If several names share one storage, the first is written, and the others are recorded
    as `alias: name` in the metadata, like `save_model` of the safetensors library does.

    Raises:
        OutputError: The format cannot hold a name or dtype.
    """
    names: dict[int, str] = {}
    text = dict(state_dict.text)
    if state_dict.provenance:
        text[PROVENANCE] = state_dict.provenance
    tensors = state_dict.tensors
    for name, tensor in tensors.items():
        _check_name(name)
        kept = names.setdefault(tensor.storage, name)
        if kept != name:
            text[name] = kept
    order = sorted(names, key=lambda key: (_rank(state_dict, key, names[key]), names[key]))
    entries: dict[str, Any] = {_METADATA: dict(sorted(text.items()))} if text else {}
    place = 0
    offsets: dict[int, int] = {}
    for key in order:
        storage = state_dict.storages[key]
        entries[names[key]] = {
            "dtype": storage.dtype.safetensors,
            "shape": list(tensors[names[key]].shape),
            "data_offsets": [place, place + storage.nbytes],
        }
        offsets[key] = place
        place += storage.nbytes
    start = len(_encoded(entries))
    return SafetensorsLayout(
        entries,
        tuple(start + offsets[key] for key in range(len(state_dict.storages))),
        start + place,
    )


def _encoded(entries: Mapping[str, Any]) -> bytes:
    """Return the bytes of a header: its length, and the JSON padded with spaces."""
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return the change that adds a provenance text to the metadata of a file."""
    data, start = _raw_header(file)
    entries = _entries(data)
    text = entries.pop(_METADATA, {}) | {PROVENANCE: provenance}
    return (Splice(0, start, _encoded({_METADATA: text, **entries})),)


def restated(file: InputFile, provenance: str) -> bytes:
    """Return the header of a file with a new provenance text and the same length.

    Raises:
        ValueError: The text does not fit.
    """
    data, start = _raw_header(file)
    entries = _entries(data)
    text = entries.pop(_METADATA)
    text[PROVENANCE] = provenance.rstrip()
    # A quotation mark takes two characters in a JSON string. Spaces fill the remaining length.
    spare = start - len(_encoded({_METADATA: text, **entries}))
    if spare < 0:
        raise ValueError("the provenance does not fit")
    text[PROVENANCE] += " " * spare
    return _encoded({_METADATA: text, **entries})


def _check_name(name: str) -> None:
    encodable = name.encode("utf-8", "replace").decode("utf-8") == name
    if name == _METADATA or not encodable:
        raise OutputError(
            "has a name that safetensors cannot store",
            tensor=name,
            remedy="Write a .pt file instead",
        )


def _rank(state_dict: OutputStateDict, key: int, name: str) -> int:
    dtype = state_dict.storages[key].dtype
    if dtype.safetensors is None:
        raise OutputError(
            f"has dtype {dtype}, which safetensors cannot store",
            tensor=name,
            remedy="Write a .pt file instead",
        )
    return _RANK[dtype.safetensors]
