"""The safetensors format: a JSON header, then the tensors without a gap.

Reading checks what the format promises: no duplicate key, no hole, no overlap,
no trailing byte. Writing gives, byte for byte, what safetensors' own
`save_file` gives for the same tensors and the same (sorted) metadata. The
format carries no checksums.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_avg.errors import FormatError, OutputError
from swa_avg.formats.checkpoint import PROVENANCE, Checkpoint, OutputStateDict, Splice
from swa_avg.formats.headers import Headers
from swa_avg.pickles import MOST_SAFETENSORS_HEADER, Budget, check_shape
from swa_avg.storage import InputFile
from swa_avg.tensors import SAFETENSORS_DTYPES, Record, Stored, View, contiguous_stride

_METADATA = "__metadata__"
# The order in which safetensors lays out dtypes: the most aligned first.
_ORDER = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 "
    "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL"
)
_RANK = {name: rank for rank, name in enumerate(_ORDER.split())}


def read(file: InputFile, headers: Headers, budget: Budget) -> Checkpoint:
    """Read the header of a safetensors file.

    Args:
        file: The file.
        headers: What was read of other files.
        budget: What the header may ask for.

    Raises:
        FormatError: The header is not sound, or does not fit the file.
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
            remedy="The file is damaged or no checkpoint",
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
    """What a header says, whichever file it is of.

    Attributes:
        tree: The tensors by name.
        places: Where each storage begins, counted from the end of the header.
        size: Bytes of all storages.
        metadata: The text beside them.
        provenance: What an average of ours says of how it was made.
    """

    tree: Mapping[str, View]
    places: Mapping[Stored, int]
    size: int
    metadata: Mapping[str, str]
    provenance: str


def _raw_header(file: InputFile) -> tuple[bytes, int]:
    """Return the header's bytes, and where the tensors begin."""
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(MOST_SAFETENSORS_HEADER, file.size - 8):
        raise ValueError(f"{length} bytes long")
    return file.read(8, length), 8 + length


def _entries(data: bytes) -> dict[str, Any]:
    """Return the entries of a header."""
    header = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("no JSON object")
    return header


def _parsed(data: bytes, budget: Budget) -> _Header:
    """Read a header, and check that its tensors leave no hole and do not overlap."""
    budget.json(data)
    header = _entries(data)
    budget.hold(len(header))
    metadata = header.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is no map of text to text")
    tree = {name: _tensor(name, entry) for name, entry in header.items()}
    places = {tree[name].stored: entry["data_offsets"][0] for name, entry in header.items()}
    end = 0
    for stored, place in sorted(places.items(), key=lambda item: (item[1], item[0].nbytes)):
        if place != end:
            raise ValueError("tensors that overlap or leave a hole")
        end += stored.nbytes
    provenance = metadata.pop(PROVENANCE, "")
    # Tied names that safetensors' own save_model left out: alias → the name kept.
    # A file of format "pt" may well hold a tensor called pt.
    for alias, kept in metadata.items():
        if alias != "format" and alias not in tree and kept in header:
            tree[alias] = tree[kept]
    return _Header(tree, places, end, metadata, provenance)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs; a name that occurs twice is an error."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _tensor(name: str, entry: Mapping[str, Any]) -> View:
    name.encode()  # half a surrogate pair is no text, as safetensors has it
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
    """A safetensors file of which every byte has its place before the first is written.

    Attributes:
        entries: The header, as JSON will have it.
        places: Where each storage's first byte goes.
        size: The size of the whole file in bytes.
    """

    entries: Mapping[str, Any]
    places: tuple[int, ...]
    size: int

    @property
    def files(self) -> Mapping[str, int]:
        """None: it is a single file."""
        return {}

    def headers(
        self, checksums: Sequence[int], provenance: str = ""
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the header; the format carries no checksums."""
        text = self.entries.get(_METADATA, {})
        if PROVENANCE in text:
            text = text | {PROVENANCE: provenance}
            yield 0, _encoded({**self.entries, _METADATA: text})
        else:
            yield 0, _encoded(self.entries)


def layout(state_dict: OutputStateDict) -> SafetensorsLayout:
    """Give every byte of a state_dict's safetensors file its place.

    Of names tied to one storage the first is written; the others are recorded
    as `alias: name` in the metadata, as safetensors' own `save_model` does.

    Raises:
        OutputError: A name or dtype that the format cannot hold.
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
    """Return a header as the file has it: its length, and JSON filled up with spaces."""
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def with_provenance(file: InputFile, provenance: str) -> tuple[Splice, ...]:
    """Return what to change in a file for its metadata to say how it was made."""
    data, start = _raw_header(file)
    entries = _entries(data)
    text = entries.pop(_METADATA, {}) | {PROVENANCE: provenance}
    return (Splice(0, start, _encoded({_METADATA: text, **entries})),)


def restated(file: InputFile, provenance: str) -> bytes:
    """Return the header of a file that says anew how it was made; it is as long as before.

    Raises:
        ValueError: There is no room for it.
    """
    data, start = _raw_header(file)
    entries = _entries(data)
    text = entries.pop(_METADATA)
    text[PROVENANCE] = provenance.rstrip()
    # A quotation mark takes two characters in a text within JSON: spaces make up for them.
    spare = start - len(_encoded({_METADATA: text, **entries}))
    if spare < 0:
        raise ValueError("the provenance does not fit in its place")
    text[PROVENANCE] += " " * spare
    return _encoded({_METADATA: text, **entries})


def _check_name(name: str) -> None:
    encodable = name.encode("utf-8", "replace").decode("utf-8") == name
    if name == _METADATA or not encodable:
        raise OutputError(
            "is a name that safetensors cannot hold",
            tensor=name,
            remedy="Write a .pt file instead",
        )


def _rank(state_dict: OutputStateDict, key: int, name: str) -> int:
    dtype = state_dict.storages[key].dtype
    if dtype.safetensors is None:
        raise OutputError(
            f"has dtype {dtype}, which safetensors cannot hold",
            tensor=name,
            remedy="Write a .pt file instead",
        )
    return _RANK[dtype.safetensors]
