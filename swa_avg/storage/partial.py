"""Files that are being written and are no output yet: at offsets, from several threads."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from swa_avg.errors import OutputError
from swa_avg.storage import commit, temporary
from swa_avg.storage.writeback import WriteBack


class Draft:
    """One file that is being written; errors name it as it will be called.

    Args:
        path: Where it is.
        shown: What it will be called.
        there: Whether another process has made it; else it must not be there.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path, shown: Path, *, there: bool = False) -> None:
        self.path = path
        self._shown = shown
        new = 0 if there else os.O_CREAT | os.O_EXCL
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | new, 0o666)
        self._writeback = WriteBack(self._fd)

    def hold(self) -> bool:
        """Lock the file for as long as it is open; tell whether it is still there."""
        return temporary.hold(self._fd, self.path)

    def reserve(self, size: int) -> None:
        """Make room for all of it, where the file system can: a full disk is found here."""
        if not size or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            if error.errno not in commit.UNSUPPORTED:
                raise refusal(self._shown, error) from error

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`.

        Raises:
            OutputError: The system refuses, for one because the disk is full.
        """
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._fd, view, offset)
            except OSError as error:
                raise refusal(self._shown, error) from error
            self._writeback.wrote(count)
            view = view[count:]
            offset += count

    def sync(self) -> None:
        """Force what is written to disk.

        Raises:
            OutputError: The system could not; it is not tried again.
        """
        try:
            # A failed fsync is final: the kernel may have dropped the pages it could not write.
            os.fsync(self._fd)
        except OSError as error:
            raise refusal(self._shown, error) from error

    def close(self) -> None:
        """Close the file; a thread that is late writes nowhere."""
        descriptor, self._fd = self._fd, -1
        os.close(descriptor)


class Drafts:
    """Files that are written as if they lay one behind the other."""

    def __init__(self) -> None:
        self._drafts: list[Draft] = []
        self._starts: list[int] = []
        self._end = 0

    @property
    def paths(self) -> Iterable[Path]:
        """Where they are."""
        return (draft.path for draft in self._drafts)

    def add(self, draft: Draft, size: int) -> None:
        """Put a file of so many bytes behind the others."""
        self._drafts.append(draft)
        self._starts.append(self._end)
        self._end += size

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data`, which lies in one file, at `offset`."""
        # The last file that starts there: an empty one before it has no bytes to write.
        number = bisect_right(self._starts, offset) - 1
        self._drafts[number].write(data, offset - self._starts[number])

    def sync(self) -> None:
        """Force what is written to disk."""
        for draft in self._drafts:
            draft.sync()


class JoinedOutput(AbstractContextManager["JoinedOutput"]):
    """The output that another process has opened, to write a part of it.

    Whoever opened it commits it, or takes it away.

    Attributes:
        path: Where its bytes are until it is committed.
    """

    def __init__(self, path: Path, target: Path, files: Mapping[str, int]) -> None:
        """Open what is there.

        Args:
            path: Where it is.
            target: What it will be called.
            files: The sizes of its files by their names; of a single file by an empty one.

        Raises:
            OutputError: It is not there, or may not be written.
        """
        self.path = path
        self._drafts = Drafts()
        with ExitStack() as opened:
            for name, size in files.items():
                try:
                    draft = Draft(path / name, target / name, there=True)
                except FileNotFoundError as error:
                    raise OutputError(
                        "was opened by rank 0, and is not to be found here",
                        file=target,
                        remedy="Write to a file system that all ranks share",
                    ) from error
                except OSError as error:
                    raise refusal(target, error) from error
                opened.callback(draft.close)
                self._drafts.add(draft, size)
            self._opened = opened.pop_all()

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data`, which lies in one file, at `offset`."""
        self._drafts.write(data, offset)

    def sync(self) -> None:
        """Force what this process has written to disk."""
        self._drafts.sync()

    def commit(self) -> tuple[str, ...]:
        """Leave it to the process that opened it."""
        return ()

    def __exit__(self, *failure: object) -> None:
        self._opened.close()


def refusal(target: Path, error: OSError | ValueError) -> OutputError:
    """Return the error that says that something cannot be written, and the system's reason."""
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return OutputError(f"cannot be written: {reason}", file=target)
