"""Flips one bit at a time in real checkpoints, anywhere in them, and averages.

    python tests/fuzz/bit_flips.py [FLIPS] [SEED]

Each outcome must be a refusal or the right answer, to the bit. Prints how many were
what; a wrong answer, or an error that is none of ours, ends with exit code 1.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import swa_avg
from swa_avg.errors import SwaAvgError

_LONG_AGO = 10**9  # when a file was written; of one of this moment the reader waits for the next


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(8, 5)
    )


def _plain(path: Path) -> None:
    torch.save(network().state_dict(), path)


def _wrapped(path: Path) -> None:
    optimizer = torch.optim.Adam(network().parameters())
    state = {"epoch": 3, "state_dict": network().state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path)


def _half(path: Path) -> None:
    torch.save(network().half().state_dict(), path, pickle_protocol=4)


def _rezipped(path: Path) -> None:
    """An archive that was packed by other means than torch's."""
    import zipfile

    _plain(path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


KINDS: tuple[Callable[[Path], None], ...] = (_plain, _wrapped, _half, _rezipped)


def outcome(place: Path, data: bytes, right: dict[str, Tensor]) -> str:
    """Average a damaged file; return what came of it."""
    path, output = place / "in.pt", place / "out.pt"
    path.write_bytes(data)
    os.utime(path, (_LONG_AGO, _LONG_AGO))
    try:
        swa_avg.average([path], output, force=True, threads=1)
    except SwaAvgError as error:
        # Names that were damaged may be all that is wrong; then the others are missing.
        return "refused" if str(path) in str(error) else f"wrong: {error}"
    found = torch.load(output, weights_only=True)
    same = list(found) == list(right) and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in right.items()
    )
    return "right" if same else "wrong"


def flips(count: int, seed: int = 0) -> Counter[str]:
    """Flip so many bits, spread over files of each kind; return how many outcomes were what."""
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            kind = KINDS[number % len(KINDS)]
            whole = Path(folder, f"{kind.__name__}.pt")
            if number < len(KINDS):
                kind(whole)
            data = bytearray(whole.read_bytes())
            bit = draw.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            right = network().half().state_dict() if kind is _half else network().state_dict()
            found[_in_its_place(Path(folder), number, bytes(data), dict(right))] += 1
    return found


def _in_its_place(folder: Path, number: int, data: bytes, right: dict[str, Tensor]) -> str:
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{number}-") as place:
        return outcome(Path(place), data, right)


def main() -> None:
    given = [int(word) for word in sys.argv[1:]]
    count, seed = (*given, *(2000, 0)[len(given) :])
    found = flips(count, seed)
    print(f"{count} flips: {found['refused']} refused, {found['right']} right")
    for what in found.keys() - {"refused", "right"}:
        print(f"{found[what]} {what}")
    sys.exit(len(found.keys() - {"refused", "right"}) > 0)


if __name__ == "__main__":
    main()
