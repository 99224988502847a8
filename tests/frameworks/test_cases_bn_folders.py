"""CASES.md C: BatchNorm of an image classifier that transformers' Trainer has saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import run
from torch.optim.swa_utils import update_bn

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the libraries, not ours
    pytest.mark.frameworks,
]
MODULE = """
import torch
import transformers

config = transformers.ResNetConfig(
    num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1],
    layer_type="basic", num_labels=2,
)

class Data(torch.utils.data.Dataset):
    images = torch.randn(24, 1, 16, 16, generator=torch.Generator().manual_seed(1)) + 3

    def __len__(self): return 24
    def __getitem__(self, number):
        return {"pixel_values": self.images[number], "labels": number % 2}

loader = torch.utils.data.DataLoader(Data(), batch_size=8)

def model(): return transformers.ResNetForImageClassification(config)
"""


def test_bn_of_what_trainer_saves(tmp_path: Path) -> None:
    """`from_pretrained` loads the mean with the statistics of `update_bn`; `--show` says so."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "mod.py").write_text(MODULE)
    names: dict[str, object] = {}
    exec(MODULE, names)
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), num_train_epochs=3, save_strategy="epoch", report_to="none",
        per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(names["model"](), arguments, train_dataset=names["Data"]()).train()
    bn = ["--recompute-bn", "--data", "mod:loader", "--bn-estimator", "torch", "--device", "cpu"]
    one = run(tmp_path, "run", "-o", "one", *bn)
    assert one.returncode == 0, one.stderr
    assert "averaged 3 checkpoints" in one.stdout and "BatchNorm layers" in one.stdout
    assert run(tmp_path, "run", "-o", "two").returncode == 0
    two = run(tmp_path, "-o", "two", *bn)
    assert two.returncode == 0, two.stderr
    kind = transformers.ResNetForImageClassification
    states = [
        kind.from_pretrained(path).double().state_dict() for path in (tmp_path / "run").iterdir()
    ]
    expected = kind.from_pretrained(tmp_path / "run/checkpoint-9")
    weights = {
        name: torch.stack([state[name] for state in states]).mean(0).float()
        for name, value in states[0].items()
        if value.is_floating_point() and "running_" not in name
    }
    expected.load_state_dict(expected.state_dict() | weights)
    update_bn([batch["pixel_values"] for batch in names["loader"]], expected)
    for output in ("one", "two"):
        made, info = kind.from_pretrained(tmp_path / output, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(made.state_dict()[name], value, rtol=1e-6, atol=1e-7)
        said = json.loads(run(tmp_path, "--show", output, "--json").stdout)
        assert said["count"] == 3
        assert said["batchnorm"] == {"estimator": "torch", "batches": 3, "samples": 24}
