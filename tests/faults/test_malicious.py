"""The catalogue of faults, 1 to 31 but 18: files that mean harm. Nothing in them ever runs."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import folders
import hostile
import oracle
import pytest
import torch
from command import averaged, each_refused, fails, fault, refused
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

# For the reading of headers, which needs no torch.
LITTLE_MEMORY = {"limits": "ulimit -v 1000000", "timeout": 60}


@pytest.fixture
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that a payload would make."""
    return tmp_path_factory.mktemp("marker") / "marker"


# Code in a checkpoint.


@fault(1, "`os.system` in a pickle", "averaged, nothing runs; refused without sound tensors")
@fault(2, "`eval`, `exec`, `__import__` in a pickle", "as 1")
@fault(3, "`Popen`, `open(…, 'w')` in a pickle", "as 1")
@fault(4, "a pickle or a checkpoint loaded by a pickle", "as 1")
@fault(5, "torch's switch for unsafe loading is set", "as 1")
@fault(6, "all of these in torch's format before 1.6", "as 1")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_payloads_beside_sound_weights_do_nothing(
    tmp_path: Path, marker: Path, zipped: bool
) -> None:
    """Two dozen payloads, beside and among the weights, leave no mark; the average is right."""
    states = []
    for number, payload in enumerate(hostile.payloads(marker).values()):
        states.append({"w": torch.randn(3), "v": torch.randn(2)})
        content = {"args": payload, "state_dict": {**states[-1], "x": payload}, "hooks": [payload]}
        torch.save(content, tmp_path / f"{number}.pt", _use_new_zipfile_serialization=zipped)
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = averaged(tmp_path, "*.pt", "--json", env=environment)
    assert len(json.loads(done.stdout)["inputs"]) == len(states)
    assert set(done.tensors) == {"w", "v"}
    for name, found in done.tensors.items():
        assert oracle.same_bits(found, oracle.mean([state[name] for state in states]))
    assert not marker.exists()


@fault(1)
@fault(2)
@fault(3)
@fault(4)
def test_payloads_by_themselves_do_nothing(tmp_path: Path, marker: Path) -> None:
    """A payload that is the whole file is refused, in every opcode that could call."""
    for number, payload in enumerate(hostile.payloads(marker).values()):
        torch.save(payload, tmp_path / f"call{number}.pt")
    for number, opcode in enumerate(hostile.OPCODES.values()):
        pickled = opcode.replace(b"{}", str(marker).encode())
        hostile.pack(tmp_path / f"opcode{number}.pt", pickled)
    each_refused(tmp_path, {path.name: "" for path in tmp_path.iterdir()})
    assert not marker.exists()


@fault(7, "a tar file, as torch wrote them before 0.1.10", "refused, named")
@fault(8, "TorchScript", "refused, named")
@pytest.mark.filterwarnings("ignore")
def test_formats_that_run_code_are_refused_by_name(tmp_path: Path) -> None:
    """Torch's oldest format and TorchScript are refused for what they are."""
    with tarfile.open(tmp_path / "old.pt", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    cases = {
        "old.pt": "looks like a tar archive, as torch wrote them before 0.1.10",
        "script.pt": "is a TorchScript archive, expected a checkpoint of tensors",
    }
    each_refused(tmp_path, cases)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@fault(9, "a payload in a DCP folder's `.metadata`", "refused; beside sound metadata inert")
@fault(10, "a payload in a DCP item of bytes", "averaged; the item stays unread")
def test_payloads_in_distributed_folders_do_nothing(tmp_path: Path, marker: Path) -> None:
    """Payloads as the metadata, in it, and in items that are no tensors leave no mark."""

    def hide(metadata: Metadata) -> None:
        metadata.storage_meta = Touch(marker)  # type: ignore[assignment]
        assert metadata.planner_data is not None
        metadata.planner_data["x"] = Touch(marker)
        metadata.state_dict_metadata["bytes"] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex("bytes")] = _StorageInfo("bytes.distcp", 0, 100)

    boxes = {"w": folders.HALVES}
    inside = folders.save_chunks(tmp_path / "in", folders.WHOLE, boxes, change=hide)
    (inside / "bytes.distcp").write_bytes(pickle.dumps(Touch(marker)))
    whole = folders.save_chunks(tmp_path / "whole", folders.WHOLE, boxes)
    (whole / ".metadata").write_bytes(pickle.dumps(Touch(marker)))
    done = averaged(tmp_path, "in")
    assert oracle.same_bits(done.tensors["w"], folders.WHOLE["w"])
    refused(tmp_path, "whole", says="whole/.metadata: has no state_dict_metadata")
    assert not marker.exists()


# Names that lead elsewhere.


@fault(11, "a DCP item in `../../x`", "refused")
def test_items_outside_the_folder_are_refused(tmp_path: Path) -> None:
    """The metadata of a distributed folder lead nowhere but into it."""
    cases = {}
    outside = tmp_path / "x"
    outside.write_bytes(b"not ours")
    for number, path in enumerate(("../../x", "../x", str(outside), "", "a/../../x", 3)):
        change = folders.set_info(relative_path=path)
        boxes = {"w": folders.HALVES}
        folders.save_chunks(tmp_path / f"{number}", folders.WHOLE, boxes, change=change)
        cases[f"{number}"] = "model.w: has no item" if path == 3 else "model.w: is in the file"
    each_refused(tmp_path, cases)


@fault(12, "an index that names `../x`, `/abs`, nothing, NUL, a number", "refused")
@fault(13, "an index that names a tensor twice", "refused")
def test_indices_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    """The index of a Hugging Face folder names files in its folder, and each tensor once."""
    state = folders.weights()
    folders.save_one(tmp_path, state, "x")
    shards = ("../x", str(tmp_path / "x"), "", ".", "a/../../x", "x\0y", 3, None, ["x"], "..\\x")
    texts = [folders.index({"layers.0.weight": shard}) for shard in shards]
    cases = {}
    for number, text in enumerate([*texts, '{"weight_map": {"a": "x", "a": "y"}}']):
        folder = folders.save_shards(tmp_path / f"{number}", state)
        (folder / "model.safetensors.index.json").write_text(text)
        last = number == len(shards)
        cases[folder.name] = "a name occurs twice" if last else "layers.0.weight: lists the file"
    each_refused(tmp_path, cases)


@fault(
    14,
    "a shard that is a symbolic link",
    "averaged, as in the hub's cache; a link to no file is refused",
)
def test_shards_may_be_links_to_files(tmp_path: Path) -> None:
    """The hub's cache is links into another folder; a link to a folder or to nothing is none."""
    state = folders.weights()
    blobs = folders.save_shards(tmp_path / "blobs", state)
    linked = [tmp_path / name for name in ("cache", "to_folder", "to_nothing")]
    for folder in linked:
        folder.mkdir()
        for path in blobs.iterdir():
            (folder / path.name).symlink_to(path)
    for folder, target in ((linked[1], blobs), (linked[2], tmp_path / "gone")):
        shard = folder / "model-00002-of-00003.safetensors"
        shard.unlink()
        shard.symlink_to(target)
    each_refused(
        tmp_path,
        {
            "to_folder": "/model-00002-of-00003.safetensors: is not a regular file",
            "to_nothing": "/model-00002-of-00003.safetensors: cannot be opened: No such file",
        },
    )
    done = averaged(tmp_path, "cache", "--force")
    assert set(done.tensors) == set(state)
    assert all(oracle.same_bits(done.tensors[name], state[name]) for name in state)


# Geometry and archives that lie.


@fault(15, "one element seen a trillion times (stride 0)", "refused")
@fault(16, "a storage larger than its record", "refused")
@fault(17, "shape, stride or offset outside the storage", "refused")
def test_geometry_that_lies_is_refused(tmp_path: Path) -> None:
    """Thirty tensors that their storage does not hold: no byte outside is taken for a number."""
    cases = {}
    for number, numbers in enumerate(hostile.UNSOUND):
        pickled = hostile.tensor_pickle(*numbers)
        cases[hostile.pack(tmp_path / f"{number}.pt", pickled, d0=bytes(16)).name] = ""
    lines = each_refused(tmp_path, cases, **LITTLE_MEMORY)
    bomb, wide, large = lines["0.pt"], lines["2.pt"], lines["17.pt"]
    assert "holds a tensor of 4398046511104 bytes, expanded from 16 bytes" in bomb
    assert "holds a tensor that ends 20 bytes into storage 0" in wide
    assert "storage 0 has 16 bytes, expected 20" in large


@fault(19, "a deflated record, a zip bomb", "refused")
@fault(20, "two records of one name", "refused")
@fault(21, "records that overlap", "refused")
@fault(22, "a local header whose name differs from the directory", "refused")
@fault(24, "byte order big", "refused, named")
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_lie_are_refused(tmp_path: Path) -> None:
    """A zip is read only where it says one thing, and says it twice."""

    def made(name: str, **changes: Any) -> Path:
        (tmp_path / name).mkdir()
        path = hostile.archive(tmp_path / name)
        return hostile.rewritten(path, **changes)

    made("deflated", compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(made("bomb"), "a", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("in/bomb", bytes(10**8))
    for record in ("data/0", "data.pkl"):
        made(f"twice-{record[5:]}", extra={f"in/{record}": b"N."})
    made("big", without=["byteorder"], extra={"in/byteorder": b"big"})
    overlapping = made("overlapping")
    hostile.patched(overlapping, "in/data/0", False, 20, "<I", 600)
    hostile.patched(overlapping, "in/data/0", False, 24, "<I", 600)
    same = made("same")
    with zipfile.ZipFile(same) as source:
        place = source.getinfo("in/data/0").header_offset
    hostile.patched(same, "in/data/1", False, 42, "<I", place)
    renamed = made("renamed")
    data = renamed.read_bytes()
    place = data.index(b"in/data/0")
    renamed.write_bytes(data[:place] + b"in/data/7" + data[place + 9 :])
    cases = {
        "deflated/in.pt": "holds a compressed record",
        "bomb/in.pt": "holds a compressed record, in/bomb",
        "twice-0/in.pt": "holds two records named data/0",
        "twice-pkl/in.pt": "holds two records named data.pkl",
        "big/in.pt": "has byte order big, expected little",
        "overlapping/in.pt": "overlap",
        "same/in.pt": "",
        "renamed/in.pt": "has a local header that does not match the directory",
    }
    each_refused(tmp_path, cases, **LITTLE_MEMORY)


@fault(23, "a sparse tensor with indices out of bounds", "refused before any operation")
def test_sparse_tensor_with_bad_indices_is_refused(tmp_path: Path) -> None:
    """No operation sees it: the name of its kind is enough."""
    bad = torch.sparse_coo_tensor(
        torch.tensor([[0, 2**40]]), torch.ones(2), (3,), check_invariants=False
    )
    torch.save({"w": torch.ones(2), "s": bad}, tmp_path / "in.pt")
    refused(tmp_path, "in.pt", says=["in.pt: s: is a sparse tensor", "expected a dense tensor"])


# Pickles that eat memory or time.


@fault(25, "containers that hold themselves", "refused; beside weights left out, with a note")
@fault(26, "billion laughs, in any container", "refused at once; beside weights left out")
@fault(28, "a huge memo index, string length, bytearray", "refused, in little memory")
def test_hungry_pickles_are_refused(tmp_path: Path) -> None:
    """Thirty pickles that claim terabytes are refused within a gigabyte, torch not needed."""
    cases = {}
    for number, pickled in enumerate(hostile.HUNGRY.values()):
        cases[hostile.pack(tmp_path / f"{number}.pt", pickled).name] = ""
    for name in ("long string", "long bytearray", "memo index"):
        (tmp_path / f"{name}.bin").write_bytes(hostile.legacy(hostile.HUNGRY[name], [], []))
        cases[f"{name}.bin"] = ""
    each_refused(tmp_path, cases, **LITTLE_MEMORY)


@fault(25)
@fault(26)
@fault(28)
def test_endless_values_beside_weights_are_left_out(tmp_path: Path) -> None:
    """What holds itself, or would take for ever to write out or to print, is not written."""
    loop: dict[str, object] = {"w": torch.arange(3.0), "v": torch.ones(1), "u": torch.ones(1)}
    laughs: object = ()
    for _ in range(40):
        laughs = (laughs,) * 10
    loop |= {"me": loop, "laughs": laughs, "huge": 10**5000}
    torch.save({"state_dict": loop, "again": loop}, tmp_path / "in.pt")
    done = averaged(tmp_path, "in.pt", timeout=60)
    assert set(done.tensors) == {"w", "v", "u"}
    assert done.tensors["w"].tolist() == [0, 1, 2]
    assert any(
        note.startswith("me, laughs, huge: neither a tensor nor a plain value")
        for note in done.notes
    )


@fault(27, "two million nested lists", "refused")
def test_nested_lists_are_refused(tmp_path: Path) -> None:
    """No recursion goes as deep as a file tells it to."""

    def nested(depth: int) -> bytes:
        return hostile.put(b"]" * depth + b"a" * (depth - 1))

    hostile.pack(tmp_path / "zip.pt", nested(2_000_000))
    (tmp_path / "legacy.pt").write_bytes(hostile.legacy(nested(200_000), [], []))
    each_refused(tmp_path, {"zip.pt": "", "legacy.pt": ""}, timeout=60)


@fault(29, "a storage of 2^45 elements in torch's format before 1.6", "refused, nothing allocated")
def test_huge_storage_is_refused(tmp_path: Path) -> None:
    """Its size is compared with the file's before anything is made of it."""
    tree = {"w": hostile.Rebuilt(hostile.Stored("7", 2**45), 0, (2**45,), (1,))}
    content = hostile.legacy(hostile.pickled(tree), ["7"], [(2**45, hostile.FLOATS)])
    (tmp_path / "in.pt").write_bytes(content)
    each_refused(
        tmp_path, {"in.pt": "within storage 7, expected 140737488355328 bytes"}, **LITTLE_MEMORY
    )


@fault(30, "a safetensors header over 100 MB, or nested without end", "refused")
def test_unreasonable_headers_are_refused(tmp_path: Path) -> None:
    """A header is read only if its length is reasonable, and to a reasonable depth."""
    with (tmp_path / "long.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b'{"a":')
        file.truncate(100_000_100)
    deep = b'{"a":' + b"[" * 199_995
    (tmp_path / "deep.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    (tmp_path / "lies.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    cases = {f"{name}.safetensors": "has a header" for name in ("long", "deep", "lies")}
    each_refused(tmp_path, cases, **LITTLE_MEMORY)


@fault(31, "control characters and ANSI escapes in names", "refused or printed, escaped")
def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Names of tensors and files are shown as escapes, in errors, notes and on stdout."""
    red = "\x1b[31mred\n"
    for number in range(2):
        content = {red: torch.ones(number + 1), "\x1b]0;x\x07": object, "v": torch.ones(1)}
        torch.save(content, tmp_path / f"{red}{number}.pt")
    line = fails(tmp_path, f"{red}0.pt", f"{red}1.pt")
    assert "\\x1b[31mred\\n0.pt: \\x1b[31mred\\n: has shape [1], expected [2]" in line
    done = averaged(tmp_path, f"{red}0.pt", "-v")
    assert any(note.startswith("\\x1b]0;x\\x07: neither a tensor") for note in done.notes)
    assert done.stdout.replace("\n", "").isprintable()
