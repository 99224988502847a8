"""The writer of Hugging Face folders, in the form that `save_pretrained` writes.

The output has safetensors files with the names of the input's weights, in shards with an
index if they are large; a sub-folder for each component; and copies of the small files that
belong to the model (configuration, tokenizer, templates, code). A symbolic link among these
is followed only inside the folder or into the Hugging Face cache: any other link could copy
an unrelated file of the user.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from swa_avg.errors import OutputError, listed
from swa_avg.formats.checkpoint import PROVENANCE, Layout, OutputStateDict
from swa_avg.formats.components import (
    ADAPTER_CONFIG,
    ROOT,
    averages,
    components,
    declared,
    is_weights_name,
    models_in_files,
    weights_of,
)
from swa_avg.formats.safetensors import layout as safetensors_layout
from swa_avg.storage import InputFile, is_remote

SHARD_BYTES = 5_000_000_000
_SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken")
_MOST_SIDE_BYTES = 100_000_000
# Files that belong to the run, not to the model.
_OF_THE_RUN = ("trainer_state.json", PROVENANCE)
# The folder of additional chat templates of transformers.
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class _Shard:
    """A safetensors file of the output: its name, and the numbers of its storages."""

    name: str
    layout: Layout
    storages: tuple[int, ...]


@dataclass(frozen=True)
class FolderLayout:
    """The layout of a folder; positions count through its files as if they were one file.

    Attributes:
        shards: The safetensors files.
        others: The bytes of the other files, by name.
        notes: Notes for the user about files that are left out.
    """

    shards: tuple[_Shard, ...]
    others: Mapping[str, bytes]
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> Mapping[str, int]:
        """The size of each file, in order."""
        sizes = {shard.name: shard.layout.size for shard in self.shards}
        return sizes | {name: len(data) for name, data in self.others.items()}

    @property
    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(self.files.values())

    @property
    def places(self) -> Sequence[int]:
        """The position of the first byte of each storage, in the order of the storages."""
        places: dict[int, int] = {}
        start = 0
        for shard in self.shards:
            for storage, place in zip(shard.storages, shard.layout.places, strict=True):
                places[storage] = start + place
            start += shard.layout.size
        return [places[storage] for storage in range(len(places))]

    def headers(self, checksums: Sequence[int], provenance: str) -> Iterator[tuple[int, bytes]]:
        """Yield all bytes outside the storages, with their positions."""
        start = 0
        for shard in self.shards:
            for place, data in shard.layout.headers(checksums, ""):
                yield start + place, data
            start += shard.layout.size
        for name, data in self.others.items():
            yield start, provenance.encode() if name == PROVENANCE else data
            start += len(data)


def layout(
    state_dict: OutputStateDict,
    like: Path,
    where: Sequence[str] = (ROOT,),
    shard_bytes: int | None = None,
) -> FolderLayout:
    """Lay out a folder of safetensors files in the form that `save_pretrained` writes.

    Args:
        state_dict: The state_dict to write.
        like: A folder of the same model, from which the small files and the names of the
            files of weights are taken.
        where: The components to write. Names in the state_dict begin with the component and
            a slash, except for ROOT and for a component that is written alone.
        shard_bytes: The maximum size of the tensors in one file; a larger tensor has its own.
            None means 5 GB.

    Raises:
        OutputError: The models of accelerate cannot be written in shards.
    """
    _check_in_files(like, where, shard_bytes)
    shards: list[_Shard] = []
    indices: dict[str, bytes] = {}
    for component, members in _members(state_dict, where).items():
        made = _component(state_dict, like, component, members, where, shard_bytes)
        shards += made.shards
        indices |= made.index
    beside = side_files(like, _parts(like, where))
    # Without the weights of an adapter, its configuration would lead loaders astray.
    merged = {
        "" if component == ROOT else f"{component}/"
        for component in where
        if not weights_of(like, component).is_adapter
    }
    passed = {home + ADAPTER_CONFIG for home in merged}
    others = {name: data for name, data in beside.contents.items() if name not in passed}
    others |= indices
    if state_dict.provenance:
        others[PROVENANCE] = state_dict.provenance.encode()
    return FolderLayout(tuple(shards), others, (*beside.notes, *_left_out(like, where)))


@dataclass(frozen=True)
class _Component:
    """The files of one component: its shards, and the index of these by its name, if needed."""

    shards: Sequence[_Shard]
    index: Mapping[str, bytes]


def _component(
    state_dict: OutputStateDict,
    like: Path,
    component: str,
    members: Sequence[int],
    where: Sequence[str],
    shard_bytes: int | None,
) -> _Component:
    """Lay out the files of one component.

    Args:
        state_dict: The state_dict to write.
        like: As for `layout`.
        component: The component.
        members: The numbers of its storages.
        where: All components that are written.
        shard_bytes: As for `layout`.
    """
    weights, inside, alone = weights_of(like, component), f"{component}/", len(where) == 1
    in_file = component in models_in_files(like)
    limit = shard_bytes or SHARD_BYTES
    if in_file and alone:  # a model of accelerate gets the name of an only model
        weights = replace(weights, variant="")
    elif in_file:
        limit = sys.maxsize  # accelerate loads each model from one file
    # A component that is written alone keeps the names of its own files.
    prefix = "" if component == ROOT or alone else inside
    home = "" if component == ROOT or in_file else inside
    groups = _grouped(state_dict, members, limit)
    made = [
        _Shard(
            weights.shard_written(number, len(groups)),
            safetensors_layout(_part(state_dict, group, prefix)),
            group,
        )
        for number, group in enumerate(groups, 1)
    ]
    index: dict[str, bytes] = {}
    if weights.needs_index(len(groups)):
        index[home + weights.index_written] = _index(state_dict, made, prefix)
    return _Component([replace(shard, name=home + shard.name) for shard in made], index)


def _check_in_files(like: Path, where: Sequence[str], shard_bytes: int | None) -> None:
    """Refuse an output that accelerate would not load, if the input has several of its models."""
    models = tuple(models_in_files(like))
    if not models or len(where) == 1:
        return
    if set(models) != set(where):
        raise OutputError(
            f"has the models {', '.join(models)}, and accelerate loads all of them",
            file=like,
            remedy=f"Take one of them, as in --key {where[0]}, or all without --key",
        )
    if shard_bytes:
        raise OutputError(
            f"has the models {', '.join(models)}, and accelerate loads each from one file",
            file=like,
            remedy="Leave out --max-shard-size",
        )


def _parts(like: Path, where: Sequence[str]) -> tuple[str, ...]:
    """Return the sub-folders whose small files belong to the output.

    The files of the folder itself belong to it only if all components are written.
    """
    return tuple(where) if _not_written(like, where) else (ROOT, *where, *declared(like))


def _not_written(like: Path, where: Sequence[str]) -> list[str]:
    """Return the components that are not written and are not averages of other components."""
    names = components(like)
    passed = {name for pair in averages(names).items() if set(pair) & set(where) for name in pair}
    return [name for name in names if name not in where and name not in passed]


def _left_out(like: Path, where: Sequence[str]) -> Iterator[str]:
    names = _not_written(like, where)
    if names:
        yield f"{like}: {listed(names)}: not averaged; not in the output"


def _members(state_dict: OutputStateDict, where: Sequence[str]) -> dict[str, list[int]]:
    """Return the storages of each component, in their order."""
    members: dict[str, dict[int, None]] = {component: {} for component in where}
    # The longest match wins: the component `a/b` may lie inside the component `a`.
    inner = sorted((one for one in where if one != ROOT), key=len, reverse=True)
    for name, tensor in state_dict.tensors.items():
        home = next((one for one in inner if name.startswith(f"{one}/")), ROOT)
        members[where[0] if len(where) == 1 else home][tensor.storage] = None
    return {component: sorted(storages) for component, storages in members.items()}


def _grouped(
    state_dict: OutputStateDict, members: Sequence[int], shard_bytes: int
) -> list[tuple[int, ...]]:
    """Divide storages into shards, in order."""
    groups: list[list[int]] = [[]]
    filled = 0
    for number in members:
        nbytes = state_dict.storages[number].nbytes
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += nbytes
    return [tuple(group) for group in groups]


def _part(state_dict: OutputStateDict, group: tuple[int, ...], prefix: str) -> OutputStateDict:
    """Return the state_dict of one shard, with renumbered storages and names without `prefix`."""
    numbers = {storage: number for number, storage in enumerate(group)}
    items = {
        name.removeprefix(prefix): replace(tensor, storage=numbers[tensor.storage])
        for name, tensor in state_dict.tensors.items()
        if tensor.storage in numbers
    }
    storages = tuple(state_dict.storages[number] for number in group)
    return OutputStateDict(storages, items, text=state_dict.text)


def _index(state_dict: OutputStateDict, shards: Sequence[_Shard], prefix: str) -> bytes:
    """Return the index of shards; tied names are in the metadata of their shard instead."""
    first: dict[int, str] = {}
    for name, tensor in state_dict.tensors.items():
        first.setdefault(tensor.storage, name.removeprefix(prefix))
    weight_map = {first[storage]: shard.name for shard in shards for storage in shard.storages}
    total = sum(state_dict.storages[n].nbytes for shard in shards for n in shard.storages)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


@dataclass(frozen=True)
class SideFiles:
    """The small files of a folder.

    Attributes:
        contents: The bytes of each file, by its path in the folder.
        notes: The files that were left out, and why.
    """

    contents: dict[str, bytes]
    notes: tuple[str, ...]


def side_files(folder: Path, parts: Iterable[str]) -> SideFiles:
    """Read the small files of a folder.

    Args:
        folder: The folder.
        parts: The paths of the sub-folders that belong to the model; `.` is the folder itself.
    """
    contents: dict[str, bytes] = {}
    leaving: list[str] = []
    large: list[str] = []
    for name, path in _wanted(folder, parts):
        if leaves(path, folder):
            leaving.append(name)
            continue
        file = InputFile(path)
        try:
            if file.size <= _MOST_SIDE_BYTES:
                contents[name] = file.read(0, file.size)
            else:
                large.append(name)
        finally:
            file.close()
    notes = [links_note(folder, leaving)] if leaving else []
    if large:
        notes.append(f"{folder}: {listed(large)}: larger than 100 MB; not copied")
    return SideFiles(contents, tuple(notes))


def _wanted(folder: Path, parts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yield the files to copy, before their size and links are checked."""
    for part in dict.fromkeys(parts):
        for inner in (part, f"{part}/{_TEMPLATES}"):
            home = folder / inner if inner != "." else folder
            for path in sorted(home.iterdir()) if home.is_dir() else ():
                passed = path.name in _OF_THE_RUN or is_weights_name(path.name)
                if not passed and path.suffix in _SIDE_SUFFIXES and path.is_file():
                    yield "/".join([*inner.split("/"), path.name]).removeprefix("./"), path


def leaves(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is a link to a file outside the folder.

    For a folder in `snapshots` of the Hugging Face cache, files in `blobs` count as inside.
    """
    if is_remote(path):
        return False
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if home in real.parents:
        return False
    caches = [outer.parent for outer in (home, *home.parents) if outer.name == "snapshots"]
    return not any(real.parent == cache / "blobs" for cache in caches)


def links_note(folder: Path, names: list[str]) -> str:
    """Return a note about links that were not followed."""
    what = "links that lead" if len(names) > 1 else "a link that leads"
    return f"{folder}: {listed(names)}: {what} out of the folder; not copied"
