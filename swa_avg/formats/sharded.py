"""Hugging Face folders: one file of weights, or shards with an index of the tensors.

`save_pretrained`, `Trainer`, `accelerate`, PEFT, diffusers and sentence-transformers write
such folders. Only shards that the index lists are opened, and the index may only list files
in its own folder. In a folder of several models each model is read separately.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from swa_avg.errors import FormatError, listed
from swa_avg.formats.checkpoint import Checkpoint, Components, Headers
from swa_avg.formats.components import (
    ROOT,
    Weights,
    candidates,
    components,
    is_inside,
    located,
    models_in_files,
    other_weights,
    read_json,
    trainer_state,
)
from swa_avg.formats.single import open_file
from swa_avg.pickles import Budget
from swa_avg.tensors import View


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder, or a model in it, holds a file with a known name of weights."""
    return bool(components(folder))


def read(folder: Path, headers: Headers) -> Checkpoint:
    """Read the headers of all files of weights in a folder.

    Args:
        folder: The folder.
        headers: The cache of headers.

    Raises:
        FormatError: An index or a shard is damaged.
        FileError: A shard is missing or cannot be opened.
    """
    names, several = components(folder), models_in_files(folder)
    beside = trainer_state(folder)
    if names == (ROOT,):
        return replace(_read_model(folder, headers, Budget()), beside=beside)
    with ExitStack() as opened:
        models, budget = {}, Budget()
        for name in names:
            if name in several:
                models[name] = open_file(several[name].path, headers, budget)
            else:
                place = folder if name == ROOT else folder / name
                models[name] = _read_model(place, headers, budget)
            opened.callback(models[name].close)
        opened.pop_all()
    texts = [model.metadata for model in models.values()]
    return Checkpoint(
        path=folder,
        format=f"Hugging Face folder{' of several models' if len(models) > 1 else ''}",
        tree=Components({name: located(model) for name, model in models.items()}),
        files=tuple(file for model in models.values() for file in model.files),
        metadata=texts[0] if all(text == texts[0] for text in texts) else {},
        notes=tuple(f"{name}: {note}" for name, model in models.items() for note in model.notes),
        beside=beside,
        budget=budget,
    )


def _read_model(folder: Path, headers: Headers, budget: Budget) -> Checkpoint:
    """Read the headers of the model whose weights are directly in a folder."""
    first, *more = candidates(folder)
    others = [one for one in more if (one.stem, one.variant) != (first.stem, first.variant)]
    if others and not first.is_usual:
        what = "indices" if first.is_index else "models"
        raise FormatError(
            f"has several {what} ({first.path.name}, {others[0].path.name})",
            file=folder,
            remedy="Move the others to another folder"
            if first.is_index
            else "Give the path of the file to use",
        )
    if first.is_index:
        return _read_shards(folder, first, headers, budget)
    whole = open_file(first.path, headers, budget)
    return replace(
        whole,
        path=folder,
        format=f"Hugging Face folder of {whole.format}",
        notes=(*whole.notes, *_other_models(first)),
    )


def _read_shards(folder: Path, first: Weights, headers: Headers, budget: Budget) -> Checkpoint:
    with ExitStack() as opened:
        shards: dict[str, Checkpoint] = {}
        weight_map = _weight_map(first.path)
        for name in dict.fromkeys(weight_map.values()):
            shards[name] = open_file(folder / name, headers, budget)
            opened.callback(shards[name].close)
        weight_map |= _aliases(shards, weight_map)
        tree = {name: _tensor(shards[shard], name) for name, shard in weight_map.items()}
        opened.pop_all()
    return Checkpoint(
        path=folder,
        format="Hugging Face folder of shards",
        tree=tree,
        files=tuple(file for shard in shards.values() for file in shard.files),
        metadata=next((shard.metadata for shard in shards.values()), {}),
        notes=(*_notes(shards, weight_map), *_other_models(first, shards)),
        budget=budget,
    )


def _aliases(shards: Mapping[str, Checkpoint], weight_map: Mapping[str, str]) -> dict[str, str]:
    """Return the tied names in the metadata of shards, with the shard of each."""
    return {
        name: shard
        for shard, opened in shards.items()
        for name in opened.metadata
        if isinstance(opened.tree, dict) and name in opened.tree and name not in weight_map
    }


def _other_models(first: Weights, shards: Collection[str] = ()) -> Iterator[str]:
    """Yield a note if a folder has weights besides those that are read."""
    others = [name for name in other_weights(first) if name not in shards]
    if others:
        what = "this file" if len(others) == 1 else "one of these files"
        yield (
            f"{listed(others)}: other weights; not read (to average them, give {what} of each "
            "checkpoint)"
        )


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor, after checking that it is in the folder of the index."""
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("has no weight_map", file=path, expected="an index of shards")
    for name, shard in weight_map.items():
        if not (isinstance(shard, str) and is_inside(shard)):
            raise FormatError(
                f"lists the file {shard!r}",
                file=path,
                tensor=name,
                expected="a file in the same folder",
            )
    return weight_map


def _tensor(shard: Checkpoint, name: str) -> object:
    if not isinstance(shard.tree, dict) or name not in shard.tree:
        raise FormatError(
            "is not in the shard that the index gives",
            file=shard.path,
            tensor=name,
            remedy="The shards are from different checkpoints",
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
            yield f"{name} holds {more} tensors that the index does not list; left out"
