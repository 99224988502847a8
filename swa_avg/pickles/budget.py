"""Limits on the memory, time and disk that the headers of one checkpoint can demand.

A small header can describe huge data, so a small file can demand more memory, time or disk
than the machine has. Every reader draws on the budget of its checkpoint before it builds
what a header describes. This module defines all limits. A file of 200,000 tensors, with the
state of its optimizer, uses less than half of each.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from swa_avg.errors import FormatError

# Bytes of headers: pickles, zip directories, JSON. 200,000 tensors take 60 MB; the rest
# leaves room for numpy arrays and replay buffers, which torch.save stores in the pickle.
MOST_HEADER_BYTES = 1 << 30
# Bytes of one safetensors header: the limit of the safetensors library.
MOST_SAFETENSORS_HEADER = 100_000_000
# Bytes of one string in a pickle from before torch 1.6: no directory gives its length.
MOST_STRING_BYTES = 1 << 28
# Opcodes of pickles, values of JSON, records, corners of chunks. Each creates at most one
# object of about 100 bytes and takes half a microsecond. A tensor takes 32 opcodes, or 125
# with the state of Adam.
MOST_OBJECTS = 1 << 26
# Tensors of one state_dict. Each takes 3 kB until its average is written.
MOST_TENSORS = 1 << 19
# Objects and bytes that constructors copy (`dict(d)`, `set(s)`). Pickles of torch.save copy
# nothing twice, so the limit is the number of opcodes and bytes of the pickle, plus this.
FREE_COPIES = 1 << 16
# Bytes of output per byte of input, plus a constant. The output can be larger than the input
# where views of one storage overlap or are expanded, or where many names share one text.
MOST_GROWTH = 8
FREE_GROWTH = 16 << 20
# An expanded view (stride 0) is written in full. It may have this many bytes, or as many as
# its storage.
MOST_EXPANDED_BYTES = 1 << 20
# Bytes of the tensor names that nested modules form, and the depth of the nesting.
MOST_NAME_BYTES = 128 << 20
MOST_DEPTH = 200
# Dimensions of a tensor, as in numpy.
MOST_DIMENSIONS = 64
# Different keys with the same hash. Python salts the hashes of strings, so they cannot be
# chosen to collide. Numbers and tuples of numbers can, and make a dict as slow as a list.
MOST_COLLISIONS = 16
# Parts of one key: nested tuples can take forever to hash.
MOST_KEY_PARTS = 1000
# The largest number of elements that torch can count.
MOST_ELEMENTS = (1 << 63) - 1


class Budget:
    """Counts what is read and built from the headers of one checkpoint.

    Attributes:
        header_bytes: Bytes of headers read so far.
        objects: Objects built from the headers.
        tensors: Tensors that the headers describe. Tensors in pickles are not counted.
        name_bytes: Bytes of names that are joined from the names of nested modules.
    """

    def __init__(self) -> None:
        self.header_bytes = 0
        self.objects = 0
        self.tensors = 0
        self.name_bytes = 0
        self._keys: defaultdict[int, list[Any]] = defaultdict(list)

    def read(self, count: int) -> None:
        """Count bytes of headers. Call this before reading them."""
        self.header_bytes += count
        _check("has headers of {} bytes", self.header_bytes, MOST_HEADER_BYTES)

    def make(self, count: int) -> None:
        """Count objects."""
        self.objects += count
        _check("has headers of {} objects", self.objects, MOST_OBJECTS)

    def hold(self, count: int) -> None:
        """Count tensors."""
        self.tensors += count
        self.check_tensors(self.tensors)

    def check_tensors(self, count: int) -> None:
        """Check the number of tensors of a state_dict."""
        _check("has {} tensors", count, MOST_TENSORS)

    def json(self, data: bytes) -> None:
        """Count the objects of a JSON text before it is parsed; lists and dicts count twice."""
        self.check_tensors(data.count(b"{") - 1)
        self.make(sum(map(data.count, (b",", b":", b"[", b"{", b"[", b"{"))))

    def name(self, length: int, depth: int) -> None:
        """Count a name that is joined from the names of nested modules."""
        self.name_bytes += length
        _check("holds modules whose names have {} bytes", self.name_bytes, MOST_NAME_BYTES)
        _check("holds modules within modules, {} deep", depth, MOST_DEPTH)

    def write(self, what: str, wanted: int, given: int) -> None:
        """Check that an output is not far larger than its input.

        Args:
            what: A name for the output, used in the message.
            wanted: The size of the output in bytes.
            given: The size of the input in bytes.
        """
        most = MOST_GROWTH * given + FREE_GROWTH
        _check(f"holds {what} of {{}} bytes, made of {given:,}", wanted, most)

    def key(self, key: Any) -> Any:
        """Return a dict key or set element unchanged, after checking that it is cheap to hash."""
        if type(key) is str or (type(key) is int and -(1 << 60) < key < 1 << 60):
            return key
        parts = _parts(key)
        if parts > MOST_KEY_PARTS:
            raise FormatError("holds a dictionary key of unreasonable size")
        self.make(parts)
        same = self._keys[hash(key)]
        if key not in same:
            same.append(key)
            _check("holds {} different keys of one hash", len(same), MOST_COLLISIONS)
        return key


def _parts(key: object) -> int:
    """Return the number of objects in a key, counted only until the limit is exceeded."""
    nodes, count = [key], 0
    while nodes and count <= MOST_KEY_PARTS:
        node = nodes.pop()
        count += 1
        if isinstance(node, tuple | frozenset):
            count += len(node)
            if count <= MOST_KEY_PARTS:
                nodes.extend(node)
    return count


def _check(found: str, count: int, most: int) -> None:
    if count > most:
        raise FormatError(
            found.format(f"{count:,}"),
            expected=f"{most:,} at most",
            remedy="The limit protects against hostile files and cannot be changed",
        )
