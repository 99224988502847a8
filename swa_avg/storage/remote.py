"""Remote files: a URL with the interface of a path.

fsspec, a dependency of torch, reads the protocols (`s3`, `gs`, `hf`, `https`,
`memory`, …) through backend packages, which the extra `remote` installs. The
backends also retry failed requests. None of these packages is imported unless a
URL is given. Every error of a backend becomes one line with the URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

from swa_avg.errors import FileError, SwaAvgError
from swa_avg.storage.given import GivenPath

_T = TypeVar("_T")
# The protocols whose packages the extra brings; fsspec's line names the package of any other.
_OF_EXTRA = ("s3", "s3a", "gs", "gcs", "hf", "http", "https")
_INSTALL = "To install the packages for URLs: pip install 'swa-avg[remote]'"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MAGIC = re.compile(r"[*?[]")
_HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)@(?P<revision>[^/]+)(?P<rest>/.*)?")
_LOCAL = ("file://", "local://")
_WEB = ("http://", "https://")


def path_of(given: str | os.PathLike[str]) -> Path:
    """Return the path for a local path or a URL.

    Args:
        given: A path, or a URL: `s3://bucket/run/epoch_1.pt`.

    Returns:
        A `GivenPath`, which stays valid when the current folder changes; for a URL a
        `RemotePath`, which has the part of its interface that swa-avg uses.

    Raises:
        FileError: No installed package supports the protocol.
    """
    if isinstance(given, RemotePath | GivenPath):
        return cast(Path, given)
    text = os.fspath(given)
    if text.startswith(_LOCAL):
        return GivenPath.of(text.partition("://")[2])
    if not _URL.match(text):
        return GivenPath.of(text)
    path = RemotePath(text)
    path.fs.invalidate_cache()  # listings of an earlier call may be out of date
    return cast(Path, path)


def is_remote(path: object) -> bool:
    """Return whether a path is a URL of another machine."""
    return isinstance(path, RemotePath)


def remote_matches(pattern: Path) -> list[Path]:
    """Return the matches of a remote pattern, sorted."""
    remote = cast(RemotePath, pattern)
    revisions = _revisions(remote)
    if revisions is not None:
        magic = [path for path in revisions if _MAGIC.search(str(path))]
        inner = [match for path in magic for match in remote_matches(cast(Path, path))]
        return sorted([*inner, *(cast(Path, path) for path in revisions if path not in magic)])
    found = remote.call(remote.fs.glob, remote.key, detail=True)
    return sorted(cast(Path, remote.of_key(key, info)) for key, info in found.items())


def _revisions(pattern: RemotePath) -> list[RemotePath] | None:
    """Return a path for each revision in a repository of the Hugging Face hub that matches.

    The revision is the part after the `@` in `hf://org/model@step*`. The result is None if
    the pattern is in another part.
    """
    parts = _HUB.fullmatch(str(pattern))
    if not parts or not _MAGIC.search(parts["revision"]):
        return None
    from huggingface_hub import HfApi

    api = HfApi(endpoint=pattern.fs.endpoint, token=pattern.fs.token)
    refs = pattern.call(api.list_repo_refs, parts["repo"])
    revisions = [ref.name for ref in (*refs.branches, *refs.tags)]
    matching = [name for name in revisions if fnmatchcase(name, unquote(parts["revision"]))]
    rest = parts["rest"] or ""
    # A slash in the name of a branch is no separator of the URL.
    urls = [f"hf://{parts['repo']}@{quote(name, safe='')}{rest}" for name in matching]
    return [RemotePath(url, pattern.fs) for url in dict.fromkeys(urls)]


class RemotePath:
    """A URL, with the part of `pathlib.Path`'s interface that swa-avg uses.

    Attributes:
        fs: The fsspec filesystem of the URL.
        key: The name of the file in that filesystem.
    """

    __slots__ = ("_entries", "_folder", "_info", "_url", "fs", "key")

    def __init__(self, url: str, fs: Any = None, folder: RemotePath | None = None) -> None:
        # fsspec creates one filesystem for each thread. A path derived from this one keeps this
        # path's filesystem, in every thread.
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
        """The text before `://`, in lower case."""
        return self._url.partition("://")[0].lower()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names between the slashes."""
        # On the web, the text after a question mark is a query and not part of the name.
        text = urlsplit(self._url).path if self._url.startswith(_WEB) else self._url
        return PurePosixPath(text.partition("://")[2] or text).parts

    @property
    def name(self) -> str:
        """The last of the parts."""
        return self.parts[-1] if self.parts else ""

    @property
    def suffix(self) -> str:
        """The suffix of the name, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without the suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder that contains the file."""
        return RemotePath(self._url.partition("?")[0].rstrip("/").rpartition("/")[0], self.fs)

    def with_name(self, name: str) -> RemotePath:
        """Return another path in the same folder."""
        return RemotePath(f"{self.parent}/{name}", self.fs)

    def relative_to(self, folder: RemotePath) -> PurePosixPath:
        """Return the path relative to a folder."""
        return PurePosixPath(self.key).relative_to(folder.key)

    def exists(self) -> bool:
        """Return whether the file or folder exists."""
        return self.info() is not None

    def is_file(self) -> bool:
        """Return whether it exists and is not a folder."""
        info = self.info()
        return info is not None and info["type"] != "directory"

    def is_dir(self) -> bool:
        """Return whether it is a folder; False for http and https."""
        info = None if self._url.startswith(_WEB) else self.info()
        return info is not None and info["type"] == "directory"

    def stat(self) -> os.stat_result:
        """Return a status with the size; all other fields are 0."""
        info = self.info() or {}
        return os.stat_result((0, 0, 0, 0, 0, 0, info.get("size") or 0, 0, 0, 0))

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the text of a small file."""
        return cast(bytes, self.call(self.fs.cat_file, self.key)).decode(encoding)

    def iterdir(self) -> Iterator[RemotePath]:
        """Yield the entries of the folder."""
        return (self / name for name in self._listed())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the entries of the folder whose names match the pattern."""
        return (self / name for name in self._listed() if fnmatchcase(name, pattern))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield the files in the folder and below it whose names match the pattern."""
        found = (self.of_key(key) for key in self.call(self.fs.find, self.key))
        return (path for path in found if fnmatchcase(path.name, pattern))

    def info(self, *, fresh: bool = False) -> Mapping[str, Any] | None:
        """Return the filesystem's information on the file, or None if it does not exist.

        Args:
            fresh: Whether to request it again instead of using a cached result.

        Raises:
            FileError: The request failed or was denied.
        """
        if fresh:
            # The parent of a repository of the hub is no path of its own.
            is_repository = self.protocol == "hf" and self.key.count("/") < 2
            self.fs.invalidate_cache(*([] if is_repository else [self.fs._parent(self.key)]))
        elif self._info is None and self._folder is not None:
            self._info = self._folder._listed().get(self.name)
            return self._info
        if fresh or self._info is None:
            try:
                self._info = self.call(self.fs.info, self.key)
            except FileError as error:
                if not self._is_absence(error.__cause__):
                    raise
                self._info = None
        return self._info

    def call(self, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call a function of the filesystem.

        Raises:
            FileError: The backend raised an error of any kind.
        """
        try:
            return function(*args, **kwargs)
        except SwaAvgError:
            raise
        except Exception as error:
            raise FileError(f"cannot be read: {reason(error)}", file=str(self)) from error

    def _is_absence(self, error: BaseException | None) -> bool:
        """Return whether an error means that the file does not exist."""
        # The HTTP backend raises FileNotFoundError for every failure; the cause is the failure.
        if self._url.startswith(_WEB) and error is not None and error.__cause__ is not None:
            return getattr(error.__cause__, "status", None) in (404, 410)
        return isinstance(error, FileNotFoundError | NotADirectoryError)

    def _listed(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the entries of the folder by name; none if there is no such folder."""
        if self._entries is None:
            try:
                found = self.call(self.fs.ls, self.key, detail=True)
            except FileError as error:
                if not self._is_absence(error.__cause__):
                    raise
                found = []
            own = self.key.rstrip("/")
            named = {entry["name"].rstrip("/"): entry for entry in found}
            self._entries = {key.rpartition("/")[2]: e for key, e in named.items() if key != own}
        return self._entries

    def of_key(self, key: str, info: Mapping[str, Any] | None = None) -> RemotePath:
        """Return another path in the same filesystem; `info` is cached in it."""
        url = key if _URL.match(key) else f"{self._url.partition('://')[0]}://{key.lstrip('/')}"
        path = RemotePath(url, self.fs)
        path._info = info
        return path


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL, and the file's name in it."""
    import logging

    from fsspec.core import url_to_fs

    # Parts of an upload that fail at the same time are logged beside the error that is raised.
    # Without a handler, Python prints such a log line to stderr.
    log = logging.getLogger("asyncio")
    if not log.handlers:
        log.addHandler(logging.NullHandler())
    try:
        fs, key = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise FileError(
            f"cannot be opened: {reason(error)}",
            file=url,
            remedy=_like(url) or (_INSTALL if url.partition("://")[0] in _OF_EXTRA else ""),
        ) from error
    except Exception as error:  # a backend may raise any error for its configuration
        raise FileError(f"cannot be opened: {reason(error)}", file=url) from error
    return fs, key


def _like(url: str) -> str:
    """Return the known protocol that an unknown one is most like, as a question."""
    from fsspec.registry import known_implementations

    protocol, _, rest = url.partition("://")
    close = get_close_matches(protocol, known_implementations, 1, 0.75)
    known = protocol in known_implementations or not close
    return "" if known else f"Did you mean {close[0]}://{rest}?"


def reason(error: BaseException) -> str:
    """Return the reason of a backend's error, in one line."""
    if isinstance(error, FileNotFoundError):
        return reason(error.__cause__) if error.__cause__ else "there is no such file"
    if getattr(error, "status", None) and getattr(error, "message", None):
        return f"{error.status} {error.message}"  # type: ignore[attr-defined]
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
