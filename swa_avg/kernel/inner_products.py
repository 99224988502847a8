"""How far checkpoints are from each other: inner products of their differences, by groups.

Summed up chunk by chunk while the mean is computed; no tensor is read twice.
"""

from __future__ import annotations

import torch

from swa_avg.kernel.exact import Rows

_AT_ONCE = 128 * 1024  # numbers of all inputs, in float64


class Gram:
    """The inner products of one group of tensors, so far.

    Attributes:
        products: float64, N by N: of x_i - x_0 and x_j - x_0, i and j the inputs.
        square: Of the mean with itself.
    """

    def __init__(self, count: int) -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.square = 0.0

    def add_chunk(self, rows: Rows, mean: torch.Tensor) -> None:
        """Add what one chunk has to them.

        What is not finite is the same in all inputs, and counts as no difference.

        Args:
            rows: The inputs, N rows of the length of the chunk.
            mean: Their mean.
        """
        step = max(1, _AT_ONCE // len(rows))
        for start in range(0, mean.numel(), step):
            part = slice(start, start + step)
            self._add(
                torch.stack([row[part].to(torch.float64) for row in rows]),
                mean[part].to(torch.float64),
            )

    def _add(self, rows: torch.Tensor, mean: torch.Tensor) -> None:
        first = rows[0].clone()
        rows.sub_(first)
        products = rows @ rows.t()
        if not torch.isfinite(products.sum()):
            rows.masked_fill_(~torch.isfinite(first), 0)
            products = rows @ rows.t()
        self.products += products
        square = torch.dot(mean, mean)
        if not torch.isfinite(square):
            mean = torch.where(torch.isfinite(mean), mean, 0)
            square = torch.dot(mean, mean)
        self.square += float(square)

    def add(self, other: Gram) -> None:
        """Add another part of the same group."""
        self.products += other.products
        self.square += other.square
