"""The laws of `open_checkpoint`: what torch would load, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import swa_avg


def test_reads_what_torch_loads(tmp_path: Path) -> None:
    """Names, shapes, dtypes and values are those of `torch.load`, whatever the strides."""
    state = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict()
    state["turned"] = torch.arange(12.0).view(3, 4).t()
    state["half"] = torch.randn(5).bfloat16()
    state["none"] = torch.empty(0, 2)
    torch.save({"epoch": 7, "model": state, "optimizer": {"lr": 0.1}}, tmp_path / "a.pt")
    with swa_avg.open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.names == tuple(state)
        assert (checkpoint.epoch, checkpoint.where) == (7, "model")
        for name, value in state.items():
            assert checkpoint.shape(name) == tuple(value.shape)
            assert checkpoint.dtype(name) == str(value.dtype).removeprefix("torch.")
            assert torch.equal(checkpoint.read(name), value)
        with pytest.raises(KeyError):
            checkpoint.read("absent")


def test_damage_is_found(tmp_path: Path) -> None:
    """A tensor whose bytes are not those that were saved is refused; another is read."""
    torch.save({"a": torch.ones(100), "b": torch.zeros(100)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    one = torch.ones(100).numpy().tobytes()
    (tmp_path / "a.pt").write_bytes(data.replace(one, one[:-1] + b"\x01"))
    with swa_avg.open_checkpoint(tmp_path / "a.pt") as checkpoint:
        assert checkpoint.read("b").eq(0).all()
        with pytest.raises(swa_avg.SwaAvgError, match="checksum"):
            checkpoint.read("a")
