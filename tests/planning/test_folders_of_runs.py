"""Which files in a folder are checkpoints of its run, by names that the tests of CASES.md lack.

Backups beside originals, the weights that a run began with, counts that look like parts, machines
in names. Each test runs the command.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from command import averaged, fails
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def weights(value: float, rows: int = 2) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((rows, 3), float(value)), "a.bias": torch.tensor([float(value)])}


def save(folder: Path, files: Mapping[str, Any]) -> None:
    """Save weights of a value, or what is given, under each name."""
    for name, what in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(weights(what) if isinstance(what, int | float) else what, path)


def mean(folder: Path, *arguments: str) -> tuple[float, tuple[str, ...]]:
    """Average, and return the mean of the weights and the notes."""
    done = averaged(folder, *arguments, "--force")
    return done.tensors["a.weight"][0, 0].item(), done.notes


BACKUPS = (
    "epoch_2.pt.bak", "epoch_2.pt.bak2", "epoch_2.pt~", "epoch_2.pt.old", "epoch_2.pt.orig",
    "epoch_2 (1).pt", "epoch_2(2).pt", "epoch_2 copy.pt", "epoch_2 - Copy.pt", "epoch_2_backup.pt",
    "epoch_2.old.pt", "epoch_2 copy 3.pt", "Copy of epoch_2.pt", "epoch_2 - Kopie.pt",
)  # fmt: skip


@pytest.mark.parametrize("name", BACKUPS)
def test_backup_beside_its_original_is_left_out(name: str, tmp_path: Path) -> None:
    """An older state of epoch 2 under the name of a backup is no checkpoint of its own."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, name: 30})
    value, notes = mean(tmp_path, "run")
    assert value == 1.5
    assert notes == (f"left out, because their names mark copies of other checkpoints: run/{name}",)


def test_backup_of_a_folder_is_left_out(tmp_path: Path) -> None:
    """A checkpoint that is a folder has no suffix."""
    for name, value in (("checkpoint-1", 1.0), ("checkpoint-2", 2.0), ("checkpoint-2_old", 30.0)):
        (tmp_path / "run" / name).mkdir(parents=True)
        save_file(weights(value), tmp_path / "run" / name / "model.safetensors")
    value, (note,) = mean(tmp_path, "run")
    assert value == 1.5 and "copies of other checkpoints: run/checkpoint-2_old" in note


def test_backup_without_its_original_is_a_checkpoint(tmp_path: Path) -> None:
    """A folder of backups alone, and names that only contain such a word."""
    save(tmp_path / "run", {"epoch_1.pt.bak": 1, "epoch_2.pt.bak": 2})
    assert mean(tmp_path, "run")[0] == 1.5
    save(tmp_path / "old", {"old_epoch_1.pt": 1, "old_epoch_2.pt": 2})
    assert mean(tmp_path, "old") == (1.5, ())


def test_backup_that_the_user_names_is_averaged(tmp_path: Path) -> None:
    """What is named is taken, and a note says that there are two series."""
    save(tmp_path, {"epoch_1.pt": 1, "epoch_2.pt": 2, "epoch_2.pt.bak": 3})
    value, (note,) = mean(tmp_path, "epoch_1.pt", "epoch_2.pt", "epoch_2.pt.bak")
    assert value == 2 and "several series" in note and "--exclude" in note


@pytest.mark.parametrize("name", [
    "init.pt", "rwkv-init.pth", "model_initial.pt", "lr_find_temp_model_0f3a.ckpt",
    "lr_finder.pt", "scale_batch_size_temp_model.ckpt",
])  # fmt: skip
def test_weights_from_before_the_training_are_left_out(name: str, tmp_path: Path) -> None:
    """The weights that a run began with, or that a search of its learning rate left."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, name: 30})
    value, (note,) = mean(tmp_path, "run")
    assert value == 1.5
    assert (
        note == f"left out, because their names mark weights from before the training: run/{name}"
    )


def test_runs_with_such_a_word_in_their_name_are_averaged(tmp_path: Path) -> None:
    """`init` in the name of the run, and a folder without other checkpoints."""
    save(tmp_path / "run", {"good_init_epoch_1.pt": 1, "good_init_epoch_2.pt": 2})
    assert mean(tmp_path, "run") == (1.5, ())
    save(tmp_path / "two", {"init.pt": 1, "trained.pt": 2})
    assert mean(tmp_path, "two")[0] == 1.5


def test_unfinished_file_with_a_suffix(tmp_path: Path) -> None:
    """`epoch_3.tmp.pt` is renamed when it is complete."""
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, "epoch_3.tmp.pt": 30})
    value, (note,) = mean(tmp_path, "run")
    assert value == 1.5 and "unfinished" in note


@pytest.mark.parametrize(
    "name", ["ckpt_{}_of_10.pt", "snapshot-{}-of-10.pt", "checkpoint{}of10.pt"]
)
def test_counts_of_a_run_are_no_parts(name: str, tmp_path: Path) -> None:
    """Files with all tensors, numbered N of M, are checkpoints; a note says how they are read."""
    names = [name.format(number) for number in (9, 8, 10)]
    save(tmp_path, dict(zip(names, (2, 1, 6), strict=True)))
    value, (note,) = mean(tmp_path, *names)
    assert value == 3
    assert "read as checkpoints of one run, not as parts" in note
    assert mean(tmp_path, *names, "--last", "1")[0] == 6


def test_parts_of_other_tensors_or_shapes_are_refused(tmp_path: Path) -> None:
    """N of M with tensors of their own are parts, and so are those of five digits."""
    save(tmp_path, {"a_1_of_2.pt": weights(1, 2), "a_2_of_2.pt": weights(1, 3)})
    assert "of a model, but" in fails(tmp_path, "a_1_of_2.pt", "a_2_of_2.pt")
    for number, tensor in enumerate(weights(1), 1):
        save_file({tensor: weights(1)[tensor]}, tmp_path / f"b-{number}-of-2.safetensors")
    assert "of a model, but" in fails(tmp_path, "b-1-of-2.safetensors", "b-2-of-2.safetensors")
    # With tensor parallelism, parts have the same names and shapes.
    for name in ("fold", "shard", "tp", "model_rank", "mp", "consolidated", "model", ""):
        save(tmp_path, {f"{name}_1_of_5.pt": 1, f"{name}_2_of_5.pt": 2})
        line = fails(tmp_path, f"{name}_1_of_5.pt", f"{name}_2_of_5.pt")
        assert "of a model, but" in line and line.endswith("rename them: epoch_1.pt, ….")
    for number in (1, 2):
        (tmp_path / f"model_{number}_of_5.pt").rename(tmp_path / f"epoch_{number}.pt")
    assert mean(tmp_path, "epoch_1.pt", "epoch_2.pt") == (1.5, ())
    save(tmp_path, {"c-00001-of-00002.pt": 1, "c-00002-of-00002.pt": 2})
    assert "of a model, but" in fails(tmp_path, "c-00001-of-00002.pt", "c-00002-of-00002.pt")


def test_machines_that_saved_the_same_epoch_are_refused(tmp_path: Path) -> None:
    """Only a run that went on elsewhere has each epoch from one machine."""
    save(tmp_path, {"gpu0_ep1.pt": 1, "gpu1_ep1.pt": 2, "gpu1_ep2.pt": 3})
    assert "gpu 0 of a model" in fails(tmp_path, "gpu0_ep1.pt", "gpu1_ep1.pt", "gpu1_ep2.pt")
    assert mean(tmp_path, "gpu0_ep1.pt", "gpu1_ep2.pt")[0] == 2
    save(tmp_path, {"rank0_ep1.pt": 1, "rank1_ep2.pt": 2})
    assert "rank 0 of a model" in fails(tmp_path, "rank0_ep1.pt", "rank1_ep2.pt")


def test_steps_that_begin_anew_each_epoch_are_no_repeats(tmp_path: Path) -> None:
    """FunASR records the step within the epoch: the same in all, and nothing to say."""
    for epoch in (1, 2):
        saved = {"state_dict": weights(epoch), "epoch": epoch, "step": 7}
        save(tmp_path, {f"model.pt.ep{epoch}": saved})
    assert mean(tmp_path, "model.pt.ep1", "model.pt.ep2") == (1.5, ())


def test_archives_of_stable_baselines_in_a_folder(tmp_path: Path) -> None:
    """A folder with nothing but archives around models is refused, as one of them is by name."""
    folder = tmp_path / "run"
    save(folder, {"policy.pth": 1})
    for steps in (1000, 2000):
        with zipfile.ZipFile(folder / f"rl_model_{steps}_steps.zip", "w") as archive:
            archive.write(folder / "policy.pth", "policy.pth")
            archive.writestr("data", "{}")
    (folder / "policy.pth").unlink()
    for given in ("run", "run/rl_model_1000_steps.zip"):
        line = fails(tmp_path, given)
        assert "around policy.pth" in line
        assert "Extract the file of the model from each archive" in line


def states_of(average: AveragedModel, model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Train a model for a few epochs; return the state of its average after each."""
    states = []
    for _ in range(count):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update_parameters(model)
        states.append(copy.deepcopy(average.state_dict()))
    return states


def test_several_states_of_an_averaged_model_are_said(tmp_path: Path) -> None:
    """Each is the mean of the run so far: the last one is the average, as the line says."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    states = states_of(AveragedModel(model), model, 3)
    for wrapped in (False, True):
        saved = [{"swa_model": state, "epoch": n} if wrapped else state
                 for n, state in enumerate(states)]  # fmt: skip
        save(tmp_path, {f"epoch_{number}.pt": state for number, state in enumerate(saved)})
        names = [f"epoch_{number}.pt" for number in range(3)]
        ema = ["--ema"] * wrapped
        done = averaged(tmp_path, *names, *ema, "--force")
        assert [note for note in done.notes if "includes the earlier ones" in note]
        done = averaged(tmp_path, *names, *ema, "--force", "--last", "1")
        assert done.tensors["weight"].tolist() == [[2.0, 2.0]]  # of 1, 2 and 3
        assert not [note for note in done.notes if "includes the earlier ones" in note]


def test_moving_averages_of_torch_are_averaged_without_a_word(tmp_path: Path) -> None:
    """A name that says EMA says that each is a moving average."""
    model = nn.Linear(2, 1, bias=False)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    states = states_of(average, model, 2)
    save(tmp_path, {f"{n}.pt": {"ema_model": state} for n, state in enumerate(states)})
    save(tmp_path, {f"ema_{n}.pt": state for n, state in enumerate(states)})
    assert averaged(tmp_path, "0.pt", "1.pt", "--ema", "--force").notes == ()
    assert averaged(tmp_path, "ema_0.pt", "ema_1.pt", "--force").notes == ()


def test_tensors_of_one_optimizer_in_a_folder(tmp_path: Path) -> None:
    """The master weights of an optimizer beside its moments are no model: left out, and said."""
    moments = {name: torch.ones(6) for name in ("fp32", "exp_avg", "exp_avg_sq")}
    save(tmp_path / "run", {"epoch_1.pt": 1, "epoch_2.pt": 2, "optim_0.pt": moments})
    value, (note,) = mean(tmp_path, "run")
    assert value == 1.5
    assert note == "left out, because they contain no model: run/optim_0.pt (optimizer state)"
    line = fails(tmp_path, "run/epoch_1.pt", "run/optim_0.pt")
    assert "run/optim_0.pt" in line and "optimizer state" in line and "--exclude" in line
