"""The output, which appears complete or not at all.

It is written to a temporary file beside its target, synced to disk, and renamed
to the target in one step. Until then the target stays as it is. After any
failure the temporary file is removed.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from swa_avg.errors import OutputError
from swa_avg.progress import Counter, Watch
from swa_avg.storage import commit, temporary
from swa_avg.storage.commit import State
from swa_avg.storage.partial import Draft, Drafts, write_error
from swa_avg.storage.targets import check_replaceable


class Output(Protocol):
    """The destination of an average: one file, or several with one range of offsets."""

    @property
    def path(self) -> Path:
        """The temporary path until the commit."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def sync(self, watch: Watch | None = None) -> None:
        """Sync the output to disk, and report the progress."""

    def commit(self, watch: Watch | None = None) -> tuple[str, ...]:
        """Move the output to its target, and report the progress; return notes for the user."""


class _Atomic:
    """The life of an output beside its target: created, written, committed or removed.

    Attributes:
        target: The path as the user wrote it.
        path: The temporary path until the commit.
        size: The size in bytes.
    """

    def __init__(self, target: Path, size: int, force: bool) -> None:
        """Create the temporary file or folder beside the target and allocate its size.

        Raises:
            OutputError: The system reports an error.
        """
        self.target = target
        self.size = size
        self._force = force
        self._final = Path(os.path.realpath(target))
        self._opened = ExitStack()
        try:
            # A name that is too long fails here, not at the commit.
            self._before = commit.state_of(self._final)
            temporary.remove_leftovers(self._final)
            locked = False
            while not locked:
                self.path = temporary.name_beside(self._final)
                # A signal can arrive between any two steps; the finalizer runs at exit anyway.
                self._remove = weakref.finalize(self, temporary.remove, self.path)
                locked = self._create()
                if not locked:
                    self._discard()
        except OSError as error:
            self._opened.close()
            raise write_error(target, error) from error
        try:
            self._allocate()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise write_error(target, error) from error
            raise

    def _create(self) -> bool:
        """Create and lock what is at the temporary path; return whether it still exists."""
        raise NotImplementedError

    def _allocate(self) -> None:
        """Allocate the size."""
        raise NotImplementedError

    def sync(self, watch: Watch | None = None) -> None:
        """Sync the output to disk.

        Raises:
            OutputError: The system reports an error; the call is not repeated.
        """
        raise NotImplementedError

    def _replace(self) -> None:
        """Move the output to its target, which may exist."""
        raise NotImplementedError

    def commit(self, watch: Watch | None = None) -> tuple[str, ...]:
        """Sync the output to disk and rename it to the target.

        Returns:
            A note for the user if something that appeared during the run was replaced.

        Raises:
            OutputError: The system reports an error, or what must not be replaced appeared
                during the run; the target is unchanged.
        """
        notes: tuple[str, ...] = ()
        with _commit_errors(self.target):
            commit.take_mode(self.path, self._final)
            self.sync(watch)
            if self._force:
                notes = _replacement_notes(self.target, self._before, commit.state_of(self._final))
                self._replace()
            else:
                commit.put_new(self.path, self._final)
        _sync_name(self.target, self._final)
        return notes

    def _discard(self) -> None:
        self._opened.close()
        self._remove()

    def __exit__(self, *failure: object) -> None:
        self._discard()


class AtomicFile(_Atomic, AbstractContextManager["AtomicFile"]):
    """A file that appears complete, by `commit`, or not at all.

    A symbolic link stays a link: the file behind it is replaced. The output gets the mode
    of the replaced file, or 0666 minus the umask. Temporary files that killed runs left for the
    same target are removed first. After the file is open, a change of the current folder
    has no effect on it.
    """

    def __init__(self, target: Path, size: int, *, force: bool = True, over: State = None) -> None:
        """Create the temporary file beside the target and allocate its size.

        Args:
            target: The path as the user wrote it.
            size: The size in bytes.
            force: Whether it may replace a file; checked again at the commit.
            over: The state of the one file that it may replace; None for no such restriction.

        Raises:
            OutputError: The system reports an error.
        """
        self._over = over
        super().__init__(target, size, force)

    def _create(self) -> bool:
        self._draft = Draft(self.path, self.target)
        self._opened.callback(self._draft.close)
        return self._draft.lock()

    def _allocate(self) -> None:
        self._draft.reserve(self.size)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; safe from several threads.

        Raises:
            OutputError: The system reports an error, such as a full disk.
        """
        self._draft.write(data, offset)

    def sync(self, watch: Watch | None = None) -> None:
        """Sync the file to disk.

        Raises:
            OutputError: The system reports an error; the call is not repeated.
        """
        self._draft.sync(_count_synced(self.size, watch))

    def _replace(self) -> None:
        if self._over:
            commit.put_over(self.path, self._final, self._over)
        else:
            self.path.replace(self._final)


class AtomicFolder(_Atomic, AbstractContextManager["AtomicFolder"]):
    """A folder of files that appears complete, by `commit`, or not at all.

    Offsets run through the files as if they were concatenated. A folder that exists is
    exchanged with the new one in one step if the system can do that. If it cannot, the
    name is missing for a short time between two renames.

    Attributes:
        files: The sizes of the files by name, in the order of their offsets.
    """

    def __init__(
        self,
        target: Path,
        files: Mapping[str, int],
        *,
        force: bool = True,
        over: Mapping[str, State] | None = None,
    ) -> None:
        """Create the temporary folder beside the target and allocate the files.

        Args:
            target: The path as the user wrote it.
            files: The sizes of the files by name.
            force: Whether it may replace a folder that contains only weights and files of
                these names; checked again at the commit.
            over: The states, by name, of the files of the one folder that it may replace;
                None for no such restriction.

        Raises:
            OutputError: The system reports an error.
        """
        self.files = dict(files)
        self._over = over or {}
        self._drafts = Drafts()
        super().__init__(target, sum(files.values()), force)

    def _create(self) -> bool:
        self.path.mkdir()
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._opened.callback(os.close, folder)
        return temporary.lock_new(folder, self.path)

    def _allocate(self) -> None:
        for name, size in self.files.items():
            if not (self.path / name).parent.is_dir():
                (self.path / name).parent.mkdir(parents=True)
            draft = Draft(self.path / name, self.target / name)
            self._opened.callback(draft.close)
            draft.reserve(size)
            self._drafts.add(draft, size)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; it must not cross from one file to the next.

        Raises:
            OutputError: The system reports an error, such as a full disk.
        """
        self._drafts.write(data, offset)

    def sync(self, watch: Watch | None = None) -> None:
        """Sync the files and the names in the folder to disk.

        Raises:
            OutputError: The system reports an error; the call is not repeated.
        """
        self._drafts.sync(_count_synced(self.size, watch))
        folders = {self.path, *(path.parent for path in self._drafts.paths)}
        try:
            for folder in sorted(folders):
                commit.sync_folder(folder)
        except OSError as error:
            raise write_error(self.target, error) from error

    def _replace(self) -> None:
        if self._over:
            self._check(self._final)
        commit.put_folder(self.path, self._final, self._check)

    def _check(self, folder: Path) -> None:
        if any(commit.state_of(folder / name) != state for name, state in self._over.items()):
            raise commit.ReplacedError
        check_replaceable(folder, self.files, self.target)


@contextmanager
def _commit_errors(target: Path) -> Iterator[None]:
    """Turn the errors of a commit into `OutputError`."""
    try:
        yield
    except commit.ReplacedError as error:
        raise OutputError(
            "was changed or replaced by another program during this run and was not overwritten",
            file=target,
            remedy="Run the command again",
        ) from error
    except FileExistsError as error:
        raise OutputError(
            "was created by another program during this run and was not overwritten",
            file=target,
            remedy="Choose another output with -o, or replace it with --force",
        ) from error
    except OSError as error:
        raise write_error(target, error) from error


def _count_synced(size: int, watch: Watch | None) -> Counter | None:
    """Return the counter of the bytes that are synced; None without a watch."""
    return Counter(watch, "syncing to disk", size) if watch else None


def _replacement_notes(target: Path, before: State, now: State) -> tuple[str, ...]:
    """Return a note if the target that will be replaced changed during the run."""
    if now is None or now == before:
        return ()
    return (f"{target}: another program wrote it during this run, and --force replaced it",)


def _sync_name(target: Path, final: Path) -> None:
    """Sync the new name to disk."""
    try:
        commit.sync_folder(final.parent)
    except OSError as error:
        raise OutputError(
            f"is written, but its name could not be synced to disk: {error.strerror}",
            file=target,
            remedy="A power failure may bring the previous file back",
        ) from error
