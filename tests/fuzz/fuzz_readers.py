"""Feeds damaged and invented bytes to one reader, for as long as one likes.

    python tests/fuzz/fuzz_readers.py TARGET [-runs=N] [-seed=N] [libFuzzer's options]

With atheris installed (`pip install atheris`) the fuzzing is guided by coverage, and
without `-runs` it has no end; else, and for the target `all`, real files are changed at
random, 10,000 times. What may come of an input: an error of ours, or tensors that lie
inside the file. Anything else, more than 1 GiB of memory or five seconds for one input
is a crash, and the input is saved as `crash-...` in the current folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

import torch
from safetensors.torch import save as save_safetensors

# Coverage is measured of the readers only: torch is large.
_READERS = ["swa_avg", "pickle", "json"]
with atheris.instrument_imports(include=_READERS) if atheris else nullcontext():
    from swa_avg.checkpoints.layout import find_state_dict
    from swa_avg.errors import SwaAvgError
    from swa_avg.formats.opening import open_checkpoint
    from swa_avg.pickles import unpickler
    from swa_avg.pickles.budget import Budget
    from swa_avg.tensors.strided import read_tensor
    from swa_avg.tensors.tensor import TensorRef

_MEMORY = 1 << 30
_SECONDS = 5.0
_LONG_AGO = 10**9  # when a file was written; of one of this moment the reader waits for the next
_INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, -1)


def check(path: Path) -> bool:
    """Read a checkpoint; tell whether it is one. Its tensors must lie in their files."""
    try:
        checkpoint = open_checkpoint(path)
    except SwaAvgError as error:
        assert "\n" not in str(error)
        return False
    try:
        for ref in find_state_dict(checkpoint).tensors.values():
            _check_inside(ref)
            if ref.nbytes < 1 << 20:
                assert read_tensor(ref).shape == ref.shape
    except SwaAvgError:
        return False
    finally:
        checkpoint.close()
    return True


def _check_inside(ref: TensorRef) -> None:
    for part in ref.parts:
        _check_inside(part.ref)
    if ref.parts:
        return
    record = ref.record
    assert 0 <= record.offset <= record.offset + record.length <= record.file.size
    assert ref.offset >= 0
    assert min(ref.stride, default=0) >= 0
    assert not ref.numel or (ref.offset + ref.extent) * ref.dtype.itemsize <= record.length


def model(seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    tied = torch.randn(3, 4)
    return {
        "epoch": 3,
        "state_dict": {
            "a.weight": tied,
            "b.weight": tied,
            "c": tied.t(),
            "n": torch.tensor(7),
            "h": torch.randn(2, 2).half(),
            "p": torch.nn.Parameter(torch.randn(3)),
            "f": torch.randn(4).to(torch.float8_e5m2),
        },
        "args": {"lr": 0.1, "names": ("x", b"y"), "when": complex(1, 2)},
    }


def _saved(**options: object) -> bytes:
    with tempfile.TemporaryFile() as file:
        torch.save(model(), file, **options)  # type: ignore[arg-type]
        file.seek(0)
        return file.read()


def _zips() -> list[bytes]:
    return [_saved(), _saved(pickle_protocol=4)]


def _pickles() -> list[bytes]:
    made = []
    for data in _zips():
        with tempfile.TemporaryFile() as file:
            file.write(data)
            with zipfile.ZipFile(file) as archive:
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                made.append(archive.read(name))
    return made


def _legacy() -> list[bytes]:
    old = {"_use_new_zipfile_serialization": False}
    return [_saved(**old, pickle_protocol=protocol) for protocol in (0, 2, 4)]


def _safetensors() -> list[bytes]:
    whole = {"a": torch.randn(3, 4), "n": torch.tensor(7), "h": torch.randn(2).half()}
    return [save_safetensors(whole, {"format": "pt", "tied": "a"}), save_safetensors({})]


def _indices() -> list[bytes]:
    names = {"a": "1.safetensors", "n": "2.safetensors"}
    return [json.dumps({"metadata": {"total_size": 56}, "weight_map": names}).encode()]


def _metadata() -> list[bytes]:
    from torch.distributed import checkpoint as dcp

    with tempfile.TemporaryDirectory() as folder:
        state = {"model": {"a": torch.randn(3, 4), "n": torch.tensor(7)}, "epoch": 3}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        _distcp[:] = [Path(folder, "__0_0.distcp").read_bytes()]
        return [Path(folder, ".metadata").read_bytes()]


_distcp: list[bytes] = []


def _into_file(place: Path, data: bytes) -> Path:
    path = place / "in"
    path.write_bytes(data)
    os.utime(path, (_LONG_AGO, _LONG_AGO))
    return path


def _into_zip(place: Path, data: bytes) -> Path:
    """Put a pickle into an archive whose checksums are right."""
    with zipfile.ZipFile(place / "in", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for number, size in enumerate((48, 8, 8, 12, 4, 48)):
            archive.writestr(f"archive/data/{number}", bytes(size))
        archive.writestr("archive/version", "3\n")
    os.utime(place / "in", (_LONG_AGO, _LONG_AGO))
    return place / "in"


def _into_folder(place: Path, data: bytes) -> Path:
    tensors = {"1": {"a": torch.ones(3, 4)}, "2": {"n": torch.tensor(7)}}
    for name, content in tensors.items():
        (place / f"{name}.safetensors").write_bytes(save_safetensors(content))
    (place / "model.safetensors.index.json").write_bytes(data)
    for path in place.iterdir():
        os.utime(path, (_LONG_AGO, _LONG_AGO))
    return place


def _into_dcp(place: Path, data: bytes) -> Path:
    (place / "__0_0.distcp").write_bytes(_distcp[0])
    (place / ".metadata").write_bytes(data)
    for path in place.iterdir():
        os.utime(path, (_LONG_AGO, _LONG_AGO))
    return place


def _unpickle(place: Path, data: bytes) -> bool:
    try:
        unpickler.load(data, Budget())
    except SwaAvgError as error:
        assert "\n" not in str(error)
        return False
    return True


@dataclass(frozen=True)
class Target:
    """A reader: real inputs for it, and what is done with one."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[Path, bytes], object]


TARGETS = {
    "torch_zip": Target(_zips, lambda place, data: check(_into_file(place, data))),
    "zipped_pickle": Target(_pickles, lambda place, data: check(_into_zip(place, data))),
    "legacy": Target(_legacy, lambda place, data: check(_into_file(place, data))),
    "safetensors": Target(_safetensors, lambda place, data: check(_into_file(place, data))),
    "hf_index": Target(_indices, lambda place, data: check(_into_folder(place, data))),
    "dcp_metadata": Target(_metadata, lambda place, data: check(_into_dcp(place, data))),
    "pickle": Target(_pickles, _unpickle),
}


def mutated(data: bytes, others: Sequence[bytes], draw: random.Random) -> bytes:
    """Change an input in a few places: bits, numbers, stretches that go, come twice or move in."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.randrange(len(made) + 1)
        length = min(draw.choice((1, 2, 4, 8, 40)), len(made) - at)
        change = draw.randrange(6)
        if change == 0 and length:
            made[at] ^= 1 << draw.randrange(8)
        elif change == 1 and length:
            made[at] = draw.randrange(256)
        elif change == 2:
            size = draw.choice((1, 2, 4, 8))
            number = draw.choice(_INTERESTING) & ((1 << 8 * size) - 1)
            made[at : at + size] = number.to_bytes(size, draw.choice(("little", "big")))
        elif change == 3:
            del made[at : at + length]
        elif change == 4:
            made[at:at] = made[at : at + length]
        else:
            other = draw.choice(others)
            start = draw.randrange(len(other) + 1)
            made[at : at + length] = other[start : start + length]
    return bytes(made)


def inputs(target: Target, runs: int, seed: int) -> Iterator[bytes]:
    """Yield the real inputs, then changed ones."""
    seeds = target.seeds()
    yield from seeds
    draw = random.Random(seed)
    # Text of JSON and of pickles is in both: parts of other formats make odd mixtures.
    others = [*seeds, pickle.dumps({"a": [1, None, b"x"]}), b'{"a":[0,-1,1e999],"b":{"c":null}}']
    for _ in range(runs):
        yield mutated(draw.choice(seeds), others, draw)


def limit_memory() -> None:
    """Allow this process a gibibyte more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))


def run(name: str, runs: int, seed: int) -> tuple[int, int, float]:
    """Run a target; return how many inputs there were, how many were read, and the slowest."""
    target = TARGETS[name]
    accepted = count = 0
    slowest = 0.0
    for data in inputs(target, runs, seed):
        count += 1
        start = time.process_time()
        try:
            accepted += bool(_in_place(target, data))
            took = time.process_time() - start
            slowest = max(slowest, took)
            assert took < _SECONDS, f"{took:.1f} s"
        except BaseException:
            path = Path(f"crash-{name}-{hashlib.sha256(data).hexdigest()[:12]}")
            path.write_bytes(data)
            print(f"{path}: {len(data)} bytes", file=sys.stderr)
            raise
    return count, accepted, slowest


def _in_place(target: Target, data: bytes) -> object:
    with tempfile.TemporaryDirectory(dir=_MEMORY_DISK) as place:
        return target.run(Path(place), data)


_MEMORY_DISK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> None:
    name, *options = sys.argv[1:] or [""]
    if name not in (*TARGETS, "all"):
        sys.exit(f"usage: fuzz_readers.py {'|'.join(TARGETS)}|all [-runs=N] [-seed=N]")
    given = dict(option.partition("=")[::2] for option in options)
    limit_memory()
    if atheris is None or name == "all":
        runs, seed = int(given.get("-runs", 10_000)), int(given.get("-seed", 0))
        for one in TARGETS if name == "all" else [name]:
            count, accepted, slowest = run(one, runs, seed)
            print(f"{one}: {count} inputs, {accepted} read, the slowest in {slowest:.2f} s")
        return
    target = TARGETS[name]
    with tempfile.TemporaryDirectory() as corpus:
        for number, data in enumerate(target.seeds()):
            Path(corpus, str(number)).write_bytes(data)
        fuzzed = [sys.argv[0], *options, "-rss_limit_mb=0", f"-timeout={_SECONDS:.0f}", corpus]
        atheris.Setup(fuzzed, lambda data: _in_place(target, data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
