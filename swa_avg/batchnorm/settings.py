"""How BatchNorm statistics are recomputed, and the options of the command line for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from swa_avg.batchnorm.statistics import Amp, Estimator


@dataclass(frozen=True)
class Settings:
    """How the statistics are recomputed: parameters of `recompute_batchnorm`.

    Attributes:
        device: auto, cpu, cuda, cuda:i or mps.
        estimator: population or torch.
        amp: off, bf16 or fp16.
        max_batches: The maximum number of batches; None uses all.
    """

    device: str
    estimator: Estimator
    amp: Amp
    max_batches: int | None


@dataclass(frozen=True)
class Recompute:
    """The options of the command line for a BatchNorm recompute.

    Attributes:
        data: `MOD:ATTR` of the batches.
        model: `MOD:ATTR` of the model; by default `model` in the module of the data.
        forward: `MOD:ATTR` of the forward function; by default `forward` in the module of
            the data, if it exists.
        device: auto, cpu, cuda, cuda:i or mps.
        estimator: population or torch.
        amp: off, bf16 or fp16.
        batches: The maximum number of batches; None uses all.
        folder: The folder to import modules from; by default the current folder.
    """

    data: str
    model: str | None = None
    forward: str | None = None
    device: str = "auto"
    estimator: Estimator = "population"
    amp: Amp = "off"
    batches: int | None = None
    folder: Path = field(default_factory=Path.cwd)

    @property
    def settings(self) -> Settings:
        """How the statistics are recomputed."""
        return Settings(self.device, self.estimator, self.amp, self.batches)
