"""Putting what is written in its target's place: modes, renames, and forcing names to disk.

What was known of the target when the work began is checked again in the step that puts
the output there: a file that came meanwhile is another's work. Knows nothing of what is
written, and raises what the system says.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from swa_avg.storage import temporary

# What a file system or kernel says to a call that it does not know.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_CURRENT = -100  # AT_FDCWD: paths count from the current folder
_NO_REPLACE = 1  # RENAME_NOREPLACE
_EXCHANGE = 2  # RENAME_EXCHANGE

# What tells a file from every other one, and from a later state of itself: device, inode,
# size, and the nanosecond of its last change. None where there is no file.
State = tuple[int, int, int, int] | None


class ReplacedError(Exception):
    """What has the target's name is not what was there when the work began."""


def state_of(path: Path) -> State:
    """Return what is known of a file that may not be there."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def put_new(path: Path, final: Path) -> None:
    """Give a file or folder its name, which nothing may have.

    Raises:
        FileExistsError: Something has it.
    """
    try:
        _rename(path, final, _NO_REPLACE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        (_put_new_folder if path.is_dir() else _put_new_file)(path, final)


def _put_new_file(path: Path, final: Path) -> None:
    """Give a file its name by a second link, which never takes the place of anything."""
    try:
        final.hardlink_to(path)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EMLINK):
            raise
        # Neither way: all that is left is to look first.
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        path.rename(final)
        return
    path.unlink()


def _put_new_folder(path: Path, final: Path) -> None:
    """Give a folder its name by taking the place of an empty one that is made for it."""
    final.mkdir()
    try:
        path.rename(final)
    except BaseException:
        with suppress(OSError):
            final.rmdir()
        raise


def put_over(path: Path, final: Path, state: State) -> None:
    """Put a file in the place of the one that was seen, and of no other.

    Where the system can, the two change places and what comes out is looked at; else
    there is a moment between the look and the rename.

    Raises:
        ReplacedError: It is another one, or was written to; all is as it was.
    """
    if state_of(final) != state:
        raise ReplacedError
    try:
        _rename(path, final, _EXCHANGE)
    except FileNotFoundError as error:
        raise ReplacedError from error  # removed since
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        path.replace(final)
        return
    if state_of(path) != state:
        _rename(path, final, _EXCHANGE)
        raise ReplacedError


def take_mode(path: Path, replaced: Path) -> None:
    """Give a file or folder the mode of what it will replace, if there is anything."""
    with suppress(FileNotFoundError):
        path.chmod(stat.S_IMODE(replaced.stat().st_mode))


def put_folder(folder: Path, final: Path, check: Callable[[Path], None]) -> None:
    """Give a folder its name; what has the name gets the other one, or is moved away.

    Args:
        folder: The new one.
        final: What it will be called.
        check: Raises if the folder that it is given holds what must not be lost.
    """
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        check(final)
        try:
            _rename(folder, final, _EXCHANGE)
        except OSError as refused:
            if refused.errno not in UNSUPPORTED:
                raise
            _replace_in_two_steps(folder, final, check)
            return
        try:
            check(folder)
        except Exception:
            _rename(folder, final, _EXCHANGE)
            raise


def _rename(one: Path, other: Path, flags: int) -> None:
    """Rename in one of the ways of which Linux is capable: no replacing, or changing places."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        call = library.renameat2
    except (OSError, AttributeError) as error:
        raise OSError(errno.ENOSYS, "no renameat2") from error
    if call(_CURRENT, os.fsencode(one), _CURRENT, os.fsencode(other), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _replace_in_two_steps(folder: Path, final: Path, check: Callable[[Path], None]) -> None:
    """Move a folder away and put the new one in its place; if that fails, put it back."""
    replaced = folder.with_suffix(temporary.REPLACED)
    try:
        final.rename(replaced)
        check(replaced)
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
