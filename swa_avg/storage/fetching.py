"""A file behind a URL, read in byte ranges: one request for each range."""

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

# The fields that change when a file is rewritten, under the names of the different backends.
_STAMPS = (
    *("ETag", "etag", "Content-MD5", "Digest", "content_md5", "md5Hash", "crc32c", "generation"),
    *("VersionId", "blob_id", "xet_hash", "checksum", "LastModified", "Last-Modified"),
    *("last_modified", "mtime", "modified", "updated", "created", "size"),
)
_PAGE = 64 * 1024  # the smallest request, for headers
_MOST_PAGES = 16
_MOST_AT_ONCE = 8 << 20  # bytes in one request


def stamp(info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that change when a file is rewritten."""
    return {name: info[name] for name in _STAMPS if info.get(name) is not None}


@cache
def _lock_of(fs: Any) -> threading.Lock:
    """Return the lock of a filesystem that is not thread-safe."""
    return threading.Lock()


class RemoteSource:
    """A remote file, read in byte ranges.

    Attributes:
        size: The size in bytes when the file was opened.
        modified: The time of the last write in seconds since 1970, or None if it is unknown.
    """

    def __init__(self, path: RemotePath) -> None:
        """Request the size and the state; on the web, also the first bytes.

        Raises:
            FileError: The file does not exist, access is denied, or the server does not
                serve byte ranges.
        """
        self._path = path
        info = path.info(fresh=True)
        if info is None:
            raise FileError("cannot be opened: there is no such file", file=str(path))
        if info["type"] == "directory" or info.get("size") is None:
            what = "is not a file" if info.get("size") is not None else "has no known size"
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
            self._page(0)  # fails early if the server does not serve byte ranges

    @property
    def identity(self) -> tuple[object, object]:
        """A key that is equal for two URLs of one file."""
        return self._path.fs, self._path.key

    @property
    def state(self) -> None:
        """None: `check_unchanged` compares remote files."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill the start of `buffer`; return the number of bytes, 0 at the end of the file."""
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
        """Return bytes `start` to `end` by one request.

        Raises:
            FileError: The request failed, after the retries that the backend makes.
            FormatError: The response has fewer bytes.
        """
        data = self._request(start, end)
        if len(data) != end - start:
            self.check_unchanged()
            raise FormatError(
                f"returned {len(data)} bytes",
                file=str(self._path),
                expected=f"{end - start} at {start}",
                remedy="The file was cut short, or its server does not serve ranges",
            )
        return data

    def _request(self, start: int, end: int) -> bytes:
        path, fs = self._path, self._path.fs
        if self._web:
            known = {**self._stamp, "size": self.size}
            return path.call(web.fetch, fs, path.key, start, end, known)
        # hf is the only backend without async that is known to be thread-safe.
        alone = not fs.async_impl and path.protocol != "hf"
        options = {"cache_type": "none"} if path.protocol == "hf" else {}
        with _lock_of(fs) if alone else nullcontext():
            return cast(bytes, path.call(fs.cat_file, path.key, start=start, end=end, **options))

    def check_unchanged(self) -> None:
        """Raise `FormatError` if the file was changed or removed after it was opened."""
        info = self._path.info(fresh=True)
        if info is None:
            raise FormatError("was removed while being read", file=str(self._path))
        if stamp(info) != self._stamp:
            raise web.changed(str(self._path))

    @contextmanager
    def reading(self, ahead: ReadAhead) -> Iterator[None]:
        """Read from `ahead` first, until the end of the context."""
        with self._lock:
            self._aheads += (ahead,)
        try:
            yield
        finally:
            with self._lock:
                self._aheads = tuple(other for other in self._aheads if other is not ahead)

    def close(self) -> None:
        """Drop the cached pages."""
        self._pages.clear()

    def _page(self, start: int) -> bytes:
        """Return a page of the file, cached because headers are read in small adjacent pieces."""
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
