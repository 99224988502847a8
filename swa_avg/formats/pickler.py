"""The pickler of a state_dict: it writes opcodes without creating tensors.

The pickle has the form that `torch.save` writes (protocol 2, with torch's rebuild functions
and storage types by name), so that every version of torch loads it, also with
`weights_only=True`. torch is not imported.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache

from swa_avg.formats.checkpoint import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.pickles import STORAGE_DTYPES, Dict, Stream, leaves, rebuilt

# Dtypes without a typed storage class in torch are pickled with an untyped storage.
_STORAGE_NAMES = {
    dtype.name: name
    for name, dtype in STORAGE_DTYPES.items()
    if dtype is not None and not name.startswith("Q")
}


def dump(state_dict: OutputStateDict) -> bytes:
    """Return the pickle that `torch.save` writes for a state_dict.

    The keys of its storages are their numbers.

    Returns:
        A pickle that `torch.load(weights_only=True)` accepts, unless it contains an
        `io.BytesIO`.
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
    """Return the pickle that `torch.save` writes for one tensor."""
    return b"".join([pickle.PROTO, b"\x02", *_tensor(tensor, storage), pickle.STOP])


def _item(value: object, storages: Sequence[OutputStorage]) -> bytes:
    if isinstance(value, OutputTensor):
        return _reference(value, storages[value.storage])
    if not any(isinstance(one, OutputTensor) for one in leaves(value)):
        return _value(value)
    return b"".join(_container(value, storages))


@lru_cache(maxsize=64)  # an extra state may hold one tensor many times
def _reference(tensor: OutputTensor, storage: OutputStorage) -> bytes:
    return b"".join(_tensor(tensor, storage))


def _container(value: object, storages: Sequence[OutputStorage]) -> Iterator[bytes]:
    """Yield the opcodes of a container with tensors in it."""
    if isinstance(value, dict):
        ordered = isinstance(value, Dict | OrderedDict)
        yield from _ordered_dict() if ordered else (pickle.EMPTY_DICT,)
        yield from _set_items((key, _item(item, storages)) for key, item in value.items())
        return
    assert isinstance(value, list | tuple), "only a container can hold a tensor"
    of_list = isinstance(value, list)
    yield pickle.EMPTY_LIST + pickle.MARK if of_list else pickle.MARK
    yield from (_item(item, storages) for item in value)
    yield pickle.APPENDS if of_list else pickle.TUPLE


def _value(value: object) -> bytes:
    """Return the opcodes of a plain value, without the protocol header and the final STOP."""
    return _plain(_restored(value))


def _plain(value: object) -> bytes:
    """As `_value`, of what holds no placeholder."""
    return pickle.dumps(value, protocol=2)[2:-1]


def _restored(value: object) -> object:
    """Return a value with placeholders replaced by OrderedDicts and `io.BytesIO` objects."""
    return rebuilt(
        value, lambda one: io.BytesIO(one.content or b"") if isinstance(one, Stream) else one
    )


def _set_items(items: Iterator[tuple[object, bytes]]) -> Iterator[bytes]:
    yield pickle.MARK
    for key, value in items:
        yield _plain(key) if type(key) is str else _value(key)
        yield value
    yield pickle.SETITEMS


def _tensor(tensor: OutputTensor, storage: OutputStorage) -> Iterator[bytes]:
    """Yield the call that builds a tensor: `_rebuild_tensor_v2`, or v3 with the dtype."""
    typed = _STORAGE_NAMES.get(storage.dtype.name)
    yield _global("torch._utils", "_rebuild_tensor_v2" if typed else "_rebuild_tensor_v3")
    yield pickle.MARK + pickle.MARK + _STORAGE
    yield _global("torch", typed) if typed else _global("torch.storage", "UntypedStorage")
    yield _plain(str(tensor.storage)) + _CPU
    yield _plain(storage.numel if typed else storage.nbytes)
    yield pickle.TUPLE + pickle.BINPERSID
    yield from map(_plain, (tensor.offset, tensor.shape, tensor.stride))
    yield pickle.NEWFALSE
    yield from _ordered_dict()  # no backward hooks
    if not typed:
        yield _global("torch", storage.dtype.name)
    yield pickle.TUPLE + pickle.REDUCE


def _ordered_dict() -> tuple[bytes, ...]:
    return _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE


@lru_cache(maxsize=64)
def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


# For every tensor alike.
_STORAGE, _CPU = _plain("storage"), _plain("cpu")
