"""What is written is what others write and read; what is read is read once."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hostile import entry, header
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import swa_avg
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.errors import FormatError, OutputError
from swa_avg.formats import torch_zip
from swa_avg.formats.checkpoint import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.formats.opening import open_checkpoint
from swa_avg.storage.files import InputFile
from swa_avg.tensors.tensor import DTYPES, Record


def state(seed: int = 0) -> OrderedDict[str, Tensor]:
    torch.manual_seed(seed)
    made = OrderedDict(
        {
            "b.weight": torch.randn(300, 40),
            "a.weight": torch.randn(7),
            "é": torch.randn(3).to(torch.bfloat16),
            "half": torch.randn(3).half(),
            "double": torch.randn(2, dtype=torch.float64),
            "complex": torch.randn(2, dtype=torch.complex64),
            "e4m3": torch.randn(5).to(torch.float8_e4m3fn),
            "e5m2": torch.randn(5).to(torch.float8_e5m2),
            "scalar": torch.randn(()),
            "empty": torch.empty(0, 4),
            "ids": torch.arange(5),
            "uint64": torch.arange(5).to(torch.uint64),
            "uint16": torch.arange(5).to(torch.uint16),
            "byte": torch.arange(5).to(torch.uint8),
            "flags": torch.tensor([True, False]),
        }
    )
    made._metadata = OrderedDict({"": {"version": 1}, "a": {"version": 2}})
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "in.pt"
    torch.save(state(), path)
    return path


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert oracle.same_bits(found[name], value), name


# Torch zips.


def test_zip_is_sound_for_every_reader(saved: Path, tmp_path: Path) -> None:
    """Checksums, directory and local headers are right; torch reads it in every way."""
    out = tmp_path / "out.pt"
    swa_avg.average([saved], out)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            assert archive.read(entry) is not None  # compares local header and directory
            assert entry.compress_type == zipfile.ZIP_STORED
    for mmap in (False, True):
        found = torch.load(out, mmap=mmap, weights_only=True)
        assert type(found) is OrderedDict
        assert found._metadata == state()._metadata
        assert_equal(found, state())
    assert_equal(torch.load(out, weights_only=False), state())


def test_zip_has_the_structure_that_torch_gives_it(saved: Path, tmp_path: Path) -> None:
    """Records have torch's names and alignment, and dtypes its storage classes."""
    out = tmp_path / "out.pt"
    swa_avg.average([saved], out)
    reader = torch._C.PyTorchFileReader(str(out))
    theirs = torch._C.PyTorchFileReader(str(saved))
    records = set(reader.get_all_records())
    assert records - {"swa_avg.json"} <= set(theirs.get_all_records())
    assert {"data.pkl", "byteorder", "version", "data/0"} <= records
    for name in records:
        if name.startswith("data/"):
            assert reader.get_record_offset(name) % 64 == 0
    checkpoint = open_checkpoint(out)
    for ref in find_state_dict(checkpoint).tensors.values():
        assert ref.record.crc32 is not None
    checkpoint.close()


def test_zip_with_more_records_than_16_bits_count(tmp_path: Path) -> None:
    """Past 65,535 records the directory is a zip64 one; all can be read again."""
    count = 65_600
    tensors = {str(n): OutputTensor(n, 0, (), ()) for n in range(count - 9, count)}
    storages = tuple(OutputStorage(DTYPES["uint8"], 1) for _ in range(count))
    path = write(tmp_path / "many.pt", OutputStateDict(storages, tensors))
    with zipfile.ZipFile(path) as archive:
        assert len(archive.infolist()) == count + 3
    assert len(torch._C.PyTorchFileReader(str(path)).get_all_records()) == count + 3
    checkpoint = open_checkpoint(path)
    assert len(find_state_dict(checkpoint).tensors) == 9
    checkpoint.close()


def write(path: Path, state_dict: OutputStateDict) -> Path:
    """Write a layout with all-zero storages, as a sparse file."""
    layout = torch_zip.layout(state_dict)
    checksums = [zeros_crc(storage.nbytes) for storage in state_dict.storages]
    with path.open("wb") as file:
        file.truncate(layout.size)
        for place, data in layout.headers(checksums):
            file.seek(place)
            file.write(data)
    assert path.stat().st_size == layout.size
    return path


def zeros_crc(length: int) -> int:
    """The checksum of so many zero bytes, by doubling."""
    from zlib_ng.zlib_ng import crc32, crc32_combine

    made, power, size = 0, crc32(b"\0"), 1
    while length:
        if length & 1:
            made = crc32_combine(made, power, size)
        power, size, length = crc32_combine(power, power, size), 2 * size, length >> 1
    return made


def test_zip_with_a_record_over_4_gib(tmp_path: Path) -> None:
    """Sizes and places past 32 bits are found again, by zipfile, by torch and by us."""
    big = 2**32 // 4 + 5
    names = ("small", "big", "after")
    sizes = (3, big, 4)
    storages = tuple(OutputStorage(DTYPES["float32"], size) for size in sizes)
    tensors = {n: OutputTensor(k, 0, (sizes[k],), (1,)) for k, n in enumerate(names)}
    path = write(tmp_path / "big.pt", OutputStateDict(storages, tensors))
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        assert entries["archive/data/1"].file_size == 4 * big
        assert entries["archive/data/2"].header_offset > 2**32
        for name in ("archive/data/0", "archive/data/2"):
            assert not any(archive.read(name))
        with archive.open("archive/data/1") as record:
            assert record.read(8) == bytes(8)
    found = torch.load(path, mmap=True, weights_only=True)
    assert {name: value.numel() for name, value in found.items()} == dict(
        zip(names, sizes, strict=True)
    )
    assert found["big"][-1] == 0 and found["after"].tolist() == [0.0] * 4
    checkpoint = open_checkpoint(path)
    refs = find_state_dict(checkpoint).tensors
    reader = torch._C.PyTorchFileReader(str(path))
    for number, name in enumerate(names):
        assert refs[name].record.offset == reader.get_record_offset(f"data/{number}")
        assert refs[name].record.length == 4 * sizes[number]
    checkpoint.close()


def test_zip_of_a_record_of_exactly_32_bits(tmp_path: Path) -> None:
    """0xFFFFFFFF is itself the mark of zip64, and 0xFFFFFFFE is not."""
    for size in (2**32 - 2, 2**32 - 1, 2**32):
        storages = (OutputStorage(DTYPES["uint8"], size), OutputStorage(DTYPES["uint8"], 1))
        tensors = {"a": OutputTensor(0, 0, (size,), (1,)), "b": OutputTensor(1, 0, (1,), (1,))}
        path = write(tmp_path / "edge.pt", OutputStateDict(storages, tensors))
        with zipfile.ZipFile(path) as archive:
            assert archive.getinfo("archive/data/0").file_size == size
            assert archive.read("archive/data/1") == b"\0"
        assert torch.load(path, mmap=True, weights_only=True)["b"].tolist() == [0]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_zip_of_any_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    """torch.save's own choice is 2; others occur."""
    path = tmp_path / "in.pt"
    torch.save(state(), path, pickle_protocol=protocol)
    swa_avg.average([path], tmp_path / "out.pt")
    assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), state())


def test_zip_that_was_packed_again_is_read(saved: Path, tmp_path: Path) -> None:
    """Records in another order and without alignment: places come from the file itself."""
    again = tmp_path / "again.pt"
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(again, "w") as packed:
        for name in reversed(archive.namelist()):
            packed.writestr(name, archive.read(name))
    swa_avg.average([again], tmp_path / "out.pt")
    assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), state())


def test_zip_without_checksums_is_read_and_said(tmp_path: Path) -> None:
    """torch can be told to compute none; damage is then not to be found."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    report = swa_avg.average([tmp_path / "in.pt"], tmp_path / "out.pt")
    assert any("has no checksums" in note for note in report.notes)
    assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), state())


@pytest.mark.parametrize("name", ["данные.pt", "a b.pt", "x\ny.pt", "[1]*.pt", "no-suffix", "é"])
def test_name_of_the_file_is_no_part_of_it(tmp_path: Path, name: str) -> None:
    """torch puts a file's name into its records; we read any, and write none."""
    torch.save(state(), tmp_path / name)
    swa_avg.average([tmp_path / name], tmp_path / f"out {name}")
    assert_equal(torch.load(tmp_path / f"out {name}", weights_only=True), state())
    swa_avg.average([tmp_path / name], tmp_path / "plain.pt")
    assert (tmp_path / "plain.pt").read_bytes() == (tmp_path / f"out {name}").read_bytes()


def test_our_own_output_is_a_fixed_point(saved: Path, tmp_path: Path) -> None:
    """An output of ours, gone on from with nothing, gives its own bytes, in both formats."""
    for suffix in (".pt", ".safetensors"):
        first, second = tmp_path / f"1{suffix}", tmp_path / f"2{suffix}"
        swa_avg.average([saved], first)
        swa_avg.average([], second, start_from=first)
        assert first.read_bytes() == second.read_bytes()


# Safetensors.


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"über": 'a "quote"\n\u0001\x7f'}])
def test_safetensors_are_the_bytes_of_save_file(tmp_path: Path, metadata: dict[str, str]) -> None:
    """Byte for byte what safetensors writes for the same tensors and metadata."""
    tensors = {**state(), "e4m3fnuz": torch.ones(3).to(torch.float8_e4m3fnuz)}
    tensors['quo"te\\ \t☃'] = torch.randn(3)
    tensors["e5m2fnuz"] = torch.ones(3).to(torch.float8_e5m2fnuz)
    for dtype in (torch.int32, torch.uint32, torch.int16, torch.int8, torch.float8_e8m0fnu):
        tensors[f"{dtype} b"] = torch.ones(3).to(dtype)
        tensors[f"{dtype} a"] = torch.ones(1).to(dtype)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata=metadata)
    swa_avg.average([tmp_path / "theirs.safetensors"], tmp_path / "ours.safetensors")
    assert_as_save_file_writes(tmp_path / "ours.safetensors", tensors, metadata)


def assert_as_save_file_writes(
    ours: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Compare with safetensors' own bytes, how it was made being part of the metadata."""
    with safe_open(ours, "pt") as file:
        made = {"swa_avg.json": file.metadata()["swa_avg.json"]}
    theirs = ours.with_name("again.safetensors")
    for _ in range(100):  # safetensors puts metadata in an order of its own, each time another
        save_file(dict(tensors), theirs, metadata=metadata | made)
        if theirs.read_bytes() == ours.read_bytes():
            return
    pytest.fail("other bytes than save_file's")


def test_safetensors_from_torch_are_the_bytes_of_save_file(saved: Path, tmp_path: Path) -> None:
    """From a .pt as well, with the metadata that transformers looks for."""
    swa_avg.average([saved], tmp_path / "ours.safetensors")
    assert_as_save_file_writes(tmp_path / "ours.safetensors", state(), {"format": "pt"})
    found = load_file(tmp_path / "ours.safetensors")
    assert_equal(dict(sorted(found.items())), dict(sorted(state().items())))


def test_safetensors_record_ties_as_save_model_does(tmp_path: Path) -> None:
    """One copy, and `alias: name` in the metadata; load_model takes it."""
    from safetensors.torch import load_model

    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    torch.save(model.state_dict(), tmp_path / "in.pt")
    save_model(model, str(tmp_path / "theirs.safetensors"), metadata={"format": "pt"})
    swa_avg.average([tmp_path / "in.pt"], tmp_path / "ours.safetensors")
    metadata = []
    for name in ("ours", "theirs"):
        with safe_open(tmp_path / f"{name}.safetensors", "pt") as file:
            assert list(file.keys()) == ["a.weight"]
            metadata.append(file.metadata())
            metadata[-1].pop("swa_avg.json", None)
    assert metadata[0] == metadata[1] == {"format": "pt", "b.weight": "a.weight"}
    fresh = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    fresh["b"].weight = fresh["a"].weight
    load_model(fresh, str(tmp_path / "ours.safetensors"), strict=True)
    assert torch.equal(fresh["a"].weight, model["a"].weight)


@pytest.mark.parametrize("name", ["__metadata__", "lone \ud800 surrogate"])
def test_name_that_safetensors_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    """Such a file could be written and never be read."""
    torch.save({name: torch.ones(2), "b": torch.ones(1)}, tmp_path / "in.pt")
    with pytest.raises(OutputError, match="a name that safetensors cannot store"):
        swa_avg.average([tmp_path / "in.pt"], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    swa_avg.average([tmp_path / "in.pt"], tmp_path / "out.pt")
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)) == {name, "b"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header(a=entry(0, 4, 1), b=entry(8, 12, 1)) + bytes(12), "leave a hole"),
        (header(a=entry(0, 8, 2), b=entry(4, 12, 2)) + bytes(12), "overlap"),
        (header(a=entry(4, 8, 1)) + bytes(8), "leave a hole"),
        (header(a=entry(0, 4, 1)) + bytes(5), "has 74 bytes, expected 73"),
        (header(a=entry(0, 4, 1)) + bytes(3), "expected"),
        (header(a=entry(0, 4, 2)) + bytes(4), "4 bytes for shape"),
        (header(a=entry(0, 4, -1, -1)) + bytes(4), "impossible"),
        (header(a=entry(0, 4, 1, dtype="F31")) + bytes(4), "F31"),
        (header(a=entry(0, 4, 2**61)) + bytes(4), "bytes for shape"),
        (header(a=[]) + bytes(4), "cannot be read"),
        (header(a={"dtype": "F32"}) + bytes(4), "cannot be read"),
        (header(__metadata__={"a": 1}), "not a map of strings"),
        ((2**62).to_bytes(8, "little") + b"{}", "bytes long"),
        ((8).to_bytes(8, "little") + b'{"a":\xff}', "cannot be read"),
        ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "cannot be read"),
        (
            (112).to_bytes(8, "little")
            + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            + b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}    '
            + bytes(4),
            "occurs twice",
        ),
    ],
)
def test_safetensors_that_are_not_sound_are_refused(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    """Holes, overlaps, duplicates, wrong sizes: one error that says which."""
    path = tmp_path / "in.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=reason):
        open_checkpoint(path)


# By content, once, and not behind our back.


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.bin", "x"])
def test_format_is_told_by_content(tmp_path: Path, name: str) -> None:
    """The suffix of an input means nothing."""
    tensors = {"a": torch.randn(3), "b": torch.randn(2)}
    for save in (torch.save, save_file):
        path = tmp_path / name
        with path.open("wb") as file:
            torch.save(tensors, file)
        if save is save_file:
            save_file(tensors, tmp_path / "y")
            shutil.move(tmp_path / "y", path)
        swa_avg.average([path], tmp_path / "out.pt", force=True)
        assert_equal(torch.load(tmp_path / "out.pt", weights_only=True), tensors)


def test_tensors_are_read_once_and_the_rest_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of each weight once; the optimizer's never."""
    weights = {"a": torch.randn(100, 1000), "b": torch.randn(300_000), "ids": torch.arange(9000)}
    optimizer = {"state": {0: {"momentum": torch.randn(200_000)}}}
    paths = [tmp_path / f"{n}.pt" for n in range(3)]
    for n, path in enumerate(paths):  # equal ones would be counted once, and not read
        torch.save({"state_dict": weights | {"n": torch.ones(9) * n}, "optimizer": optimizer}, path)
    times = {path: torch.zeros(path.stat().st_size, dtype=torch.uint8) for path in paths}
    preadv = os.preadv
    opened: dict[int, Path] = {}
    init = InputFile.__init__

    def opening(self: InputFile, path: Path, own: bool = False) -> None:
        init(self, path, own)
        opened[self.source.fd] = path

    def counting(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        count = preadv(fd, buffers, offset, flags)
        if flags:  # a single byte, to see whether it is in memory
            return count
        if opened[fd] in times:  # the output is read back too
            times[opened[fd]][offset : offset + count] += 1
        return count

    monkeypatch.setattr(InputFile, "__init__", opening)
    # Headers are read in stretches that may reach into a tensor: what comes after is counted.
    with swa_avg.planned(paths, tmp_path / "out.pt") as averaging, averaging.open_output() as out:
        monkeypatch.setattr(os, "preadv", counting)
        averaging.write_to(out, threads=1)
    monkeypatch.setattr(os, "preadv", preadv)
    for path in paths:
        checkpoint = open_checkpoint(path)
        for ref in find_state_dict(checkpoint).tensors.values():
            assert set(of_record(times[path], ref.record)) == {1}
        momentum = checkpoint.tree["optimizer"]["state"][0]["momentum"]
        assert set(of_record(times[path], checkpoint.located(momentum).record)) == {0}
        checkpoint.close()


def of_record(times: Tensor, record: Record) -> list[int]:
    return times[record.offset : record.offset + record.length].tolist()


def test_report_counts_the_bytes(tmp_path: Path, saved: Path) -> None:
    """What is read is the tensors of all inputs; what is written, the file."""
    other = tmp_path / "other.pt"
    torch.save(state() | {"a.weight": torch.ones(7)}, other)
    report = swa_avg.average([saved, other], tmp_path / "out.pt")
    assert report.bytes_read == 2 * sum(value.nbytes for value in state().values())
    assert report.bytes_written == (tmp_path / "out.pt").stat().st_size
