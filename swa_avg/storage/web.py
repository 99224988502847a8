"""Ranges of files on the web: what a server answers is compared with what it was asked for.

The filesystem of fsspec takes any answer for the range that was wanted: one of another
range, and that of a file which was written anew meanwhile. So the request is made here, by
its session. What a server cannot be caught at is an answer with other bytes under the
right headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from swa_avg.errors import FileError, FormatError

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_STAMPS = ("ETag", "Last-Modified")  # the first that both answers have is compared


def fetch(fs: Any, url: str, start: int, end: int, known: Mapping[str, Any]) -> bytes:
    """Return the bytes of a URL from `start` up to `end`, or fewer, by one request.

    Args:
        fs: The filesystem of fsspec that knows the URL.
        url: The URL.
        start: The first byte.
        end: Behind the last byte; more than `start`.
        known: What the server said of the file before: `size`, `ETag`, `Last-Modified`.

    Raises:
        FileError: The server does not serve ranges, or answers with another one.
        FormatError: The file is not the one that is known.
        Exception: What aiohttp raises.
    """
    from fsspec.asyn import sync

    return cast(bytes, sync(fs.loop, _fetch, fs, url, start, end, known))


async def _fetch(fs: Any, url: str, start: int, end: int, known: Mapping[str, Any]) -> bytes:
    options = dict(fs.kwargs)
    wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options["headers"] = {**options.get("headers", {}), **wanted}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **options) as answer:
        if answer.status == 416:  # the file has become shorter: whoever asks looks into that
            return b""
        answer.raise_for_status()
        _check_range(url, answer.status, answer.headers, (start, end), known.get("size"))
        _check_stamp(url, answer.headers, known)
        data = bytearray()
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > end - start:
                raise FileError(f"sends more than the {end - start} bytes it announced", file=url)
    return bytes(data)


def _check_range(
    url: str, status: int, headers: Mapping[str, str], wanted: tuple[int, int], size: int | None
) -> None:
    """Refuse an answer that is not of the range that was wanted."""
    start, end = wanted
    if status == 200 and wanted == (0, size):
        return  # all of it was wanted
    if status != 206:
        raise FileError(
            "is on a server that does not serve ranges of it",
            file=url,
            remedy="Download it, and give the file",
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise FileError(
            "is compressed by its server, which was asked not to",
            file=url,
            remedy="Download it, and give the file",
        )
    said = headers.get("Content-Range", "")
    found = _RANGE.fullmatch(said.strip())
    if not found or (int(found[1]), int(found[2]) + 1) != wanted:
        raise FileError(
            f"is answered with another range ({said or 'without a Content-Range'})",
            file=url,
            expected=f"bytes {start}-{end - 1}",
            remedy="Download it, and give the file",
        )
    if size is not None and found[3] not in ("*", str(size)):
        raise changed(url)


def _check_stamp(url: str, headers: Mapping[str, str], known: Mapping[str, Any]) -> None:
    """Refuse an answer that is of another state of the file."""
    for name in _STAMPS:
        if headers.get(name) and known.get(name):
            if headers[name] != known[name]:
                raise changed(url)
            return


def changed(url: str) -> FormatError:
    """Return the error that says that a file is another one by now."""
    return FormatError(
        "changed while being read",
        file=url,
        remedy="Wait until the run has finished writing it, and start again",
    )
