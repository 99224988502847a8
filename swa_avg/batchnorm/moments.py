"""Moments per channel in float64, and how they are merged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Moments per channel, in float64.

    Attributes:
        count: The number of values, of shape (C,).
        mean: Their mean, of shape (C,).
        m2: The sum of their squared deviations from the mean, of shape (C,).
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def none(cls, channels: int, device: torch.device) -> Moments:
        """Return empty moments."""
        return cls(*torch.zeros(3, channels, dtype=torch.float64, device=device).unbind())

    def part(self, span: slice) -> Moments:
        """Return a view of some channels."""
        return Moments(self.count[span], self.mean[span], self.m2[span])

    def add(self, other: Moments) -> None:
        """Merge the moments of other values into these, in place.

        Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances" (1979).
        """
        share = other.count / (self.count + other.count).clamp_(min=1)
        delta = other.mean - self.mean
        self.mean.add_(delta * share)
        self.m2.add_(other.m2).add_(delta.square_().mul_(share).mul_(self.count))
        self.count.add_(other.count)


def vector(values: Iterable[int]) -> Tensor:
    """Return numbers as a float64 vector on the CPU."""
    return torch.tensor([*values], dtype=torch.float64, device="cpu")


def two_pass(x: Tensor, values: int) -> tuple[Tensor, Tensor]:
    """Return the mean and unbiased variance per channel, of shape (C,), in float64.

    First the mean, then the sum of squared deviations from it, divided by `values` - 1. On a
    CPU this is ten times as fast as `torch.var_mean`, which divides at every value.

    Args:
        x: The input of a layer, of shape (N, C, …).
        values: The number of values per channel, at least 2.
    """
    wide = x.to(torch.float64, copy=True)
    others = [dim for dim in range(x.dim()) if dim != 1]
    mean = wide.sum(others, keepdim=True) / values
    return mean.flatten(), wide.sub_(mean).square_().sum(others) / (values - 1)
