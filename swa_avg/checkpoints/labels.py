"""What a metric is called in a path, and whether it is the one that somebody names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from swa_avg.checkpoints import words


@dataclass(frozen=True)
class Label:
    """The name of a metric, as far as a path shows where it begins.

    Attributes:
        words: Its words and the numbers in it, in lower case, with what may stand before it.
        joints: What stands before each of them.
    """

    words: tuple[str, ...]
    joints: tuple[str, ...]

    def is_called(self, name: str) -> bool:
        """Tell whether a metric is meant: `loss` by `best_loss`, but not by `val_loss`."""
        wanted = tuple(
            token[0].lower() for token in re.findall(r"([^\W\d_]+|[0-9]+(\.\d+)?)", name)
        )
        start = len(self.words) - len(wanted)
        if not wanted or start < 0 or self.words[start:] != wanted:
            return False
        if start == 0 or self.joints[start] not in ("_", ".", "/"):
            return True
        before = self.words[start - 1]
        known = before in words.NOUNS or before in words.ROLES
        return known or (start == 1 and before not in words.QUALIFIERS)
