"""Byte ranges of files on the web, with a check of each response against its request.

fsspec's HTTP filesystem accepts any response as the requested range: another range, or a
range of a file that was rewritten meanwhile. So this module sends the request itself,
through fsspec's session, and checks the headers. It cannot detect a server that sends
wrong bytes with the right headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from swa_avg.errors import FileError, FormatError

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_STAMPS = ("ETag", "Last-Modified")  # the first header in both responses is compared


def fetch(fs: Any, url: str, start: int, end: int, known: Mapping[str, Any]) -> bytes:
    """Return bytes `start` to `end` of a URL, or fewer at its end, by one request.

    Args:
        fs: The fsspec filesystem of the URL.
        url: The URL.
        start: The first byte.
        end: One past the last byte; greater than `start`.
        known: The file's earlier headers: `size`, `ETag`, `Last-Modified`.

    Raises:
        FileError: The server does not serve ranges, or sends another range.
        FormatError: The file has changed since the earlier headers.
        Exception: An error of aiohttp.
    """
    from fsspec.asyn import sync

    return cast(bytes, sync(fs.loop, _fetch, fs, url, start, end, known))


async def _fetch(fs: Any, url: str, start: int, end: int, known: Mapping[str, Any]) -> bytes:
    options = dict(fs.kwargs)
    wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options["headers"] = {**options.get("headers", {}), **wanted}
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **options) as answer:
        if answer.status == 416:  # the file has become shorter; the caller checks that
            return b""
        answer.raise_for_status()
        _check_range(url, answer.status, answer.headers, (start, end), known.get("size"))
        _check_stamp(url, answer.headers, known)
        data = bytearray()
        async for piece in answer.content.iter_any():
            data += piece
            if len(data) > end - start:
                raise FileError(
                    f"got more bytes from the server than the {end - start} requested", file=url
                )
    return bytes(data)


def _check_range(
    url: str, status: int, headers: Mapping[str, str], wanted: tuple[int, int], size: int | None
) -> None:
    """Refuse a response with a range other than the requested one."""
    start, end = wanted
    if status == 200 and wanted == (0, size):
        return  # the whole file was requested
    if status != 206:
        raise FileError(
            "is on a server that does not serve byte ranges",
            file=url,
            remedy="Download the file and give its path",
        )
    if headers.get("Content-Encoding", "identity") != "identity":
        raise FileError(
            "was sent compressed, although it was requested without compression",
            file=url,
            remedy="Download the file and give its path",
        )
    received = headers.get("Content-Range", "")
    found = _RANGE.fullmatch(received.strip())
    if not found or (int(found[1]), int(found[2]) + 1) != wanted:
        raise FileError(
            f"got another byte range from the server ({received or 'no Content-Range header'})",
            file=url,
            expected=f"bytes {start}-{end - 1}",
            remedy="Download the file and give its path",
        )
    if size is not None and found[3] not in ("*", str(size)):
        raise changed(url)


def _check_stamp(url: str, headers: Mapping[str, str], known: Mapping[str, Any]) -> None:
    """Refuse a response whose ETag or Last-Modified has changed."""
    for name in _STAMPS:
        if headers.get(name) and known.get(name):
            if headers[name] != known[name]:
                raise changed(url)
            return


def changed(url: str) -> FormatError:
    """Return the error for a file that changed during the run."""
    return FormatError(
        "changed while being read",
        file=url,
        remedy="Wait until the run has finished writing it, then run the command again",
    )
