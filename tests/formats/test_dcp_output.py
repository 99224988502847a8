"""The law of a DCP folder as output: `torch.distributed.checkpoint` loads the mean from it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from stored import records
from torch import nn

import swa_avg


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(8, 8), nn.Linear(8, 8))
    made[3].weight = made[2].weight
    made.register_buffer("scale", torch.tensor(seed + 0.5, dtype=torch.bfloat16))
    made.register_buffer("empty", torch.empty(0, 3))
    return made.to(memory_format=torch.channels_last)


def save(content: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no process group, so one process
        dcp.save(content, checkpoint_id=folder, no_dist=True)


def load(content: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(content, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("under", ["model", ""])
def test_dcp_in_dcp_out(tmp_path: Path, under: str) -> None:
    """The output loads into the structure that the inputs have, optimizer left out."""
    states = [network(seed).state_dict() for seed in range(3)]
    for step, state in enumerate(states):
        content = {under: state, "optim": {"m": torch.randn(50)}} if under else state
        save(content, tmp_path / f"step{step}")
    swa_avg.average(tmp_path / "step?", tmp_path / "out_dcp")
    made = network(7).state_dict()
    load({under: made} if under else made, tmp_path / "out_dcp")
    for name, value in made.items():
        columns = [state[name] for state in states]
        if value.is_floating_point() and "running" not in name:
            expected = torch.stack([column.double() for column in columns]).mean(0)
            torch.testing.assert_close(value.double(), expected, rtol=2**-8, atol=1e-7)
        else:
            assert torch.equal(value, columns[-1]), name
    # Ours reads it again, checksums and all, and gives the same folder.
    swa_avg.average([], tmp_path / "again", start_from=tmp_path / "out_dcp")
    for path in (tmp_path / "out_dcp").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def _load_shard(rank: int, folder: str, meeting: str) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    weight = distribute_tensor(torch.zeros(6, 4), mesh, [Shard(1)])
    dcp.load({"w": weight}, checkpoint_id=folder)
    assert torch.equal(weight.full_tensor(), torch.arange(24.0).view(6, 4) + 1)
    torch.distributed.destroy_process_group()


def test_two_ranks_load_shards_of_it(tmp_path: Path) -> None:
    """Two ranks that share a tensor out along its columns load the mean of it."""
    for step in (0, 2):
        save({"w": torch.arange(24.0).view(6, 4) + step}, tmp_path / f"step{step}")
    swa_avg.average(tmp_path / "step?", tmp_path / "out")
    paths = (str(tmp_path / "out"), str(tmp_path / "meeting"))
    mp.start_processes(_load_shard, paths, nprocs=2, start_method="fork")


def test_keep_wrapper_keeps_the_optimizer(tmp_path: Path) -> None:
    """Of a folder written by one rank all but the weights stays, and dcp loads all of it."""
    contents = [
        {"model": network(step).state_dict(), "optim": {"m": torch.randn(50)}, "step": step}
        for step in range(3)
    ]
    for step, content in enumerate(contents):
        save(content, tmp_path / f"step{step}")
    swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
    swa_avg.average(tmp_path / "step?", tmp_path / "bare.pt")
    made = {"model": network(7).state_dict(), "optim": {"m": torch.zeros(50)}, "step": 9}
    load(made, tmp_path / "out")
    assert made["step"] == 2
    assert torch.equal(made["optim"]["m"], contents[-1]["optim"]["m"])
    for name, value in torch.load(tmp_path / "bare.pt").items():
        assert torch.equal(value, made["model"][name]), name
    # Our own reader checks the checksums of the items.
    swa_avg.average([], tmp_path / "again.pt", start_from=tmp_path / "out")
    assert records(tmp_path / "again.pt") == records(tmp_path / "bare.pt")
