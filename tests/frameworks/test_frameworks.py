"""What is written loads through the framework's own loader. Skipped where it is not installed.

`pip install torch==2.13.0 lightning==2.6.6 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import swa_avg

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the frameworks, not ours
    pytest.mark.frameworks,
]


def mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0)
        for name in states[0]
        if states[0][name].is_floating_point()
    }


def assert_mean(made: dict[str, torch.Tensor], states: list[dict[str, torch.Tensor]]) -> None:
    for name, value in mean(states).items():
        if not name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(made[name].double(), value, rtol=1e-6, atol=1e-7)


def test_lightning_loads_and_resumes(tmp_path: Path) -> None:
    """`load_from_checkpoint` takes the average, hyper-parameters and all, and fit resumes."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(
                nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1)
            )

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return self.net(batch[0]).pow(2).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    def trainer(epochs: int) -> Any:
        saver = ModelCheckpoint(tmp_path / "ckpts", save_top_k=-1, every_n_epochs=1)
        return lightning.Trainer(
            max_epochs=epochs, callbacks=[saver], logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    data = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=16)
    trainer(12).fit(Net(width=5), data)
    files = sorted((tmp_path / "ckpts").glob("*.ckpt"))
    assert len(files) == 12
    report = swa_avg.average(files, tmp_path / "swa.ckpt", keep_wrapper=True)
    assert [source.epoch for source in report.inputs] == list(range(12))

    loaded = Net.load_from_checkpoint(tmp_path / "swa.ckpt", weights_only=False)
    assert loaded.hparams["width"] == 5
    states = [torch.load(file, weights_only=False)["state_dict"] for file in files]
    assert_mean(loaded.state_dict(), states)
    trainer(13).fit(Net(width=5), data, ckpt_path=tmp_path / "swa.ckpt", weights_only=False)


def tiny_gpt() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("shard_in", ["5GB", "5KB"])
@pytest.mark.parametrize("shard_out", [None, 4_000])
def test_transformers_loads(tmp_path: Path, shard_in: str, shard_out: int | None) -> None:
    """`from_pretrained` takes the folder: no key missing, none unexpected, still tied."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(tiny_gpt())
        models[-1].save_pretrained(tmp_path / f"checkpoint-{seed}", max_shard_size=shard_in)
    swa_avg.average(tmp_path / "checkpoint-?", tmp_path / "swa", max_shard_size=shard_out)
    made, info = type(models[0]).from_pretrained(tmp_path / "swa", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert made.lm_head.weight.data_ptr() == made.transformer.wte.weight.data_ptr()
    assert_mean(made.state_dict(), [model.state_dict() for model in models])


def test_peft_loads(tmp_path: Path) -> None:
    """`PeftModel.from_pretrained` takes an average of adapters as an adapter."""
    peft = pytest.importorskip("peft")
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
        adapted = peft.get_peft_model(tiny_gpt(), config)
        adapted.save_pretrained(tmp_path / f"adapter-{seed}")
        states.append(peft.get_peft_model_state_dict(adapted))
    swa_avg.average(tmp_path / "adapter-?", tmp_path / "swa")
    made = peft.PeftModel.from_pretrained(tiny_gpt(), tmp_path / "swa")
    assert_mean(peft.get_peft_model_state_dict(made), states)


def test_accelerate_loads_state(tmp_path: Path) -> None:
    """`load_state` takes a folder whose weights were replaced, optimizer and all."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        optimizer = torch.optim.Adam(model.parameters())
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(torch.randn(8, 4)).sum())
        optimizer.step()
        accelerator.save_state(str(tmp_path / f"checkpoint_{seed}"))
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        accelerator._models.clear()
        accelerator._optimizers.clear()
    swa_avg.average(tmp_path / "checkpoint_?", tmp_path / "swa", keep_wrapper=True)
    fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    fresh, _ = accelerator.prepare(fresh, torch.optim.Adam(fresh.parameters()))
    accelerator.load_state(str(tmp_path / "swa"))
    assert_mean(fresh.state_dict(), states)
    assert torch.equal(fresh.state_dict()["1.running_mean"], states[-1]["1.running_mean"])
