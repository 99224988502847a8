"""The table of `swa_avg/guide/frameworks.md`: each command is run, and its output loaded.

Where a framework is installed, it writes the files and loads the output; else both are done
as its source does them.
"""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from command import run
from folders import members, save_megatron, save_nemo, save_speechbrain
from safetensors.torch import load_file, save_file
from torch import nn

import swa_avg

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the frameworks, not ours
    pytest.mark.frameworks,
]
State = dict[str, torch.Tensor]
# Writes checkpoints, and returns what the loader takes from the output and the states averaged.
Row = Callable[[Path], Callable[[], tuple[State, list[State]]]]
GUIDE = Path(swa_avg.__file__).parent / "guide" / "frameworks.md"
COMMANDS = {
    cells[1].strip(): cells[3].strip().strip("`")
    for line in GUIDE.read_text(encoding="utf-8").splitlines()
    if len(cells := line.split("|")) == 6 and "`swa-avg" in cells[3]
}
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    return lambda function: ROWS.setdefault(name, function)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


RAW = [dict(network(n).state_dict()) for n in range(3)]
EMA = [dict(network(n + 10).state_dict()) for n in range(3)]


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_of_the_table(name: str, tmp_path: Path) -> None:
    """The command of the table writes what the framework's loader takes for the mean."""
    loaded = ROWS[name](tmp_path)
    ended = run(tmp_path, *shlex.split(COMMANDS[name])[1:])
    assert ended.returncode == 0, ended.stderr
    found, states = loaded()
    assert len(states) > 1
    for key in states[0]:
        if states[0][key].is_floating_point():
            expected = torch.stack([state[key].double() for state in states]).mean(0)
            torch.testing.assert_close(found[key].double(), expected, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(found[key], states[-1][key]) for key in states[0])


def test_each_row_has_its_test() -> None:
    """No command stands in the table that is not run, and none is run that does not."""
    assert set(ROWS) == set(COMMANDS)
    assert len(COMMANDS) >= 12


# By the frameworks themselves -----------------------------------------------------------------


def train_with_lightning(folder: Path, *callbacks: Any) -> tuple[Any, list[Path]]:
    lightning = pytest.importorskip("lightning")

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(3, width)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    from lightning.pytorch.callbacks import ModelCheckpoint

    lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder / "ckpts", save_top_k=-1), *callbacks],
    ).fit(Net(width=5), torch.utils.data.DataLoader(torch.rand(8, 3), batch_size=4))  # fmt: skip
    return Net, sorted((folder / "ckpts").glob("*.ckpt"))


def of_lightning(folder: Path, *callbacks: Any) -> Callable[[], tuple[State, list[State]]]:
    net, files = train_with_lightning(folder, *callbacks)

    def loaded() -> tuple[State, list[State]]:
        made = net.load_from_checkpoint(folder / "swa.ckpt", weights_only=False)
        assert made.hparams["width"] == 5
        return made.state_dict(), [load(file)["state_dict"] for file in files]

    return loaded


@row("Lightning ✓")
def _(folder: Path) -> Any:
    return of_lightning(folder)


@row("Lightning, `WeightAveraging` or `EMAWeightAveraging` ✓")
def _(folder: Path) -> Any:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    return of_lightning(folder, callbacks.EMAWeightAveraging(decay=0.5))


def of_mmengine(folder: Path, hooks: list[Any]) -> Any:
    pytest.importorskip("mmengine")
    from mmengine.runner import Runner, load_checkpoint
    from mmengine_model import Small

    work_dir = folder / "work_dir"
    Runner(
        model=Small(network()),
        work_dir=str(work_dir),
        train_dataloader={
            "dataset": list(torch.rand(8, 3)),
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        },
        train_cfg={"by_epoch": True, "max_epochs": 3},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.3}},
        custom_hooks=hooks,
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        experiment_name=f"guide{len(hooks)}",
    ).train()

    def loaded() -> tuple[State, list[State]]:
        model = Small(network())
        load_checkpoint(model, str(folder / "swa.pth"))
        states = [load(work_dir / f"epoch_{n}.pth")["state_dict"] for n in (1, 2, 3)]
        return model.state_dict(), states

    return loaded


@row("mmengine ✓")
def _(folder: Path) -> Any:
    return of_mmengine(folder, [])


@row("mmengine, `EMAHook` ✓")
def _(folder: Path) -> Any:
    return of_mmengine(folder, [{"type": "EMAHook", "momentum": 0.5}])


def gpt(seed: int) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


@row("transformers ✓")
def _(folder: Path) -> Any:
    models = [gpt(n) for n in range(3)]
    for n, model in enumerate(models):
        model.save_pretrained(folder / f"run/checkpoint-{n}")
    kind, states = type(models[0]), [model.state_dict() for model in models]
    return lambda: (kind.from_pretrained(folder / "swa").state_dict(), states)


@row("PEFT ✓")
def _(folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    states = []
    for n in range(3):
        torch.manual_seed(n)
        config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
        adapted = peft.get_peft_model(gpt(n), config)
        adapted.save_pretrained(folder / f"run/checkpoint-{n}")
        states.append(peft.get_peft_model_state_dict(adapted))

    def loaded() -> tuple[State, list[State]]:
        made = peft.PeftModel.from_pretrained(gpt(0), folder / "swa")
        return peft.get_peft_model_state_dict(made), states

    return loaded


@row("accelerate ✓")
def _(folder: Path) -> Any:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    for n in range(3):
        model = network(n)
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.save_state(str(folder / f"run/checkpoint_{n}"))
        accelerator._models.clear()
        accelerator._optimizers.clear()

    def loaded() -> tuple[State, list[State]]:
        fresh = network(9)
        fresh, _ = accelerator.prepare(fresh, torch.optim.SGD(fresh.parameters(), lr=0.1))
        accelerator.load_state(str(folder / "swa"))
        return fresh.state_dict(), RAW

    return loaded


@row("accelerate, several models ✓")
def _(folder: Path) -> Any:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    models = [network(0), network(1)]
    for model in models:
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for n in range(3):
        for model, states in zip(models, (RAW, EMA), strict=True):
            model.load_state_dict(states[n])
        accelerator.save_state(str(folder / f"run/checkpoint_{n}"))

    def loaded() -> tuple[State, list[State]]:
        for model in models:
            model.load_state_dict(network(9).state_dict())
        accelerator.load_state(str(folder / "swa"))
        found = [under(f"{n}.", dict(model.state_dict())) for n, model in enumerate(models)]
        each = [under("0.", RAW[n]) | under("1.", EMA[n]) for n in range(3)]
        return found[0] | found[1], each

    return loaded


@row("sentence-transformers ✓")
def _(folder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import transformers
    from sentence_transformers import models

    states = []
    for n in range(3):
        torch.manual_seed(n)
        bert = folder / f"bert-{n}"
        config = transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=8, max_position_embeddings=16,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(bert)
        (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
        transformers.BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(bert)
        parts = [models.Transformer(str(bert)), models.Pooling(8), models.Dense(8, 4)]
        made = sentence_transformers.SentenceTransformer(modules=parts, device="cpu")
        made.save(str(folder / f"run/checkpoint-{n}"))
        states.append({name: value.cpu().clone() for name, value in made.state_dict().items()})

    def loaded() -> tuple[State, list[State]]:
        found = sentence_transformers.SentenceTransformer(str(folder / "swa"), device="cpu")
        return found.state_dict(), states

    return loaded


@row("diffusers ✓")
def _(folder: Path) -> Any:
    kind = pytest.importorskip("diffusers").UNet2DModel
    states = []
    for n in range(3):
        for name in ("unet", "unet_ema"):
            torch.manual_seed(n + 10 * (name == "unet"))
            model = kind(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                norm_num_groups=4, block_out_channels=(8, 8),
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            )  # fmt: skip
            model.save_pretrained(folder / f"run/checkpoint-{n}" / name)
        states.append(model.state_dict())
        torch.save({"state": {}}, folder / f"run/checkpoint-{n}/optimizer.bin")
    made = folder / "swa"
    return lambda: (kind.from_pretrained(made, subfolder="unet_ema").state_dict(), states)


@row("Ignite ✓")
def _(folder: Path) -> Any:
    handlers = pytest.importorskip("ignite.handlers")
    from ignite.engine import Engine

    engine = Engine(lambda engine, batch: None)
    for n in range(3):
        engine.state.epoch, engine.state.iteration = n, n
        objects = {"model": network(n), "trainer": engine}
        saver = handlers.DiskSaver(folder / "run", require_empty=False)
        handlers.Checkpoint(objects, saver, n_saved=None)(engine)

    def loaded() -> tuple[State, list[State]]:
        model = network(9)
        handlers.Checkpoint.load_objects({"model": model}, load(folder / "swa.pt"))
        return dict(model.state_dict()), RAW

    return loaded


def of_dcp(folder: Path, pattern: str, where: str, beside: Callable[[State], State]) -> Any:
    for n, state in enumerate(RAW):
        saved = {where: dict(state)} if where else dict(state)
        dcp.save(saved | beside(state), checkpoint_id=folder / "run" / pattern.format(n))

    def loaded() -> tuple[State, list[State]]:
        inner = {name: torch.empty_like(value) for name, value in RAW[0].items()}
        target: Any = {where: inner} if where else inner
        dcp.load(target, checkpoint_id=folder / "swa")
        return inner, RAW

    return loaded


@row("`torch.distributed.checkpoint` (torchtitan, OLMo-core) ✓")
def _(folder: Path) -> Any:
    return of_dcp(folder, "step-{}", "model", lambda state: {"optim": under("exp_avg.", state)})


@row("Megatron-core")
def _(folder: Path) -> Any:
    prefix = "chained_0.optimizer.state.exp_avg."
    return of_dcp(folder, "iter_000{}", "", lambda state: under(prefix, state))


@row("NeMo 2")
def _(folder: Path) -> Any:
    for n, state in enumerate(RAW):
        home = folder / f"run/checkpoints/model--step={n}"
        optimizer = under("optimizer.state.exp_avg.module.", state)
        dcp.save(under("module.", state) | optimizer, checkpoint_id=home / "weights")
        (home / "context").mkdir()
        (home / "context/model.yaml").write_text(f"step: {n}\n")

    def loaded() -> tuple[State, list[State]]:
        inner = under("module.", {name: torch.empty_like(one) for name, one in RAW[0].items()})
        dcp.load(inner, checkpoint_id=folder / "swa/weights")
        assert (folder / "swa/context/model.yaml").read_text() == "step: 2\n"
        return {name.removeprefix("module."): value for name, value in inner.items()}, RAW

    return loaded


@row("LitGPT ✓")
def _(folder: Path) -> Any:
    litgpt = pytest.importorskip("litgpt")
    from litgpt.utils import check_valid_checkpoint_dir, lazy_load, save_config

    config = litgpt.Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, padded_vocab_size=16,
                           block_size=8)  # fmt: skip
    states = []
    for n in range(3):
        home = folder / f"out/step-{n:06d}"
        home.mkdir(parents=True)
        torch.manual_seed(n)
        states.append(dict(litgpt.GPT(config).state_dict()))
        torch.save({"model": states[-1]}, home / "lit_model.pth")
        save_config(config, home)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (home / name).write_text("{}")

    def loaded() -> tuple[State, list[State]]:
        check_valid_checkpoint_dir(folder / "swa")
        model = litgpt.GPT(litgpt.Config.from_file(folder / "swa/model_config.yaml"))
        model.load_state_dict(lazy_load(folder / "swa/lit_model.pth")["model"])
        return dict(model.state_dict()), states

    return loaded


@row("ema_pytorch ✓")
def _(folder: Path) -> Any:
    ema_pytorch = pytest.importorskip("ema_pytorch")
    (folder / "run").mkdir()
    for n in range(3):
        ema = ema_pytorch.EMA(network(n))
        ema.ema_model.load_state_dict(EMA[n])
        torch.save(ema.state_dict(), folder / f"run/step-{n}.pt")

    def loaded() -> tuple[State, list[State]]:
        model = network(9)
        model.load_state_dict(load(folder / "swa.pt"), strict=True)
        return dict(model.state_dict()), EMA

    return loaded


# By hand --------------------------------------------------------------------------------------


@row("`.nemo`")
def _(folder: Path) -> Any:
    for n, state in enumerate(RAW):
        save_nemo(folder / f"nemo/epoch={n}.nemo", state, n)

    def loaded() -> tuple[State, list[State]]:
        data = members(folder / "swa.nemo")["./model_weights.ckpt"]
        return torch.load(io.BytesIO(data), weights_only=True), RAW

    return loaded


@row("DeepSpeed (ZeRO-1, ZeRO-2)")
def _(folder: Path) -> Any:
    name = "mp_rank_00_model_states.pt"
    for n, state in enumerate(RAW):
        home = folder / f"run/global_step{n}"
        home.mkdir(parents=True)
        content = {"module": state, "global_steps": n, "dp_world_size": 1, "ds_version": "0.19.8"}
        torch.save(content, home / name)
        torch.save({}, home / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (folder / "run/latest").write_text("global_step2")
    # deepspeed/runtime/engine.py: _load_checkpoint, load_module_state_dict
    return lambda: (load(folder / "run/swa" / name)["module"], RAW)


@row("Megatron-LM")
def _(folder: Path) -> Any:
    for n, state in enumerate(RAW):
        save_megatron(folder / f"run/iter_000000{n}", state, n)
    (folder / "run/latest_checkpointed_iteration.txt").write_text("2")

    def loaded() -> tuple[State, list[State]]:
        # megatron/training/checkpointing.py: read_metadata, get_checkpoint_name
        found = load(folder / "run/release/mp_rank_00/model_optim_rng.pt")
        assert found["checkpoint_version"] == 3.0
        return found["model"], RAW

    return loaded


@row("SpeechBrain")
def _(folder: Path) -> Any:
    for n, state in enumerate(RAW):
        save_speechbrain(folder / f"results/save/CKPT+2024-05-0{n + 1}+10-00-00+00", state, n)

    def loaded() -> tuple[State, list[State]]:
        # speechbrain/utils/checkpoints.py: _construct_checkpoint_objects, torch_recovery
        assert (folder / "CKPT+swa/CKPT.yaml").exists()
        found = {name: load(folder / f"CKPT+swa/{name}.ckpt") for name in ("model", "encoder")}
        assert torch.equal(found["encoder"]["linear.weight"], torch.ones(2, 3))
        return found["model"], RAW

    return loaded


@row("torchtune")
def _(folder: Path) -> Any:
    name = "model-00001-of-00001.safetensors"
    for n, state in enumerate(RAW):
        home = folder / f"out/epoch_{n}"
        home.mkdir(parents=True)
        save_file(state, home / name, {"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, name)}
        (home / "model.safetensors.index.json").write_text(json.dumps(index))
        (home / "config.json").write_text("{}")
    return lambda: (load_file(folder / "swa/model.safetensors"), RAW)


def by_hand(
    name: str, make: Callable[[int], Any], take: Callable[[Any], State], states: list[State]
) -> None:
    """A row whose files are written as the framework does, and whose output is read so."""

    def write(folder: Path) -> Any:
        words = shlex.split(COMMANDS[name])
        pattern, output = words[1], words[words.index("-o") + 1]
        for n in range(3):
            path = folder / pattern.replace("*", str(n))
            path.parent.mkdir(exist_ok=True)
            torch.save(make(n), path)
        return lambda: (take(load(folder / output)), states)

    ROWS[name] = write


by_hand(
    "timm",
    lambda n: {"epoch": n, "state_dict": RAW[n], "state_dict_ema": EMA[n], "metric": 1.0},
    # timm/models/_helpers.py load_state_dict, use_ema=True
    lambda file: file.get("state_dict_ema") or file["state_dict"],
    EMA,
)
by_hand(
    "torchvision's references",
    lambda n: {"model": RAW[n], "epoch": n, "optimizer": {}, "lr_scheduler": {},
               "model_ema": under("module.", EMA[n]) | {"n_averaged": torch.tensor(4)}},
    lambda file: file["model"],  # references/classification/train.py
    RAW,
)  # fmt: skip
by_hand(
    "YOLO",
    lambda n: {"epoch": n, "best_fitness": 0.1, "model": None,
               "ema": nn.Sequential(*network(n + 10)).half(), "updates": 9, "train_args": {}},
    # ultralytics/nn/tasks.py load_checkpoint
    lambda file: dict((file.get("ema") or file["model"]).float().state_dict()),
    [dict(network(n + 10).half().state_dict()) for n in range(3)],
)  # fmt: skip
by_hand(
    "fairseq",
    lambda n: {"cfg": {}, "model": RAW[n], "extra_state": {"train_iterator": {"epoch": n}},
               "last_optimizer_state": {"state": {}, "param_groups": []}},
    lambda file: file["model"],  # fairseq/checkpoint_utils.py load_model_ensemble_and_task
    RAW,
)  # fmt: skip
by_hand(
    "icefall",
    lambda n: {"model": RAW[n], "model_avg": EMA[n], "batch_idx_train": 100 * (n + 1)},
    lambda file: file["model"],  # icefall/checkpoint.py load_checkpoint
    RAW,
)
by_hand(
    "Stable Diffusion (ldm)",
    lambda n: {"pytorch-lightning_version": "1.4", "epoch": n, "state_dict":
               under("model.net.", RAW[n]) | {"model_ema.decay": torch.tensor(0.9)}
               | {f"model_ema.net{k.replace('.', '')}": v for k, v in EMA[n].items()}},
    lambda file: {name.removeprefix("model.net."): value for name, value in file.items()},
    EMA,
)  # fmt: skip
