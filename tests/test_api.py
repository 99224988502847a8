"""The API as a Python user meets it: programs of the guide, typed options, errors, progress."""

from __future__ import annotations

import ast
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
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
        ("thread", 2, "Did you mean threads?"),
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
    )[: 1 if name == "thread" else None]:  # `planned` has no threads
        with pytest.raises(TypeError) as refused:
            call()
        assert says in str(refused.value)
    assert not out.exists()


def test_misspelt_field_names_the_nearest() -> None:
    """Of `Choice`, `Options` and `BatchNorm`; a parameter of the function comes before a field."""
    for call, says in (
        (lambda: swa_avg.Choice(lst=5), "Choice has no field 'lst'. Did you mean last?"),
        (lambda: swa_avg.Options(dtpye="keep"), "Did you mean dtype?"),
        (lambda: swa_avg.BatchNorm(data=[], modl=None), "Did you mean model?"),
        (lambda: swa_avg.sweep("a", "b", len, model=network(), metrc="x"), "Did you mean metric?"),
        (lambda: swa_avg.windows("a", "b", 2, dtpye="keep"), "Did you mean dtype?"),
        (lambda: swa_avg.score_windows("a", len, 2, model=network(), mod=1), "Did you mean mode?"),
    ):
        with pytest.raises(TypeError, match=re.escape(says)):
            call()  # type: ignore[no-untyped-call]


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
        ("(--last 1 --ema), or (--no-ema)", "(choice=Choice(last=1), ema=True), or (ema=False)"),
        ("--exclude '*.pt' leaves it out", 'choice=Choice(exclude="*.pt") leaves it out'),
        ("--epochs 10: matches none", 'choice=Choice(epochs="10:") matches none'),
        ("or replace it with --force", "or replace it with force=True"),
        ("Name a folder, as in -o swa, or", 'Name a folder, as in output="swa", or'),
        ("a new file with -o, or", "a new file, or"),
        ("Megatron-LM's --load", "Megatron-LM's --load"),
        ("run--force/x-o.pt", "run--force/x-o.pt"),
    ],
)
def test_options_become_parameters(of_command: str, of_api: str) -> None:
    """With their values; options of others and names of files stay."""
    assert as_parameters(of_command) == of_api


OURS = {one for option in command.params for one in (*option.opts, *option.secondary_opts)}
VALUES = {"X", ":X", "swa.pt", "swa", "min", "max", "fp16"}


def texts() -> Iterator[tuple[str, str]]:
    """Yield each text of the library with its place; an inserted value is an X."""
    package = Path(swa_avg.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.parent.name == "cli" or path.name in ("errors.py", "demo.py"):
            continue
        parsed = ast.parse(path.read_text())
        pieces = {id(v) for n in ast.walk(parsed) if isinstance(n, ast.JoinedStr) for v in n.values}
        pieces |= {id(n.value) for n in ast.walk(parsed) if isinstance(n, ast.Expr)}  # docstrings
        for node in ast.walk(parsed):
            place = f"{path.relative_to(package)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "X" for v in node.values]
                yield place, re.sub("X(?=--)", "", "".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and id(node) not in pieces:
                yield place, str(node.value)


def test_no_text_of_the_api_names_an_option() -> None:
    """Every option in a text becomes a parameter, and only what is inserted becomes its value."""
    found = 0
    for place, text in texts():
        said = as_parameters(text)
        found += said != text
        assert not OURS & set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", said)), (place, said)
        if said != text:
            assert set(re.findall(r'="([^"]*)"', said)) <= VALUES, (place, said)
    assert found > 40


def test_error_names_parameters_in_each_of_its_parts(paths: list[Path]) -> None:
    """Its remedy, each disagreement, and what arrives from another process; files stay."""
    torch.save({"0.weight": torch.ones(4, 3).half()}, paths[0])
    torch.save({"0.weight": torch.ones(4, 3)}, paths[1])
    with pytest.raises(swa_avg.MismatchError) as refused:
        swa_avg.average(paths[:2], paths[0].parent / "out.pt")
    for error in (refused.value, *refused.value.disagreements):
        for one in (error, pickle.loads(pickle.dumps(error))):
            assert one.remedy == 'Choose one with dtype="float32"' and one.remedy in str(one)
            assert one.texts.remedy == "Choose one with --dtype float32"
            assert (type(one), one.file, one.tensor) == (type(error), str(paths[0]), "0.weight")
    error = swa_avg.FileError("is lost", file="run --force.pt")
    assert str(error) == "run --force.pt: is lost."


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
        assert "choice=Choice(last=9) takes all 4 checkpoints: there are no more" in plan.notes


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


def test_plan_writes_only_while_its_checkpoints_are_open(paths: list[Path]) -> None:
    """Later the numbers of their files may be those of others, so nothing may be read."""
    out = paths[0].parent / "out.pt"
    with swa_avg.planned(paths, out) as plan:
        pass
    with pytest.raises(ValueError, match=r"call write\(\) inside the with block"):
        plan.write()
    assert not out.exists()
    forgotten: Any = swa_avg.planned(paths, out)
    with pytest.raises(AttributeError, match=r"needs a with block: .* as plan: plan\.write"):
        forgotten.write()
    with swa_avg.open_checkpoint(paths[0]) as checkpoint:
        checkpoint.close()
    with paths[1].open(), pytest.raises(swa_avg.FileError, match="it is closed"):
        checkpoint.read("0.weight")


def test_plans_and_reports_fit_a_line(paths: list[Path]) -> None:
    """What a notebook shows of them."""
    out = paths[0].parent / "out.pt"
    with swa_avg.planned(paths, out) as plan:
        report = plan.write()
    assert repr(plan).startswith(f"Averaging({out}: 4 checkpoints, 9 tensors, ")
    made = f"Report({out}: average of 4 checkpoints, "
    assert repr(report).startswith(made) and repr(report).endswith("statistics are stale; 1 note)")
    along = swa_avg.windows(paths, str(out.with_name("{epoch}_{last}.pt")), last=2)
    assert along.stale and repr(along).startswith("WindowsReport(3 averages, ")
    assert repr(along).endswith(f"{out.with_name('3_2.pt')}; BatchNorm statistics are stale)")


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
        swa_avg.average("no/such/folder", out, batchnorm=swa_avg.BatchNorm(data=batches))
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


@pytest.mark.parametrize("greedy", [False, True])
def test_sweep_reports_what_is_to_say_of_its_output(paths: list[Path], greedy: bool) -> None:
    """The notes on the choice, on stale statistics, and on those that were recomputed."""
    (folder, copy), out = (paths[0].parent, paths[0].with_name("copy.pt")), paths[0].parent / "o.pt"
    copy.write_bytes(paths[1].read_bytes())
    given = [*paths, copy]

    def accuracy(model: nn.Module) -> float:
        goal = torch.load(paths[2])["0.weight"] + torch.load(paths[3])["0.weight"]
        return -float((2 * model.state_dict()["0.weight"] - goal).square().sum())

    report = swa_avg.sweep(given, out, accuracy, model=network(), greedy=greedy)
    assert report.winner.members == (2, 3) and report.output == str(out) and report.stale
    counted, *_, stale = report.notes
    assert "copy.pt: " in counted and "counted once" in counted
    assert "BatchNorm statistics do not fit" in stale
    assert repr(report).startswith(f"SweepReport({out}: 2 checkpoints of 4, accuracy ")
    bn = swa_avg.BatchNorm(data=[torch.ones(3, 3)])
    model = network().append(nn.BatchNorm1d(2, affine=False, track_running_stats=False))
    report = swa_avg.sweep(
        given, folder / "p.pt", accuracy, model=model, greedy=greedy, batchnorm=bn
    )
    assert not report.stale and report.notes[-1] == "3: tracks no statistics; unchanged"
    assert report.batchnorm is report.average.batchnorm is not None


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
    kind: Any = torch.nn.Linear
    for call in (
        lambda: swa_avg.recompute_batchnorm(kind, [torch.ones(1, 2)]),
        lambda: swa_avg.BatchNorm(data=[], model=kind),
        lambda: swa_avg.sweep("no/such/folder", out, len, model=kind),
    ):
        with pytest.raises(TypeError, match=r"Module, not the class Linear; give Linear\(\)"):
            call()
    kind = swa_avg.BatchNorm
    for call in (
        lambda: swa_avg.average("no/such/folder", out, batchnorm=kind),
        lambda: swa_avg.windows("no/such/folder", "{epoch}.pt", 2, batchnorm=kind),
        lambda: swa_avg.sweep("no/such/folder", out, len, model=network, batchnorm=kind),
    ):
        with pytest.raises(TypeError, match=r"batchnorm must be a BatchNorm, .* not the class"):
            call()
    for call in (
        lambda: swa_avg.average("no/such/folder", out, threads=0),
        lambda: swa_avg.windows("no/such/folder", "{epoch}.pt", 2, threads=0),
        lambda: swa_avg.sweep("no/such/folder", out, len, model=network, threads=0),
    ):
        with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
            call()
    for kind in (True, swa_avg.ProgressBar):
        with pytest.raises(TypeError, match=r"progress must be a ProgressBar\(\) or a function"):
            swa_avg.average(paths, out, progress=kind)
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
            r"model must be a torch\.nn\.Module, not the class Linear",
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"checkpoints": None}, "checkpoints must be paths, not NoneType"),
        ({"checkpoints": [{"a": 1}]}, "paths, not dict; save it with torch.save first"),
        ({"choice": lambda: swa_avg.Choice(last="3")}, "last must be an integer, not str"),  # type: ignore[arg-type]
        ({"choice": lambda: swa_avg.Choice(epochs=(3, 5))}, "as in 10:20 or 10:, not (3, 5)"),  # type: ignore[arg-type]
        ({"key": 3}, "key must be text, or several texts, not int"),
        ({"choice": lambda: swa_avg.Choice(exclude=3)}, "exclude must be text"),  # type: ignore[arg-type]
        ({"max_shard_size": "5GB"}, "max_shard_size must be an integer, not str"),
        (
            {"overwrite": True},
            "no parameter 'overwrite'. Its parameters are batchnorm, bn_buffers, ",
        ),
    ],
)
def test_wrong_values_are_told(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    """By the name of the parameter, with what was expected."""
    arguments: dict[str, Any] = {"checkpoints": "no/such/folder", "output": tmp_path / "out.pt"}
    with pytest.raises((TypeError, ValueError), match=re.escape(says)):
        swa_avg.average(**arguments | {n: v() if callable(v) else v for n, v in given.items()})


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
