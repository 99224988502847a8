"""The laws of `--each --sweep`: what is scored, what is written, what is drawn."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import oracle
import pytest
import stored
import torch
from command import fails, run, snapshot
from safetensors.torch import save_file
from search.test_sweep import MODULE, digest, network, points, saved, score, states, words
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import swa_avg
from swa_avg.errors import OutputError
from swa_avg.search.along import WindowScores
from swa_avg.search.candidates import Tried
from swa_avg.search.plot import drawn_along
from swa_avg.search.scores import Scale

COUNT, LASTS = 5, (2, 3)
SPANS = [
    tuple(range(end - last, end))
    for end in range(1, COUNT + 1)
    for last in LASTS
    if last <= end
]  # fmt: skip


def by_hand(path: Path) -> float:
    """The score of a file, loaded as a user loads it."""
    model = network()
    model.load_state_dict(stored.tensors(path))
    return score(model.eval())


def loader() -> DataLoader[tuple[Tensor, ...]]:
    images = torch.randn(40, 3, generator=torch.Generator().manual_seed(5)) * 3 + 1
    draw = torch.Generator().manual_seed(7)
    return DataLoader(TensorDataset(images), 16, shuffle=True, generator=draw)


# The scores.


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_scores_are_those_of_runs_by_hand(tmp_path: Path, suffix: str, recomputed: bool) -> None:
    """Of each window as an average of its own gives it, and of each checkpoint as it is.

    The outputs have the bytes that they have without scores. Although `evaluate` draws random
    numbers and the loader shuffles.
    """

    def evaluate(model: nn.Module) -> float:
        torch.rand(5)
        return score(model)

    given = states(COUNT)
    paths = saved(tmp_path, given, suffix)
    bn = swa_avg.BatchNorm(data=loader()) if recomputed else None
    report = swa_avg.score_windows(
        *(paths, evaluate, LASTS),
        model=network(),
        mode="max",
        batchnorm=bn,
        output=f"{tmp_path}/{{epoch}}_{{last}}{suffix}",
    )
    scores = report.scores
    assert list(scores.singles) == [digest(state) for state in given]
    assert [one.members for one in scores.tried] == SPANS
    for one, written in zip(scores.tried, report.averages, strict=True):
        alone = tmp_path / f"alone{suffix}"
        fresh = swa_avg.BatchNorm(data=loader(), model=network()) if recomputed else None
        swa_avg.average([paths[n] for n in one.members], alone, force=True, batchnorm=fresh)
        assert one.score == by_hand(Path(written.output)) == by_hand(alone)
        assert Path(written.output).read_bytes() == alone.read_bytes()
        assert written.stale is not recomputed and (written.batchnorm is None) is not recomputed
        assert written.output.endswith(f"{one.members[-1]}_{len(one.members)}{suffix}")
    assert scores.winner.score == max(one.score for one in scores.tried)
    assert scores.is_recomputed is recomputed and (scores.axis, scores.lasts) == ("epoch", LASTS)


def test_scores_alone_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the same without outputs; the temporary folder is empty afterwards."""
    ckpts, temporary = tmp_path / "ckpts", tmp_path / "temporary"
    ckpts.mkdir()
    temporary.mkdir()
    paths = saved(ckpts, states(COUNT), ".safetensors")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = {*tmp_path.rglob("*")}
    report = swa_avg.score_windows(paths, score, LASTS, model=network(), mode="min")
    assert {*tmp_path.rglob("*")} == before
    assert {one.output for one in report.averages} == {""} and report.bytes_written == 0
    written = swa_avg.score_windows(
        *(paths, score, LASTS),
        model=network(),
        mode="min",
        output=f"{tmp_path}/{{epoch}}_{{last}}.pt",
    )
    assert report.scores == written.scores
    for options in ({"keep_wrapper": True}, {"max_shard_size": 1000}):
        given: dict[str, Any] = options
        with pytest.raises(ValueError, match=f"{next(iter(given))} needs output"):
            swa_avg.score_windows(paths, score, 2, model=network(), **given)


def test_folders_are_scored(tmp_path: Path) -> None:
    """Averages that are written as Hugging Face folders, in the model's names."""
    given = states(3)
    for number, state in enumerate(given):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    report = swa_avg.score_windows(
        *(tmp_path / "checkpoint-*", score, 2),
        model=network(),
        mode="max",
        output=f"{tmp_path}/{{name}}-mean/",
    )
    for one, written in zip(report.scores.tried, report.averages, strict=True):
        assert one.score == by_hand(Path(written.output) / "model.safetensors")
    assert sorted(path.name for path in tmp_path.glob("*-mean")) == [
        "checkpoint-1-mean", "checkpoint-2-mean",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["min", "max"])
def test_model_holds_the_best_average(tmp_path: Path, mode: Any) -> None:
    """Bit for bit what was written, in eval mode, although others were scored later."""
    paths = saved(tmp_path, states(COUNT))
    model, output = network(), f"{tmp_path}/{{epoch}}_{{last}}.pt"
    report = swa_avg.score_windows(paths, score, LASTS, model=model, mode=mode, output=output)
    wanted = {"min": min, "max": max}[mode](one.score for one in report.scores.tried)
    assert report.scores.winner.score == wanted
    best = torch.load(report.averages[report.scores.best].output)
    assert all(oracle.same_bits(value, best[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_equal_scores_go_to_the_widest_and_latest_average(tmp_path: Path) -> None:
    """As the docstring says; a window of one checkpoint has the checkpoint's score."""
    paths = saved(tmp_path, states(3))
    calls = []

    def loss(model: nn.Module) -> float:
        calls.append(model)
        return 1.0

    report = swa_avg.score_windows(paths, loss, (1, 2), model=network())
    assert report.scores.winner.members == (1, 2)
    assert len(calls) == 3 + 2, "a checkpoint alone is scored once"


# What is refused.


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module and five checkpoints, that commands which fail leave alone."""
    folder = tmp_path_factory.mktemp("along")
    (folder / "mod.py").write_text(MODULE.replace("> 4", "> 6"))
    saved(folder, states(COUNT))
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--sweep mod:breaks --mode max", "breaks of epoch_0.pt: RuntimeError: no validation set"),
        ("--sweep mod:nan_loss", "nan_loss of epoch_0.pt: returns nan"),
        ("--sweep mod:late_loss", "late_loss of the average of the last 3 at epoch_3.pt: OSError"),
        ("--sweep mod:late_loss -o {epoch}.pt", "of the last 3 at epoch_3.pt: OSError"),
        ("--sweep mod:accuracy --plot o.gif", "o.gif: cannot be drawn"),
        ("--sweep mod:accuracy --plot no/o.svg", "no/o.svg: cannot be written"),
    ],
)
def test_failures_leave_nothing(shared: Path, tmp_path: Path, arguments: str, says: str) -> None:
    """One line that says whose fault it is; no output, no temporary file, no picture."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(tmp_path)}
    line = fails(shared, "epoch_*.pt", "--each", "--last", "3", *arguments.split(), env=environment)
    assert says in line, line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--plot o.svg -o {epoch}.pt", "--plot with --each needs --sweep MOD:ATTR."),
        ("--greedy mod:loss", "--each cannot be combined with --greedy."),
        ("--greedy mod:loss --sweep mod:loss", "--each cannot be combined with --greedy."),
        ("--sweep mod:loss -o o.pt", "each average needs a name of its own"),
        ("--sweep mod:loss --keep-wrapper", "--keep-wrapper needs -o, as in -o 'merged/{step}.pt'"),
        ("--sweep mod:loss --force", "--force needs -o"),
        ("--sweep mod:loss --data mod:batches", "--data needs --recompute-bn."),
    ],
)
def test_wrong_usage(shared: Path, arguments: str, says: str) -> None:
    """Exit 2, told why, nothing done."""
    before = snapshot(shared)
    ended = run(shared, "epoch_*.pt", "--each", "--last", "3", *arguments.split())
    assert ended.returncode == 2 and says in ended.stderr, ended.stderr
    assert snapshot(shared) == before


def test_room_in_the_temporary_folder(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages that do not fit there are refused before `evaluate` is called."""
    from swa_avg.storage import targets

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    size = (shared / "epoch_0.pt").stat().st_size
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: type("u", (), {"free": 2 * size}))
    with pytest.raises(OutputError) as refused:
        swa_avg.score_windows(shared / "epoch_*.pt", len, 3, model=network(), mode="min")
    line = refused.value.of_command()
    assert re.search(r"3 temporary files need [\d.]+ kB of disk space, but [\d.]+ kB", line), line
    assert str(tmp_path) in line and "Set TMPDIR to a folder on another disk" in line


# The command.


@pytest.mark.parametrize("written", [False, True])
def test_command(tmp_path: Path, written: bool) -> None:
    """The table, the report and the picture have the scores; outputs are written with -o."""
    (tmp_path / "mod.py").write_text(MODULE)
    given = states(COUNT)
    saved(tmp_path, given)
    before = snapshot(tmp_path)
    arguments = ["epoch_*.pt", "--each", "--last", "2,3", "--sweep", "mod:accuracy"]
    arguments += ["--recompute-bn", "--data", "mod:batches", "--plot", "p.svg", "--report", "r"]
    ended = run(tmp_path, *arguments, *(["-o", "m_{epoch}_{last}.pt"] if written else []))
    assert ended.returncode == 0 and "note: " not in ended.stderr, ended.stderr
    made = {*snapshot(tmp_path)} - {*before}
    outputs = {f"m_{span[-1]}_{len(span)}.pt" for span in SPANS} if written else set()
    assert {Path(path).name for path in made} - {"__pycache__"} == {"p.svg", "r", *outputs}, made
    content = json.loads((tmp_path / "r").read_text())
    search = content["search"]
    assert (search["metric"], search["mode"], search["axis"]) == ("accuracy", "max", "epoch")
    assert [one["score"] for one in search["singles"]] == [
        1 / (1 + state["0.weight"].double().square().sum().item()) for state in given
    ]
    assert [(one["epoch"], one["count"]) for one in search["tried"]] == [
        (span[-1], len(span)) for span in SPANS
    ]
    assert {one["output"] for one in content["averages"]} == (outputs or {""})
    for number, single in enumerate(search["singles"]):
        at = {one["count"]: one["score"] for one in search["tried"] if one["epoch"] == number}
        line = [number, *(at[last] for last in LASTS if last in at), single["score"]]
        (row,) = re.findall(rf"^ +{number} ([ \d.]+)  epoch_{number}\.pt$", ended.stdout, re.M)
        assert [float(word) for word in row.split()] == pytest.approx(line[1:], rel=1e-3)
    (best,) = (one for one in search["tried"] if one["best"])
    assert best["score"] == max(one["score"] for one in search["tried"])
    assert f"the last {best['count']} at epoch_{best['epoch']}.pt" in ended.stdout
    assert ("wrote 7 averages" in ended.stdout) is written and "wrote p.svg" in ended.stdout
    root = ET.parse(tmp_path / "p.svg").getroot()
    assert [len(points(root, f"last-{last}")) for last in LASTS] == [4, 3]


def test_dry_run_scores_nothing(shared: Path) -> None:
    """It says what would be done, and runs none of the user's code."""
    before = snapshot(shared)
    arguments = ("epoch_*.pt", "--each", "--last", "3", "--sweep", "mod:breaks", "--dry-run")
    ended = run(shared, *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "would write nothing; 3 averages would need" in ended.stdout
    assert "would score with mod:breaks each average, and each checkpoint alone" in ended.stdout
    assert snapshot(shared) == before


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C while an average is scored: exit 130, and no output or temporary file stays."""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "slow.py").write_text(
        MODULE + "import os, signal\n"
        "def stuck_loss(network):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 6: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return len(calls)\n"
    )
    saved(tmp_path, states(4))
    before = {*tmp_path.rglob("*")}
    environment = os.environ | {
        "TMPDIR": str(tmp_path / "temporary"), "PYTHONDONTWRITEBYTECODE": "1"
    }  # fmt: skip
    each = ("epoch_*.pt", "--each", "--last", "2", "--sweep", "slow:stuck_loss")
    for output in ((), ("-o", "m_{epoch}.pt")):
        ended = run(tmp_path, *each, *output, env=environment)
        assert ended.returncode == 130, ended.stderr
        assert {*tmp_path.rglob("*")} == before


# The picture.


def scores(mode: str = "max", axis: str = "step") -> WindowScores:
    spans = [(0, 1), (1, 2), (0, 1, 2), (2, 3), (1, 2, 3)]
    tried = tuple(Tried(span, 0.5 + 0.1 * n) for n, span in enumerate(spans))
    return WindowScores(
        scale=Scale("$acc$ <1>", mode),
        axis=axis,
        numbers=(100, 200, 250, 400),
        paths=tuple(f"epoch_{number}.pt" for number in range(4)),
        singles=(0.1, 0.2, 0.3, 0.4),
        tried=tried,
        best=4 if mode == "max" else 0,
        is_recomputed=True,
    )


def test_picture_shows_every_score_in_its_place() -> None:
    """One line for each length over the steps, all checkpoints, on one scale; the best ringed."""
    root = ET.fromstring(drawn_along(scores(), ".svg").decode())
    singles, twos, threes = (points(root, name) for name in ("singles", "last-2", "last-3"))
    found = [*singles, *twos, *threes]
    expected = [*zip((100, 200, 250, 400), (0.1, 0.2, 0.3, 0.4), strict=True)]
    expected += [(200, 0.5), (250, 0.6), (400, 0.8), (250, 0.7), (400, 0.9)]
    wide = (singles[-1][0] - singles[0][0]) / 300
    high = (threes[-1][1] - singles[0][1]) / 0.8
    assert wide > 0 > high, "later is to the right, more is higher"
    for (x, y), (step, value) in zip(found, expected, strict=True):
        assert x == pytest.approx(singles[0][0] + wide * (step - 100), abs=1e-3)
        assert y == pytest.approx(singles[0][1] + high * (value - 0.1), abs=1e-3)
    assert points(root, "best") == [pytest.approx(threes[-1])]
    said = list(words(root))
    for word in (
        "$acc$ <1> (larger is better)",
        "average of the last 2",
        "average of the last 3",
        "averages: BatchNorm recomputed",
        "checkpoint alone",
        "step",
        "best: the last 3, 0.9",
    ):
        assert word in said, said
    assert drawn_along(scores(), ".svg") == drawn_along(scores(), ".svg")


def test_axis_is_what_increases(tmp_path: Path) -> None:
    """The epoch; the step where epochs are the same; the number in the name; else the place."""
    numbers = {
        "epoch": [{"epoch": n, "global_step": 1} for n in (3, 5, 9)],
        "step": [{"epoch": 1, "global_step": n} for n in (30, 50, 90)],
        "number": [{}, {}, {}],
        "checkpoint": [{}, {}, {}],
    }
    expected: dict[str, tuple[int, ...]] = {"epoch": (3, 5, 9), "step": (30, 50, 90)}
    expected |= {"number": (2, 4, 16), "checkpoint": (1, 2, 3)}
    for axis, recorded in numbers.items():
        folder = tmp_path / axis
        folder.mkdir()
        names = ("c2", "c4", "c16") if axis == "number" else ("a", "b", "c")
        for name, extra, state in zip(names, recorded, states(3), strict=True):
            torch.save(extra | {"model": state}, folder / f"{name}.pt")
        report = swa_avg.score_windows(folder, score, 2, model=network(), mode="max")
        assert (report.scores.axis, report.scores.numbers) == (axis, expected[axis])
