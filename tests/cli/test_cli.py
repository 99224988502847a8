"""The command, as a user runs it: exit codes, one line of error, and nothing left behind."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
import torch
from command import fails, run, snapshot
from safetensors.torch import save_file

from swa_avg.cli import command, messages
from swa_avg.planning import settings


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(4, 3), "b": torch.arange(5), "c": torch.randn(7)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three checkpoints, 0.pt to 2.pt."""
    for number in range(3):
        torch.save(state(number), tmp_path / f"{number}.pt")
    return tmp_path


# What is refused, from the headers alone.


ALL = ("0.pt", "1.pt", "2.pt", "-o", "out.pt")
# Most of what is refused is in the catalogue of faults: tests/test_faults_*.py.
REFUSED: dict[str, tuple[Callable[[Path], object], tuple[str, ...], int, str]] = {
    "folder": (lambda folder: (folder / "3.pt").mkdir(), ("3.pt", *ALL), 2, "3.pt: is a folder"),
    "output is a folder": (
        lambda folder: (folder / "out.pt").mkdir(), (*ALL, "-f"), 1, "out.pt: is a folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_one_line_and_leaves_no_trace(folder: Path, name: str) -> None:
    """Each fault: its exit code, its line, and the folder as it was."""
    make, arguments, code, says = REFUSED[name]
    make(folder)
    line = fails(folder, *arguments, code=code)
    assert says in line


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--no-such",),
        ("0.pt", "--dtype", "int8"),
        ("0.pt", "--threads", "0"),
        ("-o",),
        ("0.pt", "--keep-wrapper", "--dtype", "float16"),
        ("0.pt", "--max-shard-size", "5 apples"),
        ("0.pt", "--max-shard-size", "0GB"),
    ],
)
def test_wrong_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    """Exit code 2, told how it is used, nothing done."""
    before = snapshot(folder)
    ended = run(folder, *arguments)
    assert ended.returncode == 2
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert snapshot(folder) == before


# What is done.


def test_average_says_what_it_did(folder: Path) -> None:
    """A short summary on stdout; the output is the mean, and its mode the umask's."""
    ended = run(folder, *ALL, umask=0o027)
    assert ended.returncode == 0, ended.stderr
    assert "averaged 3 checkpoints: 0.pt … 2.pt" in ended.stdout
    assert "tensors: 2 averaged, 1 copied" in ended.stdout
    assert "wrote out.pt" in ended.stdout
    assert ended.stderr == ""
    assert (folder / "out.pt").stat().st_mode & 0o777 == 0o640
    found = torch.load(folder / "out.pt", weights_only=True)
    mean = sum(state(n)["c"].double() for n in range(3)) / 3
    assert torch.equal(found["c"], mean.float())
    assert not list(folder.glob(".*"))


def test_dry_run_writes_nothing(folder: Path) -> None:
    """The plan, from headers alone."""
    before = snapshot(folder)
    ended = run(folder, *ALL[:3], "-o", "out.safetensors", "--dry-run", "-v")
    assert ended.returncode == 0, ended.stderr
    assert "3 checkpoints, in this order:" in ended.stdout
    assert "a.weight" in ended.stdout and "averaged: mean of 3" in ended.stdout
    assert "b " in ended.stdout and "copied: int64 has no mean" in ended.stdout
    assert snapshot(folder) == before


def test_epochs_are_in_natural_order(tmp_path: Path) -> None:
    """The last is epoch 10, not 9, from the names alone; a pattern is expanded by us."""
    for number in (1, 2, 9, 10):
        save_file({"n": torch.tensor([number])}, tmp_path / f"epoch_{number}.safetensors")
    ended = run(tmp_path, "epoch_*", "-o", "o.safetensors", "--dry-run", "--json")
    assert ended.returncode == 0, ended.stderr
    paths = [source["path"] for source in json.loads(ended.stdout)["inputs"]]
    assert paths == [f"epoch_{number}.safetensors" for number in (1, 2, 9, 10)]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    """--help, --version and wrong usage answer at once."""
    code = (
        "import sys; from swa_avg.__main__ import main\n"
        "for word in ('--help', '--version', '--no-such'):\n"
        "    sys.argv = ['swa-avg', word]\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "Examples:" in ended.stdout


def test_choices_are_those_of_the_library() -> None:
    """The command line offers what `average` takes, no less and no more."""
    choices = {
        parameter.name: tuple(parameter.type.choices)
        for parameter in command.command.params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices["bn_buffers"] == settings.BN_BUFFERS
    assert choices["dtype"] == settings.OUTPUT_DTYPES


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--best 3", "--best needs --metric NAME, as in --metric val_loss."),
        ("--best 0 --metric loss", "--best must be at least 1, not 0."),
        ("--best 2 --metric m", "higher m is better; give --mode min or --mode max."),
        ("--mode min", "--mode needs --best N, or --sweep or --greedy."),
        ("--last 0", "--last must be at least 1, not 0."),
        ("--epochs 5", "--epochs must be A:B or A:B:STEP, as in 10:20 or 10:, not 5."),
    ],
)
def test_wrong_choices_name_the_option(tmp_path: Path, line: str, says: str) -> None:
    """As it is typed, before anything is read."""
    ended = run(tmp_path, "a.pt", *line.split())
    assert ended.returncode == 2 and ended.stderr.endswith(f"{says}\n"), ended.stderr


MODULE = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
loader = [torch.arange(12.0).view(4, 3) ** power for power in range(1, 4)]
def score(model): return model[0].weight.sum().item()
"""


def _read_all(terminal: int) -> str:
    """Return what was written to a terminal, until nobody can write to it any more."""
    said = b""
    while True:
        try:
            said += os.read(terminal, 1 << 16)
        except OSError:
            return said.decode()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((), "averaging"),
        (("--recompute-bn", "--data", "mod:loader"), "samples/s"),
        (("--greedy", "mod:score", "--mode", "max"), "0.pt"),
    ],
    ids=["average", "recompute", "greedy"],
)
def test_progress_is_for_a_terminal(tmp_path: Path, arguments: tuple[str, ...], shown: str) -> None:
    """Seen on a terminal, and gone in the end; what is on stdout is the same without one."""
    (tmp_path / "mod.py").write_text(MODULE)
    for number in range(3):
        torch.manual_seed(number)
        made = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        torch.save(made.state_dict(), tmp_path / f"{number}.pt")
    arguments = (*ALL, "-f", *arguments)
    piped = run(tmp_path, *arguments)
    assert piped.returncode == 0, piped.stderr
    assert "\r" not in piped.stderr
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(_read_all, ours)
        often = os.environ | {"TQDM_MININTERVAL": "0"}
        ended = run(tmp_path, *arguments, env=often, terminal=theirs)
        os.close(theirs)
        said = reading.result().replace("\r\n", "\n")
    os.close(ours)
    assert (ended.returncode, ended.stdout) == (0, piped.stdout)
    assert shown in said
    assert said.endswith(piped.stderr)
    said = said.removesuffix(piped.stderr)
    assert "\n" not in said and said.endswith("\r")
    assert not said.split("\r")[-2].strip()


def test_what_the_users_code_does_at_exit_is_done(tmp_path: Path) -> None:
    """A logger that sends its last lines then, a loader that ends its workers."""
    at_exit = "import atexit, sys; atexit.register(print, 'at exit', file=sys.stderr)\n"
    (tmp_path / "mod.py").write_text(MODULE + at_exit)
    made = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for number in range(3):
        torch.save(made.state_dict(), tmp_path / f"{number}.pt")
    ended = run(tmp_path, *ALL, "--recompute-bn", "--data", "mod:loader")
    assert ended.returncode == 0 and ended.stderr.endswith("at exit\n")


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_500_000, "2.5 MB"),
        (3_210_000_000, "3.2 GB"),
        (7e12, "7.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_bytes_for_people(count: float, said: str) -> None:
    """Powers of 1000, up to TB."""
    assert messages.in_bytes(count) == said


# Completion by the shell.


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_script_for_the_shell_is_printed(tmp_path: Path, shell: str) -> None:
    """By the environment switch that click documents, through the entry point."""
    switch = os.environ | {"_SWA_AVG_COMPLETE": f"{shell}_source"}
    ended = run(tmp_path, env=switch)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "swa-avg" in ended.stdout and f"{shell}_complete" in ended.stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["--dist"], ["plain,--distances"]),
        (["--dtype", "b"], ["plain,bfloat16"]),
        (["epoch_"], ["file,epoch_"]),
        (["a.pt", "-o", "o"], ["file,o"]),
        (["a.pt", "--data", "m"], ["file,m"]),
        (["a.pt", "--key", "m"], []),
    ],
)
def test_options_values_and_files_are_completed(
    tmp_path: Path, words: list[str], completed: list[str]
) -> None:
    """What the shell is told to offer for the last word."""
    line = {"COMP_WORDS": " ".join(["swa-avg", *words]), "COMP_CWORD": str(len(words))}
    ended = run(tmp_path, env=os.environ | line | {"_SWA_AVG_COMPLETE": "bash_complete"})
    assert (ended.returncode, ended.stdout.split()) == (0, completed), ended.stderr


# Several ranks.


def test_only_rank_0_shows_what_is_asked_for(folder: Path) -> None:
    """The other ranks print nothing: a record or a plan appears once, whatever the ranks."""
    assert run(folder, *ALL).returncode == 0
    for arguments in (("--show", "out.pt"), ("?.pt", "--dry-run")):
        alone = run(folder, *arguments)
        assert alone.returncode == 0 and alone.stdout
        for rank, printed in (("0", alone.stdout), ("1", "")):
            ended = run(folder, *arguments, env=os.environ | {"WORLD_SIZE": "2", "RANK": rank})
            assert (ended.returncode, ended.stdout) == (0, printed), ended.stderr


# The picture of the distances.


def test_distances_are_drawn(tmp_path: Path) -> None:
    """Each step, distance and turn, and the name of the outlier; the same bytes each time."""
    draw = torch.Generator().manual_seed(0)
    center = torch.randn(50, generator=draw)
    for number in range(6):
        noise = torch.randn(50, generator=draw) * (2 if number == 4 else 0.01)
        torch.save({"epoch": number, "model": {"w": center + noise}}, tmp_path / f"e_{number}.pt")
    arguments = ("e_*.pt", "-o", "o.pt", "-f", "--distances")
    ended = run(tmp_path, *arguments, "--plot", "run.svg")
    assert ended.returncode == 0, ended.stderr
    assert "wrote run.svg" in ended.stdout
    drawn = (tmp_path / "run.svg").read_text()
    assert "e_4.pt" in drawn and "e_3.pt" not in drawn
    assert all(f'id="{part}"' in drawn for part in ("distances", "steps", "turns", "outlier"))
    assert run(tmp_path, *arguments, "--plot", "again.svg").returncode == 0
    assert (tmp_path / "again.svg").read_text() == drawn
    line = fails(tmp_path, *arguments, "--plot", "run.gif")
    assert "run.gif: cannot be drawn" in line
