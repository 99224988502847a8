"""Averaging against the floor and against its peers: ratios of one run, side by side.

    python tests/bench/bench_average.py [CASE]... [--rounds 5] [--scale 1.0]
    python tests/bench/bench_average.py --growth [--picture tests/bench/growth.png]
    python tests/bench/bench_average.py --huge 30

The floor is `cat` of all inputs and `cp` of one; where the cache is cold, `cat` of
all side by side. Every subject runs in a process of its own, in turn, so that what
else goes on meets all of them; what is shown is the median of its ratios to the
floor of the same round. Its time is without the start of Python and its imports.
Memory is looked at in one more run: the peak of the process and of all that it has
forked, and how far that is over `import torch`. What it read and wrote is what it asked
the system for (rchar and wchar of /proc/self/io: maps of files are not in it). mergekit
is a command: its time has its start in it.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))
import footprint
from kernel.test_memory import write_sparse

PRELUDE = """
import glob, json, os, shutil, subprocess, sys, time, torch

def traffic():
    found = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(found["rchar"]) / 1e9, int(found["wchar"]) / 1e9

if SAFE:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
else:
    load_file, save_file = torch.load, torch.save

files = sorted(glob.glob("epoch_*"))
import swa_avg.kernel.mean
if COLD:
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened)
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
print("ready", flush=True)
input()
before, started = traffic(), time.perf_counter()
"""
EPILOGUE = """
seconds, after = time.perf_counter() - started, traffic()
print(json.dumps([seconds, after[0] - before[0], after[1] - before[1]]))
"""
FLOOR = "floor"
OURS = "swa-avg"
SUBJECTS = {
    FLOOR: """
if COLD:
    for child in [subprocess.Popen(["cat", file], stdout=subprocess.DEVNULL) for file in files]:
        child.wait()
else:
    subprocess.run("cat epoch_* > /dev/null", shell=True)
    subprocess.run(["cp", files[0], "out_floor"])
""",
    OURS: """
from swa_avg import average
average(files, "out_ours." + ("safetensors" if SAFE else "pt"), force=True)
""",
    "load, add in float64": """
total = {}
for file in files:
    for name, value in load_file(file).items():
        total[name] = total[name] + value.double() if name in total else value.double()
save_file({name: (v / len(files)).to(torch.DTYPE) for name, v in total.items()}, "out_load64")
""",
    "load, add in float32": """
total = {}
for file in files:
    for name, value in load_file(file).items():
        if name in total:
            total[name] += value.float()
        else:
            total[name] = value.float().clone()
save_file({name: v.div_(len(files)).to(torch.DTYPE) for name, v in total.items()}, "out_load32")
""",
    "mapped, add per tensor": """
if SAFE:
    opened = [safe_open(file, "pt") for file in files]
    names, read = list(opened[0].keys()), lambda one, name: one.get_tensor(name)
else:
    opened = [torch.load(file, mmap=True) for file in files]
    names, read = list(opened[0]), lambda one, name: one[name]
made = {}
for name in names:
    total = read(opened[0], name).double()
    for one in opened[1:]:
        total += read(one, name)
    made[name] = (total / len(files)).to(torch.DTYPE)
save_file(made, "out_mapped")
""",
    "AveragedModel": """
state = load_file(files[0])
model = torch.nn.ParameterList(torch.nn.Parameter(value) for value in state.values())
averaged = torch.optim.swa_utils.AveragedModel(model)
for file in files:
    with torch.no_grad():
        for parameter, value in zip(model, load_file(file).values()):
            parameter.copy_(value)
    averaged.update_parameters(model)
save_file(dict(zip(state, (p.detach() for p in averaged.module))), "out_averaged")
""",
}
WEIGHTS_ALONE = {
    "swa-avg, files of weights alone": """
from swa_avg import average
average(sorted(glob.glob("alone_*")), "out_alone.pt", force=True)
"""
}
MERGEKIT = "mergekit-pytorch"


@dataclass(frozen=True)
class Case:
    """Checkpoints of one kind.

    Attributes:
        count: How many.
        tensors: How many tensors each has.
        elements: How many elements a tensor has.
        dtype: Of which dtype.
        safe: Whether they are safetensors.
        adam: Whether Adam's state lies beside the weights.
        cold: Whether the cache is dropped before each run.
        related: Whether they are of one run, each a small step from the one before.
        subjects: Which ones, beside the floor and swa-avg.
    """

    count: int
    tensors: int
    elements: int
    dtype: str = "float32"
    safe: bool = False
    adam: bool = False
    cold: bool = False
    related: bool = True
    subjects: tuple[str, ...] = tuple(SUBJECTS)[2:]


CASES = {
    "fp32": Case(10, 48, 1 << 22),
    "bf16": Case(10, 48, 1 << 22, "bfloat16", safe=True),
    "unrelated": Case(10, 48, 1 << 22, "bfloat16", safe=True, related=False),
    "resnet18": Case(50, 62, 11_700_000 // 62),
    "many": Case(100, 2000, 2500),
    "adam": Case(5, 24, 1 << 22, adam=True, subjects=()),
    "cold": Case(10, 24, 1 << 22, cold=True, subjects=("mapped, add per tensor",)),
}
Measure = list[float]  # seconds, GB read, GB written; where looked at, MB over torch, and in all


def write_checkpoints(folder: Path, case: Case) -> int:
    """Write the checkpoints of a case, different in each; return their bytes.

    Those of one run go from weights of a standard deviation of 0.02 by steps of one of 0.0004.
    """
    import torch
    from safetensors.torch import save_file

    weights = [torch.zeros(case.elements) for _ in range(case.tensors)]
    for epoch in range(case.count):
        generator = torch.Generator().manual_seed(epoch)
        change = 0.0004 if case.related and epoch else 0.02
        for row in weights:
            row.mul_(case.related).add_(torch.randn(row.numel(), generator=generator), alpha=change)
        state = {
            f"layer{number}.weight": row.to(getattr(torch, case.dtype))
            for number, row in enumerate(weights)
        }
        if case.safe:
            save_file(state, folder / f"epoch_{epoch:03}.safetensors")
        elif case.adam:
            moments = {
                n: {"exp_avg": v / 2, "exp_avg_sq": v * v} for n, v in enumerate(state.values())
            }
            torch.save(
                {"state_dict": state, "optimizer": {"state": moments}},
                folder / f"epoch_{epoch:03}.pt",
            )
            torch.save(state, folder / f"alone_{epoch:03}.pt")
        else:
            torch.save(state, folder / f"epoch_{epoch:03}.pt")
    return sum(path.stat().st_size for path in folder.glob("epoch_*"))


def measured(code: str, folder: Path, case: Case, *, looked_at: bool = False) -> Measure:
    """Run one subject in a process of its own; the disk has nothing else to write then.

    Args:
        code: The subject.
        folder: Where the checkpoints are.
        case: Of which kind they are.
        looked_at: Whether its memory is wanted, and not its time.
    """
    os.sync()
    flags = f"SAFE, COLD = {case.safe}, {case.cold}\n"
    source = flags + PRELUDE + code.replace("DTYPE", case.dtype) + EPILOGUE
    command = [sys.executable, "-c", source]
    with subprocess.Popen(
        command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        before = footprint.of(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        most = footprint.peak(process) if looked_at else 0
        said = process.stdout.read()
    if process.returncode:
        raise click.ClickException(f"exit code {process.returncode}")
    made: Measure = json.loads(said.splitlines()[-1])
    return [*made, (most - before) / 1e6, most / 1e6] if looked_at else made


def mergekit_code(command: str, case: Case) -> str:
    """Return the code of the peer that is a command of its own; it imports what it needs."""
    return f"""
with open("mergekit.yaml", "w") as config:
    print("merge_method: linear\\ndtype: {case.dtype}\\nmodels:", file=config)
    for file in files:
        print("  - model:", os.path.abspath(file), file=config)
        print("    parameters: {{weight: 1.0}}", file=config)
subprocess.run([{command!r}, "mergekit.yaml", "out_mergekit"], check=True, capture_output=True)
"""


def rows_of(
    case: Case, folder: Path, rounds: int, extra: Mapping[str, str]
) -> dict[str, list[Measure]]:
    """Run all subjects of a case in turn, so many rounds, and one more for their memory."""
    names = (FLOOR, OURS, *case.subjects)
    codes = {name: SUBJECTS[name] for name in names} | (WEIGHTS_ALONE if case.adam else {})
    codes |= extra
    rows: dict[str, list[Measure]] = {name: [] for name in codes}
    for number in range(rounds + 1):
        for name, code in codes.items():
            last = number == rounds
            rows[name].append(measured(code, folder, case, looked_at=last))
            for made in folder.glob("out_*"):
                shutil.rmtree(made) if made.is_dir() else made.unlink()
    return rows


def print_rows(rows: Mapping[str, list[Measure]], size: int) -> None:
    floor = [run[0] for run in rows[FLOOR][:-1]]
    print(f"{'':34}{'seconds':>9}{'GB/s':>7}{'x floor':>9}{'MB over torch':>15}{'MB in all':>11}"
          f"{'GB read':>9}{'written':>9}")  # fmt: skip
    for name, (*runs, looked_at) in rows.items():
        seconds = statistics.median(run[0] for run in runs)
        ratio = statistics.median(run[0] / own for run, own in zip(runs, floor, strict=True))
        _, read, wrote, over, whole = looked_at
        memory = f"{'':26}" if name in (FLOOR, MERGEKIT) else f"{over:15.0f}{whole:11.0f}"
        moved = f"{'':18}" if name in (FLOOR, MERGEKIT) else f"{read:9.2f}{wrote:9.2f}"
        print(f"{name:34}{seconds:9.2f}{size / seconds / 1e9:7.2f}{ratio:9.2f}{memory}{moved}")


def in_folder(run: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        run(Path(name))


def growth(rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Measure time and memory against the number of checkpoints, and against their size."""
    drawn: dict[str, list[tuple[float, float, float]]] = {"checkpoints": [], "gigabytes each": []}
    against_count = [(count, Case(count, 6, 1 << 22)) for count in (2, 5, 10, 20, 50)]
    against_size = [
        (tensors * elements * 4 / 1e9, Case(2, tensors, elements))
        for tensors, elements in ((6, 1 << 22), (24, 1 << 22), (96, 1 << 22), (4, 1 << 29))
    ]
    for label, cases in zip(drawn, (against_count, against_size), strict=True):
        for value, case in cases:

            def one(
                folder: Path, label: str = label, value: float = value, case: Case = case
            ) -> None:
                write_checkpoints(folder, case)
                runs = [measured(SUBJECTS[OURS], folder, case) for _ in range(rounds)]
                seconds = statistics.median(run[0] for run in runs)
                *_, over, _ = measured(SUBJECTS[OURS], folder, case, looked_at=True)
                drawn[label].append((value, seconds, over))

            in_folder(one)  # fmt: skip
    return drawn


def huge(size: float) -> None:
    """Average four checkpoints of so many GB, which are holes but for a few bytes."""
    elements = 1 << 28

    def one(folder: Path) -> None:
        write_sparse(folder, 4, max(1, round(size * 1e9 / 4 / elements)), elements)
        for path in list(folder.glob("*.pt")):
            path.rename(path.with_stem(f"epoch_{path.stem}"))
        read = sum(path.stat().st_size for path in folder.glob("epoch_*"))
        seconds, _, wrote, over, _ = measured(SUBJECTS[OURS], folder, CASES["fp32"], looked_at=True)
        print(f"4 x {read / 4e9:.1f} GB, {_memory() / 1e9:.0f} GB of memory: {seconds:.0f} s, "
              f"{wrote:.1f} GB written, {over:.0f} MB over torch")  # fmt: skip

    in_folder(one)


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def print_growth(drawn: Mapping[str, Iterable[tuple[float, float, float]]]) -> None:
    for label, points in drawn.items():
        print(f"{label:>16}{'seconds':>10}{'MB over torch':>16}")
        for value, seconds, memory in points:
            print(f"{value:16.3g}{seconds:10.2f}{memory:16.0f}")


def draw(drawn: Mapping[str, list[tuple[float, float, float]]], picture: Path) -> None:
    """Draw time and memory, one beside the other."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(8, 5), constrained_layout=True)
    for column, (label, points) in enumerate(drawn.items()):
        values, seconds, memory = zip(*points, strict=True)
        for row, (heights, name) in enumerate(((seconds, "seconds"), (memory, "MB over torch"))):
            axes[row][column].plot(values, heights, marker="o")
            top = 1.1 * max(heights) if name == "seconds" else max(100, 1.1 * max(heights))
            axes[row][column].set(xlabel=label, ylabel=name, ylim=(0, top), xlim=(0, None))
            axes[row][column].grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


@click.command()
@click.argument("names", nargs=-1, metavar="[CASE]...", type=click.Choice([*CASES]))
@click.option("--rounds", default=5, help="Of how many the median is taken.")
@click.option("--scale", default=1.0, help="How large the tensors are, of their usual size.")
@click.option("--mergekit", help="The command mergekit-pytorch, in an environment of its own.")
@click.option("--growth", "grows", is_flag=True, help="Time and memory against number and size.")
@click.option("--huge", "size", type=float, help="Four checkpoints of so many GB, mostly holes.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the growth into this PNG.")
def main(
    names: tuple[str, ...], rounds: int, scale: float, mergekit: str | None, grows: bool,
    size: float | None, picture: Path | None,
) -> None:  # fmt: skip
    """Print a table for each CASE; without one, for all."""
    if size:
        huge(size)
        return
    if grows or picture:
        drawn = growth(rounds)
        print_growth(drawn)
        if picture:
            draw(drawn, picture)
        return
    for name in names or CASES:
        kind = CASES[name]
        case = Case(**{**vars(kind), "elements": max(1, int(kind.elements * scale))})
        extra = {MERGEKIT: mergekit_code(mergekit, case)} if mergekit and not case.adam else {}

        def one(
            folder: Path, name: str = name, case: Case = case, extra: Mapping[str, str] = extra
        ) -> None:
            size = write_checkpoints(folder, case)
            state = "cold" if case.cold else "warm"
            print(f"\n{name}: {case.count} x {size / case.count / 1e6:.0f} MB, {case.tensors} "
                  f"tensors of {case.dtype}; {os.cpu_count()} cores, {state} cache")  # fmt: skip
            print_rows(rows_of(case, folder, rounds, extra), size)

        in_folder(one)


if __name__ == "__main__":
    main()
