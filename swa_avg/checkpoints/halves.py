"""The raw weights and their average within one state_dict, detected by names.

A module that averages a model inside it saves both: `online_model.*` and `ema_model.*`, or
`model.*` and `model_ema.*`. A group of tensors is an average if a part of its names marks an
average and every tensor in it has a counterpart of the same shape among the others. This
module does not locate the state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from swa_avg.checkpoints.frameworks import AVERAGE_WORDS, marks_average, without_average

Shapes = Mapping[str, tuple[int, ...]]

# The prefixes of torch's wrappers: DataParallel, DDP and AveragedModel; torch.compile.
WRAPPERS = ("module.", "_orig_mod.")
# The counters that are saved with an average: ema_pytorch, torch's AveragedModel, LitEma.
_COUNTERS = ("initted", "step", "n_averaged", "num_updates", "decay", "updates", "steps")
_MOST_CANDIDATES = 100


@dataclass(frozen=True)
class Chosen:
    """The half that is taken from a state_dict with raw weights and an average.

    Attributes:
        names: The names of the plain model, each with its name in the state_dict.
        cut: The prefix that was removed from the names of the raw weights.
    """

    names: Mapping[str, str]
    cut: str


@dataclass(frozen=True)
class Half:
    """An average within a state_dict.

    Attributes:
        prefix: The prefix of its names.
        raw: The prefix of the names of the raw weights.
        averaged: The name of the averaged tensor for the name of each raw weight.
        own: The names that belong to the averaging itself, such as counters.
    """

    prefix: str
    raw: str
    averaged: Mapping[str, str]
    own: frozenset[str]

    def chosen(self, names: Iterable[str], ema: bool) -> Chosen:
        """Choose the average or the raw weights, under the names of the plain model.

        Tensors without an average (frozen weights, buffers) are always taken as they are.

        Args:
            names: All names of the state_dict, in order.
            ema: Take the average instead of the raw weights.
        """
        left = [name for name in names if name not in self.own and not self._is_average(name)]
        # Counters outside both halves belong to a wrapper and are not part of the model.
        wrapper = bool(self.own) and self.prefix.count(".") == 1
        cut = self.raw if wrapper and all(name.startswith(self.raw) for name in left) else ""
        taken = {name[len(cut) :]: self.averaged.get(name, name) if ema else name for name in left}
        return Chosen(taken, cut)

    def _is_average(self, name: str) -> bool:
        return name.startswith(self.prefix)


def averaged_halves(shapes: Shapes) -> list[Half]:
    """Find the averages within a state_dict.

    Args:
        shapes: The shape of each tensor in it.
    """
    found: list[Half] = []
    for prefix in _prefixes(shapes):
        if not any(prefix.startswith(half.prefix) for half in found):
            half = _half(shapes, prefix)
            found += [half] if half else []
    return found


def lone_average(shapes: Shapes) -> Chosen | None:
    """Return the average of a state_dict that has no raw weights, or None.

    Apart from the average, the state_dict may hold only counters.
    """
    for prefix in _prefixes(shapes):
        if all(name in _COUNTERS for name in shapes if not name.startswith(prefix)):
            inside = {name[len(prefix) :]: name for name in shapes if name.startswith(prefix)}
            weights = _unwrapped(inside, shapes)
            return Chosen({n: of for n, of in weights.items() if n not in _COUNTERS}, prefix)
    return None


def _prefixes(shapes: Shapes) -> list[str]:
    """Return the prefixes of names up to a part that marks an average, the shortest first."""
    found: dict[str, None] = {}
    judged: dict[str, bool] = {}
    there = "\n".join(shapes).lower()
    words = [word for word in AVERAGE_WORDS if word in there]
    for name in shapes if words else ():
        parts = name.split(".")
        for count, part in enumerate(parts[:-1], 1):
            if part not in judged:
                judged[part] = marks_average(part)
            if judged[part]:
                found[".".join(parts[:count]) + "."] = None
    return sorted(found, key=len)


def _half(shapes: Shapes, prefix: str) -> Half | None:
    """Return the average with a given prefix, or None if it is not an average."""
    inside = _unwrapped({n[len(prefix) :]: n for n in shapes if n.startswith(prefix)}, shapes)
    outside = [name for name in shapes if not name.startswith(prefix)]
    pairs = {raw: found for raw in _raw_prefixes(shapes, inside, outside)
             if (found := _pairs(shapes, inside, outside, raw))}  # fmt: skip
    around = prefix[: prefix[:-1].rfind(".") + 1]
    # A wrapper around the average may hold a second copy of the raw weights.
    inner = [raw for raw in pairs if around and raw.startswith(around)]
    raw = _counterpart([raw for raw in pairs if raw not in inner] or inner, prefix)
    if raw is None:
        return None
    copies = tuple(other for other in inner if other != raw)
    counters = {around + counter for counter in _COUNTERS}
    own = {name for name in outside if name.startswith(copies) or name in counters}
    return Half(prefix, raw, pairs[raw], frozenset(own))


def _counterpart(candidates: list[str], prefix: str) -> str | None:
    """Return the prefix of the raw weights that the average was computed from."""
    if len(candidates) > 1:
        what = without_average(prefix[:-1].rpartition(".")[2])
        candidates = [raw for raw in candidates if what and raw[:-1].endswith(what)]
    return candidates[0] if len(candidates) == 1 else None


def _is_counter(shape: tuple[int, ...]) -> bool:
    return math.prod(shape) <= 1


def _unwrapped(inside: dict[str, str], shapes: Shapes) -> dict[str, str]:
    """Remove the prefixes of torch's wrappers from the names of an average, except counters."""
    while True:
        weights = [rest for rest, name in inside.items() if not _is_counter(shapes[name])]
        for wrapper in WRAPPERS:
            if weights and all(rest.startswith(wrapper) for rest in weights):
                inside = {rest.removeprefix(wrapper): name for rest, name in inside.items()}
                break
        else:
            return inside


def _raw_prefixes(shapes: Shapes, inside: Mapping[str, str], outside: Iterable[str]) -> list[str]:
    """Return the possible prefixes of the raw weights: names that end like an averaged name."""
    weights = [rest for rest, name in inside.items() if not _is_counter(shapes[name])]
    if not weights:
        return []
    longest = max(weights, key=len)
    shape = shapes[inside[longest]]
    alike = [name for name in outside if shapes[name] == shape]
    found = {
        name[: len(name) - len(longest)]: None
        for name in alike
        if name == longest or name.endswith(f".{longest}")
    }
    if not found:
        for name in alike:
            starts = (0, *(place + 1 for place, char in enumerate(name) if char == "."))
            found.update(
                (name[:at], None) for at in starts if name[at:].replace(".", "") == longest
            )
    return list(found)[:_MOST_CANDIDATES]


def _pairs(
    shapes: Shapes, inside: Mapping[str, str], outside: Iterable[str], raw: str
) -> dict[str, str]:
    """Map the name of each raw weight to its average; empty if the two do not match.

    LitEma of CompVis removes the dots from names (ldm/modules/ema.py).
    """
    under = [name for name in outside if name.startswith(raw)]
    exact = {name[len(raw) :]: name for name in under}
    dotless = {} if inside.keys() <= exact.keys() else _dotless(exact)
    found: dict[str, str] = {}
    for rest, name in inside.items():
        other = exact.get(rest) or dotless.get(rest)
        if other and shapes[other] == shapes[name]:
            found[other] = name
        elif not _is_counter(shapes[name]):
            return {}
    return found


def dotted(entries: Mapping[str, object], raw: Iterable[str]) -> Mapping[str, object]:
    """Return an average whose names have no dots (LitEma) under the names of the raw weights.

    Args:
        entries: The entries of the average.
        raw: The names of the raw weights.
    """
    names = {name.removeprefix("module.") for name in raw}
    original = _dotless({name: name for name in names})
    weights = [name for name in entries if name not in _COUNTERS]
    if not weights or names.intersection(weights) or not all(map(original.get, weights)):
        return entries
    return {original[name]: entries[name] for name in weights}


def _dotless(names: Mapping[str, str]) -> dict[str, str]:
    """Map names without dots to the original names; names that collide are left out."""
    found: dict[str, str] = {}
    for rest, name in names.items():
        short = rest.replace(".", "")
        found[short] = "" if short in found else name
    return found
