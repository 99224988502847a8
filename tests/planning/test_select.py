"""Which checkpoints take part: on folders as the frameworks leave them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import swa_avg
from swa_avg import Choice
from swa_avg.averaging.execution import Averaging
from swa_avg.averaging.prepare import planned
from swa_avg.checkpoints.metrics import mode_of
from swa_avg.errors import SelectionError
from swa_avg.planning.settings import Options

LOSSES = (0.5, 0.3, 0.4, 0.2, 0.3)


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), float(seed)), "a.bias": torch.tensor([seed, 1.0])}


def plan(
    checkpoints: Path | Sequence[Path], choice: Choice, **options: Any
) -> tuple[list[str], Averaging]:
    """Return the names of what is chosen, in order, and the plan."""
    first = checkpoints if isinstance(checkpoints, Path) else checkpoints[0]
    with planned(checkpoints, first.parent / "out.pt", Options(choice=choice, **options)) as made:
        return [Path(source.path).name for source in made.inputs], made


def chosen(checkpoints: Path | Sequence[Path], **choice: Any) -> list[str]:
    return plan(checkpoints, Choice(**choice))[0]


def refused(checkpoints: Path | Sequence[Path], **choice: Any) -> str:
    with pytest.raises(SelectionError) as error:
        plan(checkpoints, Choice(**choice))
    return str(error.value)


# Folders ----------------------------------------------------------------------------------------


def bare(folder: Path, epochs: Sequence[int] = range(12), name: str = "epoch_{}.pt") -> Path:
    """Nothing but weights: only the name tells the epoch."""
    folder.mkdir(exist_ok=True)
    for epoch in epochs:
        torch.save(weights(epoch), folder / name.format(epoch))
    return folder


def test_folder_is_listed_as_often_for_many_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of them: 1,100 checkpoints would have it read 1.2 million names."""
    listed: list[str] = []
    listdir = os.listdir

    def counted(path: Any = ".") -> list[str]:
        listed.append(os.fspath(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    counts = []
    for number in (4, 12):
        folder = bare(tmp_path / str(number), range(number))
        swa_avg.average(folder, tmp_path / f"{number}.pt")
        counts.append(listed.count(str(folder)))
    assert counts[0] == counts[1] > 0


def lightning(folder: Path, losses: Sequence[float] = LOSSES) -> Path:
    """As ModelCheckpoint(monitor="val/loss", save_top_k=-1, save_last=True) leaves it."""
    folder.mkdir()
    best = {}
    for epoch, loss in enumerate(losses):
        path = folder / f"epoch={epoch}-step={10 * epoch + 10}.ckpt"
        best[f"/cluster/run/{path.name}"] = torch.tensor(loss)
        callback = {
            "monitor": "val/loss",
            "current_score": torch.tensor(loss),
            "best_k_models": dict(best),
        }
        key = "ModelCheckpoint{'monitor': 'val/loss', 'mode': 'min'}"
        tree = {
            "epoch": epoch,
            "global_step": 10 * epoch + 10,
            "state_dict": weights(epoch),
            "callbacks": {"EarlyStopping": {"wait_count": 0}, key: callback},
        }
        torch.save(tree, path)
    torch.save(tree | {"loops": {"more": 1}}, folder / "last.ckpt")
    return folder


def timm(folder: Path) -> Path:
    """timm's: `last` and `model_best` are hard links."""
    folder.mkdir()
    for epoch, top1 in enumerate((60.0, 71.0, 70.0, 69.0)):
        tree = {
            "epoch": epoch,
            "arch": "resnet18",
            "state_dict": weights(epoch),
            "args": argparse.Namespace(eval_metric="top1", lr=0.1),
            "metric": top1,
        }
        torch.save(tree, folder / f"checkpoint-{epoch}.pth.tar")
    os.link(folder / "checkpoint-3.pth.tar", folder / "last.pth.tar")
    os.link(folder / "checkpoint-1.pth.tar", folder / "model_best.pth.tar")
    return folder


def trainer(folder: Path, evaluated: Sequence[int] = (2, 4, 6, 8)) -> Path:
    """Trainer's: a folder for each save, with all that was logged up to it."""
    accuracy = {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.8}
    history: list[dict[str, float]] = []
    for step in (2, 4, 6, 8):
        home = folder / f"checkpoint-{step}"
        home.mkdir(parents=True)
        save_file(weights(step), home / "model.safetensors")
        history.append({"loss": 1 / step, "epoch": step / 4, "step": step})
        if step in evaluated:
            score = accuracy[step]
            history.append({"eval_loss": 1 - score, "eval_accuracy": score, "step": step})
        state = {"epoch": step / 4, "global_step": step, "best_metric": 0.9}
        text = json.dumps(state | {"log_history": history})
        (home / "trainer_state.json").write_text(text)
    return folder


WENET = """\
# written by wenet
accum_grad: 1
cmvn_conf: &cmvn
  cmvn_file: data/global_cmvn
description: |
  loss: 99
dataset_conf:
- loss: 98
  acc: 97
epoch: {epoch}
loss_dict:
  acc: {acc}  # on the dev set
  'cer': 1.5e-1
  loss: {loss}
lrs:
- 0.001
"""


def wenet(folder: Path) -> Path:
    """wenet's: bare weights with a YAML file beside each."""
    bare(folder, range(5))
    for epoch, loss in enumerate(LOSSES):
        text = WENET.format(epoch=epoch, loss=loss, acc=1 - loss)
        (folder / f"epoch_{epoch}.yaml").write_text(text)
    return folder


# Last and epochs --------------------------------------------------------------------------------


def test_last_is_the_latest_in_their_order(tmp_path: Path) -> None:
    """--last takes from the end of the order of epochs, in which 10 comes after 9."""
    folder = bare(tmp_path / "run")
    assert chosen(folder, last=3) == ["epoch_9.pt", "epoch_10.pt", "epoch_11.pt"]


def test_fewer_than_wanted_is_said(tmp_path: Path) -> None:
    """Where there are not so many, all are taken, and the user is told."""
    names, made = plan(bare(tmp_path / "run", range(3)), Choice(last=5))
    assert len(names) == 3
    assert made.notes[0] == "choice=Choice(last=5) takes all 3 checkpoints: there are no more"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:5", [3, 4, 5]),
        ("10:", [10, 11]),
        (":1", [0, 1]),
        ("2:9:3", [2, 5, 8]),
        ("2:8:3", [2, 5, 8]),
        ("1::5", [1, 6, 11]),
        ("4:4", [4]),
    ],
)
def test_both_ends_are_in(text: str, expected: list[int], tmp_path: Path) -> None:
    """--epochs A:B takes A and B too; an end that is left out is open."""
    assert chosen(bare(tmp_path / "run"), epochs=text) == [f"epoch_{n}.pt" for n in expected]


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bare(tmp_path_factory.mktemp("twenty"), range(0, 40, 2))


@settings(max_examples=20)
@given(
    st.integers(0, 45), st.none() | st.integers(0, 45), st.integers(1, 9), st.none() | st.just(3)
)
def test_epochs_filter_a_range(
    twenty: Path, first: int, length: int | None, step: int, last: int | None
) -> None:
    """--epochs A:B:S is the range of Python with B in; --last then counts what is left."""
    end = "" if length is None else first + length
    wanted = range(first, 1000 if length is None else first + length + 1, step)
    expected = [f"epoch_{n}.pt" for n in range(0, 40, 2) if n in wanted][-(last or 100) :]
    choice = {"epochs": f"{first}:{end}:{step}", "last": last}
    if expected:
        assert chosen(twenty, **choice) == expected
    else:
        assert "matches no checkpoint" in refused(twenty, **choice)


def test_epochs_are_those_recorded(tmp_path: Path) -> None:
    """What the checkpoint records counts more than the number in its name; epochs than steps."""
    for number in range(4):
        tree = {"state_dict": weights(number), "epoch": number, "global_step": 100 * number}
        torch.save(tree, tmp_path / f"{9 - number}.ckpt")
    assert chosen(tmp_path, epochs="1:2") == ["8.ckpt", "7.ckpt"]
    assert "by epoch: 0, 1, 2, 3" in refused(tmp_path, epochs="100:200")


def test_steps_where_no_epoch_is_recorded(tmp_path: Path) -> None:
    """Trainer's epochs may be fractions; then its steps count."""
    folder = trainer(tmp_path / "run")
    assert chosen(folder, epochs="4:6") == ["checkpoint-4", "checkpoint-6"]
    assert "by step: 2, 4, 6, 8" in refused(folder, epochs="3:3")


def test_epoch_in_a_name_with_more_numbers(tmp_path: Path) -> None:
    """Of several numbers in a name that of the epoch counts, else the last."""
    bare(tmp_path, range(3), "run7-epoch={}-step=10.pt")
    assert chosen(tmp_path, epochs="1:2") == [
        "run7-epoch=1-step=10.pt",
        "run7-epoch=2-step=10.pt",
    ]
    bare(tmp_path / "steps", (500, 1000), "v2_step_{}.pt")
    assert chosen(tmp_path / "steps", epochs="600:") == ["v2_step_1000.pt"]


def test_name_without_number_is_left_out_and_said(tmp_path: Path) -> None:
    """A checkpoint that has no epoch at all is in no span of epochs."""
    bare(tmp_path, range(3))
    torch.save(weights(9), tmp_path / "final.pt")
    names, made = plan(tmp_path, Choice(epochs="1:"))
    assert names == ["epoch_1.pt", "epoch_2.pt"]
    assert made.notes[0].endswith(
        "final.pt: has no number in its name; left out by choice=Choice(epochs=...)"
    )


# Exclude ----------------------------------------------------------------------------------------


def test_exclude_comes_before_opening(tmp_path: Path) -> None:
    """Excluded by name or by path as given, a file is not even opened."""
    bare(tmp_path, range(4))
    (tmp_path / "epoch_2.pt").write_bytes(b"damaged")
    files = sorted(tmp_path.iterdir())
    kept = ["epoch_0.pt", "epoch_1.pt", "epoch_3.pt"]
    assert chosen(files, exclude=("*_2.pt",)) == kept
    assert chosen(files, exclude=(f"{tmp_path}/*2*",)) == kept
    assert chosen(tmp_path, exclude=("*_2.pt", "*_1.pt")) == ["epoch_0.pt", "epoch_3.pt"]


def test_excluding_all_says_what_there_was(tmp_path: Path) -> None:
    """A selection that leaves nothing is an error, and names what it left out."""
    bare(tmp_path, range(2))
    message = refused(tmp_path, exclude=("*",))
    assert "left out by choice=Choice(exclude=...)" in message and "epoch_1.pt" in refused(
        sorted(tmp_path.iterdir()), exclude=("*.pt",)
    )


# Never counted twice ----------------------------------------------------------------------------


def test_hard_links_of_timm_count_once(tmp_path: Path) -> None:
    """`last` and `model_best` are the same files as others: once each, and said."""
    names, made = plan(timm(tmp_path / "run"), Choice())
    assert names == [f"checkpoint-{n}.pth.tar" for n in range(4)]
    assert sum("is the same file as" in note for note in made.notes) == 2


def test_equal_weights_count_once(tmp_path: Path) -> None:
    """Lightning's last.ckpt is another file with the weights of the last epoch."""
    names, made = plan(lightning(tmp_path / "run"), Choice())
    assert names == [f"epoch={n}-step={10 * n + 10}.ckpt" for n in range(5)]
    (note,) = [note for note in made.notes if "counted once" in note]
    assert "last.ckpt: has the same weights as" in note and "epoch=4-step=50.ckpt" in note


def test_numbered_name_counts_of_equal_ones(tmp_path: Path) -> None:
    """Of best.pt and epoch_1.pt the one counts whose name tells its place, at that place."""
    bare(tmp_path, range(3))
    shutil.copy(tmp_path / "epoch_1.pt", tmp_path / "best.pt")
    assert chosen(tmp_path, last=2) == ["epoch_1.pt", "epoch_2.pt"]


def test_other_names_or_shapes_are_no_repeats(tmp_path: Path) -> None:
    """The same bytes under another name or shape are other weights."""
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "0.pt")
    for number, other in enumerate(({"w": torch.ones(3, 2)}, {"v": torch.ones(2, 3)}), 1):
        torch.save(other, tmp_path / f"{number}.pt")
        with pytest.raises(swa_avg.SwaAvgError, match=r"shape|lacks"):
            chosen([tmp_path / "0.pt", tmp_path / f"{number}.pt"])


def test_repeats_do_not_use_up_last(tmp_path: Path) -> None:
    """--last counts what is left after repeats are taken out."""
    folder = lightning(tmp_path / "run")
    assert chosen(folder, last=2) == ["epoch=3-step=40.ckpt", "epoch=4-step=50.ckpt"]


# Best -------------------------------------------------------------------------------------------


def test_best_of_lightning(tmp_path: Path) -> None:
    """Each file's own score; of equal ones the later; in the order of epochs."""
    folder = lightning(tmp_path / "run")
    names, made = plan(folder, Choice(best=2, metric="val/loss"))
    assert names == ["epoch=3-step=40.ckpt", "epoch=4-step=50.ckpt"]
    score = made.inputs[0].score
    assert score and (score.name, score.where) == ("val/loss", "ModelCheckpoint")
    assert score.value == pytest.approx(0.2)
    assert chosen(folder, best=1, metric="val/loss", mode="max") == ["epoch=0-step=10.ckpt"]


def test_score_of_another_file_is_not_taken(tmp_path: Path) -> None:
    """A last.ckpt that was no best one holds the score of an earlier file: not its own."""
    folder = lightning(tmp_path / "run")
    tree = torch.load(folder / "last.ckpt")
    torch.save(tree | {"state_dict": weights(77), "epoch": 7}, folder / "last.ckpt")
    message = refused(folder, best=2, metric="val/loss")
    assert "last.ckpt: records no val/loss" in message
    found = chosen(folder, best=2, metric="val/loss", exclude=("last*",))
    assert found == ["epoch=3-step=40.ckpt", "epoch=4-step=50.ckpt"]


def test_current_score_alone(tmp_path: Path) -> None:
    """Without a list of files, what ModelCheckpoint calls current counts."""
    for epoch, loss in enumerate(LOSSES):
        callback = {"monitor": "val.loss", "current_score": torch.tensor(loss)}
        tree = {"epoch": epoch, "state_dict": weights(epoch), "callbacks": {"M": callback}}
        torch.save(tree, tmp_path / f"{epoch}.ckpt")
    assert chosen(tmp_path, best=1, metric="val.loss") == ["3.ckpt"]


def test_best_of_timm(tmp_path: Path) -> None:
    """timm's `metric` is the one that its arguments name."""
    folder = timm(tmp_path / "run")
    assert chosen(folder, best=2, metric="top1") == [
        "checkpoint-1.pth.tar",
        "checkpoint-2.pth.tar",
    ]
    assert "records no top5" in refused(folder, best=2, metric="top5")


def test_best_of_trainer(tmp_path: Path) -> None:
    """The log's entry of the checkpoint's own step, not the best so far."""
    folder = trainer(tmp_path / "run")
    for metric in ("eval_accuracy", "accuracy"):
        assert chosen(folder, best=2, metric=metric) == ["checkpoint-4", "checkpoint-8"]
    assert chosen(folder, best=1, metric="eval_loss") == ["checkpoint-4"]


def test_missing_metric_says_where_was_looked(tmp_path: Path) -> None:
    """A step that was not evaluated has no metric; nothing is put in its place."""
    folder = trainer(tmp_path / "run", evaluated=(2, 4, 8))
    message = refused(folder, best=2, metric="accuracy")
    assert "checkpoint-6: records no accuracy" in message and "trainer_state.json" in message


def test_best_of_wenet(tmp_path: Path) -> None:
    """The numbers of a YAML file beside each, by its nesting, and nothing else of it."""
    folder = wenet(tmp_path / "run")
    assert chosen(folder, best=1, metric="loss") == ["epoch_3.pt"]
    assert chosen(folder, best=2, metric="acc") == ["epoch_3.pt", "epoch_4.pt"]
    # All equal: the later ones.
    assert chosen(folder, best=2, metric="loss_dict.cer") == ["epoch_3.pt", "epoch_4.pt"]
    assert "epoch_0.yaml" in refused(folder, best=1, metric="wer")


def test_best_of_json_beside(tmp_path: Path) -> None:
    """A JSON file of the checkpoint's name, with its suffix or without."""
    bare(tmp_path, range(3))
    for epoch, (name, bleu) in enumerate((("{}.json", 20), ("{}.json", 30), ("{}.json", 25))):
        beside = tmp_path / name.format(f"epoch_{epoch}")
        beside.write_text(json.dumps({"metrics": {"bleu": bleu}}))
    assert chosen(tmp_path, best=2, metric="bleu") == ["epoch_1.pt", "epoch_2.pt"]


def test_best_by_name(tmp_path: Path) -> None:
    """A metric in the file name, by its whole name and not by a part of it."""
    for epoch, loss in enumerate(LOSSES):
        name = f"epoch={epoch}-val_loss={loss:.2f}-v1.ckpt"
        torch.save(weights(epoch), tmp_path / name)
    assert chosen(tmp_path, best=1, metric="val_loss") == ["epoch=3-val_loss=0.20-v1.ckpt"]
    assert "records no loss" in refused(tmp_path, best=1, metric="loss")


@pytest.mark.parametrize(
    "place", ["{}", "metrics.{}", "extra_state.{}", "test.{}"], ids=lambda place: place[:-2]
)
def test_best_by_a_key_of_the_checkpoint(place: str, tmp_path: Path) -> None:
    """At the top, where frameworks keep it, or at any dotted path; tensors and numpy too."""
    numpy = pytest.importorskip("numpy")
    kinds = (float, torch.tensor, numpy.float64, lambda v: torch.tensor([v]), numpy.float32)
    outer = place.removesuffix("{}").removesuffix(".")
    for epoch, (loss, kind) in enumerate(zip(LOSSES, kinds, strict=True)):
        metric = {"val_loss": kind(loss)}
        tree = {outer: metric} if outer else metric
        torch.save({"model": weights(epoch), **tree}, tmp_path / f"{epoch}.pt")
    name = "test.val_loss" if outer == "test" else "val_loss"
    assert chosen(tmp_path, best=1, metric=name) == ["3.pt"]


def test_different_places_are_not_compared(tmp_path: Path) -> None:
    """What one records as a metric and another in its log is not taken for the same."""
    torch.save({"model": weights(0), "loss": 0.1}, tmp_path / "0.pt")
    torch.save({"model": weights(1), "metrics": {"loss": 0.2}}, tmp_path / "1.pt")
    assert "records loss in another place" in refused(tmp_path, best=1, metric="loss")


def test_nan_is_never_best(tmp_path: Path) -> None:
    """A diverged epoch is passed over, and said; where all are, there is no best one."""
    folder = lightning(tmp_path / "run", (0.5, float("nan"), 0.4))
    names, made = plan(folder, Choice(best=3, metric="val/loss", exclude=("last*",)))
    assert [name[:7] for name in names] == ["epoch=0", "epoch=2"]
    assert any("val/loss is nan" in note for note in made.notes)
    nothing = lightning(tmp_path / "nan", (float("nan"),))
    assert "no checkpoint has a finite val/loss" in refused(nothing, best=1, metric="val/loss")


def test_order_of_the_choices(tmp_path: Path) -> None:
    """Epochs, then the best of them, then the last of those."""
    folder = wenet(tmp_path / "run")
    found = chosen(folder, epochs="0:3", best=3, metric="loss", last=2)
    assert found == ["epoch_2.pt", "epoch_3.pt"]


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("loss", "min"),
        ("val_loss", "min"),
        ("eval/accuracy", "max"),
        ("top1", "max"),
        ("acc@1", "max"),
        ("Acc5", "max"),
        ("mAP50", "max"),
        ("macro-F1", "max"),
        ("dev.WER", "min"),
        ("ppl", "min"),
        ("acc_loss", None),
        ("neg_log_loss", None),
        ("neg_mean_squared_error", None),
        ("acc_std", None),
        ("f1_gap", None),
        ("glossary", None),
        ("score", None),
    ],
)
def test_known_names_set_the_mode(metric: str, mode: str | None) -> None:
    """A whole word of the name tells; two that disagree, or none, tell nothing."""
    assert mode_of(metric) == mode


# As a user does it ------------------------------------------------------------------------------

WRONG = {
    "no metric": ("--best", "3"),
    "no best": ("--metric", "loss"),
    "unknown metric": ("--best", "3", "--metric", "score"),
    "unknown mode": ("--best", "3", "--metric", "loss", "--mode", "low"),
    "mode alone": ("--mode", "min"),
    "none wanted": ("--last", "0"),
    "backwards": ("--epochs", "5:3"),
    "one number": ("--epochs", "5"),
    "no step": ("--epochs", "1:5:0"),
    "words": ("--epochs", "first:last"),
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG)
def test_wrong_choices_are_usage_errors(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """Before anything is opened: exit 2, and nothing written."""
    ended = run(tmp_path, "nothing.pt", *arguments)
    assert ended.returncode == 2 and ended.stderr.startswith("Usage:"), ended.stderr
    assert not list(tmp_path.iterdir())


def test_choices_need_checkpoints(tmp_path: Path) -> None:
    """Where nothing is averaged there is nothing to choose from."""
    ended = run(tmp_path, "--recompute-bn", "--data", "m:d", "--last", "3")
    assert ended.returncode == 2 and "--last needs checkpoints" in ended.stderr


def test_the_command_chooses(tmp_path: Path) -> None:
    """The plan shows the metric; the average is that of the chosen ones."""
    wenet(tmp_path / "run")
    arguments = ("run", "--best", "2", "--metric", "loss", "--exclude", "*_4.pt")
    shown = run(tmp_path, *arguments, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "run/epoch_1.pt  loss 0.3\n" in shown.stdout
    assert "run/epoch_3.pt  loss 0.2\n" in shown.stdout
    ended = run(tmp_path, *arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    scores = [source["score"]["value"] for source in json.loads(ended.stdout)["inputs"]]
    assert scores == [0.3, 0.2]
    assert torch.load(tmp_path / "swa.pt")["a.weight"][0, 0] == 2
    nothing = run(tmp_path, "run", "--epochs", "50:", "-o", "other.pt")
    assert nothing.returncode == 2 and "0, 1, 2, 3, 4" in nothing.stderr
    assert not (tmp_path / "other.pt").exists()


def test_counts_of_numpy_are_counts(tmp_path: Path) -> None:
    """An integer that numpy made is an integer, in the report too; True and 2.0 are none."""
    choice = Choice(last=np.int64(2))  # type: ignore[arg-type]
    assert type(choice.last) is int and choice.last == 2
    assert json.loads(json.dumps(asdict(choice)))["last"] == 2
    for wrong in (True, 2.0, np.float64(2), np.True_):
        with pytest.raises(TypeError, match="last must be an integer"):
            Choice(last=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "choice",
    [
        {"best": 2},
        {"metric": "loss"},
        {"mode": "min"},
        {"last": 0},
        {"epochs": "x"},
        {"best": 1, "metric": "loss", "mode": "middle"},
    ],
)
def test_choice_that_says_nothing_is_refused(choice: dict[str, Any]) -> None:
    """What goes only together goes together, and counts are of at least one."""
    with pytest.raises((ValueError, SelectionError)):
        Choice(**choice)


def test_no_checkpoints_at_all(tmp_path: Path) -> None:
    """Nothing was given: said, and nothing is written."""
    with pytest.raises(SelectionError, match="no checkpoints were given"):
        swa_avg.average([], tmp_path / "out.pt")
    assert not list(tmp_path.iterdir())


# What is not there -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("rnu/epoch_1.pt", "No such file or directory. Did you mean {run}/epoch_1.pt?"),
        ("run/epoch_1.pth", "No such file or directory. Did you mean {run}/epoch_1.pt?"),
        ("other/run/x.pt", "No such file or directory. There is no folder {here}/other."),
        ("run/*.ckpt", "matches no file. {run} contains epoch_1.pt, epoch_2.pt."),
        ("rnu/*.pt", "matches no file. Did you mean {run}?"),
        ("~/no/x.pt", "~ is not expanded here: write {home}/no/x.pt."),
        ("empty/*.pt", "matches no file. {here}/empty is empty."),
    ],
)
def test_path_that_does_not_exist(tmp_path: Path, given: str, says: str) -> None:
    """The line names what was probably meant, or what is there instead."""
    run_folder = bare(tmp_path / "run", (1, 2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(swa_avg.SwaAvgError) as refused:
        plan(Path(given) if given[0] == "~" else tmp_path / given, Choice())
    home = Path.home()
    assert str(refused.value).endswith(says.format(run=run_folder, here=tmp_path, home=home))


def test_many_copies_are_one_note(tmp_path: Path) -> None:
    """A run that did not learn saves the same weights again and again."""
    for number in range(9):
        torch.save(weights(1), tmp_path / f"epoch_{number}.pt")
    names, made = plan(tmp_path, Choice())
    assert len(names) == 1
    (note, _) = made.notes
    assert note.startswith("8 copies are not counted again: ") and note.endswith(" and 5 more")


def test_empty_path_is_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a shell gives for a variable that is not set."""
    bare(tmp_path, (1, 2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SelectionError, match="a path is empty"):
        swa_avg.average("", "out.pt")


def test_one_checkpoint_beside_a_folder_of_checkpoints(tmp_path: Path) -> None:
    """It is taken, as the user said; the note names the folder that was probably meant."""
    bare(tmp_path / "run", (), "best.pt")
    torch.save(weights(1), tmp_path / "run" / "best.pt")
    inner = bare(tmp_path / "run" / "kept", (1, 2))
    names, made = plan(tmp_path / "run", Choice())
    assert names == ["best.pt"]
    assert made.notes[0].endswith(f"Its folder kept contains checkpoints: give {inner}")
