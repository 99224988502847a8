"""What the headers of one checkpoint may ask for.

A header is small and what it describes is large, so a small file can ask for more memory,
time or disk than there is. Every reader draws on the budget of its checkpoint before it makes
what a header asks for. The limits are here and nowhere else. Files of 200,000 tensors stay
below a half of each, with the state of their optimizer too.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from swa_avg.errors import FormatError

# Bytes of headers: pickles, zip directories, JSON. 200,000 tensors take 60 MB; the rest is
# for numpy arrays and replay buffers, which torch.save puts into the pickle.
MOST_HEADER_BYTES = 1 << 30
# Bytes of one safetensors header: what safetensors itself reads.
MOST_SAFETENSORS_HEADER = 100_000_000
# Bytes of one string in a pickle before torch 1.6, whose length stands in no directory.
MOST_STRING_BYTES = 1 << 28
# Opcodes of pickles, values of JSON, records, corners of chunks. Each makes one object at most,
# of about 100 bytes, and takes half a microsecond. A tensor takes 32 opcodes, with the state of
# Adam 125.
MOST_OBJECTS = 1 << 26
# Tensors of one state_dict. Each takes 3 kB until its average is written.
MOST_TENSORS = 1 << 19
# Objects and bytes that constructors copy (`dict(d)`, `set(s)`): pickles of torch.save copy
# nothing twice, so as many as the pickle has opcodes and bytes; and these in any case.
FREE_COPIES = 1 << 16
# Bytes of the output for each byte of the input, where views of one storage overlap or are
# expanded, or one text stands under many names; and what is free in any case.
MOST_GROWTH = 8
FREE_GROWTH = 16 << 20
# An expanded view (stride 0) is written in full: this many bytes, or as many as its storage.
MOST_EXPANDED_BYTES = 1 << 20
# Bytes of the names that modules within modules give their tensors, and how deep these are.
MOST_NAME_BYTES = 128 << 20
MOST_DEPTH = 200
# Dimensions of a tensor, as in numpy.
MOST_DIMENSIONS = 64
# Different keys of one hash. Texts cannot be chosen to collide, since Python salts their
# hashes; numbers and tuples of numbers can, and make a dict as slow as a list.
MOST_COLLISIONS = 16
# Parts of one key: nested tuples can take for ever to hash.
MOST_KEY_PARTS = 1000
# The largest number of elements that torch can count.
MOST_ELEMENTS = (1 << 63) - 1


class Budget:
    """Counts what the headers of one checkpoint make.

    Attributes:
        header_bytes: Bytes of headers that were read.
        objects: Objects that were made of them.
        tensors: Tensors that they describe, but for those of pickles.
        name_bytes: Bytes of names that are made of other names.
    """

    def __init__(self) -> None:
        self.header_bytes = 0
        self.objects = 0
        self.tensors = 0
        self.name_bytes = 0
        self._keys: defaultdict[int, list[Any]] = defaultdict(list)

    def read(self, count: int) -> None:
        """Draw bytes of headers, before they are read."""
        self.header_bytes += count
        _check("has headers of {} bytes", self.header_bytes, MOST_HEADER_BYTES)

    def make(self, count: int) -> None:
        """Draw objects."""
        self.objects += count
        _check("has headers of {} objects", self.objects, MOST_OBJECTS)

    def hold(self, count: int) -> None:
        """Draw tensors."""
        self.tensors += count
        self.check_tensors(self.tensors)

    def check_tensors(self, count: int) -> None:
        """Check the number of tensors of a state_dict."""
        _check("has {} tensors", count, MOST_TENSORS)

    def json(self, data: bytes) -> None:
        """Draw what a JSON text makes, before it is parsed; lists and dicts count twice."""
        self.check_tensors(data.count(b"{") - 1)
        self.make(sum(map(data.count, (b",", b":", b"[", b"{", b"[", b"{"))))

    def name(self, length: int, depth: int) -> None:
        """Draw a name that is made of the names of modules, one within the other."""
        self.name_bytes += length
        _check("holds modules whose names have {} bytes", self.name_bytes, MOST_NAME_BYTES)
        _check("holds modules within modules, {} deep", depth, MOST_DEPTH)

    def write(self, what: str, wanted: int, given: int) -> None:
        """Check that an output is not far larger than what it is made of.

        Args:
            what: What is written, for the message.
            wanted: Its bytes.
            given: The bytes of the input that it is made of.
        """
        most = MOST_GROWTH * given + FREE_GROWTH
        _check(f"holds {what} of {{}} bytes, made of {given:,}", wanted, most)

    def key(self, key: Any) -> Any:
        """Return a key of a dict, or an element of a set, if it is cheap to hash and to find."""
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
    """Return how many objects a key is made of; of one with too many, only that it has."""
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
            remedy="swa-avg reads no file that asks for more",
        )
