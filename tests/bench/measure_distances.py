"""How far checkpoints lie from their mean: of one run, and of two runs mixed up.

    python tests/bench/measure_distances.py

Three small networks (the demo's convolutional one, a perceptron, a transformer), each
trained twice from other seeds on the demo's digits. Printed: the largest distance over
the mean's norm among the last checkpoints of one run, and the smallest among as many
of two runs. `swa_avg.distances.APART` lies between the two columns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import swa_avg
from swa_avg import demo

EPOCHS, SAVED = 16, 8


class Transformer(nn.Module):
    """Reads an image as eight rows of eight pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(8, 32)
        self.places = nn.Parameter(torch.zeros(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.layers(self.rows(images.squeeze(1)) + self.places)
        return self.head(hidden.mean(1))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer]]]
NETWORKS = {
    "convolutional, SGD": (demo.model, lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9)),
    "convolutional, Adam": (demo.model, lambda m: torch.optim.Adam(m.parameters(), 1e-3)),
    "perceptron, SGD": (perceptron, lambda m: torch.optim.SGD(m.parameters(), 0.1, 0.9)),
    "perceptron, Adam": (perceptron, lambda m: torch.optim.Adam(m.parameters(), 1e-3)),
    "transformer, AdamW": (Transformer, lambda m: torch.optim.AdamW(m.parameters(), 2e-3)),
}


def train(name: str, seed: int, folder: Path) -> list[Path]:
    """Train with a constant learning rate; return the last checkpoints."""
    torch.manual_seed(seed)
    build, optimize = NETWORKS[name]
    network = build()
    optimizer = optimize(network)
    saved = []
    for epoch in range(EPOCHS):
        for images, labels in demo.loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
        if epoch >= EPOCHS - SAVED:
            saved.append(folder / f"run{seed}_epoch{epoch}.pt")
            torch.save(network.state_dict(), saved[-1])
    return saved


def distances(checkpoints: list[Path], folder: Path) -> tuple[float, ...]:
    found = swa_avg.average(checkpoints, folder / "out.pt", force=True, distances=True).distances
    assert found is not None
    return found.overall


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'last ' + str(SAVED) + ' checkpoints':24}{'one run':>10}{'two runs mixed':>16}")
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            one, other = train(name, 0, folder), train(name, 1, folder)
            alone = max(*distances(one, folder), *distances(other, folder))
            mixed = min(distances(one[SAVED // 2 :] + other[SAVED // 2 :], folder))
            print(f"{name:24}{alone:10.3f}{mixed:16.3f}")


if __name__ == "__main__":
    main()
