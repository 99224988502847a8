"""The ranks that torchrun started, as the environment of this process shows them."""

from __future__ import annotations

import os


def are_several() -> bool:
    """Return whether this process is one of several ranks."""
    world = os.environ.get("WORLD_SIZE", "")
    return world.isdecimal() and int(world) > 1


def is_first() -> bool:
    """Return whether this process is the only one, or rank 0 of several."""
    rank = os.environ.get("RANK", "")
    return not (are_several() and rank.isdecimal() and int(rank) > 0)
