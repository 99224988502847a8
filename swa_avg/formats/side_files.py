"""The small files that a Hugging Face model is not complete without.

Configuration, tokenizer, templates, the model's own code: `from_pretrained` looks for
them beside the weights. A link is followed only within the folder, or as the hub's
cache is made of them; a link elsewhere would bring another file of the user along.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from swa_avg.errors import listed
from swa_avg.files import InputFile
from swa_avg.formats.checkpoint import PROVENANCE
from swa_avg.formats.weights import is_weights_name
from swa_avg.remote import is_remote

_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken")
_MOST_BYTES = 100_000_000
# What belongs to the run, not to the model.
_OF_THE_RUN = ("trainer_state.json", PROVENANCE)
# Where transformers puts further chat templates.
_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class SideFiles:
    """Small files, and which ones were left out.

    Attributes:
        contents: The bytes of each, by its path in the folder.
        notes: What was left out and why.
    """

    contents: dict[str, bytes]
    notes: tuple[str, ...]


def side_files(folder: Path, parts: Iterable[str]) -> SideFiles:
    """Read the small files of a folder.

    Args:
        folder: The folder.
        parts: The paths of those of its sub-folders that belong to the model; `.` is itself.
    """
    contents: dict[str, bytes] = {}
    leaving: list[str] = []
    large: list[str] = []
    for name, path in _wanted(folder, parts):
        if leaves(path, folder):
            leaving.append(name)
            continue
        file = InputFile(path)
        try:
            if file.size <= _MOST_BYTES:
                contents[name] = file.read(0, file.size)
            else:
                large.append(name)
        finally:
            file.close()
    notes = [links_note(folder, leaving)] if leaving else []
    if large:
        notes.append(f"{folder}: {listed(large)}: larger than 100 MB; not copied")
    return SideFiles(contents, tuple(notes))


def _wanted(folder: Path, parts: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Yield the small files by their kind, whatever they are or lead to."""
    for part in dict.fromkeys(parts):
        for inner in (part, f"{part}/{_TEMPLATES}"):
            home = folder / inner if inner != "." else folder
            for path in sorted(home.iterdir()) if home.is_dir() else ():
                passed = path.name in _OF_THE_RUN or is_weights_name(path.name)
                if not passed and path.suffix in _SUFFIXES and path.is_file():
                    yield "/".join([*inner.split("/"), path.name]).removeprefix("./"), path


def leaves(path: Path, folder: Path) -> bool:
    """Tell whether a path in a folder leads, by a link, to a file outside of it.

    What lies in the `blobs` of the hub's cache is not outside for a folder of its `snapshots`.
    """
    if is_remote(path):
        return False
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if home in real.parents:
        return False
    caches = [outer.parent for outer in (home, *home.parents) if outer.name == "snapshots"]
    return not any(real.parent == cache / "blobs" for cache in caches)


def links_note(folder: Path, names: list[str]) -> str:
    """Return what the user should know about links that were not followed."""
    what = "links that lead" if len(names) > 1 else "a link that leads"
    return f"{folder}: {listed(names)}: {what} out of the folder; not copied"
