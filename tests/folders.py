"""Builders of folders of checkpoints, as frameworks write them and as none would."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Weights = dict[str, torch.Tensor]
Box = tuple[tuple[int, ...], tuple[int, ...]]


# Hugging Face.


def weights(seed: int = 0) -> Weights:
    torch.manual_seed(seed)
    return {f"layers.{n}.weight": torch.rand(3, n + 1) for n in range(6)}


def save_shards(folder: Path, state: Weights, safe: bool = True, shards: int = 3) -> Path:
    """Write shards and their index as `save_pretrained` names them."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.{suffix}"
        part = {key: state[key] for key in list(state)[number::shards]}
        if safe:
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def save_one(folder: Path, state: Weights, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(state, folder / name, {"format": "pt"})
    else:
        torch.save(state, folder / name)
    return folder


def index(weight_map: Any) -> str:
    return json.dumps({"metadata": {}, "weight_map": weight_map})


# torch.distributed.checkpoint.


def save_chunks(
    folder: Path,
    tensors: Weights,
    boxes: dict[str, list[Box]],
    zipped: bool = True,
    change: Any = lambda metadata: None,
) -> Path:
    """Write a folder as several ranks do, each chunk to one of three files."""
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    items: dict[Any, Any] = {}
    names = [f"__{rank}_0.distcp" for rank in range(3)]
    written = {name: bytearray() for name in names}
    turn = itertools.cycle(names)
    for name, tensor in tensors.items():
        chunks = []
        for number, (start, size) in enumerate(boxes[name]):
            chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(size)))
            part = tensor[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
            file = next(turn)
            path = folder / "item"
            torch.save(part.clone(), path, _use_new_zipfile_serialization=zipped)
            data = path.read_bytes()
            path.unlink()
            index = MetadataIndex(f"model.{name}", start, number)
            items[index] = _StorageInfo(file, len(written[file]), len(data))
            written[file] += data
        described[f"model.{name}"] = TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype), tensor.size(), chunks
        )
    metadata = Metadata(described, {f"model.{name}": ("model", name) for name in tensors}, items)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    for file, data in written.items():
        (folder / file).write_bytes(data)
    return folder


WHOLE = {"w": torch.arange(24.0).reshape(4, 6)}
HALVES: list[Box] = [((0, 0), (4, 3)), ((0, 3), (4, 3))]


def set_info(**values: object) -> Any:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.__dict__.update(values)

    return change


def set_chunks(*boxes: Box) -> Any:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.w"].chunks = [
            ChunkStorageMetadata(torch.Size(start), torch.Size(size)) for start, size in boxes
        ]

    return change


def set_size(*size: int) -> Any:
    def change(metadata: Metadata) -> None:
        metadata.state_dict_metadata["model.w"].size = torch.Size(size)

    return change


# Checkpoints that are copied with other weights. Each function writes one, as its framework does.


def save_deepspeed(path: Path, state: Weights, step: int) -> Path:
    """Write what accelerate saves with DeepSpeed: `latest` names the sub-folder."""
    inner = path / "pytorch_model"
    inner.mkdir(parents=True)
    (path / "latest").write_text(inner.name)
    torch.save({"step": step}, path / "random_states_0.pkl")
    content = {"module": state, "global_steps": step, "dp_world_size": 1, "ds_config": {}}
    torch.save(content, inner / "mp_rank_00_model_states.pt")
    optimizer = {"optimizer_state_dict": {"fp32": torch.rand(9)}}
    torch.save(optimizer, inner / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return path


def save_megatron(path: Path, state: Weights, step: int) -> Path:
    """Write what Megatron-LM saves without model parallelism."""
    inner = path / "mp_rank_00"
    inner.mkdir(parents=True)
    content = {"args": None, "checkpoint_version": 3.0, "iteration": step, "model": state}
    torch.save(content, inner / "model_optim_rng.pt")
    torch.save({"fp32": torch.rand(9)}, inner / "distrib_optim.pt")
    return path


def save_speechbrain(path: Path, state: Weights, step: int) -> Path:
    """Write what SpeechBrain saves of two models and an optimizer."""
    path.mkdir(parents=True)
    torch.save(state, path / "model.ckpt")
    torch.save({"linear.weight": torch.full((2, 3), float(step))}, path / "encoder.ckpt")
    torch.save({"state": {}, "param_groups": []}, path / "optimizer.ckpt")
    (path / "counter.ckpt").write_text(str(step))
    (path / "CKPT.yaml").write_text(f"# yamllint disable\nWER: 7.5\nunixtime: {1.7e9 + step}\n")
    return path


def save_litgpt(path: Path, state: Weights, step: int) -> Path:
    """Write what LitGPT saves."""
    path.mkdir(parents=True)
    torch.save({"model": state, "step_count": step}, path / "lit_model.pth")
    (path / "model_config.yaml").write_text("n_embd: 8\n")
    (path / "tokenizer.json").write_text("{}")
    return path


def save_accelerate(path: Path, state: Weights, step: int) -> Path:
    """Write what accelerate saves of two models of one kind."""
    path.mkdir(parents=True)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    other = {name: value + 1 for name, value in state.items()}
    save_file(other, path / "model_1.safetensors", {"format": "pt"})
    for number in ("", "_1"):
        torch.save({"state": {}, "param_groups": []}, path / f"optimizer{number}.bin")
    torch.save({"step": step}, path / "random_states_0.pkl")
    return path


def save_nemo(path: Path, state: Weights, step: int, mode: str = "w:") -> Path:
    """Write what NeMo's `_make_nemo_file_from_folder` writes."""
    data = io.BytesIO()
    torch.save(state, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in {
            "./model_config.yaml": f"target: a.Model\nstep: {step}\n".encode(),
            "./" + "0" * 120 + "_tokenizer.model": b"\0\1" * 900,
            "./model_weights.ckpt": data.getvalue(),
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def members(path: Path) -> dict[str, bytes]:
    """Return the content of each member of a `.nemo` archive."""
    with tarfile.open(path, "r:") as archive:
        found = {member.name: archive.extractfile(member) for member in archive}
        return {name: file.read() for name, file in found.items() if file}


def save_ranks(path: Path, state: Weights, step: int) -> Path:
    """Write `weights/` of several ranks, which share the weights and not the buffers."""
    boxes: dict[str, list[Box]] = {}
    for name, value in state.items():
        rest = tuple(value.shape[1:])
        half = value.shape[0] // 2 if value.ndim and "running" not in name else 0
        cuts = [(0, half), (half, value.shape[0] - half)] if half else []
        boxes[name] = [((at, *(0 for _ in rest)), (size, *rest)) for at, size in cuts]
        boxes[name] = boxes[name] or [((0,) * value.ndim, tuple(value.shape))]
    save_chunks(path / "weights", state, boxes)
    (path / "context").mkdir()
    (path / "context/model.yaml").write_text(f"step: {step}\n")
    return path


# How each kind of checkpoint is written, and the name of one, with its number.
COPIED: dict[str, tuple[Callable[[Path, Weights, int], Path], str]] = {
    "deepspeed": (save_deepspeed, "checkpoint_{}"),
    "megatron": (save_megatron, "iter_000000{}"),
    "speechbrain": (save_speechbrain, "CKPT+2024-05-0{}+10-00-00+00"),
    "litgpt": (save_litgpt, "step-00000{}"),
    "accelerate": (save_accelerate, "checkpoint_{}"),
    "ranks": (save_ranks, "model--step={}"),
    "nemo": (save_nemo, "epoch={}.nemo"),
}
