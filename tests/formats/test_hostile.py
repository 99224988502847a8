"""Files that mean harm, or came to some: nothing in them runs, and no wrong number comes out."""

from __future__ import annotations

import argparse
import datetime
import pickle
import random
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hostile import (
    FOUR,
    HUNGRY,
    NAMES,
    OPCODES,
    UNSOUND,
    Color,
    archive,
    pack,
    patched,
    payloads,
    rewritten,
    tensor_pickle,
)
from torch import Tensor

import swa_avg
from swa_avg.errors import FormatError, LayoutError, SwaAvgError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.pickles.pickled import Dict


def averaged(path: Path) -> dict[str, Any]:
    out = path.with_suffix(".out.pt")
    swa_avg.average([path], out, force=True)
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


def refused(path: Path, match: str | None = None, error: type[SwaAvgError] = FormatError) -> None:
    """Refused in one line that names the file, and nothing is written."""
    out = path.with_suffix(".out.pt")
    with pytest.raises(error, match=match) as caught:
        swa_avg.average([path], out)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert not out.exists()


# Code in a pickle.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", range(1, 6))
def test_payload_does_not_run(tmp_path: Path, name: str, protocol: int) -> None:
    """Nothing that a pickle names is called; sound tensors beside it are averaged."""
    marker, path = tmp_path / "marker", tmp_path / "in.pt"
    weights = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    before = set(sys.modules)
    content = {"state_dict": weights, "args": payloads(marker)[name]}
    torch.save(content, path, pickle_protocol=protocol)
    found = averaged(path)
    assert all(oracle.same_bits(found[key], weights[key]) for key in weights)
    assert not marker.exists()
    assert not {"this", "antigravity_none"} & (set(sys.modules) - before)


@pytest.mark.parametrize("name", NAMES)
def test_payload_among_the_weights_does_not_run(tmp_path: Path, name: str) -> None:
    """Inside the state_dict it is left out, and that is said; as the whole file it is refused."""
    marker, path = tmp_path / "marker", tmp_path / "in.pt"
    weights = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    torch.save({**weights, "x": payloads(marker)[name]}, path)
    report = swa_avg.average([path], tmp_path / "out.pt")
    assert any(note.startswith("x: ") for note in report.notes)
    assert set(torch.load(tmp_path / "out.pt", weights_only=True)) == set(weights)
    torch.save(payloads(marker)[name], path)
    refused(path, error=LayoutError)
    assert not marker.exists()


@pytest.mark.parametrize("name", OPCODES)
def test_every_opcode_that_could_call_does_not(tmp_path: Path, name: str) -> None:
    """Each way in which a pickle can have something called."""
    marker = tmp_path / "marker"
    pickled = OPCODES[name].replace(b"{}", str(marker).encode())
    refused(pack(tmp_path / "in.pt", pickled), error=SwaAvgError)
    assert not marker.exists()


def test_environment_cannot_turn_safety_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's switch for unsafe loading is none of ours."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, path = tmp_path / "marker", tmp_path / "in.pt"
    torch.save({"model": {"a": torch.ones(2)}, "x": payloads(marker)["os.system"]}, path)
    assert averaged(path)["a"].tolist() == [1, 1]
    assert not marker.exists()


# Classes that are not ours.


def vanished() -> object:
    """An object whose module is gone when it is read."""
    module = types.ModuleType("no_longer_there")
    exec("class Config(dict):\n  pass\nclass Plain:\n  pass", module.__dict__)
    sys.modules["no_longer_there"] = module
    made = module.Config(a=1)
    made.inner = module.Plain()
    made.inner.values = [1, {2: module.Plain()}]
    return made


@pytest.mark.parametrize("protocol", range(1, 6))
def test_unknown_classes_do_not_stop_a_read(tmp_path: Path, protocol: int) -> None:
    """What makes people turn safety off elsewhere is merely inert here."""
    import numpy as np

    path = tmp_path / "in.pt"
    content = {
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "best": np.float64(0.5),
        "array": np.arange(3),
        "path": Path("/x"),
        "color": Color.RED,
        "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
        "delta": datetime.timedelta(1),
        "set": {1, 2},
        "frozen": frozenset({3}),
        "range": range(3),
        "slice": slice(1),
        "complex": 1j,
        "bytearray": bytearray(b"x"),
        "gone": vanished(),
        "exception": ValueError("x"),
        "rng": torch.get_rng_state(),
        "generator": torch.Size([1]),
        "dtype": torch.float16,
        "device": torch.device("cuda:3"),
        "function": OrderedDict.fromkeys,
        "epoch": np.int64(7),
        "state_dict": {"a": torch.arange(3.0), "b": torch.ones(1)},
    }
    torch.save(content, path, pickle_protocol=protocol)
    del sys.modules["no_longer_there"]
    assert averaged(path)["a"].tolist() == [0, 1, 2]
    report = swa_avg.average([path], tmp_path / "again.pt")
    assert report.inputs[0].epoch == 7
    assert "no_longer_there" not in sys.modules


# Geometry that lies.


def test_geometry_that_is_sound_is_read(tmp_path: Path) -> None:
    """The files below differ from a right one by what is wrong with them only."""
    path = pack(tmp_path / "in.pt", tensor_pickle(FOUR, 1, (3,), (1,)), d0=bytes(16))
    assert averaged(path)["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("storage", "offset", "shape", "stride"), UNSOUND)
def test_geometry_that_is_not_sound_is_refused(
    tmp_path: Path, storage: Any, offset: Any, shape: Any, stride: Any
) -> None:
    """No byte outside a storage is ever taken for a number, none is invented."""
    pickled = tensor_pickle(storage, offset, shape, stride)
    refused(pack(tmp_path / "in.pt", pickled, d0=bytes(16)))


# Archives that lie.


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed record"),
        ({"compression": zipfile.ZIP_BZIP2}, "compressed record"),
        ({"compression": zipfile.ZIP_LZMA}, "compressed record"),
        ({"without": ["data.pkl"]}, "without a torch pickle"),
        ({"without": ["data/1"]}, "no record for storage 1"),
        ({"extra": {"other/data.pkl": b"N."}}, "without a torch pickle"),
        ({"extra": {"other/x": b""}}, "without a torch pickle"),
        ({"extra": {"in/constants.pkl": b")."}}, "TorchScript"),
        ({"without": ["byteorder"], "extra": {"in/byteorder": b"big"}}, "byte order big"),
        ({"root": "../../etc"}, "without a torch pickle"),
    ],
)
def test_archive_that_is_not_torchs_is_refused(
    tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    """Each of these is named for what it is."""
    refused(rewritten(archive(tmp_path), **changes), match)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["in/data/0", "in/data.pkl", "in/version"])
def test_archive_with_two_records_of_one_name_is_refused(tmp_path: Path, name: str) -> None:
    """Readers differ in which they take."""
    refused(rewritten(archive(tmp_path), extra={name: b"N."}), "two records named")


def zip64(tmp_path: Path, fields: bytes) -> Path:
    """Return an archive that gives a record's two lengths in fields of its line, as ZIP64 does."""
    path = archive(tmp_path)
    with zipfile.ZipFile(path) as source:
        records = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in records.items():
            info = zipfile.ZipInfo(name)
            info.extra = fields if name == "in/data/0" else b""
            packed.writestr(info, data)
    return patched(path, "in/data/0", False, 20, "<Q", 2**64 - 1)  # both, side by side


_TIME = struct.pack("<HHI", 0x5455, 4, 0)


def test_lengths_in_a_zip64_field_are_read(tmp_path: Path) -> None:
    """Behind other fields, whatever they are, and the length is the one that is given there."""
    path = zip64(tmp_path, _TIME + struct.pack("<HHQQ", 1, 16, 400, 400))
    assert oracle.same_bits(averaged(path)["a"], torch.arange(100.0))


@pytest.mark.parametrize(
    "fields",
    [b"", _TIME, struct.pack("<HHQ", 1, 8, 400), struct.pack("<HHI", 1, 4, 400)],
    ids=["none", "another", "one length", "half a length"],
)
def test_lengths_that_no_zip64_field_gives_are_refused(tmp_path: Path, fields: bytes) -> None:
    """Four bytes of ones are no length of their own: what they stand for must be there."""
    refused(zip64(tmp_path, fields))


def test_archive_with_overlapping_records_is_refused(tmp_path: Path) -> None:
    """Two names for one stretch of the file."""
    path = rewritten(archive(tmp_path))
    with zipfile.ZipFile(path) as source:
        place = source.getinfo("in/data/0").header_offset
    refused(patched(path, "in/data/1", False, 42, "<I", place), "local header")
    path = rewritten(archive(tmp_path))
    patched(path, "in/data/0", False, 20, "<I", 600)
    refused(patched(path, "in/data/0", False, 24, "<I", 600), "overlap")


def test_archive_whose_local_names_differ_is_refused(tmp_path: Path) -> None:
    """The directory says one thing, the record itself another."""
    path = rewritten(archive(tmp_path))
    data = path.read_bytes()
    place = data.index(b"in/data/0")
    path.write_bytes(data[:place] + b"in/data/7" + data[place + 9 :])
    refused(path, "local header")


def test_archive_with_damaged_tensors_is_refused_by_their_name(tmp_path: Path) -> None:
    """A checksum that does not match names the file and the tensor."""
    path = rewritten(archive(tmp_path))
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(100.0).numpy().tobytes()) + 200] ^= 4
    path.write_bytes(data)
    refused(path, f"{path}: a: is damaged")


def test_archive_with_a_damaged_pickle_is_refused(tmp_path: Path) -> None:
    """The pickle is checked before it is read."""
    path = rewritten(archive(tmp_path))
    data = bytearray(path.read_bytes())
    data[data.index(b"_rebuild_tensor_v2") + 3] ^= 1
    path.write_bytes(data)
    refused(path, "damaged header")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    """It looks like a checkpoint from outside, and holds code."""
    path = tmp_path / "in.pt"
    writer = torch._C.PyTorchFileWriter(str(path))
    for name in ("data.pkl", "constants.pkl", "code/model.py"):
        writer.write_record(name, b"N.", 2)
    writer.write_end_of_file()
    refused(path, "TorchScript")


# Pickles that eat memory or time.


@pytest.mark.parametrize("name", HUNGRY)
def test_hungry_pickle_is_refused(tmp_path: Path, name: str) -> None:
    """Refused at once and within memory, whatever it claims to be."""
    refused(pack(tmp_path / "in.pt", HUNGRY[name]), error=SwaAvgError)


def nested(make: Callable[[object], object], depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = make(value)
    return value


@pytest.mark.parametrize(
    ("make", "depth"),
    [
        (lambda value: (value,) * 10, 40),
        (lambda value: [value] * 10, 40),
        (lambda value: [value] * 1000, 7),
        (lambda value: (value,) * 100_000, 2),
        (lambda value: dict.fromkeys(range(1000), value), 7),
        (lambda value: [value], 200),
    ],
)
def test_value_without_end_is_left_out(
    tmp_path: Path, make: Callable[[object], object], depth: int
) -> None:
    """What would take for ever to look at or to write is not written; the tensors are."""
    value = nested(make, depth)
    others = {f"x{n}": [value] for n in range(100)}
    pickled = tensor_pickle(FOUR, 0, (4,), (1,), model={}, **others)
    path = pack(tmp_path / "in.pt", pickled, d0=bytes(16))
    out = tmp_path / "out.pt"
    swa_avg.average([path], out, key="")
    found = torch.load(out, weights_only=True)
    assert found["a"].tolist() == found["b"].tolist() == [0] * 4
    assert not set(found) & set(others)


class Thing:
    """Something to hang values on."""


@pytest.mark.parametrize("key", [3, (1, 2), None, Thing()])
def test_key_that_is_no_text_is_refused_in_a_short_line(tmp_path: Path, key: object) -> None:
    """A key can be an object whose written form would have no end."""
    if isinstance(key, Thing):
        key.value = nested(lambda value: [value] * 2, 60)
    path = tmp_path / "in.pt"
    torch.save({key: torch.ones(1), "a": torch.ones(1)}, path)
    refused(path, "a key that is not a string", LayoutError)


# Damage.


def small(tmp_path: Path) -> tuple[bytes, dict[str, Tensor], Path]:
    state = {"a.weight": torch.randn(4, 3), "b": torch.arange(5), "c": torch.randn(2).half()}
    path = tmp_path / "whole.pt"
    torch.save({"epoch": 3, "state_dict": state}, path)
    return path.read_bytes(), state, tmp_path / "in.pt"


def assert_right_or_refused(path: Path, state: dict[str, Tensor]) -> bool:
    """Either an error of ours, or every number as it was saved."""
    out = path.with_suffix(".out")
    try:
        swa_avg.average([path], out, force=True)
    except SwaAvgError as error:
        assert str(path) in str(error)
        return False
    found = torch.load(out, weights_only=True)
    assert list(found) == list(state)
    assert all(oracle.same_bits(found[name], value) for name, value in state.items())
    return True


def test_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """Of bits flipped anywhere in the file, none gives a wrong number."""
    data, state, path = small(tmp_path)
    draw = random.Random(0)
    right = 0
    for bit in draw.sample(range(8 * len(data)), 200):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        right += assert_right_or_refused(path, state)
    assert 0 < right < 200  # padding, dates and the like are not looked at


def test_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    """Each bit of each tensor counts."""
    data, state, path = small(tmp_path)
    start = data.index(state["a.weight"].numpy().tobytes())
    for bit in range(8 * start, 8 * (start + 48), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert not assert_right_or_refused(path, state)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_file_that_was_cut_is_refused(tmp_path: Path, suffix: str) -> None:
    """Cut at every 97th byte, and at each of the last ones."""
    whole, _, _ = small(tmp_path)
    path = tmp_path / f"in{suffix}"
    if suffix == ".safetensors":
        swa_avg.average([tmp_path / "whole.pt"], path)
        whole = path.read_bytes()
    for length in (*range(0, len(whole), 97), *range(len(whole) - 30, len(whole))):
        path.write_bytes(whole[:length])
        refused(path, error=SwaAvgError)


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        (b"", "is empty"),
        (b"hello, world\n", "looks like text"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b'{"weights": 1}', "JSON"),
        (b"\x1f\x8b\x08" + bytes(100), "gzip"),
        (b"\x93NUMPY\x01", "numpy"),
        (pickle.dumps({"a": 1}), "bare pickle"),
        (bytes(257) + b"ustar" + bytes(300), "tar"),
        (bytes(5000), "unknown format"),
        (b"PK\x03\x04" + bytes(500), "not a complete zip"),
        (b"PK\x05\x06" + b"\xfe" * 18, "unknown format"),
    ],
)
def test_stranger_is_named(tmp_path: Path, data: bytes, looks: str) -> None:
    """What is no checkpoint is refused for what it looks like."""
    (tmp_path / "in.pt").write_bytes(data)
    refused(tmp_path / "in.pt", looks)


def test_numpy_archive_is_no_checkpoint(tmp_path: Path) -> None:
    """An .npz is a zip too."""
    import numpy as np

    np.savez(tmp_path / "in.npz", a=np.ones(2))
    refused(tmp_path / "in.npz", "without a torch pickle")


def test_storages_are_only_places(tmp_path: Path) -> None:
    """A checkpoint is opened without a byte of a tensor, and gives nothing but our own classes."""
    path = archive(tmp_path)
    checkpoint = open_checkpoint(path)
    assert type(checkpoint.tree) in (dict, Dict)
    assert {type(value).__name__ for value in checkpoint.tree.values()} == {"View"}
    checkpoint.close()
