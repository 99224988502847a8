"""Commands run by two revisions: where exit codes, texts and output bytes differ.

    python tests/compare_revisions.py REVISION [OTHER]

OTHER is the working tree by default. The files of a revision are taken from git into a temporary
folder. Both run the same commands on the same inputs: `--help`, averages in every format, the
messages of what is refused, and the commands that run a model. The folder's name, times and
durations in texts are not compared. Of the record inside an output the revision's own texts would
differ: such outputs are compared tensor by tensor, bit by bit.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed.checkpoint as dcp
from revisions import ROOT, package_of
from safetensors.torch import save_file

import swa_avg

_VARIES = (  # texts that differ from run to run
    (r"\d+(\.\d+)? (s|ms|[kMG]i?B/s|[kMG]B)\b", "N"),
    (r"0\.\d+ seconds|\d+ seconds", "N seconds"),
    (r"\d{4}-\d\d-\d\dT[\d:.+Z]+", "TIME"),
    (r'"seconds": [\d.e-]+|"bytes_per_second": [\d.e-]+|"mtime_ns": \d+', "N"),
)

GOOD = {
    "a plain average": "run/epoch_*.pt -o out.pt",
    "the order of the arguments": "run/epoch_10.pt run/epoch_2.pt run/epoch_1.pt -o out.pt",
    "a folder": "run -o out.pt",
    "the last two": "run/epoch_*.pt --last 2 -o out.pt",
    "epochs": "run/epoch_*.pt --epochs 2:10 -o out.pt",
    "a pattern that is left out": "run/epoch_*.pt --exclude '*_10.pt' -o out.pt",
    "bfloat16": "run/epoch_*.pt --dtype bfloat16 -o out.pt",
    "float16": "run/epoch_*.pt --dtype float16 -o out.pt",
    "buffers averaged": "run/epoch_*.pt --bn-buffers mean -o out.pt",
    "buffers reset": "run/epoch_*.pt --bn-buffers reset -o out.pt",
    "safetensors": "safe/*.safetensors -o out.safetensors",
    "torch to safetensors": "run/epoch_*.pt -o out.safetensors",
    "safetensors to torch": "safe/*.safetensors -o out.pt",
    "a wrapper": "lightning/*.ckpt -o out.pt",
    "a wrapper that is kept": "lightning/*.ckpt --keep-wrapper -o out.ckpt",
    "a key": "lightning/*.ckpt --key state_dict -o out.pt",
    "torch before 1.6": "legacy/*.pt -o out.pt",
    "a Hugging Face folder": "hf/checkpoint-1 hf/checkpoint-2 -o out/",
    "a Hugging Face folder that is kept": "hf/checkpoint-1 hf/checkpoint-2 --keep-wrapper -o out/",
    "a distributed checkpoint": "dcp/1 dcp/2 -o out.pt",
    "a distributed checkpoint that is kept": "dcp/1 dcp/2 --keep-wrapper -o out/",
    "from an average": "run/epoch_2.pt run/epoch_10.pt --start-from first.pt -o out.pt",
    "verified": "run/epoch_*.pt --verify -o out.pt",
    "one thread": "run/epoch_*.pt --threads 1 -o out.pt",
    "shown": "--show first.pt",
    "a dry run": "run/epoch_*.pt --dry-run",
    "distances": "run/epoch_*.pt --distances",
    "JSON": "run/epoch_*.pt --json -o out.pt",
    "verbose": "run/epoch_*.pt -v -o out.pt",
    "quiet": "run/epoch_*.pt -q -o out.pt",
    "a count that is too large": "run/epoch_*.pt --last 9 -o out.pt",
    "--help": "--help",
}
REFUSED = {
    "no inputs": "-o out.pt",
    "a file that is not there": "run/epoch_3.pt run/epoch_2.pt -o out.pt",
    "a pattern without matches": "'run/*.ckpt' -o out.pt",
    "an output that is there": "run/epoch_*.pt -o first.pt",
    "an output that is an input": "run/epoch_*.pt -o run/epoch_1.pt",
    "an output folder that is not there": "run/epoch_*.pt -o nowhere/out.pt",
    "shapes that differ": "mixed/a.pt mixed/b.pt -o out.pt",
    "names that differ": "names/a.pt names/b.pt -o out.pt",
    "NaN": "nan/a.pt nan/b.pt -o out.pt",
    "a truncated file": "bad/short.pt run/epoch_1.pt -o out.pt",
    "a text": "bad/text.pt run/epoch_1.pt -o out.pt",
    "an empty file": "bad/empty.pt run/epoch_1.pt -o out.pt",
    "a flipped bit": "bad/flipped.pt run/epoch_1.pt -o out.pt",
    "TorchScript": "bad/script.pt run/epoch_1.pt -o out.pt",
    "a key that is not there": "lightning/*.ckpt --key model -o out.pt",
    "an unknown option": "run/epoch_*.pt --frobnicate -o out.pt",
    "an unknown dtype": "run/epoch_*.pt --dtype int8 -o out.pt",
    "epochs that are not there": "run/epoch_*.pt --epochs 50: -o out.pt",
    "no data": "run/epoch_*.pt --recompute-bn -o out.pt",
    "data that is not there": "run/epoch_*.pt --recompute-bn --data nomodule:x -o out.pt",
    "a float16 overflow": "large/a.pt large/b.pt --dtype float16 -o out.pt",
}  # fmt: skip
MODEL = {
    "recomputed": "ckpts/epoch_*.pt --recompute-bn --data swa_avg.demo:loader -o out.pt",
    "as torch recomputes": "ckpts/epoch_*.pt --recompute-bn --data swa_avg.demo:loader "
    "--bn-estimator torch -o out.pt",
    "sweep": "ckpts/epoch_*.pt --sweep swa_avg.demo:evaluate -o out.pt",
}


def model(value: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a state_dict of layers, BatchNorm statistics and a half-precision tensor."""
    draw = torch.Generator().manual_seed(value)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=draw),
        "bn.weight": torch.randn(8, generator=draw),
        "bn.bias": torch.randn(8, generator=draw),
        "bn.running_mean": torch.randn(8, generator=draw),
        "bn.running_var": torch.rand(8, generator=draw),
        "bn.num_batches_tracked": torch.tensor(100 * value),
        "half.weight": torch.randn(5, 7, generator=draw).bfloat16(),
        "head.weight": torch.randn(4, 8, generator=draw),
        "head.bias": torch.randn(4, generator=draw),
        **more,
    }


PAIRS: dict[str, tuple[Any, Any]] = {
    "mixed": (model(1), model(2) | {"head.weight": torch.zeros(5, 8)}),
    "names": (model(1), model(2, extra=torch.zeros(2))),
    "nan": (model(1), model(2) | {"head.bias": torch.tensor([1.0, torch.nan, 0.0, 0.0])}),
    "large": ({"w": torch.full((4,), 1e5)}, {"w": torch.full((4,), 2e5)}),
}


def build(folder: Path) -> None:
    """Write all inputs."""
    for name in ("run", "safe", "lightning", "legacy", *PAIRS, "bad", "dcp"):
        (folder / name).mkdir()
    for number in (1, 2, 10):
        state = model(number)
        torch.save(state, folder / f"run/epoch_{number}.pt")
        torch.save(
            {"epoch": number, "state_dict": state, "pytorch-lightning_version": "2.6.0"},
            folder / f"lightning/epoch={number}-step={number * 10}.ckpt",
        )
        legacy = folder / f"legacy/epoch_{number}.pt"
        torch.save(state, legacy, _use_new_zipfile_serialization=False)
        save_file(state, folder / f"safe/step_{number}.safetensors", {"format": "pt"})
    for number in (1, 2):
        saved = folder / f"hf/checkpoint-{number}"
        saved.mkdir(parents=True)
        (saved / "config.json").write_text('{"model_type": "bert"}\n')
        save_file(model(number), saved / "model.safetensors", {"format": "pt"})
        dcp.save(model(number), checkpoint_id=folder / f"dcp/{number}", no_dist=True)
    swa_avg.average([folder / "run/epoch_1.pt"], folder / "first.pt")
    for name, pair in PAIRS.items():
        for letter, state in zip("ab", pair, strict=True):
            torch.save(state, folder / name / f"{letter}.pt")
    sound = (folder / "run/epoch_2.pt").read_bytes()
    place = sound.index(model(2)["conv.weight"].numpy().tobytes())
    flipped = sound[: place + 9] + bytes([sound[place + 9] ^ 4]) + sound[place + 10 :]
    wrong = {
        "short": sound[: len(sound) // 2],
        "text": b"hello\n",
        "empty": b"",
        "flipped": flipped,
    }
    for name, data in wrong.items():
        (folder / f"bad/{name}.pt").write_bytes(data)
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "bad/script.pt")


@dataclass(frozen=True)
class Result:
    """What a command did: its exit code, what it printed, and what it wrote."""

    code: int
    printed: str
    written: dict[str, str]


def run(line: str, folder: Path, tree: Path) -> Result:
    """Run a command with the package in `tree`, in a folder where it may write."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    before = set(folder.rglob("*"))
    command = f"{shlex.quote(sys.executable)} -m swa_avg {line}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    made = sorted((path for path in folder.rglob("*") if path not in before), reverse=True)
    written = {str(p.relative_to(folder)): digest(p) for p in made if p.is_file()}
    for path in made:
        path.rmdir() if path.is_dir() else path.unlink()
    printed = (done.stdout + done.stderr).replace(str(folder), "FOLDER")
    for pattern, instead in _VARIES:
        printed = re.sub(pattern, instead, printed)
    return Result(done.returncode, printed, written)


def digest(path: Path) -> str:
    """Return a hash of the tensors in a file, bit by bit; of another file, of its bytes."""
    if path.suffix not in (".pt", ".ckpt", ".safetensors"):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    found = hashlib.sha256()
    with swa_avg.open_checkpoint(path) as checkpoint:
        for name in checkpoint.names:
            value = checkpoint.read(name)
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return "tensors " + found.hexdigest()[:12]


def compare(name: str, line: str, folder: Path, trees: tuple[Path, Path]) -> tuple[bool, bool]:
    """Run a command twice, print what differs; return if texts and if results differ."""
    before, after = (run(line, folder, tree) for tree in trees)
    if (after.code == 0) == (name in REFUSED):
        raise SystemExit(f"{name}: exit code {after.code}\n{after.printed}")
    texts = before.printed != after.printed
    results = (before.code, before.written) != (after.code, after.written)
    if not texts and not results:
        return False, False
    print(f"\n== {name}: swa-avg {line}")
    if before.code != after.code:
        print(f"exit code {before.code} -> {after.code}")
    for path in sorted(before.written.keys() | after.written.keys()):
        one, other = before.written.get(path, "nothing"), after.written.get(path, "nothing")
        if one != other:
            print(f"{path}: {one} -> {other}")
    lines = (before.printed.splitlines(), after.printed.splitlines())
    for text in list(difflib.unified_diff(*lines, lineterm="", n=0))[2:]:
        if not text.startswith("@@"):
            print(text)
    return texts, results


@click.command()
@click.argument("revision")
@click.argument("other", required=False)
def main(revision: str, other: str | None) -> None:
    """Print every difference, and how many commands differ."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        before = package_of(revision, folder / "before")
        trees = (before, package_of(other, folder / "after") if other else ROOT)
        inputs = folder / "inputs"
        inputs.mkdir()
        demo = (sys.executable, "-m", "swa_avg.demo", "run")
        subprocess.run(demo, cwd=inputs, check=True, capture_output=True)
        shutil.move(inputs / "run/ckpts", inputs / "ckpts")
        shutil.rmtree(inputs / "run")
        build(inputs)
        cases = GOOD | REFUSED | MODEL
        found = [compare(name, line, inputs, trees) for name, line in cases.items()]
    texts, results = map(sum, zip(*found, strict=True))
    print(f"\n{len(cases)} commands: {results} differ in exit code or output, {texts} in text")


if __name__ == "__main__":
    main()
