"""What others do to the output while the command works: nothing of theirs is lost.

The command is stopped at a known call (`injection.py`), something happens, and it goes on.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from command import COMMAND, fails, fault, load, one_line, refused, run
from injection import FAIL, SIGNAL, Commands, Ended, Fault
from safetensors.torch import save_file
from torch import nn

SIZE = 3000  # elements


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to write in, beside the inputs: `0.pt`, `1.pt`, and the folders `0`, `1`."""
    for seed in range(2):
        torch.manual_seed(seed)
        state = {"w": torch.randn(SIZE), "n": torch.tensor(seed)}
        torch.save(state, tmp_path / f"{seed}.pt")
        (tmp_path / str(seed)).mkdir()
        save_file(state, tmp_path / str(seed) / "model.safetensors", {"format": "pt"})
        (tmp_path / str(seed) / "config.json").write_text("{}")
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


INPUTS = {"swa.pt": ("../0.pt", "../1.pt"), "swa": ("../0", "../1")}


class Stopped:
    """The command, stopped at a call; at the end of the context it goes on to its end."""

    def __init__(self, commands: Commands, place: Path, *arguments: str, **fault: object) -> None:
        self.commands = commands
        stop = Fault(action=SIGNAL, value=signal.SIGSTOP, **fault)  # type: ignore[arg-type]
        self.process = commands.start(place, *arguments, fault=stop)
        self.ended: Ended

    def __enter__(self) -> Stopped:
        stopped = self.commands.wait(self.process)
        assert stopped.code == signal.SIGSTOP, stopped
        return self

    def __exit__(self, *failure: object) -> None:
        os.kill(self.process, signal.SIGCONT)
        self.ended = self.commands.wait(self.process)


def make(target: Path) -> None:
    """Put something precious where the output will be."""
    if target.suffix:
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "notes.txt").write_text("precious")


def is_precious(target: Path) -> bool:
    return (target if target.suffix else target / "notes.txt").read_text() == "precious"


def refusal(ended: Ended) -> str:
    """Return the one line of a command that failed."""
    assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1), ended
    return ended.err


@fault(145, "a file or folder appears at the target during the run", "refused; it stays")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("without", ["", "exchange"])
def test_target_that_appears_during_the_run(
    commands: Commands, place: Path, name: str, without: str
) -> None:
    """Without --force nothing is replaced, however late it comes, and nothing is left beside it."""
    target = place / name
    assert commands.run(place, *INPUTS[name], "-o", name, fault=Fault(without=without)).code == 0
    for path in sorted(target.rglob("*")) if target.is_dir() else [target]:
        path.unlink()
    if target.is_dir():
        target.rmdir()
    moments = [(1, "write"), (1, "fsync")] + ([] if without else [(1, "exchange")])
    for when, call in moments:
        at = {"when": when, "call": call, "without": without}
        with Stopped(commands, place, *INPUTS[name], "-o", name, **at) as run:
            make(target)
        line = refusal(run.ended)
        assert line.startswith(f"error: {name}: was created by another program during this run"), (
            line
        )
        assert is_precious(target)
        assert [path.name for path in place.iterdir()] == [name]
        (target if target.suffix else target / "notes.txt").unlink()
        if not target.suffix:
            target.rmdir()


@fault(
    146, "with --force another output comes meanwhile", "replaced with a note; foreign files stay"
)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("old", [True, False])
def test_newer_output_under_force(commands: Commands, place: Path, name: str, old: bool) -> None:
    """--force replaces what is there in the end, and says so if that came during the run."""
    arguments = (*INPUTS[name], "-o", name, "-f")
    if old:
        assert commands.run(place, *arguments).code == 0
    with Stopped(commands, place, *arguments, when=1, call="write") as slow:
        assert commands.run(place, *INPUTS[name][:1], "-o", name, "-f").code == 0
    assert slow.ended.code == 0
    assert f"note: {name}: another program wrote it during this run" in slow.ended.err
    assert [path.name for path in place.iterdir()] == [name]


@fault(146)
@pytest.mark.parametrize("without", ["", "exchange"])
def test_folder_that_gets_foreign_files_during_the_run(
    commands: Commands, place: Path, without: str
) -> None:
    """A folder with files that are no weights is never replaced, with --force either."""
    arguments = (*INPUTS["swa"], "-o", "swa", "-f")
    calls = [(1, "fsync")] + ([] if without else [(1, "exchange")])
    assert commands.run(place, *arguments).code == 0
    for when, call in calls:
        at = {"when": when, "call": call, "without": without}
        with Stopped(commands, place, *arguments, **at) as run:
            (place / "swa" / "notes.txt").write_text("precious")
        line = refusal(run.ended)
        assert line.startswith("error: swa: contains files that would be lost: notes.txt"), line
        assert (place / "swa" / "notes.txt").read_text() == "precious"
        assert [path.name for path in place.iterdir()] == ["swa"]
        (place / "swa" / "notes.txt").unlink()


MODULE = """
import torch
from torch import nn

def model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
def loader(): return [torch.randn(8, 3, generator=torch.Generator().manual_seed(1))]
"""


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """A folder with two checkpoints of a network with BatchNorm, their average, and batches."""
    for seed in range(2):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        torch.save(network.state_dict(), tmp_path / f"{seed}.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mod.py").write_text(MODULE)
    assert run(tmp_path / "out", "../0.pt", "../1.pt", "-o", "swa.pt").returncode == 0
    return tmp_path / "out"


@fault(147, "in place: the output is rewritten or modified meanwhile", "refused; it stays")
@pytest.mark.parametrize("without", ["", "exchange"])
def test_in_place_only_over_the_file_that_was_read(
    commands: Commands, network: Path, without: str
) -> None:
    """The slower of two commands on one output puts nothing old back, however late it is."""
    bn = ("--recompute-bn", "--data", "mod:loader", "-o", "swa.pt")
    before = sorted(network.iterdir())
    moments = ["write", "fsync"] + ([] if without else ["exchange"])
    for call in moments:
        at = {"when": 1, "call": call, "without": without}
        with Stopped(commands, network, *bn, **at) as slow:
            assert commands.run(network, "../0.pt", "-o", "swa.pt", "-f").code == 0
            newer = (network / "swa.pt").read_bytes()
        line = refusal(slow.ended)
        assert line.startswith("error: swa.pt: was changed or replaced by another program"), line
        assert (network / "swa.pt").read_bytes() == newer
        assert sorted(p for p in network.iterdir() if p.name != "__pycache__") == before
    with Stopped(commands, network, *bn, when=1, call="fsync", without=without) as slow:
        (network / "swa.pt").write_bytes(newer)  # the same bytes in the same file, but later
    assert "was changed or replaced" in refusal(slow.ended)
    assert slow.ended.err.endswith(" Run the command again.\n")
    assert commands.run(network, *bn, fault=Fault(without=without)).code == 0
    assert not torch.equal(load(network / "swa.pt")["1.running_mean"], torch.zeros(4))


@fault(
    148, "the report or picture cannot be written", "refused before; after: says what is written"
)
def test_report_that_cannot_be_written(commands: Commands, place: Path) -> None:
    """What can be known is known before a tensor is read; later the line names both files."""
    (place / "locked").mkdir(mode=0o555)
    for name, says in {
        "no/r.json": "error: no/r.json: cannot be written: No such file or directory",
        "locked/r.json": "error: locked/r.json: cannot be written: Permission denied",
        "locked": "error: locked: is a folder",
    }.items():
        arguments = ("../0.pt", "../1.pt", "-o", "swa.pt", "--report", name)
        assert says in fails(place, *arguments, without_privileges=True)
    (place / "locked").rmdir()
    arguments = ("../0.pt", "../1.pt", "-o", "swa.pt", "-f", "--report", "r.json")
    writes = [call for call, _ in commands.run(place, *arguments).calls].count("write")
    (place / "swa.pt").unlink()
    (place / "r.json").write_text("old")
    ended = commands.run(place, *arguments, fault=Fault(writes, FAIL, errno.ENOSPC, call="write"))
    assert refusal(ended) == (
        "error: r.json: cannot be written: No space left on device. swa.pt is written.\n"
    )
    assert (place / "r.json").read_text() == "old"
    assert list(load(place / "swa.pt")) == ["w", "n"]
    assert sorted(path.name for path in place.iterdir()) == ["r.json", "swa.pt"]


@fault(106)
def test_stdout_that_is_full_under_json(place: Path) -> None:
    """The line says that the output is written, and that its report is not."""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*COMMAND, "../0.pt", "../1.pt", "-o", "swa.pt", "--json"],
            cwd=place, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (
        1,
        "error: standard output: cannot be written: No space left on device. swa.pt is written.\n",
    )
    assert (place / "swa.pt").exists()


@fault(
    149, "1,100 checkpoints under a limit of 1,024 open files", "averaged; refused at a hard limit"
)
def test_more_checkpoints_than_open_files(tmp_path: Path) -> None:
    """The soft limit is raised; where the hard one is less, what the line says works."""
    (tmp_path / "many").mkdir()
    for number in range(1100):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / "many" / f"{number}.pt")
    ended = run(tmp_path, "many", "-o", "swa.pt", limits="ulimit -Sn 1024")
    assert ended.returncode == 0, ended.stderr
    assert torch.equal(load(tmp_path / "swa.pt")["w"], torch.full((2,), 549.5))
    few, limits = [f"many/{number}.pt" for number in range(60)], "ulimit -n 80"
    line = one_line(run(tmp_path, *few, "-o", "few.pt", limits=limits))
    assert "60 files would be open at once, but the system allows only 80. Average some of" in line
    parts = [run(tmp_path, *few[:30], "-o", "part.pt", limits=limits)]
    parts += [run(tmp_path, *few[30:], "--start-from", "part.pt", "-o", "few.pt", limits=limits)]
    assert [part.returncode for part in parts] == [0, 0], parts
    assert torch.equal(load(tmp_path / "few.pt")["w"], torch.full((2,), 29.5))


@fault(150, "an output named as a folder or as another format", "refused, with a name that works")
def test_output_whose_name_says_something_else(place: Path) -> None:
    """A slash at the end is a folder, .onnx another program's file; the remedies are followed."""
    for given, remedy in {
        "m6/": "m6.pt",
        "m.onnx": "m.pt",
        "m.H5": "m.safetensors",
        "m.gguf": "m.pt",
        "m.npz": "m.pt",
        "m.tar.gz": "m.tar.pt",
    }.items():
        line = fails(place, *INPUTS["swa.pt"], "-o", given)
        assert line.startswith(f"error: {given}: ") and remedy in line, line
        assert run(place, *INPUTS["swa.pt"], "-o", remedy, "-f").returncode == 0
    assert run(place, *INPUTS["swa"], "-o", "m7/").returncode == 0
    assert (place / "m7" / "model.safetensors").exists()
    refused(place, *INPUTS["swa"], "-o", "m7.onnx", says="ends in .onnx")
