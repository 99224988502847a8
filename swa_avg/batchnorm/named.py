"""Loads `MOD:ATTR`: an attribute of a module of the user."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from swa_avg.batchnorm.isolation import users_code
from swa_avg.errors import DataError


def load_attribute(spec: str, folder: Path) -> tuple[ModuleType, Any]:
    """Return the module and the attribute that `MOD:ATTR` names.

    Args:
        spec: `MOD:ATTR`; `MOD` is a dotted module or the path of a `.py` file.
        folder: The base of relative paths. It is not the current folder of the process,
            which a module of the user may have changed.

    Raises:
        DataError: The module or attribute does not exist, or the import raises.
    """
    name, colon, attribute = spec.rpartition(":")
    if not (name and colon and attribute):
        raise DataError(f"{spec!r} names no attribute", expected=f"MOD:ATTR, as in {_meant(spec)}")
    module = _imported(name, folder)
    value: Any = module
    for part in attribute.split("."):
        with users_code(f"{spec}: "):  # an attribute may be computed
            missing = not hasattr(value, part)
            close = "" if not missing else _close(part, value)
            value = None if missing else getattr(value, part)
        if missing:
            raise DataError(
                f"{name} has no attribute {attribute!r}",
                remedy=f"Did you mean {close}?" if close else "",
            )
    return module, value


def _meant(spec: str) -> str:
    """Return what was probably meant by a text without a colon between two names."""
    name = spec.strip(":")
    if not name or ":" in name:
        return "data:loader"
    if spec.startswith(":"):
        return f"data:{name}"
    module, dot, attribute = name.rpartition(".")
    dotted = dot and attribute != "py" and "/" not in attribute
    if "/" in module and not module.endswith(".py"):
        module += ".py"
    return f"{module}:{attribute}" if dotted else f"{name}:NAME"


def _close(wanted: str, holder: Any) -> str:
    """Return the most similar public name in a module or object, or empty.

    Names that contain the wanted name come first, and among them names for training.
    """
    names = sorted(_own(holder), key=lambda name: ("train" not in name.lower(), name))
    for name in names:
        if wanted.lower() in name.lower():
            return name
    return next(iter(get_close_matches(wanted, names, 1)), "")


def _own(holder: Any) -> Iterator[str]:
    """Yield the public names that are defined here, without modules and imported classes."""
    here = getattr(holder, "__name__", None) if isinstance(holder, ModuleType) else None
    for name in dir(holder):
        value = getattr(holder, name, None)
        defined = getattr(value, "__module__", here)
        imported = here and getattr(value, "__qualname__", None) and defined != here
        if not (name.startswith("_") or isinstance(value, ModuleType) or imported):
            yield name


def _imported(name: str, folder: Path) -> ModuleType:
    """Import a dotted module, or a file whose name ends in `.py`.

    During the import and later, `sys.argv` contains only the name: a script that parses its
    arguments gets none.
    """
    importlib.invalidate_caches()
    sys.argv = [name]
    if name.endswith(".py"):
        return _from_file(folder / name, name)
    path = folder / f"{name}.py"
    if name in sys.modules and path.is_file():
        # The current folder comes first, even before modules of Python and of this package.
        return _from_file(path, name)
    there = True
    with users_code(f"importing {name}: "):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            there = not (error.name and f"{name}.".startswith(f"{error.name}."))
            if there:
                raise
    raise DataError(
        f"there is no module {name} in the current folder or among the installed packages",
        remedy="Give the path of the .py file, or run the command in its folder",
    )


def _from_file(path: Path, name: str) -> ModuleType:
    """Import a file with its folder first on `sys.path`, like a script."""
    path = path.resolve()
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    sys.path.insert(0, str(path.parent))
    known = sys.modules.get(path.stem)
    # Under its own name, if that is free, so that loader workers can import it too.
    own = path.stem if known is None else f"swa_avg_user_{path.stem}"
    for module in (known, sys.modules.get(own)):
        if module is not None and _file_of(module) == path:
            return module
    with users_code(f"importing {name}: "):
        spec = util.spec_from_file_location(own, path)
        assert spec is not None and spec.loader is not None  # a .py file has both
        module = util.module_from_spec(spec)
        sys.modules[own] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(own, None)
            raise
    return module


def _file_of(module: ModuleType) -> Path:
    return Path(getattr(module, "__file__", None) or "").resolve()
