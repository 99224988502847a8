"""The catalogue of faults, 108 to 123: files that torch reads otherwise, small files that grow."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from command import averaged, each_refused, fails, fault, refused
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# For the reading of headers, which needs no torch.
LITTLE_MEMORY = {"limits": "ulimit -v 1000000", "timeout": 120}
FOUR = hostile.Stored("0", 4)
OTHER = hostile.Stored("1", 4)
ONES = {"d0": bytes(16), "d1": struct.pack("<4f", 1, 2, 3, 4)}


class Call:
    """A call of a function that torch writes into pickles, and a state to build upon it."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.parts


def tensor(storage: hostile.Stored = FOUR, state: Any = None) -> Call:
    args = (storage, 0, (4,), (1,), False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *args, state=state)


# Records that are forged.


SOURCE = {"name": "a.pt", "size": 1, "fingerprint": "0" * 16, "epoch": 1, "step": None, "count": 1}
FORGED: dict[str, Any] = {
    "none": [],
    "no-list": {},
    "count": [{**SOURCE, "count": 10**400}],
    "sum": [{**SOURCE, "count": 1 << 26}, SOURCE],
    "zero": [{**SOURCE, "count": 0}],
    "float": [{**SOURCE, "count": 1.5}],
    "size": [{**SOURCE, "size": 10**309}],
    "infinite": [{**SOURCE, "size": float("inf")}],
    "epoch": [{**SOURCE, "epoch": -(10**30)}],
}


@fault(108, "a forged record: no checkpoints, counts of 10^400, sizes over 1e308", "refused")
def test_forged_records_are_refused(tmp_path: Path) -> None:
    """What claims to be an average of ours, and cannot be, is refused wherever it is given."""
    save_file({"w": torch.ones(3)}, tmp_path / "next.safetensors")
    for name, sources in FORGED.items():
        said = {"swa_avg": "1", "count": 1, "checkpoints": sources, "options": {}}
        text = json.dumps(said | {"batchnorm": None})
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors", {"swa_avg.json": text})
    cases = {f"{name}.safetensors": "has an invalid record of how it was made" for name in FORGED}
    each_refused(tmp_path, cases)
    each_refused(
        tmp_path, {"none.safetensors": "invalid record"}, "--start-from", "none.safetensors"
    )
    assert "invalid record" in fails(tmp_path, "--show", "size.safetensors")


@fault(109, "`n_averaged` of an AveragedModel is NaN, infinite, 0, 2.7, complex, 10^12", "refused")
def test_counters_that_count_nothing_are_refused(tmp_path: Path) -> None:
    """An average weighs a whole number of checkpoints."""
    torch.save({"w": torch.zeros(3)}, tmp_path / "next.pt")
    values = (float("nan"), float("inf"), 0, -1, 2.7, 1j, True, 10**12)
    for number, value in enumerate(values):
        state = {"module.w": torch.ones(3), "n_averaged": torch.tensor(value)}
        torch.save(state, tmp_path / f"base{number}.pt")
        line = fails(tmp_path, "next.pt", "--start-from", f"base{number}.pt", "-o", "out.pt")
        assert f"base{number}.pt: does not record how many checkpoints" in line
        assert "n_averaged" in line


# What torch reads otherwise.


@fault(18, "one storage under two dtypes", "refused: torch takes it for the first of them")
@fault(110, "BUILD on a tensor or Parameter, a state that sets `data` or `real`", "refused")
def test_tensors_with_another_content_are_refused(tmp_path: Path) -> None:
    """torch.load gives each of them another value than the call that makes the tensor says."""
    parameter, of_type = torch._utils._rebuild_parameter, torch._tensor._rebuild_from_type_v2
    rebuild, args = tensor().parts
    ints = hostile.Stored("0", 4, kind=torch.IntStorage)
    crafted = {
        "build": tensor(state=(OTHER, 0, (4,), (1,))),
        "parameter": Call(parameter, tensor(), False, OrderedDict(), state=(tensor(OTHER), False)),
        "data": Call(of_type, rebuild, torch.Tensor, args, {"data": tensor(OTHER)}),
        "slots": Call(of_type, rebuild, torch.Tensor, args, (None, {"real": tensor(OTHER)})),
        "state": Call(torch._utils._rebuild_parameter_with_state, tensor(), False, OrderedDict(),
                      {"data": tensor(OTHER)}),
        "dtypes": [tensor(), tensor(ints)],
    }  # fmt: skip
    cases = {}
    for name, value in crafted.items():
        pickled = hostile.pickled({"w": tensor(), "v": value, "u": tensor(OTHER)})
        hostile.pack(tmp_path / f"{name}.pt", pickled, **ONES)
        content = "holds a tensor whose content is replaced"
        cases[f"{name}.pt"] = "storage 0 is a FloatStorage" if name == "dtypes" else content
    each_refused(tmp_path, cases, **LITTLE_MEMORY)
    harmless = Call(of_type, rebuild, torch.Tensor, args, {"tag": 1})
    hostile.pack(tmp_path / "in.pt", hostile.pickled({"w": harmless}), d0=ONES["d1"])
    assert averaged(tmp_path, "in.pt", "--force").tensors["w"].tolist() == [1, 2, 3, 4]


@fault(111, "records whose names differ in case, `BYTEORDER` beside `byteorder`", "refused")
def test_archives_that_torch_reads_otherwise_are_refused(tmp_path: Path) -> None:
    """torch's reader of archives takes large and small letters for the same."""
    cases = {}
    for number, name in enumerate(("in/data/A", "in/BYTEORDER", "in/DATA.PKL", "in/Version")):
        (tmp_path / str(number)).mkdir()
        path = hostile.rewritten(hostile.archive(tmp_path / str(number)), extra={name: b"big"})
        if number == 0:
            with zipfile.ZipFile(path, "a") as archive:
                archive.writestr("in/data/a", b"big")
        cases[f"{number}/in.pt"] = "holds two records named"
    (tmp_path / "4").mkdir()
    path = hostile.archive(tmp_path / "4")
    hostile.rewritten(path, without=["byteorder"], extra={"in/ByteOrder": b"big"})
    cases["4/in.pt"] = "has byte order big"
    each_refused(tmp_path, cases, **LITTLE_MEMORY)


@fault(
    112, "parts of a storage that bear one name, or a storage's name, before torch 1.6", "refused"
)
@fault(113, "a tar archive that begins like a file from before torch 1.6", "refused, named")
def test_old_files_that_torch_reads_otherwise_are_refused(tmp_path: Path) -> None:
    """Parts and storages share their names there, and a tar archive is opened as one."""
    views = {
        "twice": [("v", 0, 2), ("v", 2, 2)],
        "whole": [("1", 0, 2), None],
        "own": [("0", 2, 2)],
        "sizes": [("v", 0, 2), ("v", 0, 1)],
        "outside": [("v", 0, 1)],
    }
    for name, parts in views.items():
        tree: dict[str, Any] = {}
        for number, part in enumerate(parts):
            stored = hostile.Stored("1" if part is None else "0", 4, part)
            tree[f"w{number}"] = hostile.Rebuilt(stored, 0, (2,), (1,))
        keys = ["0", "1"] if None in parts else ["0"]
        content = hostile.legacy(hostile.pickled(tree), keys, [(4, bytes(16))] * len(keys))
        (tmp_path / f"{name}.pt").write_bytes(content)
    cases = {f"{name}.pt": "has two storages named" for name in views}
    cases["outside.pt"] = "holds a tensor that ends"
    info = tarfile.TarInfo("in")
    info.name = pickle.dumps(hostile.MAGIC, 2).decode("latin-1")
    (tmp_path / "both.pt").write_bytes(info.tobuf(tarfile.USTAR_FORMAT, "latin-1") + bytes(1024))
    cases["both.pt"] = "looks like a tar archive"
    each_refused(tmp_path, cases, **LITTLE_MEMORY)


# Small files that grow.


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def memo(number: int) -> bytes:
    return b"j" + struct.pack("<I", number)


def module(children: bytes, parameters: bytes = b"}") -> bytes:
    """A pickled module; what its children are may refer to it as number 0 of the memo."""
    state = (b"}(" + text("_parameters") + parameters + text("_buffers") + b"}"
             + text("_modules") + children + b"u")  # fmt: skip
    return b"ctorch.nn.modules.module\nModule\n)\x81\x94" + state + b"b"


def many(what: bytes, count: int) -> bytes:
    return b"".join(text(f"n{number:05}") + what for number in range(count))


ONE = hostile.pickled({"w": tensor()})[5:-2]  # `w` and its tensor, as an item of a dict
LONG = text("x" * 1_000_000)
MODULUS = (1 << 61) - 1  # of Python's hashes of numbers


def keys(of: Callable[[int], bytes]) -> bytes:
    """A dict of 50,000 keys, as opcodes: to make it here would take as long as there."""
    return hostile.put(b"}(" + b"".join(of(n) + b"N" for n in range(1, 50_000)) + b"u")


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def complex_number(real: int, imaginary: int) -> bytes:
    parts = struct.pack(">d", real), struct.pack(">d", imaginary)
    return b"cbuiltins\ncomplex\nG" + parts[0] + b"G" + parts[1] + b"\x86R"


GROWING = {
    "own child": module(b"}(" + text("again") + memo(0) + b"u"),
    "two children": module(b"}(" + text("a") + memo(0) + text("b") + memo(0) + b"u"),
    "long names": module(b"}(" + LONG + memo(0) + b"u"),
    "copies": b"cbuiltins\ndict\n\x94}(" + many(b"N", 100_000) + b"u\x94]("
    + b"h\x00h\x01\x85R" * 300 + b"e",
    "bytes": b"c_codecs\nencode\n\x94" + LONG + b"\x94](" + b"h\x00h\x01\x85R" * 5000 + b"e",
    "dimensions": b"}" + ONE.replace(b"K\x04\x85", b"(" + number(1 << 61) * 300_000 + b"t").replace(
        b"K\x01\x85", b"(" + b"K\x01" * 300_000 + b"t") + b"s",
    "texts": b"}(" + ONE + text("n") + LONG + b"r\xff\xff\x00\x00"
    + many(b"j\xff\xff\x00\x00", 999) + b"u",
}  # fmt: skip
COLLIDING = {
    "numbers": keys(lambda n: number(n * MODULUS)),
    "tuples": keys(lambda n: number(n * MODULUS) + b"\x85"),
    "complex": keys(lambda n: complex_number(1000003 * n, -n)),
}


@fault(114, "modules that hold themselves, or each other", "refused, in little memory")
@fault(115, "one long text under a thousand names", "refused, in little memory")
@fault(116, "constructors that copy one dict or text again and again", "refused, in little memory")
@fault(117, "keys whose hashes collide", "refused at once")
@fault(118, "a tensor of 300,000 dimensions", "refused at once")
def test_pickles_that_grow_are_refused(tmp_path: Path) -> None:
    """A small pickle makes no more than a large one: memory and time stay bounded."""
    pickles = {name: hostile.put(data) for name, data in GROWING.items()} | COLLIDING
    for name, pickled in pickles.items():
        hostile.pack(tmp_path / f"{name}.pt", pickled, d0=bytes(16))
    cases = {f"{name}.pt": "holds" for name in pickles}
    cases |= {
        "own child.pt": "holds modules within modules, 201 deep, expected 200 at most",
        "long names.pt": "holds modules whose names have",
        "texts.pt": "holds plain values of 1,000,000,000 bytes",
        "copies.pt": "copies its values too many times",
        "bytes.pt": "copies its values too many times",
        "tuples.pt": "holds 17 different keys of one hash, expected 16 at most",
        "dimensions.pt": "holds a tensor of 300000 dimensions, expected 64 at most",
    }
    lines = each_refused(tmp_path, cases, **LITTLE_MEMORY)
    assert all(len(line) < 300 for line in lines.values())


@fault(119, "2,000 expanded or overlapping views of one small storage", "refused")
def test_views_that_grow_are_refused(tmp_path: Path) -> None:
    """The output is about as large as the input: a file of 60 kB makes no gigabytes."""
    rebuild = torch._utils._rebuild_tensor_v2
    views = {
        "expanded": [(0, (n + 1, 256), (0, 1)) for n in range(1000)],
        "overlapping": [(n, (200_000 - n,), (1,)) for n in range(1000)],
    }
    for name, geometry in views.items():
        stored = hostile.Stored("0", 256 if name == "expanded" else 200_000)
        tree = {
            f"w{number}": Call(rebuild, stored, *numbers, False, OrderedDict())
            for number, numbers in enumerate(geometry)
        }
        data = bytes(4 * stored.pid[4])
        hostile.pack(tmp_path / f"{name}.pt", hostile.pickled(tree), d0=data)
    each_refused(
        tmp_path,
        {f"{name}.pt": "holds tensors of" for name in views},
        **LITTLE_MEMORY,
    )


def grid(folder: Path, count: int, change: Any = lambda boxes: None) -> Path:
    """A folder whose metadata cut a tensor into `count` times `count` chunks of one element."""
    folder.mkdir()
    item = io.BytesIO()
    torch.save(torch.ones(1, 1), item)
    (folder / "__0_0.distcp").write_bytes(item.getvalue())
    boxes = [(row, column) for row in range(count) for column in range(count)]
    change(boxes)
    one = torch.Size((1, 1))
    chunks = [ChunkStorageMetadata(torch.Size(box), one) for box in boxes]
    place = _StorageInfo("__0_0.distcp", 0, len(item.getvalue()))
    items = {MetadataIndex("w", torch.Size(box)): place for box in boxes}
    whole = TensorStorageMetadata(TensorProperties(), torch.Size((count, count)), chunks)
    described: dict[str, Any] = {"w": whole}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, None, items)))
    return folder


@fault(
    120, "a DCP tensor in a grid of 40,000 chunks", "averaged in seconds; refused if two overlap"
)
def test_grids_of_chunks_take_linear_time(tmp_path: Path) -> None:
    """Whether chunks fill a tensor is told without comparing each with each."""
    grid(tmp_path / "in", 60)
    assert averaged(tmp_path, "in", timeout=120).tensors["w"].sum() == 3600

    def overlap(boxes: list[tuple[int, int]]) -> None:
        boxes[7] = boxes[8]

    grid(tmp_path / "hole", 200, overlap)
    refused(tmp_path, "hole", says="hole/.metadata: ", timeout=120)


def header(path: Path, content: bytes) -> None:
    path.write_bytes(len(content).to_bytes(8, "little") + content)


@fault(121, "a safetensors header of 97 MB: tensors, lists, texts", "refused, in little memory")
@fault(122, "a header in a hole of a sparse file", "refused, in little memory")
def test_headers_that_grow_are_refused(tmp_path: Path) -> None:
    """What a header makes is counted before it is made; a hole is no header."""
    entry = b',"%07d":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'
    tensors = b"".join(entry % number for number in range(1_600_000))
    header(tmp_path / "tensors.safetensors", b"{" + tensors[1:] + b"}")
    header(tmp_path / "lists.safetensors", b'{"a":[' + b"[]," * 32_000_000 + b"[]]}")
    sizes = b"2305843009213693952," * 300_000 + b"1"
    shape = b'{"a":{"dtype":"F32","shape":[' + sizes + b'],"data_offsets":[0,0]}}'
    header(tmp_path / "shape.safetensors", shape)
    with (tmp_path / "legacy.pt").open("wb") as file:
        for part in (hostile.MAGIC, hostile.VERSION, hostile.SYSTEM):
            pickle.dump(part, file, 2)
        file.write(b"\x80\x02X" + struct.pack("<I", 2**32 - 1))
        file.truncate(6 << 30)
    cases = {
        "tensors.safetensors": "tensors, expected 524,288 at most",
        "lists.safetensors": "has headers of",
        "shape.safetensors": "holds a tensor of 300001 dimensions",
        "legacy.pt": "holds a pickle of unreasonable size",
    }
    with (tmp_path / "zip.pt").open("wb") as file:
        file.write(sparse_zip(file, 4 << 30))
    cases["zip.pt"] = "has headers of"
    each_refused(tmp_path, cases, **LITTLE_MEMORY)


def sparse_zip(file: Any, length: int) -> bytes:
    """Write an archive whose pickle is a hole; return its directory, which goes to the end."""
    name = b"archive/data.pkl"
    full = 0xFFFFFFFF
    wide = struct.pack("<HHQQ", 1, 16, length, length)
    file.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0x800, 0, 0, 33, 0, full, full,
                           len(name), len(wide)) + name + wide)  # fmt: skip
    start = file.seek(length, os.SEEK_CUR)
    line = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 45, 45, 0x800, 0, 0, 33, 0, full, full,
                       len(name), len(wide), 0, 0, 0, 0, 0) + name + wide  # fmt: skip
    end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(line), start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(line), 1)
    last = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(line), full, 0)
    return line + end + locator + last


# Copies.

COUNTED = """
import os, sys
from swa_avg.__main__ import main
exit = os._exit
def counted(code):
    print(open("/proc/self/io").read().split()[1], file=sys.stderr)
    exit(code)
os._exit = counted
sys.argv = ["swa-avg", *sys.argv[1:]]
main()
"""


@fault(123, "40 safetensors that share a frozen backbone", "each byte is read once at most")
@pytest.mark.skipif(sys.platform != "linux", reason="counts by /proc/self/io")
def test_copies_are_told_in_linear_time(tmp_path: Path) -> None:
    """Counted by the system: a plan reads a sample, a run each byte of two copies once more."""
    backbone = {f"backbone.{n}": torch.randn(50_000) for n in range(5)}
    size = 5 * 200_000
    for number in range(40):
        state = {**backbone, "head": torch.full((10,), float(number % 39))}  # 39 is 0 again
        save_file(state, tmp_path / f"epoch{number:02}.safetensors")
    paths = [f"epoch{number:02}.safetensors" for number in range(40)]

    def read(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-c", COUNTED, *arguments]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        lines = ended.stderr.splitlines()
        assert ended.returncode == 0 and lines[-1].isdecimal(), ended.stderr
        return int(lines[-1]), ended.stderr

    alone, _ = read("--dry-run", paths[0])
    planned, said = read("--dry-run", *paths)
    assert planned - alone < 40 * 40_000 < size * 2
    alike = f"{paths[39]}: has, in a sample of its bytes, the same weights as {paths[0]}"
    assert alike in said
    one, _ = read(paths[0], "-o", "one.pt", "--threads", "1")
    ran, said = read(*paths, "-o", "out.pt", "--threads", "1")
    assert f"{paths[39]}: has the same weights as {paths[0]}; counted once" in said
    # 39 are averaged, and of two each byte was read to tell that they are copies.
    assert ran - one < (38 + 2) * size + 40 * 40_000
