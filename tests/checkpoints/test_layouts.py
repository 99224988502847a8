"""Where frameworks put the state_dict, and that it is found there.

Each layout is written as the framework writes it, from its own documented
structure; where the framework is installed, by the framework itself.
"""

from __future__ import annotations

import argparse
import copy
import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from command import averaged, run
from torch import nn

import swa_avg
from swa_avg.checkpoints.layout import StateDict, find_state_dict
from swa_avg.errors import LayoutError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.planning.plan import make_plan
from swa_avg.planning.treatments import Rules
from swa_avg.tensors.strided import read_tensor

Tree = dict[str, Any]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


RAW, EMA = network(0).state_dict(), network(1).state_dict()
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}


def under(prefix: str, state: Tree, **others: object) -> Tree:
    return OrderedDict(others) | {prefix + name: value for name, value in state.items()}


def read(state: StateDict) -> dict[str, torch.Tensor]:
    return {name: read_tensor(ref) for name, ref in state.tensors.items()}


def same(found: Tree, expected: Tree) -> bool:
    return list(found) == list(expected) and all(
        oracle.same_bits(found[name], expected[name]) for name in expected
    )


def found_in(tree: object, folder: Path, **options: Any) -> StateDict:
    path = folder / "c.pt"
    torch.save(tree, path)
    return find_state_dict(open_checkpoint(path), **options)


@dataclass(frozen=True)
class Layout:
    """A framework's checkpoint, and what must be read from it."""

    name: str
    tree: Callable[[], object]
    where: str = ""
    ema: str | None = None
    epoch: int | None = None
    step: int | None = None


def lightning(**more: object) -> Tree:
    return {
        "epoch": 3,
        "global_step": 400,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": RAW,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val.loss', 'mode': 'min'}": {
                "monitor": "val.loss",
                "current_score": torch.tensor(0.25),
            }
        },
        "optimizer_states": [OPTIMIZER],
        "lr_schedulers": [],
        "hyper_parameters": {"model": "resnet", "lr": 0.1},
    } | more


def exchanged(raw: Tree, average: Tree) -> tuple[Tree, Tree]:
    """As mmengine's EMAHook leaves them: (state_dict, ema_state_dict)."""
    return dict(average), under("module.", raw, steps=torch.tensor(9))


def mmengine() -> Tree:
    state, ema = exchanged(RAW, EMA)
    meta = {"epoch": 5, "iter": 600, "mmengine_version": "0.10.7", "cfg": "model = dict()"}
    return {"meta": meta, "state_dict": state, "message_hub": {}, "ema_state_dict": ema}


class Member(enum.Enum):
    FIRST = 1


LAYOUTS = [
    Layout("bare", lambda: RAW),
    Layout("data_parallel", lambda: under("module.", RAW)),
    Layout("compiled", lambda: under("_orig_mod.", RAW)),
    Layout("ddp of compiled", lambda: under("module._orig_mod.", RAW)),
    Layout("compiled ddp", lambda: under("_orig_mod.module.", RAW)),
    Layout("AveragedModel", lambda: under("module.", RAW, n_averaged=torch.tensor(4))),
    Layout(
        "timm",
        lambda: {
            "epoch": 7,
            "arch": "resnet18",
            "state_dict": RAW,
            "optimizer": OPTIMIZER,
            "version": 2,
            "args": argparse.Namespace(lr=0.1, model="resnet18"),
            "state_dict_ema": EMA,
            "metric": 71.5,
        },
        "state_dict",
        "state_dict_ema",
        7,
    ),
    Layout(
        "torchvision",
        lambda: {
            "model": RAW,
            "optimizer": OPTIMIZER,
            "lr_scheduler": {"last_epoch": 3},
            "epoch": 2,
            "args": argparse.Namespace(data_path=Path("/data")),
            "model_ema": under("module.", EMA, n_averaged=torch.tensor(4)),
        },
        "model",
        "model_ema",
        2,
    ),
    Layout("Lightning", lightning, "state_dict", None, 3, 400),
    Layout(
        "Lightning StochasticWeightAveraging",
        lambda: lightning(
            callbacks={"StochasticWeightAveraging": {"n_averaged": 2, "average_model_state": EMA}}
        ),
        "state_dict",
        "callbacks.StochasticWeightAveraging.average_model_state",
        3,
        400,
    ),
    Layout(
        "Lightning WeightAveraging",
        lambda: lightning(
            state_dict=EMA,
            current_model_state=RAW,
            averaging_state={"n_averaged": torch.tensor(2)},
        ),
        "current_model_state",
        "state_dict",
        3,
        400,
    ),
    Layout(
        "fairseq",
        lambda: {
            "cfg": argparse.Namespace(task="x"),
            "model": RAW,
            "criterion": {},
            "optimizer_history": [{"num_updates": 10}, {"num_updates": 250}],
            "task_state": {},
            "extra_state": {"train_iterator": {"epoch": 6}, "val_loss": 3.5, "ema": EMA},
            "last_optimizer_state": OPTIMIZER,
        },
        "model",
        "extra_state.ema",
        6,
        250,
    ),
    Layout("ESPnet1", lambda: {"model": RAW, "optimizer": OPTIMIZER}, "model"),
    Layout(
        "icefall",
        lambda: {
            "model": RAW,
            "model_avg": EMA,
            "optimizer": OPTIMIZER,
            "batch_idx_train": 8000,
            "best_valid_epoch": 2,
        },
        "model",
        "model_avg",
        None,
        8000,
    ),
    Layout("mmengine", mmengine, "ema_state_dict", "state_dict", 5, 600),
    Layout(
        "mmengine without EMA",
        lambda: {"meta": {"epoch": 1, "iter": 9, "mmengine_version": "0"}, "state_dict": RAW},
        "state_dict",
        None,
        1,
        9,
    ),
    Layout(
        "ema_state_dict that is the average",
        lambda: {"state_dict": RAW, "ema_state_dict": EMA},
        "state_dict",
        "ema_state_dict",
    ),
    Layout("detectron2", lambda: {"model": RAW, "iteration": 99}, "model", None, None, 99),
    Layout(
        "Composer",
        lambda: {
            "state": {"model": RAW, "timestamp": {"Timestamp": {"epoch": 2, "batch": 50}}},
            "rng": [{"torch": torch.zeros(8, dtype=torch.uint8)}],
        },
        "state.model",
        None,
        2,
        50,
    ),
    Layout(
        "Catalyst",
        lambda: {
            "model_state_dict": RAW,
            "optimizer_state_dict": OPTIMIZER,
            "epoch": 4,
            "loss": 0.5,
        },
        "model_state_dict",
        None,
        4,
    ),
    Layout(
        "timgaripov/swa",
        lambda: {"epoch": 161, "state_dict": RAW, "swa_state_dict": EMA, "swa_n": 1},
        "state_dict",
        "swa_state_dict",
        161,
    ),
    Layout(
        "nanoGPT",
        lambda: {
            "model": under("_orig_mod.", RAW),
            "model_args": {"n_layer": 2},
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.5),
            "config": {},
        },
        "model",
        None,
        None,
        2000,
    ),
    Layout(
        "DeepSpeed",
        lambda: {"module": RAW, "global_steps": 300, "optimizer": None, "dp_world_size": 8},
        "module",
        None,
        None,
        300,
    ),
    Layout("whole module", lambda: network(0)),
    Layout(
        "whole module in a wrapper", lambda: {"model": network(0), "epoch": 1}, "model", None, 1
    ),
    Layout("whole wrapped module", lambda: nn.DataParallel(network(0))),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_each_layout_gives_its_own_weights(layout: Layout, tmp_path: Path) -> None:
    """The state_dict is where the framework puts it, with the plain model's names and order."""
    state = found_in(layout.tree(), tmp_path)
    assert state.where == layout.where
    assert same(read(state), RAW)
    assert (state.epoch, state.step) == (layout.epoch, layout.step)
    assert state.averages == ((layout.ema,) if layout.ema else ())
    assert all(name.startswith(state.prefix + "") for name in state.tensors if not state.prefix)


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if layout.ema], ids=lambda layout: layout.name
)
def test_averaged_weights_are_taken_when_asked_for(layout: Layout, tmp_path: Path) -> None:
    """--ema takes the run's own average, and only that; without it the plan says it is there."""
    state = found_in(layout.tree(), tmp_path, ema=True)
    assert state.where == layout.ema
    assert same(read(state), EMA)
    assert state.averages == ()
    raw = find_state_dict(state.checkpoint)
    assert any("--ema" in note for note in make_plan([raw], Rules()).notes)


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if not layout.ema], ids=lambda layout: layout.name
)
def test_no_averaged_weights_is_said(layout: Layout, tmp_path: Path) -> None:
    """--ema never falls back to the raw weights."""
    with pytest.raises(LayoutError, match="has no averaged weights"):
        found_in(layout.tree(), tmp_path, ema=True)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": RAW, "state_dict": EMA}, r"several state_dicts \(state_dict, model\)"),
        (
            {"model": RAW, "generator": {"0.weight": torch.ones(2)}},
            r"key=\(\"model\", \"generator\"\)",
        ),
        ({"ema": EMA, "epoch": 1}, "only averaged weights, at ema.*ema=True"),
        ({"discriminator": RAW, "generator": EMA}, "discriminator, generator"),
        ({"model": None, "optimizer": None}, "no named tensors"),
        ([1, 2, 3], "no named tensors"),
        ({"state_dict": {3: torch.ones(2)}}, "key that is not a string"),
        ({"model": RAW, "model_ema": EMA, "state_dict_ema": EMA}, None),
    ],
)
def test_ambiguity_is_refused_with_its_remedy(tree: Any, message: str, tmp_path: Path) -> None:
    """Two candidates, or none, are never guessed at: the error lists them and the way out."""
    with pytest.raises(LayoutError, match=message or "state_dict_ema, model_ema"):
        found_in(tree, tmp_path, ema=message is None)


def test_several_keys_make_one_model(tmp_path: Path) -> None:
    """OpenNMT's two dicts become one, named and tied as in its own model."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Embedding(5, 3)
            self.generator = nn.Sequential(nn.Linear(3, 5))
            self.generator[0].weight = self.decoder.weight

    model = Translator()
    whole = model.state_dict()
    rest = {name: value for name, value in whole.items() if not name.startswith("generator")}
    tree = {"model": rest, "generator": model.generator.state_dict(), "vocab": {}, "opt": None}
    state = found_in(tree, tmp_path, keys=("model", "generator"))
    assert same(read(state), whole)
    assert state.where == "model + generator"
    assert state.metadata is not None
    assert state.metadata["generator.0"] == {"version": 1}
    torch.save(tree, tmp_path / "step_2.pt")
    out = tmp_path / "out.pt"
    swa_avg.average([tmp_path / "c.pt", tmp_path / "step_2.pt"], out, key=("model", "generator"))
    loaded = torch.load(out)
    assert loaded["decoder.weight"].data_ptr() == loaded["generator.0.weight"].data_ptr()
    model.load_state_dict(loaded, strict=True)


def test_parts_that_are_no_whole_model_bear_their_place(tmp_path: Path) -> None:
    """Names of several parts stay apart by the places they come from."""
    tree = {"nets": {"encoder": RAW, "decoder": EMA}}
    state = found_in(tree, tmp_path, keys=("nets.encoder", "nets.decoder"))
    assert same(read(state), under("encoder.", RAW) | under("decoder.", EMA))
    tree = {"model": {"a.b": torch.ones(2)}, "a": {"b": torch.ones(2)}}
    with pytest.raises(LayoutError, match=r"has a\.b both at a and"):
        found_in(tree, tmp_path, keys=("model", "a"))


@pytest.mark.parametrize("key", ["a.b.c", "a.list.-1", "a.dotted.name"])
def test_key_walks_dicts_lists_and_dotted_names(key: str, tmp_path: Path) -> None:
    """A path names any place; `a.dotted.name` is also found where it is one name."""
    tree = {"a": {"b": {"c": RAW}, "list": [EMA, RAW], "dotted.name": RAW}}
    assert same(read(found_in(tree, tmp_path, keys=(key,))), RAW)
    with pytest.raises(LayoutError, match=r"no state_dict at 'a\.x'.*a\.b\.c"):
        found_in(tree, tmp_path, keys=("a.x",))


def test_counter_goes_only_with_its_wrapper(tmp_path: Path) -> None:
    """A model's own buffers called n_averaged and steps stay."""
    own = {"weight": torch.ones(2), "n_averaged": torch.tensor(1), "steps": torch.tensor(2)}
    assert same(read(found_in(own, tmp_path)), own)
    wrapped = under("module.", RAW, steps=torch.tensor(2))
    assert same(read(found_in(wrapped, tmp_path)), wrapped)


class Odd(nn.Module):
    """Everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(2))
        self.register_parameter("nothing", None)
        self.register_buffer("kept", torch.rand(3))
        self.register_buffer("passing", torch.rand(3), persistent=False)
        self.register_buffer("empty", None)
        self.body = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.BatchNorm1d(2)})
        self.shared = self.body["a"]
        self.list = nn.ModuleList([nn.Linear(2, 2, bias=False)])
        self.weights = nn.ParameterList([nn.Parameter(torch.rand(2)), nn.Parameter(torch.rand(1))])
        self.plain = torch.rand(4)
        self.member = Member.FIRST
        self.none = None


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_whole_module_gives_its_state_dict(protocol: int, zipped: bool, tmp_path: Path) -> None:
    """Parameters and persistent buffers by path, in state_dict()'s order, ties kept."""
    model = nn.Sequential(Odd(), nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    model = nn.Sequential(Odd(), nn.Linear(2, 2))
    path = tmp_path / "m.pt"
    torch.save(model, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    state = find_state_dict(open_checkpoint(path))
    assert same(read(state), model.state_dict())
    assert state.tensors["0.shared.weight"] == state.tensors["0.body.a.weight"]
    out = tmp_path / "out.pt"
    swa_avg.average([path], out)
    copy.deepcopy(model).load_state_dict(torch.load(out), strict=True)


def test_modules_that_hold_each_other_are_refused(tmp_path: Path) -> None:
    """Paths without end end in a refusal, not in a hang."""
    model = nn.Sequential(nn.Linear(1, 1))
    for _ in range(40):  # 2^40 paths
        model = nn.Sequential(model, model)
    with pytest.raises(swa_avg.SwaAvgError, match="has 524,289 tensors, expected"):
        found_in(model, tmp_path)


# Written by the frameworks themselves ---------------------------------------------------------


def train_with_lightning(folder: Path, *callbacks: Any) -> tuple[Any, list[Path]]:
    """Train a small module for four epochs; return it and its checkpoints."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Small(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = self.net(batch).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Small()
    lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1, monitor="loss"), *callbacks],
    ).fit(model, torch.utils.data.DataLoader(torch.rand(12, 3), batch_size=4))
    return model, sorted(folder.glob("*.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_lightning_itself(tmp_path: Path) -> None:
    """A Trainer's own checkpoints give the module's state_dict, epoch and global step."""
    model, paths = train_with_lightning(tmp_path)
    states = [find_state_dict(open_checkpoint(path)) for path in paths]
    assert [(state.epoch, state.step) for state in states] == [(n, 3 * n + 3) for n in range(4)]
    assert same(read(states[-1]), model.state_dict())
    swa_avg.average(paths, tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    model.load_state_dict(loaded, strict=True)
    of = [torch.load(path, weights_only=False)["state_dict"] for path in paths]
    expected = oracle.mean([state["net.0.weight"] for state in of])
    assert oracle.same_bits(loaded["net.0.weight"], expected)


@pytest.mark.filterwarnings("ignore")
def test_lightning_averages_itself(tmp_path: Path) -> None:
    """Its two averaging callbacks: the raw weights by default, the average with --ema."""
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    for number, callback in enumerate(
        (
            callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1),
            callbacks.WeightAveraging(),
        )
    ):
        _, paths = train_with_lightning(tmp_path / str(number), callback)
        tree = torch.load(paths[-1], weights_only=False)
        if number:
            raw, average = tree["current_model_state"], tree["state_dict"]
        else:
            raw = tree["state_dict"]
            average = tree["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
        assert not oracle.same_bits(raw["net.0.weight"], average["net.0.weight"])
        assert same(read(find_state_dict(open_checkpoint(paths[-1]))), raw)
        assert same(read(find_state_dict(open_checkpoint(paths[-1]), ema=True)), average)


@pytest.mark.filterwarnings("ignore")
def test_mmengine_itself(tmp_path: Path) -> None:
    """With its EMAHook the raw weights are those that the model trains with."""
    hooks = pytest.importorskip("mmengine.hooks")
    from mmengine.runner import Runner
    from mmengine_model import Small

    model = Small(network())
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader={
            "dataset": list(torch.rand(8, 3)),
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        custom_hooks=[hooks.EMAHook(momentum=0.5)],
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
    )
    runner.train()
    path = tmp_path / "epoch_2.pth"
    state = find_state_dict(open_checkpoint(path))
    assert (state.epoch, state.step) == (2, 4)
    assert same(read(state), model.state_dict())
    average = torch.load(path, weights_only=False)["state_dict"]
    assert same(read(find_state_dict(open_checkpoint(path), ema=True)), average)
    assert not oracle.same_bits(average["net.0.weight"], model.state_dict()["net.0.weight"])


@pytest.mark.filterwarnings("ignore")
def test_ignite_itself(tmp_path: Path) -> None:
    """What its Checkpoint handler saves for several objects, and for one."""
    handlers = pytest.importorskip("ignite.handlers")
    from ignite.engine import Engine

    model = network()
    engine = Engine(lambda engine, batch: None)
    engine.state.epoch, engine.state.iteration = 2, 8
    for objects in ({"model": model, "trainer": engine}, {"model": model}):
        folder = tmp_path / str(len(objects))
        handlers.Checkpoint(objects, handlers.DiskSaver(folder), n_saved=None)(engine)
        (path,) = folder.iterdir()
        assert same(read(find_state_dict(open_checkpoint(path))), model.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_averaged_model_of_a_compiled_one(tmp_path: Path) -> None:
    """torch's own wrappers around each other are all undone."""
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(network()))
    state = found_in(averaged.state_dict(), tmp_path)
    assert state.prefix == "module._orig_mod."
    assert same(read(state), RAW)


# From the command line --------------------------------------------------------------------------


def test_command_line_takes_ema_and_several_keys(tmp_path: Path) -> None:
    """`--ema` and a repeated `--key` reach the reading; together they are refused."""
    tree = {"state_dict": RAW, "state_dict_ema": EMA, "head": {"w": torch.ones(2)}}
    torch.save(tree, tmp_path / "c.pt")
    found = averaged(tmp_path, "c.pt", "--ema", out="ema.pt")
    assert same(found.tensors, EMA)
    found = averaged(tmp_path, "c.pt", "--key", "state_dict", "--key", "head", out="both.pt")
    assert same(found.tensors, dict(RAW) | {"head.w": torch.ones(2)})
    ended = run(tmp_path, "c.pt", "-o", "out.pt", "--key", "state_dict", "--ema")
    assert ended.returncode == 2 and "--key or --ema" in ended.stderr


def test_module_that_is_all_its_own_children(tmp_path: Path) -> None:
    """Modules are counted where they are named: a small file cannot ask for much memory."""
    module = nn.Module()
    module._modules.update({str(number): module for number in range(1000)})
    torch.save(module, tmp_path / "m.pt")
    with pytest.raises(swa_avg.SwaAvgError, match="modules within modules"):
        swa_avg.open_checkpoint(tmp_path / "m.pt")
