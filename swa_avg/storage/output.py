"""The output: whole or not at all.

It is written to a temporary file beside its target, forced to disk, and put
in the target's place by one rename. Until then the target is as it was;
whatever goes wrong, the temporary file goes.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from swa_avg.errors import OutputError
from swa_avg.storage import commit, temporary
from swa_avg.storage.commit import State
from swa_avg.storage.partial import Draft, Drafts, refusal
from swa_avg.storage.targets import check_replaceable


class Output(Protocol):
    """What an average is written to: one file, or several that count as one."""

    @property
    def path(self) -> Path:
        """Where its bytes are until it is committed."""

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`."""

    def sync(self) -> None:
        """Force what is written to disk."""

    def commit(self) -> tuple[str, ...]:
        """Put it in its target's place; return what the user should know about that."""


class AtomicFile(AbstractContextManager["AtomicFile"]):
    """A file that comes into being whole, by `commit`, or not at all.

    A symbolic link stays a link: the file behind it is replaced. The mode is the
    replaced file's, or what the umask leaves of 0666. What killed runs to the same
    target have left behind goes first. Where it is does not depend on the current
    folder, once it is open.

    Attributes:
        target: The name that the user gave.
        path: Where its bytes are until it is committed.
        size: How many they are.
    """

    def __init__(self, target: Path, size: int, *, force: bool = True, over: State = None) -> None:
        """Make room for it beside its target.

        Args:
            target: The name that the user gives it.
            size: How many bytes it will have.
            force: Whether it may replace a file; checked again when it is committed.
            over: The state of the only file that it may replace, if it may replace but one.

        Raises:
            OutputError: The system refuses.
        """
        self.target = target
        self.size = size
        self._force = force
        self._over = over
        self._final = Path(os.path.realpath(target))
        try:
            # A name too long is found here, not at the very end.
            self._found = commit.state_of(self._final)
            temporary.remove_leftovers(self._final)
            held = False
            while not held:
                self.path = temporary.name_beside(self._final)
                # A signal can come between any two steps: whatever happens, this is done at exit.
                self._remove = weakref.finalize(self, temporary.remove, self.path)
                self._draft = Draft(self.path, target)
                held = self._draft.hold()
                if not held:
                    self._discard()
        except OSError as error:
            raise refusal(target, error) from error
        try:
            self._draft.reserve(size)
        except BaseException:
            self._discard()
            raise

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; may be called from several threads.

        Raises:
            OutputError: The system refuses, for one because the disk is full.
        """
        self._draft.write(data, offset)

    def sync(self) -> None:
        """Force what is written to disk.

        Raises:
            OutputError: The system could not; it is not tried again.
        """
        self._draft.sync()

    def commit(self) -> tuple[str, ...]:
        """Force the file to disk and put it in the target's place.

        Returns:
            What the user should know: another file came meanwhile and was replaced.

        Raises:
            OutputError: The system refuses, or a file came meanwhile that may not be
                replaced; the target is as it was.
        """
        notes: tuple[str, ...] = ()
        with _placed(self.target):
            commit.take_mode(self.path, self._final)
            self.sync()
            if self._over:
                commit.put_over(self.path, self._final, self._over)
            elif self._force:
                notes = _replacing(self.target, self._found, commit.state_of(self._final))
                self.path.replace(self._final)
            else:
                commit.put_new(self.path, self._final)
        _sync_name(self.target, self._final)
        return notes

    def _discard(self) -> None:
        self._draft.close()
        self._remove()

    def __exit__(self, *failure: object) -> None:
        self._discard()


class AtomicFolder(AbstractContextManager["AtomicFolder"]):
    """A folder of files that comes into being whole, by `commit`, or not at all.

    Places count through the files as if they lay one behind the other. A folder that
    is replaced changes places with the new one in one step, where the system can;
    else there is a moment between two renames in which neither has the name.

    Attributes:
        target: The name that the user gave.
        path: Where its files are, under their names, until it is committed.
        files: The sizes of its files by their names, in the order of their places.
        size: The sum of them.
    """

    def __init__(
        self,
        target: Path,
        files: Mapping[str, int],
        *,
        force: bool = True,
        over: Mapping[str, State] | None = None,
    ) -> None:
        """Make room for it beside its target.

        Args:
            target: The name that the user gives it.
            files: The size of each of its files, by their names.
            force: Whether it may replace a folder, which must hold nothing but weights and
                files of these names; checked again when it is committed.
            over: The states, by their names, of the files of the only folder that it may
                replace, if it may replace but one.

        Raises:
            OutputError: The system refuses.
        """
        self.target = target
        self.files = dict(files)
        self._over = over or {}
        self.size = sum(files.values())
        self._force = force
        self._final = Path(os.path.realpath(target))
        self._opened = ExitStack()
        self._drafts = Drafts()
        try:
            self._found = commit.state_of(self._final)
            temporary.remove_leftovers(self._final)
            held = False
            while not held:
                self.path = temporary.name_beside(self._final)
                self._remove = weakref.finalize(self, temporary.remove, self.path)
                self.path.mkdir()
                held = self._hold()
        except OSError as error:
            self._opened.close()
            raise refusal(target, error) from error
        try:
            self._make_room(files)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise refusal(target, error) from error
            raise

    def _hold(self) -> bool:
        try:
            folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._opened.callback(os.close, folder)
        return temporary.hold(folder, self.path)

    def _make_room(self, files: Mapping[str, int]) -> None:
        for name, size in files.items():
            if not (self.path / name).parent.is_dir():
                (self.path / name).parent.mkdir(parents=True)
            draft = Draft(self.path / name, self.target / name)
            self._opened.callback(draft.close)
            draft.reserve(size)
            self._drafts.add(draft, size)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data`, which lies in one file, at `offset`.

        Raises:
            OutputError: The system refuses, for one because the disk is full.
        """
        self._drafts.write(data, offset)

    def sync(self) -> None:
        """Force what is written to disk, and the names in the folder.

        Raises:
            OutputError: The system could not; it is not tried again.
        """
        self._drafts.sync()
        folders = {self.path, *(path.parent for path in self._drafts.paths)}
        try:
            for folder in sorted(folders):
                commit.sync_folder(folder)
        except OSError as error:
            raise refusal(self.target, error) from error

    def commit(self) -> tuple[str, ...]:
        """Force the files to disk and put the folder in the target's place.

        Returns:
            What the user should know: another folder came meanwhile and was replaced.

        Raises:
            OutputError: The system refuses, or a folder came meanwhile that may not be
                replaced; the target is as it was.
        """
        notes: tuple[str, ...] = ()
        with _placed(self.target):
            commit.take_mode(self.path, self._final)
            self.sync()
            if self._force:
                notes = _replacing(self.target, self._found, commit.state_of(self._final))
                if self._over:
                    self._check(self._final)
                commit.put_folder(self.path, self._final, self._check)
            else:
                commit.put_new(self.path, self._final)
        _sync_name(self.target, self._final)
        return notes

    def _check(self, folder: Path) -> None:
        if any(commit.state_of(folder / name) != state for name, state in self._over.items()):
            raise commit.ReplacedError
        check_replaceable(folder, self.files, self.target)

    def _discard(self) -> None:
        self._opened.close()
        self._remove()

    def __exit__(self, *failure: object) -> None:
        self._discard()


@contextmanager
def _placed(target: Path) -> Iterator[None]:
    """Say in one line why an output cannot take its place."""
    try:
        yield
    except commit.ReplacedError as error:
        raise OutputError(
            "was changed or replaced by another program during this run; it is left alone",
            file=target,
            remedy="Start again",
        ) from error
    except FileExistsError as error:
        raise OutputError(
            "was made by another program during this run; it is left alone",
            file=target,
            remedy="Choose another output, or replace it with --force",
        ) from error
    except OSError as error:
        raise refusal(target, error) from error


def _replacing(target: Path, before: State, now: State) -> tuple[str, ...]:
    """Say that what will be replaced is not what was there at the start."""
    if now is None or now == before:
        return ()
    return (f"{target}: another program wrote it during this run; --force has replaced that",)


def _sync_name(target: Path, final: Path) -> None:
    """Force the new name to disk."""
    try:
        commit.sync_folder(final.parent)
    except OSError as error:
        raise OutputError(
            f"is written, but its name could not be forced to disk: {error.strerror}",
            file=target,
            remedy="After a power failure the old one may be back",
        ) from error
