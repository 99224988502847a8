"""Temporary names beside a target: whose they are, and whether their writer still lives.

A run that is killed cannot clean up behind itself; the next one to the same target
does. The name of a temporary file or folder tells the target and the machine. A lock
on it tells that its writer lives: the system takes the lock away when the writer ends,
however it ends. Where there are no locks (some network file systems) nothing is removed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

SUFFIX = ".tmp"
# What is moved out of the way, where two folders cannot change places in one step.
REPLACED = ".old"


def name_beside(target: Path) -> Path:
    """Return a new temporary name beside `target`; it is never too long."""
    return target.parent / f"{_stem(target)}{secrets.token_hex(8)}{SUFFIX}"


def hold(descriptor: int, path: Path) -> bool:
    """Lock what has just been made at `path`, until `descriptor` is closed.

    Returns:
        False if another run took it for a left-over before it was locked: it is gone,
        or about to go.
    """
    try:
        _lock(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks here: nobody else can take it for a left-over either
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def remove_leftovers(target: Path) -> None:
    """Remove what killed runs to the same target, on this machine, have left beside it."""
    for path, status in _beside(target):
        folder = stat.S_ISDIR(status.st_mode)
        if path.suffix == REPLACED and not target.exists():
            continue  # killed between two renames: this is all there is of the old output
        flags = os.O_RDONLY if folder else os.O_WRONLY
        with suppress(OSError):
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _lock(descriptor)
                remove(path)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there and we may."""
    try:
        _remove(path)
    finally:
        _remove(path)  # a signal may have cut the first one short


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)


def _stem(target: Path) -> str:
    # Not the name itself: it may be as long as a name can be. Of locks on another machine
    # nothing is known for sure, so its files are not ours to judge.
    whose = os.fsencode(target.name) + b"\0" + platform.node().encode()
    return f".swa-avg-{hashlib.sha256(whose).hexdigest()[:16]}-"


def _beside(target: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files and folders that bear a temporary name of the target."""
    stem = _stem(target)
    with suppress(OSError):
        for name in os.listdir(target.parent):  # noqa: PTH208 - one name, not a Path for each
            if not (name.startswith(stem) and name.endswith((SUFFIX, REPLACED))):
                continue
            path = target.parent / name
            with suppress(OSError):
                status = path.lstat()
                if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                    yield path, status


def _lock(descriptor: int) -> None:
    """Take the lock, at once.

    Raises:
        BlockingIOError: Somebody has it.
        OSError: There are no locks here.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("no locks") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
