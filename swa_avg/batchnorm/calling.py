"""Calls the model on a batch, and describes batches.

This module describes the content of a batch, counts its samples if the number is certain,
and searches for a call that works if the default call fails. It does not move batches.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from swa_avg.batchnorm.isolation import signal_in
from swa_avg.errors import DataError

Forward = Callable[[nn.Module, Any], object]
_SHOWN = 8  # entries of a batch that are described


def default_forward(model: nn.Module, batch: Any) -> object:
    """Call `model` on `batch` in the default way.

    A mapping becomes keyword arguments. The first element of a list or tuple is the input,
    and the rest is ignored as targets. Anything else is the input itself, also a
    `PackedSequence`, which is a tuple of the parts of one input.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if _is_series(batch):
        return model(batch[0])
    return model(batch)


def _is_series(batch: Any) -> bool:
    """Return whether a batch is a list or tuple of several things: inputs and targets."""
    return isinstance(batch, (list, tuple)) and not isinstance(batch, PackedSequence)


def _called(batch: Any) -> str:
    """Return the code of the default call."""
    if isinstance(batch, Mapping):
        return "model(**batch)"
    return "model(batch[0])" if _is_series(batch) else "model(batch)"


# --- descriptions of batches --------------------------------------------------------


def described(value: Any, depth: int = 2) -> str:
    """Return a description of a batch: `list of (float32[8,3,32,32], int64[8])`."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"
    if value is None:
        return "None"
    name = type(value).__name__
    if not isinstance(value, (Mapping, list, tuple)):
        return name
    if not depth:
        return f"{name} of {len(value)}"
    if isinstance(value, Mapping):
        entries = [f"{key}: {described(entry, depth - 1)}" for key, entry in value.items()]
        return f"{name} with {_several(entries)}"
    entries = [described(entry, depth - 1) for entry in value]
    if len(entries) > 1 and len(set(entries)) == 1:
        return f"{name} of {len(entries)} {entries[0]}"
    return f"{name} of ({_several(entries)})"


def _several(entries: Sequence[str]) -> str:
    rest = len(entries) - _SHOWN
    return ", ".join(entries[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def samples_in(batch: Any) -> int | None:
    """Return the number of samples in a batch, or None if it is not certain.

    It is the common length of all columns. A list of tensors with the same number of
    dimensions is ambiguous: the tensors may be columns or samples.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    graphs = getattr(batch, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    if isinstance(batch, Mapping):
        return _common([*batch.values()])
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    if not isinstance(batch, (list, tuple)):
        return None
    dims = [entry.dim() for entry in batch if isinstance(entry, Tensor)]
    if len(dims) == len(batch) > 1 and len(set(dims)) == 1 and not hasattr(batch, "_fields"):
        return None
    return _common(batch)


def _common(columns: Sequence[Any]) -> int | None:
    """Return the common length of columns, or None if it is not certain.

    A single list is not certain: its elements may not be samples.
    """
    lengths = [length for column in columns if (length := _length(column)) is not None]
    alone = len(lengths) == 1 and not any(isinstance(c, (Tensor, Mapping)) for c in columns)
    return lengths[0] if len(set(lengths)) == 1 and not alone else None


def _length(column: Any) -> int | None:
    if isinstance(column, (list, tuple)) and not hasattr(column, "_fields"):
        return len(column) if len(set(map(type, column))) == 1 else None
    return samples_in(column) if isinstance(column, (Tensor, Mapping)) else None


def is_sample(item: Any) -> bool:
    """Return whether an item of a dataset is certainly one sample, not a batch.

    A number, a string, bytes, or an image that is not a tensor belongs to one sample. A batch
    has a tensor or a list of these instead.
    """
    if isinstance(item, Mapping):
        return any(map(is_sample, item.values()))
    if isinstance(item, (list, tuple)):
        return any(is_sample(entry) for entry in item if not isinstance(entry, (list, tuple)))
    if isinstance(item, Tensor):
        return item.dim() == 0
    if isinstance(item, (int, float, complex, str, bytes)):
        return True
    shape = getattr(item, "shape", None)  # a numpy scalar, or an array
    return len(shape) == 0 if isinstance(shape, tuple) else hasattr(item, "getbands")


def is_batch(item: Any) -> bool:
    """Return whether an item of a dataset looks like a batch: columns of the same length.

    Some samples look the same, such as a time series with a label for each step.
    """
    if is_sample(item) or not isinstance(item, (Mapping, list, tuple)):
        return False
    columns = list(item.values()) if isinstance(item, Mapping) else list(item)
    dims = {column.dim() for column in columns if isinstance(column, Tensor)}
    lists = any(isinstance(column, (list, tuple)) for column in columns)
    return len(columns) > 1 and _common(columns) is not None and (len(dims) > 1 or lists)


# --- other calls --------------------------------------------------------------------


def explained(
    error: DataError,
    model: nn.Module,
    batch: Any,
    forward: Forward,
    context: Callable[[], AbstractContextManager[None]],
) -> DataError:
    """Return an error of a forward call with a description of the call and the batch.

    If the default call failed, other calls are tried on the same batch. The first one that
    works becomes the remedy.

    Args:
        error: The error.
        model: The model that was called.
        batch: The batch.
        forward: The function that called the model.
        context: A context manager for each further call.
    """
    usual = forward is default_forward
    how = _called(batch) if usual else "forward(model, batch)"
    found, expected, _ = error.texts
    called = f"{how}, where batch is {described(batch)}"
    if expected:
        expected += f"; the call was {called}"
    else:
        found += f"; the call was {called}"
    remedy = "" if not usual or _is_memory(error.__cause__) else _remedy(model, batch, context)
    made = DataError(found, expected=expected, remedy=remedy, frames=error.frames)
    made.batch = error.batch
    return made


def _is_memory(error: BaseException | None) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))


def _remedy(
    model: nn.Module, batch: Any, context: Callable[[], AbstractContextManager[None]]
) -> str:
    for code, attempt in _ways(model, batch):
        try:
            with context(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt()
        except BaseException as error:
            if from_outside := signal_in(error):
                raise from_outside from None
            continue
        return (
            "Add this function to the module of the data, or name it with --forward:"
            f" def forward(model, batch): return {code}"
        )
    return ""


_Way = tuple[str, Callable[[], object]]  # the source code of a call, and the call


def _ways(model: nn.Module, batch: Any, code: str = "batch", depth: int = 2) -> Iterator[_Way]:
    """Yield alternatives to the default call, each as source code and as a function.

    Args:
        model: The model to call.
        batch: The batch, or a part of it.
        code: The source code of `batch`.
        depth: The number of levels of nested parts to try.
    """
    inner = depth < 2
    if isinstance(batch, Mapping):
        yield from _ways_of_mapping(model, batch, code, inner=inner)
        entries = [(f"{code}[{k!r}]", v) for k, v in batch.items() if isinstance(k, (str, int))]
    elif isinstance(batch, (list, tuple)):
        yield from _ways_of_series(model, batch, code)
        entries = [(f"{code}[{place}]", value) for place, value in enumerate(batch)]
    else:
        yield from _ways_of_object(model, batch, code)
        own = getattr(batch, "__dict__", {})
        entries = [(f"{code}.{key}", value) for key, value in own.items() if key.isidentifier()]
    if isinstance(batch, (Mapping, list, tuple)) or inner:
        yield f"model({code})", lambda: model(batch)
    yield from _ways_of_entries(model, entries, depth)
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        yield f"model(*{code})", lambda: model(*batch)


def _ways_of_mapping(
    model: nn.Module, batch: Mapping[Any, Any], code: str, *, inner: bool
) -> Iterator[_Way]:
    """Yield the calls with all entries, for a mapping within a batch, and with known ones."""
    if inner:
        yield f"model(**{code})", lambda: model(**batch)
    known = [name for name in _parameters(model) if name in batch]
    if known and len(known) < len(batch):
        named = ", ".join(f"{name}={code}[{name!r}]" for name in known)
        yield f"model({named})", lambda: model(**{name: batch[name] for name in known})


def _ways_of_series(model: nn.Module, batch: Sequence[Any], code: str) -> Iterator[_Way]:
    """Yield the call with as many elements as the model needs, if it needs several."""
    needed = len(_parameters(model, required=True))
    if 1 < needed <= len(batch):
        places = ", ".join(f"{code}[{place}]" for place in range(needed))
        yield f"model({places})", lambda: model(*batch[:needed])


def _ways_of_object(model: nn.Module, batch: Any, code: str) -> Iterator[_Way]:
    """Yield the call with the attributes that the model needs, and those of arrays and tensors."""
    names = _parameters(model, required=True)
    if names and all(hasattr(batch, name) for name in names):
        places = ", ".join(f"{code}.{name}" for name in names)
        yield f"model({places})", lambda: model(*(getattr(batch, name) for name in names))
    yield from _ways_of_array(model, batch, code)
    yield from _ways_of_numbers(model, batch, code)


def _ways_of_entries(
    model: nn.Module, entries: Sequence[tuple[str, Any]], depth: int
) -> Iterator[_Way]:
    """Yield calls on one entry of a batch: floating tensors, other tensors, nested parts."""
    tensors = [(code, value) for code, value in entries if isinstance(value, Tensor)]
    for code, value in sorted(tensors, key=lambda entry: not entry[1].is_floating_point()):
        yield f"model({code})", lambda value=value: model(value)  # type: ignore[misc]
    for code, value in tensors:
        yield from _ways_of_numbers(model, value, code)
    for code, value in entries:
        if isinstance(value, (Mapping, list, tuple)) and depth:
            yield from _ways(model, value, code, depth - 1)
        yield from _ways_of_array(model, value, code)


def _ways_of_numbers(model: nn.Module, value: Any, code: str) -> Iterator[_Way]:
    """Yield the call on a floating tensor in float32, if it has another dtype."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float32:
        yield f"model({code}.float())", lambda: model(value.float())


def _ways_of_array(model: nn.Module, value: Any, code: str) -> Iterator[_Way]:
    """Yield calls on the tensor of a numpy array, in its own dtype and in float32."""
    if isinstance(value, Tensor) or not hasattr(value, "__array_interface__"):
        return
    yield f"model(torch.as_tensor({code}))", lambda: model(torch.as_tensor(value))
    yield f"model(torch.as_tensor({code}).float())", lambda: model(torch.as_tensor(value).float())


def _parameters(model: nn.Module, *, required: bool = False) -> list[str]:
    """Return the names of the parameters of the model's forward."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # forward is not a Python function
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        one.name
        for one in parameters
        if one.kind in named and not (required and one.default is not inspect.Parameter.empty)
    ]
