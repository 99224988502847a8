"""The law of `--keep-wrapper`: the last file, with nothing changed but the weights in it."""

from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import swa_avg
from swa_avg.errors import OutputError


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8))
    made.append(nn.Linear(8, 8, bias=False))
    made[4].weight = made[3].weight
    return made.to(memory_format=torch.channels_last)


def wrapped(folder: Path, epoch: int, **options: bool) -> Path:
    """Save a checkpoint as a training script does, optimizer state and all."""
    model = network(epoch)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    path = folder / f"epoch_{epoch}.ckpt"
    args = Namespace(lr=0.1, name="run")
    content = {"epoch": epoch, "state_dict": model.state_dict(), "args": args}
    torch.save(content | {"optimizer": optimizer.state_dict()}, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_only_the_weights_change(tmp_path: Path, zipped: bool) -> None:
    """Weights are the mean, all else is the last file's, and torch's own loader takes it."""
    paths = [wrapped(tmp_path, epoch, _use_new_zipfile_serialization=zipped) for epoch in (0, 1, 2)]
    swa_avg.average(paths, tmp_path / "swa.ckpt", keep_wrapper=True)
    swa_avg.average(paths, tmp_path / "bare.pt")

    made = torch.load(tmp_path / "swa.ckpt", weights_only=False)
    last = torch.load(paths[-1], weights_only=False)
    bare = torch.load(tmp_path / "bare.pt")
    assert made["epoch"] == 2 and made["args"] == last["args"]
    for key, moments in last["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, made["optimizer"]["state"][key][name])
    for name, value in bare.items():
        assert torch.equal(value, made["state_dict"][name]), name
        assert value.stride() == made["state_dict"][name].stride()
    tied = made["state_dict"]
    assert tied["3.weight"].data_ptr() == tied["4.weight"].data_ptr()
    network(0).load_state_dict(made["state_dict"], strict=True)
    if zipped:
        with zipfile.ZipFile(tmp_path / "swa.ckpt") as new, zipfile.ZipFile(paths[-1]) as old:
            assert new.testzip() is None
            assert new.namelist() == [*old.namelist(), "epoch_2/swa_avg.json"]
            assert new.read("epoch_2/data.pkl") == old.read("epoch_2/data.pkl")


def test_one_checkpoint_is_copied_whole(tmp_path: Path) -> None:
    """The average of one file inside its own wrapper is that file, and how it was made.

    Up to the directory of the zip each byte is the same; a file from before torch 1.6,
    which has no room for more, is the same to the last.
    """
    path = wrapped(tmp_path, 5)
    swa_avg.average([path], tmp_path / "swa.ckpt", keep_wrapper=True)
    before, after = path.read_bytes(), (tmp_path / "swa.ckpt").read_bytes()
    directory = before.rindex(b"PK\x05\x06") + 16
    end = int.from_bytes(before[directory : directory + 4], "little")
    assert after[:end] == before[:end]
    with zipfile.ZipFile(tmp_path / "swa.ckpt") as new, zipfile.ZipFile(path) as old:
        assert [info.CRC for info in new.infolist()[:-1]] == [info.CRC for info in old.infolist()]
        assert json.loads(new.read("epoch_5/swa_avg.json"))["checkpoints"][0]["epoch"] == 5
    path = wrapped(tmp_path, 6, _use_new_zipfile_serialization=False)
    swa_avg.average([path], tmp_path / "old.ckpt", keep_wrapper=True)
    assert (tmp_path / "old.ckpt").read_bytes() == path.read_bytes()


def test_storage_that_holds_more_than_the_weights(tmp_path: Path) -> None:
    """Bytes of a storage beside a tensor that is averaged stay, and its checksum is right."""
    for epoch in range(3):
        whole = torch.arange(100.0) + epoch
        content = {"state_dict": {"w": whole[10:40].view(5, 6)}, "whole": whole}
        torch.save(content, tmp_path / f"{epoch}.pt")
    swa_avg.average(tmp_path / "?.pt", tmp_path / "swa.pt", keep_wrapper=True)
    made = torch.load(tmp_path / "swa.pt")
    expected = torch.arange(100.0) + 2
    expected[10:40] -= 1
    assert torch.equal(made["whole"], expected)
    assert zipfile.ZipFile(tmp_path / "swa.pt").testzip() is None


def test_safetensors_keep_their_header(tmp_path: Path) -> None:
    """Of a safetensors file the header stays, foreign metadata included."""
    for epoch in range(2):
        save_file(
            {"w": torch.full((3,), float(epoch))}, tmp_path / f"{epoch}.safetensors", {"a": "b"}
        )
    output = tmp_path / "swa.safetensors"
    swa_avg.average(tmp_path / "?.safetensors", output, keep_wrapper=True)
    with safe_open(output, "pt") as made:
        text = made.metadata()
        assert json.loads(text.pop("swa_avg.json"))["count"] == 2
        assert text == {"a": "b"}
        assert made.get_tensor("w").tolist() == [0.5] * 3


def test_ties_of_the_last_file_only_are_refused(tmp_path: Path) -> None:
    """Two different means have no room in one storage: an error, and no output."""
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "0.pt")
    shared = torch.ones(4)
    torch.save({"a": shared, "b": shared}, tmp_path / "1.pt")
    with pytest.raises(OutputError, match="not in every checkpoint"):
        swa_avg.average(tmp_path / "?.pt", tmp_path / "swa.pt", keep_wrapper=True)
    assert not (tmp_path / "swa.pt").exists()


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folder_keeps_all_its_files(tmp_path: Path, kind: str) -> None:
    """Of a folder every file stays as it is, but for the weights in it."""
    for epoch in range(3):
        folder = tmp_path / f"checkpoint-{epoch}"
        (folder / "deep").mkdir(parents=True)
        state = {"a": torch.full((5, 3), float(epoch)), "b": torch.full((7,), epoch * 2.0)}
        if kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file(state, folder / "model.safetensors", {"format": "pt"})
        torch.save({"moments": torch.randn(50)}, folder / "optimizer.pt")
        (folder / "config.json").write_text("{}")
        (folder / "deep" / "random_states.pkl").write_bytes(bytes(range(256)) * epoch)
    swa_avg.average(tmp_path / "checkpoint-?", tmp_path / "out", keep_wrapper=True)
    for path in folder.rglob("*"):
        if path.is_file() and "model" not in path.name:
            assert (tmp_path / "out" / path.relative_to(folder)).read_bytes() == path.read_bytes()
    there = {path.relative_to(folder) for path in folder.rglob("*")}
    made_files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")}
    assert made_files == there | {Path("swa_avg.json")}
    if kind == "bin":
        made = torch.load(tmp_path / "out/pytorch_model.bin")
        assert zipfile.ZipFile(tmp_path / "out/pytorch_model.bin").testzip() is None
    else:
        made = load_file(tmp_path / "out/model.safetensors")
    assert made["a"].eq(1).all() and made["b"].eq(2).all()


@pytest.mark.parametrize(
    "options", [{"keep_wrapper": True}, {"max_shard_size": 1000}], ids=["wrapper", "shards"]
)
def test_form_that_the_output_will_not_have(tmp_path: Path, options: dict[str, int]) -> None:
    """A torch file is not written under the name of safetensors, nor one file in shards."""
    path = wrapped(tmp_path, 1)
    with pytest.raises(OutputError, match=r"names another format than|is no Hugging Face folder"):
        swa_avg.average([path], tmp_path / "swa.safetensors", **options)
    assert not (tmp_path / "swa.safetensors").exists()


def test_view_with_gaps_cannot_be_replaced(tmp_path: Path) -> None:
    """Between its elements lie others': the file is not kept, and none is written."""
    for number in range(2):
        whole = torch.arange(12.0).view(3, 4) + number
        torch.save({"a": whole[:, :2], "b": torch.ones(2)}, tmp_path / f"{number}.pt")
    with pytest.raises(OutputError, match="a: is a view with gaps"):
        swa_avg.average(tmp_path / "?.pt", tmp_path / "out.pt", keep_wrapper=True)
    assert {path.name for path in tmp_path.iterdir()} == {"0.pt", "1.pt"}
