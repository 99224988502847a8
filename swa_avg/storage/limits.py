"""How many files this process may have open: raised to what the inputs need."""

from __future__ import annotations

from contextlib import suppress

from swa_avg.errors import FileError

try:
    import resource
except ImportError:  # no such limits on Windows
    resource = None  # type: ignore[assignment]

# Beside the inputs: modules that are imported, the output's files, loader workers' pipes.
_SPARE_FILES = 256
_LEAST_SPARE_FILES = 32


def allow_files(count: int) -> None:
    """Raise this process's limit of open files to what so many inputs need, where it is less.

    Before anything is opened, because the last files that the limit allows are needed to
    import modules and to write the output.

    Args:
        count: How many files will be open at once.

    Raises:
        FileError: The system allows less.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if soft == endless or count + _SPARE_FILES <= soft:
        return
    if hard != endless and count + _LEAST_SPARE_FILES > hard:
        raise FileError(
            f"{count} files would be open at once, and the system allows {hard}",
            remedy="Average some of the checkpoints first, then the others with --start-from",
        )
    wanted = count + _SPARE_FILES if hard == endless else min(count + _SPARE_FILES, hard)
    with suppress(OSError, ValueError):  # macOS has another limit beside this one
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allow_all_files() -> bool:
    """Raise the limit as far as this process may; tell whether that helped."""
    if resource is None:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return bool(soft != hard)
