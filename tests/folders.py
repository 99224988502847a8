"""Builders of folders of checkpoints, as frameworks write them and as none would."""

from __future__ import annotations

import itertools
import json
import pickle
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
