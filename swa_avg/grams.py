"""How far checkpoints are from each other: inner products of their differences, by groups.

Summed up chunk by chunk while the mean is computed; no tensor is read twice.
"""

from __future__ import annotations

import torch


class Gram:
    """The inner products of one group of tensors, so far.

    Attributes:
        products: float64, N by N: of x_i - x_0 and x_j - x_0, i and j the inputs.
        square: Of the mean with itself.
    """

    def __init__(self, count: int) -> None:
        self.products = torch.zeros(count, count, dtype=torch.float64)
        self.square = 0.0

    def add_chunk(self, rows: torch.Tensor, mean: torch.Tensor, *, backwards: bool = False) -> None:
        """Add what one chunk has to them.

        What is not finite is the same in all inputs, and counts as no difference.

        Args:
            rows: float64, N by the length of the chunk: the inputs. It is overwritten.
            mean: Their mean.
            backwards: Whether the last input comes first.
        """
        wide = mean.to(torch.float64)
        first = rows[-1 if backwards else 0].clone()
        rows.sub_(first)
        products = rows @ rows.t()
        if not torch.isfinite(products.sum()):
            rows.masked_fill_(~torch.isfinite(first), 0)
            products = rows @ rows.t()
        self.products += products.flip(0, 1) if backwards else products
        square = torch.dot(wide, wide)
        if not torch.isfinite(square):
            wide = torch.where(torch.isfinite(wide), wide, 0)
            square = torch.dot(wide, wide)
        self.square += float(square)

    def add(self, other: Gram) -> None:
        """Add another part of the same group."""
        self.products += other.products
        self.square += other.square
