"""Folders of `torch.distributed.checkpoint` that several ranks write and read; run as a script.

    python sharded.py write FOLDER      # steps 1 to 3 of each layout, by 4, 2 and 1 ranks
    python sharded.py read TASKS        # what `dcp.load` gives, on 1, 2 and 4 ranks

The ranks are forked from one process, so that torch is imported once. `model` gives the whole
tensors of a step, from which a test computes the mean.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import preloaded
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

Weights = dict[str, torch.Tensor]
HERE = Path(__file__).parent

# The shape of each tensor, and how the ranks share it: on a mesh of one dimension, or of two.
SHARES: Mapping[str, tuple[tuple[int, ...], Any]] = {
    "row.weight": ((8, 6), "0"),
    "row.uneven": ((7, 5), "0"),
    "row.few": ((2, 3), "0"),  # some ranks have nothing of it
    "column.weight": ((6, 8), "1"),
    "column.uneven": ((5, 11), "1"),
    "middle.weight": ((3, 6, 2), "1"),
    "replicated.weight": ((4, 3), "r"),
    "grid.weight": ((6, 10), "01"),
    "hybrid.weight": ((10, 3), "r0"),
    "conv.weight": ((8, 3, 3, 3), "0"),  # channels_last
    "bias": ((9,), "0"),
    "scalar": ((), "r"),
}
BATCHNORM = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


# What is also written as safetensors.
SAFE = ("row.uneven", "half.column.weight", "bias")


def model(step: int) -> Weights:
    """Return the whole tensors of a step: float32, bfloat16, integers and BatchNorm buffers."""
    torch.manual_seed(step)
    made: Weights = {}
    for name, (shape, _) in SHARES.items():
        made[name] = torch.randn(shape)
        made[f"half.{name}"] = torch.randn(shape, dtype=torch.bfloat16)
    # A part of this one is averaged in pieces. The mean of small whole numbers is quick to tell.
    made["large"] = torch.randint(-99, 99, (1031, 401)).float()
    made["table"] = torch.arange(12).reshape(6, 2)
    made["bn.running_mean"] = torch.randn(8)
    made["bn.running_var"] = torch.rand(8)
    made["bn.num_batches_tracked"] = torch.tensor(step)
    return made


def _placed(name: str, tensor: torch.Tensor, world: int) -> Any:
    """Return this rank's part of a tensor."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    share = (
        "0" if name in ("large", "table") else SHARES.get(name.removeprefix("half."), ((), "r"))[1]
    )
    if world == 1 or name in BATCHNORM:
        return tensor
    if "conv" in name:
        tensor = tensor.to(memory_format=torch.channels_last)
    sizes = (2, world // 2) if len(share) == 2 else (world,)
    placements = [Replicate() if one == "r" else Shard(int(one)) for one in share]
    return distribute_tensor(tensor, _mesh(sizes), placements)


@cache
def _mesh(sizes: tuple[int, ...]) -> Any:
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", sizes)


def tree(step: int, world: int, kind: str, fill: float | None = None) -> dict[str, Any]:
    """Return what a rank saves in a step, or with `fill` what it loads into.

    Args:
        step: The step.
        world: The number of ranks.
        kind: The layout: that of FSDP, with or without its optimizer, or one of flat names.
        fill: The value of all tensors.
    """
    whole = model(step)
    if fill is not None:
        whole = {name: torch.full_like(value, fill) for name, value in whole.items()}
    placed = {name: _placed(name, value, world) for name, value in whole.items()}
    known = [name for name in placed if name.startswith(("row", "column"))]
    adam = {f"state.{name}.exp_avg": placed[name] * 0 + step for name in known}
    if kind == "bare":
        return {"model": placed}
    if kind == "fsdp":
        return {"model": placed, "optim": adam, "step": step, "rng": [step, "not a tensor"]}
    if kind == "titan":
        return (
            placed | {f"optimizer.{k}": v for k, v in adam.items()} | {"train_state": {"s": step}}
        )
    # Megatron-core
    names = {"row": "decoder.row", "column": "output_layer", "grid": "embedding.grid"}
    renamed = {names.get(k.split(".")[0], "decoder") + "." + k: v for k, v in placed.items()}
    extra = {f"decoder.fc._extra_state/shard_{n}_2": io.BytesIO(b"%d" % step) for n in range(2)}
    return renamed | {f"chained_0.optimizer.{k}": v for k, v in adam.items()} | extra


KINDS = ("fsdp", "titan", "megatron")


def _write(rank: int, folder: Path, world: int) -> None:
    for kind in KINDS if world == 4 else KINDS[:1]:
        for step in (1, 2, 3):
            path = folder / f"{kind}{world}" / f"step{step}"
            dcp.save(tree(step, world, kind), checkpoint_id=path)
            if kind == "megatron" and rank == 0:
                torch.save({"iteration": step, "args": Unknown()}, path / "common.pt")
                (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    if world == 2:
        for step in (1, 2, 3):
            whole = model(step)
            part = {name: _placed(name, whole[name], 2) for name in SAFE}
            for kind, join in (("parts", False), ("joined", True)):
                writer = dcp.HuggingFaceStorageWriter(
                    str(folder / kind / f"step{step}"),
                    save_distributed=True,
                    enable_consolidation=join,
                )
                dcp.save(part, storage_writer=writer)
    dist.barrier()


class Unknown:
    """What only the framework can unpickle."""


def _read(rank: int, tasks: list[tuple[str, str, list[int], str]], world: int) -> None:
    """Load each folder on these ranks, and save what is in it as whole tensors."""
    from torch.distributed.tensor import DTensor

    for path, kind, worlds, result in tasks:
        if world not in worlds:
            continue
        content = tree(9, world, kind, fill=7)
        dcp.load(content, checkpoint_id=path)
        flat = {
            name: value.full_tensor() if isinstance(value, DTensor) else value
            for name, value in _flat(content).items()
        }
        if rank == 0:
            torch.save(flat, f"{result}.{world}")
    dist.barrier()


def _flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        inner = _flat(value, f"{before}{name}.") if isinstance(value, dict) else None
        found |= {f"{before}{name}": value} if inner is None else inner
    return found


def _rank(rank: int, do: Callable[[int, Any, int], None], given: Any, world: int, at: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{at}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        do(rank, given, world)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once, so that no other rank waits for this one
    dist.destroy_process_group()


def _on_ranks(do: Callable[[int, Any, int], None], given: Any, world: int) -> None:
    with tempfile.TemporaryDirectory() as at:
        mp.start_processes(_rank, (do, given, world, at), nprocs=world, start_method="fork")


def run(what: str, given: Path) -> None:
    """Run this script in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = f"import sys; sys.path.insert(0, {str(HERE)!r}); import sharded; sharded.main()"
    done = preloaded.run(HERE, (what, str(given)), environment, 240, script, preloaded.SHARDING)
    assert done.returncode == 0, done.stderr[-3000:]


def written(folder: Path) -> Path:
    """Write all layouts into a folder and return it."""
    run("write", folder)
    return folder


def loaded(
    folders: Mapping[Path, tuple[str, Sequence[int]]], at: Path
) -> dict[Path, dict[int, dict[str, Any]]]:
    """Return what `dcp.load` gives for folders, by the number of ranks, as whole tensors.

    Args:
        folders: The folders, each with its layout and the numbers of ranks: 1, 2 or 4.
        at: A folder for the results.
    """
    tasks = [
        (str(path), *how, str(at / f"result{n}")) for n, (path, how) in enumerate(folders.items())
    ]
    (at / "tasks.json").write_text(json.dumps(tasks))
    run("read", at / "tasks.json")
    return {
        Path(path): {w: torch.load(f"{result}.{w}", weights_only=False) for w in worlds}
        for path, _, worlds, result in tasks
    }


def main() -> None:
    """Do what the arguments say, on 4, 2 and 1 ranks."""
    warnings.simplefilter("ignore")
    command, path = sys.argv[1], Path(sys.argv[2]).resolve()
    for count in (4, 2, 1):
        if command == "write":
            _on_ranks(_write, path, count)
        else:
            _on_ranks(_read, json.loads(path.read_text()), count)


if __name__ == "__main__":
    main()
