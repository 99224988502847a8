"""The storages that a pickle refers to, and the tensors that are views of them.

The result is the same as from `torch.load`, which takes the type and size of a storage from
the first reference to it. A file is refused if a later reference contradicts the first.
"""

from __future__ import annotations

import math
import re
from typing import Any

from swa_avg.errors import FormatError
from swa_avg.pickles.budget import MOST_DIMENSIONS, MOST_ELEMENTS, MOST_EXPANDED_BYTES
from swa_avg.pickles.pickled import Global, Storage, UnreadableTensor, described, storage_dtype
from swa_avg.tensors import DType, Stored, View

_TEXT_REFERENCE = re.compile(
    r"\('storage', <class '(torch[\w.]*)\.(\w+)'>, '(\w+)', '([^']*)', (\d{1,18})(?:, None)?\)",
    re.ASCII,
)


class References:
    """The storages that one pickle refers to.

    Attributes:
        storages: The storages by name.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Stored] = {}
        self._whole: dict[str, Storage] = {}
        # Parts of storages. In files from before torch 1.6 they share a namespace with storages.
        self._parts: dict[str, Storage] = {}

    def resolve(self, pid: Any) -> object:
        """Return the storage, or the module stored with its source, that a persistent id names.

        Raises:
            FormatError: The id names neither, or contradicts an earlier one.
        """
        if isinstance(pid, str):
            pid = _spelled_out(pid)
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # old versions of torch stored the source of a pickled module, too
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise FormatError("holds a reference to something other than a storage")
        _, kind, key, location, numel, *view = pid
        if not (isinstance(key, str) and type(numel) is int and numel >= 0):
            raise FormatError(f"storage {described(key)} has {described(numel)} elements")
        if location == "meta":
            raise FormatError(f"storage {key} is on the meta device, which has no data")
        whole = self._storage(key, kind, numel)
        return self._part(whole, view[0]) if view and view[0] is not None else whole

    def _storage(self, key: str, kind: object, numel: int) -> Storage:
        dtype = storage_dtype(kind)
        nbytes = numel * (dtype.itemsize if dtype else 1)
        known = self._whole.get(key)
        if known is None:
            if key in self._parts:
                raise FormatError(f"has two storages named {key}")
            stored = self.storages[key] = Stored(key, numel, nbytes)
            known = self._whole[key] = Storage(stored, _name(kind), dtype, 0, numel)
        if (known.stored.nbytes, known.kind) != (nbytes, _name(kind)):
            raise FormatError(
                f"storage {key} is a {known.kind} of {known.stored.nbytes} bytes",
                expected=f"a {_name(kind)} of {nbytes}, as elsewhere in the file",
                remedy="The file is damaged",
            )
        return known

    def _part(self, whole: Storage, view: object) -> Storage:
        if not (isinstance(view, tuple) and len(view) == 3 and isinstance(view[0], str)):
            raise FormatError("holds a part of a storage that lies outside the storage")
        name, start, numel = view
        inside = type(start) is type(numel) is int and 0 <= start <= start + numel <= whole.numel
        if not inside:
            raise FormatError("holds a part of a storage that lies outside the storage")
        made = Storage(whole.stored, whole.kind, whole.dtype, start, numel)
        if name in self._whole or self._parts.setdefault(name, made) != made:
            raise FormatError(f"has two storages named {name}")
        return made

    def tensor(
        self, storage: object, offset: object, shape: object, stride: object, dtype: DType | None
    ) -> View | UnreadableTensor:
        """Return a tensor of a storage, after checking that it lies inside the storage.

        Args:
            storage: The storage.
            offset: The tensor's first element.
            shape: Its shape.
            stride: Its strides, in elements.
            dtype: Its dtype, if that is not the dtype of the storage.

        Raises:
            FormatError: The tensor does not lie inside the storage, or its shape or stride is
                impossible.
        """
        if not isinstance(storage, Storage):
            return UnreadableTensor("tensor whose storage is of an unknown kind")
        if storage.kind.startswith("Q"):
            return UnreadableTensor("quantized tensor")
        element = dtype or storage.dtype
        if element is None:
            return UnreadableTensor("tensor of an unknown dtype")
        if storage.dtype and element is not storage.dtype:
            raise FormatError(f"storage {storage.stored.name} has tensors of two dtypes")
        view = _view(element, shape, stride, storage, offset)
        _check_inside(view, storage)
        return view


def _name(kind: object) -> str:
    return kind.name if isinstance(kind, Global) else described(kind)


def _view(dtype: DType, shape: object, stride: object, storage: Storage, offset: object) -> View:
    """Return a tensor, after checking that its shape, stride and offset are valid numbers."""
    if not (isinstance(shape, tuple | list) and isinstance(stride, tuple | list)):
        raise FormatError("holds a tensor without a shape or stride")
    for number in (offset, *shape, *stride):
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise FormatError("holds a tensor with an impossible shape, stride or offset")
    if len(shape) != len(stride):
        raise FormatError(f"holds a tensor of {len(shape)} sizes, {len(stride)} strides")
    check_shape(shape)
    assert isinstance(offset, int)
    return View(dtype, tuple(shape), tuple(stride), storage.stored, storage.start + offset)


def check_shape(shape: tuple[int, ...] | list[int]) -> None:
    """Refuse an impossible shape.

    Raises:
        FormatError: The shape has too many dimensions, or more elements than can be counted.
    """
    if len(shape) > MOST_DIMENSIONS:
        raise FormatError(
            f"holds a tensor of {len(shape)} dimensions", expected=f"{MOST_DIMENSIONS} at most"
        )
    if math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise FormatError("holds a tensor of more elements than can be counted")


def _check_inside(view: View, storage: Storage) -> None:
    """Refuse a tensor that reaches outside its storage, or is expanded to far more bytes."""
    itemsize, numel, room = view.dtype.itemsize, view.numel, view.stored.nbytes
    unit = storage.dtype.itemsize if storage.dtype else 1
    end = (view.offset + view.extent) * itemsize
    if numel and end > (storage.start + storage.numel) * unit:
        raise FormatError(f"holds a tensor that ends {end} bytes into storage {view.stored.name}")
    if numel * itemsize > max(room, MOST_EXPANDED_BYTES):
        raise FormatError(
            f"holds a tensor of {numel * itemsize} bytes, expanded from {room} bytes",
            remedy="Save it contiguous",
        )


def _spelled_out(pid: str) -> tuple[Any, ...]:
    """Parse a reference to a storage in protocol 0, which stores the tuple as text."""
    found = _TEXT_REFERENCE.fullmatch(pid)
    if not found:
        raise FormatError(f"holds a reference to something other than a storage, {described(pid)}")
    module, name, key, location, numel = found.groups()
    return "storage", Global(module, name), key, location, int(numel)
