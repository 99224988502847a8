"""CASES.md part B: which files are checkpoints of this run. Each test runs the command.

Every remedy that a line prints is followed by the test that asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import averaged, fails, run
from safetensors.torch import save_file
from stored import settled
from torch import nn
from torch.optim.swa_utils import AveragedModel

# The numbers in names that are not literally in a pattern for them.
NUMBERS = re.compile(r"(?<=[_f])[0-9]+(?!_model)")
ADAM = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), float(value)), "a.bias": torch.tensor([float(value)])}


def save(folder: Path, files: Mapping[str, Any]) -> None:
    """Save weights of a value, or a tree, under each name."""
    for name, what in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(what if isinstance(what, dict | list | nn.Module) else weights(what), path)
        settled(path)


def save_model(folder: Path, value: float, name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(value), folder / name, {"format": "pt"})
    settled(folder / name)


def mean(folder: Path, *arguments: str) -> tuple[float, tuple[str, ...]]:
    """Average, and return the mean of the weights and the notes."""
    done = averaged(folder, *arguments, "--force")
    return done.tensors["a.weight"][0, 0].item(), done.notes


def order(folder: Path, *arguments: str) -> list[str]:
    """Return the checkpoints that would be averaged, in their order."""
    ended = run(folder, *arguments, "--dry-run", "--json")
    assert ended.returncode == 0, ended.stderr
    return [source["path"] for source in json.loads(ended.stdout)["inputs"]]


def options(line: str) -> list[str]:
    """Return the `--exclude` options that a line tells to add."""
    found = re.findall(r"--exclude ('[^']*'|[^\s';]+)", line)
    assert found, line
    return [word for pattern in found for word in ("--exclude", *shlex.split(pattern))]


def saying(notes: Sequence[str], *parts: str) -> str:
    """Return the one note that says all this."""
    found = [note for note in notes if all(part in note for part in parts)]
    assert len(found) == 1, (parts, notes)
    return found[0]


# Parts of one model -----------------------------------------------------------------------------

# Of each: the parts of one step, and the name of a part at another step.
PARTS = {
    "FSDP scripts": ("model.rank_{part}.pth", "step_{step}"),
    "verl": ("model_world_size_2_rank_{part}.pt", "global_step_{step}"),
    "fairseq": ("checkpoint_last-shard{part}.pt", "{step}"),
    "metaseq": ("checkpoint_1_50-model_part-{part}-shard0.pt", "checkpoint-{step}"),
    "Llama": ("consolidated.0{part}.pth", "step-{step}"),
    "Megatron": ("mp_rank_0{part}/model_optim_rng.pt", "iter_000{step}"),
    "Megatron, pipeline": ("mp_rank_00_00{part}/model_rng.pt", "iter_000{step}"),
    "NeMo": ("tp_rank_0{part}_pp_rank_000/model_weights.ckpt", "epoch={step}"),
    "DeepSpeed": ("mp_rank_0{part}_model_states.pt", "global_step{step}"),
    "DeepSpeed, experts": ("layer_0_expert_{part}_mp_rank_00_model_states.pt", "global_step{step}"),
    "Megatron-DeepSpeed": ("layer_0{part}-model_00-model_states.pt", "global_step{step}"),
    "Composer": ("ep1-ba{step}-rank{part}.pt", ""),
    "accelerators": ("gpu{part}/epoch_{step}.pt", ""),
    "camel case": ("modelRank{part}.pt", "step_{step}"),
    "stages of a pipeline": ("pipeline_stage_{part}.pt", "step_{step}"),
    "fairseq2": ("model/pp_00/tp_00/sdp_0{part}.pt", "step_{step}"),
    "parallel": ("tensor_parallel_{part}.pt", "step_{step}"),
    "N of M": ("model-0000{part}-of-00002.bin", "checkpoint-{step}"),
}


@pytest.mark.parametrize("layout", PARTS.values(), ids=PARTS)
def test_b_parts_of_one_model(layout: tuple[str, str], tmp_path: Path) -> None:
    """Two parts are never averaged; one part by itself over several steps is, as the line says."""
    file, folder = layout
    names = {
        (step, part): Path(folder.format(step=step), file.format(part=part, step=step)).as_posix()
        for step in (1, 2)
        for part in (1, 2)
    }
    save(tmp_path, {name: 10 * step + part for (step, part), name in names.items()})
    line = fails(tmp_path, *names.values())
    assert " of a model, but " in line, line
    pattern = re.search(r"as in (.*?)\.$", line)
    assert pattern, line
    assert mean(tmp_path, *shlex.split(pattern[1]))[0] == 16


def test_b_parts_of_one_step(tmp_path: Path) -> None:
    """All parts of one step, parts of different steps, a part and the whole: no pair of them."""
    save(tmp_path / "run", {"model.pt": 1, "model_rank1.pt": 2})
    save(tmp_path, {"step_1/rank_0.pt": 1, "step_1/rank_1.pt": 2, "step_2/rank_1.pt": 3})
    assert "Merge them into one file" in fails(tmp_path, "step_1/rank_0.pt", "step_1/rank_1.pt")
    assert "Merge them into one file" in fails(tmp_path, "step_1/rank_0.pt", "step_2/rank_1.pt")
    assert "Merge them into one file" in fails(tmp_path, "run")
    assert mean(tmp_path, "step_1/rank_1.pt", "step_2/rank_1.pt")[0] == 2.5


def test_b_parts_with_an_index(tmp_path: Path) -> None:
    """Shards that an index names are given as their folder, as the line says."""
    for step in (1, 2):
        home = tmp_path / f"checkpoint-{step}"
        for part, name in enumerate(weights(0), 1):
            save_file({name: weights(step)[name]}, _made(home) / f"model-{part}-of-2.safetensors")
        index = {
            "weight_map": {n: f"model-{p}-of-2.safetensors" for p, n in enumerate(weights(0), 1)}
        }
        (home / "model.safetensors.index.json").write_text(json.dumps(index))
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    line = fails(tmp_path, *files)
    told = re.search(r"Give (.*?) instead\.$", line)
    assert told, line
    assert mean(tmp_path, *shlex.split(told[1]))[0] == 1.5


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


# Averages of other tools ------------------------------------------------------------------------

AVERAGES = (
    "valid.acc.ave_2best.pth",
    "valid.loss.ave.pth",
    "avg_2.pt",
    "avg5.pt",
    "swa_model_3.pth",
    "checkpoint.avg3.pt",
    "epoch-2-avg-1.pt",
    "epoch_2_ema.pt",
    "modelEMA.pt",
    "ema/epoch_2.pt",
    "averaged_model.pt",
    "model.last10.avg.best",
    "greedy_soup.pt",
)


@pytest.mark.parametrize("average", AVERAGES)
def test_b_average_among_checkpoints(average: str, tmp_path: Path) -> None:
    """It is left out and said, and so not among the last."""
    save(tmp_path, {"epoch_1.pt": 1, "epoch_2.pt": 2, average: 50})
    value, notes = mean(tmp_path, "epoch_1.pt", "epoch_2.pt", average, "--last", "2")
    assert value == 1.5
    assert "give no other checkpoints" in saying(notes, average, "because it is an average")


def test_b_averages_alone(tmp_path: Path) -> None:
    """Where all names say that they are averages, these are the checkpoints, as the line says."""
    save(tmp_path, {f"{run}/{name}": run for name in AVERAGES for run in (50, 70)})
    for name in AVERAGES[::4]:
        value, notes = mean(tmp_path, f"50/{name}", f"70/{name}")
        assert value == 60 and not any("left out" in note for note in notes)
    save(tmp_path / "ema", {f"model_ema_{step}.pt": step for step in (1000, 2000)})
    assert mean(tmp_path, "ema") == (1500, ())
    # A run that is called so: its last one does not make averages of all others.
    save(tmp_path / "run", {"swa_run_epoch_1.pt": 1, "swa_run_epoch_2.pt": 2, "last.pt": 6})
    value, notes = mean(tmp_path, "run")
    assert value == 3
    saying(notes, "averaged together", "run/last.pt")


def test_b_average_by_its_counter(tmp_path: Path) -> None:
    """An AveragedModel is one whatever it is called; what says `avg_loss` is none."""
    model = nn.Module()
    model.a = nn.Linear(3, 2)
    kept = AveragedModel(model)
    kept.update_parameters(model)
    files = {"avg_loss_0.5_epoch_1.pt": 1, "loss_avg_0.4_epoch_2.pt": 2, "avgLoss0.3_epoch_4.pt": 3}
    save(tmp_path, files)
    torch.save(
        {k: v if "bias" not in k else v[:1] for k, v in kept.state_dict().items()},
        tmp_path / "epoch_3.pt",
    )
    value, notes = mean(tmp_path, *files, "epoch_3.pt")
    assert value == 2
    saying(notes, "epoch_3.pt", "because it is an average")


# What was not completed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    "epoch_3.pt.tmp", "epoch_3.pt.part", "epoch_3.pt.crdownload", "epoch_3.pt.incomplete",
    "tmp_epoch_3.pt",
])  # fmt: skip
def test_b_unfinished_file(name: str, tmp_path: Path) -> None:
    """A file that is still written or was not to its end is left out, whole or cut short."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, name: 30})
    path = tmp_path / "run" / name
    for data in (path.read_bytes(), path.read_bytes()[:300]):
        path.write_bytes(data)
        value, (note,) = mean(tmp_path, "run")
        assert value == 1.5
        assert note == f"left out, because their names mark unfinished checkpoints: run/{name}"


def test_b_unfinished_folder(tmp_path: Path) -> None:
    """Trainer's tmp-checkpoint-N, and a checkpoint of which only the configuration was saved."""
    for name, value in (("checkpoint-1", 1), ("checkpoint-2", 2), ("tmp-checkpoint-3", 30)):
        save_model(tmp_path / "run" / name, value)
    (tmp_path / "run" / "checkpoint-4").mkdir()
    (tmp_path / "run" / "checkpoint-4" / "config.json").write_text("{}")
    (tmp_path / "run" / "logs_5").mkdir()
    value, notes = mean(tmp_path, "run")
    assert value == 1.5 and len(notes) == 2
    saying(notes, "unfinished", "run/tmp-checkpoint-3")
    saying(notes, "are no checkpoints: run/checkpoint-4 (a folder without weights)")


def test_b_names_of_settings_are_not_unfinished(tmp_path: Path) -> None:
    """`temp` is a temperature, and where all names say `tmp`, these are the checkpoints."""
    save(tmp_path / "run", {"temp_0.7_epoch_1.pt": 1, "temp_0.7_epoch_2.pt": 2, "best.pt": 3})
    assert mean(tmp_path, "run")[0] == 2
    save(tmp_path / "tmp", {"tmp_epoch_1.pt": 1, "tmp_epoch_2.pt": 2})
    assert mean(tmp_path, "tmp") == (1.5, ())


BROKEN = {
    b"": "(empty)",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n": "(looks like a Git LFS pointer",
    b"<html>404</html>": "(looks like HTML",
    b"\0" * 1000: "(of an unknown format)",
}


@pytest.mark.parametrize("data", BROKEN, ids=BROKEN.values())
def test_b_file_that_is_no_checkpoint_any_more(data: bytes, tmp_path: Path) -> None:
    """What is called like a checkpoint and is none is not passed over without a word."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2})
    (tmp_path / "run" / "epoch_3.pt").write_bytes(data)
    (tmp_path / "run" / "train.bin").write_bytes(b"tokens" * 99)
    value, (note,) = mean(tmp_path, "run")
    assert value == 1.5
    assert note.startswith("left out, because they are no checkpoints: run/epoch_3.pt ")
    assert BROKEN[data] in note and "train.bin" not in note
    for name in ("epoch_1.pt", "epoch_2.pt"):
        (tmp_path / "run" / name).write_bytes(data)
    line = fails(tmp_path, "run", code=2)
    assert f"run: is a folder without checkpoints (epoch_1.pt {BROKEN[data][1:4]}" in line or (
        "(epoch_1.pt is " in line
    )


# Names ------------------------------------------------------------------------------------------

ORDERS = {
    "Lightning": ("gpt--val_loss=1.30-step=100.pt", "gpt--val_loss=1.10-step=200.pt"),
    "Lightning, plain": ("val_loss_0.9-02.ckpt", "val_loss_0.5-10.ckpt"),
    "unet": ("unet_dice0.95_epoch2.pth", "unet_dice0.91_epoch10.pth"),
    "letters": ("net-acc0.93-e9-it9000.pt", "net-acc0.83-e10-it5000.pt"),
    "Keras": ("weights.02-1.23.hdf5", "weights.10-0.93.hdf5"),
    "Ignite": ("model_9_acc=0.93.pt", "model_10_acc=0.91.pt"),
    "ESPnet": ("9epoch.pth", "10epoch.pth"),
    "fairseq": ("checkpoint_1_9000.pt", "checkpoint_2_1000.pt", "checkpoint_2_10000.pt"),
    "Composer": ("ep0-ba100-rank0.pt", "ep1-ba90-rank0.pt"),
    "a step in thousands": ("ckpt_900k.pt", "ckpt_1M.pt"),
    "of how many": ("epoch_9_of_10.pt", "epoch_10_of_10.pt"),
    "camel case": ("modelEpoch9-acc95.pt", "modelEpoch10-acc91.pt"),
    "stages of a training": ("stage1.pt", "stage2.pt"),
    "versions": ("epoch=1.ckpt", "epoch=1-v1.ckpt", "epoch=2.ckpt"),
    "folders": ("9/model.pt", "10/model.pt"),
    "best, last": ("best.pt", "iter_9.pth", "iter_10.pth", "last.pt"),
    "detectron2": ("model_0004999.pth", "model_0009999.pth", "model_final.pth"),
    "kohya-ss": ("lora-000002.pt", "lora-000010.pt", "lora.pt"),
    "kohya-ss, steps": ("lora-step00000500.pt", "lora-step00001000.pt", "lora.pt"),
    "textual inversion": ("learned-steps-500.pt", "learned-steps-1000.pt", "learned.pt"),
    "DETR": ("checkpoint0049.pth", "checkpoint0099.pth", "checkpoint.pth"),
    "Lightning, the best ones": ("best.ckpt", "best-v2.ckpt", "best-v10.ckpt"),
    "Lightning, all under one name": ("net.ckpt", "net-v1.ckpt", "net-v10.ckpt"),
    "nnU-Net": ("checkpoint_best.pth", "checkpoint_final.pth"),
    "epochs that begin anew": ("stage1_epoch9.pt", "stage2_epoch1.pt", "stage2_epoch2.pt"),
    "cycles": ("cycle0_epoch_9.pt", "cycle0_epoch_10.pt", "cycle1_epoch_1.pt"),
    "powers of ten": ("ppo_5e5.pt", "ppo_1e6.pt", "ppo_2e6.pt", "ppo_1e7.pt"),
    "decimals with a unit": ("ckpt_900k.pt", "ckpt_1m.pt", "ckpt_1.1m.pt", "ckpt_10M.pt"),
    "months first, over years": ("01-31-2024.pt", "02-01-2024.pt", "01-02-2025.pt"),
    "days first": ("31-05-2024.pt", "01-06-2024.pt", "01-07-2024.pt"),
    "days first, with a time": ("31.05.2024_10-00.pt", "01.06.2024_09-00.pt"),
    "months first": ("05-31-2024.pt", "06-02-2024.pt", "10-01-2024.pt"),
    "machines": ("gpu02-ep3.pt", "gpu01-ep4.pt", "gpu02-ep10.pt"),
    "nodes": ("node7/epoch_3.pt", "node1/epoch_4.pt"),
}


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_b_order_by_epoch_and_step_not_by_metric(names: Sequence[str], tmp_path: Path) -> None:
    """Nothing is recorded inside: the words in the names tell the order, the metric never."""
    save(tmp_path, {name: number for number, name in enumerate(names)})
    assert order(tmp_path, *reversed(names)) == list(names)
    assert order(tmp_path, *names, "--last", "1") == [names[-1]]


@pytest.mark.parametrize("metric", ["return", "elo", "AP", "rew"])
def test_b_whole_metrics_are_no_order(metric: str, tmp_path: Path) -> None:
    """A score without a fraction is not a step, and does not part a run into series."""
    names = [f"{metric}_{value}.pt" for value in (350, 290)]
    save(tmp_path, {name: number for number, name in enumerate(names)})
    saying(mean(tmp_path, *names)[1], "an epoch or a step")
    placed = [f"last_Ant_ep_{n}_{metric}_{value}.pt" for n, value in ((1, 1023), (2, 912))]
    save(tmp_path, {name: number for number, name in enumerate(placed)})
    assert order(tmp_path, *reversed(placed)) == placed and mean(tmp_path, *placed)[1] == ()


def test_b_metric_from_names(tmp_path: Path) -> None:
    """The metric that stands before the position is found by its own name."""
    names = ["unet_dice0.95_epoch2.pth", "unet_dice0.91_epoch3.pth", "unet_dice0.93_epoch4.pth"]
    save(tmp_path, {name: number for number, name in enumerate(names)})
    assert order(tmp_path, *names, "--best", "2", "--metric", "dice") == [names[0], names[2]]


def test_b_no_order_is_said(tmp_path: Path) -> None:
    """Where names bear a metric and nothing else, the order is not known, and that is said."""
    save(tmp_path, {"acc_0.91.pt": 1, "acc_0.95.pt": 2})
    _, notes = mean(tmp_path, "acc_0.91.pt", "acc_0.95.pt")
    saying(notes, "an epoch or a step", "acc_0.95.pt is used as the last one")


# --epochs ---------------------------------------------------------------------------------------


def test_b_epochs_are_what_the_name_calls_so(tmp_path: Path) -> None:
    """Files record steps, names say epoch: the user means what is called so."""
    files = {f"epoch_{n}.pt": {"model": weights(n), "global_step": 100 * n} for n in range(1, 11)}
    save(tmp_path, files)
    assert order(tmp_path, *files, "--epochs", "7:8") == ["epoch_7.pt", "epoch_8.pt"]
    # What the file itself calls an epoch goes before its name.
    for n in range(1, 11):
        save(tmp_path, {f"epoch_{n}.pt": {"model": weights(n), "epoch": n - 1}})
    assert order(tmp_path, *files, "--epochs", "7:8") == ["epoch_8.pt", "epoch_9.pt"]


def test_b_epochs_by_step_is_said(tmp_path: Path) -> None:
    """Where nothing says an epoch, steps count, and the user is told."""
    save(tmp_path, {f"ckpt{n}.pt": {"model": weights(n), "step": 100 * n} for n in (1, 2, 3)})
    value, notes = mean(tmp_path, "ckpt1.pt", "ckpt2.pt", "ckpt3.pt", "--epochs", "200:")
    assert value == 2.5
    saying(notes, "--epochs 200: selects by step")


# The same step ----------------------------------------------------------------------------------


def test_b_same_step_is_said(tmp_path: Path) -> None:
    """Two inputs that record one step and differ are named; equal ones are counted once."""
    save(
        tmp_path,
        {
            "a_1.pt": {"model": weights(1), "global_step": 10},
            "b_1.pt": {"model": weights(2), "global_step": 10},
            "a_2.pt": {"model": weights(3), "global_step": 20},
            "copy_2.pt": {"model": weights(3), "global_step": 20},
        },
    )
    _, notes = mean(tmp_path, "a_1.pt", "b_1.pt", "a_2.pt", "copy_2.pt")
    saying(notes, "a_1.pt and b_1.pt record the same step, 10, but their weights differ")
    saying(notes, "copy_2.pt", "counted once")


def test_b_same_place_by_name_is_said(tmp_path: Path) -> None:
    """Lightning's `-v1` is another file of the same epoch."""
    save(tmp_path, {"epoch=1.ckpt": 1, "epoch=1-v1.ckpt": 2})
    _, notes = mean(tmp_path, "epoch=1.ckpt", "epoch=1-v1.ckpt")
    saying(notes, "epoch=1.ckpt and epoch=1-v1.ckpt have the same numbers in their names")


SETTINGS: dict[str, Any] = {
    "Lightning": lambda seed: {"hyper_parameters": {"seed": seed, "lr": 0.1}},
    "argparse": lambda seed: {"args": argparse.Namespace(seed=seed, resume="x")},
    "fairseq": lambda seed: {"cfg": {"common": {"seed": seed}, "task": None}},
    "mmengine": lambda seed: {"meta": {"seed": seed}},
}


@pytest.mark.parametrize("made", SETTINGS.values(), ids=SETTINGS)
def test_b_seeds_that_differ_are_said(made: Any, tmp_path: Path) -> None:
    """Two seeds are two runs, whatever the names say; a seed that is the same is quiet."""
    files = [f"epoch_{n}.pt" for n in (1, 2, 3)]
    trees = {file: {"model": weights(n), **made(7)} for n, file in enumerate(files)}
    save(tmp_path, trees)
    assert mean(tmp_path, *files) == (1, ())
    save(tmp_path, {"epoch_1.pt": {"model": weights(1), **made(6)}})
    note = saying(mean(tmp_path, *files)[1], "seed is 6 in epoch_1.pt and 7 in epoch_3.pt")
    assert note.endswith("these are several runs, whose weights have no useful mean")
    # No whole number, a cycle, and a seed that is no setting.
    cycle: dict[str, Any] = {"args": {"seed": None}, "seed": 3}
    cycle["args"]["args"] = cycle["args"]
    save(tmp_path, {"epoch_1.pt": {"model": weights(0), **cycle}})
    assert mean(tmp_path, *files) == (1, ())


def test_b_epochs_of_an_earlier_run_are_said(tmp_path: Path) -> None:
    """A shorter run in the same folder leaves the last epochs of the one before it."""
    save(tmp_path, {f"epoch_{n}.pt": n for n in range(1, 6)})
    files = [f"epoch_{n}.pt" for n in range(1, 6)]

    def written(*hours: float) -> None:
        for file, hour in zip(files, hours, strict=True):
            os.utime(tmp_path / file, (10**9 + 3600 * hour,) * 2)

    written(24.1, 24.2, 24.3, 0.4, 0.5)
    value, (note,) = mean(tmp_path, *files)
    assert value == 3
    assert note.startswith("epoch_4.pt, epoch_5.pt: written before epoch_3.pt, possibly by an")
    option = re.search(r"; (--epochs :3) leaves them out$", note)
    assert option and mean(tmp_path, *files, *option[1].split()) == (2, ())
    assert mean(tmp_path, *files, "--last", "2") == (4.5, ())
    # A run that was continued the next day, files copied at once, copied in another order.
    for times in ((0.1, 0.2, 24.3, 24.4, 24.5), (0, 0, 0, 0, 0), (9.001, 9.002, 9, 9.003, 9.004)):
        written(*times)
        assert mean(tmp_path, *files) == (3, ())


# Series -----------------------------------------------------------------------------------------


def test_b_two_series_of_one_run_are_refused(tmp_path: Path) -> None:
    """CycleGAN's two generators fit together and are two models; each by itself is right."""
    for n in (1, 2, 3):
        save(tmp_path / "run", {f"netG_A_{n}.pth": n, f"netG_B_{n}.pth": 10 * n})
    line = fails(tmp_path, "run")
    assert "has 3 epochs or steps in common with the series of run/netG_A_1.pth" in line
    assert mean(tmp_path, "run", *options(line))[0] == 2
    for n in (1, 2, 3):
        save(tmp_path, {f"seed_1/epoch_{n}.pt": n, f"seed_2/epoch_{n}.pt": 10 * n})
    line = fails(tmp_path, "seed_1", "seed_2")
    assert mean(tmp_path, "seed_1", "seed_2", *options(line))[0] == 2
    # Averages of several runs are merged, as the line says.
    averaged(tmp_path, "seed_1", out="one.pt")
    averaged(tmp_path, "seed_2", out="two.pt")
    assert "--start-from" in line
    assert mean(tmp_path, "--start-from", "one.pt", "--start-from", "two.pt")[0] == 11


def test_b_pairs_of_numbers_are_no_decimals(tmp_path: Path) -> None:
    """ema_pytorch's PostHocEMA writes INDEX.STEP.pt: two averages of different lengths."""
    steps = [5 * n for n in range(1, 11)]
    save(tmp_path / "run", {f"{i}.{step}.pt": 100 * i + step for i in (0, 1) for step in steps})
    line = fails(tmp_path, "run")
    assert "has 10 epochs or steps in common with the series of run/0.5.pt" in line
    assert options(line) == ["--exclude", "1.*"]
    assert mean(tmp_path, "run", *options(line))[0] == sum(steps) / 10
    # Values of a metric are decimals.
    names = ["0.91.pt", "0.93.pt", "1.05.pt"]
    save(tmp_path / "losses", {name: n for n, name in enumerate(names)})
    saying(mean(tmp_path, "losses")[1], "nor their names contain an epoch")


def test_b_recorded_steps_tell_runs_apart(tmp_path: Path) -> None:
    """Names that begin anew after a restart are one run where the recorded steps go on."""
    for n in (1, 2, 3):
        for part, steps in (("first", n), ("second", 3 + n)):
            tree = {"model": weights(steps), "global_step": steps}
            save(tmp_path, {f"{part}/epoch_{n}.pt": tree})
            save(tmp_path, {f"{part}/constant_{n}.pt": tree | {"global_step": 0}})
    files = [f"{part}/epoch_{n}.pt" for part in ("first", "second") for n in (1, 2, 3)]
    assert order(tmp_path, *reversed(files)) == files
    constant = [file.replace("epoch", "constant") for file in files]
    assert "has 3 epochs or steps in common" in fails(tmp_path, *constant)


def test_b_two_series_are_said(tmp_path: Path) -> None:
    """What is called otherwise and is no copy is averaged and said; the option leaves it out."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, "epoch_3.pt": 3, "best.pt": 10})
    value, notes = mean(tmp_path, "run")
    assert value == 4
    note = saying(notes, "averaged together", "run/best.pt")
    assert mean(tmp_path, "run", *options(note)) == (2, ())
    # A soup of one checkpoint of each run is one too.
    save(tmp_path, {"a/epoch_9.pt": 1, "b/epoch_9.pt": 2})
    value, notes = mean(tmp_path, "a/epoch_9.pt", "b/epoch_9.pt")
    saying(notes, "several series are averaged together: a/epoch_9.pt, b/epoch_9.pt")


RUNS = {
    "folds": ("fold0/best.pt", "fold1/best.pt"),
    "seeds": ("model_seed1.pt", "model_seed2.pt"),
    "runs": ("run1/model.pt", "run2/model.pt"),
    "a sweep": ("lr_0.1/last.pt", "lr_0.01/last.pt"),
    "models of a checkpoint": ("step_9/actor.pt", "step_9/critic.pt"),
    "members": ("cv_1_best.pt", "cv_2_best.pt"),
    "two generators": ("latest_net_G_A.pth", "latest_net_G_B.pth"),
    "models of a GAN": ("generator.pt", "discriminator.pt"),
}


@pytest.mark.parametrize("names", RUNS.values(), ids=RUNS)
def test_b_one_checkpoint_of_each_run_is_said(names: Sequence[str], tmp_path: Path) -> None:
    """The names say that these may be several runs or models; their mean may be meant."""
    save(tmp_path, {name: 1 + 2 * number for number, name in enumerate(names)})
    value, notes = mean(tmp_path, *names)
    assert value == 2
    note = saying(notes, "averaged together", *names)
    assert len(notes) == 1 and mean(tmp_path, *names, *options(note))[0] in (1, 3)


def test_b_other_model_in_a_folder(tmp_path: Path) -> None:
    """SpeechBrain's normalizer beside the models has other tensors: left out as the line says."""
    for n in (1, 2):
        save(
            tmp_path / "run",
            {f"model_{n}.ckpt": n, f"normalizer_{n}.ckpt": {"mean": torch.ones(3)}},
        )
    line = fails(tmp_path, "run")
    assert "has no tensor in common with" in line
    assert mean(tmp_path, "run", *options(line))[0] == 1.5


def test_b_names_without_numbers_are_quiet(tmp_path: Path) -> None:
    """Files that the user names and that bear no numbers are what the user means."""
    save(tmp_path, {"warm.pt": 1, "cold.pt": 2, "model_2024-01-15_12-30-00.pt": 3})
    assert mean(tmp_path, "warm.pt", "cold.pt") == (1.5, ())
    save(tmp_path, {"model_2024-01-15_11-00-30.pt": 1})
    found = ["model_2024-01-15_11-00-30.pt", "model_2024-01-15_12-30-00.pt"]
    assert mean(tmp_path, *found) == (2, ())
    assert order(tmp_path, *reversed(found)) == found


# A run's folder ---------------------------------------------------------------------------------


def test_b_model_at_the_top_of_a_run(tmp_path: Path) -> None:
    """Trainer's save_model(): the checkpoints in the folder are the run's, the copy is left out."""
    for n in (2, 4, 10):
        save_model(tmp_path / "run" / f"checkpoint-{n}", n)
    save_model(tmp_path / "run", 50)
    save(tmp_path / "run", {"training_args.bin": {"lr": 0.1}, "rng_state.pth": {"python": 1}})
    assert order(tmp_path, "run") == [f"run/checkpoint-{n}" for n in (2, 4, 10)]
    value, notes = mean(tmp_path, "run", "--last", "2")
    assert value == 7
    note = saying(notes, "run: the checkpoints in this folder are used, and the model")
    assert mean(tmp_path, "run", *options(note))[0] == 50
    # Several models are a soup of them; their runs' checkpoints are not.
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    save_model(tmp_path / "other", 70)
    value, notes = mean(tmp_path, "run", "other")
    assert value == 60
    saying(notes, "other: the model in this folder is used, not the 3 checkpoints beside it")


def test_b_adapter_at_the_top_of_a_run(tmp_path: Path) -> None:
    """PEFT's, and a file for each epoch beside the model."""
    for n in (1, 2):
        save_model(tmp_path / "peft" / f"checkpoint-{n}", n, "adapter_model.safetensors")
        save(tmp_path / "bert", {f"epoch_{n}.pt": n})
    save_model(tmp_path / "peft", 9, "adapter_model.safetensors")
    save_model(tmp_path / "bert", 9)
    assert mean(tmp_path, "peft")[0] == 1.5
    assert mean(tmp_path, "bert")[0] == 1.5


def test_b_folders_further_down(tmp_path: Path) -> None:
    """A folder of folders holds none itself; the line says where they are."""
    for n in (1, 2):
        save(tmp_path / "run" / f"global_step{n}", {"weights_of_the_model.pt": n})
    told = re.search(r"give (.*?)\.$", fails(tmp_path, "run", code=2))
    assert told
    assert mean(tmp_path, *shlex.split(told[1]))[0] == 1.5


COMPONENTS = {
    "diffusers": ("unet", "controlnet", "unet_ema"),
    "diffusers, two alike": ("text_encoder", "text_encoder_2", "text_encoder_ema"),
    "diffusers, files": (
        "unet/diffusion_pytorch_model.safetensors",
        "controlnet/diffusion_pytorch_model.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
    ),
    "accelerate": ("model.safetensors", "model_1.safetensors", "ema.safetensors"),
}


@pytest.mark.parametrize("names", COMPONENTS.values(), ids=COMPONENTS)
def test_b_models_of_a_checkpoint_by_name(names: Sequence[str], tmp_path: Path) -> None:
    """Two models are never one average, be they of one step or not; the option takes one."""
    raw, other, ema = names
    for step in (1, 3):
        for number, name in enumerate(names):
            path = tmp_path / f"checkpoint-{step}" / name
            folder, file = (path.parent, path.name) if path.suffix else (path, "model.safetensors")
            save_model(folder, step + 10 * number, file)
        save(tmp_path, {f"checkpoint-{step}/optimizer.bin": ADAM})
    every = [f"checkpoint-{step}/{name}" for step in (1, 3) for name in (raw, other)]
    assert mean(tmp_path, *every, *options(fails(tmp_path, *every)))[0] == 2
    assert " of a checkpoint, and " in fails(tmp_path, every[0], every[3])
    assert mean(tmp_path, every[1], every[3])[0] == 12
    averages = [f"checkpoint-{step}/{ema}" for step in (1, 3)]
    value, notes = mean(tmp_path, every[0], every[2], *averages)
    assert value == 2
    saying(notes, "they are averages", averages[0])
    # Neither holds an average inside, and no option could make it so.
    line = fails(tmp_path, every[0], every[2], *averages, "--ema")
    assert line.endswith("has no averaged weights. Average the raw weights without --ema.")


# One checkpoint ---------------------------------------------------------------------------------


def test_b_the_current_folder(tmp_path: Path) -> None:
    """`.` is a folder as any other: one checkpoint, or a run."""
    save_model(tmp_path / "checkpoint-1", 1)
    save_model(tmp_path / "checkpoint-2", 2)
    assert order(tmp_path, ".") == ["checkpoint-1", "checkpoint-2"]
    assert order(tmp_path / "checkpoint-1", ".") == ["."]
    assert order(tmp_path / "checkpoint-1", ".", "../checkpoint-2") == [".", "../checkpoint-2"]


def test_b_one_checkpoint_is_said(tmp_path: Path) -> None:
    """Nothing is averaged, and the user is told; not where it joins an average."""
    save(tmp_path, {"epoch_1.pt": 1, "epoch_2.pt": 2})
    value, notes = mean(tmp_path, "epoch_1.pt")
    assert value == 1
    saying(notes, "only one checkpoint", "nothing is averaged")
    saying(mean(tmp_path, "epoch_1.pt", "epoch_2.pt", "--last", "1")[1], "nothing is averaged")
    averaged(tmp_path, "epoch_1.pt", out="one.pt")
    value, notes = mean(tmp_path, "epoch_2.pt", "--start-from", "one.pt")
    assert (value, notes) == (1.5, ())
    assert "give it with --start-from" in fails(tmp_path, "one.pt", code=2)
    assert mean(tmp_path, "--start-from", "one.pt") == (1, ())


# Weights beside the state_dict ------------------------------------------------------------------


def test_b_weights_beside_the_model_are_said(tmp_path: Path) -> None:
    """A head, or rsl_rl's normaliser, is not passed over; the keys in the note take it in."""
    norm = {"_mean": torch.ones(3), "_var": torch.ones(3), "_std": torch.ones(3)}
    for n in (1, 2):
        head = {"h.weight": torch.full((2, 3), 3.0 * n)}
        extra = {"optimizer": ADAM, "iter": n, "criterion": {"weight": torch.ones(3)}}
        save(tmp_path, {f"{n}.pt": {"model": weights(n), "head": head, **extra}})
        norms = {"obs_norm_state_dict": {**norm, "count": torch.tensor(n)}}
        save(tmp_path, {f"m_{n}.pt": {"model_state_dict": weights(n), **norms, **extra}})
    value, (note,) = mean(tmp_path, "1.pt", "2.pt")
    assert value == 1.5 and note.startswith("2.pt: head: weights beside model; not averaged")
    keys = shlex.split(re.search(r"use (--key .*)\)$", note)[1])
    for more in ((), ("--keep-wrapper",)):
        done = averaged(tmp_path, "1.pt", "2.pt", *keys, *more, "--force").tensors
        assert (done["head"] if more else done)["h.weight" if more else "head.h.weight"][
            0, 0
        ] == 4.5
    saying(mean(tmp_path, "m_1.pt", "m_2.pt")[1], "obs_norm_state_dict: weights beside")
    # DeepSpeed's copies of frozen parameters are none of these.
    for n in (1, 2):
        copies = {"frozen_param_fragments": {"base.weight": torch.ones(3)}}
        save(tmp_path, {f"d_{n}.pt": {"module": weights(n), **copies}})
    assert mean(tmp_path, "d_1.pt", "d_2.pt") == (1.5, ())
    # Single tensors, but not a loss or a seed.
    for n in (1, 2):
        extra = {"prototypes": torch.ones(3, 4), "loss": torch.ones(3), "acc": torch.tensor(0.5)}
        save(tmp_path, {f"t_{n}.pt": {"net": weights(n), **extra}})
        save(tmp_path, {f"u_{n}.pt": {"model": weights(n), **extra}})
    for kind, place in (("t", "net"), ("u", "model")):
        notes = mean(tmp_path, f"{kind}_1.pt", f"{kind}_2.pt")[1]
        saying(notes, f"{kind}_2.pt: prototypes: not part of {place}; not averaged")


OTHERS = {
    "TRL's value head": ("adapter_model.safetensors", "pytorch_model.bin"),
    "LLaVA": ("non_lora_trainables.bin", "adapter_model.safetensors"),
    "Stable Diffusion": ("diffusion_pytorch_model.non_ema.bin", "diffusion_pytorch_model.bin"),
    "a head of its own": ("classifier.pt", "model.safetensors"),
}


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_b_weights_beside_those_of_a_folder_are_said(
    names: tuple[str, str], tmp_path: Path
) -> None:
    """One note for all checkpoints; the file that it names is averaged by itself, as it says."""
    other, own = names
    stem, _, suffix = own.rpartition(".")
    copies = (f"{stem}.fp16.{suffix}", f"{stem}-00001-of-00001.{suffix}")
    for step in (1, 2):
        home = f"checkpoint-{step}"
        for name, value in ((own, step), (other, 10 * step), *((copy, 7) for copy in copies)):
            if name.endswith(("bin", "pt")):
                save(tmp_path, {f"{home}/{name}": value})
            else:
                save_model(tmp_path / home, value, name)
        state = ("optimizer.pt", "rng_state.pth", "training_args.bin", "scheduler.pt")
        save(tmp_path, {f"{home}/{name}": ADAM for name in state})
    value, notes = mean(tmp_path, "checkpoint-1", "checkpoint-2")
    assert value == 1.5 and len(notes) == 1
    assert notes[0].startswith(f"checkpoint-1 and 1 more: {other}: other weights; not read (")
    assert mean(tmp_path, f"checkpoint-1/{other}", f"checkpoint-2/{other}")[0] == 15


def test_b_configurations_that_differ_are_said(tmp_path: Path) -> None:
    """Adapters of two scales and models of two kinds have no mean; versions do not matter."""
    for n in (1, 2):
        for name, file in (("model", "config"), ("adapter_model", "adapter_config")):
            save_model(tmp_path / f"{file}-{n}", n, f"{name}.safetensors")
            content = {"r": 2, "lora_alpha": 8 * n, "transformers_version": str(n)}
            (tmp_path / f"{file}-{n}" / f"{file}.json").write_text(json.dumps(content))
        save_model(tmp_path / f"same-{n}", n)
        volatile = json.dumps({"_name_or_path": str(n)})
        (tmp_path / f"same-{n}" / "config.json").write_text(volatile)
    for file in ("config", "adapter_config"):
        (note,) = mean(tmp_path, f"{file}-1", f"{file}-2")[1]
        assert note.startswith(f"{file}.json differs between checkpoints in lora_alpha; ")
    assert mean(tmp_path, "same-1", "same-2") == (1.5, ())


def test_b_a_file_without_a_model_in_a_folder(tmp_path: Path) -> None:
    """HiFi-GAN's generator has one model and the file beside it two: the option leaves it out."""
    for n in (1, 2):
        both = {"mpd": weights(n), "msd": weights(n), "optim_g": ADAM, "steps": n}
        save(tmp_path / "run", {f"g_0000{n}": {"generator": weights(n)}, f"do_0000{n}": both})
    assert mean(tmp_path, "run", *options(fails(tmp_path, "run")))[0] == 1.5


def test_b_parts_of_a_model_in_one_file(tmp_path: Path) -> None:
    """StyleTTS2 nests them, others put them side by side: what the line says takes all of them."""
    for n in (1, 2):
        parts = {"bert": weights(n), "decoder": weights(10 * n)}
        save(tmp_path, {f"nested_{n}.pt": {"net": parts, "iters": n}, f"flat_{n}.pt": parts})
    line = fails(tmp_path, "nested_1.pt", "nested_2.pt")
    assert line.endswith("tensors are at: net.bert, net.decoder. --key net takes all of them.")
    line = fails(tmp_path, "flat_1.pt", "flat_2.pt")
    assert line.endswith("bert, decoder. To take several as one model, repeat --key.")
    for files, keys in (("nested", ["net"]), ("flat", ["bert", "decoder"])):
        given = [word for key in keys for word in ("--key", key)]
        done = averaged(tmp_path, f"{files}_1.pt", f"{files}_2.pt", *given, "--force").tensors
        assert (done["bert.a.weight"][0, 0], done["decoder.a.weight"][0, 0]) == (1.5, 15)


# What is no model -------------------------------------------------------------------------------

STRANGERS: dict[str, Any] = {
    "optimizer.pt": ADAM,
    "optimizer.bin": {"state": {"a.weight": {"exp_avg": torch.ones(2, 3)}}, "param_groups": []},
    "optimizers.pth": [ADAM, ADAM],
    "both.pt": {"gen": ADAM, "disc": ADAM},
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": {
        "optimizer_state_dict": {
            "base_optimizer_state": [{"exp_avg": torch.ones(6)}],
            "single_partition_of_fp32_groups": [torch.ones(6)],
        },
        "ds_version": "0.14",
    },
    "rng_state_0.pth": {
        "python": (3, (1, 2), None),
        "numpy": ("MT19937", [1], 3),
        "cpu": torch.get_rng_state(),
        "cuda": [torch.get_rng_state()],
    },
    "random_states_0.pkl": {
        "step": 3,
        "random_state": (3,),
        "torch_manual_seed": torch.get_rng_state(),
    },
    "scheduler.pt": {"base_lrs": [0.1], "last_epoch": 3, "_step_count": 4, "_last_lr": [0.1]},
    "plateau.pt": {"best": torch.tensor(0.3), "num_bad_epochs": 1, "patience": 10},
    "noam_scheduler.ckpt": {"losses": [], "n_steps": 10, "n_warmup_steps": 5},
    "scaler.pt": {"scale": torch.tensor(65536.0), "growth_factor": 2.0, "growth_interval": 2000},
    "training_args.bin": {"output_dir": "run", "learning_rate": 0.1},
    "dl_state_dict.bin": {"_iterator_finished": False, "order": torch.arange(5)},
    "shadow.pt": {"decay": 0.999, "shadow_params": [torch.ones(2, 3)]},
    "loss.pt": {"train": [0.3, 0.2]},
    "optimizer_state.pt": {"state/0/exp_avg": torch.ones(2), "state/0/step": torch.ones(())},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_b_mixed_folder(tmp_path: Path) -> None:
    """All that is no model is left out in one note; the models are averaged."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, **STRANGERS})
    torch.save(torch.ones(3), tmp_path / "run" / "embedding.pt")
    with zipfile.ZipFile(tmp_path / "run" / "code.zip", "w", zipfile.ZIP_DEFLATED) as code:
        code.writestr("train.py", "import torch\n" * 50)
    torch.jit.script(nn.Linear(3, 2)).save(tmp_path / "run" / "best.torchscript")
    value, notes = mean(tmp_path, "run")
    assert value == 1.5
    (note,) = notes
    assert note.startswith("left out, because they contain no model: ")
    assert f"and {len(STRANGERS) + 3 - 3} more" in note
    assert mean(tmp_path, "run", "--epochs", "2:")[0] == 2


def test_b_no_model_by_name(tmp_path: Path) -> None:
    """A file that was named is refused; the option in the line leaves it out."""
    save(tmp_path, {"epoch_1.pt": 1, "epoch_2.pt": 2, **STRANGERS})
    for name in STRANGERS:
        line = fails(tmp_path, "epoch_1.pt", "epoch_2.pt", name)
        assert line.startswith(f"error: {name}: is not a model: it contains "), line
        assert options(line) == ["--exclude", NUMBERS.sub("[0-9]*", name)]
    assert mean(tmp_path, "epoch_1.pt", "epoch_2.pt", name, *options(line)) == (1.5, ())
    # Alone it is refused without the option, which would leave nothing.
    assert "--exclude" not in fails(tmp_path, "optimizer.pt")


def test_b_several_that_are_no_model_by_name(tmp_path: Path) -> None:
    """One line leaves out all of them: `run/*` as the shell writes it."""
    save(
        tmp_path,
        {
            "epoch_1.pt": 1,
            "epoch_2.pt": 2,
            **STRANGERS,
            "rng_state_1.pth": STRANGERS["rng_state_0.pth"],
        },
    )
    few = ("epoch_1.pt", "epoch_2.pt", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth")
    assert mean(tmp_path, *few, *options(fails(tmp_path, *few)))[0] == 1.5


def test_b_archives_around_models(tmp_path: Path) -> None:
    """Stable-Baselines3 puts policy.pth into a zip archive: extracted, it is averaged."""
    for step in (1000, 2000):
        save(tmp_path, {"policy.pth": step, "policy.optimizer.pth": ADAM})
        with zipfile.ZipFile(tmp_path / f"rl_model_{step}_steps.zip", "w") as archive:
            archive.writestr("data", "{}")
            for name in ("policy.pth", "policy.optimizer.pth"):
                archive.write(tmp_path / name, name)
    line = fails(tmp_path, "rl_model_1000_steps.zip", "rl_model_2000_steps.zip")
    assert "around policy.pth, policy.optimizer.pth" in line
    assert line.endswith("Extract the file of the model from each archive, and give those.")
    for step in (1000, 2000):
        with zipfile.ZipFile(tmp_path / f"rl_model_{step}_steps.zip") as archive:
            archive.extract("policy.pth", tmp_path / f"{step}_steps")
    assert mean(tmp_path, "1000_steps/policy.pth", "2000_steps/policy.pth") == (1500, ())


def test_b_folder_without_a_model(tmp_path: Path) -> None:
    """A folder that holds nothing else is refused, saying what it holds."""
    save(tmp_path / "run", {"optimizer.pt": ADAM, "scheduler.pt": STRANGERS["scheduler.pt"]})
    line = fails(tmp_path, "run")
    assert "run/optimizer.pt: is not a model: it contains optimizer state" in line


def test_b_models_are_not_left_out(tmp_path: Path) -> None:
    """Weights are a model whatever lies beside them, or what their names are like."""
    for n in (1, 2):
        save(
            tmp_path / "run",
            {
                f"epoch_{n}.pt": {
                    "model": {**weights(n), "rng_proj.weight": torch.ones(2)},
                    "optimizer": ADAM,
                    "rng_state": torch.get_rng_state(),
                    "n_steps": 3,
                    "n_warmup_steps": 5,
                    "last_epoch": 3,
                    "_step_count": 3,
                }
            },
        )
    assert mean(tmp_path, "run") == (1.5, ())
    whole = {f"whole_{n}.pt": nn.Sequential(nn.Linear(3, 2)) for n in (1, 2)}
    save(tmp_path / "modules", whole)
    expected = (whole["whole_1.pt"][0].bias + whole["whole_2.pt"][0].bias) / 2
    done = averaged(tmp_path, "modules", out="modules.pt")
    torch.testing.assert_close(done.tensors["0.bias"], expected.detach())


# --ema on files some of which have none ---------------------------------------------------------


def test_b_yolo_stripped_files_under_ema(tmp_path: Path) -> None:
    """`best.pt` and `last.pt` are stripped of their EMA: left out in a folder, else as said."""
    for n in (1, 2):
        tree = {"epoch": n, "model": weights(n), "ema": weights(10 * n), "updates": n}
        save(tmp_path / "weights", {f"epoch{n}.pt": tree})
    stripped = {"epoch": -1, "model": weights(99), "ema": None, "updates": None}
    save(tmp_path / "weights", {"best.pt": stripped, "last.pt": stripped | {"model": weights(98)}})
    value, notes = mean(tmp_path, "weights", "--ema")
    assert value == 15
    saying(notes, "no averaged weights", "weights/best.pt", "weights/last.pt")
    files = [f"weights/{name}.pt" for name in ("best", "epoch1", "epoch2", "last")]
    line = fails(tmp_path, *files, "--ema")
    assert "--key" not in line
    assert mean(tmp_path, *files, "--ema", *options(line)) == (15, ())
    # An epoch of -1 is no place in the run.
    assert order(tmp_path, *files) == [files[0], files[1], files[2], files[3]]


# Best -------------------------------------------------------------------------------------------


def test_b_best_without_a_metric_in_some(tmp_path: Path) -> None:
    """The option in the line leaves out those that record none."""
    save(tmp_path, {f"epoch_{n}.pt": {"model": weights(n), "loss": 1 / n} for n in (1, 2, 3)})
    save(tmp_path, {"last.pt": 9})
    inputs = (
        "epoch_1.pt",
        "epoch_2.pt",
        "epoch_3.pt",
        "last.pt",
        "--best",
        "2",
        "--metric",
        "loss",
    )
    line = fails(tmp_path, *inputs, code=2)
    assert mean(tmp_path, *inputs, *options(line))[0] == 2.5
