"""Torch files from before 1.6; odd contents and payloads in both of torch's formats."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import pickle
import struct
import sys
import time
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import oracle
import pytest
import torch
from hostile import (
    FLOATS,
    MAGIC,
    NAMES,
    UNMARKED,
    WHOLE,
    Color,
    Rebuilt,
    Stored,
    legacy,
    payloads,
    pickled,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored import records, tensors
from torch import nn

import swa_avg
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.errors import FormatError, SwaAvgError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.pickles import unpickler
from swa_avg.pickles.budget import Budget
from swa_avg.storage import InputFile

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(tree: object, path: Path, zipped: bool = False, protocol: int = 2) -> Path:
    torch.save(tree, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert oracle.same_bits(found[name], tensor), name


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every shape of trouble: ties, views, strides, empty, scalars, all dtypes."""
    torch.manual_seed(seed)
    base = torch.rand(6, 5)
    made = {
        "base": base,
        "tied": base,
        "view": base[1:3],
        "transposed": base.t(),
        "last": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.rand(3)).data,
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64):
        made[str(dtype)] = torch.rand(4).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        made[str(dtype)] = torch.randint(0, 2, (3,)).to(dtype)
    return made


@pytest.mark.parametrize("protocol", range(1, 6))
def test_legacy_files_are_read_as_torch_reads_them(tmp_path: Path, protocol: int) -> None:
    """Every tensor has the bits and strides that torch.load gives it."""
    path = save(weights(), tmp_path / "c.pt", protocol=protocol)
    loaded = torch.load(path, weights_only=False)
    assert_same(tensors(path), loaded)
    state = find_state_dict(open_checkpoint(path))
    assert {name: ref.stride for name, ref in state.tensors.items()} == {
        name: tensor.stride() for name, tensor in loaded.items()
    }
    assert state.tensors["tied"] == state.tensors["base"]


def test_legacy_files_average_as_zips_do(tmp_path: Path) -> None:
    """The format of the inputs has no part in the bytes of the output, mixed or not."""
    outs = []
    for kinds in ((True, True, True), (False, False, False), (False, True, False)):
        folder = tmp_path / "".join(map(str, kinds))
        folder.mkdir()
        paths = [save(weights(n), folder / f"{n}.pt", kind) for n, kind in enumerate(kinds)]
        report = swa_avg.average(paths, folder / "out.pt", bn_buffers="first")
        outs.append(records(folder / "out.pt"))
        assert any("before 1.6" in note for note in report.notes) == (False in kinds)
    assert outs[0] == outs[1] == outs[2]


def test_legacy_tensors_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads the pickles and eight bytes for each storage, none of the elements."""
    path = save({"state_dict": {str(n): torch.rand(50_000) for n in range(20)}}, tmp_path / "c.pt")
    read = []
    plain = InputFile.read_into
    monkeypatch.setattr(
        InputFile,
        "read_into",
        lambda file, buffer, offset: (read.append(len(buffer)), plain(file, buffer, offset))[1],
    )
    open_checkpoint(path).close()
    assert sum(read) < 300_000 < path.stat().st_size / 10


# Odd contents beside the weights ------------------------------------------------------------


class Mine(dict):  # type: ignore[type-arg]
    pass


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


class Subclass(torch.Tensor):
    pass


Point = collections.namedtuple("Point", "x y")


def foreign() -> object:
    """An object whose module is gone when the file is read."""
    if "gone_module" not in sys.modules:
        module = sys.modules["gone_module"] = types.ModuleType("gone_module")
        exec("class Gone:\n    def __init__(self): self.x = [1, {'y': 2}]\n", module.__dict__)
    return sys.modules["gone_module"].Gone()


CONTENTS: dict[str, Callable[[], object]] = {
    "namespace": lambda: argparse.Namespace(lr=0.1, betas=(0.9, 0.999)),
    "numpy scalars": lambda: {"a": numpy.float64(0.5), "b": numpy.int64(3), "c": numpy.bool_(True)},
    "numpy arrays": lambda: {"a": numpy.arange(6.0).reshape(2, 3), "b": numpy.array(["x"])},
    "paths": lambda: [Path("/data/x"), Path()],
    "enums": lambda: [Color.RED, {Color.RED: 1}],
    "times": lambda: [datetime.datetime(2024, 1, 2), datetime.timedelta(1), datetime.date(1, 1, 1)],
    "ordered": lambda: OrderedDict(a=OrderedDict(b=1)),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "counter": lambda: collections.Counter("hello"),
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "dict subclass": lambda: Mine(a=1, b=Mine(c=2)),
    "slots": lambda: Slotted(),
    "namedtuple": lambda: Point(1, 2),
    "sets": lambda: [{1, 2}, frozenset({3})],
    "bytes": lambda: [b"raw", bytearray(b"more"), "text \u2603 \ud800"],
    "numbers": lambda: [2**70, -1, 1e300, float("nan"), 3 + 4j, True, None],
    "torch things": lambda: [torch.float32, torch.device("cpu"), torch.Size([1]), torch.strided],
    "functions": lambda: [len, torch.relu, nn.Linear, int],
    "generator state": lambda: torch.random.get_rng_state(),
    "foreign object": foreign,
    "module": lambda: nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.BatchNorm1d(2)])),
    "optimizer": lambda: torch.optim.Adam([nn.Parameter(torch.rand(3))]).state_dict(),
    "cycle": lambda: (lambda loop: loop.append(loop) or loop)([1]),
    "exceptions": lambda: [ValueError("x"), type(None), Ellipsis, slice(1, 2)],
}


@FORMATS
@pytest.mark.parametrize(
    ("content", "protocol"),
    [
        (content, protocol)
        for content in CONTENTS
        for protocol in range(1, 6)
        if (content, protocol) != ("slots", 1)  # Python cannot pickle slots in protocol 1
    ],
)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_odd_contents_do_not_stop_a_read(
    content: str, protocol: int, zipped: bool, tmp_path: Path
) -> None:
    """Whatever lies beside the weights, they are read, and none of it is imported."""
    state = OrderedDict(w=torch.rand(3), p=nn.Parameter(torch.rand(2)), s=torch.rand(2))
    state["s"] = state["s"].as_subclass(Subclass)
    state["tied"] = state["w"]
    tree = {"before": CONTENTS[content](), "state_dict": state, "after": CONTENTS[content]()}
    path = save(tree, tmp_path / "c.pt", zipped, protocol)
    sys.modules.pop("gone_module", None)
    plain = {name: tensor.detach().as_subclass(torch.Tensor) for name, tensor in state.items()}
    assert_same(tensors(path), plain)
    assert "gone_module" not in sys.modules


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=20),
    st.sampled_from([Color.RED, Path("/x"), torch.float32, len, numpy.float32(2), Slotted]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5) | st.integers() | st.tuples(st.text()), inner),
        st.dictionaries(st.text(max_size=5), inner).map(OrderedDict),
        st.dictionaries(st.text(max_size=5), inner).map(Mine),
        st.builds(argparse.Namespace, x=inner),
        st.frozensets(st.integers(), max_size=3),
    ),
    max_leaves=12,
)


@given(tree=TREES, protocol=st.integers(1, 5), zipped=st.booleans())
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_content_does_not_stop_a_read(
    tree: object, protocol: int, zipped: bool, tmp_path: Path
) -> None:
    """The law above, for contents that nobody thought of."""
    state = {"w": torch.arange(3.0), "n": torch.tensor(2)}
    path = save({"a": tree, "state_dict": state, "b": [tree]}, tmp_path / "c.pt", zipped, protocol)
    assert_same(tensors(path), state)


@FORMATS
def test_protocol_0_is_read(zipped: bool, tmp_path: Path) -> None:
    """torch writes protocol 0, but cannot read its own reference to a storage: we can."""
    state = {"w": torch.rand(3), "half": torch.rand(4).bfloat16(), "n": torch.arange(6).view(2, 3)}
    state["f8"] = torch.rand(5).to(torch.float8_e4m3fn)
    state["tied"] = state["w"]
    path = save({"epoch": 3, "state_dict": state}, tmp_path / "c.pt", zipped, 0)
    assert_same(tensors(path), state)
    with pytest.raises((pickle.UnpicklingError, AssertionError, RuntimeError)):
        torch.load(path)


@pytest.mark.parametrize(
    "text", ["('storage', 1)", "os.system", "('storage', <class 'os.x'>, '0', 'cpu', 3)"]
)
def test_text_that_is_no_reference(text: str) -> None:
    """A protocol-0 reference of any other form is refused, whatever it says."""
    with pytest.raises(FormatError, match="other than a storage"):
        unpickler.load(b"P" + text.encode() + b"\n.", Budget())


# Nothing runs -------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("name", NAMES)
def test_payloads_do_not_run(
    name: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that would write when torch unpickles it writes nothing here, and is averaged."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    state = {"w": torch.rand(3)}
    tree = {"a": payloads(marker)[name], "state_dict": state, "b": payloads(marker)[name]}
    path = save(tree, tmp_path / "c.pt", zipped)
    modules = set(sys.modules)
    assert_same(tensors(path), state)
    swa_avg.average([path], tmp_path / "out.pt")
    assert not marker.exists()
    assert not {"this", "antigravity_none"} & (set(sys.modules) - modules)


@pytest.mark.parametrize("name", sorted(set(NAMES) - UNMARKED))
@pytest.mark.filterwarnings("ignore")
def test_payloads_are_real(name: str, tmp_path: Path) -> None:
    """The same files do write when they are unpickled: the test above can fail."""
    marker = tmp_path / "marker"
    path = save({"a": payloads(marker)[name]}, tmp_path / "c.pt")
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    for _ in range(100):
        if marker.exists() or marker.is_symlink():
            return
        time.sleep(0.05)
    pytest.fail("the payload did nothing")


@pytest.mark.parametrize("opcode", ["inst", "obj", "reduce", "newobj", "newobj_ex", "build"])
def test_raw_opcodes_do_not_run(opcode: str, tmp_path: Path) -> None:
    """Each opcode that can call or set a state leaves its function uncalled."""
    marker = tmp_path / "marker"
    argument = pickle.dumps(f"touch {marker}", 2)[2:-1]
    function = b"cos\nsystem\n"
    calls = {
        "inst": b"(" + argument + b"ios\nsystem\n",
        "obj": b"(" + function + argument + b"o",
        "reduce": function + b"(" + argument + b"tR",
        "newobj": function + b"(" + argument + b"t\x81",
        "newobj_ex": function + b"(" + argument + b"t}\x92",
        "build": b"ccollections\nOrderedDict\n)R(" + function + argument + b"db",
    }
    pickled = b"\x80\x04}(X\x01\x00\x00\x00x" + calls[opcode] + b"u."
    path = tmp_path / "c.pt"
    path.write_bytes(legacy(pickled, [], []))
    open_checkpoint(path).close()
    assert not marker.exists()


# The format itself --------------------------------------------------------------------------


def test_storages_that_are_parts_of_another(tmp_path: Path) -> None:
    """The views of storages that torch wrote before 0.4 are where torch puts them."""
    root = Stored("7", 6)
    part = Stored("7", 6, ("8", 2, 3))
    tree = {"w": Rebuilt(root, 0, (6,), (1,)), "v": Rebuilt(part, 1, (2,), (1,))}
    path = tmp_path / "c.pt"
    path.write_bytes(legacy(pickled(tree), ["7"], [(6, FLOATS)]))
    expected = torch.load(path, weights_only=False)
    assert expected["v"].tolist() == [3.0, 4.0]
    assert_same(tensors(path), expected)
    swa_avg.average([path, path], tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    assert loaded["v"].data_ptr() == loaded["w"].data_ptr() + 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy(pickled(WHOLE), ["7"], []), "ends at byte"),
        (legacy(pickled(WHOLE), ["7"], [(6, FLOATS[:-1])]), "within storage 7"),
        (legacy(pickled(WHOLE), [], []), "no record for storage 7"),
        (legacy(pickled(WHOLE), ["7", "7"], [(6, FLOATS)] * 2), "lists storage 7"),
        (legacy(pickled(WHOLE), ["7", "8"], [(6, FLOATS)] * 2), "lists storage 8"),
        (legacy(pickled(WHOLE), [[7]], [(6, FLOATS)]), "lists storage"),
        (legacy(pickled(WHOLE), ["7"], [(5, FLOATS)]), "storage 7 has 5 elements, expected 6"),
        (legacy(pickled(WHOLE), ["7"], [(-1, FLOATS)]), "storage 7 has -1 elements"),
        (legacy(pickled(WHOLE), ["7"], [(6, FLOATS)], version=1002), "version 1002"),
        (
            legacy(pickled(WHOLE), ["7"], [(6, FLOATS)], system={"little_endian": False}),
            "little-endian",
        ),
        (
            legacy(
                pickled({"w": Rebuilt(Stored("7", 2**45), 0, (2**45,), (1,))}),
                ["7"],
                [(2**45, FLOATS)],
            ),
            "within storage 7",
        ),
        (
            legacy(pickled({"w": Rebuilt(Stored("7", 6), 0, (7,), (1,))}), ["7"], [(6, FLOATS)]),
            "ends 28 bytes into storage",
        ),
        (
            legacy(
                pickled({"w": Rebuilt(Stored("7", 6, ("8", 5, 2)), 0, (1,), (1,))}),
                ["7"],
                [(6, FLOATS)],
            ),
            "lies outside the storage",
        ),
        (legacy(pickled(WHOLE), ["7"], [(6, FLOATS)])[:40], "pickle|ends at byte"),
        (legacy(b"\x80\x04\x8e" + b"\xff" * 8, [], []), "unreasonable size|cannot be read"),
        (legacy(b"\x80\x02\x8d" + struct.pack("<Q", 2**42), [], []), "unreasonable size"),
        (legacy(b"\x80\x02r\xff\xff\xff\xff.", [], []), "cannot be read|unreasonable|ends"),
        (pickle.dumps(MAGIC, 2), "cannot be read"),
        (pickle.dumps({"w": 1}, 2), "bare pickle"),
    ],
)
def test_legacy_files_that_are_not_sound_are_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    """Missing, cut, doubled and impossible storages are refused; no value is made up."""
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


def test_what_follows_a_legacy_file_is_said(tmp_path: Path) -> None:
    """Bytes behind the last storage are no part of it; the report says that they are there."""
    path = save(weights(), tmp_path / "c.pt")
    expected = torch.load(path)
    with path.open("ab") as file:
        file.write(b"junk")
    assert_same(tensors(path), expected)
    assert any("4 bytes follow" in note for note in open_checkpoint(path).notes)


def test_tar_files_are_refused_by_name(tmp_path: Path) -> None:
    """What torch wrote before 0.1.10 is refused, saying what it is."""
    import tarfile

    path = tmp_path / "c.pt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    with pytest.raises(FormatError, match=r"tar archive, as torch wrote them before 0\.1\.10"):
        open_checkpoint(path)


@given(data=st.data())
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_damage_to_the_pickles_is_refused_or_harmless(tmp_path: Path, data: Any) -> None:
    """Any byte changed, or any cut, gives tensors or a SwaAvgError; never another error."""
    path = tmp_path / "c.pt"
    whole = bytearray(legacy(pickled(WHOLE), ["7"], [(6, FLOATS)]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole)))])
    try:
        tensors(path)
    except SwaAvgError as error:
        assert str(path) in str(error)
