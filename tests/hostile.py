"""Builders of files that mean harm, or that came to some."""

from __future__ import annotations

import enum
import io
import json
import pickle
import struct
import tempfile
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

# Code in a pickle.


class Color(enum.Enum):
    """An enum of a module that no reader has to have."""

    RED = 1


def nested(marker: Path) -> bytes:
    return pickle.dumps(Call(open, str(marker), "w"))


class Call:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


class Build:
    """An object that is built, and then given a state by a function that writes."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __setstate__(self, state: Any) -> None:
        state["marker"].touch()


def payloads(marker: Path) -> dict[str, object]:
    import builtins
    import functools
    import importlib
    import operator
    import os
    import runpy
    import shutil
    import subprocess
    import timeit

    name = str(marker)
    script = marker.with_suffix(".py")
    script.write_text(f"open({name!r}, 'w').close()")
    saved = marker.with_suffix(".saved")
    torch.save(Call(open, name, "w"), saved)
    code = f"open({name!r}, 'w').close()"
    touch = Call(getattr, Call(Path, name), "touch")
    return {
        "os.system": Call(os.system, f"touch {name}"),
        "os.mkdir": Call(os.mkdir, name),
        "os.open": Call(os.open, name, os.O_CREAT),
        "popen": Call(subprocess.Popen, ["touch", name]),
        "check_call": Call(subprocess.check_call, ["touch", name]),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "compile": Call(eval, Call(compile, code, "x", "eval")),
        "open": Call(open, name, "w"),
        "io.open": Call(io.FileIO, name, "w"),
        "copy": Call(shutil.copy, str(script), name),
        "symlink": Call(os.symlink, str(script), name),
        "loads": Call(pickle.loads, nested(marker)),
        "torch.load": Call(functools.partial(torch.load, weights_only=False), str(saved)),
        "run_path": Call(runpy.run_path, str(script)),
        "timeit": Call(timeit.timeit, code, "pass", time.time, 1),
        "partial": Call(functools.reduce, Call(operator.attrgetter, "__call__"), ()),
        "method": Call(operator.methodcaller("touch"), Call(Path, name)),
        "getattr": CallOf(touch),
        "map": Call(list, Call(map, eval, (code,))),
        "sorted key": Call(max, [code, code], Call(dict)),
        "import": Call(getattr(builtins, "__import__"), "this"),  # noqa: B009
        "import_module": Call(importlib.import_module, "antigravity_none"),
        "setstate": Build(marker),
        "dict key": {Color.RED: Call(os.mkdir, name)},
        "list": [[(Call(os.mkdir, name),)]],
    }


class CallOf:
    """An object that calls what another object gives."""

    def __init__(self, inner: Call) -> None:
        self.inner = inner

    def __reduce__(self) -> Any:
        import operator

        return operator.methodcaller("__call__"), (self.inner,)


with tempfile.TemporaryDirectory() as _folder:
    NAMES = list(payloads(Path(_folder) / "marker"))
# Payloads that need more than a call to leave a mark; still nothing of them may run.
UNMARKED = {"partial", "sorted key", "import", "import_module"}


# Each way in which a pickle can have something called.
OPCODES = {
    "protocol 0 GLOBAL and REDUCE": b"cos\nsystem\n(S'touch {}'\ntR.",
    "INST": b"(S'touch {}'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch {}'\no.",
    "NEWOBJ": b"\x80\x02cos\nsystem\nS'touch {}'\n\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\nS'touch {}'\n\x85}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93S'touch {}'\n\x85R.",
    "BUILD": b"\x80\x02cbuiltins\nobject\n)\x81}S'__setstate__'\ncos\nsystem\nsbS'touch {}'\nb.",
    "nested name": b"\x80\x04\x8c\x08builtins\x8c\x0b__dict__.eval\x93S'1'\n\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "string reference": b"Pos.system\n.",
}


# Pickles that lie about their tensors.


def tensor_pickle(
    storage: tuple[object, ...],
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    **others: object,
) -> bytes:
    """A pickle of {"a": tensor, "b": tensor, ...} as torch writes them, from any numbers."""

    class Storage:
        pass

    class Reference:
        def __reduce__(self) -> tuple[object, ...]:
            args = (Storage(), offset, shape, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, args

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return storage if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Reference(), "b": Reference(), **others})
    return buffer.getvalue()


FOUR = ("storage", torch.FloatStorage, "0", "cpu", 4)
# Tensors of a storage of sixteen bytes that no writer has made: storage, offset, shape, stride.
UNSOUND: list[tuple[Any, Any, Any, Any]] = [
    (FOUR, 0, (2**40,), (0,)),  # a bomb: one element seen a trillion times
    (FOUR, 0, (1024, 1024), (0, 0)),
    (FOUR, 0, (5,), (1,)),
    (FOUR, 2, (3,), (1,)),
    (FOUR, 4, (1,), (1,)),
    (FOUR, 0, (2,), (4,)),
    (FOUR, 2**61, (1,), (1,)),
    (FOUR, -1, (1,), (1,)),
    (FOUR, 0, (-1,), (1,)),
    (FOUR, 3, (2,), (-1,)),
    (FOUR, 0, (2**80,), (0,)),
    (FOUR, 0, (2, 2), (1,)),
    (FOUR, 0, (2.0,), (1,)),
    (FOUR, 0, (True,), (1,)),
    (FOUR, None, (1,), (1,)),
    (FOUR, 0, None, (1,)),
    (FOUR, 0, (2**31,) * 3, (0, 0, 0)),
    ((*FOUR[:4], 5), 0, (1,), (1,)),
    ((*FOUR[:4], 3), 0, (1,), (1,)),
    ((*FOUR[:4], 2**62), 0, (1,), (1,)),
    ((*FOUR[:4], -4), 0, (1,), (1,)),
    ((*FOUR[:4], "4"), 0, (1,), (1,)),
    ((*FOUR[:2], "1", *FOUR[3:]), 0, (1,), (1,)),
    ((*FOUR[:2], "../version", *FOUR[3:]), 0, (1,), (1,)),
    (("storage", torch.DoubleStorage, "0", "cpu", 4), 0, (1,), (1,)),
    (("storage", Path, "0", "cpu", 4), 0, (1,), (1,)),
    (("storage",), 0, (1,), (1,)),
    (("file", *FOUR[1:]), 0, (1,), (1,)),
    ("storage", 0, (1,), (1,)),
]


# Zip archives.


def pack(path: Path, pickled: bytes, **records: bytes) -> Path:
    """Write a torch zip with a pickle of our own and storages `d0`, `d1`, ..."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"archive/data/{name[1:]}", data)
        archive.writestr("archive/version", "3\n")
    return path


def archive(tmp_path: Path) -> Path:
    path = tmp_path / "in.pt"
    torch.save({"a": torch.arange(100.0), "b": torch.randn(9)}, path)
    return path


def rewritten(path: Path, **changes: Any) -> Path:
    """Pack an archive again, with entries compressed, doubled or left out."""
    with zipfile.ZipFile(path) as source:
        entries = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", changes.get("compression", zipfile.ZIP_STORED)) as packed:
        for name, data in entries.items():
            if name not in changes.get("without", ()):
                packed.writestr(f"{changes.get('root', 'in')}/{name}", data)
        for name, data in changes.get("extra", {}).items():
            packed.writestr(name, data)
    return path


def patched(path: Path, name: str, local: bool, field: int, code: str, value: int) -> Path:
    """Write a number into a record's local header, or into its entry in the directory."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as source:
        place = source.getinfo(name).header_offset
    if not local:
        place = data.rindex(name.encode()) - 46
    data[place + field : place + field + struct.calcsize(code)] = struct.pack(code, value)
    path.write_bytes(data)
    return path


# Pickles that eat memory or time.


def put(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def laughs(opener: bytes, closer: bytes, depth: int = 40, width: int = 10) -> bytes:
    """Containers of references to the one before: width ** depth when written out."""
    parts = [b"N\x94"]
    for level in range(depth):
        parts.append(opener + (b"j" + struct.pack("<I", level)) * width + closer + b"\x94")
    return b"".join(parts)


LAUGHS_T = laughs(b"(", b"t")
LAUGHS_L = laughs(b"(", b"l")
DICTS = b"N\x94" + b"".join(
    b"(" + b"".join(b"\x8c\x04%04d" % n + b"j" + struct.pack("<I", level) for n in range(1000))
    + b"d\x94" for level in range(5)
)  # fmt: skip
LONG_LIST = b"](" + b"N" * 100_000 + b"e\x94"
COPIES = b"\x8c\x08builtins\x8c\x05tuple\x93\x94(" + b"h\x01h\x00\x85R" * 100_000 + b"t"
HASHED = b"(" + b"N" * 100_000 + b"t\x94" + b"(" + b"h\x00" * 100_000 + b"t"

HUNGRY = {
    "memo index": put(b"N", b"r\xff\xff\xff\xff", b"N", b"p4294967295000000\n"),
    "long string": put(b"\x8d" + struct.pack("<Q", 2**42)),
    "long bytes": put(b"\x8e" + struct.pack("<Q", 2**42)),
    "long bytearray": put(b"\x96" + struct.pack("<Q", 2**42)),
    "long frame": put(b"\x95" + struct.pack("<Q", 2**42) + b"N"),
    "long int": put(b"\x8b" + struct.pack("<i", 2**31 - 1)),
    "negative int": put(b"\x8b" + struct.pack("<i", -5)),
    "long old string": put(b"T" + struct.pack("<i", 2**31 - 1)),
    "digits": put(b"I" + b"9" * 100_000 + b"\n"),
    "a million lists": put(b"]" * 1_000_000 + b"a" * 999_999),
    "a million tuples": put(b")" + b"\x85" * 1_000_000),
    "nested objects": put(b"\x8c\x01a\x8c\x01b\x93\x94)R" + b"\x85h\x00\x8c\x00\x86R" * 100_000),
    "laughs in tuples": put(LAUGHS_T),
    "laughs in lists": put(LAUGHS_L),
    "laughs as a key": put(LAUGHS_T + b"}" + b"j" + struct.pack("<I", 40) + b"Ns"),
    "laughs in a set": put(LAUGHS_T + b"\x8f(" + b"j" + struct.pack("<I", 40) + b"\x90"),
    "laughs in a storage": put(LAUGHS_L + b"(\x8c\x07storageNj" + struct.pack("<I", 40) + b"NNtQ"),
    "laughs as a class": put(LAUGHS_L + b")R"),
    "dicts in dicts": put(DICTS),
    "many copies": put(LONG_LIST + COPIES),
    "tuples to hash": put(HASHED + b"}\x94h\x01Ns"),
    "self": put(b"]\x94h\x00a"),
    "no mark": put(b"t"),
    "no stack": put(b"0" * 5),
    "no end": b"\x80\x04N",
    "nothing": b"",
    "version 9": b"\x80\x09N.",
    "no opcode": put(b"\xff"),
}


# safetensors.


def header(**entries: object) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# Torch's format before 1.6.

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def legacy(
    pickled: bytes,
    keys: list[Any],
    storages: list[tuple[int, bytes]],
    magic: object = MAGIC,
    version: object = VERSION,
    system: object = SYSTEM,
) -> bytes:
    """A file of the format, from its parts."""
    head = b"".join(pickle.dumps(part, 2) for part in (magic, version, system))
    tail = b"".join(struct.pack("<q", count) + data for count, data in storages)
    return head + pickled + pickle.dumps(keys, 2) + tail


class Stored:
    """A storage as a pickler refers to it."""

    def __init__(self, key: object, numel: object, view: object = None, kind: Any = None) -> None:
        self.pid = ("storage", kind or torch.FloatStorage, key, "cpu", numel, view)


class Rebuilt:
    """A tensor as a pickler writes it."""

    def __init__(self, storage: Stored, offset: int, shape: Any, stride: Any) -> None:
        self.args = (storage, offset, shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.args


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Stored) else None


def pickled(tree: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(tree)
    return buffer.getvalue()


FLOATS = struct.pack("<6f", *range(6))
WHOLE = {"w": Rebuilt(Stored("7", 6), 0, (2, 3), (3, 1))}
