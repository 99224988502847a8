"""Every remedy works: each test follows what a line tells, and averages with it.

A case is a command that is refused, or that says a note, and what its line tells to type.
Remedies that other tests follow are not repeated here; those on the user's code are in
`batchnorm/test_remedies_users_code.py`, and those on options in `cli/test_remedies_usage.py`.
"""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
from command import load
from remedies import MODEL, SEARCH, TWO, Build, Case, check, of_net, save, several, users, weights
from torch import nn

import swa_avg


def averages(of: Mapping[str, tuple[int, ...]]) -> Build:
    """Return what saves checkpoints 1 to 3, and averages of some of them under these names."""

    def build(folder: Path) -> None:
        save(folder, {f"{n}.pt": n for n in (1, 2, 3)})
        (folder / "x").mkdir()
        for name, numbers in of.items():
            swa_avg.average([folder / f"{n}.pt" for n in numbers], folder / f"{name}.pt")

    return build


EPOCHS = {f"run/epoch_{n}.pt": n for n in (1, 2)}


def shards(folder: Path) -> None:
    for n in (1, 2):
        folders.save_shards(folder / f"e p/{n}", folders.weights(n))


SELECTION: dict[str, Case] = {
    "a pattern without matches": Case(
        EPOCHS, "'run/epoch*.ckpt'", r"(run) contains (epoch_1.pt), (epoch_2.pt)\.",
        ("{0}/{1} {0}/{2}",), 1.5,
    ),
    "a file that is not there": Case(
        EPOCHS, "run/epoc_1.pt run/epoch_2.pt", r"Did you mean (\S+)\?", ("{0} run/epoch_2.pt",),
        1.5,
    ),
    "a folder that is not there": Case(
        EPOCHS, "rum/epoch_1.pt run/epoch_2.pt", r"Did you mean (\S+)\?", ("{0} run/epoch_2.pt",),
        1.5,
    ),
    "a home": Case(EPOCHS, "'~/run'", r"~ is not expanded here: write (\S+)\.", ("{0}",), 1.5),
    "a pattern in a home": Case(
        EPOCHS, "'~/run/*.pt'", r"~ is not expanded here: write ('\S+')\.", ("{0}",), 1.5
    ),
    "an output in a home": Case(
        EPOCHS, "run -o '~/out.pt'", r"~ is not expanded here: write (\S+)\.", ("run -o {0}",), 1.5
    ),
    "a variable that is not set": Case(
        EPOCHS, "'' run", r"If it is a variable, check that it is set\.$", ("run",), 1.5
    ),
    "a folder of one run": Case(
        {f"exp/logs/{name}": what for name, what in EPOCHS.items()}, "exp",
        r"Its folder logs/run contains checkpoints: give (\S+)\.", ("{0}",), 1.5,
    ),
    "sub-folders": Case(
        {"e x/a/m_1.pt": 1, "e x/b/m_2.pt": 2}, "'e x'",
        r"Its sub-folders contain checkpoints: give (.+)\.$", ("{0}",), 1.5,
    ),
    "sub-folders of several runs": Case(
        {f"exp/seed_{run}/epoch_{n}.pt": n + 4 * run for run in (0, 1) for n in (1, 2)}, "exp",
        r"several checkpoints; give those of one run: (\S+), \S+\.$", ("{0}",), 1.5,
    ),
    "folders below": Case(
        {"exp/a/x/m_1.pt": 1, "exp/a/y/m_2.pt": 2}, "exp",
        r"Folders below it contain checkpoints: (\S+), (\S+)\.", ("{0} {1}",), 1.5,
    ),
    "a folder with one": Case(
        {"exp/final.pt": 9, **{f"exp/{name}": what for name, what in EPOCHS.items()}}, "exp",
        r"contains only final.pt. Its folder run contains checkpoints: give (\S+)$",
        ("{0}",), 1.5, notes=True,
    ),
    "a model beside its checkpoints": Case(
        {"run/model.safetensors": 9, "run/checkpoint-1/model.safetensors": 1,
         "run/checkpoint-2/model.safetensors": 2}, "run",
        r"to use that model instead, give (--exclude .+)$", ("run {0}",), 9, notes=True,
    ),
    "no such epochs": Case(
        EPOCHS, "run --epochs 7:", r"expected a range with some of these, by .+: (\d), (\d)\.",
        ("run --epochs {0}:{1}",), 1.5,
    ),
    "a metric that one lacks": Case(
        {"run/epoch_1_loss_0.5.pt": 1, "run/epoch_2_loss_0.3.pt": 2, "run/last.pt": 7},
        "run --best 2 --metric loss", r"Searched .+; (--exclude .+) leaves it out\.",
        ("run --best 2 --metric loss {0}",), 1.5,
    ),
    "a metric that several lack": Case(
        {"run/epoch_1_loss_0.5.pt": 1, "run/epoch_2_loss_0.3.pt": 2, "run/last.pt": 7,
         "run/last_2.pt": 8}, "run --best 2 --metric loss",
        r"Searched .+; (--exclude .+) leaves all such checkpoints out\.$",
        ("run --best 2 --metric loss {0}",), 1.5,
    ),
    "shards by their names": Case(
        shards, "'e p/1/*.safetensors' 'e p/2/*.safetensors' -o out.pt", r"Give (.+) instead\.$",
        ("{0} -o out.pt",), None,
    ),
    "several series": Case(
        {"seed_1_epoch_1.pt": 1, "seed_1_epoch_2.pt": 2, "seed_2_epoch_3.pt": 6},
        "seed_1_epoch_1.pt seed_1_epoch_2.pt seed_2_epoch_3.pt",
        r"; to leave out seed_2_epoch_3\.pt, add (--exclude .+)$",
        ("seed_1_epoch_1.pt seed_1_epoch_2.pt seed_2_epoch_3.pt {0}",), 1.5, notes=True,
    ),
    "an average among checkpoints": Case(
        averages({"avg": (1,)}),
        "2.pt avg.pt", r"is already an average; left out \(to include it, use (--start-from)\)",
        ("2.pt {0} avg.pt",), 1.5, notes=True,
    ),
    "an average alone": Case(
        averages({"avg": (1,)}),
        "avg.pt", r"To add checkpoints to it, or to write it again, give it with (--start-from)\.",
        ("2.pt {0} avg.pt",), 1.5,
    ),
    "several averages alone": Case(
        averages({"a": (1, 2), "b": (3,)}), "a.pt b.pt",
        r"To merge averages, give each with (--start-from)\.$", ("{0} a.pt {0} b.pt",), 2,
    ),
    "averages of others": Case(
        {**TWO, "ema_1.pt": 3, "ema_2.pt": 4}, "1.pt 2.pt ema_1.pt ema_2.pt",
        r"they are averages: (\S+), (\S+); to average them, give no other checkpoints$",
        ("{0} {1}",), 3.5, notes=True,
    ),
    "two runs": Case(
        {f"{run}_epoch_{n}.pt": n + add for run, add in (("a", 0), ("b", 4)) for n in (1, 2)},
        "a_epoch_1.pt a_epoch_2.pt b_epoch_1.pt b_epoch_2.pt",
        r"(--exclude .+) leaves them out; to merge averages of several runs, use (--start-from)\.",
        ("a_epoch_1.pt a_epoch_2.pt b_epoch_1.pt b_epoch_2.pt {0}",), 1.5,
    ),
    "averages of two runs": Case(
        {f"{run}_epoch_{n}.pt": n + add for run, add in (("a", 0), ("b", 4)) for n in (1, 2)},
        "a_epoch_1.pt a_epoch_2.pt b_epoch_1.pt b_epoch_2.pt",
        r"to merge averages of several runs, use (--start-from)\.",
        ("a_epoch_1.pt a_epoch_2.pt -o a.pt", "b_epoch_1.pt b_epoch_2.pt -o b.pt",
         "{0} a.pt {0} b.pt"), None,
    ),
}  # fmt: skip


class Keeper:
    """An object of a script that has the weights in a module of its own."""

    def __init__(self, value: float) -> None:
        self.network = weights(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.network


def save_own_state(folder: Path) -> None:
    for n in (1, 2):
        torch.save(Keeper(n).state_dict(), folder / f"{n}.pt")


def copied_into_the_model(folder: Path) -> None:
    for n in (1, 2):
        saved = torch.load(folder / f"{n}.pt")
        torch.save(dict(zip(saved["model"], saved["ema"]["shadow_params"], strict=True)),
                   folder / f"{n}.pt")  # fmt: skip


ADAM = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def counted(number: int, value: float) -> dict[str, torch.Tensor]:
    """Return the state_dict of an AveragedModel."""
    named = {f"module.{name}": tensor for name, tensor in weights(value).items()}
    return {"n_averaged": torch.tensor(number), **named}


BOTH = {"model": weights(9), "model_ema": counted(1, 1)}
TWO_EMA = several(
    lambda n: {"model": weights(n), "model_ema": weights(n + 4), "ema": weights(n + 8)}
)
MODEL_EMA = several(lambda n: {"model": weights(n), "model_ema": weights(n + 4), "epoch": n})

LAYOUT: dict[str, Case] = {
    "several state_dicts": Case(
        several(lambda n: {"state_dict": weights(n), "model": weights(n + 4)}), "1.pt 2.pt",
        r"Choose one, as in (--key \S+)\.$", ("1.pt 2.pt {0}",), 1.5,
    ),
    "a model beside a generator": Case(
        several(lambda n: {"model": weights(n), "generator": weights(n + 4)}), "1.pt 2.pt",
        r"If both make up one model, add (--key \S+ --key \S+); otherwise add (--key \S+)\.$",
        ("1.pt 2.pt {1}",), 1.5,
    ),
    "a model and a generator that are one": Case(
        several(lambda n: {"model": weights(n), "generator": {"g": weights(n)["a.bias"]}}),
        "1.pt 2.pt", r"If both make up one model, add (--key \S+ --key \S+); ",
        ("1.pt 2.pt {0}",), 1.5,
    ),
    "nothing but an average": Case(
        several(lambda n: {"ema": weights(n), "epoch": n}), "1.pt 2.pt", r"Use them with (--ema)\.",
        ("1.pt 2.pt {0}",), 1.5,
    ),
    "nothing but averages": Case(
        several(lambda n: {"ema": weights(n), "ema_2": weights(n + 4), "epoch": n}), "1.pt 2.pt",
        r"Choose one, as in (--key \S+)\.$", ("1.pt 2.pt {0}",), 1.5,
    ),
    "two models": Case(
        several(lambda n: {"g": weights(n), "d": weights(n + 4)}), "1.pt 2.pt",
        r"Give its path with (--key); tensors are at: (\w), (\w)\. .+ as one model, repeat --key\.",
        ("1.pt 2.pt {0} {1} {0} {2}", "1.pt 2.pt {0} {1}"), None,
    ),
    "one of two models": Case(
        several(lambda n: {"g": weights(n), "d": weights(n + 4)}), "1.pt 2.pt",
        r"Give its path with (--key); tensors are at: (\w), (\w)\. ", ("1.pt 2.pt {0} {1}",), 1.5,
    ),
    "a wrong key": Case(
        several(lambda n: {"net": weights(n)}), "1.pt 2.pt --key model",
        r"Give its path with (--key); tensors are at: (\S+)\.$", ("1.pt 2.pt {0} {1}",), 1.5,
    ),
    "two models beside an average": Case(
        several(lambda n: {"g": weights(n), "d": weights(n), "ema": weights(n + 4)}), "1.pt 2.pt",
        r" (--ema) takes the average at ema\.$", ("1.pt 2.pt {0}",), 5.5,
    ),
    "two models in one dict": Case(
        several(lambda n: {"net": {"g": weights(n), "d": weights(n + 4)}}), "1.pt 2.pt",
        r" (--key net) takes all of them\.$", ("1.pt 2.pt {0}",), None,
    ),
    "a key for a bare state_dict": Case(
        TWO, "1.pt 2.pt --key state_dict", r"It is a state_dict itself: leave out --key\.$",
        ("1.pt 2.pt",), 1.5,
    ),
    "an optimizer": Case(
        {**TWO, "opt[0].pt": ADAM}, "1.pt 2.pt 'opt[0].pt'",
        r"(--exclude \S+) leaves it out\.$", ("1.pt 2.pt 'opt[0].pt' {0}",), 1.5,
    ),
    "an optimizer under a key": Case(
        {**several(lambda n: {"model": weights(n)}), "opt[0].pt": ADAM}, "*.pt --key model",
        r"to average other files, leave it out with (--exclude \S+)\.$",
        ("*.pt --key model {0}",), 1.5,
    ),
    "an object": Case(
        several(lambda n: Keeper(n)), "1.pt 2.pt",
        r"It holds a pickled object; save its (state_dict\(\)) instead\.$",
        (save_own_state, "1.pt 2.pt"), 1.5,
    ),
    "an average without names": Case(
        several(lambda n: {"model": weights(n), "ema": {
            "decay": 0.9, "shadow_params": [value + 4 for value in weights(n).values()]}}),
        "1.pt 2.pt --ema",
        r"Copy it into the model with the code that wrote it, and save its state_dict; or average "
        r"the raw weights with (--no-ema)\.$",
        ("1.pt 2.pt {0}", copied_into_the_model, "1.pt 2.pt"), (1.5, 5.5),
    ),
    "no average": Case(
        TWO, "1.pt 2.pt --ema", r"Average the raw weights without --ema\.$", ("1.pt 2.pt",), 1.5
    ),
    "an average beside the weights": Case(
        MODEL_EMA, "1.pt 2.pt", r"not used \(to average them, use (--ema)\)",
        ("1.pt 2.pt {0}",), 5.5, notes=True,
    ),
    "two averages beside the weights": Case(
        TWO_EMA, "1.pt 2.pt", r"not used \(to average them, use (--key ema)\)",
        ("1.pt 2.pt {0}",), 9.5, notes=True,
    ),
    "which of three to replace": Case(
        TWO_EMA, "1.pt 2.pt --keep-wrapper",
        r"replace: (--key ema) \(the average\) or (--no-ema) \(the raw weights\)\.$",
        ("1.pt 2.pt --keep-wrapper {0}", "1.pt 2.pt --keep-wrapper {1}"),
    ),
    "one of two averages to go on from": Case(
        {**TWO, "3.pt": {**BOTH, "ema": counted(1, 5)}}, "--start-from 3.pt",
        r"use --key ema; to add raw weights to it, write it first by itself with (--key ema)\.$",
        ("--start-from 3.pt {0}",), 5,
    ),
    "an average within a state_dict": Case(
        several(lambda n: {**weights(n), **{f"ema.{k}": v + 4 for k, v in weights(n).items()}}),
        "1.pt 2.pt", r"\((--ema) writes only the average, (--no-ema) only the raw weights\)",
        ("1.pt 2.pt {0}", "1.pt 2.pt {1}"), (5.5, 1.5), notes=True,
    ),
    "an object in a state_dict": Case(
        several(lambda n: {**weights(n), "codec": Keeper(n)}), "1.pt 2.pt",
        r"codec: .+; left out \(to keep it, use (--keep-wrapper)\)", ("1.pt 2.pt {0}",), None,
        notes=True,
    ),
    "a key that is no string": Case(
        several(lambda n: {"model": {"net": weights(n), 7: torch.ones(2)}}), "1.pt 2.pt",
        r"Give the path of a state_dict with (--key): (\S+)\.$", ("1.pt 2.pt {0} {1}",), 1.5,
    ),
    "no key that is a string": Case(  # nothing helps, so nothing is told
        several(lambda n: {"state_dict": {7: torch.ones(2), 8: torch.ones(3)}}), "1.pt 2.pt",
        r"has a key that is not a string, 7, expected names of tensors\.$", (),
    ),
}  # fmt: skip


def icefall(n: int) -> dict[str, Any]:
    """Return what icefall saves: the weights, and the mean of the run so far."""
    return {"model": weights(n), "model_avg": weights(n + 4), "batch_idx_train": 1000 * n}


AGREEMENT: dict[str, Case] = {
    "two models in files": Case(
        {**TWO, "3.pt": {"x.weight": torch.ones(1)}, "4.pt": {"x.weight": torch.ones(1)}},
        "1.pt 3.pt", r"Average checkpoints of one model\.?", ("1.pt 2.pt",), 1.5,
    ),
    "one of another shape": Case(
        {**TWO, "3.pt": {**weights(3), "a.bias": torch.ones(5)}}, "1.pt 2.pt 3.pt",
        r"3\.pt: .+The other 2 agree with each other: leave it out with (--exclude \S+)\.$",
        ("1.pt 2.pt 3.pt {0}",), 1.5,
    ),
    "one of another dtype": Case(
        {"1.pt": {**weights(1), "a.weight": torch.ones(2, 3).half()}, "2.pt": 2},
        "1.pt 2.pt", r"Choose one with (--dtype \S+)\.$", ("1.pt 2.pt {0}",), 1.5,
    ),
    "codes of quantised weights": Case(
        several(lambda n: {"a.weight": torch.full((2, 3), n, dtype=torch.int32)}), "1.pt 2.pt",
        r"If it contains codes of quantised weights: average the weights before they are quantised",
        (lambda folder: save(folder, TWO), "1.pt 2.pt"), 1.5,
    ),
    "codes and scales": Case(
        several(lambda n: {"a.weight": torch.full((2, 3), n, dtype=torch.int8),
                           "a.scale": torch.ones(1)}), "1.pt 2.pt",
        r"Average the weights before they are quantised\.$",
        (lambda folder: save(folder, TWO), "1.pt 2.pt"), 1.5,
    ),
    "packed codes": Case(
        several(lambda n: {**weights(n), "fc._packed_params._packed_params": Keeper(n)}),
        "1.pt 2.pt", r"torch\.ao.+ Average the weights before they are quantised \(",
        (lambda folder: save(folder, TWO), "1.pt 2.pt"), 1.5,
    ),
    "means of the run": Case(
        several(icefall), "1.pt 2.pt --ema",
        r"Use only the last \((--last 1 --ema)\), take the mean between two "
        r"\((--start-from \S+ --minus \S+ --ema)\), or average the raw weights \((--no-ema)\)\.$",
        ("1.pt 2.pt {0}", "{1}", "1.pt 2.pt {2}"), (6, 7, 1.5),
    ),
    "NaN": Case(
        {**TWO, "3.pt": float("nan")}, "1.pt 2.pt 3.pt", r"3.pt: .+Leave this checkpoint out\.$",
        ("1.pt 2.pt 3.pt --exclude 3.pt", "1.pt 2.pt"), 1.5,
    ),
    "a mean that is too large": Case(
        several(lambda n: {"w": torch.full((2,), 60000.0 * n)}), "1.pt 2.pt --dtype float16",
        r"Choose a wider (--dtype)\.", ("1.pt 2.pt {0} bfloat16", "1.pt 2.pt {0} float32"), None,
    ),
    "moments of SWAG": Case(
        several(lambda n: dict.fromkeys(
            ("0.weight_mean", "0.weight_sq_mean", "0.weight_cov_mat_sqrt"), torch.ones(2, 3) * n)),
        "1.pt 2.pt",
        r"Use only the last \((--last 1)\), which", ("1.pt 2.pt {0}",), None,
    ),
    "a table": Case(
        several(lambda n: {**weights(n), "pairs": torch.ones(2, 2, dtype=torch.int32) * n}),
        "1.pt 2.pt", r"If it is a table, remove it from the files\.$",
        (lambda folder: save(folder, TWO), "1.pt 2.pt"), 1.5,
    ),
    "the same checkpoint twice": Case(
        averages({"avg": (1,)}),
        "1.pt 2.pt --start-from avg.pt", r"1.pt: .+Leave it out: it would count twice\.$",
        ("2.pt --start-from avg.pt", "1.pt 2.pt --exclude 1.pt --start-from avg.pt"), 1.5,
    ),
    "several checkpoints twice": Case(
        averages({"avg": (1, 2)}), "1.pt 2.pt 3.pt --start-from avg.pt",
        r"Leave out (\S+), (\S+): they would count twice\.$",
        ("3.pt --start-from avg.pt",
         "1.pt 2.pt 3.pt --exclude {0} --exclude {1} --start-from avg.pt"), 2,
    ),
    "two averages of one": Case(
        averages({"a": (1,), "b": (1, 2)}),
        "--start-from a.pt --start-from b.pt", r"b.pt: .+ Leave it out: it would count twice\.$",
        ("--start-from a.pt",), 1,
    ),
    "an average of no known count": Case(
        {**TWO, "avg.pt": 7}, "2.pt --start-from avg.pt",
        r"Average all of the checkpoints again, without --start-from\.$", ("1.pt 2.pt",), 1.5,
    ),
    "an average to go on from beside its weights": Case(
        {**TWO, "both.pt": BOTH}, "2.pt --start-from both.pt",
        r"take the average at model_ema, use --ema; to add raw weights to it, write it first by "
        r"itself with (--ema)\.$",
        ("--start-from both.pt {0} -o avg.pt", "2.pt --start-from avg.pt"), (1, 1.5),
    ),
    "an average to subtract from beside its weights": Case(
        {"first.pt": BOTH, "both.pt": {**BOTH, "model_ema": counted(2, 1.5)}},
        "--start-from both.pt --minus first.pt",
        r"To take the average at model_ema, use (--ema); ",
        ("--start-from both.pt --minus first.pt {0}",), 2,
    ),
    "a mean of the run to add to an average": Case(
        lambda folder: (averages({"avg": (1,)})(folder), save(folder, several(icefall))),
        "2.pt --start-from avg.pt --ema",
        r"Without --start-from, use only the last \((--last 1 --ema)\), or average the raw weights "
        r"\((--no-ema)\)\.$",
        ("2.pt {0}", "2.pt --start-from avg.pt {1}"), (6, 1.5),
    ),
    "averages the wrong way around": Case(
        averages({"a": (1,), "b": (1, 2, 3)}),
        "--start-from a.pt --minus b.pt",
        r"Give the later average with (--start-from), the earlier one with (--minus)\.$",
        ("{0} b.pt {1} a.pt",), 2.5,
    ),
    "averages of as many checkpoints": Case(
        averages({"a": (1, 2, 3), "b": (1, 2, 3), "c": (1,)}), "--start-from a.pt --minus b.pt",
        r"Give an average of fewer checkpoints with (--minus)\.$",
        ("--start-from a.pt {0} c.pt",), 2.5,
    ),
    "averages of other checkpoints": Case(
        averages({"a": (1,), "b": (2, 3), "c": (2,)}),
        "--start-from b.pt --minus a.pt",
        r"Subtract an average of some of the same checkpoints\.$",
        ("--start-from b.pt --minus c.pt",), 3,
    ),
    "two averages to subtract": Case(
        averages({"b": (1, 2), "x/a": (1,), "x/c": (2,)}),
        "--start-from b.pt --minus 'x/*.pt'", r"Give one file with (--minus)\.$",
        ("--start-from b.pt {0} x/a.pt",), 2,
    ),
}  # fmt: skip


def linked(folder: Path) -> None:
    """Save folders whose weights have two names."""
    for n in (1, 2):
        save(folder, {f"{n}/model.safetensors": n, f"{n}/config.json": "{}"})
        (folder / f"{n}/copy.safetensors").hardlink_to(folder / f"{n}/model.safetensors")


def half_old(folder: Path) -> None:
    save(folder, {"1/model.safetensors": 1, "2/model.safetensors": 2,
                  "old/model.safetensors": 9, "old/thesis.txt": "years of work"})  # fmt: skip


def pipelines(folder: Path) -> None:
    for n in (1, 2):
        save(folder, {f"{n}/unet/diffusion_pytorch_model.safetensors": n + 4,
                      f"{n}/text_encoder/model.safetensors": n,
                      f"{n}/model_index.json": '{"_class_name": "P"}'})  # fmt: skip


def engines(folder: Path) -> None:
    for n in (1, 2):
        folders.save_deepspeed(folder / f"checkpoint-{n}", weights(n), n)


def models_of_accelerate(folder: Path) -> None:
    for n in (1, 2):
        folders.save_accelerate(folder / f"{n}", weights(n), n)
        save(folder, {f"{n}/model_2.safetensors": n})


def speechbrain(folder: Path) -> None:
    for n in (1, 2):
        name = f"run/CKPT+2024-05-0{n}+10-00-00+00"
        folders.save_speechbrain(folder / name, weights(n), n)


def engines_averaged(folder: Path) -> None:
    engines(folder)
    swa_avg.average([folder / "checkpoint-1", folder / "checkpoint-2"], folder / "avg")


def views(n: int) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 6), float(n))[:, ::2], "a.bias": torch.ones(2)}


HF = {f"{n}/{name}": what for n in (1, 2)
      for name, what in (("model.safetensors", n), ("config.json", "{}"))}  # fmt: skip
OUTPUT: dict[str, Case] = {
    "an output that exists": Case(
        {**TWO, "old.pt": 7}, "1.pt 2.pt -o old.pt",
        r"Choose another output with (-o), or replace it with (--force)\.$",
        ("1.pt 2.pt {0} new.pt", "1.pt 2.pt -o old.pt {1}"), 1.5,
    ),
    "an output that is an input": Case(
        TWO, "1.pt 2.pt -o 2.pt --force", r"Choose another output with (-o)\.$",
        ("1.pt 2.pt {0} new.pt",), 1.5,
    ),
    "a folder around an input": Case(
        {**HF, "run/1/model.safetensors": 1, "run/2/model.safetensors": 2},
        "run/1 run/2 -o run --force", r"Choose another output with (-o)\.$",
        ("run/1 run/2 {0} new",), 1.5,
    ),
    "a folder for a file": Case(
        {**TWO, "m m/x.txt": "x"}, "1.pt 2.pt -o 'm m'", r"Name a file in it, as in (-o .+)\.$",
        ("1.pt 2.pt {0}",), 1.5,
    ),
    "a file for a folder": Case(
        {**HF, "old": "text"}, "1 2 -o old --force", r"Choose another output with (-o)\.$",
        ("1 2 {0} new",), 1.5,
    ),
    "no folder for the output": Case(
        TWO, "1.pt 2.pt -o 'a b/c/out.pt'", r"Create its folder first: (mkdir -p .+)\.$",
        ("$ {0}", "1.pt 2.pt -o 'a b/c/out.pt'"), 1.5,
    ),
    "a name of NeMo": Case(
        TWO, "1.pt 2.pt -o out.nemo", r"Name it (out.pt), or average \.nemo archives\.$",
        ("1.pt 2.pt -o {0}",), 1.5,
    ),
    "a folder of engines in another dtype": Case(
        engines, "checkpoint-1 checkpoint-2 --dtype bfloat16 -o out",
        r"Leave out --dtype, or name a file, as in (-o \S+)\.$",
        ("checkpoint-1 checkpoint-2 --dtype float32 {0}",), 1.5,
    ),
    "a folder of models in another dtype": Case(
        speechbrain, "run -o out --dtype bfloat16",
        r"or name a file, as in (-o \S+ --key model)\.$",
        ("run --dtype float32 {0}",), 1.5,
    ),
    "an average of models as the checkpoint to copy": Case(
        lambda folder: (speechbrain(folder), swa_avg.average(folder / "run", folder / "avg")),
        "--start-from avg -o out", r"Name a file, as in (-o \S+ --key model)\.$",
        ("--start-from avg {0}",), 1.5,
    ),
    "a folder of engines without its dtype": Case(
        engines, "checkpoint-1 checkpoint-2 --dtype bfloat16 -o out",
        r"Leave out (--dtype), or ", ("checkpoint-1 checkpoint-2 -o out",), None,
    ),
    "an average of engines as the checkpoint to copy": Case(
        engines_averaged,
        "--start-from avg -o out", r"Name a file, as in (-o \S+)\.$", ("--start-from avg {0}",),
        1.5,
    ),
    "a wrapper of another format": Case(
        TWO, "1.pt 2.pt --keep-wrapper -o out.safetensors",
        r"Choose a name like that of the checkpoint, or leave out --keep-wrapper\.$",
        ("1.pt 2.pt --keep-wrapper -o out.pt", "1.pt 2.pt -o out.safetensors"), 1.5,
    ),
    "a wrapper of a folder": Case(
        HF, "1 2 --keep-wrapper -o out.pt",
        r"Choose a name like that of the checkpoint, or leave out --keep-wrapper\.$",
        ("1 2 --keep-wrapper -o out", "1 2 -o out.pt"), 1.5,
    ),
    "one file for several models": Case(
        pipelines, "1 2 -o out.safetensors",
        r"Name a folder, as in (-o swa), or take one model with (--key \S+)\.$",
        ("1 2 {0}", "1 2 {1}"), None,
    ),
    "the one model": Case(
        pipelines, "1 2 -o out.safetensors", r"or take one model with (--key) \S+\.$",
        ("1 2 {0} text_encoder -o out.safetensors",), 1.5,
    ),
    "shards of a file": Case(
        HF, "1 2 --max-shard-size 1MB -o out.safetensors",
        r"Leave out (--max-shard-size), or name a folder, as in (-o out)\.$",
        ("1 2 --max-shard-size 1MB {1}", "1 2 -o out.safetensors"), 1.5,
    ),
    "shards of a torch file": Case(
        TWO, "1.pt 2.pt --max-shard-size 1MB", r"Leave out (--max-shard-size)\.$", ("1.pt 2.pt",),
        1.5,
    ),
    "shards of a kept wrapper": Case(
        HF, "1 2 --max-shard-size 1MB --keep-wrapper -o out",
        r"Leave out (--max-shard-size)\.$", ("1 2 --keep-wrapper -o out",), 1.5,
    ),
    "a dtype that safetensors lacks": Case(
        several(lambda n: {**weights(n), "rot": torch.ones(2, dtype=torch.complex128)}),
        "1.pt 2.pt -o out.safetensors", r"Write a (\.pt) file instead\.$",
        ("1.pt 2.pt -o out{0}",), 1.5,
    ),
    "a name that safetensors lacks": Case(
        several(lambda n: {**weights(n), "__metadata__": torch.ones(2)}),
        "1.pt 2.pt -o out.safetensors", r"Write a (\.pt) file instead\.$",
        ("1.pt 2.pt -o out{0}",), 1.5,
    ),
    "a view with gaps in a wrapper": Case(
        several(views), "1.pt 2.pt --keep-wrapper", r"Leave out --keep-wrapper\.$", ("1.pt 2.pt",),
        1.5,
    ),
    "weights of two names": Case(
        linked, "1 2 --keep-wrapper -o out",
        r"Remove one of the links, or leave out --keep-wrapper\.$",
        ("1 2 -o new", "$ rm [12]/copy.safetensors", "1 2 --keep-wrapper -o out"), 1.5,
    ),
    "a folder with other files": Case(
        half_old, "1 2 -o old --force",
        r"Choose another output with (-o), or move the folder away first\.$",
        ("1 2 {0} new", "$ mv old older", "1 2 -o old"), 1.5,
    ),
    "some of the models of accelerate": Case(
        models_of_accelerate, "1 2 --key model --key model_1 -o out",
        r"Take one of them, as in (--key model), or all without --key\.$",
        ("1 2 {0} -o one", "1 2 -o all"), 1.5,
    ),
    "shards of the models of accelerate": Case(
        models_of_accelerate, "1 2 --max-shard-size 1MB -o out", r"Leave out --max-shard-size\.$",
        ("1 2 -o out",), 1.5,
    ),
    "a search for a folder": Case(
        {**HF, "mod.py": SEARCH}, "1 2 --sweep mod:acc -o out",
        r"cannot write a folder: name a file with (-o)\.$",
        ("1 2 --sweep mod:acc {0} out.safetensors",), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTION)
def test_remedies_on_the_selection(name: str, tmp_path: Path) -> None:
    check(SELECTION[name], tmp_path)


@pytest.mark.parametrize("name", LAYOUT)
def test_remedies_on_the_layout(name: str, tmp_path: Path) -> None:
    check(LAYOUT[name], tmp_path)


@pytest.mark.parametrize("name", AGREEMENT)
def test_remedies_on_what_disagrees(name: str, tmp_path: Path) -> None:
    check(AGREEMENT[name], tmp_path)


@pytest.mark.parametrize("name", OUTPUT)
def test_remedies_on_the_output(name: str, tmp_path: Path) -> None:
    check(OUTPUT[name], tmp_path)


# Formats ------------------------------------------------------------------------------------------


def deflated(folder: Path) -> None:
    """Save checkpoints, and zip one of them again as a zip program does."""
    save(folder, TWO)
    with zipfile.ZipFile(folder / "1.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "1.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def zipped(folder: Path) -> None:
    """Save archives of a model and its settings, as Stable-Baselines3 does."""
    for n in (1, 2):
        save(folder, {"policy.pth": n, "data": "{}"})
        with zipfile.ZipFile(folder / f"{n}.zip", "w") as archive:
            for name in ("data", "policy.pth"):
                archive.write(folder / name, name)


def unzipped(folder: Path) -> None:
    for n in (1, 2):
        with zipfile.ZipFile(folder / f"{n}.zip") as archive:
            archive.extract("policy.pth", folder / f"{n}")


def saved_again(folder: Path) -> None:
    torch.save(torch.load(folder / "1.pt"), folder / "1.pt")


def flipped(folder: Path) -> None:
    """Save three checkpoints, and flip a bit in a tensor of the last one."""
    save(folder, {**TWO, "3.pt": 3})
    data = bytearray((folder / "3.pt").read_bytes())
    data[data.index(torch.full((2,), 3.0).numpy().tobytes())] ^= 1
    (folder / "3.pt").write_bytes(data)


def unfinished_folders(folder: Path) -> None:
    for n in (1, 2, 3):
        folders.save_chunks(folder / f"run/step_{n}", weights(n), WHOLE_BOXES)
    (folder / "run/step_3/.metadata").unlink()


def extended(folder: Path) -> None:
    """Save folders of which the last one is compressed."""
    change = folders.set_info(transform_descriptors=["zstd"])
    folders.save_chunks(folder / "1", weights(1), WHOLE_BOXES)
    folders.save_chunks(folder / "2", weights(2), WHOLE_BOXES, change=change)


def not_extended(folder: Path) -> None:
    folders.save_chunks(folder / "2", weights(2), WHOLE_BOXES)


def archives(folder: Path) -> None:
    """Save `.nemo` archives whose weights are in several files."""
    for n in (1, 2):
        folders.save_chunks(folder / "model_weights", weights(n), WHOLE_BOXES)
        with tarfile.open(folder / f"step {n}.nemo", "w:") as archive:
            archive.add(folder / "model_weights", "./model_weights")
        shutil.rmtree(folder / "model_weights")


def of_ranks(folder: Path) -> None:
    """Save a checkpoint whose statistics are in two parts."""
    save(folder, users(MODEL))
    state = of_net(2)
    boxes = {name: [((0,) * value.ndim, tuple(value.shape))] for name, value in state.items()}
    boxes["bn.running_mean"] = [((0,), (1,)), ((1,), (1,))]
    folders.save_chunks(folder / "ckpt", state, boxes)


def two_indices(folder: Path) -> None:
    for n in (1, 2):
        for stem in ("x", "y"):
            folders.save_shards(folder / f"{n}", folders.weights(n))
            (folder / f"{n}/model.safetensors.index.json").rename(
                folder / f"{n}/{stem}.safetensors.index.json"
            )


WHOLE_BOXES: dict[str, list[folders.Box]] = {
    "a.weight": [((0, 0), (2, 3))], "a.bias": [((0,), (2,))]
}  # fmt: skip
FORMATS: dict[str, Case] = {
    "a compressed record": Case(
        deflated, "1.pt 2.pt", r"Save it again with torch\.save\.$", (saved_again, "1.pt 2.pt"), 1.5
    ),
    "archives around a model": Case(
        zipped, "1.zip 2.zip",
        r"around policy\.pth, .+Extract the file of the model from each archive, and give those\.$",
        (unzipped, "1/policy.pth 2/policy.pth"), 1.5,
    ),
    "TorchScript": Case(
        lambda folder: torch.jit.save(torch.jit.script(nn.Linear(3, 2)), folder / "1.pt"), "1.pt",
        r"Save model\.state_dict\(\) with torch\.save\.$",
        (lambda folder: torch.save(torch.jit.load(folder / "1.pt").state_dict(), folder / "1.pt"),
         "1.pt"), None,
    ),
    "an expanded tensor": Case(
        several(lambda n: {**weights(n), "mask": torch.ones(1).expand(2**18 + 1)}), "1.pt 2.pt",
        r"Save it contiguous\.$",
        (lambda folder: save(folder, several(
            lambda n: {**weights(n), "mask": torch.ones(1).expand(2**18 + 1).contiguous()})),
         "1.pt 2.pt"), 1.5,
    ),
    "a flipped bit": Case(
        flipped, "1.pt 2.pt 3.pt", r"3\.pt: .+Restore the file from its source, or leave it out\.$",
        ("1.pt 2.pt 3.pt --exclude 3.pt",), 1.5,
    ),
    "no metadata": Case(
        unfinished_folders, "run/step_1 run/step_2 run/step_3 -o out.pt",
        r"leave it out, for example with (--exclude)\.$",
        ("run/step_1 run/step_2 run/step_3 -o out.pt {0} step_3",), 1.5,
    ),
    "an archive of several files": Case(
        archives, "'step 1.nemo' 'step 2.nemo' -o out.pt",
        r"Unpack each into a folder and average (\S+) of these: (.+)\.$",
        ("$ {1}", "$ mkdir b && tar -xf 'step 2.nemo' -C b",
         "'step 1/{0}' b/{0} -o out.pt"), 1.5,
    ),
    "a compressed folder": Case(
        extended, "1 2 -o out.pt", r"Save the checkpoint without extensions\.$",
        (not_extended, "1 2 -o out.pt"), 1.5,
    ),
    "several files of weights": Case(
        {f"{n}/model.{kind}.safetensors": n + add for n in (1, 2)
         for kind, add in (("fp16", 4), ("bf16", 0))}, "1 2 -o out",
        r"has several models \((\S+), \S+\)\. Give the path of the file to use\.$",
        ("1/{0} 2/{0} -o out.safetensors",), 1.5,
    ),
    "several indices": Case(
        two_indices, "1 2 -o out", r"Move the others to another folder\.$",
        ("$ mkdir others && mv 1/y*.json others/1 && mv 2/y*.json others/2", "1 2 -o out"), None,
    ),
    "statistics in parts": Case(
        of_ranks, "--recompute-bn --data mod:loader -o ckpt --force",
        r"Average to a file with (-o), and recompute it there\.$",
        ("ckpt {0} out.pt", "--recompute-bn --data mod:loader {0} out.pt"), 2,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_remedies_on_formats(name: str, tmp_path: Path) -> None:
    check(FORMATS[name], tmp_path)


def test_remedy_of_the_api(tmp_path: Path) -> None:
    """An average has no wrapper to keep; the line names the parameter, and without it it works."""
    save(tmp_path, TWO)
    swa_avg.average([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "avg.pt")
    given = {"start_from": tmp_path / "avg.pt"}
    with pytest.raises(swa_avg.SwaAvgError, match=r"Leave out keep_wrapper=True\.$"):
        swa_avg.average([], tmp_path / "out.pt", **given, keep_wrapper=True)  # type: ignore[arg-type]
    swa_avg.average([], tmp_path / "out.pt", **given)  # type: ignore[arg-type]
    assert torch.equal(load(tmp_path / "out.pt")["a.weight"], torch.full((2, 3), 1.5))
