"""What `torch.save` wrote before torch 1.6, and still writes when asked to.

Pickles that follow each other - a magic number, a version, the machine, the
object, the keys of its storages - and then the storages, each with its count of
elements before it. Where a storage lies is known only when all before it is.
The format carries no checksums.
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
    """Tell whether a file that begins so is one: by its magic number, in any protocol."""
    binary = _MAGIC.to_bytes(10, "little")
    return binary in start[:32] or start.startswith(b"L%d" % _MAGIC)


def read(file: InputFile, budget: Budget) -> Checkpoint:
    """Read the pickles of a legacy torch file, and where its storages lie.

    Args:
        file: The file.
        budget: What its pickles may ask for.

    Raises:
        FormatError: The file is not sound.
    """
    try:
        pickled, records, end = _read(file, budget)
    except FormatError as error:
        error.file = error.file or str(file.path)
        raise
    located = pickled.located(records, file.path)
    more = file.size - end
    notes = ["is of torch's format before 1.6, without checksums: damage to it cannot be found"]
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
    """Return what was saved, where its storages are, and where the last one ends."""
    stream = _Stream(file, budget)
    if unpickler.load_plain(stream, budget) != _MAGIC:
        raise FormatError("has another magic number than torch's")
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
    """Return where each storage lies, and where the last one ends."""
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
    """The pickles at the start of a file, read ahead window by window."""

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
        """Begin the window here, with the next `count` bytes as far as the file has them."""
        if count > MOST_STRING_BYTES:
            raise FormatError("holds a pickle of unreasonable size")
        length = min(max(count, _WINDOW), self._file.size - self._place)
        self._budget.read(length)
        self._window, self._start = self._file.read(self._place, length), self._place
