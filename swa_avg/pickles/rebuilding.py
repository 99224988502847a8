"""The functions that a pickle may call: replacements that build plain containers and `View`s.

The table `REBUILD` maps the names that torch, Python and numpy write into pickles to the
replacements. A call of any other name gives an `Inert` object.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from swa_avg.errors import FormatError
from swa_avg.pickles.pickled import Dict, Global, Inert, Stream, UnreadableTensor, described
from swa_avg.tensors import DTYPES, DType, View

# The attributes of a tensor whose assignment sets its elements (torch 2.13).
_CONTENTS = frozenset(("data", "real", "imag"))


class Machine(Protocol):
    """The part of the unpickler that these functions need."""

    def call(self, function: object, args: Any) -> Any:
        """Return the result of calling a name."""

    def key(self, key: Any) -> Any:
        """Return a dict key or set element unchanged, after checking that it is cheap to hash."""

    def tensor(
        self,
        storage: object,
        offset: object,
        shape: object,
        stride: object,
        dtype: DType | None = None,
    ) -> View | UnreadableTensor:
        """Return a tensor of a storage, after checking that it lies inside the storage."""


def _rebuild_tensor_v2(
    machine: Machine,
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object = False,
    hooks: object = None,
    metadata: object = None,
) -> object:
    return _unless_lazy(metadata, machine.tensor(storage, offset, shape, stride))


def _rebuild_tensor_v3(
    machine: Machine,
    storage: object,
    offset: object,
    shape: object,
    stride: object,
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
    """Return the tensor, unless it is a conjugate or negative view: its values are not stored."""
    if metadata:
        return UnreadableTensor("lazily conjugated or negated tensor (save its resolve_conj())")
    return tensor


def _rebuild_from_type(
    machine: Machine, function: object, cls: object, args: Any, state: object = None
) -> object:
    _check_state(state)
    return machine.call(function, args)


def _rebuild_parameter(
    machine: Machine,
    data: object = None,
    requires_grad: object = True,
    hooks: object = None,
    state: object = None,
) -> object:
    _check_state(state)
    known = isinstance(data, View | UnreadableTensor)
    return data if known else UnreadableTensor("parameter without a tensor")


def _check_state(state: object) -> None:
    """Refuse attributes of a tensor whose assignment would change its elements."""
    parts = state if isinstance(state, tuple) else (state,)
    for part in parts:
        setting = _CONTENTS.intersection(part) if isinstance(part, dict) else ()
        if setting:
            raise FormatError(
                "holds a tensor whose content is replaced after it is created",
                remedy="Save it again with torch.save",
            )


def _unreadable(what: str) -> Callable[..., UnreadableTensor]:
    return lambda machine, *args: UnreadableTensor(what)


def _rebuild_bytes(machine: Machine, text: Any = "", encoding: str = "latin1") -> bytes:
    """Return bytes that protocols 0 to 2 store as latin-1 text."""
    known = isinstance(text, str) and encoding in ("latin1", "latin-1")
    return text.encode("latin1") if known else b""


_NUMPY_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "i2": "h"} | {
    "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"
}  # fmt: skip


def _rebuild_numpy_scalar(machine: Machine, dtype: Any, raw: Any = b"") -> object:
    """Return a numpy number, a common type of saved metrics, as a Python number."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if code not in _NUMPY_FORMATS or not isinstance(raw, bytes):
        return Inert(Global("numpy", "scalar"), (dtype, raw))
    state = dtype.state if isinstance(dtype.state, tuple) else ()
    order = ">" if len(state) > 1 and state[1] == ">" else "<"
    return struct.unpack(order + _NUMPY_FORMATS[code], raw)[0]


def _rebuild_complex(machine: Machine, real: float = 0, imag: float = 0) -> complex:
    return complex(float(real), float(imag))


def _reconstruct(machine: Machine, cls: object, base: object, state: Any = None) -> object:
    """Return an object from protocols 0 and 1: its class, a builtin base and the base's value."""
    made = Inert(cls)
    if described(base) in ("builtins.dict", "__builtin__.dict") and isinstance(state, dict):
        made.entries = state
    elif described(base) in ("builtins.list", "__builtin__.list") and isinstance(state, list):
        made.elements = state
    elif state is not None:
        made.args = (state,)
    return made


def _ordered(machine: Machine, pairs: Any) -> Dict:
    made = Dict()
    for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
        made[machine.key(key)] = value
    return made


def _counter(machine: Machine, counts: Any = None) -> object:
    known = counts is None or isinstance(counts, dict)
    return _ordered(machine, counts or {}) if known else Inert(None, (counts,))


def _container(make: Callable[[Machine, Any], Any]) -> Callable[..., Any]:
    """Return a function that copies a container, and gives `Inert` for any other value."""

    def rebuild(machine: Machine, values: object = ()) -> Any:
        if not isinstance(values, dict | list | tuple | set | frozenset):
            return Inert(None, (values,))
        return make(machine, values)

    return rebuild


_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "set": _container(lambda machine, values: set(map(machine.key, values))),
    "frozenset": _container(lambda machine, values: frozenset(map(machine.key, values))),
    "list": _container(lambda machine, values: list(values)),
    "tuple": _container(lambda machine, values: tuple(values)),
    "dict": _container(_ordered),
    "complex": _rebuild_complex,
}
REBUILD: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.nn.parameter.Parameter": _rebuild_parameter,
    "torch.nn.parameter.Buffer": _rebuild_parameter,
    "torch._utils._rebuild_sparse_tensor": _unreadable("sparse tensor"),
    "torch._utils._rebuild_qtensor": _unreadable("quantized tensor"),
    "torch._utils._rebuild_nested_tensor": _unreadable("nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("meta tensor, which has no data"),
    "torch._utils._rebuild_wrapper_subclass": _unreadable("tensor subclass without a storage"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable("tensor of another device type"),
    "torch.Size": _container(lambda machine, values: tuple(values)),
    "collections.OrderedDict": _container(_ordered),
    "collections.Counter": _counter,
    "collections.defaultdict": lambda machine, *factory: Dict(),
    "_codecs.encode": _rebuild_bytes,
    "_io.BytesIO": lambda machine, *args: Stream(),
    "copyreg._reconstructor": _reconstruct,
    "copy_reg._reconstructor": _reconstruct,
    "numpy.core.multiarray.scalar": _rebuild_numpy_scalar,
    "numpy._core.multiarray.scalar": _rebuild_numpy_scalar,
    **{f"builtins.{name}": rebuild for name, rebuild in _BUILTINS.items()},
    **{f"__builtin__.{name}": rebuild for name, rebuild in _BUILTINS.items()},
}
