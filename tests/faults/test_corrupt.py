"""The catalogue of faults, 32 to 48: files that came to harm. No wrong number comes out."""

from __future__ import annotations

import json
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import folders
import hostile
import numpy
import oracle
import pytest
import torch
from command import averaged, each_refused, fault, refused
from safetensors.torch import save_file
from torch import Tensor


def weights(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(40, 30), "b": torch.arange(5), "c": torch.randn(7).half()}


def save_dcp(path: Path, state: dict[str, Tensor]) -> None:
    boxes = {name: [((0,) * value.dim(), tuple(value.shape))] for name, value in state.items()}
    folders.save_chunks(path, state, boxes)


# Every form, and in which of its files the bytes of tensors are.
FORMS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], object]]] = {
    "zip.pt": ("", torch.save),
    "legacy.pt": (
        "",
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    ),
    "safe.safetensors": ("", save_file),
    "hub": ("model-00001-of-00002.safetensors", lambda s, p: folders.save_shards(p, s, shards=2)),
    "dcp": ("__0_0.distcp", lambda state, path: save_dcp(path, state)),
}


def save(form: str, path: Path, seed: int = 0) -> Path:
    """Save weights in a form; return the file that has the bytes of `a.weight`."""
    inner, saver = FORMS[form]
    saver(weights(seed), path)
    return path / inner if inner else path


def where(path: Path, tensor: Tensor) -> int:
    """Return at which byte of a file a tensor lies."""
    data = path.read_bytes()
    wanted = tensor.numpy().tobytes()
    assert data.count(wanted) == 1
    return data.index(wanted)


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


# Not whole.


@fault(32, "an empty file", "refused")
def test_empty_files_are_refused(tmp_path: Path) -> None:
    """An empty file is refused as such, and so are an empty index, shard, item or metadata."""
    cases = {"a.pt": "a.pt: is empty", "a.safetensors": "a.safetensors: is empty"}
    for name in cases:
        (tmp_path / name).touch()
    for name, form in (
        ("model.safetensors.index.json", "hub"),
        ("model-00001-of-00002.safetensors", "hub"),
        (".metadata", "dcp"),
        ("__0_0.distcp", "dcp"),
    ):
        folder = tmp_path / f"{form} {name}"
        save(form, folder)
        (folder / name).write_bytes(b"")
        cases[folder.name] = f"/{name}: "
    each_refused(tmp_path, cases)


@fault(33, "a file that was cut", "refused, wherever it was cut")
def test_files_that_were_cut_are_refused(tmp_path: Path) -> None:
    """Cut in headers, pickle, tensors or the last bytes: refused in every format."""
    cases = {}
    for form, (inner, _) in FORMS.items():
        whole = save(form, tmp_path / form)
        data = whole.read_bytes()
        start = where(whole, weights()["a.weight"])
        cuts = (1, 9, start // 2, start + 100, len(data) * 9 // 10, len(data) - 1)
        for number, length in enumerate(cuts):
            path = tmp_path / f"{number}-{form}"
            save(form, path)
            (path / inner if inner else path).write_bytes(data[:length])
            cases[path.name] = ""
    each_refused(tmp_path, cases)


# Damaged.


@fault(34, "a flipped bit in a tensor", "refused; averaged where a format has no checksums")
@pytest.mark.parametrize("form", ["zip.pt", "dcp"])
def test_flipped_bit_in_a_tensor_is_found(tmp_path: Path, form: str) -> None:
    """A torch zip, and a distributed folder of them, have checksums: file and tensor are named."""
    damaged = save(form, tmp_path / "in", seed=1)
    save(form, tmp_path / "sound", seed=0)
    flip(damaged, where(damaged, weights(1)["a.weight"]) + 102)
    file = damaged.relative_to(tmp_path)
    refused(tmp_path, "in", "sound", says=f"error: {file}: a.weight: is damaged")


@fault(34)
def test_flipped_bit_without_checksums_is_a_number(tmp_path: Path) -> None:
    """Safetensors and files from before 1.6 have none: another number is what they hold."""
    unchecked = ("legacy.pt", "safe.safetensors", "hub")
    inputs = []
    for seed, form in enumerate(unchecked):
        damaged = save(form, tmp_path / form, seed)
        flip(damaged, where(damaged, weights(seed)["a.weight"]) + 102)
        flipped = bytearray(weights(seed)["a.weight"].numpy().tobytes())
        flipped[102] ^= 1
        inputs.append(torch.frombuffer(flipped, dtype=torch.float32).reshape(40, 30))
    done = averaged(tmp_path, *unchecked)
    assert oracle.same_bits(done.tensors["a.weight"], oracle.mean(inputs))
    assert any("without checksums: damage cannot be detected" in note for note in done.notes)


@fault(35, "a flipped bit in the pickle", "refused")
@fault(36, "two places in the directory swapped", "refused")
@fault(37, "a page of zeros", "refused; in a format without checksums only where it hits a header")
def test_damaged_headers_are_refused(tmp_path: Path) -> None:
    """The pickle and the directory of an archive are checked before they are believed."""
    data = hostile.rewritten(hostile.archive(tmp_path)).read_bytes()
    cases = {"in.pt": ""}
    pickled = data.index(b"_rebuild_tensor_v2")
    for number, byte in enumerate((pickled + 3, pickled - 20, pickled + 60)):
        path = tmp_path / f"flipped{number}.pt"
        path.write_bytes(data)
        flip(path, byte)
        cases[path.name] = "has a damaged header: its checksum does not match"
    swapped = bytearray(data)
    places = [data.rindex(f"in/data/{number}".encode()) - 4 for number in range(2)]
    for at, other in (places, places[::-1]):
        swapped[at : at + 4] = data[other : other + 4]
    (tmp_path / "swapped.pt").write_bytes(swapped)
    cases["swapped.pt"] = "has a local header that does not match the directory"
    for number, start in enumerate((0, pickled - 64, len(data) - 64)):
        (tmp_path / f"zeros{number}.pt").write_bytes(data[:start] + bytes(64) + data[start + 64 :])
        cases[f"zeros{number}.pt"] = ""
    (tmp_path / "in.pt").write_bytes(bytes(4096) + data[4096:])
    each_refused(tmp_path, cases)


@fault(37)
def test_page_of_zeros_in_a_tensor_is_refused(tmp_path: Path) -> None:
    """What a disk lost is found by the checksum, in the file and the tensor that it hit."""
    path = save("zip.pt", tmp_path / "in.pt")
    start = where(path, weights()["a.weight"])
    data = path.read_bytes()
    path.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
    refused(tmp_path, "in.pt", says="error: in.pt: a.weight: is damaged")


@fault(38, "a zip without checksums", "averaged, with a note")
def test_zip_without_checksums(tmp_path: Path) -> None:
    """torch can be told to compute none: that damage cannot be found is said."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights(), tmp_path / "in.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    done = averaged(tmp_path, "in.pt")
    assert any("has no checksums: damage cannot be detected" in n for n in done.notes)
    assert all(oracle.same_bits(done.tensors[name], value) for name, value in weights().items())


# Something else.


@fault(39, "HTML, JSON, a Git LFS pointer called `.pt`", "refused, saying what it looks like")
@fault(41, "gzip, tar, npz", "refused, saying what it looks like")
def test_strangers_are_refused_for_what_they_look_like(tmp_path: Path) -> None:
    """A file that is no checkpoint is named for what it is."""
    strangers = {
        "page.pt": (b"<!DOCTYPE html><html>", "looks like HTML"),
        "data.pt": (b'{"weights": 1}', "looks like JSON"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1\noid x", "Git LFS pointer"),
        "words.pt": (b"not found\n", "looks like text"),
        "packed.pt": (b"\x1f\x8b\x08" + bytes(100), "looks like a gzip file"),
        "noise.pt": (bytes(range(1, 200)), "is of an unknown format"),
        "bare.pt": (pickle.dumps({"a": 1}), "looks like a bare pickle"),
    }
    for name, (data, _) in strangers.items():
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.add(tmp_path / "words.pt", "words.pt")
    numpy.savez(tmp_path / "npz.npz", a=numpy.ones(2))
    cases = {name: looks for name, (_, looks) in strangers.items()}
    cases |= {"tar.pt": "looks like a tar archive", "npz.npz": "zip archive without a torch pickle"}
    each_refused(tmp_path, cases)


@fault(40, "safetensors called `.pt`, and the reverse", "averaged; read by content")
def test_names_do_not_tell_the_format(tmp_path: Path) -> None:
    """A file is what its bytes say, whatever it is called."""
    save_file(weights(0), tmp_path / "0.pt")
    torch.save(weights(1), tmp_path / "1.safetensors")
    done = averaged(tmp_path, "0.pt", "1.safetensors")
    inputs = [weights(seed)["a.weight"] for seed in range(2)]
    assert oracle.same_bits(done.tensors["a.weight"], oracle.mean(inputs))


# Incomplete, or too much.


@fault(42, "storages missing in the format before 1.6", "refused; no value is made up")
def test_missing_storages_are_refused(tmp_path: Path) -> None:
    """A storage that is not there, or listed but not written, is not read as what is in memory."""
    floats, whole = hostile.FLOATS, hostile.pickled(hostile.WHOLE)
    files = {
        "unlisted.pt": (hostile.legacy(whole, [], []), "storage 7"),
        "unwritten.pt": (hostile.legacy(whole, ["7"], []), "ends at byte"),
        "short.pt": (hostile.legacy(whole, ["7"], [(6, floats[:-4])]), "within storage 7"),
        "fewer.pt": (hostile.legacy(whole, ["7"], [(5, floats)]), "has 5 elements, expected 6"),
        "other.pt": (hostile.legacy(whole, ["8"], [(6, floats)]), "lists storage 8"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    hostile.rewritten(hostile.archive(tmp_path), without=["data/1"])
    cases = {name: says for name, (_, says) in files.items()}
    each_refused(tmp_path, cases | {"in.pt": "has no record for storage 1"})


@fault(43, "junk after the end", "refused; before torch 1.6 averaged, with a note")
def test_trailing_junk(tmp_path: Path) -> None:
    """Bytes that belong to nothing are refused, or said to be there."""
    cases = {"zip.pt": "", "safe.safetensors": "something was appended to it", "hub": "appended"}
    for form in ("zip.pt", "safe.safetensors", "hub", "legacy.pt"):
        with save(form, tmp_path / form).open("ab") as file:
            file.write(b"junk")
    each_refused(tmp_path, cases)
    done = averaged(tmp_path, "legacy.pt", "--force")
    assert any("4 bytes follow the checkpoint; not read" in note for note in done.notes)
    assert all(oracle.same_bits(done.tensors[name], value) for name, value in weights().items())


@fault(44, "a shard that is missing", "refused before averaging starts")
@fault(45, "a tensor in the index that the shard lacks", "refused")
@fault(46, "a DCP folder without `.metadata`", "refused")
def test_missing_parts_of_folders_are_refused(tmp_path: Path) -> None:
    """What an index or a folder's items promise must be there before a tensor is read."""
    save("hub", tmp_path / "missing")
    (tmp_path / "missing/model-00002-of-00002.safetensors").unlink()
    save("hub", tmp_path / "promised")
    index = tmp_path / "promised/model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    save("dcp", tmp_path / "headless")
    (tmp_path / "headless/.metadata").unlink()
    save("dcp", tmp_path / "itemless")
    (tmp_path / "itemless/__1_0.distcp").unlink()
    each_refused(
        tmp_path,
        {
            "missing": "/model-00002-of-00002.safetensors: cannot be opened: No such file",
            "promised": "/model-00001-of-00002.safetensors: more: is not in the shard",
            "headless": "headless: has no .metadata",
            "itemless": "/__1_0.distcp: cannot be opened: No such file",
        },
    )


@fault(47, "chunks of a DCP tensor that leave a hole or overlap", "refused")
def test_chunks_that_do_not_cover_are_refused(tmp_path: Path) -> None:
    """The chunks of a tensor are all of it, and nothing twice."""
    left, right = folders.HALVES
    changes = {
        "hole": (folders.set_chunks(left), "has a hole"),
        "none": (folders.set_chunks(), "has a hole"),
        "larger": (folders.set_size(4, 7), "has a hole"),
        "twice": (folders.set_chunks(left, right, left), "has chunks that overlap"),
        "overlap": (folders.set_chunks(left, ((0, 2), (4, 3))), "has chunks that overlap"),
        "outside": (
            folders.set_chunks(left, ((0, 3), (4, 4))),
            "has a chunk that lies outside the tensor",
        ),
    }
    for name, (change, _) in changes.items():
        folders.save_chunks(tmp_path / name, folders.WHOLE, {"w": folders.HALVES}, change=change)
    cases = {name: f"/.metadata: model.w: {says}" for name, (_, says) in changes.items()}
    each_refused(tmp_path, cases)


@fault(48, "a name twice in a safetensors header", "refused")
def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    """Readers differ in which of two entries they take; we take none."""
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f"{{{one},{one}}}".encode()
    (tmp_path / "in.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    each_refused(tmp_path, {"in.safetensors": "a name occurs twice"})
