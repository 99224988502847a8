"""Compares what we read with what torch.load and safetensors read, for as long as one likes.

    python tests/fuzz/differential.py [zip|legacy|safetensors|all] [-runs=N] [-seed=N]

Files are made from parts and changed where it means something: opcodes of the pickle, shapes,
strides, offsets, dtypes and names of storages, fields of the archive's directory, the order and
sizes of storages, the JSON of a header. Checksums and directories are right unless the change
is about them. A file must give the values that `torch.load(weights_only=True)` or
`safetensors.torch.load_file` gives, or be refused. Files with another value are saved as
`different-...` in the current folder, and the exit code is 1.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import random
import struct
import sys
import tempfile
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file

from swa_avg.errors import SwaAvgError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.pickles.pickled import Global, Inert, Storage, UnreadableTensor
from swa_avg.tensors import View, verify

Draw = random.Random
_LONG_AGO = 10**9  # when a file was written; of one of this moment the reader waits for the next
_PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# What is no tensor and no plain value, or has no order.
_UNCOMPARED = (Inert, Global, Storage, set, frozenset)


class DifferentError(AssertionError):
    """We read another value than torch."""


# What is compared.


def outcome(path: Path) -> str:
    """Read a file both ways: refused, equal, or theirs refuses; else raise `DifferentError`."""
    try:
        checkpoint = open_checkpoint(path)
    except SwaAvgError:
        return "refused"
    try:
        tree, read = _read(checkpoint)
    except SwaAvgError:
        return "refused"
    finally:
        checkpoint.close()
    try:
        if checkpoint.format == "safetensors":
            theirs: Any = load_file(path)
            tied = {a: k for a, k in checkpoint.metadata.items() if a in tree and a not in theirs}
            theirs.update({alias: theirs[kept] for alias, kept in tied.items()})
            theirs = {name: theirs.pop(name) for name in tree if name in theirs} | theirs
        else:
            theirs = torch.load(path, weights_only=True)
    except Exception:  # whatever it is: no value to compare with
        return "theirs refuses"
    _compare(tree, theirs, read, "", set())
    return "equal"


def _read(checkpoint: Any) -> tuple[Any, dict[int, torch.Tensor]]:
    """Return the tree, and each tensor in it as torch would have it."""
    read: dict[int, torch.Tensor] = {}
    for view in _views(checkpoint.tree, set()):
        ref = checkpoint.located(view)
        verify([(ref.record, "tensor")])
        data = bytearray(ref.record.file.read(ref.record.offset, ref.record.length))
        dtype = getattr(torch, ref.dtype.name)
        whole = len(data) - len(data) % ref.dtype.itemsize
        base = torch.frombuffer(data[:whole], dtype=dtype) if whole else torch.empty(0, dtype=dtype)
        if ref.numel:
            read[id(view)] = base.as_strided(ref.shape, ref.stride, ref.offset).clone()
        else:
            read[id(view)] = torch.empty(ref.shape, dtype=dtype)
    return checkpoint.tree, read


def _views(value: object, seen: set[int]) -> Iterator[View]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, View):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _views(inner, seen)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _views(inner, seen)


def _compare(
    ours: object, theirs: object, read: dict[int, torch.Tensor], at: str, seen: set[int]
) -> None:
    if isinstance(ours, UnreadableTensor):
        return  # whoever wants it is refused
    if isinstance(ours, View):
        if not isinstance(theirs, torch.Tensor) or not _same(read[id(ours)], theirs):
            raise DifferentError(f"{at}: {read[id(ours)]} for {theirs}")
        return
    if isinstance(theirs, torch.Tensor):
        raise DifferentError(f"{at}: {ours!r} for a tensor")
    if id(ours) in seen:
        return
    seen.add(id(ours))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if list(map(_key, ours)) != list(map(_key, theirs)):
            raise DifferentError(f"{at}: keys {list(ours)} for {list(theirs)}")
        for (key, one), other in zip(ours.items(), theirs.values(), strict=True):
            _compare(one, other, read, f"{at}.{key}", seen)
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            raise DifferentError(f"{at}: {len(ours)} values for {len(theirs)}")
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            _compare(one, other, read, f"{at}.{number}", seen)
    elif repr(ours) != repr(theirs) and not isinstance(ours, _UNCOMPARED):
        raise DifferentError(f"{at}: {ours!r} for {theirs!r}")


def _key(key: object) -> str:
    return repr(key) if isinstance(key, str | bytes | int | float | type(None)) else "object"


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Tell whether two tensors have the same dtype, shape and bits; theirs has data."""
    if (ours.dtype, ours.shape, "cpu") != (theirs.dtype, theirs.shape, theirs.device.type):
        return False
    if theirs.is_quantized or theirs.layout != torch.strided or theirs.is_conj():
        return False
    if theirs.is_neg():
        return False
    theirs = theirs.detach()
    return bytes(_bits(ours)) == bytes(_bits(theirs))


def _bits(tensor: torch.Tensor) -> list[int]:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return flat.view(torch.uint8).tolist() if flat.numel() else []


# Objects as a pickler writes them.


class Stored:
    """A storage as a pickler refers to it."""

    def __init__(self, key: Any, kind: Any, numel: Any, *more: Any) -> None:
        self.pid = ("storage", kind, key, "cpu", numel, *more)


class Call:
    """A call, as `__reduce__` has it: a function, its arguments, perhaps a state."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


class _Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Stored) else None

    def save_global(self, obj: Any, name: Any = None) -> None:
        if isinstance(obj, Name):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
            self.memoize(obj)
        else:
            super().save_global(obj, name)

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]


class Name:
    """A name that need not exist where the pickle is written."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Have pickle take it for a function."""


_Pickler.dispatch[Name] = _Pickler.save_global


def dumped(tree: object) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, 2).dump(tree)
    return buffer.getvalue()


KINDS = {
    name: Name("torch", f"{name}Storage")
    for name in (*("Float", "Double", "Half", "BFloat16", "Long", "Int", "Byte", "Bool"), "Char",
                 "ComplexFloat")
}  # fmt: skip
UNTYPED = Name("torch.storage", "UntypedStorage")
SIZES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Byte": 1,
         "Bool": 1, "Char": 1, "ComplexFloat": 8}  # fmt: skip
NEW_DTYPES = {"uint16": 2, "uint32": 4, "float8_e5m2": 1, "float8_e4m3fn": 1, "float32": 4}
UTILS = "torch._utils"


class Maker:
    """Makes a tree of tensors on a few storages, sound for the most part.

    Attributes:
        sizes: The bytes of each storage, by key.
    """

    def __init__(self, draw: Draw, legacy: bool) -> None:
        self.draw, self.legacy = draw, legacy
        self.sizes: dict[str, int] = {}
        self.kinds: dict[str, str | None] = {}
        self.counts: dict[str, int] = {}

    def odd(self, chance: float = 0.012) -> bool:
        return self.draw.random() < chance

    def storage(self) -> tuple[Stored, int, str | None]:
        """Return a storage, new or known, how many elements are seen, and its kind."""
        draw = self.draw
        key = str(draw.randrange(3))
        if key not in self.sizes:
            kind = draw.choice(list(KINDS)) if draw.random() < 0.8 else None
            numel = draw.choice((0, 1, 4, 6, 12, 24))
            self.kinds[key], self.counts[key] = kind, numel
            self.sizes[key] = numel * (SIZES[kind] if kind else 1)
        kind, numel = self.kinds[key], self.counts[key]
        if self.odd():
            kind = draw.choice([*KINDS, None])
        if self.odd():
            numel = draw.choice((numel + 1, numel * 2, max(numel - 1, 0), 0))
        if self.odd(0.01):
            key = draw.choice(("0", "1", "2", "A", "a", "../0", ""))
        more: list[Any] = []
        seen = numel
        if self.legacy:
            more.append(None)
            if draw.random() < 0.3:
                start = draw.randrange(numel + 1)
                size = draw.randrange(numel - start + 1) + self.odd()
                name = f"{key}v{start}-{size}" if draw.random() < 0.7 else draw.choice("vw01")
                more[0] = (name, start, size)
                seen = size
        made = Stored(key, KINDS[kind] if kind else UNTYPED, numel, *more)
        if self.odd(0.01):
            made.pid = (*made.pid[:3], draw.choice(("meta", "cuda:0", b"cpu", "")), *made.pid[4:])
        return made, seen, kind

    def geometry(self, room: int) -> tuple[int, Any, Any]:
        """Return an offset, a shape and a stride for a storage of so many elements."""
        draw = self.draw
        for _ in range(20):
            shape, stride = self._shape_and_stride()
            extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
            span = 0 if 0 in shape else extent
            if span <= room or self.odd():
                break
        offset = draw.randrange(max(room - span, 0) + 1) + self.odd()
        if self.odd(0.01):
            odd = draw.choice((-1, True, 1.0, 2**40, 2**62, "1", None))
            (shape if draw.random() < 0.5 and shape else stride)[:1] = [odd]
        many = list if self.odd() else tuple
        return offset, many(shape), many(stride)

    def _shape_and_stride(self) -> tuple[list[Any], list[Any]]:
        draw = self.draw
        shape = [draw.choice((0, 1, 1, 2, 2, 3, 4)) for _ in range(draw.choice((0, 1, 1, 2, 2, 3)))]
        if draw.random() < 0.3:
            return shape, [draw.choice((0, 1, 1, 2, 3, 4)) for _ in shape]
        stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
        order = draw.sample(range(len(shape)), len(shape))
        if draw.random() < 0.3:
            shape, stride = [shape[d] for d in order], [stride[d] for d in order]
        return shape, stride

    def tensor(self) -> object:
        """Return a tensor, as one of torch's functions makes it."""
        draw = self.draw
        storage, room, kind = self.storage()
        rebuild: Any = Name(UTILS, "_rebuild_tensor_v2")
        more: list[Any] = [draw.random() < 0.2 and kind in ("Float", "Half"), OrderedDict()]
        if kind is None or self.odd():
            dtype = draw.choice(list(NEW_DTYPES))
            room = room // NEW_DTYPES[dtype]
            rebuild = Name(UTILS, "_rebuild_tensor_v3")
            more.append(Name("torch", dtype))
        elif self.odd():
            rebuild, more = Name(UTILS, "_rebuild_tensor"), []
        if more and self.odd():
            more.append(draw.choice(({"conj": True}, {"neg": True}, {"neg": False}, {}, None)))
        args = (storage, *self.geometry(room), *more)
        state = draw.choice((None,) * 60 + (self.state(), (storage, 0, (1,), (1,))))
        made: object = Call(rebuild, *args, state=state)
        chance = draw.random()
        if chance < 0.1:
            made = Call(Name(UTILS, "_rebuild_parameter"), made, draw.random() < 0.5, OrderedDict())
        elif chance < 0.15:
            name = Name(UTILS, "_rebuild_parameter_with_state")
            made = Call(name, made, False, OrderedDict(), self.state())
        elif chance < 0.2:
            of = draw.choice((Name("torch", "Tensor"), Name("torch.nn.parameter", "Parameter")))
            name = Name("torch._tensor", "_rebuild_from_type_v2")
            made = Call(name, rebuild, of, args, self.state())
        elif chance < 0.22:
            made = Call(Name("torch.nn.parameter", "Parameter"), made, False)
        elif chance < 0.23:
            made = Call(Name("torch", draw.choice(("Tensor", "FloatTensor"))), [1.0, 2.0])
        return made

    def state(self) -> object:
        """Return attributes of a tensor, now and then one that sets its elements."""
        draw = self.draw
        name = draw.choice(("tag", "tag", "data", "data", "real", "grad", "requires_grad"))
        sets = name in ("data", "real")
        value = Call(*self.plainly()) if sets and self.odd(0.9) else draw.choice((0, 1))
        attributes = {} if self.odd(0.3) else {name: value}
        return draw.choice((attributes, attributes, (attributes, None), (None, attributes)))

    def plainly(self) -> tuple[Any, ...]:
        """Return a call that makes a tensor of a whole storage."""
        storage, room, _ = self.storage()
        args = (storage, 0, (room,), (1,), False, OrderedDict())
        return Name(UTILS, "_rebuild_tensor_v2"), *args

    def plain(self) -> object:
        draw = self.draw
        size = Call(Name("torch", "Size"), (2, 3))
        values = (1, -1, 300, 2**40, 1.5, "text", b"bytes", None, True, (1, 2), [1, "a"], {"a": 1},
                  float("nan"), 1j, {1, 2}, OrderedDict(b=1), Counter("aab"), size)  # fmt: skip
        return draw.choice(values)

    def tree(self) -> object:
        """Return a state_dict, perhaps in a wrapper, with tensors of which some are shared."""
        draw = self.draw
        tensors = [self.tensor() for _ in range(draw.randrange(1, 5))]
        state: Any = OrderedDict() if draw.random() < 0.5 else {}
        for number, one in enumerate(tensors):  # a storage that nothing looks at is no storage
            state[f"n{number}"] = one
        for number in range(draw.randrange(4)):
            state[draw.choice(("a", "b", "a.weight", f"m{number}"))] = draw.choice(tensors)
        if draw.random() < 0.3:
            state["x"] = self.plain()
        wrapped = {"epoch": draw.randrange(9), "state_dict": state, "args": self.plain()}
        return draw.choice((state, wrapped, [state, tensors[0]]))


# Opcodes.


def changed_opcodes(data: bytes, draw: Draw) -> bytes:
    """Change a pickle by its opcodes: their arguments, their order, what is called."""
    ends = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    ops = [data[a:b] for a, b in pairwise(ends) if a is not None]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        at = draw.randrange(1, max(len(ops) - 1, 2))
        if at >= len(ops):
            break
        change = draw.randrange(7)
        if change < 3:
            ops[at] = _changed_argument(ops[at], draw, ops)
        elif change == 3:
            del ops[at]
        elif change == 4:
            ops.insert(at, draw.choice(ops[1:-1] or ops))
        elif change == 5:
            other = draw.randrange(1, len(ops))
            ops[at], ops[other] = ops[other], ops[at]
        else:
            ops.insert(at, draw.choice(_FRAGMENTS))
    return b"".join(ops)


_GLOBALS = [
    *((UTILS, f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *(("torch", f"{name}Storage") for name in SIZES),
    *(("torch", name) for name in ("Tensor", "Size", "float32", "uint16", "device")),
    ("torch.storage", "UntypedStorage"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("torch.nn.parameter", "Parameter"),
    ("__builtin__", "set"),
    ("_codecs", "encode"),
]
_FRAGMENTS = [
    *(pickle.BININT1 + bytes([n]) for n in range(5)),
    *(pickle.BINGET + bytes([n]) for n in range(12)),
    *(pickle.BINPUT + bytes([n]) for n in range(5)),
    *(pickle.GLOBAL + f"{module}\n{name}\n".encode() for module, name in _GLOBALS),
    pickle.NONE, pickle.NEWTRUE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE,
    pickle.BUILD, pickle.REDUCE, pickle.NEWOBJ, pickle.SETITEM, pickle.TUPLE1, pickle.TUPLE2,
    pickle.MARK, pickle.TUPLE, pickle.BINPERSID, pickle.APPEND, pickle.SETITEMS,
    pickle.EMPTY_DICT + pickle.BUILD, pickle.EMPTY_TUPLE + pickle.REDUCE,
    pickle.EMPTY_TUPLE + pickle.NEWOBJ, pickle.NONE + pickle.BUILD,
]  # fmt: skip


def _changed_argument(op: bytes, draw: Draw, ops: list[bytes]) -> bytes:
    code = op[:1]
    if code in (pickle.BININT1, pickle.BINGET, pickle.BINPUT):
        return code + bytes([draw.choice((0, 1, 2, 3, 4, 6, 12, 24, op[1] ^ 1, op[1] + 1 & 255))])
    if code == pickle.GLOBAL:
        module, name = draw.choice(_GLOBALS)
        return code + f"{module}\n{name}\n".encode()
    if code == pickle.BINUNICODE:
        texts = [other for other in ops if other[:1] == code]
        made = draw.choice((b"0", b"1", b"2", b"storage", b"cpu", b"a", b"data", b"meta"))
        return draw.choice((*texts, code + struct.pack("<I", len(made)) + made))
    same = [other for other in ops if len(other) == len(op)]
    return draw.choice(same)


# Archives.


@dataclass(frozen=True)
class Entry:
    """A record of an archive, and where the directory or the local header differ from it."""

    name: bytes
    data: bytes
    local: dict[str, Any] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)


_FULL = 0xFFFFFFFF
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_LINE = struct.Struct("<4sHHHHHHIIIHHHHHII")


def archive(entries: list[Entry], **end: Any) -> bytes:
    """Write an archive, as its entries say."""
    made, lines = bytearray(), bytearray()
    for entry in entries:
        says = {
            "name": entry.name, "flags": 0x800, "method": 0, "crc": zlib.crc32(entry.data),
            "stored": len(entry.data), "length": len(entry.data), "extra": b"", "comment": b"",
            "place": len(made), "magic": b"PK\x03\x04",
        }  # fmt: skip
        for where, out in ((says | entry.local, made), (says | entry.line, lines)):
            shared = (20, where["flags"], where["method"], 0, 0x21, where["crc"],
                      where["stored"], where["length"], len(where["name"]))  # fmt: skip
            if out is made:
                out += _LOCAL.pack(where["magic"], *shared, len(where["extra"]))
                out += where["name"] + where["extra"] + entry.data
            else:
                rest = (len(where["extra"]), len(where["comment"]), 0, 0, 0, where["place"])
                out += _LINE.pack(b"PK\x01\x02", 20, *shared, *rest)
                out += where["name"] + where["extra"] + where["comment"]
    start, count = len(made), len(entries)
    tail = bytearray()
    if zip64 := end.get("zip64"):
        numbers = {"count": count, "size": len(lines), "start": start} | zip64
        tail += struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, numbers["count"],
                            numbers["count"], numbers["size"], numbers["start"])  # fmt: skip
        tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(lines), 1)
    numbers = {"count": count, "size": len(lines), "start": start} | end.get("end", {})
    comment = end.get("comment", b"")
    tail += struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, numbers["count"], numbers["count"],
                        numbers["size"], numbers["start"], len(comment))  # fmt: skip
    return bytes(made + lines + tail) + comment + end.get("behind", b"")


def changed_archive(entries: list[Entry], draw: Draw) -> bytes:
    """Change the records or the directory of an archive."""
    end: dict[str, Any] = {}
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.75:
            _change_record(entries, draw.randrange(len(entries)), draw)
        else:
            _change_end(end, draw)
    return archive(entries, **end)


def _change_record(entries: list[Entry], at: int, draw: Draw) -> None:
    one = entries[at]
    wide = struct.pack("<HHQQ", 1, 16, len(one.data), len(one.data))

    def put(**other: Any) -> None:
        entries[at] = replace(one, **other)

    changes: list[Callable[[], Any]] = [
        lambda: draw.shuffle(entries),
        lambda: entries.append(replace(one, data=bytes(len(one.data)))),
        lambda: entries.append(replace(one, name=one.name.upper(), data=one.data[::-1])),
        lambda: entries.insert(0, replace(one, name=one.name.swapcase())),
        lambda: entries.append(Entry(b"archive/BYTEORDER", b"big")),
        lambda: entries.append(Entry(b"archive/byteorder", draw.choice((b"big", b"little")))),
        lambda: entries.append(Entry(b"archive/.data/byteorder", b"big")),
        lambda: entries.append(Entry(b"other/data.pkl", b"N.")),
        lambda: put(name=one.name.replace(b"archive", b"x")),
        lambda: put(name=one.name.upper()),
        lambda: put(data=one.data + b"\0"),
        lambda: put(data=one.data[:-1]),
        lambda: put(data=b"big") if b"order" in one.name else None,
        lambda: put(local={"name": one.name[:-1] + b"9"}),
        lambda: put(local={"extra": b"FB\x04\0ZZZZ"}),
        lambda: put(local={"method": 8}),
        lambda: put(line={"method": 8}),
        lambda: put(line={"flags": draw.choice((0, 8, 1))}),
        lambda: put(local={"flags": draw.choice((0, 8, 1))}),
        lambda: put(line={"crc": draw.choice((0, 1))}),
        lambda: put(local={"crc": 0, "stored": 0}),
        lambda: put(line={"length": len(one.data) + 4}),
        lambda: put(line={"place": draw.choice((0, 40))}),
        lambda: put(line={"comment": b"PK\x05\x06" * 6}),
        lambda: put(line={"stored": _FULL, "length": _FULL, "extra": wide}),
        lambda: put(line={"extra": wide}),
        lambda: put(line={"length": _FULL, "extra": wide[:4] + wide[12:]}),
        lambda: entries.pop(at) if len(entries) > 1 else None,
    ]
    draw.choice(changes)()


def _change_end(end: dict[str, Any], draw: Draw) -> None:
    changes: list[Callable[[], Any]] = [
        lambda: end.update(comment=draw.choice((b"x", b"PK\x05\x06" + bytes(18), bytes(70)))),
        lambda: end.update(behind=draw.choice((b"\0", b"PK\x05\x06", bytes(22)))),
        lambda: end.update(zip64={}),
        lambda: end.update(zip64={}, end={"size": _FULL, "start": _FULL, "count": 0xFFFF}),
        lambda: end.update(zip64={draw.choice(("count", "size", "start")): 1}),
        lambda: end.update(end={draw.choice(("count", "size", "start")): draw.randrange(99)}),
    ]
    draw.choice(changes)()


def zip_file(draw: Draw) -> bytes:
    """Return a torch zip of any tree, its pickle or its directory perhaps changed."""
    maker = Maker(draw, legacy=False)
    pickled = dumped(maker.tree())
    kind = draw.randrange(3)
    if kind == 1:
        pickled = changed_opcodes(pickled, draw)
    entries = [Entry(b"archive/data.pkl", pickled), Entry(b"archive/byteorder", b"little")]
    for key, size in maker.sizes.items():
        entries.append(Entry(f"archive/data/{key}".encode(), draw.randbytes(size)))
    entries.append(Entry(b"archive/version", b"3\n"))
    return changed_archive(entries, draw) if kind == 2 else archive(entries)


def legacy_file(draw: Draw) -> bytes:
    """Return a file of torch's format before 1.6, perhaps changed."""
    maker = Maker(draw, legacy=True)
    pickled = dumped(maker.tree())
    kind = draw.randrange(3)
    if kind == 1:
        pickled = changed_opcodes(pickled, draw)
    keys: list[Any] = list(maker.sizes)
    stored = [(maker.counts[key], draw.randbytes(maker.sizes[key])) for key in keys]
    if kind == 2:
        at = draw.randrange(len(keys))
        changes: list[Callable[[], Any]] = [
            lambda: keys.reverse(),
            lambda: (keys.reverse(), stored.reverse()),
            lambda: stored.reverse(),
            lambda: keys.append(keys[0]),
            lambda: (keys.append(keys[0]), stored.append(stored[0])),
            lambda: keys.pop(),
            lambda: keys.__setitem__(at, draw.choice(("v", "w", "7", 0))),
            lambda: stored.__setitem__(at, (stored[at][0] + 1, stored[at][1])),
            lambda: stored.__setitem__(at, (-1, stored[at][1])),
            lambda: stored.__setitem__(at, (stored[at][0], stored[at][1][:-1])),
            lambda: stored.append((1, b"more")),
        ]
        draw.choice(changes)()
    system = {"protocol_version": 1001, "little_endian": not maker.odd(), "type_sizes": {}}
    heads = [0x1950A86A20F9469CFC6C, 1001 + maker.odd(0.01), system]
    made = b"".join(pickle.dumps(part, 2) for part in heads) + pickled + pickle.dumps(keys, 2)
    made += b"".join(struct.pack("<q", count) + data for count, data in stored)
    return made + (draw.randbytes(8) if maker.odd() else b"")


_NAMES = ("a", "b", "a.weight", "état", "🙂", "\\", '"', "\n", "format", "x" * 50, "")
_DTYPES = {"F32": 4, "F64": 8, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E5M2": 1,
           "C64": 8, "U16": 2}  # fmt: skip


def safetensors_file(draw: Draw) -> bytes:
    """Return a safetensors file whose header is sound, odd or wrong."""
    odd = lambda chance=0.04: draw.random() < chance  # noqa: E731
    place = 0
    pairs: list[tuple[str, Any]] = []
    for name in draw.sample(_NAMES, draw.randrange(5)):
        dtype = draw.choice(list(_DTYPES))
        shape: Any = [draw.choice((0, 1, 2, 3)) for _ in range(draw.randrange(4))]
        size = math.prod(shape) * _DTYPES[dtype]
        offsets: Any = [place, place + size]
        place += size
        if odd():
            offsets = draw.choice(
                ([0, size], [place, place + size], [float(offsets[0]), offsets[1]],
                 offsets[::-1], [*offsets, 0], None, [-1, size - 1], [True, size])
            )  # fmt: skip
        if odd():
            shape = draw.choice(([*shape, 1], shape[1:], [-1], [2**62, 4, 0], None, [1.0], "2"))
        entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        if odd():
            entry = draw.choice(({**entry, "more": 1}, {**entry, "dtype": "F4"},
                                 {**entry, "dtype": dtype.lower()}, {"dtype": dtype}))  # fmt: skip
        pairs.append((name, entry))
    if odd(0.5):
        text = draw.choice(({"format": "pt"}, {"tied": "a"}, {"b": "a"}, {}, None, {"a": 1}, []))
        pairs.insert(draw.choice((0, len(pairs))), ("__metadata__", text))
    if odd(0.3):
        draw.shuffle(pairs)
    if odd() and pairs:
        pairs.append(draw.choice(pairs))
    dumps = [json.dumps(value, separators=(",", ":")) for _, value in pairs]
    ascii_only = odd(0.3)
    names = [json.dumps(name, ensure_ascii=ascii_only) for name, _ in pairs]
    if odd() and names:
        names[0] = draw.choice(('"\\u0061"', '"\\ud800"', '"a\\u0000"', "'a'", "1", '"\\x61"'))
    space = draw.choice(("", "", "", " ", "\t\n"))
    header = "{" + ("," + space).join(
        f"{name}:{space}{value}" for name, value in zip(names, dumps, strict=True)
    ) + "}"  # fmt: skip
    data = header.encode("utf-8", "surrogatepass")
    data += draw.choice((b" ", b"", b"\0", b"x", b"\n{}")) if odd() else b" " * (-len(data) % 8)
    if odd():
        at = draw.randrange(len(data))
        data = data[:at] + draw.choice((b"", b",", b"0", b" ", b"\xff", b'"')) + data[at + 1 :]
    length = len(data) + (draw.choice((1, -1, 8)) if odd() else 0)
    body = draw.randbytes(max(place + (draw.choice((-1, 1, 4)) if odd() else 0), 0))
    return struct.pack("<Q", max(length, 0)) + data + body


TARGETS: dict[str, Callable[[Draw], bytes]] = {
    "zip": zip_file,
    "legacy": legacy_file,
    "safetensors": safetensors_file,
}


def run(name: str, runs: int, seed: int) -> Counter[str]:
    """Compare files of a format; return how many ended how. What differs is saved."""
    found: Counter[str] = Counter()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=_PLACE) as folder:
        path = Path(folder, "in")
        for number in range(runs):
            draw = Draw(f"{name} {seed} {number}")
            try:
                data = TARGETS[name](draw)
            except (struct.error, ValueError):
                continue  # a number that does not fit into its field
            path.write_bytes(data)
            os.utime(path, (_LONG_AGO, _LONG_AGO))
            try:
                found[outcome(path)] += 1
            except DifferentError as difference:
                found["different"] += 1
                kept = Path(f"different-{name}-{hashlib.sha256(data).hexdigest()[:12]}")
                kept.write_bytes(data)
                print(f"{kept}: {difference}", file=sys.stderr)
    return found


def main() -> None:
    names = [option for option in sys.argv[1:] if not option.startswith("-")]
    given = dict(option.partition("=")[::2] for option in sys.argv[1:] if option.startswith("-"))
    if len(names) > 1 or not set(names) <= {*TARGETS, "all"} or not given.keys() <= {
        "-runs", "-seed"
    }:  # fmt: skip
        sys.exit(f"usage: differential.py [{'|'.join(TARGETS)}|all] [-runs=N] [-seed=N]")
    different = 0
    for name in TARGETS if names in ([], ["all"]) else names:
        found = run(name, int(given.get("-runs", 10_000)), int(given.get("-seed", 0)))
        different += found["different"]
        print(f"{name}: {found.total()} files, " + ", ".join(
            f"{found[what]} {what}" for what in ("equal", "refused", "theirs refuses", "different")
        ))  # fmt: skip
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
