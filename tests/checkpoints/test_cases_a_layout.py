"""CASES.md A: which tensors are the model's, where a file holds an average or an optimizer too.

Each situation is run through the real command; each remedy that a line prints is followed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import torch.distributed.checkpoint as dcp
from command import averaged, fails, load, run
from safetensors.torch import save_file
from torch import nn

Tree = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def weights(seed: int) -> Tree:
    return dict(network(seed).state_dict())


def under(prefix: str, state: Tree) -> Tree:
    return {prefix + name: value for name, value in state.items()}


def mean(states: list[Tree]) -> Tree:
    return {name: oracle.mean([state[name] for state in states]) for name in states[0]}


def same(found: Tree, expected: Tree) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert oracle.same_bits(found[name], value), name


RAW = [weights(n) for n in range(3)]
EMA = [weights(n + 10) for n in range(3)]


def save(folder: Path, make: Any, suffix: str = "pt") -> None:
    for n in range(3):
        torch.save(make(n), folder / f"epoch_{n}.{suffix}")


# Optimizer state beside weights ---------------------------------------------------------------


def moments(state: Tree, prefix: str) -> Tree:
    """Adam's state under the names of the parameters, as get_optimizer_state_dict flattens it."""
    kept = {f"{prefix}state.{name}.exp_avg": value.clone() for name, value in state.items()}
    kept |= {f"{prefix}state.{name}.exp_avg_sq": value.square() for name, value in state.items()}
    kept |= {f"{prefix}state.{name}.step": torch.tensor(3.0) for name in state}
    return kept | {f"{prefix}param_groups.{name}.lr": torch.tensor(0.1) for name in state}


def megatron(state: Tree, prefix: str) -> Tree:
    """As Megatron-core's distributed optimizer names it: the kind first, then the parameter."""
    kept = {}
    for kind in ("exp_avg", "exp_avg_sq", "fp32_param"):
        kept |= under(f"{prefix}state.{kind}.", {name: v.clone() for name, v in state.items()})
    return kept


GROUPS = {
    "decoder.layers.0.weight": torch.rand(3, 4),
    "decoder.layers.0.bias": torch.rand(3),
    "embedding.word_embeddings.weight": torch.rand(5, 3),
    "output_layer.weight": torch.rand(5, 3),
}
CHUNKS = {"model0.decoder.weight": torch.rand(3), "model1.output_layer.weight": torch.rand(5)}


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        (GROUPS, lambda state: megatron(state, "chained_0.optimizer.")
         | megatron(state, "chained_1.optimizer.")),
        (GROUPS, lambda state: megatron(state, "optimizer.")),
        (GROUPS, lambda state: moments(state, "optim.")),
        (CHUNKS, lambda state: moments(state, "optimizer.")),
        (GROUPS, lambda state: {f"optim.state.{name}.sum": v for name, v in state.items()}),
        (GROUPS, lambda state: {f"{name}.exp_avg": v.clone() for name, v in state.items()}),
    ],
    ids=["chained_0.optimizer", "optimizer", "optim", "model0", "Adagrad", "below its parameter"],
)  # fmt: skip
def test_dcp_optimizer_beside_weights(model: Tree, kept: Any, tmp_path: Path) -> None:
    """Top-level groups are one model, the optimizer's names are left out and said; loads back."""
    states = [{name: value + n for name, value in model.items()} for n in range(3)]
    for n, state in enumerate(states):
        dcp.save(dict(state) | kept(state), checkpoint_id=tmp_path / f"step_{n}")
    made = averaged(tmp_path, *(f"step_{n}" for n in range(3)))
    same(made.tensors, mean(states))
    assert any("optimizer state; not read" in note for note in made.notes), made.notes
    assert run(tmp_path, "step_0", "step_1", "step_2", "-o", "mean").returncode == 0
    target = {name: torch.empty_like(value) for name, value in model.items()}
    dcp.load(target, checkpoint_id=tmp_path / "mean")
    same(target, mean(states))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_optimizer_names_in_a_flat_state_dict(suffix: str, tmp_path: Path) -> None:
    """Adam's moments are neither averaged nor written, in whatever file; the note says so."""
    for n, state in enumerate(RAW):
        flat = dict(state) | moments(state, "optimizer.")
        if suffix == "pt":
            torch.save(flat, tmp_path / f"{n}.pt")
        else:
            save_file(flat, tmp_path / f"{n}.safetensors")
    made = averaged(tmp_path, f"0.{suffix}", f"1.{suffix}", f"2.{suffix}", out=f"out.{suffix}")
    assert made.tensors.keys() == RAW[0].keys()
    assert any("optimizer: optimizer state" in note for note in made.notes), made.notes


def test_submodules_that_are_called_like_optimizers(tmp_path: Path) -> None:
    """A name is no proof: `optimizer_head` and `model.optim` have weights, and are averaged."""
    names = ("optimizer_head.weight", "optimizer.weight", "optim.0.weight", "opt.state_proj.weight",
             "norm.exp_avg", "model.optimizer.net.weight")  # fmt: skip
    states = [{name: torch.rand(3, 2) for name in names} for _ in range(3)]
    save(tmp_path, lambda n: states[n])
    same(averaged(tmp_path, "epoch_0.pt", "epoch_1.pt", "epoch_2.pt").tensors, mean(states))
    # Beside `model.` a top-level `optim.` is an optimizer, so that names go without `model.` here.
    states = [{n: value for n, value in state.items() if n[:6] != "model."} for state in states]
    for n, state in enumerate(states):
        dcp.save(dict(state), checkpoint_id=tmp_path / f"step_{n}")
    same(averaged(tmp_path, "step_0", "step_1", "step_2", "--force").tensors, mean(states))


def test_optimizer_dict_within_the_model(tmp_path: Path) -> None:
    """An optimizer's own state_dict inside the model's is left out, and the note says so."""

    def make(n: int) -> Tree:
        model = network(n)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(2, 3)).sum().backward()
        optimizer.step()
        return {"model": dict(RAW[n]) | {"optimizer": optimizer.state_dict()}}

    save(tmp_path, make)
    made = averaged(tmp_path, "epoch_0.pt", "epoch_1.pt", "epoch_2.pt")
    same(made.tensors, mean(RAW))
    assert any("optimizer: optimizer state" in note for note in made.notes), made.notes


# Raw weights and an average in one state_dict -------------------------------------------------


def test_ema_pytorch_state(tmp_path: Path) -> None:
    """--ema and --no-ema write one half under the model's names; with neither, both are averaged.

    `--key` takes a prefix of the names as well.
    """
    ema_pytorch = pytest.importorskip("ema_pytorch")
    wrapped = []
    for n in range(3):
        ema = ema_pytorch.EMA(network(n), beta=0.9, update_after_step=0, update_every=1)
        ema.update()
        ema.ema_model.load_state_dict(EMA[n])
        wrapped.append(ema)
        torch.save(ema.state_dict(), tmp_path / f"epoch_{n}.pt")
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    same(averaged(tmp_path, *files, "--ema").tensors, mean(EMA))
    same(averaged(tmp_path, *files, "--no-ema", "--force").tensors, mean(RAW))
    same(averaged(tmp_path, *files, "--key", "ema_model", "--force").tensors, mean(EMA))
    network(0).load_state_dict(load(tmp_path / "out.pt"), strict=True)
    both = averaged(tmp_path, *files, "--force")
    assert any("ema_model is an average of online_model" in note for note in both.notes)
    ema.load_state_dict(load(tmp_path / "out.pt"), strict=True)
    same(dict(ema.ema_model.state_dict()), mean(EMA))
    same(dict(ema.online_model.state_dict()), mean(RAW))


@pytest.mark.parametrize(
    "average",
    [
        lambda n: {"initted": torch.tensor(True), "step": torch.tensor(n)}
        | under("online_model.", RAW[n]) | under("ema_model.", EMA[n]),
        lambda n: {"initted": torch.tensor(True), "step": torch.tensor(n)}
        | under("ema_model.", EMA[n]),
        lambda n: {"module": EMA[n], "updates": n},
        lambda n: {"decay": 0.9, "shadow": EMA[n]},
        lambda n: {"n_averaged": torch.tensor(n)} | under("module.", EMA[n]),
    ],
    ids=["ema_pytorch", "ema_pytorch alone", "RT-DETR", "shadow", "AveragedModel"],
)  # fmt: skip
def test_average_in_a_wrapper_of_its_own(average: Any, tmp_path: Path) -> None:
    """`{'model': …, 'ema': state of a wrapper}`: --ema takes the weights in it, no counters."""
    save(tmp_path, lambda n: {"step": n, "model": RAW[n], "opt": {}, "ema": average(n)})
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    same(averaged(tmp_path, *files, "--ema").tensors, mean(EMA))
    same(averaged(tmp_path, *files, "--no-ema", "--force").tensors, mean(RAW))


@pytest.mark.parametrize(
    ("raw", "average", "counters"),
    [
        ("net.", "net_ema.", ()),
        ("model.", "ema.module.", ("ema.n_averaged",)),
        ("model.", "ema_model.module.", ("ema_model.n_averaged",)),
        ("net.", "ema.ema_model.", ("ema.initted", "ema.step")),
        ("", "_ema.", ()),
    ],
)
def test_average_beside_its_model_in_one_module(
    raw: str, average: str, counters: tuple[str, ...], tmp_path: Path
) -> None:
    """A module that keeps an average in itself: --ema puts it under the model's own names."""
    counted = {name: torch.tensor(4) for name in counters}
    copy = under("ema.online_model.", RAW[0]) if "ema.step" in counters else {}
    head = {"head.weight": torch.ones(2, 2)} if raw != "net." else {}
    save(
        tmp_path,
        lambda n: under(raw, RAW[n]) | head | copy | counted | under(average, EMA[n]),
    )
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    same(averaged(tmp_path, *files, "--ema").tensors, under(raw, mean(EMA)) | head)
    same(averaged(tmp_path, *files, "--no-ema", "-f").tensors, under(raw, mean(RAW)) | head)


def test_stable_diffusion_model_ema(tmp_path: Path) -> None:
    """LitEma's names without dots go back under `model.`; frozen parts and buffers stay."""

    def names(state: Tree) -> Tree:
        return {f"diffusion_model.input_blocks.{name}": value for name, value in state.items()}

    def make(n: int) -> Tree:
        dotless = {name.replace(".", ""): value for name, value in names(EMA[n]).items()}
        counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(n)}
        first = {"first_stage_model.weight": torch.ones(2, 3), "scale_factor": torch.tensor(0.2)}
        state = under("model.", names(RAW[n])) | counters | under("model_ema.", dotless) | first
        return {"state_dict": state, "epoch": n, "pytorch-lightning_version": "2"}

    save(tmp_path, make, "ckpt")
    files = ["epoch_0.ckpt", "epoch_1.ckpt", "epoch_2.ckpt"]
    made = averaged(tmp_path, *files, "--ema").tensors
    expected = make(0)["state_dict"] | under("model.", names(mean(EMA)))
    same(made, {name: v for name, v in expected.items() if not name.startswith("model_ema")})
    # The whole file holds the means of both halves, so that ldm's ema_scope() finds its own.
    averaged(tmp_path, *files, "--keep-wrapper", out="kept.ckpt")
    kept = torch.load(tmp_path / "kept.ckpt")["state_dict"]
    for name, value in mean(EMA).items():
        dotless = f"model_ema.diffusion_modelinput_blocks{name.replace('.', '')}"
        assert oracle.same_bits(kept[dotless], value)
    # --key takes a prefix inside of the state_dict.
    found = averaged(tmp_path, *files, "--key", "state_dict.model.diffusion_model", "-f").tensors
    same(found, under("input_blocks.", mean(RAW)))


def test_layers_that_say_average_and_are_none(tmp_path: Path) -> None:
    """A layer called so, of a shape that others have, is no average of them."""
    names = ("q.weight", "k.weight", "ema_proj.weight", "avg_pool.0.weight")
    save(tmp_path, lambda n: {name: torch.rand(3, 3) for name in names})
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    assert list(averaged(tmp_path, *files).tensors) == list(names)
    line = fails(tmp_path, *files, "--ema", "-o", "x.pt")
    assert "has no averaged weights" in line
    averaged(tmp_path, *files, out="x.pt")  # the remedy: without --ema


def test_lists_of_shadow_params_are_refused(tmp_path: Path) -> None:
    """torch_ema's and diffusers' averages have no names; copying them into the model gives some."""
    training_utils = pytest.importorskip("diffusers.training_utils")
    averages = []
    for n in range(3):
        averages.append(training_utils.EMAModel(network(n).parameters()))
        averages[n].shadow_params = [value.clone() for value in EMA[n].values()]
        tree = {"model": RAW[n], "ema": averages[n].state_dict()}
        torch.save(tree, tmp_path / f"epoch_{n}.pt")
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    line = fails(tmp_path, *files, "--ema", "-o", "out.pt")
    assert "a list of tensors without names" in line and "--no-ema" in line
    same(averaged(tmp_path, *files, "--no-ema").tensors, mean(RAW))
    for n in range(3):
        model = network(n)
        averages[n].copy_to(model.parameters())
        torch.save(model.state_dict(), tmp_path / f"copied_{n}.pt")
    made = averaged(tmp_path, *(f"copied_{n}.pt" for n in range(3)), "--force")
    same(made.tensors, mean(EMA))


# Running means ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda n: {"model": RAW[n], "model_avg": EMA[n], "batch_idx_train": 1000 * (n + 1)},
         "icefall"),
        (lambda n: {"epoch": n, "state_dict": RAW[n], "swa_state_dict": EMA[n], "swa_n": n},
         "timgaripov/swa"),
        (lambda n: {"state_dict": RAW[n], "epoch": n, "pytorch-lightning_version": "2",
                    "callbacks": {"StochasticWeightAveraging":
                                  {"n_averaged": n, "average_model_state": EMA[n]}}},
         "Lightning"),
    ],
    ids=["icefall", "timgaripov", "Lightning SWA"],
)  # fmt: skip
def test_means_since_the_start_are_not_averaged(make: Any, name: str, tmp_path: Path) -> None:
    """Several means of the run so far are refused under --ema; both remedies work."""
    save(tmp_path, make)
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    line = fails(tmp_path, *files, "--ema", "-o", "out.pt")
    assert name in line and "--last 1 --ema" in line and "--no-ema" in line
    same(averaged(tmp_path, *files, "--last", "1", "--ema").tensors, EMA[2])
    same(averaged(tmp_path, *files, "--no-ema", "--force").tensors, mean(RAW))


# Nested dicts under the model ------------------------------------------------------------------


def test_megatron_legacy_nested_dicts(tmp_path: Path) -> None:
    """Embeddings and encoder are one state_dict, and the file itself loads back."""

    def make(n: int) -> Tree:
        embedding = {"word_embeddings": {"weight": torch.full((4, 2), 1.0 * n)},
                     "position_embeddings": {"weight": torch.full((3, 2), 2.0 * n)}}  # fmt: skip
        language = {"embedding": embedding, "encoder": RAW[n]}
        return {"args": None, "checkpoint_version": 3.0, "iteration": n,
                "model": {"language_model": language}, "optimizer": {}}  # fmt: skip

    save(tmp_path, make)
    files = ["epoch_0.pt", "epoch_1.pt", "epoch_2.pt"]
    averaged(tmp_path, *files, "--keep-wrapper")
    made = torch.load(tmp_path / "out.pt")["model"]["language_model"]
    assert made["embedding"]["word_embeddings"]["weight"].eq(1).all()
    assert made["embedding"]["position_embeddings"]["weight"].eq(2).all()
    same(made["encoder"], mean(RAW))
    flat = averaged(tmp_path, *files, "--force").tensors
    assert "embedding.position_embeddings.weight" in flat and len(flat) == 2 + len(RAW[0])


def test_megatron_virtual_pipeline(tmp_path: Path) -> None:
    """model0 and model1 are the parts of one model."""
    save(tmp_path, lambda n: {"model0": RAW[n], "model1": EMA[n], "iteration": n, "optimizer": {}})
    made = averaged(tmp_path, "epoch_0.pt", "epoch_1.pt", "epoch_2.pt").tensors
    same(made, under("model0.", mean(RAW)) | under("model1.", mean(EMA)))


def test_dicts_that_hold_each_other(tmp_path: Path) -> None:
    """A small file whose dicts are nested in each other names no endless paths."""
    inner: Tree = {"w": torch.ones(2)}
    for _ in range(7):
        inner = {str(n): inner for n in range(50)}
    torch.save({"model": inner}, tmp_path / "0.pt")
    assert "contain each other" in fails(tmp_path, "0.pt", "-o", "out.pt")
