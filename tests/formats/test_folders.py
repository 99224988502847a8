"""Folders: Hugging Face's, with one file or shards, and folders of plain checkpoints."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from folders import Weights, index, save_one, save_shards, weights
from safetensors.torch import save_file
from stored import records
from stored import tensors as read

import swa_avg
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.errors import FileError, FormatError, SelectionError, SwaAvgError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.planning.inputs import expand
from swa_avg.planning.select import select


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert oracle.same_bits(found[name], tensor), name


ONE_FILE = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors",
)


@pytest.mark.parametrize("name", ONE_FILE)
def test_folder_with_one_file(name: str, tmp_path: Path) -> None:
    """A folder is its file of weights; what else lies there is not read."""
    save_one(tmp_path, weights(), name)
    (tmp_path / "config.json").write_text("{}")
    torch.save({"state": {0: torch.rand(9)}}, tmp_path / "optimizer.pt")
    assert_same(read(tmp_path), weights())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("shards", [1, 3, 6])
def test_folder_of_shards(safe: bool, shards: int, tmp_path: Path) -> None:
    """Shards are one state_dict, in the order of the index."""
    save_shards(tmp_path, weights(), safe, shards)
    assert_same(read(tmp_path), weights())
    assert list(read(tmp_path)) == sorted(weights())


def test_safetensors_come_before_bin(tmp_path: Path) -> None:
    """Where both are there, what transformers would load is read."""
    save_one(tmp_path, weights(0), "model.safetensors")
    save_one(tmp_path, weights(1), "pytorch_model.bin")
    assert_same(read(tmp_path), weights(0))


def test_forms_average_together(tmp_path: Path) -> None:
    """Whole and sharded folders, safetensors and bin, files: one average, the same bytes."""
    forms = [
        save_shards(tmp_path / "checkpoint-1", weights(0)),
        save_shards(tmp_path / "checkpoint-2", weights(1), safe=False),
        save_one(tmp_path / "checkpoint-3", weights(2), "model.safetensors"),
        save_one(tmp_path / "checkpoint-4", weights(3), "pytorch_model.bin"),
        save_one(tmp_path, weights(4), "last.pt") / "last.pt",
    ]
    report = swa_avg.average(forms, tmp_path / "out.pt")
    assert [Path(source.path).name for source in report.inputs] == [path.name for path in forms]
    loaded = torch.load(tmp_path / "out.pt")
    for name, tensor in loaded.items():
        assert oracle.same_bits(tensor, oracle.mean([weights(n)[name] for n in range(5)]))
    plain = [save_one(tmp_path, weights(n), f"{n}.pt") / f"{n}.pt" for n in range(5)]
    swa_avg.average(plain, tmp_path / "plain.pt")
    assert records(tmp_path / "plain.pt") == records(tmp_path / "out.pt")


def test_trainer_folders_are_ordered_by_what_they_record(tmp_path: Path) -> None:
    """`trainer_state.json` gives step and epoch, whatever the folders are called."""
    for name, step in (("a", 300), ("b", 100), ("c", 200)):
        folder = save_one(tmp_path / name, weights(step), "model.safetensors")
        state = {"epoch": step / 150, "global_step": step, "log_history": [{"loss": 1.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    states = [find_state_dict(open_checkpoint(tmp_path / name)) for name in "abc"]
    assert [(state.epoch, state.step) for state in states] == [(2, 300), (None, 100), (None, 200)]
    chosen = select(states).chosen
    assert [state.checkpoint.path.name for state in chosen] == ["b", "c", "a"]


@pytest.mark.parametrize(
    "shard", ["../x", "/etc/passwd", "", ".", "a/../../x", "x\0y", 3, None, ["x"], "..\\x", "C:\\x"]
)
def test_index_leads_nowhere_else(shard: Any, tmp_path: Path) -> None:
    """An index may not name a file outside its folder, or no file at all."""
    folder = tmp_path / "run"
    save_shards(folder, weights())
    save_file(weights(), tmp_path / "x")
    name = folder / "model.safetensors.index.json"
    name.write_text(index({"layers.0.weight": shard}))
    with pytest.raises(FormatError, match=r"lists the file .*expected a file in the same folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', "occurs twice"),
        ('{"weight_map": {}, "weight_map": {}}', "occurs twice"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("[]", "has no weight_map"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
    ],
)
def test_index_that_is_not_sound_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """A damaged index is refused by its name."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(path)


def test_what_the_index_promises_must_be_there(tmp_path: Path) -> None:
    """A missing shard, and a tensor that its shard lacks, are refused before averaging."""
    save_shards(tmp_path, weights())
    path = tmp_path / "model.safetensors.index.json"
    promised = json.loads(path.read_text())["weight_map"]
    path.write_text(index(promised | {"more": promised["layers.0.weight"]}))
    with pytest.raises(FormatError, match="more: is not in the shard"):
        open_checkpoint(tmp_path)
    path.write_text(index({name: promised[name] for name in list(promised)[:-1]}))
    assert any("index does not list" in note for note in open_checkpoint(tmp_path).notes)
    path.write_text(index(promised))
    (tmp_path / promised["layers.0.weight"]).unlink()
    with pytest.raises(FileError, match="No such file"):
        open_checkpoint(tmp_path)


def test_shards_behind_links_are_read(tmp_path: Path) -> None:
    """The hub's cache is links to blobs elsewhere; a link to what is no file is refused."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots"
    save_shards(blobs, weights())
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(os.path.relpath(path, folder))
    assert_same(read(folder), weights())
    shard = folder / "model-00001-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(blobs)
    with pytest.raises(FileError, match="not a regular file"):
        open_checkpoint(folder)


def test_several_models_are_said(tmp_path: Path) -> None:
    """accelerate saves each model of a run to its own file; the first is read, the rest told."""
    save_one(tmp_path, weights(0), "model.safetensors")
    save_one(tmp_path, weights(1), "model_1.safetensors")
    assert_same(read(tmp_path), weights(0))
    assert any("model_1.safetensors" in note for note in open_checkpoint(tmp_path).notes)


def test_index_of_another_name(tmp_path: Path) -> None:
    """One index of any name is taken; of two, none."""
    save_shards(tmp_path, weights())
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "weights.index.json")
    assert_same(read(tmp_path), weights())
    (tmp_path / "other.index.json").write_text("{}")
    with pytest.raises(FormatError, match=r"several indices \(other"):
        open_checkpoint(tmp_path)


def test_folder_of_checkpoints_is_expanded(tmp_path: Path) -> None:
    """Files that are checkpoints, and folders that are; nothing hidden, no other file."""
    for n in (1, 2, 10):
        save_one(tmp_path, weights(n), f"epoch_{n}.pt")
    torch.save(weights(), tmp_path / "snapshot.ep.3", _use_new_zipfile_serialization=False)
    save_one(tmp_path / "checkpoint-7", weights(), "model.safetensors")
    save_one(tmp_path / "deeper" / "down", weights(), "model.safetensors")
    save_one(tmp_path, weights(), ".hidden.pt")
    (tmp_path / "log.txt").write_text("loss 0.1")
    (tmp_path / "empty.pt").write_text("")
    os.mkfifo(tmp_path / "fifo.pt")
    names = {path.name for path in expand([tmp_path])}
    expected = {"epoch_1.pt", "epoch_2.pt", "epoch_10.pt", "snapshot.ep.3", "checkpoint-7"}
    assert names == expected
    assert {path.name for path in expand([str(tmp_path / "check*"), tmp_path])} == expected


def test_folder_that_is_a_checkpoint_is_one(tmp_path: Path) -> None:
    """A folder with weights of its own is one checkpoint, unless it holds a run's checkpoints."""
    save_one(tmp_path, weights(), "model.safetensors")
    save_one(tmp_path, weights(), "pytorch_model_1.bin")
    save_one(tmp_path / "2_Dense", weights(), "model.safetensors")
    assert expand([tmp_path]) == [tmp_path]
    save_one(tmp_path / "checkpoint-7", weights(), "model.safetensors")
    assert expand([tmp_path]) == [tmp_path / "checkpoint-7"]


def test_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    """An empty folder is a mistake, and is said to be."""
    with pytest.raises(SelectionError, match="folder without checkpoints"):
        expand([tmp_path])
    with pytest.raises(FormatError, match="folder without a checkpoint of its own"):
        open_checkpoint(tmp_path)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_files_are_closed(tmp_path: Path) -> None:
    """Whether it succeeds or fails, opening a folder leaves no file open."""
    before = open_files()
    save_shards(tmp_path, weights())
    open_checkpoint(tmp_path).close()
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"damaged")
    with pytest.raises(SwaAvgError):
        open_checkpoint(tmp_path)
    assert open_files() == before


def test_more_shards_than_open_files_allowed(tmp_path: Path) -> None:
    """The limit of open files is raised as far as it may when shards need it."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 200:
        pytest.skip("the system allows fewer files")
    for n in range(2):
        save_shards(
            tmp_path / f"checkpoint-{n}", {str(k): torch.ones(1) for k in range(40)}, True, 40
        )
    code = (
        "import resource, sys\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))\n"
        "import swa_avg\n"
        "swa_avg.average(sys.argv[2:], sys.argv[1])\n"
    )
    folders = [str(tmp_path / f"checkpoint-{n}") for n in range(2)]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out.pt"), *folders], check=True)
    assert len(torch.load(tmp_path / "out.pt")) == 40


# Written by the frameworks themselves ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_transformers_save_pretrained(size: str, tmp_path: Path) -> None:
    """What save_pretrained wrote is read with the model's own names and values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=8,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "20KB")
    found = read(tmp_path)
    state = model.state_dict()
    assert found.keys() <= state.keys()
    for name, tensor in found.items():
        assert oracle.same_bits(tensor, state[name])
    swa_avg.average([tmp_path], tmp_path / "out.pt")
    missing = transformers.BertForMaskedLM(config).load_state_dict(
        torch.load(tmp_path / "out.pt"), strict=False
    )
    assert not missing.unexpected_keys


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(tmp_path: Path) -> None:
    """A Trainer's checkpoint-N folders average to the oracle's mean, in the order of steps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=8,
    )  # fmt: skip
    data = [
        {"input_ids": torch.randint(0, 50, (8,)), "labels": torch.tensor(n % 2)} for n in range(12)
    ]
    trainer = transformers.Trainer(
        model=transformers.BertForSequenceClassification(config),
        args=transformers.TrainingArguments(
            tmp_path, num_train_epochs=3, per_device_train_batch_size=4, save_strategy="epoch",
            report_to=[], use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=data,
    )  # fmt: skip
    trainer.train()
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert len(folders) == 3
    report = swa_avg.average([tmp_path], tmp_path / "out.pt", force=True)
    assert [(source.epoch, source.step) for source in report.inputs] == [(1, 3), (2, 6), (3, 9)]
    loaded = torch.load(tmp_path / "out.pt")
    states = [read(folder) for folder in folders]
    for name, tensor in loaded.items():
        assert oracle.same_bits(tensor, oracle.mean([state[name] for state in states]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_save_state(safe: bool, tmp_path: Path) -> None:
    """accelerate's folder holds the model that was prepared."""
    accelerate = pytest.importorskip("accelerate")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    assert_same(read(tmp_path), {k: v.cpu() for k, v in prepared.state_dict().items()})


@pytest.mark.filterwarnings("ignore")
def test_peft_adapter(tmp_path: Path) -> None:
    """PEFT's folder holds the adapter's weights, under PEFT's names."""
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    adapted.save_pretrained(tmp_path)
    assert_same(read(tmp_path), peft.get_peft_model_state_dict(adapted))


def test_index_that_is_no_index_by_its_size(tmp_path: Path) -> None:
    """A hundred million bytes name no shards: refused before they are read."""
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, 100_000_001)
    with pytest.raises(FormatError, match="100000001 bytes long"):
        open_checkpoint(tmp_path)


def test_notes_of_shards_name_the_shard(tmp_path: Path) -> None:
    """What is to be said of one shard, here that more follows it, is said with its name."""
    folder = save_shards(tmp_path / "in", weights(), safe=False)
    first = min(folder.glob("*.bin"))
    torch.save(torch.load(first), first, _use_new_zipfile_serialization=False)
    with first.open("ab") as file:
        file.write(b"more")
    checkpoint = open_checkpoint(folder)
    checkpoint.close()
    assert f"{first.name} 4 bytes follow the checkpoint; not read" in checkpoint.notes
    assert all(note.startswith(f"{first.name} ") for note in checkpoint.notes)
