"""An unpickler that runs no code from the file.

Names in a pickle are never looked up, imported or called. A name becomes a `Global`, and a
call of it gives an `Inert`, except for the names in `REBUILD`, which have replacements in
this package. The stack machine is the Python version of the standard library's, in which
every opcode is replaced that could call, hash or allocate something on behalf of the file.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable, Sized
from typing import Any, ClassVar, Protocol

from swa_avg.errors import FormatError
from swa_avg.pickles.budget import FREE_COPIES, MOST_OBJECTS, Budget
from swa_avg.pickles.pickled import Dict, Global, Inert, Pickled, Stream, UnreadableTensor
from swa_avg.pickles.rebuilding import REBUILD
from swa_avg.pickles.references import References
from swa_avg.tensors import DType, View

# Tensor classes of torch that a pickle may call: torch.Tensor, torch.cuda.FloatTensor.
_TENSOR = re.compile(r"torch(\.\w+)*\.(\w*Tensor|tensor|Parameter|Buffer)", re.ASCII)
_LONGEST_INT = 1024  # bytes; Python refuses to print much longer integers


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, count: int, /) -> bytes:
        """Return the next `count` bytes."""

    def readline(self) -> bytes:
        """Return the bytes up to and including the next newline."""

    def tell(self) -> int:
        """Return the number of bytes read so far."""


def load(data: bytes | Readable, budget: Budget) -> Pickled:
    """Read a pickle, running nothing.

    Args:
        data: The pickle, of protocol 0 to 5; in a stream it begins at the current position.
        budget: Limits how much is built.

    Raises:
        FormatError: The pickle is damaged or not supported.
    """
    try:
        machine = _Unpickler(io.BytesIO(data) if isinstance(data, bytes) else data, budget)
        return Pickled(machine.load(), machine.references.storages)
    except FormatError:
        raise
    except (Exception, RecursionError) as error:
        # Any exception in the stack machine means that the pickle is malformed.
        raise FormatError(
            f"holds a pickle that cannot be read ({type(error).__name__}: {error})",
            remedy="The file is damaged or not a checkpoint",
        ) from error


def load_plain(data: bytes | Readable, budget: Budget) -> object:
    """Read a pickle that refers to no storages.

    Raises:
        FormatError: The pickle refers to a storage, or is damaged or not supported.
    """
    pickled = load(data, budget)
    if pickled.storages:
        raise FormatError("refers to a storage where none is allowed")
    return pickled.tree


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: Readable, budget: Budget) -> None:
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self.stream = stream
        self.budget = budget
        self.references = References()
        self.key = budget.key
        self.steps = 0
        self.copied = self.copied_bytes = 0
        self.read = stream.read
        self.readline = stream.readline
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append: Callable[[Any], None] = self.stack.append
        self.proto = 0
        self.pop_mark: Callable[[], list[Any]]

    def load(self) -> object:
        """Run the pickle to its end, for at most as many opcodes as the budget allows."""
        read, dispatch = self.stream.read, self.dispatch
        left = MOST_OBJECTS - self.budget.objects
        try:
            for self.steps in range(left + 1):
                code = read(1)
                if not code:
                    raise EOFError("it has no end")
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            self.budget.make(self.steps)
            made: object = stop.value
            return made
        self.budget.make(left + 1)
        raise AssertionError("the budget did not stop the pickle")

    def load_frame(self) -> None:
        self.read(8)  # the length of the frame is not needed: its content follows directly

    def find_class(self, module: str, name: str) -> Any:
        return Global(module, name)

    def persistent_load(self, pid: Any) -> object:
        return self.references.resolve(pid)

    def get_extension(self, code: int) -> None:
        raise FormatError("holds a pickle extension code")

    def call(self, function: object, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise FormatError("holds a call without arguments")
        rebuild = REBUILD.get(str(function)) if isinstance(function, Global) else None
        if rebuild is None:
            return _unless_tensor(function, args)
        self._draw_copies(args)
        return rebuild(self, *args)

    def _draw_copies(self, args: tuple[Any, ...]) -> None:
        """Limit what a function may copy: a pickle of torch.save copies each value once."""
        for arg in args:
            if isinstance(arg, str | bytes | bytearray):
                self.copied_bytes += len(arg)
            elif isinstance(arg, Sized):
                self.copied += len(arg)
        many = self.copied > self.steps + FREE_COPIES
        if many or self.copied_bytes > self.stream.tell() + FREE_COPIES:
            raise FormatError("copies its values too many times")

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
        args = tuple(self.pop_mark())  # before `append`, which it replaces
        self.append(self.call(Global(module, name), args))

    def load_obj(self) -> None:
        cls, *args = self.pop_mark()
        self.append(self.call(cls, tuple(args)))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, View):
            raise FormatError(
                "holds a tensor whose content is replaced after it is created",
                remedy="Save it again with torch.save",
            )
        if isinstance(target, Dict) and isinstance(state, dict):
            target.state = {**(target.state or {}), **state}
        elif isinstance(target, Inert | Dict | Stream):
            target.state = state

    def _set_items(self, target: Any, flat: list[Any]) -> None:
        if isinstance(target, Inert):
            target = target.entries
        if not isinstance(target, dict):
            raise FormatError(f"sets items on a {type(target).__name__}")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[key if type(key) is str else self.key(key)] = value

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
            raise FormatError("adds elements to something other than a set")
        self.stack[-1].update(map(self.key, values))

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(self.key, values)))

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
        offset: object,
        shape: object,
        stride: object,
        dtype: DType | None = None,
    ) -> View | UnreadableTensor:
        return self.references.tensor(storage, offset, shape, stride, dtype)


for _code, _load in (
    (pickle.FRAME, _Unpickler.load_frame),
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


def _unless_tensor(function: object, args: tuple[Any, ...]) -> object:
    """Return a placeholder for a call; a tensor of an unknown kind is marked as unreadable."""
    name = str(function) if isinstance(function, Global) else ""
    if name.startswith(("torch._utils._rebuild_", "torch._tensor.")) or _TENSOR.fullmatch(name):
        return UnreadableTensor(f"tensor of an unknown kind ({name})")
    return Inert(function, args)
