"""The import of torch, for the commands that run a model or several ranks."""

from __future__ import annotations

import gc


def import_torch() -> None:
    """Import torch, and exempt what there is by then from garbage collection.

    The import creates many objects, and all of them stay. Collections during and after it
    would look through them, which takes a twelfth of the time of the import.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401

        gc.freeze()
    finally:
        if enabled:
            gc.enable()
