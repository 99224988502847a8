"""Paths as the user wrote them, which stay valid when the current folder changes.

`str(path)` is the path as written, for messages and reports. `os.fspath(path)`, which
system calls use, is absolute.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

_Plain: Any = type(Path())


class GivenPath(_Plain):  # type: ignore[misc]
    """A path that is relative to the folder that was current when it was created.

    Paths derived from it (the parent, a file in it, a match of a pattern) are relative to
    the same folder.
    """

    _folder: str = ""

    @classmethod
    def of(cls, text: str | os.PathLike[str], folder: str | None = None) -> Path:
        """Return the path `text`, relative to `folder`.

        Args:
            text: The path.
            folder: The current folder by default.
        """
        path = cls(text)
        path._folder = _current() if folder is None else folder
        return path

    def _like(self, path: Any) -> Any:
        return GivenPath.of(str(path), self._folder)

    def __fspath__(self) -> str:
        return os.path.join(self._folder, str(self))  # noqa: PTH118 - a Path has no folder

    def __truediv__(self, key: Any) -> Any:
        return self._like(_Plain(str(self)) / key)

    def __rtruediv__(self, key: Any) -> Any:
        return self._like(_Plain(key) / str(self))

    def __reduce__(self) -> Any:
        return _restored, (str(self), self._folder)

    @property
    def parent(self) -> Any:
        """The folder that contains the path."""
        return self._like(_Plain(str(self)).parent)

    def joinpath(self, *others: Any) -> Any:
        """Return a path below this one."""
        return self._like(_Plain(str(self)).joinpath(*others))

    def with_name(self, name: str) -> Any:
        """Return the path with another name."""
        return self._like(_Plain(str(self)).with_name(name))

    def with_suffix(self, suffix: str) -> Any:
        """Return the path with another suffix."""
        return self._like(_Plain(str(self)).with_suffix(suffix))

    def absolute(self) -> Any:
        """Return the absolute path, as a plain `Path`."""
        return _Plain(os.fspath(self))

    def resolve(self, strict: bool = False) -> Any:
        """Return the absolute path without symbolic links, as a plain `Path`."""
        return _Plain(os.path.realpath(self, strict=strict))

    def iterdir(self) -> Iterator[Any]:
        """Yield the entries of the folder."""
        return (self / name for name in os.listdir(self))  # noqa: PTH208 - Path's own needs this

    def glob(self, pattern: str) -> Iterator[Any]:
        """Yield the matches of a pattern in the folder."""
        return self._found(self.absolute().glob(pattern))

    def rglob(self, pattern: str) -> Iterator[Any]:
        """Yield the matches of a pattern in the folder and below it."""
        return self._found(self.absolute().rglob(pattern))

    def _found(self, paths: Iterator[Any]) -> Iterator[Any]:
        whole = self.absolute()
        return (self / path.relative_to(whole) for path in paths)


def home_written_out(path: Path) -> str:
    """Return the remedy for a path that begins with `~`; empty for others.

    bash does not expand `~` in `--output=~/swa.pt`, and Python never does.
    """
    text = str(path)
    if not text.startswith("~"):
        return ""
    return f"~ is not expanded here: write {quote(os.path.expanduser(text))}"  # noqa: PTH111


def nearest(path: Path) -> str:
    """Return what may have been meant by a path that does not exist, or what of it is missing."""
    if home := home_written_out(path):
        return home
    missing = path
    while missing.parent != missing and not missing.parent.is_dir():
        missing = missing.parent
    with suppress(OSError):
        there = {Path(name).stem: name for name in os.listdir(missing.parent)}  # noqa: PTH208
        close = [there[stem] for stem in get_close_matches(missing.stem, there, 1, 0.65)]
        rest = Path(str(path)).relative_to(str(missing))
        meant = missing.parent / close[0] / rest if close else None
        if meant is not None and os.path.lexists(meant):
            return f"Did you mean {meant}?"
    return f"There is no folder {missing}" if missing != path else ""


def _current() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # the current folder was deleted
        return ""


def _restored(text: str, folder: str) -> Path:
    return GivenPath.of(text, folder)
