"""Turns the user's data into an iterable of batches.

The kind of data is detected from its class, or from the items that it yields. Batches are
not batched again. No framework is imported to recognise its objects.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from swa_avg.batchnorm.batches import same_draws
from swa_avg.batchnorm.calling import described, is_batch, is_sample
from swa_avg.batchnorm.isolation import users_code
from swa_avg.errors import DataError, listed

_BATCH_SIZE = 64  # for a Dataset that comes without a loader

Once = Callable[[Callable[[], object]], object]


def batches_of(
    source: Any, name: str = "the data", once: Once = lambda job: job()
) -> Iterable[Any]:
    """Return an iterable of batches for the user's data.

    A class is called first. For an object with `train_dataloader()`, such as a Lightning
    DataModule, `prepare_data()` and `setup("fit")` are called if they exist, and that loader
    is used. A Dataset of samples gets a DataLoader with batches of 64, in a fixed shuffled
    order, without a last batch of one sample. An iterable is used directly. A callable is
    called, and its result is treated the same way.

    Raises:
        DataError: The data is of another type, yields single samples, or raises; or it is a
            Dataset whose items may be samples or batches.
    """
    with users_code(f"{name}: "):
        if isinstance(source, type) or (callable(source) and not _gives_batches(source)):
            check_makes(source, name, "loader")
            source = source()
        if hasattr(source, "train_dataloader"):
            source = _train_dataloader(source, once)
        source = _only_one(source, name)
        if _is_hugging_face(source):
            source = _in_torch(source)
        if isinstance(source, DataLoader):
            source = _unbatched(source, name) if source.batch_sampler is None else source
        elif _is_dataset(source) and not _holds_loader(source):
            source = _of_dataset(source, name)
    if not _gives_batches(source) or isinstance(source, (str, bytes, Tensor, Mapping)):
        raise DataError(
            f"{name} is of type {type(source).__name__}",
            expected="an iterable of batches, a function that returns one, a DataLoader,"
            " a Dataset or a DataModule",
        )
    batches: Iterable[Any] = source
    return batches


def check_makes(made: Any, name: str, what: str) -> None:
    """Refuse a function or class that needs arguments, before it is called without any.

    Args:
        made: The function or class.
        name: Its name, as the user gave it.
        what: What it makes.

    Raises:
        DataError: It has parameters without a default.
    """
    try:
        parameters = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):
        return  # some functions in C have no signature
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needs = [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
    if needs:
        arguments = ", ".join(f"{one}=..." for one in needs)
        called = getattr(made, "__name__", name)
        own = f"my_{what}" if called == what else what
        raise DataError(
            f"{name} needs arguments: {listed(needs, 8)}",
            expected="something that is called without arguments",
            remedy=f"Name a function that passes them: def {own}(): return {called}({arguments})",
        )


def _gives_batches(source: object) -> bool:
    own = ("train_dataloader", "__iter__", "__getitem__")
    return any(hasattr(source, name) for name in own)


def _train_dataloader(module: Any, once: Once) -> Any:
    if hasattr(module, "prepare_data"):
        once(module.prepare_data)
    if hasattr(module, "setup"):
        module.setup("fit")
    return module.train_dataloader()


def _only_one(source: Any, name: str) -> Any:
    """Return the only loader in a list or mapping of loaders; return other values unchanged."""
    if not isinstance(source, (list, tuple, Mapping)):
        return source
    parts = [*source.values()] if isinstance(source, Mapping) else [*source]
    loaders = [part for part in parts if isinstance(part, (DataLoader, Dataset))]
    if len(loaders) > 1:
        raise DataError(
            f"{name} gives several loaders",
            expected="one",
            remedy="Give a function that returns the loader of the training data",
        )
    return loaders[0] if len(parts) == len(loaders) == 1 else source


def _is_hugging_face(source: Any) -> bool:
    return type(source).__module__.startswith("datasets.") and hasattr(source, "with_format")


def _in_torch(source: Any) -> Any:
    """Return a Hugging Face dataset with tensor rows, unless the user chose a format."""
    chosen = getattr(source, "format", None) or {}
    if isinstance(chosen, Mapping) and chosen.get("type"):
        return source
    if getattr(source, "_formatting", None) is not None:  # the format of a streaming dataset
        return source
    return source.with_format("torch")


def _is_dataset(source: Any) -> bool:
    return isinstance(source, Dataset) or _is_hugging_face(source)


def _holds_loader(source: Any) -> bool:
    """Return whether a pipeline begins with a DataLoader, like a `webdataset.WebLoader`."""
    stages = getattr(source, "pipeline", None)
    return isinstance(stages, (list, tuple)) and any(isinstance(s, DataLoader) for s in stages)


def _unbatched(loader: DataLoader[Any], name: str) -> Iterable[Any]:
    """Return a loader without automatic batching, after checking that it yields batches."""
    first, batches = _peeked(loader)
    if is_sample(first):
        raise DataError(
            f"{name} yields single samples, {described(first)}",
            expected="batches",
            remedy="Give its DataLoader a batch_size; if they are batches, name a function"
            " that returns iter() of it",
        )
    return batches


def _of_dataset(dataset: Any, name: str) -> Iterable[Any]:
    """Return a loader that batches the samples of a dataset.

    Raises:
        DataError: The items may be batches.
    """
    streams = isinstance(dataset, IterableDataset)
    if streams:
        first, again = _peeked(dataset)
        if first is _NOTHING:
            return again
    else:
        if not len(dataset):
            return DataLoader(dataset, _BATCH_SIZE)
        with same_draws():
            first = dataset[0]
    if is_batch(first) or (streams and not is_sample(first)):
        raise DataError(
            f"{name} is a dataset, and its items may be samples or batches:"
            f" the first is {described(first)}",
            remedy="Use DataLoader(dataset, batch_size=None) if they are batches,"
            f" DataLoader(dataset, batch_size={_BATCH_SIZE}) if they are samples",
        )
    pinned = torch.cuda.is_available()
    if streams:
        return DataLoader(_Stream(again), _BATCH_SIZE, pin_memory=pinned)
    return DataLoader(
        dataset,
        _BATCH_SIZE,
        # In a dataset sorted by class, for example, unshuffled batches are not representative.
        shuffle=True,
        generator=torch.Generator(device="cpu").manual_seed(0),
        pin_memory=pinned,
        drop_last=len(dataset) % _BATCH_SIZE == 1 and len(dataset) > 1,
    )


_NOTHING = object()


def _peeked(source: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first item, and an iterable that still yields it.

    The random state is restored, so that the later items do not change.
    """
    with same_draws(source):
        items = iter(source)
        first = next(items, _NOTHING)
    return first, source if first is _NOTHING else _Again(source, first, items)


class _Again:
    """An iterable whose first item was already read.

    The first iteration yields that item and continues, since a stream can be read only once.
    """

    def __init__(self, source: Iterable[Any], first: Any, rest: Iterator[Any]) -> None:
        self._source = source
        self._begun: Iterator[Any] | None = chain([first], rest)

    def __iter__(self) -> Iterator[Any]:
        begun, self._begun = self._begun, None
        return iter(self._source) if begun is None else begun

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]


class _Stream(IterableDataset[Any]):
    """An iterable as a dataset."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)
