"""Putting what is written in its target's place: modes, renames, and forcing names to disk.

Knows nothing of what is written, and raises what the system says.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

from swa_avg.storage import temporary

# What a file system or kernel says to a call that it does not know.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_CURRENT = -100  # AT_FDCWD: paths count from the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE


def take_mode(path: Path, replaced: Path) -> None:
    """Give a file or folder the mode of what it will replace, if there is anything."""
    with suppress(FileNotFoundError):
        path.chmod(stat.S_IMODE(replaced.stat().st_mode))


def put_folder(folder: Path, final: Path) -> None:
    """Give a folder its name; what has the name gets the other one, or is moved away."""
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        try:
            _exchange(folder, final)
        except OSError as refused:
            if refused.errno not in UNSUPPORTED:
                raise
            _replace_in_two_steps(folder, final)


def _exchange(one: Path, other: Path) -> None:
    """Let two names change places in one step, of which Linux is capable."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        call = library.renameat2
    except (OSError, AttributeError) as error:
        raise OSError(errno.ENOSYS, "no renameat2") from error
    if call(_CURRENT, os.fsencode(one), _CURRENT, os.fsencode(other), _EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _replace_in_two_steps(folder: Path, final: Path) -> None:
    """Move a folder away and put the new one in its place; if that fails, put it back."""
    replaced = folder.with_suffix(temporary.REPLACED)
    try:
        final.rename(replaced)
        folder.rename(final)
    except BaseException:
        if not final.exists():
            with suppress(FileNotFoundError):
                replaced.rename(final)
        raise
    temporary.remove(replaced)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, where its file system knows how and we may.

    Raises:
        OSError: The disk failed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
