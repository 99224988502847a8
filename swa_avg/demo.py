"""The built-in run: `python -m swa_avg.demo [FOLDER]` trains, averages and compares.

It trains a small BatchNorm network on real data with the two phases of SWA as
PyTorch documents them, saves each epoch of the second phase as a training
script would, then runs in FOLDER the two commands that a user would type and
prints the test accuracies beside those of torch's in-training `AveragedModel`.
It deletes only its own files in FOLDER, and refuses a folder that holds others.
The averaging itself is not here: the commands do it.

This is also the worked example of a data module. `swa-avg --recompute-bn
--data swa_avg.demo:loader` needs only two functions: `loader` returns the batches
of the training set, and `model` returns the untrained network. `--sweep
swa_avg.demo:evaluate` calls `evaluate` to score each average.

The data are the test set of E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository (CC BY 4.0,
https://doi.org/10.24432/C50P49): 1,797 images of 8x8 pixels in 0..16.
`digits.bin.gz` holds one byte per pixel, image by image and row by row, then one
byte per label. The file was made from the copy in scikit-learn:

    digits = sklearn.datasets.load_digits()
    arrays = digits.images.astype("uint8"), digits.target.astype("uint8")
    raw = b"".join(array.tobytes() for array in arrays)
    Path("digits.bin.gz").write_bytes(gzip.compress(raw, 9, mtime=0))
"""

from __future__ import annotations

import gzip
import shlex
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import click

# torch warns on import if it cannot use numpy, which does not matter here.
warnings.filterwarnings("ignore", "Failed to initialize NumPy")

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from swa_avg.errors import OutputError, SwaAvgError, listed

IMAGES, SIDE, BRIGHTEST = 1797, 8, 16
TRAINING_IMAGES = 1000
BATCH = 25

EPOCHS, SWA_START = 20, 8  # the saved epochs cross from 9 to 10, where names sort wrongly
RATE, SWA_RATE = 0.1, 0.1
# The first seed, not the best. With seeds 0 to 7 the average with recomputed
# BatchNorm was 3 to 20 points above the one without, and between 0.3 points
# below and 2.9 above the last epoch.
SEED = 0

MARKER = ".swa-avg-demo"
BESIDE = ("best.pt", "sweep.svg")  # the README's sweep writes these here: left alone
OUTPUT = "swa.pt"
CHECKPOINTS = [f"ckpts/epoch_{epoch}.pt" for epoch in range(SWA_START, EPOCHS)]

AVERAGE = f"swa-avg ckpts/epoch_*.pt -o {OUTPUT}"
RECOMPUTE = "swa-avg --recompute-bn --data swa_avg.demo:loader"


# The data module: the functions that `--data`, `--model` and `--sweep` use.


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Return the shuffled batches of the training set, the same ones each time."""
    images, labels = digits()
    dataset = TensorDataset(images[:TRAINING_IMAGES], labels[:TRAINING_IMAGES])
    order = torch.Generator().manual_seed(SEED)
    return DataLoader(dataset, BATCH, shuffle=True, generator=order)


def model() -> nn.Module:
    """Return the untrained network."""
    return nn.Sequential(
        *_block(1, 16),
        *_block(16, 16),
        nn.MaxPool2d(2),
        *_block(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def evaluate(network: nn.Module) -> dict[str, float]:
    """Return the score of `network`; the name `accuracy` implies that larger is better."""
    return {"accuracy": accuracy(network)}


def digits() -> tuple[Tensor, Tensor]:
    """Return all images, float32 in 0..1 as [N, 1, 8, 8], and their labels."""
    packed = files("swa_avg").joinpath("digits.bin.gz").read_bytes()
    # A bytearray, because torch warns about a read-only buffer.
    raw = torch.frombuffer(bytearray(gzip.decompress(packed)), dtype=torch.uint8)
    pixels, labels = raw[:-IMAGES], raw[-IMAGES:]
    return pixels.view(IMAGES, 1, SIDE, SIDE) / BRIGHTEST, labels.long()


# The training run: an ordinary SWA training script, which does not use swa-avg.


@dataclass(frozen=True)
class Trained:
    """The results of a training run, apart from its checkpoints.

    Attributes:
        last: The network after the last epoch.
        average: Torch's own average of the saved epochs, computed during training.
    """

    last: nn.Module
    average: AveragedModel


def train(folder: Path) -> Trained:
    """Train in two phases and save each epoch of the second in `folder`.

    Args:
        folder: Where `CHECKPOINTS` are written; their folder exists.
    """
    torch.manual_seed(SEED)
    network, batches = model(), loader()
    optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    annealing = CosineAnnealingLR(optimizer, T_max=SWA_START)
    for _ in range(SWA_START):
        _train_epoch(network, optimizer, batches)
        annealing.step()
    average = AveragedModel(network)
    constant = SWALR(optimizer, swa_lr=SWA_RATE, anneal_epochs=2)
    for epoch, name in enumerate(CHECKPOINTS, start=SWA_START):
        _train_epoch(network, optimizer, batches)
        constant.step()
        average.update_parameters(network)
        checkpoint = {
            "epoch": epoch,
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(checkpoint, folder / name)
    return Trained(network, average)


def _train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader[tuple[Tensor, ...]],
) -> None:
    network.train()
    for images, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


# The comparison.


def accuracy(network: nn.Module) -> float:
    """Return the percentage of the test set that `network` labels correctly."""
    images, labels = digits()
    network.eval()
    with torch.inference_mode():
        found: Tensor = network(images[TRAINING_IMAGES:]).argmax(dim=1)
    right = int((found == labels[TRAINING_IMAGES:]).sum())
    return 100 * right / len(found)


def load(path: Path) -> nn.Module:
    """Return the network with the weights of `path`, a plain state_dict."""
    network = model()
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return network


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Return the largest absolute difference between the weights of two networks."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def run_command(line: str, folder: Path) -> None:
    """Print a `swa-avg` command line and run it in `folder`.

    The pattern in it needs no shell: swa-avg expands patterns that a shell did not.

    Raises:
        SwaAvgError: The command failed; it has printed the reason on stderr.
    """
    click.echo(f"\n$ {line}")
    arguments = shlex.split(line)[1:]
    ended = subprocess.run([sys.executable, "-m", "swa_avg", *arguments], cwd=folder, check=False)
    if ended.returncode:
        raise SwaAvgError(f"`{line}` ended with exit code {ended.returncode}")


def prepare(folder: Path) -> None:
    """Create `folder`, or remove the files that an earlier demo wrote there.

    Raises:
        OutputError: The folder holds other files; nothing has been deleted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without the marker, files with these names may belong to a user's real run.
    is_ours = (folder / MARKER).is_file()
    found = folder.rglob("*") if is_ours else folder.iterdir()
    names = {path.relative_to(folder).as_posix() for path in found}
    own = {MARKER, "ckpts", OUTPUT, *CHECKPOINTS, *BESIDE} if is_ours else set()
    if foreign := sorted(names - own):
        raise OutputError(
            f"holds files that this demo did not write ({listed(foreign)})",
            file=folder,
            remedy="Name a new folder",
        )
    for name in [OUTPUT, *CHECKPOINTS]:
        (folder / name).unlink(missing_ok=True)
    (folder / MARKER).write_text("Made by python -m swa_avg.demo, which may empty it.\n")
    (folder / "ckpts").mkdir(exist_ok=True)


def demonstrate(folder: Path) -> None:
    """Train in `folder`, run the commands there and print the comparison."""
    # More threads do not speed up such a small network, and would change the figures.
    torch.set_num_threads(1)
    prepare(folder)
    click.echo(
        f"Training a BatchNorm network on {TRAINING_IMAGES:,} handwritten digits for "
        f"{EPOCHS} epochs,\nfrom epoch {SWA_START} on at the constant learning rate of SWA ...",
        nl=False,
    )
    started = time.perf_counter()
    trained = train(folder)
    click.echo(f" {time.perf_counter() - started:.0f} s")
    click.echo(f"\n$ cd {shlex.quote(str(folder))}")
    run_command(AVERAGE, folder)
    stale = load(folder / OUTPUT)
    run_command(RECOMPUTE, folder)
    recomputed = load(folder / OUTPUT)
    print_table(trained, stale, recomputed)


def print_table(trained: Trained, stale: nn.Module, recomputed: nn.Module) -> None:
    """Print the accuracies of our average and of torch's, before and after BatchNorm."""
    last = EPOCHS - 1
    from_torch = trained.average
    rows = [
        (f"epoch {last}, the last", accuracy(trained.last)),
        (f"swa-avg, BatchNorm from epoch {last}", accuracy(stale)),
        ("swa-avg, BatchNorm recomputed", accuracy(recomputed)),
        (f"AveragedModel, BatchNorm from epoch {last}", accuracy(from_torch)),
    ]
    update_bn(loader(), from_torch)
    rows.append(("AveragedModel, BatchNorm from update_bn", accuracy(from_torch)))
    click.echo(f"\n{'':49}test accuracy")
    for label, percent in rows:
        click.echo(f"{label:49}{percent:11.2f} %")
    difference = largest_difference(recomputed, from_torch.module)
    click.echo(f"{'largest difference between their weights':49}{difference:13.1e}")


@click.command()
@click.argument("folder", default="swa-demo", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Train a small network in FOLDER, average its epochs and compare with torch."""
    try:
        demonstrate(folder)
    except SwaAvgError as error:
        click.echo(f"error: {error.of_command()}", err=True)
        raise SystemExit(1) from None
    except OSError as error:
        click.echo(f"error: {folder}: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
