"""Checks of the arguments of the API: wrong names and types are refused before any work."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from difflib import get_close_matches
from functools import wraps
from numbers import Integral
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from swa_avg.errors import kind_of

_T = TypeVar("_T")
_P = ParamSpec("_P")


def near(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like a misspelt one; empty if none is."""
    return next(iter(get_close_matches(name, list(known), 1)), "")


def suggesting(kind: type[_T]) -> type[_T]:
    """Make the constructor of a dataclass name the nearest field for an unknown one.

    Args:
        kind: The dataclass.

    Raises:
        TypeError: From the constructor: there is no field of a given name.
    """
    known = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    made: Callable[..., None] = kind.__init__

    @wraps(made)
    def checked(self: object, *values: Any, **named: Any) -> None:
        for name in named:
            if name not in known:
                close = near(name, known)
                meant = f" Did you mean {close}?" if close else ""
                raise TypeError(f"{kind.__name__} has no field {name!r}.{meant}")
        made(self, *values, **named)

    kind.__init__ = checked  # type: ignore[method-assign]
    return kind


def with_block(
    function: Callable[_P, Iterator[_T]],
) -> Callable[_P, AbstractContextManager[_T]]:
    """Make a context manager of a generator, with an error that explains a missing `with`.

    Args:
        function: Yields once; the parameters are those of the context manager.
    """
    made = contextmanager(function)

    @wraps(function)
    def used(*values: _P.args, **named: _P.kwargs) -> AbstractContextManager[_T]:
        return _WithBlock(made(*values, **named), function.__name__)

    return used


class _WithBlock(AbstractContextManager[_T]):
    """A context manager that is not entered yet."""

    def __init__(self, inner: AbstractContextManager[_T], name: str) -> None:
        self._inner = inner
        self._name = name

    def __enter__(self) -> _T:
        return self._inner.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> bool | None:
        return self._inner.__exit__(kind, error, where)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self._name}() needs a with block: with {self._name}(...) as plan: plan.{name}"
        )


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters of a function, without `**options`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        one.name for one in inspect.signature(function).parameters.values() if one.kind in named
    ]


def check_arguments(batchnorm: object, threads: object, model: object = None) -> None:
    """Check the `BatchNorm` and the number of workers that a function was given.

    Args:
        batchnorm: The `BatchNorm`, or None.
        threads: The number of workers, or None.
        model: The model of a search; by default `batchnorm` must have one.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There are no workers, no model, or two models.
    """
    if batchnorm is not None:
        # By its name: importing the class would import torch.
        kinds = {
            (one.__module__.partition(".")[0], one.__name__) for one in type(batchnorm).__mro__
        }
        if ("swa_avg", "BatchNorm") not in kinds:
            raise TypeError(
                "batchnorm must be a BatchNorm, as in BatchNorm(data=..., model=...), not "
                + kind_of(batchnorm)
            )
        batchnorm.network(model)  # type: ignore[attr-defined]
    if threads is not None:
        check_count("threads", threads)


def listed_paths(paths: object) -> list[str | os.PathLike[str]]:
    """Return one or more paths as a list.

    Raises:
        TypeError: A value is not a path.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) or not _is_several(paths) else paths
    listed: list[Any] = list(given)  # type: ignore[call-overload]
    for one in listed:
        if not isinstance(one, str | os.PathLike):
            saved = "; save it with torch.save first" if isinstance(one, Mapping) else ""
            raise TypeError(f"checkpoints must be paths, not {kind_of(one)}{saved}")
    return listed


def _is_several(paths: object) -> bool:
    return isinstance(paths, Iterable) and not isinstance(paths, Mapping)


def check_texts(name: str, value: object) -> None:
    """Refuse a value that is neither a text nor several texts.

    Raises:
        TypeError: It has another type.
    """
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, Iterable) or not all(isinstance(one, str) for one in several):
        raise TypeError(f"{name} must be text, or several texts, not {kind_of(value)}")


def check_count(name: str, count: object) -> int:
    """Return a count as an int; an integer of numpy is accepted.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is less than 1.
    """
    if not isinstance(count, Integral) or isinstance(count, bool):
        raise TypeError(f"{name} must be an integer, not {kind_of(count)}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")
    return int(count)


def either(values: Iterable[str]) -> str:
    """Return the values of an option as text: a, b or c."""
    *first, last = values
    return f"{', '.join(first)} or {last}"
