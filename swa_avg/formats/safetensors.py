"""The safetensors format: a JSON header, then the tensors without a gap.

Reading checks what the format promises: no duplicate key, no hole, no overlap,
no trailing byte. Writing gives, byte for byte, what safetensors' own
`save_file` gives for the same tensors and the same (sorted) metadata. The
format carries no checksums.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from swa_avg.errors import FormatError, OutputError
from swa_avg.files import InputFile
from swa_avg.formats.checkpoint import Checkpoint, OutputStateDict
from swa_avg.tensors import SAFETENSORS_DTYPES, Record, TensorRef, contiguous_stride

_MOST_HEADER_BYTES = 100_000_000
_METADATA = "__metadata__"
# The order in which safetensors lays out dtypes: the most aligned first.
_ORDER = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 "
    "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 BOOL"
)
_RANK = {name: rank for rank, name in enumerate(_ORDER.split())}


def read(file: InputFile) -> Checkpoint:
    """Read the header of a safetensors file.

    Raises:
        FormatError: The header is not sound, or does not fit the file.
    """
    try:
        header, start = _header(file)
        metadata = header.pop(_METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError(f"{_METADATA} is no map of text to text")
        tree: dict[str, object] = {
            name: _tensor(file, start, entry) for name, entry in header.items()
        }
        _check_cover(file, start, header)
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"has a header that cannot be read ({error})",
            file=file.path,
            expected="safetensors",
            remedy="The file is damaged or no checkpoint",
        ) from error
    # Tied names that safetensors' own save_model left out: alias → the name kept.
    # A file of format "pt" may well hold a tensor called pt.
    for alias, kept in metadata.items():
        if alias != "format" and alias not in tree and kept in header:
            tree[alias] = tree[kept]
    return Checkpoint(file.path, "safetensors", tree, (file,), metadata=metadata)


def _header(file: InputFile) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(_MOST_HEADER_BYTES, file.size - 8):
        raise ValueError(f"{length} bytes long")
    header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(header, dict):
        raise ValueError("no JSON object")
    return header, 8 + length


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object's pairs; a name that occurs twice is an error."""
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name occurs twice")
    return made


def _tensor(file: InputFile, start: int, entry: Mapping[str, Any]) -> TensorRef:
    dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"dtype {entry['dtype']}")
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("an impossible shape or offset")
    record = Record(file, start + begin, end - begin)
    ref = TensorRef(dtype, shape, contiguous_stride(shape), record)
    if ref.nbytes != record.length:
        raise ValueError(f"{record.length} bytes for shape {shape} of {dtype}")
    return ref


def _check_cover(file: InputFile, start: int, header: Mapping[str, Any]) -> None:
    """Check that the tensors fill the rest of the file, without holes or overlaps."""
    place = 0
    for begin, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        if begin != place:
            raise ValueError("tensors that overlap or leave a hole")
        place = end
    if start + place != file.size:
        raise FormatError(
            f"has {file.size} bytes",
            file=file.path,
            expected=f"{start + place}",
            remedy="The file is cut short, or something was appended to it",
        )


@dataclass(frozen=True)
class SafetensorsLayout:
    """A safetensors file of which every byte has its place before the first is written."""

    header: bytes
    places: tuple[int, ...]
    size: int

    @property
    def files(self) -> Mapping[str, int]:
        """None: it is a single file."""
        return {}

    def headers(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the header; the format carries no checksums."""
        yield 0, self.header


def layout(state_dict: OutputStateDict) -> SafetensorsLayout:
    """Give every byte of a state_dict's safetensors file its place.

    Of names tied to one storage the first is written; the others are recorded
    as `alias: name` in the metadata, as safetensors' own `save_model` does.

    Raises:
        OutputError: A name or dtype that the format cannot hold.
    """
    names: dict[int, str] = {}
    text = dict(state_dict.text)
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
    encoded = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    start = 8 + len(encoded)
    return SafetensorsLayout(
        struct.pack("<Q", len(encoded)) + encoded,
        tuple(start + offsets[key] for key in range(len(state_dict.storages))),
        start + place,
    )


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
