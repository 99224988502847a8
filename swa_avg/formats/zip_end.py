"""The end records of a zip archive, with the position of its directory: classic and ZIP64.

An archive is refused if its two end records contradict each other, or if bytes follow it.
"""

from __future__ import annotations

import struct
from typing import NoReturn

from swa_avg.errors import FormatError
from swa_avg.storage import InputFile

FULL = 0xFFFFFFFF  # in a 32-bit field: the number is in the ZIP64 field
# Magic, disks, records on this disk and on all, the directory's size and start, the comment.
_END = struct.Struct("<4sHHHHIIH")
_ZIP64_END = struct.Struct("<4s12xIIQQQQ")
_ZIP64_LOCATOR = struct.Struct("<4sIQI")
_LONGEST_COMMENT = 0xFFFF


def refuse_broken(file: InputFile, why: str) -> NoReturn:
    """Refuse an archive that is cut short, damaged or inconsistent."""
    raise FormatError(
        f"is not a complete zip archive ({why})",
        file=file.path,
        expected="a checkpoint written by torch.save",
        remedy="The file is cut short or damaged",
    )


def find_directory(file: InputFile) -> tuple[int, int, int]:
    """Return the position and size of the directory, and its number of records."""
    first = max(0, file.size - _END.size - _LONGEST_COMMENT)
    tail = file.read(max(first, file.size - _END.size), min(file.size, _END.size))
    if not tail.startswith(b"PK\x05\x06"):  # the archive may end with a comment
        tail = file.read(first, file.size - first)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        refuse_broken(file, "its end record is missing")
    _, disk, other, here, count, size, start, comment = _END.unpack_from(tail, at)
    end = file.size - len(tail) + at
    appended = file.size - end - _END.size - comment
    if appended > 0:
        raise FormatError(
            f"has {appended} bytes after its end",
            file=file.path,
            expected="a checkpoint written by torch.save",
            remedy="Something was appended to it",
        )
    numbers = _zip64(file, end)
    if numbers:
        # torch always writes them, even where 32 bits are enough.
        short = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, FULL, FULL)
        if (disk, other, here, count, size, start) != tuple(map(min, numbers[1:], short)):
            refuse_broken(file, "its two end records differ")
        end, disk, other, here, count, size, start = numbers
    if disk or other or here != count or appended < 0:
        refuse_broken(file, "it is split into several files")
    if start + size != end:
        refuse_broken(file, "its directory is not where its end record says")
    return start, size, count


def _zip64(file: InputFile, end: int) -> tuple[int, ...]:
    """Return the position of the ZIP64 end record and its numbers; empty if there is none."""
    place = end - _ZIP64_LOCATOR.size
    if place < 0:
        return ()
    magic, _, found, _ = _ZIP64_LOCATOR.unpack(file.read(place, _ZIP64_LOCATOR.size))
    if magic != b"PK\x06\x07":
        return ()
    if found + _ZIP64_END.size > place:
        refuse_broken(file, "its ZIP64 end record is not where its locator says")
    magic, *numbers = _ZIP64_END.unpack(file.read(found, _ZIP64_END.size))
    if magic != b"PK\x06\x06":
        refuse_broken(file, "its ZIP64 end record is not where its locator says")
    return found, *numbers
