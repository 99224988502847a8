"""Memory does not grow with the model, nor with the number of checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from zlib_ng.zlib_ng import crc32

from swa_avg.formats import torch_zip
from swa_avg.formats.checkpoint import OutputStateDict, OutputStorage, OutputTensor
from swa_avg.tensors import DTYPES

CHECKPOINTS, TENSORS, ELEMENTS = 8, 10, 10_000_000

MEASURED = """
import re, sys, torch
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
import swa_avg
swa_avg.average(sys.argv[2:], sys.argv[1])
print(peak() - before)
"""


def test_eight_checkpoints_of_400_mb_take_less_than_128_mb(tmp_path: Path) -> None:
    """The peak over that of `import torch`. The files are all zeros, and sparse."""
    storages = tuple(OutputStorage(DTYPES["float32"], ELEMENTS) for _ in range(TENSORS))
    tensors = {f"w{n}": OutputTensor(n, 0, (ELEMENTS,), (1,)) for n in range(TENSORS)}
    layout = torch_zip.layout(OutputStateDict(storages, tensors))
    checksum = crc32(bytes(storages[0].nbytes))
    for number in range(CHECKPOINTS):
        with (tmp_path / f"{number}.pt").open("wb") as file:
            file.truncate(layout.size)
            for place, data in layout.headers([checksum] * TENSORS):
                file.seek(place)
                file.write(data)
    out = tmp_path / "out.pt"
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED, str(out), str(tmp_path / "?.pt")],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert out.stat().st_size == layout.size > 400_000_000
    out.unlink()
    assert int(ended.stdout) < 128_000_000, ended.stdout
