"""Small JSON files beside weights: indices, configurations, the state of a trainer."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from swa_avg.errors import FormatError
from swa_avg.files import InputFile
from swa_avg.formats.safetensors import unique

_MOST_BYTES = 100_000_000
_TRAINER_STATE = "trainer_state.json"


def read_json(path: Path) -> Any:
    """Read a JSON file of reasonable size in which no name occurs twice.

    Raises:
        FormatError: It is no such file.
        FileError: It cannot be opened.
    """
    file = InputFile(path)
    try:
        if file.size > _MOST_BYTES:
            raise ValueError(f"{file.size} bytes long")
        return json.loads(file.read(0, file.size).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"is no sound JSON ({error})", file=path, remedy="The file is damaged"
        ) from error
    finally:
        file.close()


def trainer_state(folder: Path) -> object:
    """Return what transformers' Trainer records beside the weights, or None."""
    path = folder / _TRAINER_STATE
    return read_json(path) if path.exists() else None


def is_inside(name: str) -> bool:
    """Tell whether a relative path leads to something in its own folder.

    A symbolic link there may lead elsewhere: the hub's cache is made of them.
    """
    parts = PurePosixPath(name).parts
    harmful = {"/", "\\", "..", "\0"}
    return bool(parts) and not any(part in harmful or set(part) & {"\\", "\0"} for part in parts)
