"""Every remedy works, where a note on an average that succeeded tells what else can be done."""

from __future__ import annotations

from pathlib import Path

import folders
import pytest
import torch
from command import load
from remedies import MODEL, Build, Case, check, of_net, several, users, weights

import swa_avg


def holds(name: str, value: float, key: str = "") -> Build:
    """Return what checks the weights at a place of an output."""

    def look(folder: Path) -> None:
        with swa_avg.open_checkpoint(folder / name, *([key] if key else [])) as checkpoint:
            assert (checkpoint.read("a.weight") == value).all()

    return look


def both_models(folder: Path) -> None:
    found = load(folder / "both.pt")
    means = [found[name].unique().tolist() for name in ("a.weight", "critic.a.weight")]
    assert means == [[1.5], [5.5]]


def frozen(n: int) -> dict[str, torch.Tensor]:
    """Return weights of `Net`; it has a second layer, whose statistics stay as they are."""
    named = {name.replace("bn.", "frozen."): value for name, value in of_net(n).items()}
    named["frozen.num_batches_tracked"] = torch.tensor(7)
    return {**of_net(n), **named, "bn.running_mean": torch.full((2,), float(n))}


def engines(folder: Path) -> None:
    for n in (1, 2):
        folders.save_deepspeed(folder / f"run/checkpoint-{n}", weights(n), n)


def of_fsdp(folder: Path) -> None:
    boxes: dict[str, list[folders.Box]] = {"a.weight": [((0, 0), (2, 3))], "a.bias": [((0,), (2,))]}
    for n in (1, 2):
        home = folder / f"run/checkpoint_{n}"
        folders.save_chunks(home / "pytorch_model_fsdp_0", weights(n), boxes)
        (home / "random_states_0.pkl").write_bytes(b"random")


OPTIMIZER = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
NOTES: dict[str, Case] = {
    "layers that may be frozen": Case(
        users(MODEL, "Net = type('Net', (Net,), {'__init__': lambda self: (",
              "    nn.Sequential.__init__(self, OrderedDict(a=nn.Linear(3, 2),",
              "    bn=nn.BatchNorm1d(2), frozen=nn.BatchNorm1d(2))), None)[1]})", "model = Net",
              **several(frozen)),
        "1.pt 2.pt", r"frozen: .+ so the layers may be frozen; (--recompute-bn) recomputes them ",
        ("1.pt 2.pt {0} --data mod:loader",), 1.5, notes=True,
    ),
    "optimizer state": Case(
        engines, "run -o out", r"optimizer state; not copied without (--keep-wrapper)$",
        ("$ rm -r out", "run {0} -o kept", f"$ test -f kept/pytorch_model/{OPTIMIZER}",
         holds("kept", 1.5)), notes=True,
    ),
    "a sub-folder": Case(
        of_fsdp, "run -o out", r"(--keep-wrapper) keeps it there$",
        ("run {0} -o kept", "$ test -f kept/pytorch_model_fsdp_0/.metadata", holds("kept", 1.5)),
        notes=True,
    ),
    "the framework's file": Case(
        several(lambda n: {"state_dict": weights(n), "pytorch-lightning_version": "2.5",
                           "epoch": n}),
        "1.pt 2.pt", r"needs the framework's whole file, which (--keep-wrapper) writes$",
        ("1.pt 2.pt {0} -o kept.pt", holds("kept.pt", 1.5, "state_dict")), notes=True,
    ),
    "weights beside the model": Case(
        several(lambda n: {"model": weights(n), "critic": weights(n + 4)}), "1.pt 2.pt",
        r"to average them with it, use (--key \S+ --key \S+)\)",
        ("1.pt 2.pt {0} -o both.pt", both_models), notes=True,
    ),
    "another file of weights": Case(
        {f"{n}/{name}.safetensors": n + add for n in (1, 2)
         for name, add in (("model", 0), ("other", 4))}, "1 2 -o out.pt",
        r"(\S+\.safetensors): other weights; not read \(to average them, give this file of each ",
        ("1/{0} 2/{0} -o other.pt",), 5.5, notes=True,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NOTES)
def test_remedies_in_notes(name: str, tmp_path: Path) -> None:
    check(NOTES[name], tmp_path)
