"""The pickler of a state_dict: opcode by opcode, without a tensor existing.

What `torch.save` says of a state_dict is said here in the same words (protocol
2, torch's own rebuild functions and storage types by name), so that every
version of torch loads it, with `weights_only` too. Nothing is imported for it.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from swa_avg.formats.checkpoint import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.pickles import STORAGE_DTYPES, Dict, Stream

# Dtypes younger than torch's typed storages are pickled with an untyped one.
_STORAGE_NAMES = {
    dtype.name: name
    for name, dtype in STORAGE_DTYPES.items()
    if dtype is not None and not name.startswith("Q")
}


def dump(state_dict: OutputStateDict) -> bytes:
    """Return the pickle that `torch.save` would make of a state_dict.

    Its storages are referred to by their numbers.

    Returns:
        A pickle that `torch.load(weights_only=True)` takes, if there is no `io.BytesIO` in it.
    """
    parts = [pickle.PROTO, b"\x02", *_ordered_dict()]
    parts += _set_items(
        (key, _item(value, state_dict.storages)) for key, value in state_dict.items.items()
    )
    if state_dict.metadata is not None:
        metadata = OrderedDict(state_dict.metadata)
        parts += [_value({"_metadata": metadata}), pickle.BUILD]
    return b"".join([*parts, pickle.STOP])


def dump_tensor(tensor: OutputTensor, storage: OutputStorage) -> bytes:
    """Return the pickle that `torch.save` would make of one tensor."""
    return b"".join([pickle.PROTO, b"\x02", *_tensor(tensor, storage), pickle.STOP])


def _item(value: object, storages: Sequence[OutputStorage]) -> bytes:
    if isinstance(value, OutputTensor):
        return b"".join(_tensor(value, storages[value.storage]))
    return _value(value)


def _value(value: object) -> bytes:
    """Pickle a plain value by itself; what is cut off are its protocol and its final stop."""
    return pickle.dumps(_restored(value), protocol=2)[2:-1]


def _restored(value: object) -> object:
    """Return plain containers with the OrderedDicts and streams of the input as such again."""
    if isinstance(value, dict):
        kind = OrderedDict if isinstance(value, Dict | OrderedDict) else dict
        return kind((key, _restored(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(map(_restored, value))
    if isinstance(value, Stream):
        return io.BytesIO(value.content or b"")
    return value


def _set_items(items: Iterator[tuple[object, bytes]]) -> Iterator[bytes]:
    yield pickle.MARK
    for key, value in items:
        yield _value(key)
        yield value
    yield pickle.SETITEMS


def _tensor(tensor: OutputTensor, storage: OutputStorage) -> Iterator[bytes]:
    """The call that makes a tensor: `_rebuild_tensor_v2`, or v3 with its dtype."""
    typed = _STORAGE_NAMES.get(storage.dtype.name)
    yield _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    yield pickle.MARK
    yield pickle.MARK
    yield _value("storage")
    yield _global("torch", typed) if typed else _global("torch.storage", "UntypedStorage")
    yield _value(str(tensor.storage))
    yield _value("cpu")
    yield _value(storage.numel if typed else storage.nbytes)
    yield pickle.TUPLE + pickle.BINPERSID
    yield from map(_value, (tensor.offset, tensor.shape, tensor.stride, False))
    yield from _ordered_dict()  # its backward hooks: none
    if not typed:
        yield _global("torch", storage.dtype.name)
    yield pickle.TUPLE + pickle.REDUCE


def _ordered_dict() -> tuple[bytes, ...]:
    return _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
