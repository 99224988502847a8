"""BatchNorm of averages that are copies of the last checkpoint: folders of frameworks, `.nemo`.

The statistics belong to the weights that were averaged, wherever `--key` or `--ema` found them,
and equal those of torch's `update_bn` for these weights.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folders
import pytest
import torch
import torch.distributed.checkpoint as dcp
from command import run
from folders import COPIED, Weights, members
from safetensors.torch import load_file
from stored import content
from torch import nn
from torch.optim.swa_utils import update_bn

MODULE = """
import torch
from torch import nn

numbers = torch.Generator().manual_seed(5)
loader = [torch.randn(16, 3, generator=numbers) * 2 + 1 for _ in range(3)]

def model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
"""
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's loader of folders
USER: dict[str, Any] = {}
exec(MODULE, USER)


def states(seed: int) -> list[Weights]:
    """Return three states of the user's model, with statistics that fit none of them."""
    found = []
    for number in range(3):
        torch.manual_seed(seed + number)
        made = USER["model"]()
        made[1].running_mean.normal_()
        made[1].running_var.uniform_(0.5, 2)
        found.append(dict(made.state_dict()))
    return found


MODEL, OTHER = states(10), states(20)


def expected(of: list[Weights]) -> Weights:
    """Return the mean of the weights, with the statistics that `update_bn` computes for it."""
    model = USER["model"]()
    mean = {k: torch.stack([one[k].double() for one in of]).mean(0).float() for k in of[0]}
    model.load_state_dict(mean | {"1.num_batches_tracked": torch.tensor(0)})
    update_bn(USER["loader"], model)
    return dict(model.state_dict())


def under(prefix: str, state: Weights) -> Weights:
    return {prefix + name: value for name, value in state.items()}


@dataclass(frozen=True)
class Case:
    """Checkpoints with the user's model in them, and with another place for weights.

    Attributes:
        kind: The framework.
        saved: What is saved as the model of the framework, for each number.
        options: How the model is found.
        made: Reads the averaged model from an output.
        other: Reads what is not averaged, or None.
        beside: Further entries of the file of weights.
    """

    kind: str
    saved: Callable[[int], Weights]
    options: tuple[str, ...]
    made: Callable[[Path], Any]
    other: Callable[[Path], Any] | None = None
    beside: Callable[[int], dict[str, Any]] | None = None


def load(path: Path, *keys: str) -> Any:
    found = torch.load(path, weights_only=False)
    for key in keys:
        found = found[key]
    return found


def within(state: Weights, prefix: str) -> Weights:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def of_nemo(path: Path) -> Weights:
    data = members(path)["./model_weights.ckpt"]
    return dict(torch.load(io.BytesIO(data), weights_only=True))


def of_ranks(path: Path) -> Weights:
    """Return what `dcp.load` gives."""
    metadata = pickle.loads((path / "weights/.metadata").read_bytes())
    found = {
        name.removeprefix("model."): torch.zeros(described.size, dtype=described.properties.dtype)
        for name, described in metadata.state_dict_metadata.items()
    }
    dcp.load({"model": found}, checkpoint_id=path / "weights")
    return found


DEEPSPEED = "pytorch_model/mp_rank_00_model_states.pt"
MEGATRON = "mp_rank_00/model_optim_rng.pt"


def both(number: int) -> Weights:
    return under("net.", MODEL[number]) | under("old.", OTHER[number])


CASES = {
    "deepspeed": Case(
        "deepspeed", MODEL.__getitem__, (), lambda out: load(out / DEEPSPEED, "module"),
    ),
    "deepspeed, --ema": Case(
        "deepspeed", OTHER.__getitem__, ("--ema",), lambda out: load(out / DEEPSPEED, "ema"),
        lambda out: load(out / DEEPSPEED, "module"), lambda number: {"ema": MODEL[number]},
    ),
    "megatron, --key": Case(
        "megatron", both, ("--key", "model.net"),
        lambda out: within(load(out / MEGATRON, "model"), "net."),
        lambda out: within(load(out / MEGATRON, "model"), "old."),
    ),
    "speechbrain, --key": Case(
        "speechbrain", MODEL.__getitem__, ("--key", "model"), lambda out: load(out / "model.ckpt"),
    ),
    "litgpt": Case(
        "litgpt", MODEL.__getitem__, (), lambda out: load(out / "lit_model.pth", "model"),
    ),
    "accelerate, --key": Case(
        "accelerate", lambda n: {k: v - 1 for k, v in MODEL[n].items()},
        ("--key", "model_1", "--keep-wrapper"),
        lambda out: load_file(out / "model_1.safetensors"),
        lambda out: {k: v + 1 for k, v in load_file(out / "model.safetensors").items()},
    ),
    "ranks": Case("ranks", MODEL.__getitem__, ("--keep-wrapper",), lambda out: of_ranks(out)),
    "ranks, --key": Case(
        "ranks", both, ("--keep-wrapper", "--key", "model.net"),
        lambda out: within(of_ranks(out), "net."), lambda out: within(of_ranks(out), "old."),
    ),
    "nemo": Case("nemo", MODEL.__getitem__, (), of_nemo),
    "nemo, --key": Case(
        "nemo", both, ("--key", "net"), lambda out: within(of_nemo(out), "net."),
        lambda out: within(of_nemo(out), "old."),
    ),
}  # fmt: skip


def write(folder: Path, case: Case) -> list[str]:
    save, name = COPIED[case.kind]
    paths = [folder / name.format(number) for number in range(1, 4)]
    for number, path in enumerate(paths):
        save(path, case.saved(number), number)
        if case.beside:
            file = path / DEEPSPEED
            torch.save(load(file) | case.beside(number), file)
    return [path.name for path in paths]


@pytest.mark.parametrize("name", CASES)
def test_statistics_belong_to_the_weights_that_were_averaged(name: str, tmp_path: Path) -> None:
    """Computed with the average or afterwards in place; nothing else in the copy changes."""
    case = CASES[name]
    (tmp_path / "mod.py").write_text(MODULE)
    inputs = write(tmp_path, case)
    bn = ["--recompute-bn", "--data", "mod:loader", "--bn-estimator", "torch", "--device", "cpu"]
    one, two = ("one.nemo", "two.nemo") if case.kind == "nemo" else ("one", "two")
    ended = run(tmp_path, *inputs, "-o", one, *case.options, *bn)
    assert ended.returncode == 0, ended.stderr
    assert run(tmp_path, *inputs, "-o", two, *case.options).returncode == 0
    # The record of the average says where its weights are.
    ended = run(tmp_path, "-o", two, *bn)
    assert ended.returncode == 0, ended.stderr
    wanted, last = expected(MODEL), tmp_path / inputs[-1]
    for output in (tmp_path / one, tmp_path / two):
        made = case.made(output)
        assert made.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(made[key], value, rtol=1e-6, atol=1e-6)
        if case.other:
            before, after = case.other(last), case.other(output)
            assert all(torch.equal(before[key], after[key]) for key in before)
        said = json.loads(run(tmp_path, "--show", output.name, "--json").stdout)
        assert said["batchnorm"] == {"estimator": "torch", "batches": 3, "samples": 48}
    if case.kind == "nemo":
        found, copied = members(tmp_path / two), members(last)
        same = [member for member in copied if found[member] == copied[member]]
        assert len(same) == len(copied) - 1
        return
    found, copied = content(tmp_path / two), content(last)
    assert content(tmp_path / one).keys() == found.keys() <= {*copied, "swa_avg.json"}
    changed = {file for file in found if found[file] != copied.get(file)}
    assert "swa_avg.json" in changed
    assert len(changed) == 2 or all(file.endswith((".distcp", ".json")) for file in changed)


def test_several_models_need_one_for_batchnorm(tmp_path: Path) -> None:
    """Two models at once are no model of the user; with --key in place one of them is."""
    (tmp_path / "mod.py").write_text(MODULE)
    for number in (1, 2):
        folders.save_accelerate(tmp_path / f"checkpoint_{number}", MODEL[number], number)
    bn = ["--recompute-bn", "--data", "mod:loader", "--device", "cpu"]
    inputs = ["checkpoint_1", "checkpoint_2"]
    ended = run(tmp_path, *inputs, "-o", "swa", *bn)
    assert ended.returncode == 1 and "do not match" in ended.stderr
    assert not (tmp_path / "swa").exists()
    assert run(tmp_path, *inputs, "-o", "swa").returncode == 0
    before = load_file(tmp_path / "swa/model.safetensors")
    ended = run(tmp_path, "-o", "swa", "--key", "model_1", *bn)
    assert ended.returncode == 0, ended.stderr
    after = load_file(tmp_path / "swa/model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    made = USER["model"]()
    other = load_file(tmp_path / "swa/model_1.safetensors")
    made.load_state_dict(other)
    assert isinstance(made[0], nn.Linear)
    seen = made[0](torch.cat(USER["loader"]))
    torch.testing.assert_close(other["1.running_mean"], seen.mean(0))
