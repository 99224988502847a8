"""The closed unpickler.

Nothing that a pickle names is ever looked up, imported or called. A name becomes
an inert `Global`; calling one gives an inert `Inert`, except for the few functions
in `REBUILD`, which are ours. The stack machine is the standard library's own, in
Python, with every opcode replaced that could call, hash or allocate what a file
asks for.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable, Sequence, Sized
from typing import Any, ClassVar, Protocol

from swa_avg.errors import FormatError
from swa_avg.formats.pickled import (
    Dict,
    Global,
    Inert,
    Pickled,
    Storage,
    Stream,
    UnreadableTensor,
    checked_key,
    described,
    storage_dtype,
)
from swa_avg.formats.rebuilding import REBUILD
from swa_avg.tensors import DType, Stored, View

# An expanded (stride 0) view is written out in full. Small ones are honest
# buffers; past this a small file would ask for a huge output.
_MOST_EXPANDED_BYTES = 1 << 20
_TEXT_REFERENCE = re.compile(
    r"\('storage', <class '(torch[\w.]*)\.(\w+)'>, '(\w+)', '([^']*)', (\d{1,18})(?:, None)?\)",
    re.ASCII,
)
_LONGEST_INT = 1024  # bytes; Python refuses to print much longer ones
# A pickle has what it holds once or twice copied, by its constructors; no honest one more often.
_MOST_COPIES = 64


class Readable(Protocol):
    """Bytes that are read one after the other."""

    def read(self, count: int, /) -> bytes:
        """Return the next `count` bytes."""

    def readline(self) -> bytes:
        """Return the bytes up to the next newline, which is included."""

    def tell(self) -> int:
        """Return how many bytes have been read."""


def load(data: bytes | Readable) -> Pickled:
    """Read a pickle, running nothing.

    Args:
        data: The pickle, protocol 0 to 5; of a stream it is what comes next.

    Raises:
        FormatError: Anything about the pickle that is not sound.
    """
    try:
        machine = _Unpickler(io.BytesIO(data) if isinstance(data, bytes) else data)
        return Pickled(machine.load(), machine.storages)
    except FormatError:
        raise
    except (Exception, RecursionError) as error:
        # Whatever a hostile pickle makes the machine trip over is a fault of the file.
        raise FormatError(
            f"holds a pickle that cannot be read ({type(error).__name__}: {error})",
            remedy="The file is damaged or no checkpoint",
        ) from error


def load_plain(data: bytes | Readable) -> object:
    """Read a pickle that has no storages.

    Raises:
        FormatError: It has, or is not sound.
    """
    pickled = load(data)
    if pickled.storages:
        raise FormatError("refers to a storage where none belongs")
    return pickled.tree


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: Readable) -> None:
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self.stream = stream
        self.storages: dict[str, Stored] = {}
        self.copied = 0
        self.stack: list[Any]
        self.append: Callable[[Any], None]
        self.read: Callable[[int], bytes]
        self.readline: Callable[[], bytes]
        self.pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        return Global(module, name)

    def persistent_load(self, pid: Any) -> object:
        if isinstance(pid, str):
            pid = _spelled_out(pid)
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # of a module that is saved whole torch once kept the source, too
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
            raise FormatError("holds a reference that is no storage")
        _, kind, key, _, numel, *view = pid
        if not (isinstance(key, str) and isinstance(numel, int) and numel >= 0):
            raise FormatError(f"storage {described(key)} has {described(numel)} elements")
        start = _view_start(view[0], numel) if view and view[0] is not None else 0
        dtype = storage_dtype(kind)
        nbytes = numel * (dtype.itemsize if dtype else 1)
        stored = self.storages.setdefault(key, Stored(key, numel, nbytes))
        if stored.nbytes != nbytes:
            raise FormatError(
                f"storage {key} has {stored.nbytes} bytes",
                expected=f"{nbytes}",
                remedy="The file is damaged",
            )
        return Storage(stored, dtype, start)

    def get_extension(self, code: int) -> None:
        raise FormatError("holds a pickle extension code")

    def call(self, function: object, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise FormatError("holds a call without arguments")
        rebuild = REBUILD.get(str(function)) if isinstance(function, Global) else None
        if rebuild is None:
            return _unless_tensor(function, args)
        self.copied += sum(len(arg) for arg in args if isinstance(arg, Sized))
        if self.copied > _MOST_COPIES * self.stream.tell():
            raise FormatError("holds a few values that it copies without end")
        return rebuild(self, *args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.append(self.call(self.stack.pop(), args))

    def load_newobj_ex(self) -> None:
        kwargs, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        made = self.call(cls, args)
        if kwargs and isinstance(made, Inert):
            made.state = kwargs
        self.append(made)

    def load_inst(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        args = tuple(self.pop_mark())  # first: it changes what `append` is
        self.append(self.call(Global(module, name), args))

    def load_obj(self) -> None:
        cls, *args = self.pop_mark()
        self.append(self.call(cls, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert | Dict | Stream):
            target.state = state

    def _set_items(self, target: Any, flat: list[Any]) -> None:
        if isinstance(target, Inert):
            target = target.entries
        if not isinstance(target, dict):
            raise FormatError(f"sets items on a {type(target).__name__}")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[checked_key(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        flat = self.pop_mark()
        self._set_items(self.stack[-1], flat)

    def load_dict(self) -> None:
        made: dict[Any, Any] = {}
        self._set_items(made, self.pop_mark())
        self.append(made)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, Inert):
            target = target.elements
        if not isinstance(target, list):
            raise FormatError(f"appends to a {type(target).__name__}")
        target.extend(values)

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def load_appends(self) -> None:
        values = self.pop_mark()
        self._extend(self.stack[-1], values)

    def load_additems(self) -> None:
        values = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise FormatError("adds elements to what is no set")
        self.stack[-1].update(checked_key(value) for value in values)

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(checked_key, values)))

    def load_long4(self) -> None:
        (length,) = struct.unpack("<i", self.read(4))
        if length < 0:
            raise FormatError("holds a number of negative length")
        data = self.read(length)
        if length > _LONGEST_INT:
            self.append(Inert(Global("builtins", "int")))
        else:
            self.append(int.from_bytes(data, "little", signed=True))

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))

    def tensor(
        self,
        storage: object,
        offset: int,
        shape: Sequence[int],
        stride: Sequence[int],
        dtype: DType | None = None,
    ) -> View | UnreadableTensor:
        if not isinstance(storage, Storage):
            return UnreadableTensor("tensor whose storage is of an unknown kind")
        dtype = dtype or storage.dtype
        if dtype is None:
            return UnreadableTensor("tensor of an unknown dtype")
        if type(offset) is int:
            offset += storage.start
        view = View(dtype, tuple(shape), tuple(stride), storage.stored, offset)
        _check_geometry(view)
        return view


for _code, _load in (
    (pickle.REDUCE, _Unpickler.load_reduce),
    (pickle.NEWOBJ, _Unpickler.load_newobj),
    (pickle.NEWOBJ_EX, _Unpickler.load_newobj_ex),
    (pickle.INST, _Unpickler.load_inst),
    (pickle.OBJ, _Unpickler.load_obj),
    (pickle.BUILD, _Unpickler.load_build),
    (pickle.SETITEM, _Unpickler.load_setitem),
    (pickle.SETITEMS, _Unpickler.load_setitems),
    (pickle.DICT, _Unpickler.load_dict),
    (pickle.APPEND, _Unpickler.load_append),
    (pickle.APPENDS, _Unpickler.load_appends),
    (pickle.ADDITEMS, _Unpickler.load_additems),
    (pickle.FROZENSET, _Unpickler.load_frozenset),
    (pickle.LONG4, _Unpickler.load_long4),
    (pickle.BYTEARRAY8, _Unpickler.load_bytearray8),
):
    _Unpickler.dispatch[_code[0]] = _load


def _check_geometry(view: View) -> None:
    """Refuse a tensor that looks outside its storage, or is larger than it."""
    for number in (view.offset, *view.shape, *view.stride):
        if type(number) is not int or not 0 <= number < 1 << 62:
            raise FormatError("holds a tensor with an impossible shape, stride or offset")
    if len(view.shape) != len(view.stride):
        raise FormatError(f"holds a tensor of {len(view.shape)} sizes, {len(view.stride)} strides")
    room = view.stored.nbytes
    itemsize, numel = view.dtype.itemsize, view.numel
    end = (view.offset + view.extent) * itemsize
    if numel and end > room:
        raise FormatError(f"holds a tensor that ends {end} bytes into storage {view.stored.name}")
    if numel * itemsize > max(room, _MOST_EXPANDED_BYTES):
        raise FormatError(
            f"holds a tensor of {numel * itemsize} bytes, expanded from {room} bytes",
            remedy="Save it contiguous",
        )


def _unless_tensor(function: object, args: tuple[Any, ...]) -> object:
    """An unknown object does no harm, but a tensor of an unknown kind must not get lost."""
    if isinstance(function, Global) and str(function).startswith("torch._utils._rebuild_"):
        return UnreadableTensor(f"tensor of an unknown kind ({function})")
    return Inert(function, args)


def _view_start(view: object, numel: int) -> int:
    """Return where a storage that is part of another begins in it, in elements."""
    if isinstance(view, tuple) and len(view) == 3:
        _, start, size = view
        if type(start) is type(size) is int and 0 <= start <= start + size <= numel:
            return start
    raise FormatError("holds a storage that is an impossible part of another")


def _spelled_out(pid: str) -> tuple[Any, ...]:
    """Return a reference to a storage as protocol 0 has it: the text of what others hold."""
    found = _TEXT_REFERENCE.fullmatch(pid)
    if not found:
        raise FormatError(f"holds a reference that is no storage, {described(pid)}")
    module, name, key, location, numel = found.groups()
    return "storage", Global(module, name), key, location, int(numel)
