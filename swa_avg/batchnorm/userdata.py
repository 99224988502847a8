"""The user's own code: which batches, which model, which forward, which weights.

Loads what `MOD:ATTR` names, and makes of what stands there an iterable of
batches, a model and a forward function. It imports no framework to recognise
what it is given. Whatever the user's code raises becomes one `DataError`.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, IterableDataset

from swa_avg.batchnorm.batches import Forward, blamed, theirs
from swa_avg.errors import DataError, listed

_BATCH_SIZE = 64  # for a Dataset that comes without a loader


@dataclass(frozen=True)
class UserCode:
    """What the user's modules gave.

    Attributes:
        batches: An iterable of batches.
        model: The model, with whatever weights it was made with.
        forward: `forward(model, batch)`, or None for the usual call.
        again: Makes the batches anew, where they can be read only once.
    """

    batches: Iterable[Any]
    model: nn.Module
    forward: Forward | None
    again: Callable[[], Iterable[Any]]


@contextmanager
def user_code(
    data: str,
    *,
    model: str | None = None,
    forward: str | None = None,
    once: Callable[[Callable[[], object]], object] = lambda job: job(),
) -> Iterator[UserCode]:
    """Load the user's code; run it inside the `with`, where it can still import.

    Inside, the current folder is importable (and the folder of a module that is
    given as a `.py` path); afterwards `sys.path` is what it was. Inside also for
    the sake of loader workers, which are told `sys.path` when they start.

    Args:
        data: `MOD:ATTR` of the batches: see `batches_of`.
        model: `MOD:ATTR` of the model, by default `model` of the data's module.
        forward: `MOD:ATTR` of the forward function, by default `forward` of the
            data's module where it has one.
        once: Runs a job that only one process per machine may do (`prepare_data`).

    Raises:
        DataError: If something is not there, is of no use, or raises.
    """
    with importable():
        module, source = found(data)
        yield UserCode(
            model=model_of(module, data, model),
            forward=_forward(module, forward),
            batches=batches_of(source, data, once),
            again=partial(batches_of, source, data, once),
        )


@contextmanager
def importable() -> Iterator[None]:
    """Let modules in the current folder be imported; afterwards `sys.path` is what it was."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


# --- MOD:ATTR -----------------------------------------------------------------------


def found(spec: str) -> tuple[ModuleType, Any]:
    """Return the module that `MOD:ATTR` names, and what stands there."""
    name, colon, attribute = spec.rpartition(":")
    if not (name and colon and attribute):
        raise DataError(f"{spec!r} names no attribute", expected="MOD:ATTR, as in data:loader")
    module = _imported(name)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            close = get_close_matches(part, dir(value), 1)
            raise DataError(
                f"{name} has no attribute {attribute!r}",
                remedy=f"Did you mean {close[0]}?" if close else "",
            )
        value = getattr(value, part)
    return module, value


def _imported(name: str) -> ModuleType:
    """Import a dotted module, or a file whose name ends in `.py`."""
    importlib.invalidate_caches()
    try:
        return _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise DataError(
                f"there is no module {name} in the current folder or installed",
                remedy="Give the path of the .py file, or run in its folder",
            ) from error
        raise DataError(f"importing {name}: {theirs(error)}") from error


def _from_file(path: Path) -> ModuleType:
    """Import a file as Python runs a script: its folder comes first on the path."""
    path = path.resolve()
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    sys.path.insert(0, str(path.parent))
    known = sys.modules.get(path.stem)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path:
        return known
    # Under its own name, if free, so that loader workers can import it as well.
    name = path.stem if known is None else f"swa_avg_user_{path.stem}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# --- batches ------------------------------------------------------------------------


def batches_of(
    source: Any,
    name: str = "the data",
    once: Callable[[Callable[[], object]], object] = lambda job: job(),
) -> Iterable[Any]:
    """Make an iterable of batches of what the user gave.

    A class is called first. Anything with `train_dataloader()`, such as a Lightning
    DataModule, has its `prepare_data()` and `setup("fit")` called, where it has
    them, and gives that loader. A Dataset gets a DataLoader: batches of 64, in a
    shuffled but fixed order, without a last batch of one sample. An iterable is
    taken as it is. A callable is called, and its result taken likewise.

    Raises:
        DataError: If it is none of these, or raises.
    """
    doing = f"{name}: "
    if isinstance(source, type) or (callable(source) and not _gives_batches(source)):
        with blamed(None, doing):
            source = source()
    if hasattr(source, "train_dataloader"):
        with blamed(None, doing):
            source = _train_dataloader(source, once)
    if isinstance(source, Dataset):
        with blamed(None, doing):
            source = _loader(source)
    if not _gives_batches(source) or isinstance(source, (str, bytes, Tensor, Mapping)):
        raise DataError(
            f"{name} is of type {type(source).__name__}",
            expected="an iterable of batches, a function that returns one, a DataLoader,"
            " a Dataset or a DataModule",
        )
    batches: Iterable[Any] = source
    return batches


def _gives_batches(source: object) -> bool:
    own = ("train_dataloader", "__iter__", "__getitem__")
    return any(hasattr(source, name) for name in own)


def _train_dataloader(module: Any, once: Callable[[Callable[[], object]], object]) -> Any:
    if hasattr(module, "prepare_data"):
        once(module.prepare_data)
    if hasattr(module, "setup"):
        module.setup("fit")
    loader = module.train_dataloader()
    parts = loader.values() if isinstance(loader, Mapping) else loader
    if isinstance(loader, (list, tuple, Mapping)) and any(
        isinstance(part, DataLoader) for part in parts
    ):
        raise DataError("train_dataloader() gives several loaders", expected="one")
    return loader


def _loader(dataset: Dataset[Any]) -> DataLoader[Any]:
    pinned = torch.cuda.is_available()
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, _BATCH_SIZE, pin_memory=pinned)
    return DataLoader(
        dataset,
        _BATCH_SIZE,
        # Sorted by class, say, no batch would look like the data.
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        pin_memory=pinned,
        drop_last=len(dataset) % _BATCH_SIZE == 1 and len(dataset) > 1,  # type: ignore[arg-type]
    )


# --- model and forward --------------------------------------------------------------


def model_of(module: ModuleType, data: str, spec: str | None) -> nn.Module:
    """Return the model that `spec` names, else `model` of the module of `data`.

    Raises:
        DataError: It is not there, or no model.
    """
    if spec is None and not hasattr(module, "model"):
        raise DataError(
            f"no `model` stands in the module of {data}",
            expected="an nn.Module, or a function that returns one",
            remedy="Add it, or say where it is with --model MOD:ATTR",
        )
    name = spec or data.rpartition(":")[0] + ":model"
    made = module.model if spec is None else found(spec)[1]
    if not isinstance(made, nn.Module) and callable(made):
        with blamed(None, f"{name}: "):
            made = made()
    if not isinstance(made, nn.Module):
        raise DataError(
            f"{name} is of type {type(made).__name__}",
            expected="an nn.Module, or a function that returns one",
        )
    return made


def _forward(module: ModuleType, spec: str | None) -> Forward | None:
    if spec is None:
        default = getattr(module, "forward", None)
        return default if callable(default) else None
    function: Forward = found(spec)[1]
    if not callable(function):
        raise DataError(
            f"{spec} is of type {type(function).__name__}",
            expected="a function forward(model, batch)",
        )
    return function


# --- weights ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """How the keys of a state_dict and of a model go together.

    Attributes:
        dropped: A prefix of all the state_dict's keys that the model's lack.
        added: A prefix of all the model's keys that the state_dict's lack.
    """

    dropped: str = ""
    added: str = ""

    def in_model(self, key: str) -> str:
        """Return the model's name for a key of the state_dict."""
        return self.added + key.removeprefix(self.dropped)

    def in_state_dict(self, key: str) -> str:
        """Return the state_dict's name for a key of the model."""
        return self.dropped + key.removeprefix(self.added)


def load_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> Fit:
    """Load `state_dict` into `model`: every key, and no other, up to a common prefix.

    Only `num_batches_tracked` may be missing: checkpoints older than torch 0.4.1
    have none. Values are cast to the dtype of the model.

    Returns:
        Which prefix was dropped on either side, if any.

    Raises:
        DataError: If keys or shapes do not fit; the model is then as it was,
            except where it takes other keys than it has and fails itself.
    """
    own = model.state_dict()
    fit = _fit(state_dict.keys(), own.keys())
    renamed = OrderedDict((fit.in_model(key), value) for key, value in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        renamed._metadata = _renamed_versions(versions, fit)  # type: ignore[attr-defined]
    _check_shapes(renamed, own)
    try:
        # Not strict: the model itself may know how to take older keys.
        outcome = model.load_state_dict(renamed, strict=False)
    except Exception as error:
        raise DataError(f"loading the weights into the model: {theirs(error)}") from error
    missing = [key for key in outcome.missing_keys if not _is_optional(key)]
    unexpected = outcome.unexpected_keys
    if missing or unexpected:
        parts = [
            f"{len(keys)} keys {what} ({listed(keys)})"
            for what, keys in (
                ("of the model are missing", missing),
                ("are not in the model", unexpected),
            )
            if keys
        ]
        raise DataError(
            f"the checkpoint and the model do not fit: {' and '.join(parts)}",
            remedy="Is --model the network that was trained?",
        )
    return fit


def _is_optional(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _fit(found: Set[str], wanted: Set[str]) -> Fit:
    """Return the prefix to drop on one side, if the rest is then exactly the same."""

    def same(a: set[str], b: Set[str]) -> bool:
        return a <= b and all(map(_is_optional, b - a))

    if same(set(found), wanted):
        return Fit()
    for prefix in _prefixes(found):
        if same({key.removeprefix(prefix) for key in found}, wanted):
            return Fit(dropped=prefix)
    for prefix in _prefixes(wanted):
        if same({prefix + key for key in found}, wanted):
            return Fit(added=prefix)
    return Fit()


def _prefixes(keys: Set[str]) -> list[str]:
    """Return the prefixes, up to a dot, that all keys have: `a.`, `a.b.`, ..."""
    first, last = min(keys, default=""), max(keys, default="")
    dots = [i for i, char in enumerate(first) if char == "." and first[: i + 1] == last[: i + 1]]
    return [first[: i + 1] for i in dots]


def _renamed_versions(versions: Mapping[str, Any], fit: Fit) -> dict[str, Any]:
    """Return `state_dict._metadata`, which goes by names of modules, for the model."""
    keys = {(f"{name}." if name else ""): value for name, value in versions.items()}
    return {
        fit.in_model(key).removesuffix("."): value
        for key, value in keys.items()
        if key.startswith(fit.dropped)
    }


def _check_shapes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} {tuple(found[key].shape)} for {tuple(value.shape)}"
        for key, value in wanted.items()
        if isinstance(value, Tensor) and isinstance(found.get(key), Tensor)
        if not is_lazy(value) and found[key].shape != value.shape
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} tensors of the checkpoint have not the model's shape ({listed(wrong)})",
            remedy="Is --model the network that was trained?",
        )
