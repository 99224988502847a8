"""Hugging Face folders: one file of weights, or shards and an index that says what is where.

What `save_pretrained`, `Trainer`, `accelerate` and PEFT write. A folder is read
from its index alone: a shard that nothing in it names is not opened, and the
index leads nowhere but into its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from swa_avg.errors import FormatError, listed
from swa_avg.formats.budget import Budget
from swa_avg.formats.checkpoint import PROVENANCE, Checkpoint, Layout, OutputStateDict
from swa_avg.formats.headers import Headers
from swa_avg.formats.safetensors import layout as safetensors_layout
from swa_avg.formats.safetensors import unique
from swa_avg.formats.single import open_file
from swa_avg.storage import InputFile
from swa_avg.tensors import View

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


def read(folder: Path, headers: Headers) -> Checkpoint:
    """Read the headers of all files of a folder's weights.

    Args:
        folder: The folder.
        headers: What was read of other files.

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
        return replace(_read_shards(folder, path, headers), beside=beside)
    whole = open_file(path, headers)
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


def _read_shards(folder: Path, path: Path, headers: Headers) -> Checkpoint:
    with ExitStack() as opened:
        shards: dict[str, Checkpoint] = {}
        budget = Budget()
        weight_map = _weight_map(path)
        for name in dict.fromkeys(weight_map.values()):
            shards[name] = open_file(folder / name, headers, budget)
            opened.callback(shards[name].close)
        weight_map |= _aliases(shards, weight_map)
        tree = {name: _tensor(shards[shard], name) for name, shard in weight_map.items()}
        opened.pop_all()
    return Checkpoint(
        folder,
        "Hugging Face folder of shards",
        tree,
        tuple(file for shard in shards.values() for file in shard.files),
        next((shard.metadata for shard in shards.values()), {}),
        tuple(_notes(shards, weight_map)),
        budget=budget,
    )


def _aliases(shards: Mapping[str, Checkpoint], weight_map: Mapping[str, str]) -> dict[str, str]:
    """Return the tied names that shards record in their metadata, with the shard of each."""
    return {
        name: shard
        for shard, opened in shards.items()
        for name in opened.metadata
        if isinstance(opened.tree, dict) and name in opened.tree and name not in weight_map
    }


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
    found = shard.tree[name]
    return shard.located(found) if isinstance(found, View) else found


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


# What a model needs beside its weights: configuration, tokenizer, templates, its own code.
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py")
_MOST_SIDE_BYTES = 100_000_000
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class _Shard:
    """A safetensors file of the output: its name, and which storages of all it holds."""

    name: str
    layout: Layout
    storages: tuple[int, ...]


@dataclass(frozen=True)
class FolderLayout:
    """A folder of files that lie, as far as places are concerned, one behind the other.

    Attributes:
        shards: Its safetensors files.
        others: Its other files, by name.
    """

    shards: tuple[_Shard, ...]
    others: Mapping[str, bytes]

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file, in their order."""
        sizes = {shard.name: shard.layout.size for shard in self.shards}
        return sizes | {name: len(data) for name, data in self.others.items()}

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(self.files.values())

    @property
    def places(self) -> Sequence[int]:
        """Where each storage's first byte goes, in the order of the storages."""
        places: dict[int, int] = {}
        start = 0
        for shard in self.shards:
            for storage, place in zip(shard.storages, shard.layout.places, strict=True):
                places[storage] = start + place
            start += shard.layout.size
        return [places[storage] for storage in range(len(places))]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes that are no storage's, with their places."""
        start = 0
        for shard in self.shards:
            for place, data in shard.layout.headers(checksums, ""):
                yield start + place, data
            start += shard.layout.size
        for name, data in self.others.items():
            yield start, provenance.encode() if name == PROVENANCE else data
            start += len(data)


def layout(state_dict: OutputStateDict, like: Path, shard_bytes: int = SHARD_BYTES) -> FolderLayout:
    """Lay out a folder of safetensors files as `save_pretrained` writes it.

    Args:
        state_dict: What is written.
        like: A folder of the same model: its small files go along, and its weights'
            name is taken over.
        shard_bytes: The most bytes of tensors in one file, unless one tensor has more.
    """
    source = next(_candidates(like)).name.removesuffix(_INDEX)
    stem = Path(source).stem.replace("pytorch_model", "model") or "model"
    groups = _grouped(state_dict, shard_bytes)
    shards = []
    for number, group in enumerate(groups, 1):
        part = f"-{number:05}-of-{len(groups):05}" if len(groups) > 1 else ""
        made = safetensors_layout(_part(state_dict, group))
        shards.append(_Shard(f"{stem}{part}.safetensors", made, group))
    others = dict(_side_files(like))
    if len(groups) > 1:
        others[f"{stem}.safetensors{_INDEX}"] = _index(state_dict, shards)
    if state_dict.provenance:
        others[PROVENANCE] = state_dict.provenance.encode()
    return FolderLayout(tuple(shards), others)


def _grouped(state_dict: OutputStateDict, shard_bytes: int) -> list[tuple[int, ...]]:
    """Deal the storages out into shards, in their order."""
    groups: list[list[int]] = [[]]
    filled = 0
    for number, storage in enumerate(state_dict.storages):
        if groups[-1] and filled + storage.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += storage.nbytes
    return [tuple(group) for group in groups]


def _part(state_dict: OutputStateDict, group: tuple[int, ...]) -> OutputStateDict:
    """Return the state_dict of one shard, its storages numbered anew."""
    numbers = {storage: number for number, storage in enumerate(group)}
    items = {
        name: replace(tensor, storage=numbers[tensor.storage])
        for name, tensor in state_dict.tensors.items()
        if tensor.storage in numbers
    }
    storages = tuple(state_dict.storages[number] for number in group)
    return OutputStateDict(storages, items, text=state_dict.text)


def _index(state_dict: OutputStateDict, shards: Sequence[_Shard]) -> bytes:
    """Return the index of shards; a tied name is in its keeper's metadata, not in the index."""
    first: dict[int, str] = {}
    for name, tensor in state_dict.tensors.items():
        first.setdefault(tensor.storage, name)
    weight_map = {first[storage]: shard.name for shard in shards for storage in shard.storages}
    total = sum(storage.nbytes for storage in state_dict.storages)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def _side_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the small files that a model is not complete without."""
    for path in sorted(folder.iterdir()):
        skipped = path.name in (_STATE, PROVENANCE) or path.name.endswith(_INDEX)
        if skipped or path.suffix not in _SIDE_SUFFIXES or not path.is_file():
            continue
        file = InputFile(path)
        try:
            if file.size <= _MOST_SIDE_BYTES:
                yield path.name, file.read(0, file.size)
        finally:
            file.close()
