"""A file behind a URL, read in ranges: each request asks for one, and gets that or an error."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import cache
from typing import Any, cast

from swa_avg.errors import FileError, FormatError
from swa_avg.storage import web
from swa_avg.storage.prefetch import ReadAhead
from swa_avg.storage.remote import RemotePath

# What tells one state of a file from the next, under the names that backends give it.
_STAMPS = (
    *("ETag", "etag", "Content-MD5", "Digest", "content_md5", "md5Hash", "crc32c", "generation"),
    *("VersionId", "blob_id", "xet_hash", "checksum", "LastModified", "Last-Modified"),
    *("last_modified", "mtime", "modified", "updated", "created", "size"),
)
_PAGE = 64 * 1024  # the least that is fetched for headers
_MOST_PAGES = 16
_MOST_AT_ONCE = 8 << 20  # bytes of one request


def stamp(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one state of a file from the next."""
    return {name: info[name] for name in _STAMPS if info.get(name) is not None}


@cache
def _turns(fs: Any) -> threading.Lock:
    """Return what lets one thread at a time use a filesystem that is not for several."""
    return threading.Lock()


class RemoteSource:
    """A remote file, read in ranges.

    Attributes:
        size: Its bytes when it was opened.
        modified: When it was last written, in seconds since 1970, where the store says.
    """

    def __init__(self, path: RemotePath) -> None:
        """Ask for its size and state, and once for its first bytes.

        Raises:
            FileError: It is not there, is not for us, or cannot be read in ranges.
        """
        self._path = path
        info = path.info(fresh=True)
        if info is None:
            raise FileError("cannot be opened: there is no such file", file=str(path))
        if info["type"] == "directory" or info.get("size") is None:
            what = "is no file" if info.get("size") is not None else "does not tell its size"
            raise FileError(what, file=str(path))
        self.size = int(info["size"])
        self._stamp = stamp(info)
        modified = info.get("LastModified") or info.get("mtime") or info.get("updated")
        self.modified = modified.timestamp() if isinstance(modified, datetime) else None
        self._pages: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._aheads: tuple[ReadAhead, ...] = ()
        self._web = path.protocol in ("http", "https")
        if self._web and self.size:
            self._page(0)  # before more is asked for: a server may know no ranges

    @property
    def identity(self) -> tuple[object, object]:
        """What two URLs of one file have in common."""
        return self._path.fs, self._path.key

    @property
    def state(self) -> None:
        """Nothing: see `check_unchanged`."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return with how many bytes, 0 at the end of the file."""
        for ahead in self._aheads:
            if count := ahead.read_into(buffer, offset):
                return count
        count = min(len(buffer), self.size - offset, _MOST_AT_ONCE)
        if count <= 0:
            return 0
        if count < _PAGE:
            start = offset - offset % _PAGE
            data = memoryview(self._page(start))[offset - start :][:count]
        else:
            data = memoryview(self.fetch(offset, offset + count))
        buffer[: len(data)] = data
        return len(data)

    def fetch(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`, by one request.

        Raises:
            FileError: The backend gives up, after as many attempts as it is set to make.
            FormatError: There are not so many bytes.
        """
        data = self._ask(start, end)
        if len(data) != end - start:
            self.check_unchanged()
            raise FormatError(
                f"gave {len(data)} bytes",
                file=str(self._path),
                expected=f"{end - start} at {start}",
                remedy="The file was cut short, or its server does not serve ranges",
            )
        return data

    def _ask(self, start: int, end: int) -> bytes:
        path, fs = self._path, self._path.fs
        if self._web:
            known = {**self._stamp, "size": self.size}
            return path.ask(web.fetch, fs, path.key, start, end, known)
        # Of the backends that are not asynchronous one is known to bear several threads.
        alone = not fs.async_impl and path.protocol != "hf"
        exactly = {"cache_type": "none"} if path.protocol == "hf" else {}
        with _turns(fs) if alone else nullcontext():
            return cast(bytes, path.ask(fs.cat_file, path.key, start=start, end=end, **exactly))

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file is not the one that was opened."""
        info = self._path.info(fresh=True)
        if info is None:
            raise FormatError("was removed while being read", file=str(self._path))
        if stamp(info) != self._stamp:
            raise web.changed(str(self._path))

    @contextmanager
    def reading(self, ahead: ReadAhead) -> Iterator[None]:
        """Look into what is read ahead before a request is made."""
        with self._lock:
            self._aheads += (ahead,)
        try:
            yield
        finally:
            with self._lock:
                self._aheads = tuple(other for other in self._aheads if other is not ahead)

    def close(self) -> None:
        """Forget what was read."""
        self._pages.clear()

    def _page(self, start: int) -> bytes:
        """Return a page of the file: headers are read in small pieces that lie close together."""
        with self._lock:
            if start in self._pages:
                self._pages.move_to_end(start)
                return self._pages[start]
        data = self.fetch(start, min(start + _PAGE, self.size))
        with self._lock:
            self._pages[start] = data
            while len(self._pages) > _MOST_PAGES:
                self._pages.popitem(last=False)
        return data
