"""Temporary files of an output, written at offsets from several threads."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from shlex import quote

from swa_avg.errors import OutputError
from swa_avg.progress import Watch
from swa_avg.storage import commit, temporary
from swa_avg.storage.given import home_written_out
from swa_avg.storage.writeback import WriteBack, wait


class Draft:
    """One temporary file; error messages show its final name.

    Args:
        path: The temporary path.
        shown: The final path, for messages.
        existing: Whether another process has created the file; if not, it must not exist.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path, shown: Path, *, existing: bool = False) -> None:
        self.path = path
        self._shown = shown
        new = 0 if existing else os.O_CREAT | os.O_EXCL
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | new, 0o666)
        self._writeback = WriteBack(self._fd)

    def lock(self) -> bool:
        """Lock the file while it is open; return whether it still exists."""
        return temporary.lock_new(self._fd, self.path)

    def reserve(self, size: int) -> None:
        """Allocate `size` bytes if the file system can, so that a full disk is found early."""
        if not size or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in commit.UNSUPPORTED:
                raise write_error(self._shown, error) from error

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OutputError: The system reports an error, such as a full disk.
        """
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise write_error(self._shown, error) from error
            self._writeback.wrote(count)
            view = view[count:]
            offset += count

    def sync(self, count: Callable[[int], object] | None = None) -> None:
        """Sync the file to disk.

        Args:
            count: Called with the number of bytes that were written since the last call.

        Raises:
            OutputError: The system reports an error; the call is not repeated.
        """
        try:
            if count:
                wait(self.path, count)
            # A failed fsync is final: the kernel may have dropped the unwritten pages.
            os.fsync(self._fd)
        except OSError as error:
            raise write_error(self._shown, error) from error

    def close(self) -> None:
        """Close the file; later writes of other threads fail."""
        descriptor, self._fd = self._fd, -1
        os.close(descriptor)


class Drafts:
    """Several files with one range of offsets, as if they were concatenated."""

    def __init__(self) -> None:
        self._drafts: list[Draft] = []
        self._starts: list[int] = []
        self._end = 0

    @property
    def paths(self) -> Iterable[Path]:
        """The temporary paths."""
        return (draft.path for draft in self._drafts)

    def add(self, draft: Draft, size: int) -> None:
        """Append a file of `size` bytes."""
        self._drafts.append(draft)
        self._starts.append(self._end)
        self._end += size

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; it must not cross from one file to the next."""
        # The last file that starts at or before the offset: empty files start there too.
        number = bisect_right(self._starts, offset) - 1
        self._drafts[number].write(data, offset - self._starts[number])

    def sync(self, count: Callable[[int], object] | None = None) -> None:
        """Sync all files to disk."""
        for draft in self._drafts:
            draft.sync(count)


class JoinedOutput(AbstractContextManager["JoinedOutput"]):
    """An output that another process has opened, and of which this process writes a part.

    The process that opened the output commits or removes it.

    Attributes:
        path: The temporary path until the commit.
    """

    def __init__(self, path: Path, target: Path, files: Mapping[str, int]) -> None:
        """Open the existing temporary files.

        Args:
            path: The temporary path.
            target: The final path.
            files: The sizes of the files by name; a single file has the empty name.

        Raises:
            OutputError: A file does not exist or cannot be opened.
        """
        self.path = path
        self._drafts = Drafts()
        with ExitStack() as opened:
            for name, size in files.items():
                try:
                    draft = Draft(path / name, target / name, existing=True)
                except FileNotFoundError as error:
                    raise OutputError(
                        "was opened by rank 0, but this rank does not find it",
                        file=target,
                        remedy="Write to a file system that all ranks share",
                    ) from error
                except OSError as error:
                    raise write_error(target, error) from error
                opened.callback(draft.close)
                self._drafts.add(draft, size)
            self._opened = opened.pop_all()

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; it must not cross from one file to the next."""
        self._drafts.write(data, offset)

    def sync(self, watch: Watch | None = None) -> None:
        """Sync the writes of this process to disk."""
        self._drafts.sync()

    def commit(self, watch: Watch | None = None) -> tuple[str, ...]:
        """Do nothing: the process that opened the output commits it."""
        return ()

    def __exit__(self, *failure: object) -> None:
        self._opened.close()


def write_error(target: Path, error: OSError | ValueError) -> OutputError:
    """Return the error for a target that cannot be written, with the system's reason."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    missing = isinstance(error, FileNotFoundError) and not target.parent.is_dir()
    remedy = f"Create its folder first: mkdir -p {quote(str(target.parent))}" if missing else ""
    remedy = home_written_out(target) or remedy
    return OutputError(f"cannot be written: {reason}", file=target, remedy=remedy)
