"""The distances of the checkpoints from their mean, and the angles between their steps.

Everything is computed from inner products, which the kernel accumulates while it
averages: with d_i = w_i - w_0 and the mean w = sum p_i w_i, the squared distance of w_i
from w is (e_i - p)' G (e_i - p), where G holds the products d_i . d_j.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# Relative to the norm of the mean. Independent runs of one network are farther from their
# mean than this, and checkpoints of one run are nearer (tests/bench/measure_distances.py).
APART = 0.3
# A checkpoint is an outlier if its distance is more than this many times the median.
OUTLIER = 3.0


@dataclass(frozen=True)
class Distances:
    """The positions of checkpoints relative to their mean.

    Attributes:
        overall: For each checkpoint its distance from the mean, divided by the norm of the
            mean; None if that is undefined, for example because the mean is zero.
        cosines: The cosines of the angles between successive steps, where a step leads from
            one checkpoint to the next; None if one of the two steps is zero. There are two
            fewer cosines than checkpoints.
        modules: The distances for the tensors of each top-level module.
        steps: The lengths of the steps, divided by the norm of the mean; one fewer than there
            are checkpoints.
    """

    overall: tuple[float | None, ...]
    cosines: tuple[float | None, ...]
    modules: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    steps: tuple[float | None, ...] = ()

    @property
    def outliers(self) -> dict[int, float]:
        """The checkpoints far from the mean, by number, with their distance in medians."""
        known = [distance for distance in self.overall if distance is not None]
        if not 3 < len(known) == len(self.overall):
            return {}
        import statistics

        median = statistics.median(known)
        if not median:
            return {}
        return {n: one / median for n, one in enumerate(known) if one > OUTLIER * median}

    def notes(self, paths: Sequence[str]) -> Iterator[str]:
        """Yield notes about an outlier, or about checkpoints of more than one run."""
        known = [distance for distance in self.overall if distance is not None]
        if not 2 <= len(known) == len(paths):
            return
        if max(known) > APART:
            far = max(range(len(paths)), key=lambda number: known[number])
            yield (
                f"{paths[far]}: its distance from the mean is {known[far]:.2g} of the mean's "
                "norm; the checkpoints may not be from one run"
            )
            return
        for number, times in self.outliers.items():
            yield (
                f"{paths[number]}: its distance from the mean is {times:.1f} times the median "
                "distance of the checkpoints"
            )


def groups(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Group tensors by top-level module.

    A prefix that all names share, such as `model.`, does not count as a module.

    Args:
        names: The names of tensors.

    Returns:
        The modules, and for each name the number of its module.
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
        counts: The weight of each checkpoint in the mean.
    """
    total = sum(grams.values())
    if not grams or isinstance(total, int):
        return Distances((), ())
    square = sum(squares.values())
    return Distances(
        _from_mean(total, square, counts),
        tuple(_cosines(total)),
        {module: _from_mean(gram, squares[module], counts) for module, gram in grams.items()},
        tuple(_over(length, square) for length in _products(total).diagonal().tolist()),
    )


def _from_mean(gram: Array, square: float, counts: Sequence[int]) -> tuple[float | None, ...]:
    import numpy as np

    weights = np.array([count / sum(counts) for count in counts])
    differences = np.eye(len(counts)) - weights
    squared = ((differences @ gram) * differences).sum(axis=1)
    return tuple(_over(length, square) for length in squared.tolist())


def _over(squared: float, square: float) -> float | None:
    """Return the ratio of two lengths, given their squares; None if it is undefined."""
    if squared <= 0:  # may be slightly negative because of rounding
        return 0.0
    if not square or not math.isfinite(squared) or not math.isfinite(square):
        return None
    return math.sqrt(squared) / math.sqrt(square)


def _products(gram: Array) -> Array:
    """Return the inner products of the steps between successive checkpoints."""
    steps = gram[1:] - gram[:-1]
    products: Array = steps[:, 1:] - steps[:, :-1]
    return products


def _cosines(gram: Array) -> Iterator[float | None]:
    """Yield the cosines between successive steps."""
    products = _products(gram)
    for number in range(len(products) - 1):
        lengths = float(products[number, number] * products[number + 1, number + 1])
        between = float(products[number, number + 1])
        cosine = between / math.sqrt(lengths) if 0 < lengths < math.inf else math.nan
        yield cosine if math.isfinite(cosine) else None
