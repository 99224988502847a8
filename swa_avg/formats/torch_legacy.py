"""The format of `torch.save` before torch 1.6, which newer versions write on request.

The file is a sequence of pickles (a magic number, a version, the machine, the object, the
keys of its storages), followed by the storages, each preceded by its number of elements. The
position of a storage depends on all storages before it. The format has no checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from swa_avg.errors import FormatError
from swa_avg.formats.checkpoint import Checkpoint
from swa_avg.pickles import MOST_STRING_BYTES, Budget, Pickled, described, unpickler
from swa_avg.storage import InputFile
from swa_avg.tensors import Record, Stored

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT = struct.Struct("<q")
_WINDOW = 1 << 16


def is_legacy(start: bytes) -> bool:
    """Return whether a file begins with the magic number of this format, in any protocol."""
    binary = _MAGIC.to_bytes(10, "little")
    return binary in start[:32] or start.startswith(b"L%d" % _MAGIC)


def read(file: InputFile, budget: Budget) -> Checkpoint:
    """Read the pickles of a legacy torch file, and locate its storages.

    Args:
        file: The file.
        budget: Limits what is built from the pickles.

    Raises:
        FormatError: The file is damaged.
    """
    try:
        pickled, records, end = _read(file, budget)
    except FormatError as error:
        error.file = error.file or str(file.path)
        raise
    located = pickled.located(records, file.path)
    more = file.size - end
    notes = ["has the format of torch before 1.6, without checksums: damage cannot be detected"]
    if more:
        notes.append(f"{more} bytes follow the checkpoint; not read")
    name = "torch before 1.6"
    return Checkpoint(
        file.path,
        name,
        pickled.tree,
        (file,),
        notes=tuple(notes),
        records=located,
        budget=budget,
    )


def _read(file: InputFile, budget: Budget) -> tuple[Pickled, dict[str, Record], int]:
    """Return the saved object, the location of its storages, and the end of the last one."""
    stream = _Stream(file, budget)
    if unpickler.load_plain(stream, budget) != _MAGIC:
        raise FormatError("does not have the magic number of torch")
    version = unpickler.load_plain(stream, budget)
    if version != _VERSION:
        raise FormatError(f"has version {described(version)}", expected=f"{_VERSION}")
    system = unpickler.load_plain(stream, budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FormatError("was not written by a little-endian machine")
    pickled = unpickler.load(stream, budget)
    keys = unpickler.load_plain(stream, budget)
    records, end = _storages(file, stream.tell(), keys, pickled.storages)
    return pickled, records, end


def _storages(
    file: InputFile, place: int, keys: object, wanted: Mapping[str, Stored]
) -> tuple[dict[str, Record], int]:
    """Return the location of each storage, and the end of the last one."""
    records: dict[str, Record] = {}
    for key in keys if isinstance(keys, list) else [keys]:
        storage = wanted.get(key) if isinstance(key, str) else None
        if storage is None or storage.name in records:
            raise FormatError(f"lists storage {described(key)}, which is not in its pickle")
        (count,) = _COUNT.unpack(file.read(place, _COUNT.size))
        if count != storage.numel:
            raise FormatError(
                f"storage {key} has {count} elements",
                expected=f"{storage.numel}",
                remedy="The file is damaged",
            )
        place += _COUNT.size
        if storage.nbytes > file.size - place:
            raise FormatError(
                f"ends at byte {file.size}, within storage {key}",
                expected=f"{storage.nbytes} bytes at {place}",
                remedy="The file is cut short or damaged",
            )
        records[storage.name] = Record(file, place, storage.nbytes)
        place += storage.nbytes
    return records, place


class _Stream:
    """A stream over the pickles at the start of a file, read in windows."""

    def __init__(self, file: InputFile, budget: Budget) -> None:
        self._file = file
        self._budget = budget
        self._place = 0
        self._window = b""
        self._start = 0

    def tell(self) -> int:
        return self._place

    def read(self, count: int) -> bytes:
        at = self._place - self._start
        data = self._window[at : at + count]
        if len(data) < count:
            self._look_ahead(count)
            data = self._window[:count]
        self._place += len(data)
        return data

    def readline(self) -> bytes:
        for most in (_WINDOW, MOST_STRING_BYTES, 0):
            at = self._place - self._start
            end = self._window.find(b"\n", at)
            if end >= 0:
                return self.read(end + 1 - at)
            if most:
                self._look_ahead(most)
        raise FormatError("holds a pickle of unreasonable size")

    def _look_ahead(self, count: int) -> None:
        """Move the window to the current position, with at least `count` bytes if available."""
        if count > MOST_STRING_BYTES:
            raise FormatError("holds a pickle of unreasonable size")
        length = min(max(count, _WINDOW), self._file.size - self._place)
        self._budget.read(length)
        self._window, self._start = self._file.read(self._place, length), self._place
