"""Memory does not grow with the model, nor with the number of checkpoints."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import footprint
from command import COMMAND
from zlib_ng.zlib_ng import crc32, crc32_combine

from swa_avg.formats import torch_zip
from swa_avg.formats.checkpoint import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.tensors.tensor import DTYPES

# How many checkpoints, tensors of each, elements of each.
KINDS = {
    "2 of 100 MB": (2, 10, 2_500_000),
    "40 of 10 MB": (40, 10, 250_000),
    "2 of one tensor of 300 MB": (2, 1, 75_000_000),
}


def write_sparse(folder: Path, count: int, tensors: int, elements: int) -> None:
    """Write checkpoints of zeros, but for the first element of each tensor."""
    storages = tuple(OutputStorage(DTYPES["float32"], elements) for _ in range(tensors))
    refs = {f"w{n}": OutputTensor(n, 0, (elements,), (1,)) for n in range(tensors)}
    layout = torch_zip.layout(OutputStateDict(storages, refs))
    zeros = crc32(bytes(4 * elements - 4))
    for number in range(count):
        first = struct.pack("<f", number + 1)
        checksum = crc32_combine(crc32(first), zeros, 4 * elements - 4)
        with (folder / f"{number}.pt").open("wb") as file:
            file.truncate(layout.size)
            starts = [(place, first) for place in layout.places]
            for place, data in [*layout.headers([checksum] * tensors), *starts]:
                file.seek(place)
                file.write(data)


def memory_of(folder: Path) -> int:
    """Return the most memory that averaging the checkpoints of a folder takes, in all processes."""
    inputs = sorted(path.name for path in folder.glob("*.pt"))
    with subprocess.Popen([*COMMAND, *inputs, "-o", "out.pt", "-q"], cwd=folder) as process:
        most = footprint.peak(process)
    assert process.returncode == 0
    return most


def test_memory_is_flat(tmp_path: Path) -> None:
    """Less than 110 MB in all, ± 16 MB for few, many and large tensors.

    On two cores; all processes that take part count.
    """
    taken = {}
    for kind, (count, tensors, elements) in KINDS.items():
        folder = tmp_path / kind
        folder.mkdir()
        write_sparse(folder, count, tensors, elements)
        taken[kind] = memory_of(folder)
        assert (folder / "out.pt").stat().st_size > 4 * tensors * elements
        (folder / "out.pt").unlink()
    print(taken)
    assert max(taken.values()) < 110_000_000, taken
    assert max(taken.values()) - min(taken.values()) < 2 * 16_000_000, taken
