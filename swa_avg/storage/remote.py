"""Files that are not on this machine: a URL as a path.

fsspec, which torch brings, knows the protocols (`s3`, `gs`, `hf`, `https`,
`memory`, …) through packages of their own, the extra `remote`; they also retry
what fails. Neither is imported before a URL is given. Whatever they raise
becomes one line that names the URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

from swa_avg.errors import FileError, SwaAvgError
from swa_avg.storage.given import GivenPath

_T = TypeVar("_T")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOCAL = ("file://", "local://")
_WEB = ("http://", "https://")


def path_of(given: str | os.PathLike[str]) -> Path:
    """Return the path that is meant: of this machine, or what a URL names.

    Args:
        given: A path, or a URL: `s3://bucket/run/epoch_1.pt`.

    Returns:
        A `GivenPath`, which keeps its meaning when the current folder changes; for a URL
        a `RemotePath`, which has as much of its interface as is used.

    Raises:
        FileError: No installed package knows the protocol.
    """
    if isinstance(given, RemotePath | GivenPath):
        return cast(Path, given)
    text = os.fspath(given)
    if text.startswith(_LOCAL):
        return GivenPath.of(text.partition("://")[2])
    if not _URL.match(text):
        return GivenPath.of(text)
    path = RemotePath(text)
    path.fs.invalidate_cache()  # what was listed for an earlier call may be old
    return cast(Path, path)


def is_remote(path: object) -> bool:
    """Tell whether a path is not one of this machine."""
    return isinstance(path, RemotePath)


def remote_matches(pattern: Path) -> list[Path]:
    """Return what there is of a remote pattern."""
    remote = cast(RemotePath, pattern)
    found = remote.ask(remote.fs.glob, remote.key, detail=True)
    return sorted(cast(Path, remote.of_key(key, info)) for key, info in found.items())


class RemotePath:
    """A URL, with as much of `pathlib.Path` as is used here.

    Attributes:
        fs: The filesystem of fsspec that it is in.
        key: Its name there.
    """

    __slots__ = ("_entries", "_folder", "_info", "_url", "fs", "key")

    def __init__(self, url: str, fs: Any = None, folder: RemotePath | None = None) -> None:
        # fsspec makes a filesystem for each thread that asks: what is derived from a path, in
        # whatever thread, stays in the one that the path is in.
        self.fs, self.key = (fs, str(fs._strip_protocol(url))) if fs else _filesystem(url)
        self._url = url.rstrip("/") if self.key.strip("/") else url
        self._folder = folder
        self._info: Mapping[str, Any] | None = None
        self._entries: dict[str, Mapping[str, Any]] | None = None

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self._url == other._url

    def __hash__(self) -> int:
        return hash(self._url)

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def __truediv__(self, name: str) -> RemotePath:
        url = f"{self._url.rstrip('/')}/{name}"
        return RemotePath(url, self.fs, None if "/" in name else self)

    @property
    def protocol(self) -> str:
        """What stands before `://`."""
        return self._url.partition("://")[0].lower()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names that it is made of."""
        # What follows a question mark is no part of a name where it is a query.
        text = urlsplit(self._url).path if self._url.startswith(_WEB) else self._url
        return PurePosixPath(text.partition("://")[2] or text).parts

    @property
    def name(self) -> str:
        """The last of its parts."""
        return self.parts[-1] if self.parts else ""

    @property
    def suffix(self) -> str:
        """The suffix of its name, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """Its name without the suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self._url.partition("?")[0].rstrip("/").rpartition("/")[0], self.fs)

    def with_name(self, name: str) -> RemotePath:
        """Return another path in the same folder."""
        return RemotePath(f"{self.parent}/{name}", self.fs)

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """Return the way to it from a folder."""
        return PurePosixPath(self.key).relative_to(folder.key)

    def exists(self) -> bool:
        """Tell whether there is anything of this name."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Tell whether it is there and no folder."""
        info = self.info()
        return info is not None and info["type"] != "directory"

    def is_dir(self) -> bool:
        """Tell whether it is a folder; on the web there are none."""
        info = None if self._url.startswith(_WEB) else self.info()
        return info is not None and info["type"] == "directory"

    def stat(self) -> os.stat_result:
        """Return its size, and zeros for all else."""
        info = self.info() or {}
        return os.stat_result((0, 0, 0, 0, 0, 0, info.get("size") or 0, 0, 0, 0))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the text of a small file."""
        return cast(bytes, self.ask(self.fs.cat_file, self.key)).decode(encoding)

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield what is in a folder."""
        return (self / name for name in self._listed())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what is in a folder and has a name of this pattern."""
        return (self / name for name in self._listed() if fnmatchcase(name, pattern))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files in a folder, however deep, that have a name of this pattern."""
        found = (self.of_key(key) for key in self.ask(self.fs.find, self.key))
        return (path for path in found if fnmatchcase(path.name, pattern))

    def info(self, *, fresh: bool = False) -> Mapping[str, Any] | None:
        """Return what the filesystem says of it, None if it is not there.

        Args:
            fresh: Whether to ask again, and not to trust what was said before.

        Raises:
            FileError: There is no answer, or none for us.
        """
        if fresh:
            self.fs.invalidate_cache(self.fs._parent(self.key))
        elif self._info is None and self._folder is not None:
            self._info = self._folder._listed().get(self.name)
            return self._info
        if fresh or self._info is None:
            try:
                self._info = self.ask(self.fs.info, self.key)
            except FileError as error:
                if not self._is_absence(error.__cause__):
                    raise
                self._info = None
        return self._info

    def ask(self, question: Callable[..., _T], *details: Any, **more: Any) -> _T:
        """Call a function of the filesystem.

        Raises:
            FileError: It fails, whatever the backend raises.
        """
        try:
            return question(*details, **more)
        except SwaAvgError:
            raise
        except Exception as error:
            raise FileError(f"cannot be read: {reason(error)}", file=str(self)) from error

    def _is_absence(self, error: BaseException | None) -> bool:
        """Tell whether an error says that it is not there."""
        # The web's backend calls every failure a missing file, and keeps the failure behind it.
        if self._url.startswith(_WEB) and error is not None and error.__cause__ is not None:
            return getattr(error.__cause__, "status", None) in (404, 410)
        return isinstance(error, FileNotFoundError | NotADirectoryError)

    def _listed(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what is in a folder, by name; nothing if there is no such folder."""
        if self._entries is None:
            try:
                found = self.ask(self.fs.ls, self.key, detail=True)
            except FileError as error:
                if not self._is_absence(error.__cause__):
                    raise
                found = []
            own = self.key.rstrip("/")
            named = {entry["name"].rstrip("/"): entry for entry in found}
            self._entries = {key.rpartition("/")[2]: e for key, e in named.items() if key != own}
        return self._entries

    def of_key(self, key: str, info: Mapping[str, Any] | None = None) -> RemotePath:
        """Return another path of the same filesystem, with what is known of it."""
        url = key if _URL.match(key) else f"{self._url.partition('://')[0]}://{key.lstrip('/')}"
        path = RemotePath(url, self.fs)
        path._info = info
        return path


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem that knows a URL, and the name that it has there."""
    from fsspec.core import url_to_fs

    try:
        fs, key = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise FileError(
            f"cannot be opened: {reason(error)}",
            file=url,
            remedy="What is needed comes with: pip install 'swa-avg[remote]'",
        ) from error
    except Exception as error:  # whatever a backend says of its configuration
        raise FileError(f"cannot be opened: {reason(error)}", file=url) from error
    return fs, key


def reason(error: BaseException) -> str:
    """Return what a backend means by an error, in one line."""
    if isinstance(error, FileNotFoundError):
        return reason(error.__cause__) if error.__cause__ else "there is no such file"
    if getattr(error, "status", None) and getattr(error, "message", None):
        return f"{error.status} {error.message}"  # type: ignore[attr-defined]
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split()) or type(error).__name__
