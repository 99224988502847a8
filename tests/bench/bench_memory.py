"""Peak memory of an average over that of `import torch`: `python tests/bench/bench_memory.py`.

Eight checkpoints of 400 MB, as .pt and as .safetensors, all zeros in sparse
files. Ends with 1 if it takes 128 MB or more.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 128e6
CHECKPOINTS, TENSORS, ELEMENTS = 8, 40, 2_500_000

MEASURED = """
import re, sys, torch
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
import swa_avg
swa_avg.average(sys.argv[2:], sys.argv[1], force=True)
print(before, peak())
"""


def main() -> int:
    """Measure each format and each number of threads; print a table."""
    from safetensors.torch import save_file
    from zlib_ng.zlib_ng import crc32

    from swa_avg.formats import torch_zip
    from swa_avg.formats.checkpoint import OutputStateDict, OutputStorage, OutputTensor
    from swa_avg.tensors import DTYPES

    storages = tuple(OutputStorage(DTYPES["float32"], ELEMENTS) for _ in range(TENSORS))
    tensors = {f"w{n}": OutputTensor(n, 0, (ELEMENTS,), (1,)) for n in range(TENSORS)}
    layout = torch_zip.layout(OutputStateDict(storages, tensors))
    checksum = crc32(bytes(storages[0].nbytes))
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(CHECKPOINTS):
            with (folder / f"{number}.pt").open("wb") as file:
                file.truncate(layout.size)
                for place, data in layout.headers([checksum] * TENSORS):
                    file.seek(place)
                    file.write(data)
        import torch

        for number in range(CHECKPOINTS):
            zeros = {f"w{n}": torch.zeros(ELEMENTS) for n in range(TENSORS)}
            save_file(zeros, folder / f"{number}.safetensors")
        for suffix in (".pt", ".safetensors"):
            arguments = [str(folder / f"out{suffix}"), str(folder / f"?{suffix}")]
            ended = subprocess.run(
                [sys.executable, "-c", MEASURED, *arguments],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            before, after = map(int, ended.stdout.split())
            worst = max(worst, after - before)
            print(
                f"{suffix}: {CHECKPOINTS} x {layout.size / 1e6:.0f} MB: import torch "
                f"{before / 1e6:.0f} MB, average {(after - before) / 1e6:.0f} MB more"
            )
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
