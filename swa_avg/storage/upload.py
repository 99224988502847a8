"""An output with a URL: written to this machine first, then uploaded completely or not at all.

A store receives a file from start to end, but the kernel writes it in any order. So
the temporary folder (`TMPDIR`) needs space for one output. How the upload becomes
visible depends on the backend:

- object stores (`s3`, `gs`, `az`, `abfs`) and `hf`: the object, or the commit, appears
  when its upload is complete, in one request or in several parts;
- all others (`memory`, `sftp`, …): the file is uploaded under a temporary name beside
  the target and then renamed, which is as atomic as the backend's rename.

`http` and `https` are read-only. Folders are not uploaded, because no store can replace
several files in one step.
"""

from __future__ import annotations

import secrets
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from swa_avg.errors import OutputError, SwaAvgError
from swa_avg.progress import Counter, Watch
from swa_avg.storage.files import Source
from swa_avg.storage.output import AtomicFile, AtomicFolder
from swa_avg.storage.remote import RemotePath, is_remote, reason
from swa_avg.storage.targets import OBJECT_STORES

_WHOLE_AT_ONCE = (*OBJECT_STORES, "hf")


class RemoteFile(AbstractContextManager["RemoteFile"]):
    """A file behind a URL that appears complete, by `commit`, or not at all.

    Attributes:
        target: The URL as the user wrote it.
        path: The local path until the commit.
        size: The size in bytes.
    """

    def __init__(
        self, target: Path, size: int, *, force: bool = True, over: Source | None = None
    ) -> None:
        """Create a temporary file of the output's size on this machine.

        Args:
            target: The URL as the user wrote it.
            size: The size in bytes.
            force: Whether it may replace a file; checked again before the upload.
            over: The one file that it may replace; None for no such restriction.

        Raises:
            OutputError: The temporary file cannot be created.
        """
        self.target = target
        self.size = size
        self._force = force
        self._over = over
        self._opened = ExitStack()
        try:
            folder = self._opened.enter_context(TemporaryDirectory(prefix="swa-avg-"))
            self._local = self._opened.enter_context(AtomicFile(Path(folder, "output"), size))
        except OSError as error:
            raise OutputError(
                f"cannot be prepared in the temporary folder: {error}",
                file=target,
                remedy="Set TMPDIR to a folder with space for the output",
            ) from error
        except BaseException:
            self._opened.close()
            raise
        self.path = self._local.path

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Write all of `data` at `offset`; safe from several threads.

        Raises:
            OutputError: The system reports an error, such as a full disk.
        """
        self._local.write(data, offset)

    def sync(self, watch: Watch | None = None) -> None:
        """Do nothing: the local file is temporary."""

    def commit(self, watch: Watch | None = None) -> tuple[str, ...]:
        """Upload the file; it replaces the target when the upload is complete.

        The target is checked for another program's file before the upload, because few
        stores can do both in one step.

        Args:
            watch: Called with the progress.

        Returns:
            No notes.

        Raises:
            OutputError: The upload failed; the target is unchanged.
        """
        remote = _remote(self.target)
        self._check_place(remote)
        fs: Any = remote.fs
        place = remote.key
        if remote.protocol not in _WHOLE_AT_ONCE:
            place = f"{fs._parent(remote.key).rstrip('/')}/.swa-avg-{secrets.token_hex(8)}.tmp"
        try:
            fs.put_file(str(self.path), place, **_told(watch, self.size))
            fs.invalidate_cache()
            there = fs.info(place)["size"]
            if there != self.size:
                raise OutputError(
                    f"has {there} bytes after its upload",
                    file=self.target,
                    expected=str(self.size),
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
        """Refuse to replace a file that appeared or changed during the run.

        Raises:
            OutputError: A file appeared that must not be replaced.
            FormatError: The one file that may be replaced has changed.
        """
        if self._over:
            self._over.check_unchanged()
        elif not self._force and remote.info(fresh=True) is not None:
            raise OutputError(
                "was created by another program during this run and was not overwritten",
                file=self.target,
                remedy="Choose another output with -o, or replace it with --force",
            )

    def __exit__(self, *failure: object) -> None:
        self._opened.close()


# Every output that this process creates and commits.
OutputFile = AtomicFile | AtomicFolder | RemoteFile


def _told(watch: Watch | None, size: int) -> dict[str, Any]:
    """Return the argument of an upload that reports its progress."""
    if watch is None:
        return {}
    from fsspec.callbacks import Callback

    count = Counter(watch, "uploading", size)

    class Told(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            count(inc)

    return {"callback": Told()}


def _remote(target: Path) -> RemotePath:
    assert is_remote(target)
    return cast(RemotePath, target)
