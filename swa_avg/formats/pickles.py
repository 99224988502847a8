"""The closed unpickler.

Nothing that a pickle names is ever looked up, imported or called. A
name becomes an inert `Global`; calling one gives an inert `Inert`, except for
the few functions in `_REBUILD`, which are ours and build plain containers and
`View`s. The stack machine is the standard library's own, in Python, with
every opcode replaced that could call, hash or allocate what a file asks for.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from swa_avg.errors import FormatError
from swa_avg.tensors import DTYPES, DType, Record, Stored, View

# An expanded (stride 0) view is written out in full. Small ones are honest
# buffers; past this a small file would ask for a huge output.
_MOST_EXPANDED_BYTES = 1 << 20
_TEXT_REFERENCE = re.compile(
    r"\('storage', <class '(torch[\w.]*)\.(\w+)'>, '(\w+)', '([^']*)', (\d{1,18})(?:, None)?\)",
    re.ASCII,
)
_MOST_KEY_NODES = 1000
_LONGEST_INT = 1024  # bytes; Python refuses to print much longer ones
# A pickle has what it holds once or twice copied, by its constructors; no honest one more often.
_MOST_COPIES = 64


@dataclass(frozen=True)
class Global:
    """A class or function that a pickle names. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def described(value: object) -> str:
    """Return a few words for anything; what a pickle builds can have an endless repr."""
    return str(value) if isinstance(value, Global | str | int) else f"<{type(value).__name__}>"


@dataclass(eq=False, repr=False)
class Inert:
    """An object whose class is not ours: what the pickle says of it, and no behaviour."""

    cls: object
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"object of {described(self.cls)}"


class Dict(dict[Any, Any]):
    """An OrderedDict or defaultdict, with the attributes pickled beside its items."""

    state: Any = None


@dataclass(frozen=True)
class UnreadableTensor:
    """A tensor of a kind that cannot be averaged: sparse, quantized, without data."""

    what: str


@dataclass(frozen=True)
class Storage:
    """A storage as a pickle refers to it.

    Attributes:
        stored: Its name and its size.
        dtype: Its element type; None for an untyped one.
        start: The element at which it begins to count, if it is a part of that storage.
    """

    stored: Stored
    dtype: DType | None
    start: int = 0


@dataclass(frozen=True)
class Pickled:
    """What a pickle holds, wherever its storages are.

    Attributes:
        tree: Plain containers, numbers and strings, `View`s, and `Inert` for the rest.
        storages: The storages that it refers to, by name.
    """

    tree: object
    storages: Mapping[str, Stored]

    def located(self, record: Callable[[str], Record | None], file: Path) -> dict[Stored, Record]:
        """Find the storages in a file.

        Args:
            record: Gives a storage's record by its name, or None.
            file: The file's name for messages.

        Raises:
            FormatError: One is not there, or is not as large as it must be.
        """
        found: dict[Stored, Record] = {}
        for name, stored in self.storages.items():
            there = record(name)
            if there is None:
                raise FormatError(f"has no record for storage {name}", file=file)
            if there.length != stored.nbytes:
                raise FormatError(
                    f"storage {name} has {there.length} bytes",
                    file=file,
                    expected=f"{stored.nbytes}",
                    remedy="The file is damaged",
                )
            found[stored] = there
        return found


class Stream(Protocol):
    """Bytes that are read one after the other."""

    def read(self, count: int, /) -> bytes:
        """Return the next `count` bytes."""

    def readline(self) -> bytes:
        """Return the bytes up to the next newline, which is included."""

    def tell(self) -> int:
        """Return how many bytes have been read."""


def load(data: bytes | Stream) -> Pickled:
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


def load_plain(data: bytes | Stream) -> object:
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

    def __init__(self, stream: Stream) -> None:
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
        dtype = _storage_dtype(kind)
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
        rebuild = _REBUILD.get(str(function)) if isinstance(function, Global) else None
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
        if isinstance(target, Inert | Dict):
            target.state = state

    def _set_items(self, target: Any, flat: list[Any]) -> None:
        if isinstance(target, Inert):
            target = target.entries
        if not isinstance(target, dict):
            raise FormatError(f"sets items on a {type(target).__name__}")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            target[_checked_key(key)] = value

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
        self.stack[-1].update(_checked_key(value) for value in values)

    def load_frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(_checked_key, values)))

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


def _checked_key(key: Any) -> Any:
    """Return `key` if hashing it is cheap; nested tuples can take for ever."""
    nodes, left = [key], _MOST_KEY_NODES
    while nodes:
        node = nodes.pop()
        if isinstance(node, tuple | frozenset):
            left -= 1 + len(node)
            if left < 0:
                raise FormatError("holds a dictionary key of unreasonable size")
            nodes.extend(node)
    return key


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


def _storage_dtype(kind: object) -> DType | None:
    if not isinstance(kind, Global) or kind.module.split(".")[0] != "torch":
        raise FormatError(f"holds a storage of {described(kind)}")
    if kind.name in ("UntypedStorage", "_UntypedStorage"):
        return None
    if kind.name not in STORAGE_DTYPES:
        raise FormatError(f"holds a storage of {kind}, a type unknown here")
    return STORAGE_DTYPES[kind.name]


STORAGE_DTYPES: Mapping[str, DType | None] = {
    name: DTYPES.get(dtype)
    for name, dtype in {
        "DoubleStorage": "float64",
        "FloatStorage": "float32",
        "HalfStorage": "float16",
        "BFloat16Storage": "bfloat16",
        "ComplexDoubleStorage": "complex128",
        "ComplexFloatStorage": "complex64",
        "LongStorage": "int64",
        "IntStorage": "int32",
        "ShortStorage": "int16",
        "CharStorage": "int8",
        "ByteStorage": "uint8",
        "BoolStorage": "bool",
        # Quantized: the rebuild function that uses them makes the tensor unreadable.
        "QInt8Storage": "int8",
        "QUInt8Storage": "uint8",
        "QInt32Storage": "int32",
        "QUInt4x2Storage": "uint8",
        "QUInt2x4Storage": "uint8",
    }.items()
}


def _rebuild_tensor_v2(
    machine: _Unpickler,
    storage: object,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> object:
    return _unless_lazy(metadata, machine.tensor(storage, offset, shape, stride))


def _rebuild_tensor_v3(
    machine: _Unpickler,
    storage: object,
    offset: int,
    shape: Sequence[int],
    stride: Sequence[int],
    requires_grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> object:
    element = DTYPES.get(dtype.name) if isinstance(dtype, Global) else None
    if element is None:
        return UnreadableTensor(f"tensor of dtype {described(dtype)}")
    return _unless_lazy(metadata, machine.tensor(storage, offset, shape, stride, element))


def _unless_lazy(metadata: object, tensor: object) -> object:
    """A conjugate or negative view stores the bytes of another tensor than it means."""
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        return UnreadableTensor("lazily conjugated or negated tensor (save its resolve_conj())")
    return tensor


def _rebuild_from_type(
    machine: _Unpickler, function: object, cls: object, args: Any, state: object
) -> object:
    return machine.call(function, args)


def _rebuild_parameter(machine: _Unpickler, data: object, *rest: object) -> object:
    return data


def _unreadable(what: str) -> Callable[..., UnreadableTensor]:
    return lambda machine, *args: UnreadableTensor(what)


def _rebuild_bytes(machine: _Unpickler, text: Any = "", encoding: str = "latin1") -> bytes:
    """Bytes as protocols 0 to 2 spell them: text in latin-1."""
    known = isinstance(text, str) and encoding in ("latin1", "latin-1")
    return text.encode("latin1") if known else b""


_NUMPY_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h"} | {
    "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"
}  # fmt: skip


def _rebuild_numpy_scalar(machine: _Unpickler, dtype: Any, raw: Any = b"") -> object:
    """A numpy number, as metrics are often saved, becomes a Python one."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if code not in _NUMPY_FORMATS or not isinstance(raw, bytes):
        return Inert(Global("numpy", "scalar"), (dtype, raw))
    state = dtype.state if isinstance(dtype.state, tuple) else ()
    order = ">" if len(state) > 1 and state[1] == ">" else "<"
    return struct.unpack(order + _NUMPY_FORMATS[code], raw)[0]


def _rebuild_complex(machine: _Unpickler, real: float = 0, imag: float = 0) -> complex:
    return complex(float(real), float(imag))


def _reconstruct(machine: _Unpickler, cls: object, base: object, state: Any = None) -> object:
    """An object as protocols 0 and 1 spell it: its class, a builtin base and that one's value."""
    made = Inert(cls)
    if described(base) in ("builtins.dict", "__builtin__.dict") and isinstance(state, dict):
        made.entries = state
    elif described(base) in ("builtins.list", "__builtin__.list") and isinstance(state, list):
        made.elements = state
    elif state is not None:
        made.args = (state,)
    return made


def _ordered(pairs: Any) -> Dict:
    made = Dict()
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        made[_checked_key(key)] = value
    return made


def _container(make: Callable[[Any], Any]) -> Callable[..., Any]:
    """A container of the values of another; of what is none, an object."""

    def rebuild(machine: _Unpickler, values: object = ()) -> Any:
        if not isinstance(values, dict | list | tuple | set | frozenset):
            return Inert(None, (values,))
        return make(values)

    return rebuild


_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "set": _container(lambda values: set(map(_checked_key, values))),
    "frozenset": _container(lambda values: frozenset(map(_checked_key, values))),
    "list": _container(list),
    "tuple": _container(tuple),
    "dict": _container(_ordered),
    "complex": _rebuild_complex,
}
_REBUILD: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._tensor._rebuild_from_type": lambda machine, function, cls, args, state: machine.call(
        function, args
    ),
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_sparse_tensor": _unreadable("sparse tensor"),
    "torch._utils._rebuild_qtensor": _unreadable("quantized tensor"),
    "torch._utils._rebuild_nested_tensor": _unreadable("nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("meta tensor, which has no data"),
    "torch._utils._rebuild_wrapper_subclass": _unreadable("tensor subclass without a storage"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable("tensor of a foreign device"),
    "torch.Size": _container(tuple),
    "collections.OrderedDict": _container(_ordered),
    "collections.defaultdict": lambda machine, *factory: Dict(),
    "_codecs.encode": _rebuild_bytes,
    "copyreg._reconstructor": _reconstruct,
    "copy_reg._reconstructor": _reconstruct,
    "numpy.core.multiarray.scalar": _rebuild_numpy_scalar,
    "numpy._core.multiarray.scalar": _rebuild_numpy_scalar,
    **{f"builtins.{name}": rebuild for name, rebuild in _BUILTINS.items()},
    **{f"__builtin__.{name}": rebuild for name, rebuild in _BUILTINS.items()},
}
