"""Hugging Face folders: one file of weights, or shards and an index that says what is where.

What `save_pretrained`, `Trainer`, `accelerate` and PEFT write. A folder is read
from its index alone: a shard that nothing in it names is not opened, and the
index leads nowhere but into its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from swa_avg.errors import FormatError, listed
from swa_avg.files import InputFile
from swa_avg.formats.checkpoint import Checkpoint
from swa_avg.formats.safetensors import unique
from swa_avg.formats.single import open_file

# The names that the weights have, the first that is there counts; each may be in shards.
_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_INDEX = ".index.json"
_STATE = "trainer_state.json"
_MOST_JSON_BYTES = 100_000_000


def is_checkpoint(folder: Path) -> bool:
    """Tell whether a folder holds weights under a name that says so."""
    return next(_candidates(folder), None) is not None


def read(folder: Path) -> Checkpoint:
    """Read the headers of all files of a folder's weights.

    Raises:
        FormatError: The index or a shard is not sound.
        FileError: A shard is missing or cannot be opened.
    """
    path, *more = _candidates(folder)
    if more and not _is_named(path):
        raise FormatError(
            f"has several indices ({path.name}, {more[0].name})",
            file=folder,
            remedy="Give the one folder or file that is meant",
        )
    beside = trainer_state(folder)
    if path.name.endswith(_INDEX):
        return replace(_read_shards(folder, path), beside=beside)
    whole = open_file(path)
    return replace(
        whole,
        path=folder,
        format=f"Hugging Face folder of {whole.format}",
        notes=(*whole.notes, *_other_models(path)),
        beside=beside,
    )


def trainer_state(folder: Path) -> object:
    """Return what Trainer records beside the weights, or None."""
    path = folder / _STATE
    return _json(path) if path.exists() else None


def _read_shards(folder: Path, path: Path) -> Checkpoint:
    with ExitStack() as opened:
        shards: dict[str, Checkpoint] = {}
        weight_map = _weight_map(path)
        for name in dict.fromkeys(weight_map.values()):
            shards[name] = open_file(folder / name)
            opened.callback(shards[name].close)
        tree = {name: _tensor(shards[shard], name) for name, shard in weight_map.items()}
        opened.pop_all()
    return Checkpoint(
        folder,
        "Hugging Face folder of shards",
        tree,
        tuple(file for shard in shards.values() for file in shard.files),
        next((shard.metadata for shard in shards.values()), {}),
        tuple(_notes(shards, weight_map)),
    )


def _candidates(folder: Path) -> Iterator[Path]:
    """Yield the files or indices that say what a folder's weights are, the best first."""
    for name in _WEIGHTS:
        yield from (path for path in (folder / name, folder / (name + _INDEX)) if path.exists())
    yield from sorted(path for path in folder.glob(f"*{_INDEX}") if not _is_named(path))


def _is_named(path: Path) -> bool:
    return path.name.removesuffix(_INDEX) in _WEIGHTS


def _other_models(path: Path) -> Iterator[str]:
    """Say if accelerate saved more models than one."""
    others = sorted(other.name for other in path.parent.glob(f"{path.stem}_[0-9]*{path.suffix}"))
    if others:
        yield f"{listed(others)}: another model's; not read"


def _weight_map(path: Path) -> dict[str, str]:
    """Return which file each tensor is in, having checked that it is in the index's folder."""
    index = _json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map", file=path, expected="an index of shards")
    for name, shard in weight_map.items():
        if not (isinstance(shard, str) and is_inside(shard)):
            raise FormatError(
                f"names the file {shard!r}",
                file=path,
                tensor=name,
                expected="a file in the same folder",
            )
    return weight_map


def is_inside(name: str) -> bool:
    """Tell whether a relative path leads to something in its own folder.

    A symbolic link there may lead elsewhere: the hub's cache is made of them.
    """
    parts = PurePosixPath(name).parts
    harmful = {"/", "\\", "..", "\0"}
    return bool(parts) and not any(part in harmful or set(part) & {"\\", "\0"} for part in parts)


def _tensor(shard: Checkpoint, name: str) -> object:
    if not isinstance(shard.tree, dict) or name not in shard.tree:
        raise FormatError(
            "is not in the shard that the index names",
            file=shard.path,
            tensor=name,
            remedy="The shards are not all of one checkpoint",
        )
    return shard.tree[name]


def _notes(shards: Mapping[str, Checkpoint], weight_map: Mapping[str, str]) -> Iterator[str]:
    for name, shard in shards.items():
        for note in shard.notes:
            yield f"{name} {note}"
        assert isinstance(shard.tree, dict)
        more = sum(1 for tensor in shard.tree if weight_map.get(tensor) != name)
        if more:
            yield f"{name} holds {more} tensors that the index does not name; left out"


def _json(path: Path) -> Any:
    """Read a JSON file of reasonable size in which no name occurs twice."""
    file = InputFile(path)
    try:
        if file.size > _MOST_JSON_BYTES:
            raise ValueError(f"{file.size} bytes long")
        return json.loads(file.read(0, file.size).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"is no sound JSON ({error})", file=path, remedy="The file is damaged"
        ) from error
    finally:
        file.close()
