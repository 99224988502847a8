"""The API as a Python user meets it: programs of the guide, typed options, errors, progress."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import swa_avg
from swa_avg.cli.command import command
from swa_avg.errors import as_parameters
from swa_avg.planning.settings import OptionFields, Options

ROOT = Path(__file__).parent.parent
PROGRAMS = re.findall(
    r"## ([^\n]*)\n\n<!-- program -->\n```python\n(.*?)```",
    (ROOT / "swa_avg/guide/python.md").read_text(),
    flags=re.DOTALL,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def batches() -> list[Tensor]:
    return list(torch.randn(3, 16, 3, generator=torch.Generator().manual_seed(3)))


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Four checkpoints with BatchNorm statistics of their own."""
    made = [tmp_path / f"epoch_{number}.pt" for number in range(4)]
    for number, path in enumerate(made):
        torch.manual_seed(number)
        model = network()
        model(torch.randn(8, 3))
        torch.save(model.state_dict(), path)
    return made


# The programs of the guide.


@pytest.mark.parametrize(("title", "program"), PROGRAMS, ids=[title for title, _ in PROGRAMS])
def test_programs_of_the_guide_run(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, title: str, program: str
) -> None:
    """Each as it stands, in the folder of the demo; what it binds is what the guide says."""
    monkeypatch.chdir(demo_folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more are slower for such a small network
    names: dict[str, object] = {}
    try:
        exec(compile(program, title, "exec"), names)
    finally:
        torch.set_num_threads(threads)
    if (model := names.get("network")) is not None:
        outputs = {"Average": "average_bn.pt", "Find the best average": "best_average.pt"}
        written = torch.load(outputs.get(title, "recomputed.pt"))
        for name, value in model.state_dict().items():  # type: ignore[attr-defined]
            assert oracle.same_bits(value, written[name]), name


def test_guide_has_five_programs() -> None:
    """Average, choose, recompute, sweep, look."""
    assert len(PROGRAMS) == 5


# Options.


def test_options_have_one_set_of_names() -> None:
    """Keyword arguments are the public fields of `Options`, with the same types."""
    annotations = dict(Options.__annotations__)
    del annotations["by_sample"], annotations["of_command"]  # of the command line alone
    assert OptionFields.__annotations__.keys() == annotations.keys()
    for name, kind in OptionFields.__annotations__.items():
        assert getattr(kind, "__forward_arg__", kind) == annotations[name], name


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("dtpye", "bfloat16", "Did you mean dtype?"),
        ("keep_wraper", True, "Did you mean keep_wrapper?"),
        ("last", 5, "Did you mean choice=Choice(last=5)?"),
        ("epoch", "3:", "Did you mean choice=Choice(epochs='3:')?"),
        ("qqq", 1, "has no parameter 'qqq'"),
    ],
)
def test_misspelt_option_names_the_nearest(
    paths: list[Path], name: str, value: object, says: str
) -> None:
    """In every function, before anything is read; a field of `Choice` points to `choice`."""
    out = paths[0].parent / "out.pt"
    wrong: dict[str, object] = {name: value}
    for call in (
        lambda: swa_avg.average(paths, out, **wrong),  # type: ignore[arg-type]
        lambda: swa_avg.planned(paths, out, **wrong).__enter__(),  # type: ignore[arg-type]
        lambda: swa_avg.sweep(paths, out, len, model=network(), **wrong),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError) as refused:
            call()
        assert says in str(refused.value)
    assert not out.exists()


SNIPPET = """\
import swa_avg
swa_avg.average("a", "b", dtype="bfloat16", choice=swa_avg.Choice(last=3, mode="min"))
swa_avg.average("a", "b", dtpye="bfloat16")
swa_avg.average("a", "b", dtype="int8")
swa_avg.sweep("a", "b", id, model=None, greedy=True)
with swa_avg.planned("a", "b", verify=1.5) as plan: plan.write()
with swa_avg.planned("a", "b", ema=True) as plan: plan.write().to_dict()
swa_avg.Choice(mode="best")
"""


def test_type_checkers_know_the_options(tmp_path: Path) -> None:
    """mypy finds a misspelt name, a wrong value and a wrong type, and nothing else."""
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", snippet],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    wrong = re.findall(r"snippet\.py:(\d+): error: (.*)", checked.stdout)
    assert [int(line) for line, _ in wrong] == [3, 4, 5, 6, 8], checked.stdout
    assert "dtpye" in wrong[0][1]


def test_pattern_to_exclude_may_be_one_text(paths: list[Path]) -> None:
    """A text is one pattern, not one for each of its characters."""
    out = paths[0].parent / "out.pt"
    report = swa_avg.average(paths, out, choice=swa_avg.Choice(exclude="*_0.pt"))
    assert len(report.inputs) == 3


# Words.


def test_every_option_of_the_command_has_a_parameter() -> None:
    """What an error says of an option, it says of a parameter in the API."""
    of_command = {"output", "quiet", "verbose", "version", "help", "dry_run", "as_json", "report"}
    of_command |= {"show", "plot", "sweep", "greedy", "forward", "device", "estimator", "batches"}
    of_command |= {"each"}
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if parameter.name not in of_command and name.startswith("--"):
                assert "--" not in as_parameters(f"Use {name}, or leave it out"), name


@pytest.mark.parametrize(
    ("of_command", "of_api"),
    [
        ("Choose one with --dtype float32", 'Choose one with dtype="float32"'),
        ("Use a wider --dtype", "Use a wider dtype"),
        ("--key a.b --key c; else --key a", 'key=("a.b", "c"); else key="a"'),
        ("with --key; tensors are at: x", "with key; tensors are at: x"),
        ("(--last 1 --ema), or (--no-ema)", "(choice=Choice(last=1) ema=True), or (ema=False)"),
        ("--exclude '*.pt' leaves it out", 'choice=Choice(exclude="*.pt") leaves it out'),
        ("--epochs 10: matches none", 'choice=Choice(epochs="10:") matches none'),
        ("fewer than --last 5", "fewer than choice=Choice(last=5)"),
        ("or replace it with --force", "or replace it with force=True"),
        ("Name a folder, as in -o swa, or", 'Name a folder, as in output="swa", or'),
        ("a new file with -o, or", "a new file with output, or"),
        ("Megatron-LM's --load", "Megatron-LM's --load"),
        ("run--force/x-o.pt", "run--force/x-o.pt"),
    ],
)
def test_options_become_parameters(of_command: str, of_api: str) -> None:
    """With their values; options of others and names of files stay."""
    assert as_parameters(of_command) == of_api


def test_errors_and_notes_speak_of_parameters(paths: list[Path]) -> None:
    """In the API; the same error has the line of the command."""
    out = paths[0].parent / "out.pt"
    report = swa_avg.average(paths, out)
    assert report.stale
    assert report.notes[-1].endswith("recompute them with batchnorm=BatchNorm(...)")
    with pytest.raises(swa_avg.OutputError, match="replace it with force=True") as refused:
        swa_avg.average(paths, out)
    assert "--force" in refused.value.of_command()
    wanted = swa_avg.Choice(last=9)
    with swa_avg.planned(paths, out, force=True, choice=wanted) as plan:
        assert "there are only 4, fewer than choice=Choice(last=9)" in plan.notes


# Plans.


def test_plan_writes_whole_or_not_at_all(paths: list[Path]) -> None:
    """`write` leaves the output; without it, or after an error in it, there is none."""
    folder = paths[0].parent
    before = sorted(folder.iterdir())
    with swa_avg.planned(paths, folder / "out.pt"):
        pass
    assert sorted(folder.iterdir()) == before

    def broken(model: nn.Module, batch: Tensor) -> None:
        raise RuntimeError("no data")

    bn = swa_avg.BatchNorm(data=batches, model=network(), forward=broken)
    with swa_avg.planned(paths, folder / "out.pt") as plan:
        with pytest.raises(swa_avg.DataError, match="no data"):
            plan.write(batchnorm=bn)
        assert sorted(folder.iterdir()) == before
        report = plan.write()
    assert report.output == str(folder / "out.pt")
    assert sorted(folder.iterdir()) == sorted([*before, folder / "out.pt"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_call_averages_and_recomputes(paths: list[Path], wrapped: bool) -> None:
    """The same bits as averaging, loading and recomputing; the model has them too."""
    folder, model, by_hand = paths[0].parent, network(), network()
    report = swa_avg.average(
        paths,
        folder / "out.pt",
        batchnorm=swa_avg.BatchNorm(data=batches, model=model),
        keep_wrapper=wrapped,
    )
    swa_avg.average(paths, folder / "plain.pt")
    by_hand.load_state_dict(torch.load(folder / "plain.pt"))
    assert swa_avg.recompute_batchnorm(by_hand, batches()) == report.batchnorm
    written = torch.load(folder / "out.pt")
    for name, value in by_hand.state_dict().items():
        assert oracle.same_bits(written[name], value), name
        assert oracle.same_bits(model.state_dict()[name], value), name
    assert not report.stale and model.training
    assert report.to_dict()["batchnorm"] == report.batchnorm.to_dict()
    made = swa_avg.made_from(folder / "out.pt")
    assert made.batchnorm == {"estimator": "population", "batches": 3, "samples": 48}


def test_batchnorm_needs_one_model(paths: list[Path]) -> None:
    """Neither none nor two."""
    out = paths[0].parent / "out.pt"
    with pytest.raises(ValueError, match="batchnorm needs a model"):
        swa_avg.average(paths, out, batchnorm=swa_avg.BatchNorm(data=batches))
    two = swa_avg.BatchNorm(data=batches, model=network())
    with pytest.raises(ValueError, match="has another model"):
        swa_avg.sweep(paths, out, len, model=network(), mode="max", batchnorm=two)
    assert not out.exists()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_model_holds_the_best_average_after_a_sweep(
    paths: list[Path], greedy: bool, recomputed: bool
) -> None:
    """Bit for bit what was written, in eval mode, although others were scored later."""
    model, out = network(), paths[0].parent / "out.pt"
    goal = torch.load(paths[-1])["0.weight"]

    def loss(scored: nn.Module) -> float:
        return float((scored.get_parameter("0.weight") - goal).detach().square().sum())

    bn = swa_avg.BatchNorm(data=batches) if recomputed else None
    report = swa_avg.sweep(paths, out, loss, model=model, greedy=greedy, batchnorm=bn)
    assert report.winner.members == (3,) and len(report.tried) == 4
    written = torch.load(out)
    for name, value in model.state_dict().items():
        assert oracle.same_bits(value, written[name]), name
    assert not model.training


def test_average_of_one_checkpoint_is_scored_once(paths: list[Path]) -> None:
    """It is the checkpoint itself, so it has its score; with other values it is scored anew."""
    folder, scored = paths[0].parent, []

    def accuracy(model: nn.Module) -> int:
        scored.append(model)
        return len(scored)

    report = swa_avg.sweep(paths, folder / "a.pt", accuracy, model=network())
    assert len(scored) == 7 and report.tried[0].score == report.singles[-1] == 4
    swa_avg.sweep(paths, folder / "b.pt", accuracy, model=network(), dtype="bfloat16")
    assert len(scored) == 7 + 8


# Progress.


def test_progress_shows_every_step(paths: list[Path]) -> None:
    """From the headers to the disk, each from its start; what has a total is completed."""
    seen: list[swa_avg.Progress] = []
    swa_avg.average(
        paths,
        paths[0].parent / "out.pt",
        batchnorm=swa_avg.BatchNorm(data=batches, model=network()),
        verify=True,
        progress=seen.append,
    )
    assert list(dict.fromkeys(one.step for one in seen)) == [
        "reading headers",
        "comparing checkpoints",
        "averaging",
        "writing headers",
        "syncing to disk",
        "verifying",
        "recomputing a sample",
        "recomputing BatchNorm",
    ]
    assert seen[-1].step == "syncing to disk", "again, after the statistics were written"
    for number, one in enumerate(seen):
        last = number + 1 == len(seen) or seen[number + 1].step != one.step
        first = number == 0 or seen[number - 1].step != one.step
        assert one.done == 0 or not first, one
        assert one.total is None or one.done <= one.total
        if last and one.step != "verifying":  # which counts the tensors, not the headers
            assert one.total in (None, one.done), one


def test_progress_bar_shows_steps_and_leaves_nothing(paths: list[Path]) -> None:
    """One line, cleared at the end."""
    stream = io.StringIO()
    with swa_avg.ProgressBar(stream) as bar:
        swa_avg.average(paths, paths[0].parent / "out.pt", progress=bar)
    said = stream.getvalue()
    assert "averaging" in said and "syncing to disk" in said and "\n" not in said
    assert not said.split("\r")[-2].strip()


# Wrong kinds of arguments.


def test_wrong_kinds_are_told_by_their_parameter(paths: list[Path]) -> None:
    """One line says what was expected; nothing is written."""
    out = paths[0].parent / "out.pt"
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="choice must be a Choice, as in Choice"):
        swa_avg.average(paths, out, choice=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batchnorm must be a BatchNorm, .* not list"):
        swa_avg.average(paths, out, batchnorm=[torch.ones(1, 2)])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, not Linear"):
        swa_avg.recompute_batchnorm(torch.nn.Linear, [torch.ones(1, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be min or max, not minimum"):
        swa_avg.sweep(paths, out, float, model=network, mode="minimum")  # type: ignore[arg-type]
    each = f"{out.parent}/m_{{name}}.pt"
    wrong: list[tuple[str, Any]] = [
        ("last must be a number of checkpoints", lambda: swa_avg.windows(paths, each, "2")),  # type: ignore[arg-type]
        (r"not \(1, 2\.5\)", lambda: swa_avg.windows(paths, each, (1, 2.5))),  # type: ignore[arg-type]
        (
            "batchnorm must be a BatchNorm",
            lambda: swa_avg.windows(paths, each, 2, batchnorm=[]),  # type: ignore[arg-type]
        ),
        (
            "evaluate must be a function",
            lambda: swa_avg.score_windows(paths, each, 2, model=network),  # type: ignore[arg-type]
        ),
        (
            r"model must be a torch\.nn\.Module, not Linear",
            lambda: swa_avg.score_windows(paths, len, 2, model=torch.nn.Linear),  # type: ignore[arg-type]
        ),
        (
            "batchnorm must be a BatchNorm",
            lambda: swa_avg.sweep(paths, out, len, model=network, batchnorm=[1]),  # type: ignore[arg-type]
        ),
    ]
    for says, call in wrong:
        with pytest.raises(TypeError, match=says):
            call()
    with (
        swa_avg.open_checkpoint(paths[0]) as checkpoint,
        pytest.raises(KeyError, match="has no tensor 'nothing'"),
    ):
        checkpoint.read("nothing")
    assert not out.exists()


def test_batches_in_memory_may_be_what_batchnorm_takes() -> None:
    """A function, a list and a Dataset give the same statistics."""
    samples = torch.arange(24.0).reshape(8, 3)
    found = []
    for batches in (lambda: [samples], [samples], TensorDataset(samples)):
        network = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        swa_avg.recompute_batchnorm(network, batches)
        found.append(network[0].running_mean)
    assert torch.allclose(found[0], samples.mean(0))
    assert torch.allclose(found[1], found[0]) and torch.allclose(found[2], found[0])
