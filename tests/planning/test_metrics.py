"""Metrics where frameworks record them: each is found for the checkpoint that it belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from swa_avg import Choice
from swa_avg.averaging.prepare import planned
from swa_avg.errors import SelectionError
from swa_avg.planning.settings import Options

VALUES = (0.5, 0.3, 0.4, 0.2)


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), float(seed)), "a.bias": torch.tensor([seed, 1.0])}


def chosen(checkpoints: Path | Sequence[Path], metric: str, best: int = 2, **choice: Any) -> Any:
    """Return the names of the chosen checkpoints with the values of their metric."""
    first = checkpoints if isinstance(checkpoints, Path) else checkpoints[0]
    options = Options(choice=Choice(best=best, metric=metric, **choice))
    with planned(checkpoints, first.parent / "out.pt", options) as made:
        return {Path(s.path).name: round(s.score.value, 6) for s in made.inputs if s.score}


def refused(checkpoints: Path | Sequence[Path], metric: str) -> str:
    with pytest.raises(SelectionError) as error:
        chosen(checkpoints, metric)
    return str(error.value)


def test_espnet_reporter_of_the_run(tmp_path: Path) -> None:
    """ESPnet's `Nepoch.pth` are bare; the reporter in checkpoint.pth has their metrics."""
    stats = {n + 1: {"valid": {"loss": v, "acc": 1 - v}, "train": {"loss": 9 - v}}
             for n, v in enumerate(VALUES)}  # fmt: skip
    for n in range(4):
        torch.save(weights(n), tmp_path / f"{n + 1}epoch.pth")
    reporter = {"stats": stats, "epoch": 4}
    torch.save({"model": weights(3), "reporter": reporter}, tmp_path / "checkpoint.pth")
    files = [tmp_path / f"{n + 1}epoch.pth" for n in range(4)]
    assert chosen(files, "valid.loss") == {"2epoch.pth": 0.3, "4epoch.pth": 0.2}
    assert chosen(files, "valid.acc") == {"2epoch.pth": 0.7, "4epoch.pth": 0.8}
    assert chosen(files, "train.loss", 1) == {"1epoch.pth": 8.5}
    assert "recorded there: valid.acc," in refused(files, "val.acc")


@pytest.mark.filterwarnings("ignore")
def test_names_of_parent_folders(tmp_path: Path) -> None:
    """NeMo 2 writes the metric into the name of the folder around the weights."""
    for n, value in enumerate(VALUES):
        home = tmp_path / f"checkpoints/model--val_loss={value:.2f}-step={n}0-last"
        dcp.save({"module." + k: v for k, v in weights(n).items()}, checkpoint_id=home / "weights")
    inner = sorted(tmp_path.glob("checkpoints/*/weights"))
    with planned(inner, tmp_path / "out.pt",
                 Options(choice=Choice(best=2, metric="val_loss"))) as made:  # fmt: skip
        assert [source.score.value for source in made.inputs if source.score] == [0.3, 0.2]
        assert [Path(source.path).parent.name[-9:] for source in made.inputs] == [
            "p=10-last", "p=30-last"]  # fmt: skip
    assert "recorded there: val_loss." in refused(inner, "validation_loss")


def test_ultralytics(tmp_path: Path) -> None:
    """`train_metrics` of Ultralytics, with its names as they are."""
    for n, value in enumerate(VALUES):
        metrics = {"metrics/mAP50(B)": 1 - value, "val/box_loss": value, "fitness": 1 - value}
        content = {"epoch": n, "best_fitness": 0.8, "model": weights(n), "train_metrics": metrics}
        torch.save(content, tmp_path / f"epoch{n}.pt")
    assert chosen(tmp_path, "metrics/mAP50(B)", mode="max") == {"epoch1.pt": 0.7, "epoch3.pt": 0.8}
    assert chosen(tmp_path, "val/box_loss") == {"epoch1.pt": 0.3, "epoch3.pt": 0.2}
    assert "recorded there: metrics/mAP50(B)" in refused(tmp_path, "mAP50")


def test_trainer_log_of_the_last_checkpoint(tmp_path: Path) -> None:
    """The log in the last checkpoint has the values of all; each gets that of its own step."""
    history: list[dict[str, float]] = []
    for n, value in enumerate(VALUES):
        home = tmp_path / f"run/checkpoint-{n + 1}0"
        home.mkdir(parents=True)
        save_file(weights(n), home / "model.safetensors")
        # Each is saved before it is evaluated.
        state = {"global_step": (n + 1) * 10, "epoch": float(n), "log_history": list(history)}
        (home / "trainer_state.json").write_text(json.dumps(state))
        history.append({"step": (n + 1) * 10, "epoch": float(n), "eval_wer": value})
    assert "checkpoint-40: records no eval_wer" in refused(tmp_path / "run", "eval_wer")
    state = {"global_step": 40, "epoch": 3.0, "log_history": history}
    (home / "trainer_state.json").write_text(json.dumps(state))
    found = chosen(tmp_path / "run", "eval_wer")
    assert found == {"checkpoint-20": 0.3, "checkpoint-40": 0.2}
    # Checkpoints without a file of their own have the step in their names.
    for n in (10, 20, 30):
        (tmp_path / f"run/checkpoint-{n}/trainer_state.json").unlink()
    assert chosen(tmp_path / "run", "wer") == found
    assert "recorded there: eval_wer." in refused(tmp_path / "run", "eval_cer")


def test_missing_metric_lists_what_is_recorded(tmp_path: Path) -> None:
    """The names that are recorded stand in the message, the closest first; positions do not."""
    for n, value in enumerate(VALUES):
        content = {"epoch": n, "global_step": n, "acc1": value, "acc5": value, "val_loss": value}
        torch.save({**content, "model": weights(n), "lr": 0.1}, tmp_path / f"{n}.pt")
    assert refused(tmp_path, "loss").endswith("recorded there: val_loss, acc1, acc5.")
    assert "recorded there: acc5, acc1, val_loss." in refused(tmp_path, "acc")
    for n in range(4):
        torch.save(weights(n), tmp_path / f"{n}.pt")
    assert "no metric is recorded there" in refused(tmp_path, "loss")


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore")
def test_mmengine(tmp_path: Path) -> None:
    """Validations are those of the checkpoint itself: the hub in it has those of earlier ones."""
    pytest.importorskip("mmengine")
    from mmengine.evaluator import BaseMetric
    from mmengine.runner import Runner
    from mmengine_model import Small

    class Given(BaseMetric):  # type: ignore[misc]
        calls = 0

        def process(self, batch: Any, samples: Any) -> None:
            self.results.append(0)

        def compute_metrics(self, results: Any) -> dict[str, float]:
            Given.calls += 1
            return {"acc": (0.2, 0.9, 0.4, 0.8)[Given.calls - 1]}

    class Samples(torch.utils.data.Dataset[torch.Tensor]):
        metainfo: dict[str, str] = {}  # noqa: RUF012

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.ones(3)

    loader = {"dataset": Samples(), "batch_size": 2, "num_workers": 0,
              "sampler": {"type": "DefaultSampler", "shuffle": False}}  # fmt: skip
    Runner(
        model=Small(torch.nn.Linear(3, 2)), work_dir=str(tmp_path / "run"), train_dataloader=loader,
        val_dataloader=loader, val_evaluator=[Given()], val_cfg={},
        train_cfg={"by_epoch": True, "max_epochs": 4, "val_interval": 1},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.3}},
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
        experiment_name="metrics",
    ).train()  # fmt: skip
    assert chosen(tmp_path / "run", "acc") == {"epoch_2.pth": 0.9, "epoch_4.pth": 0.8}
    losses = chosen(tmp_path / "run", "train/loss", 4)
    for name, value in losses.items():
        hub = torch.load(tmp_path / "run" / name, weights_only=False)["message_hub"]
        assert hub["log_scalars"]["train/loss"].current() == pytest.approx(value, abs=1e-6)
    assert "recorded there: train/loss" in refused(tmp_path / "run", "train_loss")
