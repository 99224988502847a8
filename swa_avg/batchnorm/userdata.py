"""Loads the user's batches, model and forward function, and loads weights into the model.

Objects are given as `MOD:ATTR`. No framework is imported to recognise its objects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from swa_avg.batchnorm.calling import Forward
from swa_avg.batchnorm.isolation import importable, users_code
from swa_avg.batchnorm.loading import batches_of, check_makes, needed
from swa_avg.batchnorm.named import load_attribute
from swa_avg.errors import DataError, listed
from swa_avg.kernel import default_arithmetic


@dataclass(frozen=True)
class UserCode:
    """The objects from the user's modules.

    Attributes:
        batches: An iterable of batches.
        model: The model with its initial weights.
        forward: `forward(model, batch)`, or None for the default call.
        again: Creates the batches again, if they can be read only once.
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
    folder: Path | None = None,
) -> Iterator[UserCode]:
    """Load the user's code, and keep its modules importable inside the `with` block.

    Inside, modules in the folder can be imported, and modules in the folder of a `.py` path.
    Loader workers need this, because they get `sys.path` when they start. `sys.path` is
    restored on exit.

    Args:
        data: `MOD:ATTR` of the batches: see `batches_of`.
        model: `MOD:ATTR` of the model; by default `model` in the module of the data.
        forward: `MOD:ATTR` of the forward function; by default `forward` in the module of
            the data, if it exists.
        once: Runs a job that only one process per machine may do (`prepare_data`).
        folder: The folder to import modules from; by default the current folder.

    Raises:
        DataError: An object does not exist, has the wrong type, or raises.
    """
    folder = folder or Path.cwd()
    with importable(folder):
        module, source = load_attribute(data, folder)
        yield UserCode(
            model=model_of(module, data, model, folder),
            forward=_forward(module, forward, folder),
            batches=batches_of(source, data, once),
            again=partial(batches_of, source, data, once),
        )


# --- model and forward --------------------------------------------------------------


def model_of(module: ModuleType, data: str, spec: str | None, folder: Path) -> nn.Module:
    """Return the model that `spec` names, by default `model` in the module of `data`.

    Raises:
        DataError: The model does not exist, or is not an `nn.Module`.
    """
    with users_code(f"{data}: "):  # a module may compute its attributes
        there = spec is not None or hasattr(module, "model")
    if not there:
        raise DataError(
            f"the module of {data} has no `model`",
            expected="an nn.Module, or a function that returns one",
            remedy=f"Add it, or give the model with {_option(module, data)}",
        )
    name = spec or data.rpartition(":")[0] + ":model"
    made = module.model if spec is None else load_attribute(spec, folder)[1]
    if not isinstance(made, nn.Module) and callable(made):
        check_makes(made, name, "model")
        with users_code(f"{name}: "):
            made = made()
    if not isinstance(made, nn.Module):
        raise DataError(
            f"{name} is of type {type(made).__name__}",
            expected="an nn.Module, or a function that returns one",
        )
    return made


def _option(module: ModuleType, data: str) -> str:
    """Return the option that names the model: the only network of the module, if there is one."""
    own = [name for name, value in vars(module).items() if _is_network(value, module)]
    if not own:
        return "--model MOD:ATTR"
    one = vars(module)[own[0]]
    ready = len(own) == 1 and not (isinstance(one, type) and needed(one))
    return f"--model {data.rpartition(':')[0]}:{own[0] if ready else 'ATTR'}"


def _is_network(value: object, module: ModuleType) -> bool:
    """Return whether a value is a network, or a class of networks that the module defines."""
    if not isinstance(value, type):
        return isinstance(value, nn.Module)
    return issubclass(value, nn.Module) and value.__module__ == module.__name__


def _forward(module: ModuleType, spec: str | None, folder: Path) -> Forward | None:
    if spec is None:
        with users_code("forward: "):  # a module may compute its attributes
            default = getattr(module, "forward", None)
        return default if callable(default) else None
    function: Forward = load_attribute(spec, folder)[1]
    if not callable(function):
        raise DataError(
            f"{spec} is of type {type(function).__name__}",
            expected="a function forward(model, batch)",
        )
    return function


# --- weights ------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """The difference in prefix between the keys of a state_dict and of a model.

    Attributes:
        dropped: A prefix of all keys of the state_dict that the keys of the model lack.
        added: A prefix of all keys of the model that the keys of the state_dict lack.
    """

    dropped: str = ""
    added: str = ""

    def in_model(self, key: str) -> str:
        """Return the key in the model for a key of the state_dict."""
        return self.added + key.removeprefix(self.dropped)

    def in_state_dict(self, key: str) -> str:
        """Return the key in the state_dict for a key of the model."""
        return self.dropped + key.removeprefix(self.added)


def load_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> Fit:
    """Load `state_dict` into `model`; the keys must be equal up to a common prefix.

    Only `num_batches_tracked` may be missing, as in checkpoints from before torch 0.4.1.
    Values are cast to the dtype of the model.

    Returns:
        The prefix that differs, if any.

    Raises:
        DataError: Keys or shapes do not match. The model is then unchanged, unless it
            accepts other keys in its own loading code, which then fails.
    """
    own = model.state_dict()
    fit = _fit(state_dict.keys(), own.keys())
    renamed = OrderedDict((fit.in_model(key), value) for key, value in state_dict.items())
    versions = getattr(state_dict, "_metadata", None)
    if versions is not None:
        renamed._metadata = _renamed_versions(versions, fit)  # type: ignore[attr-defined]
    _check_shapes(renamed, own)
    with users_code("loading the weights into the model: "), default_arithmetic():
        # Not strict: a model may convert older keys in its own loading code.
        outcome = model.load_state_dict(renamed, strict=False)
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
            f"the checkpoint and the model do not match: {' and '.join(parts)}",
            remedy="Check that --model is the network that was trained",
        )
    return fit


def _is_optional(key: str) -> bool:
    return key.rpartition(".")[2] == "num_batches_tracked"


def _fit(found: Set[str], wanted: Set[str]) -> Fit:
    """Return the prefix to remove on one side, if the keys are then equal."""

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
    """Return the prefixes up to a dot that all keys share: `a.`, `a.b.`, ..."""
    first, last = min(keys, default=""), max(keys, default="")
    dots = [i for i, char in enumerate(first) if char == "." and first[: i + 1] == last[: i + 1]]
    return [first[: i + 1] for i in dots]


def _renamed_versions(versions: Mapping[str, Any], fit: Fit) -> dict[str, Any]:
    """Return `state_dict._metadata`, whose keys are module paths, with the keys of the model."""
    keys = {(f"{name}." if name else ""): value for name, value in versions.items()}
    return {
        fit.in_model(key).removesuffix("."): value
        for key, value in keys.items()
        if key.startswith(fit.dropped)
    }


def _check_shapes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} {tuple(found[key].shape)} (model: {tuple(value.shape)})"
        for key, value in wanted.items()
        if isinstance(value, Tensor) and isinstance(found.get(key), Tensor)
        if not is_lazy(value) and found[key].shape != value.shape
    ]
    if wrong:
        raise DataError(
            f"shapes differ between the checkpoint and the model: {listed(wrong)}",
            remedy="Check that --model is the network that was trained",
        )
