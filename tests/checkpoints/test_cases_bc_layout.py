"""CASES.md B and C: the one candidate, and which slot of a kept file gets the mean.

Each remedy that a line prints is followed.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from command import averaged, fails, run
from torch import nn

from swa_avg.checkpoints.frameworks import FRAMEWORKS, Loads

Tree = dict[str, Any]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


RAW = [dict(network(n).state_dict()) for n in range(3)]
EMA = [dict(network(n + 10).state_dict()) for n in range(3)]
FILES = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]


def under(prefix: str, state: Tree) -> Tree:
    return {prefix + name: value for name, value in state.items()}


def save(folder: Path, make: Callable[[int], object]) -> None:
    for n, file in enumerate(FILES):
        torch.save(make(n), folder / file)


def mean(states: list[Tree], name: str = "0.weight") -> torch.Tensor:
    return oracle.mean([state[name] for state in states])


def quietly(folder: Path, *arguments: str) -> None:
    """Run the command where its messages do not matter."""
    ended = run(folder, *arguments, "-q", "-f")
    assert ended.returncode == 0, ended.stderr


# C: --keep-wrapper on files that hold both ----------------------------------------------------


def lightning(n: int) -> Tree:
    return {"state_dict": EMA[n], "current_model_state": RAW[n], "epoch": n,
            "averaging_state": {"n_averaged": torch.tensor(n)},
            "pytorch-lightning_version": "2.6"}  # fmt: skip


def mmengine(n: int) -> Tree:
    return {"meta": {"mmengine_version": "0", "epoch": n}, "state_dict": EMA[n],
            "ema_state_dict": {"steps": torch.tensor(n)} | under("module.", RAW[n])}  # fmt: skip


def composer(n: int) -> Tree:
    ema = {"ema_model": EMA[n], "training_model": RAW[n], "ema_started": True}
    return {"state": {"model": EMA[n], "algorithms": [("EMA", ema)]}, "rng": []}


# What the framework writes, and how it reads its average and its raw weights.
BOTH: dict[str, tuple[Callable[[int], Tree], str, str]] = {
    "Lightning": (lightning, "state_dict", "current_model_state"),
    "mmengine": (mmengine, "state_dict", "ema_state_dict"),
    "Composer": (composer, "state.model", "state.algorithms.0.1.training_model"),
    "timm": (lambda n: {"state_dict": RAW[n], "state_dict_ema": EMA[n], "epoch": n,
                        "args": argparse.Namespace(lr=1)}, "state_dict_ema", "state_dict"),
    "torchvision": (lambda n: {"model": RAW[n], "epoch": n, "model_ema":
                               {"n_averaged": torch.tensor(4)} | under("module.", EMA[n])},
                    "model_ema", "model"),
    "YOLO": (lambda n: {"model": RAW[n], "ema": EMA[n], "best_fitness": 0, "epoch": n},
             "ema", "model"),
    "FixMatch": (lambda n: {"state_dict": RAW[n], "ema_state_dict": EMA[n], "acc": 1},
                 "ema_state_dict", "state_dict"),
    "USB": (lambda n: {"model": RAW[n], "ema_model": EMA[n], "it": n}, "ema_model", "model"),
    "RT-DETR": (lambda n: {"model": RAW[n], "ema": {"module": EMA[n], "updates": n}},
                "ema.module", "model"),
    "BasicSR": (lambda n: {"params": RAW[n], "params_ema": EMA[n]}, "params_ema", "params"),
    "SuperGradients": (lambda n: {"net": RAW[n], "ema_net": EMA[n], "acc": 1}, "ema_net", "net"),
    "unknown": (lambda n: {"model": RAW[n], "swa_model": EMA[n]}, "swa_model", "model"),
}  # fmt: skip


def weight(tree: Any, path: str) -> torch.Tensor:
    for part in path.split("."):
        tree = tree[int(part)] if part.isdecimal() else tree[part]
    found: torch.Tensor = tree["module.0.weight" if "module.0.weight" in tree else "0.weight"]
    return found


@pytest.mark.parametrize("name", BOTH)
def test_keep_wrapper_asks_which_slot(name: str, tmp_path: Path) -> None:
    """The line names both slots and what the framework loads; each answer fills its own slot."""
    make, average, raw = BOTH[name]
    save(tmp_path, make)
    out = tmp_path / "out.pt"
    line = fails(tmp_path, *FILES, "-o", "out.pt", "--keep-wrapper")
    assert f"raw weights at {raw} and an average at {average}" in line, line
    assert "--ema (the average) or --no-ema (the raw weights)" in line
    assert (name if name != "unknown" else "it may load either") in line
    assert not out.exists()
    for option, filled, kept, states, others in (
        ("--ema", average, raw, EMA, RAW),
        ("--no-ema", raw, average, RAW, EMA),
    ):
        quietly(tmp_path, *FILES, "-o", "out.pt", "--keep-wrapper", option)
        made = torch.load(out, weights_only=False)
        assert oracle.same_bits(weight(made, filled), mean(states))
        assert oracle.same_bits(weight(made, kept), others[2]["0.weight"])
    quietly(tmp_path, *FILES, "-o", "out.pt", "--keep-wrapper", "--key", raw)  # a key says it, too


@pytest.mark.parametrize(
    "make",
    [
        lambda n: {"model": RAW[n], "extra_state": {"train_iterator": {"epoch": n}, "ema": EMA[n]}},
        lambda n: {"state_dict": RAW[n], "pytorch-lightning_version": "2", "callbacks":
                   {"StochasticWeightAveraging": {"average_model_state": EMA[n]}}},
    ],
    ids=["fairseq", "Lightning SWA"],
)  # fmt: skip
def test_keep_wrapper_where_the_raw_weights_are_loaded(
    make: Callable[[int], Tree], tmp_path: Path
) -> None:
    """Nothing is asked where the framework loads the slot that gets the mean anyway."""
    save(tmp_path, make)
    made = averaged(tmp_path, *FILES, "--keep-wrapper")
    assert any("use --ema" in note for note in made.notes)
    place = "model" if "model" in made.tensors else "state_dict"
    assert oracle.same_bits(weight(made.tensors, place), mean(RAW))


def test_icefall_keeps_its_wrapper(tmp_path: Path) -> None:
    """Of means since step 0 only one can be taken: the line says how, and both ways work."""
    save(tmp_path, lambda n: {"model": RAW[n], "model_avg": EMA[n], "batch_idx_train": n + 1})
    line = fails(tmp_path, *FILES, "--keep-wrapper", "-o", "out.pt")
    assert "icefall loads the average" in line and "--last 1 --ema" in line
    one = averaged(tmp_path, *FILES, "--keep-wrapper", "--last", "1", "--ema").tensors
    assert oracle.same_bits(weight(one, "model_avg"), EMA[2]["0.weight"])
    made = averaged(tmp_path, *FILES, "--keep-wrapper", "--no-ema", "--force")
    assert oracle.same_bits(weight(made.tensors, "model"), mean(RAW))
    assert any("icefall loads model_avg" in note for note in made.notes), made.notes


def test_average_without_names_in_a_kept_file(tmp_path: Path) -> None:
    """Of a list of shadow_params the line offers only what can be done."""
    save(tmp_path, lambda n: {"model": RAW[n], "ema": {"decay": 0.9, "num_updates": n,
                              "shadow_params": list(EMA[n].values())}})  # fmt: skip
    line = fails(tmp_path, *FILES, "--keep-wrapper", "-o", "out.pt")
    assert "--no-ema" in line and "--ema (" not in line.replace("--no-ema (", "")
    made = averaged(tmp_path, *FILES, "--keep-wrapper", "--no-ema").tensors
    assert oracle.same_bits(weight(made, "model"), mean(RAW))


def test_bare_output_of_a_framework_that_needs_its_file(tmp_path: Path) -> None:
    """One note says that the output is bare and what --keep-wrapper is for; with it, none."""
    for sign in ("pytorch-lightning_version", "best_fitness"):
        slot = "state_dict" if sign[0] == "p" else "model"
        save(tmp_path, lambda n, s=sign, w=slot: {w: RAW[n], s: "1", "epoch": n})
        bare = averaged(tmp_path, *FILES, "--force")
        said = [note for note in bare.notes if "bare state_dict" in note]
        assert len(said) == 1 and "--keep-wrapper" in said[0], bare.notes
        kept = averaged(tmp_path, *FILES, "--force", "--keep-wrapper")
        assert not any("bare state_dict" in note for note in kept.notes)
        assert oracle.same_bits(weight(kept.tensors, slot), mean(RAW))


def test_table_is_sound() -> None:
    """Each row that has an average says where; a name stands for one way of writing a file."""
    for row in FRAMEWORKS:
        assert row.average or row.loads is Loads.WEIGHTS, row
        assert row.weights and row.weights != row.average
        assert not row.running or row.average
    places = [(row.weights, row.average, row.sign) for row in FRAMEWORKS]
    assert len(set(places)) == len(places)


# B: the one candidate -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "place"),
    [
        (lambda state: {"net": state, "acc": 91.0, "epoch": 3}, "net"),
        (lambda state: {"weight": state, "config": [1, 2], "info": "x"}, "weight"),
        (lambda state: {"model_state": state, "optimizer_state": {"state": {}, "param_groups": []},
                        "rng": {"torch": torch.zeros(8, dtype=torch.uint8)}}, "model_state"),
        (lambda state: {"run": {"policy": state}, "metrics": {"acc": torch.tensor(0.5)},
                        "optim": {"state": {"0.weight": {"exp_avg": torch.ones(4, 3)}}}},
         "run.policy"),
        (lambda state: {"net": state, "best_acc": torch.tensor(0.5), "loss": torch.tensor(0.3),
                        "mean": torch.ones(3), "rng": torch.zeros(8, dtype=torch.uint8)}, "net"),
        (lambda state: [state, {"epoch": 3}], "0"),
        (lambda state: (3, state), "1"),
    ],
    ids=["kuangliu", "RVC", "OpenPCDet", "nested", "tensors beside it", "list", "tuple"],
)  # fmt: skip
def test_only_candidate_is_taken_and_said(wrap: Any, place: str, tmp_path: Path) -> None:
    """The only place where a state_dict can be is taken; a note names it."""
    save(tmp_path, lambda n: wrap(RAW[n]))
    made = averaged(tmp_path, *FILES)
    assert oracle.same_bits(made.tensors["0.weight"], mean(RAW))
    assert any(f"the state_dict is at {place}, the only candidate" in note for note in made.notes)


def test_two_candidates_are_refused_and_key_takes_one(tmp_path: Path) -> None:
    """Generator and discriminator: the line lists them, and --key with one of them works."""
    save(tmp_path, lambda n: {"generator": RAW[n], "discriminator": EMA[n]})
    line = fails(tmp_path, *FILES, "-o", "out.pt")
    assert "--key; tensors are at: generator, discriminator" in line
    made = averaged(tmp_path, *FILES, "--key", "generator")
    assert oracle.same_bits(made.tensors["0.weight"], mean(RAW))


def test_parameters_beside_nested_ones_are_one_model(tmp_path: Path) -> None:
    """The backbone as a dict and the head by its names: neither is left out."""
    save(tmp_path, lambda n: {"backbone": RAW[n], "head.weight": EMA[n]["0.weight"], "epoch": n})
    made = averaged(tmp_path, *FILES)
    assert oracle.same_bits(made.tensors["backbone.0.weight"], mean(RAW))
    assert oracle.same_bits(made.tensors["head.weight"], mean(EMA))
    # Two models and a tensor that is none of theirs: which is meant must be said.
    save(tmp_path, lambda n: {"G": RAW[n], "D": EMA[n], "z": torch.ones(3), "x": torch.ones(3),
                              "loss": torch.tensor(0.5)})  # fmt: skip
    assert "--key; tensors are at: G, D." in fails(tmp_path, *FILES, "-o", "two.pt")


def test_yolo_files_stripped_of_their_ema(tmp_path: Path) -> None:
    """Under --ema a stripped file is left out of a folder; by name it is refused with a remedy."""
    for n, name in enumerate(("epoch0", "epoch1", "best", "last")):
        stripped = n > 1
        tree = {"epoch": -1 if stripped else n, "best_fitness": 0.5, "optimizer": None,
                "model": network(n + 10).half() if stripped else None,
                "ema": None if stripped else network(n + 10).half(),
                "train_args": {"lr0": 0.01}}  # fmt: skip
        torch.save(tree, tmp_path / f"{name}.pt")
    expected = [dict(network(n + 10).half().state_dict()) for n in range(2)]
    found = averaged(tmp_path, ".", "--ema", out="out.ckpt")
    assert any("left out" in note and "best.pt, last.pt" in note for note in found.notes)
    assert oracle.same_bits(found.tensors["0.weight"], mean(expected))
    (tmp_path / "out.ckpt").unlink()
    arguments = ["epoch0.pt", "epoch1.pt", "best.pt", "last.pt", "--ema"]
    line = fails(tmp_path, *arguments, "-o", "out.ckpt")
    remedy = re.search(r"(--exclude .+?) leaves? (it|them) out", line)
    assert remedy, line
    arguments += shlex.split(remedy[1])
    made = averaged(tmp_path, *arguments, out="out.ckpt").tensors
    assert oracle.same_bits(made["0.weight"], mean(expected))


# C: BatchNorm in place, in a file that holds an average too -----------------------------------

MODULE = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
torch.manual_seed(0)
loader = [torch.randn(16, 3) for _ in range(4)]
"""
BN = ["--recompute-bn", "--data", "mod.py:loader"]


def test_in_place_batchnorm_of_a_kept_wrapper_with_an_average(tmp_path: Path) -> None:
    """The record says which slot the mean is in; --ema says it too; the other slot stays."""
    (tmp_path / "mod.py").write_text(MODULE)
    save(tmp_path, lambda n: {"state_dict": RAW[n], "state_dict_ema": EMA[n], "epoch": n})
    averaged(tmp_path, *FILES, "--keep-wrapper", "--ema")
    before = torch.load(tmp_path / "out.pt")
    for more in ([], ["--ema"]):
        (tmp_path / "again.pt").write_bytes((tmp_path / "out.pt").read_bytes())
        ended = run(tmp_path, *BN, *more, "-o", "again.pt")
        assert ended.returncode == 0, ended.stderr
        made = torch.load(tmp_path / "again.pt")
        name = "1.running_mean"
        assert not torch.equal(made["state_dict_ema"][name], before["state_dict_ema"][name])
        assert oracle.same_bits(made["state_dict"][name], before["state_dict"][name])


def test_in_place_batchnorm_of_a_file_that_has_the_average_alone(tmp_path: Path) -> None:
    """YOLO's files have no other weights than the EMA: --ema finds it, in place as before."""
    (tmp_path / "mod.py").write_text(MODULE)
    save(tmp_path, lambda n: {"model": None, "ema": EMA[n], "best_fitness": 0.1, "epoch": n})
    line = fails(tmp_path, *FILES, "-o", "out.pt")
    assert "only averaged weights, at ema. Use them with --ema" in line
    averaged(tmp_path, *FILES, "--keep-wrapper", "--ema")
    for more in ([], ["--ema"]):
        ended = run(tmp_path, *BN, *more, "-o", "out.pt")
        assert ended.returncode == 0, ended.stderr
    assert torch.load(tmp_path / "out.pt")["ema"]["1.num_batches_tracked"] == 4


def test_going_on_from_a_bare_average_of_averages(tmp_path: Path) -> None:
    """--ema says where the checkpoints have their average; an output of ours has its own place."""
    save(tmp_path, lambda n: {"state_dict": RAW[n], "state_dict_ema": EMA[n], "epoch": n})
    quietly(tmp_path, *FILES[:2], "--ema", "-o", "base.pt")
    quietly(tmp_path, FILES[2], "--ema", "--start-from", "base.pt", "-o", "out.pt")
    torch.testing.assert_close(torch.load(tmp_path / "out.pt")["0.weight"], mean(EMA))


# Other places of the two -----------------------------------------------------------------------

PLACES: dict[str, tuple[Callable[[int], Tree], str, str]] = {
    "beside the model, not at the top": (
        lambda n: {"state": {"model": RAW[n], "ema": EMA[n]}}, "state.model", "state.ema",
    ),
    "in camel case": (lambda n: {"model": RAW[n], "modelEMA": EMA[n]}, "model", "modelEMA"),
    "under other names": (
        lambda n: {"weights": RAW[n], "weights_avg": EMA[n]}, "weights", "weights_avg",
    ),
    "in a trainer": (
        lambda n: {"trainer": {"net": RAW[n], "net_ema": EMA[n]}}, "trainer.net", "trainer.net_ema",
    ),
    "in a wrapper": (
        lambda n: {"model": RAW[n], "ema": {"module": EMA[n], "updates": n}}, "model", "ema.module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES)
def test_average_at_other_places(case: tuple[Any, str, str], tmp_path: Path) -> None:
    """It is said, --ema takes it, and a kept wrapper asks which of the two is replaced."""
    make, raw, average = case
    save(tmp_path, make)
    done = averaged(tmp_path, *FILES)
    assert oracle.same_bits(done.tensors["0.weight"], mean(RAW))
    assert any(f"also contains averaged weights, at {average}" in note for note in done.notes)
    done = averaged(tmp_path, *FILES, "--ema", "-f")
    assert oracle.same_bits(done.tensors["0.weight"], mean(EMA))
    line = fails(tmp_path, *FILES, "--keep-wrapper", "-o", "kept.pt")
    assert f"has raw weights at {raw} and an average at {average}" in line
    for option, place, states in (("--ema", average, EMA), ("--no-ema", raw, RAW)):
        quietly(tmp_path, *FILES, "--keep-wrapper", option, "-o", "kept.pt")
        found = torch.load(tmp_path / "kept.pt", weights_only=True)
        for name in place.split("."):
            found = found[name]
        assert oracle.same_bits(found["0.weight"], mean(states))


@pytest.mark.parametrize("half", ["ema", "no-ema"])
def test_kept_file_with_both_in_one_state_dict(half: str, tmp_path: Path) -> None:
    """Stable Diffusion's model_ema and the like: one of them is replaced, the other stays."""
    save(
        tmp_path,
        lambda n: {"state_dict": {**under("net.", RAW[n]), **under("net_ema.", EMA[n])}},
    )
    quietly(tmp_path, *FILES, "--keep-wrapper", f"--{half}", "-o", "kept.pt")
    found = torch.load(tmp_path / "kept.pt", weights_only=True)["state_dict"]
    wanted = (RAW[2]["0.weight"], mean(EMA)) if half == "ema" else (mean(RAW), EMA[2]["0.weight"])
    assert oracle.same_bits(found["net.0.weight"], wanted[0])
    assert oracle.same_bits(found["net_ema.0.weight"], wanted[1])


def test_average_of_one_of_several_models(tmp_path: Path) -> None:
    """A GAN's g, d and g_ema: neither half is passed over, and each remedy works."""
    save(tmp_path, lambda n: {"g": RAW[n], "d": under("d.", RAW[n]), "g_ema": EMA[n]})
    line = fails(tmp_path, *FILES, "-o", "x.pt")
    assert line.endswith(
        "tensors are at: g, d. To take several as one model, repeat --key. --ema takes the average "
        "at g_ema."
    )
    done = averaged(tmp_path, *FILES, "--key", "g")
    assert oracle.same_bits(done.tensors["0.weight"], mean(RAW))
    done = averaged(tmp_path, *FILES, "--ema", "-f")
    assert oracle.same_bits(done.tensors["0.weight"], mean(EMA))
    (note,) = done.notes
    assert note.startswith("epoch_2.pt: d: weights beside g_ema; not averaged (")
    keys = shlex.split(note.partition("use ")[2].removesuffix(")"))
    done = averaged(tmp_path, *FILES, *keys, "-f")
    assert oracle.same_bits(done.tensors["d.d.0.weight"], mean(RAW))


def test_average_without_dots_in_a_dict_of_its_own(tmp_path: Path) -> None:
    """LitEma's names are given back the dots of the model, and the model loads the mean."""
    save(tmp_path, lambda n: {"model": RAW[n], "model_ema": {
        "decay": torch.tensor(0.9), "num_updates": torch.tensor(n),
        **{name.replace(".", ""): value for name, value in EMA[n].items()}}})  # fmt: skip
    done = averaged(tmp_path, *FILES, "--ema")
    network(0).load_state_dict(done.tensors, strict=True)
    assert oracle.same_bits(done.tensors["0.weight"], mean(EMA))
    quietly(tmp_path, *FILES, "--ema", "--keep-wrapper", "-o", "kept.pt")
    kept = torch.load(tmp_path / "kept.pt", weights_only=True)["model_ema"]
    assert oracle.same_bits(kept["0weight"], mean(EMA)) and len(kept) == len(EMA[0]) + 2


def test_state_of_ema_pytorch_beside_its_model(tmp_path: Path) -> None:
    """The trainers of lucidrains save `ema`, which holds both halves, beside `model`."""
    for number in (1, 2):
        halves = {f"{half}.a": torch.full((2,), scale * number)
                  for half, scale in (("online_model", 1.0), ("ema_model", 10.0))}  # fmt: skip
        ema = {"initted": torch.tensor(True), "step": torch.tensor(number), **halves}
        saved = {"step": number, "model": {"a": halves["online_model.a"]}, "ema": ema}
        torch.save(saved, tmp_path / f"model-{number}.pt")
    done = averaged(tmp_path, "model-1.pt", "model-2.pt", "--ema")
    assert done.tensors.keys() == {"a"} and done.tensors["a"].tolist() == [15.0, 15.0]
    assert done.notes == ()


def test_average_of_a_lightning_callback(tmp_path: Path) -> None:
    """An EMA callback keeps its average in its own state; Lightning loads the raw weights."""
    for number in (1, 2):
        average = {"ema_state_dict": {"a": torch.full((2,), 10.0 * number)}, "ready": True}
        saved = {
            "pytorch-lightning_version": "1.9.0",
            "epoch": number,
            "state_dict": {"a": torch.full((2,), float(number))},
            "callbacks": {"EMA": average},
        }
        torch.save(saved, tmp_path / f"epoch={number}.ckpt")
    names = ("epoch=1.ckpt", "epoch=2.ckpt")
    done = averaged(tmp_path, *names)
    assert done.tensors["a"].tolist() == [1.5, 1.5]
    assert [note for note in done.notes if "callbacks.EMA.ema_state_dict; not used" in note]
    (tmp_path / "out.pt").unlink()
    assert averaged(tmp_path, *names, "--ema").tensors["a"].tolist() == [15.0, 15.0]
