"""How far the checkpoints of an average lie from it, and from each other.

All of it follows from inner products that the kernel adds up in its one reading:
with d_i = w_i - w_0 and the mean w = sum p_i w_i, the squared distance of w_i from w
is (e_i - p)' G (e_i - p), where G holds the products d_i . d_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Independent runs of one network lie farther than this from their mean, and checkpoints
# of one run nearer; how that was measured stands in the README.
APART = 0.3
# A checkpoint so many times as far from the mean as the others are in the median.
OUTLIER = 3.0


@dataclass(frozen=True)
class Distances:
    """Where checkpoints lie, relative to their mean.

    Attributes:
        overall: For each checkpoint its distance from the mean, over the mean's norm; None
            where that is no number, as where the mean is zero.
        cosines: The cosine of the angle between each step from a checkpoint to the next
            and the step after it; None where one of the two has no length. Two fewer
            than checkpoints.
        modules: The distances in each top-level module alone.
    """

    overall: tuple[float | None, ...]
    cosines: tuple[float | None, ...]
    modules: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)

    def notes(self, paths: Sequence[str]) -> Iterator[str]:
        """Yield what looks wrong: an outlier, or checkpoints of more than one run."""
        known = [distance for distance in self.overall if distance is not None]
        if not 2 <= len(known) == len(paths):
            return
        if max(known) > APART:
            far = max(range(len(paths)), key=lambda number: known[number])
            yield (
                f"{paths[far]}: lies {known[far]:.2g} of the mean's norm away from it; "
                "are the checkpoints of one run?"
            )
            return
        import statistics

        median = statistics.median(known)
        for path, distance in zip(paths, known, strict=True):
            if len(paths) > 3 and distance > OUTLIER * median > 0:
                yield (
                    f"{path}: lies {distance / median:.1f} times as far from the mean as the "
                    "checkpoints do in the median"
                )


def groups(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Sort tensors by the top-level module that they are in.

    What all names begin with (`model.`) is no module of its own.

    Args:
        names: The names of tensors.

    Returns:
        The modules, and for each name the number of its own.
    """
    parts = [name.split(".")[:-1] or [name] for name in names]
    depth = 0
    while parts and len({tuple(part[: depth + 1]) for part in parts}) == 1:
        if all(len(part) == depth + 1 for part in parts):
            break
        depth += 1
    modules = [".".join(part[: depth + 1]) for part in parts]
    numbers = {module: number for number, module in enumerate(dict.fromkeys(modules))}
    return list(numbers), [numbers[module] for module in modules]


def distances(
    grams: Mapping[str, Array], squares: Mapping[str, float], counts: Sequence[int]
) -> Distances:
    """Compute distances from inner products.

    Args:
        grams: For each module the N x N float64 products of w_i - w_0.
        squares: For each module the squared norm of the mean.
        counts: What each checkpoint weighs in the mean.
    """
    total = sum(grams.values())
    if not grams or isinstance(total, int):
        return Distances((), ())
    return Distances(
        _from_mean(total, sum(squares.values()), counts),
        tuple(_cosines(total)),
        {module: _from_mean(gram, squares[module], counts) for module, gram in grams.items()},
    )


def _from_mean(gram: Array, square: float, counts: Sequence[int]) -> tuple[float | None, ...]:
    import numpy as np

    weights = np.array([count / sum(counts) for count in counts])
    differences = np.eye(len(counts)) - weights
    squared = ((differences @ gram) * differences).sum(axis=1)
    return tuple(_over(length, square) for length in squared.tolist())


def _over(squared: float, square: float) -> float | None:
    """Return the ratio of two lengths, from their squares; None where that is no number."""
    if squared <= 0:  # by rounding
        return 0.0
    if not square or not math.isfinite(squared) or not math.isfinite(square):
        return None
    return math.sqrt(squared) / math.sqrt(square)


def _cosines(gram: Array) -> Iterator[float | None]:
    """Yield the cosines between successive steps."""
    steps = gram[1:] - gram[:-1]
    products = steps[:, 1:] - steps[:, :-1]
    for number in range(len(products) - 1):
        lengths = float(products[number, number] * products[number + 1, number + 1])
        between = float(products[number, number + 1])
        cosine = between / math.sqrt(lengths) if 0 < lengths < math.inf else math.nan
        yield cosine if math.isfinite(cosine) else None
