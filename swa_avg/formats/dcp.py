"""Folders of `torch.distributed.checkpoint`: `.metadata`, and a file of items for each rank.

A tensor is stored in chunks, which are boxes of the tensor written by one or several ranks.
Each chunk is an item of a `.distcp` file, in the format of `torch.save` for one tensor.
`.metadata` is a pickle with the location of each item. It is read without importing its
classes or running its code. Items other than tensors are pickles too; these and the state of
the optimizer are not read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from shlex import quote

from swa_avg.errors import FormatError, listed
from swa_avg.formats import single
from swa_avg.formats.checkpoint import Checkpoint, Headers
from swa_avg.formats.components import is_inside, trainer_state
from swa_avg.pickles import Budget, Global, Inert, check_shape, described, unpickler
from swa_avg.storage import InputFile, Section
from swa_avg.tensors import Part, TensorRef, View, contiguous_stride, in_groups, optimizer_groups

DISTRIBUTED = "torch distributed checkpoint"  # the name of the format
_METADATA = ".metadata"
# The sub-folder with the model: of accelerate and Trainer, of NeMo, of OLMo-core.
_FSDP = "pytorch_model_fsdp_"
_INNER = (f"{_FSDP}0", "weights", "model_and_optim")
# Files in which Lightning and Megatron-LM record the state of the run.
_BESIDE = ("meta.pt", "common.pt")
_CALLED = re.compile(r"optim(izer)?s?(_states?|_\d+)?")
# The prefixes of the model in checkpoints whose names were flattened before saving.
_SLOTS = {"model", "module", "state_dict", "app", "net", "ema", "model_ema", "ema_model"}
_UNREAD = Inert(Global("torch.distributed.checkpoint", "item"))

Box = tuple[tuple[int, ...], tuple[int, ...]]


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a distributed checkpoint, even an incomplete one."""
    home = _home(folder)
    return (home / _METADATA).exists() or next(home.glob("*.distcp"), None) is not None


def read(folder: Path) -> Checkpoint:
    """Read the metadata of a folder and the headers of its tensors.

    Raises:
        FormatError: The metadata or an item is damaged or not supported, or a tensor has
            holes.
        FileError: A file is missing or cannot be opened.
    """
    home = _home(folder)
    _refuse_several(folder, home)
    path = home / _METADATA
    if not path.exists():
        raise FormatError(
            f"has no {_METADATA}",
            file=home,
            remedy="The checkpoint is not complete: leave it out, for example with --exclude",
        )
    with ExitStack() as opened:
        source = _Source(home, opened)
        try:
            metadata = _metadata(path, source.budget)
            tree, notes = _tree(metadata, source)
        except FormatError as error:
            error.file = error.file or str(path)
            raise
        opened.pop_all()
    return Checkpoint(
        folder,
        DISTRIBUTED,
        tree,
        tuple(source.files.values()),
        notes=tuple(notes),
        beside=trainer_state(folder) or _state_beside(home),
        budget=source.budget,
    )


def _refuse_several(folder: Path, home: Path) -> None:
    """Refuse a folder in which accelerate saved several models."""
    models = sorted(path.parent for path in folder.glob(f"{_FSDP}[0-9]*/{_METADATA}"))
    if len(models) > 1 and home != folder:
        raise FormatError(
            f"has several models ({listed([path.name for path in models])})",
            file=folder,
            remedy="Give the folder of one of them in each checkpoint, as in "
            f"{quote(str(models[0]))}",
        )


def _home(folder: Path) -> Path:
    inner = (folder / name for name in _INNER)
    return next((home for home in inner if (home / _METADATA).exists()), folder)


def _state_beside(folder: Path) -> object:
    """Return the content of a framework's file beside the tensors, or None."""
    path = next((folder / name for name in _BESIDE if (folder / name).exists()), None)
    if path is None:
        return None
    meta = single.open_file(path, Headers())
    meta.close()
    return meta.tree


def _metadata(path: Path, budget: Budget) -> Mapping[str, object]:
    """Return the fields of the metadata object, ignoring its class."""
    file = InputFile(path)
    try:
        budget.read(file.size)
        found = _fields(unpickler.load_plain(file.read(0, file.size), budget))
    finally:
        file.close()
    for name in ("state_dict_metadata", "storage_data"):
        if not isinstance(found.get(name), dict):
            raise FormatError(f"has no {name}", expected="metadata of a distributed checkpoint")
    return found


def _fields(value: object) -> Mapping[str, object]:
    """Return the attributes of a pickled dataclass."""
    state = value.state if isinstance(value, Inert) else None
    return state if isinstance(state, dict) else {}


def _tree(metadata: Mapping[str, object], source: _Source) -> tuple[dict[str, object], list[str]]:
    """Rebuild the nested dicts that were saved; return them with notes for the user."""
    entries = metadata["state_dict_metadata"]
    items = metadata["storage_data"]
    assert isinstance(entries, dict)
    assert isinstance(items, dict)
    source.take(items)
    paths = _paths(entries, metadata.get("planner_data"))
    groups = _optimizers(paths)
    unread = {name for name, path in paths.items() if in_groups(".".join(path), groups)}
    flat = all(len(path) == 1 for path in paths.values())
    if flat and unread:
        paths = _split({name: path for name, path in paths.items() if name not in unread})
    tree: dict[str, object] = {}
    for name, path in paths.items():
        *branches, leaf = path
        at = tree
        for branch in branches:
            below = at.setdefault(branch, {})
            if not isinstance(below, dict):
                raise FormatError("lies inside another item", tensor=name)
            at = below
        if leaf in at:
            raise FormatError("occurs twice", tensor=name)
        at[leaf] = _UNREAD if name in unread else _item(name, entries[name], source)
    return tree, [f"{listed(list(groups))}: optimizer state; not read"] if flat and groups else []


def _paths(entries: Mapping[object, object], mapping: object) -> dict[str, tuple[str, ...]]:
    """Return the path of each item in the nested dicts before they were flattened."""
    paths: dict[str, tuple[str, ...]] = {}
    for name in entries:
        if not isinstance(name, str):
            raise FormatError(f"has an item named {described(name)}")
        path = mapping.get(name) if isinstance(mapping, dict) else None
        parts = path if isinstance(path, tuple) and path else (name,)
        paths[name] = tuple(described(part) for part in parts)
    return paths


def _optimizers(paths: Mapping[str, tuple[str, ...]]) -> dict[str, None]:
    """Return the dotted prefixes of optimizer state, which is not read.

    A dict next to the model is optimizer state if its name says so. Among flattened names
    the structure of the names decides.
    """
    groups = optimizer_groups({".".join(path): None for path in paths.values()})
    heads = {path[0].partition(".")[0] for path in paths.values()}
    for path in paths.values():
        named = len(path) == 1 and bool(heads & _SLOTS)
        branches = tuple(path[0].split(".", 1)[:-1]) if named else path[:-1]
        for count, branch in enumerate(branches, 1):
            if _CALLED.fullmatch(branch):
                groups[".".join(branches[:count])] = None
    return groups


def _split(paths: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Split the prefix of the model or optimizer off flattened names, if every name has one."""
    if all("." in name and name.partition(".")[0] in _SLOTS for name in paths):
        return {name: tuple(name.split(".", 1)) for name in paths}
    return paths


def _item(name: str, description: object, source: _Source) -> object:
    """Return the location of a tensor, or None for any other item."""
    fields = _fields(description)
    if "size" not in fields:
        return _UNREAD
    try:
        shape = _sizes(fields["size"])
        chunks = fields.get("chunks")
        boxes = [_box(chunk) for chunk in chunks] if isinstance(chunks, list) else []
        filled = [box for box in boxes if 0 not in box[1]] or boxes[:1]
        check_shape(shape)
        _check_cover(shape, filled, source.budget)
        parts = tuple(Part(start, source.chunk(name, start, size)) for start, size in filled)
    except FormatError as error:
        error.tensor = error.tensor or name
        raise
    refs = [part.ref for part in parts]
    if len({ref.dtype for ref in refs}) != 1:
        raise FormatError("has chunks of several dtypes", tensor=name)
    if len(parts) == 1:
        return refs[0]
    stride = contiguous_stride(shape)
    return TensorRef(refs[0].dtype, shape, stride, refs[0].record, 0, parts)


def _sizes(value: object) -> tuple[int, ...]:
    if isinstance(value, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in value):
        return value
    raise FormatError("has an impossible shape or offset")


def _box(chunk: object) -> Box:
    fields = _fields(chunk)
    return _sizes(fields.get("offsets")), _sizes(fields.get("sizes"))


def _check_cover(shape: tuple[int, ...], boxes: Sequence[Box], budget: Budget) -> None:
    """Refuse boxes that overlap, leave a hole in a tensor, or lie outside the tensor."""
    covered = 0
    for start, size in boxes:
        inside = len(start) == len(size) == len(shape) and all(
            at + count <= whole for at, count, whole in zip(start, size, shape, strict=True)
        )
        if not inside:
            raise FormatError("has a chunk that lies outside the tensor")
        covered += math.prod(size)
    if covered < math.prod(shape) or not boxes:
        raise FormatError("has a hole: some of its chunks are missing")
    if covered > math.prod(shape) or not _tiled(shape, boxes, budget):
        raise FormatError("has chunks that overlap")


def _tiled(shape: tuple[int, ...], boxes: Sequence[Box], budget: Budget) -> bool:
    """Return whether boxes cover each element of a tensor exactly once.

    The number of boxes that cover an element changes at the corners of the boxes, with
    alternating signs, and these jumps determine it. The boxes tile the tensor if all jumps
    cancel except those at the corners of the tensor.
    """
    cut = [d for d, whole in enumerate(shape) if any(size[d] != whole for _, size in boxes)]
    budget.make(len(boxes) << len(cut))
    jumps = Counter(_jumps((0,) * len(shape), shape, cut))
    for start, size in boxes:
        jumps.subtract(_jumps(start, size, cut))
    return not any(jumps.values())


def _jumps(
    start: tuple[int, ...], size: tuple[int, ...], cut: Sequence[int]
) -> dict[tuple[int, ...], int]:
    """Return the corners of a box in the given dimensions, with their signs."""
    edges = [((start[d], 1), (start[d] + size[d], -1)) for d in cut]
    return {
        tuple(at for at, _ in corner): math.prod(sign for _, sign in corner)
        for corner in product(*edges)
    }


@dataclass(frozen=True)
class _Place:
    """The location of an item."""

    file: str
    start: int
    length: int


class _Source:
    """The items of a folder. Opens each file once and reads the headers of tensors.

    Attributes:
        files: The opened files by name.
        budget: Limits what is built from the headers.
    """

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.files: dict[str, InputFile] = {}
        self.budget = Budget()
        self._headers = Headers()
        self._items: dict[_Place, Checkpoint] = {}
        self._folder = folder
        self._opened = opened
        self._places: dict[tuple[str, tuple[int, ...] | None], object] = {}

    def take(self, items: Mapping[object, object]) -> None:
        """Record the location of each item by its name and its offset in the tensor."""
        for index, info in items.items():
            fields = _fields(index)
            name, start = fields.get("fqn"), fields.get("offset")
            if not isinstance(name, str):
                raise FormatError(f"has an item named {described(name)}")
            key = (name, None if start is None else _sizes(start))
            if key in self._places:
                raise FormatError("lists an item twice", tensor=name)
            self._places[key] = info

    def chunk(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> TensorRef:
        """Return the location of the elements of a chunk."""
        place = self._place(name, start)
        if place.file not in self.files:
            self.files[place.file] = InputFile(self._folder / place.file)
            self._opened.callback(self.files[place.file].close)
        file = self.files[place.file]
        if place not in self._items:
            section = Section(file, place.start, place.length)
            self._items[place] = single.read(section, self._headers, self.budget)
        item = self._items[place]
        found = item.tree
        if not isinstance(found, View) or found.shape != shape:
            what = list(found.shape) if isinstance(found, View) else described(found)
            raise FormatError(
                f"has {what} for a chunk",
                file=file.path,
                tensor=name,
                expected=f"a tensor of shape {list(shape)}",
            )
        return item.located(found)

    def _place(self, name: str, start: tuple[int, ...]) -> _Place:
        info = _fields(self._places.get((name, start)))
        file, place, length = (info.get(key) for key in ("relative_path", "offset", "length"))
        if not (isinstance(file, str) and isinstance(place, int) and isinstance(length, int)):
            raise FormatError(f"has no item for its chunk at {list(start)}")
        if not is_inside(file):
            raise FormatError(f"is in the file {file!r}", expected="a file in the same folder")
        if info.get("transform_descriptors"):
            raise FormatError(
                "is stored compressed or with another transform",
                remedy="Save the checkpoint without extensions",
            )
        return _Place(file, place, length)
