"""Temporary files beside a target: their names, their locks, and the removal of old ones.

A run that is killed leaves its temporary files behind. The next run to the same target
removes them. The name of a temporary file or folder identifies the target and the
machine. Its writer holds a lock on it; the system releases the lock when the writer
exits or is killed. Where the file system has no locks, nothing is removed.
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
# The suffix of the old folder, where the system cannot exchange two folders in one step.
REPLACED = ".old"


def name_beside(target: Path) -> Path:
    """Return a new temporary path in the folder of `target`, short for every file system."""
    return target.parent / f"{_stem(target)}{secrets.token_hex(8)}{SUFFIX}"


def lock_new(descriptor: int, path: Path) -> bool:
    """Lock the file or folder that was just created at `path`, until `descriptor` is closed.

    Returns:
        False if another run took it for a leftover before it was locked, and removes it.
    """
    try:
        _lock(descriptor)
    except BlockingIOError:
        return False
    except OSError:
        return True  # without locks no run removes leftovers
    with suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files that killed runs on this machine left beside `target`."""
    for path, status in _beside(target):
        folder = stat.S_ISDIR(status.st_mode)
        if path.suffix == REPLACED and not target.exists():
            continue  # a run was killed between two renames: this is the only old output
        flags = os.O_RDONLY if folder else os.O_WRONLY
        with suppress(OSError):
            descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                _lock(descriptor)
                remove(path)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its contents; ignore errors."""
    try:
        _remove(path)
    finally:
        _remove(path)  # a signal may have interrupted the first call


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)


def _stem(target: Path) -> str:
    # A hash, because the target's name may have the maximum length already. It includes the
    # machine, because locks held on another machine may be invisible here.
    owner = os.fsencode(target.name) + b"\0" + platform.node().encode()
    return f".swa-avg-{hashlib.sha256(owner).hexdigest()[:16]}-"


def _beside(target: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield the files and folders with a temporary name of the target."""
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
    """Take the lock without waiting.

    Raises:
        BlockingIOError: Another process holds it.
        OSError: The system or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise OSError("no locks") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
