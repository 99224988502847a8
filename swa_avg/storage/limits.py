"""The limit on open files of this process, raised to what the inputs need."""

from __future__ import annotations

from contextlib import suppress

from swa_avg.errors import FileError

try:
    import resource
except ImportError:  # no such limits on Windows
    resource = None  # type: ignore[assignment]

# Descriptors for other uses: imported modules, the output's files, pipes of loader workers.
_SPARE_FILES = 256
_LEAST_SPARE_FILES = 32


def allow_files(count: int) -> None:
    """Raise this process's limit on open files if it is too low for `count` inputs.

    Call it before the first file is opened: importing modules and writing the output
    need descriptors too.

    Args:
        count: How many files will be open at once.

    Raises:
        FileError: The system allows fewer.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if soft == endless or count + _SPARE_FILES <= soft:
        return
    if hard != endless and count + _LEAST_SPARE_FILES > hard:
        raise FileError(
            f"{count} files would be open at once, but the system allows only {hard}",
            remedy="Average some of the checkpoints first, then add the others with --start-from",
        )
    wanted = count + _SPARE_FILES if hard == endless else min(count + _SPARE_FILES, hard)
    with suppress(OSError, ValueError):  # macOS has a second, lower limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def allow_all_files() -> bool:
    """Raise the limit to its maximum for this process; return whether that changed it."""
    if resource is None:
        return False
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return bool(soft != hard)
