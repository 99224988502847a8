"""Moving a finished file or folder to its target: modes, renames, syncing the folder.

The state of the target when the run began is compared again in the step that moves the
output there, so that a file written by another program meanwhile is not lost. This
module does not look into the files, and raises the system's errors unchanged.
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

# The errors with which a file system or kernel rejects a call that it does not support.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM)
_CURRENT = -100  # AT_FDCWD: paths are relative to the current folder
_NO_REPLACE = 1  # RENAME_NOREPLACE
_EXCHANGE = 2  # RENAME_EXCHANGE

# The identity of a file and of its contents: device, inode, size, and last change in
# nanoseconds. None if there is no file.
State = tuple[int, int, int, int] | None


class ReplacedError(Exception):
    """The target is not the file or folder that was there when the run began."""


def state_of(path: Path) -> State:
    """Return the state of a file, or None if it does not exist."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def put_new(path: Path, final: Path) -> None:
    """Rename a file or folder to `final`, which must not exist.

    Raises:
        FileExistsError: It exists.
    """
    try:
        _rename(path, final, _NO_REPLACE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        (_put_new_folder if path.is_dir() else _put_new_file)(path, final)


def _put_new_file(path: Path, final: Path) -> None:
    """Rename a file by a hard link, which never replaces an existing file."""
    try:
        final.hardlink_to(path)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EMLINK):
            raise
        # No hard links either: check first, then rename.
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        path.rename(final)
        return
    path.unlink()


def _put_new_folder(path: Path, final: Path) -> None:
    """Rename a folder by creating an empty one at `final` and replacing that."""
    final.mkdir()
    try:
        path.rename(final)
    except BaseException:
        with suppress(OSError):
            final.rmdir()
        raise


def put_over(path: Path, final: Path, state: State) -> None:
    """Replace the file at `final`, but only if it still has the given state.

    The two files are exchanged in one step and the old one is then compared. A system
    without that step leaves a short time between the comparison and the rename.

    Raises:
        ReplacedError: The file was replaced or written to; nothing has changed.
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
    """Copy the mode of the file or folder at `replaced` to `path`, if there is one."""
    with suppress(FileNotFoundError):
        path.chmod(stat.S_IMODE(replaced.stat().st_mode))


def put_folder(folder: Path, final: Path, check: Callable[[Path], None]) -> None:
    """Rename a folder to `final`; exchange it with the folder there, or move that away.

    Args:
        folder: The new folder.
        final: The final path.
        check: Is called with the old folder; raises if that folder must not be replaced.
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
    """Rename by Linux's `renameat2`: without replacing, or by exchanging two names."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        call = library.renameat2
    except (OSError, AttributeError) as error:
        raise OSError(errno.ENOSYS, "no renameat2") from error
    if call(_CURRENT, os.fsencode(one), _CURRENT, os.fsencode(other), flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _replace_in_two_steps(folder: Path, final: Path, check: Callable[[Path], None]) -> None:
    """Move the old folder away and rename the new one; on failure move the old one back."""
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
    """Sync the names in a folder to disk, if its file system and permissions allow it.

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
