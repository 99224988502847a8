"""Input and output of bytes: local files, URLs, and an output that appears complete or not at all.

In: paths. Out: files to read by range (`InputFile`), and files, folders and remote
objects to write (`Output`). Does not depend on tensors or formats.
"""

from swa_avg.storage.files import ROOM, InputFile, Section, announce, reading_ahead
from swa_avg.storage.given import GivenPath, home_written_out, nearest
from swa_avg.storage.limits import allow_files
from swa_avg.storage.output import AtomicFile, AtomicFolder, Output
from swa_avg.storage.partial import JoinedOutput
from swa_avg.storage.remote import is_remote, path_of, remote_matches
from swa_avg.storage.request_pool import RequestPool
from swa_avg.storage.targets import check_replaceable, check_room, check_target
from swa_avg.storage.upload import OutputFile, RemoteFile

__all__ = [
    "ROOM",
    "AtomicFile",
    "AtomicFolder",
    "GivenPath",
    "InputFile",
    "JoinedOutput",
    "Output",
    "OutputFile",
    "RemoteFile",
    "RequestPool",
    "Section",
    "allow_files",
    "announce",
    "check_replaceable",
    "check_room",
    "check_target",
    "home_written_out",
    "is_remote",
    "nearest",
    "path_of",
    "reading_ahead",
    "remote_matches",
]
