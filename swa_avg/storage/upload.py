"""An output that a URL names: written here first, then uploaded, whole or not at all.

Stores take a file from its beginning to its end, the averages come in any order.
So the temporary folder (`TMPDIR`) must have room for one output. How it becomes
whole in its place depends on the backend:

- object stores (`s3`, `gs`, `az`, `abfs`) and `hf`: an object, or a commit, is there
  when its upload is complete, in one request or in parts, and not before;
- all others (`memory`, `sftp`, …): it is uploaded under a temporary name beside the
  target, then renamed, which is as much one step as the backend's renaming is.

Nothing can be put on the web, and folders are not uploaded: no store can put
several files in their places at once.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from swa_avg.errors import FileError, OutputError, SwaAvgError
from swa_avg.storage.files import InputFile, Source
from swa_avg.storage.output import AtomicFile
from swa_avg.storage.remote import RemotePath, is_remote, reason

_OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
_WHOLE_AT_ONCE = (*_OBJECT_STORES, "hf")
_READ_ONLY = ("http", "https")


def check_remote_target(
    target: Path, inputs: Iterable[InputFile], *, force: bool, folder: bool = False
) -> None:
    """Refuse a URL that may not be written, before anything is read.

    Args:
        target: The output.
        inputs: Files that must not be overwritten.
        force: Whether it may be replaced if it exists.
        folder: Whether it would be a folder.

    Raises:
        OutputError: It is an input, exists without `force`, or can be no output.
    """
    remote = _remote(target)
    if remote.protocol in _READ_ONLY:
        raise OutputError("cannot be written: the web is only read", file=target)
    if folder:
        raise OutputError(
            "would be a folder, which no store can put in its place at once",
            file=target,
            remedy="Write it to this machine and copy it, or name a file: swa.safetensors",
        )
    try:
        found = remote.info(fresh=True)
        if found is None and remote.protocol in _OBJECT_STORES:
            _check_bucket(remote)
    except FileError as error:
        raise OutputError(error.found, file=target, remedy=error.remedy) from error
    if found is None:
        return
    if any(file.identity == (remote.fs, remote.key) for file in inputs):
        raise OutputError(
            "is one of the inputs", file=target, remedy="Choose another output with -o"
        )
    if found["type"] == "directory":
        raise OutputError("is a folder", file=target, expected="the name of a file to write")
    if not force:
        raise OutputError(
            "exists already",
            file=target,
            remedy="Choose another output, or replace it with --force",
        )


def _check_bucket(remote: RemotePath) -> None:
    """Refuse a bucket that is not there; of one that may not be asked for, nothing is known."""
    try:
        remote.fs.info(remote.key.partition("/")[0])
    except FileNotFoundError as error:
        raise OutputError("cannot be written: there is no such bucket", file=str(remote)) from error
    except PermissionError:
        return
    except Exception as error:
        raise OutputError(f"cannot be written: {reason(error)}", file=str(remote)) from error


class RemoteFile(AbstractContextManager["RemoteFile"]):
    """A file behind a URL that comes into being whole, by `commit`, or not at all.

    Attributes:
        target: The name that the user gave.
        path: Where its bytes are until it is committed.
    """

    def __init__(
        self, target: Path, size: int, *, force: bool = True, over: Source | None = None
    ) -> None:
        """Make room for it on this machine.

        Args:
            target: The name that the user gives it.
            size: How many bytes it will have.
            force: Whether it may replace a file; checked again before the upload.
            over: The only file that it may replace, if it may replace but one.

        Raises:
            OutputError: There is no room here.
        """
        self.target = target
        self._size = size
        self._force = force
        self._over = over
        self._opened = ExitStack()
        try:
            folder = self._opened.enter_context(TemporaryDirectory(prefix="swa-avg-"))
            self._local = self._opened.enter_context(AtomicFile(Path(folder, "output"), size))
        except OSError as error:
            raise OutputError(f"has no room here at first: {error}", file=target) from error
        except BaseException:
            self._opened.close()
            raise
        self.path = self._local.path

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; may be called from several threads.

        Raises:
            OutputError: The system refuses, for one because the disk is full.
        """
        self._local.write(data, offset)

    def sync(self) -> None:
        """Do nothing: what is on this machine's disk does not last."""

    def commit(self) -> tuple[str, ...]:
        """Upload the file, and let it take the target's place when it is whole there.

        Whether another file is there meanwhile is looked at before the upload: few stores
        can refuse one in the same step.

        Returns:
            Nothing that the user should know.

        Raises:
            OutputError: The backend gives up; the target is as it was.
        """
        remote = _remote(self.target)
        self._check_place(remote)
        fs: Any = remote.fs
        place = remote.key
        if remote.protocol not in _WHOLE_AT_ONCE:
            place = f"{fs._parent(remote.key).rstrip('/')}/.swa-avg-{secrets.token_hex(8)}.tmp"
        try:
            fs.put_file(str(self.path), place)
            fs.invalidate_cache()
            there = fs.info(place)["size"]
            if there != self._size:
                raise OutputError(
                    f"has {there} bytes after its upload",
                    file=self.target,
                    expected=str(self._size),
                )
            if place != remote.key:
                fs.mv(place, remote.key)
        except SwaAvgError:
            raise
        except Exception as error:
            raise OutputError(f"cannot be written: {reason(error)}", file=self.target) from error
        finally:
            if place != remote.key:
                with suppress(Exception):
                    fs.rm_file(place)
        return ()

    def _check_place(self, remote: RemotePath) -> None:
        """Refuse to replace what came meanwhile.

        Raises:
            OutputError: There is something that may not be replaced.
            FormatError: The file that was to be replaced has changed.
        """
        if self._over:
            self._over.check_unchanged()
        elif not self._force and remote.info(fresh=True) is not None:
            raise OutputError(
                "was made by another program during this run; it is left alone",
                file=self.target,
                remedy="Choose another output, or replace it with --force",
            )

    def __exit__(self, *failure: object) -> None:
        self._opened.close()


def _remote(target: Path) -> RemotePath:
    assert is_remote(target)
    return cast(RemotePath, target)
