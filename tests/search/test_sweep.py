"""The laws of `--sweep` and `--greedy`: what is judged, what is written, what is drawn."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import oracle
import pytest
import stored
import torch
from command import fails, run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import swa_avg
from swa_avg.averaging.prepare import average
from swa_avg.averaging.report import Report
from swa_avg.batchnorm.statistics import recompute_batchnorm
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.checkpoints.provenance import made_from
from swa_avg.errors import DataError, OutputError, SelectionError
from swa_avg.search.candidates import SweepReport, Tried
from swa_avg.search.plot import drawn
from swa_avg.search.scores import Judge, Scale
from swa_avg.search.sweeping import sweep

MODULE = """
import torch
from torch import nn

def model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

def batches():
    draw = torch.Generator().manual_seed(3)
    for _ in range(3): yield torch.randn(16, 3, generator=draw)

def accuracy(network): return 1 / (1 + network[0].weight.double().square().sum().item())
def evaluate(network): return accuracy(network)
def both(network): return {"acc": accuracy(network), "loss": 1 - accuracy(network)}
def one(network): return {"acc": torch.tensor(accuracy(network), dtype=torch.float64)}
def breaks(network): raise RuntimeError("no validation set")
def nothing(network): pass
def nan_loss(network): return float("nan")
calls = []
def late_loss(network):
    calls.append(0)
    if len(calls) > 4: raise OSError("the disk of the data is gone")
    return len(calls)
"""


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def states(count: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    made = []
    for _ in range(count):
        model = network()
        model(torch.randn(8, 3))  # gives it statistics of its own
        made.append({name: value.clone() for name, value in model.state_dict().items()})
    return made


def saved(folder: Path, given: Sequence[Mapping[str, Tensor]], suffix: str = ".pt") -> list[Path]:
    """Save checkpoints, those of torch in a wrapper."""
    paths = [folder / f"epoch_{number}{suffix}" for number in range(len(given))]
    for number, (path, state) in enumerate(zip(paths, given, strict=True)):
        if suffix == ".safetensors":
            save_file(dict(state), path)
        else:
            torch.save({"epoch": number, "model": dict(state), "optimizer": [number]}, path)
    return paths


def exact(given: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean in rational arithmetic; BatchNorm buffers of the last."""
    return {
        name: value if is_buffer(name) else oracle.mean([state[name] for state in given])
        for name, value in given[-1].items()
    }


def is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def digest(state: Mapping[str, Tensor]) -> float:
    """A number that tells states apart, whichever of their elements differ."""
    total = 0.0
    for value in state.values():
        flat = value.detach().double().flatten()
        total += float((flat * torch.arange(1, len(flat) + 1).sqrt()).sum())
    return total


def score(model: nn.Module) -> float:
    assert not model.training
    return digest(model.state_dict())


def wants(wanted: Tensor) -> Callable[[nn.Module], float]:
    """Return what finds only one model good: the one with these first weights."""
    return lambda model: float(oracle.same_bits(next(iter(model.parameters())).data, wanted))


# The sweep.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_scores_are_those_of_the_exact_means(tmp_path: Path, suffix: str) -> None:
    """Of the last 1, 2, … checkpoints, and of each as it is; all averaged in one reading."""
    given = states(5)
    paths = saved(tmp_path, given, suffix)
    report = sweep(paths, tmp_path / "o.pt", score, model=network(), mode="max")
    assert list(report.singles) == [digest(state) for state in given]
    assert [one.score for one in report.tried] == [digest(exact(given[-k:])) for k in range(1, 6)]
    assert [one.members for one in report.tried] == [tuple(range(5 - k, 5)) for k in range(1, 6)]
    assert report.winner.score == max(one.score for one in report.tried)
    averaged = 5 * sum(v.nbytes for name, v in given[0].items() if not is_buffer(name))
    kept = sum(v.nbytes for name, v in given[0].items() if is_buffer(name))
    # Without checksums the statistics of all checkpoints are read, to see whether they are frozen.
    buffers = [value for name, value in given[0].items() if is_buffer(name)]
    statistics = sum(value.nbytes for value in buffers if value.is_floating_point())
    compared = 4 * statistics if suffix == ".safetensors" else 0
    assert report.average.bytes_read == averaged + kept + compared


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_output_is_the_plain_average_of_what_it_lists(
    tmp_path: Path, suffix: str, count: int, wrapped: bool
) -> None:
    """Bit for bit, with the provenance of that average, and nothing else is left."""
    given = states(4)
    paths = saved(tmp_path, given, suffix)
    options: dict[str, Any] = {"keep_wrapper": wrapped}
    good = wants(exact(given[-count:])["0.weight"])
    out, plain = tmp_path / f"o{suffix}", tmp_path / f"plain{suffix}"
    report = sweep(paths, out, good, model=network(), mode="max", **options)
    average(paths[-count:], plain, **options)
    assert report.winner.members == tuple(range(4 - count, 4))
    assert made_from(out) == made_from(plain)
    assert [source.name for source in made_from(out).sources] == [p.name for p in paths[-count:]]
    made, expected = stored.tensors(out), stored.tensors(plain)
    assert list(made) == list(expected)
    assert all(oracle.same_bits(made[name], expected[name]) for name in made)
    assert [source.path for source in report.average.inputs] == [str(p) for p in paths[-count:]]
    assert report.average.stale == (count > 1)
    if suffix == ".pt":
        assert ZipFile(out).testzip() is None, "its checksums are its own"
        assert not wrapped or torch.load(out)["optimizer"] == [3]
    assert sorted(tmp_path.iterdir()) == sorted([*paths, out, plain])


def test_equal_scores_go_to_the_wider_average(tmp_path: Path) -> None:
    """As the docstring says."""
    paths = saved(tmp_path, states(3))
    report = sweep(paths, tmp_path / "o.pt", lambda model: 1.0, model=network(), mode="min")
    assert len(report.winner.members) == 3


@pytest.mark.parametrize("mode", ["min", "max"])
def test_mode_says_which_is_best(tmp_path: Path, mode: str) -> None:
    """The smallest, or the largest."""
    paths = saved(tmp_path, states(4))
    report = sweep(paths, tmp_path / "o.pt", score, model=network(), mode=mode)
    assert report.winner.score == {"min": min, "max": max}[mode](t.score for t in report.tried)


def test_verify_and_dtype_hold_for_each_candidate(tmp_path: Path) -> None:
    """Every average is checked anew, also where it is written in another dtype."""
    given = states(3)
    paths = saved(tmp_path, given)
    options: dict[str, Any] = {"verify": True, "dtype": "bfloat16"}
    report = sweep(paths, tmp_path / "o.pt", score, model=network(), mode="max", **options)
    for count, one in enumerate(report.tried, 1):
        average(paths[-count:], tmp_path / f"{count}.pt", dtype="bfloat16")
        made = stored.tensors(tmp_path / f"{count}.pt")
        assert one.score == digest({name: value.float() for name, value in made.items()})


@pytest.mark.parametrize("soup", [False, True])
def test_batchnorm_is_that_of_recomputing_each_average(tmp_path: Path, soup: bool) -> None:
    """Each average, and the output, has the statistics of averaging first, then recomputing.

    Although they share one loader that shuffles, and `evaluate` draws random numbers.
    """

    def loader() -> DataLoader[tuple[Tensor, ...]]:
        images = torch.randn(40, 3, generator=torch.Generator().manual_seed(5)) * 3 + 1
        draw = torch.Generator().manual_seed(7)
        return DataLoader(TensorDataset(images), 16, shuffle=True, generator=draw)

    seen: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> float:
        torch.rand(5)
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return score(model)

    given = states(4)
    paths = saved(tmp_path, given)
    report = sweep(
        *(paths, tmp_path / "o.pt", evaluate),
        model=network(),
        mode="max",
        greedy=soup,
        batchnorm=swa_avg.BatchNorm(data=loader()),
    )
    for one, found in zip(report.tried, seen[4:], strict=True):
        average([paths[member] for member in one.members], tmp_path / "plain.pt", force=True)
        model = network()
        model.load_state_dict(torch.load(tmp_path / "plain.pt"))
        recompute_batchnorm(model, loader())
        assert all(oracle.same_bits(found[name], v) for name, v in model.state_dict().items())
    assert all(map(oracle.same_bits, seen[3].values(), given[3].values())), "singles as they are"
    made = torch.load(tmp_path / "o.pt")
    best = seen[4 + report.best]
    assert all(oracle.same_bits(made[name], best[name]) for name in made)
    assert report.batchnorm is not None and report.batchnorm.samples == 40
    said = made_from(tmp_path / "o.pt").batchnorm
    assert said == {"estimator": "population", "batches": 3, "samples": 40}


# The greedy soup.


def reference(vectors: Sequence[Tensor], judge: Callable[[Tensor], float]) -> set[int]:
    """Recipe 1 of "Model soups", with means in rational arithmetic; more is better."""
    order = sorted(range(len(vectors)), key=lambda n: (-judge(vectors[n]), -n))
    soup = [order[0]]
    for number in order[1:]:
        tried = [vectors[member] for member in (*soup, number)]
        if judge(oracle.mean(tried)) > judge(oracle.mean([vectors[member] for member in soup])):
            soup.append(number)
    return set(soup)


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=1, max_size=5),
    mode=st.sampled_from(["min", "max"]),
)
def test_greedy_soup_is_that_of_the_recipe(rows: list[list[int]], mode: str) -> None:
    """Who joins, and the file that comes of it, for any small set of checkpoints."""
    unique = list(map(list, dict.fromkeys(map(tuple, rows))))  # a copy counts once
    vectors = [torch.tensor([row], dtype=torch.float32) for row in unique]
    goal = torch.tensor([[1.3, -2.1]])

    def closeness(weight: Tensor) -> float:
        return -float((weight.double() - goal.double()).square().sum())

    def evaluate(model: nn.Module) -> float:
        near = closeness(next(model.parameters()).data)
        return near if mode == "max" else -near

    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = saved(folder, [{"weight": vector} for vector in vectors])
        out = folder / "o.pt"
        report = sweep(
            *(paths, out, evaluate), model=nn.Linear(2, 1, bias=False), mode=mode, greedy=True
        )
        members = reference(vectors, closeness)
        assert set(report.winner.members) == members
        made = torch.load(out)["weight"]
        assert oracle.same_bits(made, oracle.mean([vectors[n] for n in sorted(members)]))
        assert {source.name for source in made_from(out).sources} == {
            paths[n].name for n in members
        }
        assert sorted(folder.iterdir()) == sorted([*paths, out])


# What is good.


@pytest.mark.parametrize(
    ("called", "metric", "mode", "result", "scale", "value"),
    [
        ("accuracy", None, None, 0.5, Scale("accuracy", "max"), 0.5),
        ("evaluate", "val_loss", None, 1, Scale("val_loss", "min"), 1.0),
        ("evaluate", None, "max", torch.tensor(2.5), Scale("evaluate", "max"), 2.5),
        ("accuracy", None, "min", 3.0, Scale("accuracy", "min"), 3.0),
        ("evaluate", None, None, {"wer": 0.5}, Scale("wer", "min"), 0.5),
        ("evaluate", "acc", None, {"acc": 0.5, "loss": 2.0}, Scale("acc", "max"), 0.5),
        ("val_loss", "acc", None, {"acc": 0.5, "loss": 2.0}, Scale("acc", "max"), 0.5),
    ],
)
def test_what_is_good_is_told(
    tmp_path: Path,
    called: str,
    metric: str | None,
    mode: str | None,
    result: object,
    scale: Scale,
    value: float,
) -> None:
    """By --mode, else by the metric's name, else by that of the entry or function."""
    judge = Judge(lambda model: result, nn.Linear(2, 1), called, metric, mode)
    assert one_score(tmp_path, judge) == value
    assert judge.scale == scale


@pytest.mark.parametrize(
    ("called", "metric", "result", "says"),
    [
        ("evaluate", None, 0.5, "the name evaluate does not show whether low or high"),
        (
            "accuracy",
            "val_loss",
            0.5,
            "the name val_loss does not show",
        ),  # they contradict each other
        ("acc_loss", None, 0.5, "the name acc_loss does not show"),
        ("loss", None, {"acc": 1.0, "wer": 2.0}, "w: returns acc, wer. Choose one"),
        ("loss", "bleu", {"acc": 1.0}, "returns acc, but not bleu"),
        ("loss", None, {}, "returns an empty dict, expected a number, or a dict of numbers"),
        ("loss", None, None, "loss of w: returns a NoneType, expected a number"),
        ("loss", None, "0.5", "returns a str"),
        ("loss", None, True, "returns a bool"),
        ("loss", None, torch.ones(2), "returns a Tensor"),
        ("loss", None, {"loss": [1]}, "returns a list"),
        ("loss", None, math.nan, "loss of w: returns nan, expected a finite number"),
        ("loss", None, 10**400, "loss of w: returns inf, expected a finite number"),
        ("loss", None, {"loss": -math.inf}, "returns -inf"),
    ],
)
def test_what_is_not_told_is_not_guessed(
    tmp_path: Path, called: str, metric: str | None, result: object, says: str
) -> None:
    """Neither which way is better, nor which entry counts, nor what a score might be."""
    judge = Judge(lambda model: result, nn.Linear(2, 1), called, metric)
    with pytest.raises((DataError, SelectionError)) as refused:
        one_score(tmp_path, judge)
    assert says in str(refused.value)


def one_score(folder: Path, judge: Judge) -> float:
    torch.save(nn.Linear(2, 1).state_dict(), folder / "w.pt")
    checkpoint = swa_avg.formats.open_checkpoint(folder / "w.pt")
    try:
        return judge.score(find_state_dict(checkpoint), "w")
    finally:
        checkpoint.close()


# What is refused.


def test_room_is_looked_for_before_anything_is_read(tmp_path: Path) -> None:
    """As much as all candidates need, or for a soup two: the line says how much, and where."""
    free = os.statvfs(tmp_path)
    size = free.f_bavail * free.f_frsize // 8 // 3 * 2  # each has room, all 16 do not
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    padded = header.ljust(-(-len(header) // 8) * 8).encode()
    paths = [tmp_path / f"epoch_{number}.safetensors" for number in range(16)]
    for number, path in enumerate(paths):
        path.write_bytes(len(padded).to_bytes(8, "little") + padded)
        os.truncate(path, 8 + len(padded) + size)
        with path.open("r+b") as file:  # no two are the same
            file.seek(8 + len(padded))
            file.write(bytes([number]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(OutputError) as refused:
        sweep(paths, tmp_path / "o.safetensors", score, model=network(), mode="max")
    assert re.search(r"comparing 16 averages needs [\d.]+ [GT]B of disk space", str(refused.value))
    assert "choice=Choice(last=...)" in str(refused.value)
    assert "--last" in refused.value.of_command()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_makes_no_sense_in_a_sweep_is_refused(tmp_path: Path) -> None:
    """From Python as on the command line."""
    paths = saved(tmp_path, states(2))
    for options in ({"start_from": paths[0]}, {"distances": True}, {"bn_buffers": "first"}):
        with pytest.raises(ValueError, match="cannot be combined with a search"):
            sweep(paths, tmp_path / "o.pt", score, model=network(), mode="max", **options)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module and four checkpoints, that commands which fail leave alone."""
    return filled(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return filled(tmp_path)


def filled(folder: Path) -> Path:
    (folder / "mod.py").write_text(MODULE)
    saved(folder, states(4))
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["--sweep", "mod:breaks", "--mode", "max"],
            1,
            "breaks of epoch_0.pt: RuntimeError: no va",
        ),
        (["--sweep", "mod:nan_loss"], 1, "nan_loss of epoch_0.pt: returns nan"),
        (["--sweep", "mod:late_loss"], 1, "late_loss of the average of the last 2: OSError"),
        (["--greedy", "mod:late_loss"], 1, "late_loss of the average with epoch_1.pt: OSError"),
        (["--sweep", "mod:evaluate"], 2, "does not show whether"),
        (["--sweep", "mod:absent"], 1, "mod has no attribute 'absent'"),
        (["--sweep", "mod:calls"], 1, "mod:calls is of type list, expected a function"),
        (["--sweep", "mod:accuracy", "--model", "mod:calls"], 1, "mod:calls is of type list"),
        (
            ["--sweep", "mod:accuracy", "-o", "o.pdf", "--plot", "o.gif"],
            1,
            "o.gif: cannot be drawn",
        ),
        (["--sweep", "mod:accuracy", "--plot", "epoch_0.pt"], 1, "epoch_0.pt: cannot be drawn"),
    ],
)
def test_failures_leave_nothing(shared: Path, arguments: list[str], code: int, says: str) -> None:
    """One line that says whose fault it is; no output, no candidate, no picture."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    line = fails(shared, "epoch_*.pt", *arguments, code=code, env=environment)
    assert says in line, line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sweep", "mod:loss", "--greedy", "mod:loss"],
        ["--plot", "o.svg"],
        ["--sweep", "mod:loss", "--start-from", "epoch_0.pt"],
        ["--sweep", "mod:loss", "--distances"],
        ["--greedy", "mod:loss", "--bn-buffers", "first"],
        ["--sweep", "mod:loss", "--data", "mod:batches"],
        ["--sweep", "mod:loss", "--device", "cpu"],
        ["--metric", "loss"],
        ["--report", "memory://r.json"],
        ["--sweep", "mod:loss", "--report", "o.svg", "--plot", "o.svg"],
        ["--sweep", "mod:loss", "--report", "o.pt", "-o", "o.pt"],
    ],
)
def test_wrong_usage(shared: Path, arguments: list[str]) -> None:
    """Exit 2, told why, nothing done."""
    before = snapshot(shared)
    ended = run(shared, "epoch_*.pt", *arguments)
    assert ended.returncode == 2 and "Error: " in ended.stderr, ended.stderr
    assert snapshot(shared) == before


def test_several_ranks_and_no_checkpoints_are_wrong_usage(shared: Path) -> None:
    """A search is one process's, and of checkpoints."""
    ranks = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    ended = run(shared, "epoch_*.pt", "--sweep", "mod:accuracy", env=ranks)
    assert ended.returncode == 2 and "without torchrun" in ended.stderr
    ended = run(shared, "--recompute-bn", "--data", "mod:batches", "--sweep", "mod:accuracy")
    assert ended.returncode == 2 and "needs checkpoints" in ended.stderr


def test_without_matplotlib_no_work_is_done(shared: Path) -> None:
    """One line that names the extra, before a checkpoint is opened."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from swa_avg.__main__ import main\n"
        "sys.argv = ['swa-avg', 'absent.pt', '--sweep', 'mod:accuracy', '--plot', 'o.svg']\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=shared, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.endswith(" Install it with: pip install 'swa-avg[plot]'.\n")
    extra = [one for one in requires("swa-avg") or () if "extra == 'plot'" in one]
    assert [re.split("\\W", one)[0] for one in extra] == ["matplotlib"]


# The command.


def test_sweep_of_the_command_line(folder: Path) -> None:
    """The table, the best marked; the file, the picture, the report: all of one search."""
    ended = run(
        *(folder, "epoch_*.pt", "-o", "best.pt", "--sweep", "mod:accuracy", "--recompute-bn"),
        *("--data", "mod:batches", "--plot", "s.svg", "--report", "r.json"),
    )
    assert ended.returncode == 0, ended.stderr
    assert "note: " not in ended.stderr
    content = json.loads((folder / "r.json").read_text())
    search = content["search"]
    assert (search["metric"], search["mode"], search["greedy"]) == ("accuracy", "max", False)
    best = max(search["tried"], key=lambda one: (one["score"], one["count"]))
    assert [one["best"] for one in search["tried"]] == [one is best for one in search["tried"]]
    assert [source["path"] for source in content["inputs"]] == best["checkpoints"]
    assert content["batchnorm"]["samples"] == 48 and content["stale"] is False
    rows = re.findall(r"^ +(\d) +([\d.]+) +([\d.]+)  (\S+)(  best)?$", ended.stdout, re.MULTILINE)
    assert len(rows) == 4
    for row, one in zip(rows, search["tried"], strict=True):
        (single,) = (s for s in search["singles"] if s["path"] == row[3])
        assert int(row[0]) == one["count"] and bool(row[4]) == one["best"]
        assert float(row[1]) == pytest.approx(one["score"], rel=1e-3)
        assert float(row[2]) == pytest.approx(single["score"], rel=1e-3)
    assert "wrote best.pt" in ended.stdout and "wrote s.svg" in ended.stdout
    average([folder / path for path in best["checkpoints"]], folder / "plain.pt")
    made, plain = torch.load(folder / "best.pt"), torch.load(folder / "plain.pt")
    for name in made:
        assert oracle.same_bits(made[name], plain[name]) != is_buffer(name), name


def test_greedy_of_the_command_line(folder: Path) -> None:
    """Who joins is said, and is what the file is made of."""
    ended = run(folder, "epoch_*.pt", "--greedy", "mod:one", "--plot", "g.html")
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(r"([\d.]+)  (\S+)  (added|left out)$", ended.stdout, re.MULTILINE)
    assert sorted(row[1] for row in rows) == [f"epoch_{number}.pt" for number in range(4)]
    assert [float(row[0]) for row in rows] == sorted((float(row[0]) for row in rows), reverse=True)
    joined = {path for _, path, what in rows if what == "added"}
    assert {source.name for source in made_from(folder / "swa.pt").sources} == joined
    assert (folder / "g.html").read_text().startswith("<!DOCTYPE html>")
    assert ended.stderr == (
        "note: BatchNorm statistics do not fit the average; recompute them with --recompute-bn\n"
        if len(joined) > 1
        else ""
    )


def test_dry_run_judges_nothing(folder: Path) -> None:
    """It says what would be done, and runs none of the user's code."""
    before = snapshot(folder)
    ended = run(folder, "epoch_*.pt", "--sweep", "mod:breaks", "--dry-run", "--mode", "max")
    assert ended.returncode == 0, ended.stderr
    assert "would score with mod:breaks each checkpoint alone, and the averages" in ended.stdout
    assert "for temporary files beside the output" in ended.stdout
    assert snapshot(folder) == before


def test_metric_is_shared_with_best(folder: Path) -> None:
    """`--best 2 --metric acc` chooses by what is recorded; the sweep judges by the same name."""
    for number in range(4):
        (folder / f"epoch_{number}.json").write_text(json.dumps({"acc": [4, 1, 3, 2][number]}))
    arguments = ("epoch_*.pt", "--best", "2", "--metric", "acc", "--sweep", "mod:both", "--json")
    ended = run(folder, *arguments)
    assert ended.returncode == 0, ended.stderr
    search = json.loads(ended.stdout)["search"]
    assert [single["path"] for single in search["singles"]] == ["epoch_0.pt", "epoch_2.pt"]
    assert search["metric"] == "acc" and len(search["tried"]) == 2


def test_interrupted_search_leaves_nothing(folder: Path) -> None:
    """Ctrl-C while a candidate is judged: exit 130, and no temporary file stays."""
    (folder / "slow.py").write_text(
        MODULE + "import os, signal\n"
        "def stuck_loss(network):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 6: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return len(calls)\n"
    )
    before = set(folder.iterdir())
    ended = run(folder, "epoch_*.pt", "--sweep", "slow:stuck_loss")
    assert ended.returncode == 130, ended.stderr
    assert set(folder.iterdir()) - {folder / "__pycache__"} == before


# The picture.

SVG = "{http://www.w3.org/2000/svg}"


def a_report(greedy: bool = False, mode: str = "max", name: str = "$acc$ <1>") -> SweepReport:
    scores = [0.5, 0.7, 0.9, 0.8]
    members = [(3,), (2, 3), (1, 2, 3), (0, 1, 2, 3)]
    tried = tuple(Tried(m, s) for m, s in zip(members, scores, strict=True))
    paths = tuple(f"epoch_{number}.pt" for number in range(4))
    singles = (0.1, 0.2, 0.3, 0.4)
    average = Report("swa.pt", (), {}, False, 0, 0, ())
    return SweepReport(greedy, Scale(name, mode), paths, singles, tried, 2, average)


def points(root: ET.Element, name: str) -> list[tuple[float, float]]:
    (group,) = (one for one in root.iter(f"{SVG}g") if one.get("id") == name)
    return [(float(use.attrib["x"]), float(use.attrib["y"])) for use in group.iter(f"{SVG}use")]


def words(root: ET.Element) -> Iterator[str]:
    return ("".join(text.itertext()).strip() for text in root.iter(f"{SVG}text"))


def test_picture_shows_every_score_in_its_place() -> None:
    """One point for each average and checkpoint, on one scale, the best ringed and named."""
    root = ET.fromstring(drawn(a_report(), ".svg").decode())
    averages, singles = points(root, "averages"), points(root, "singles")
    assert [x for x, _ in averages] == pytest.approx([x for x, _ in singles])
    scores = [0.5, 0.7, 0.9, 0.8, 0.4, 0.3, 0.2, 0.1]  # singles: the last one first
    heights = [y for _, y in averages + singles]
    unit = (heights[0] - heights[2]) / 0.4
    assert unit > 0, "more is higher"
    expected = [heights[0] - unit * (score - 0.5) for score in scores]
    assert heights == pytest.approx(expected, abs=1e-3)
    assert points(root, "best") == [pytest.approx(averages[2])]
    said = list(words(root))
    for word in (
        "$acc$ <1> (larger is better)",
        "average of the last n",
        "n-th checkpoint from the end, alone",
        "number n of checkpoints averaged, counted from the end of the run",
        "best: 3 averaged, 0.9",
    ):
        assert word in said, said


def test_picture_of_a_soup_never_falls() -> None:
    """It shows the best so far."""
    root = ET.fromstring(drawn(a_report(greedy=True), ".svg").decode())
    heights = [y for _, y in points(root, "averages")]
    assert heights == sorted(heights, reverse=True) and len(set(heights)) == 3


def test_picture_has_the_same_bytes_each_time() -> None:
    """No date and no random name in it; the page holds that very picture."""
    svg = drawn(a_report(), ".svg")
    assert svg == drawn(a_report(), ".svg")
    assert b"<dc:date>" not in svg
    page = drawn(a_report(), ".html").decode()
    assert page.count("<svg") == 1 and svg.decode()[svg.index(b"<svg") :] in page
    assert "<title>Averages of the last n checkpoints: $acc$ &lt;1&gt;</title>" in page


def test_png_is_a_picture_of_the_size_of_a_figure() -> None:
    """5.5 by 3.6 inches at 200 dots."""
    data = drawn(a_report(mode="min"), ".png")
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [1100, 720]
