"""The command, as a user runs it: exit codes, one line of error, and nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from swa_avg import averaging, cli

COMMAND = [sys.executable, "-m", "swa_avg"]


def run(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, **options}
    return subprocess.run([*COMMAND, *arguments], cwd=folder, **options)


def snapshot(folder: Path) -> dict[str, object]:
    """Return all that is in a folder: bytes, modes, times, links."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = None
        if path.is_symlink():
            content = path.readlink()
        elif path.is_file() and status.st_size < 10**7:
            content = path.read_bytes()
        found[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_ino, content)
    return found


def fails(folder: Path, *arguments: str, code: int = 1, **options: Any) -> str:
    """Run a command that fails: one line, and the folder as it was. Return the line."""
    before = snapshot(folder)
    ended = run(folder, *arguments, **options)
    lines = ended.stderr.splitlines()
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert snapshot(folder) == before
    return lines[0]


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


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def changed(**changes: Any) -> Callable[[Path], None]:
    """1.pt with other tensors; None takes one away."""

    def make(folder: Path) -> None:
        made = {**state(), **changes}
        torch.save({n: v for n, v in made.items() if v is not None}, folder / "1.pt")

    return make


def cut(folder: Path) -> None:
    data = (folder / "1.pt").read_bytes()
    (folder / "1.pt").write_bytes(data[: len(data) // 2])


def replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def make_it(folder: Path) -> None:
        (folder / "1.pt").unlink()
        make(folder / "1.pt")

    return make_it


def nothing(folder: Path) -> None:
    pass


ALL = ("0.pt", "1.pt", "2.pt", "-o", "out.pt")
REFUSED: dict[str, tuple[Callable[[Path], None], tuple[str, ...], int, tuple[str, ...]]] = {
    "missing key": (changed(c=None), ALL, 1, ("1.pt: lacks 1 tensor that 2.pt has: c",)),
    "extra key": (changed(d=torch.ones(1)), ALL, 1, ("1.pt: has 1 tensor that 2.pt lacks: d",)),
    "other shape": (changed(c=torch.ones(8)), ALL, 1, ("1.pt: c: has shape [8], expected [7]",)),
    "other dtype": (changed(c=torch.ones(7).half()), ALL, 1, ("1.pt: c: has dtype", "--dtype")),
    "several": (changed(c=None, b=None), ALL, 1, ("lacks 2 tensors that 2.pt has: b, c",)),
    "a scalar": (changed(c=0.5), ALL, 1, ("1.pt: lacks 1 tensor that 2.pt has: c",)),
    "truncated": (cut, ALL, 1, ("1.pt: is not a whole zip",)),
    "empty": (write("1.pt", b""), ALL, 1, ("1.pt: is empty",)),
    "text": (write("1.pt", b"hello\n"), ALL, 1, ("1.pt: looks like text",)),
    "HTML": (write("1.pt", b"<html>"), ALL, 1, ("1.pt: looks like HTML",)),
    "LFS pointer": (write("1.pt", b"version https://git-lfs"), ALL, 1, ("Git LFS pointer",)),
    "JSON": (write("1.pt", b'{"a": 1}'), ALL, 1, ("1.pt: looks like JSON",)),
    "gzip": (write("1.pt", b"\x1f\x8b\x08\x00"), ALL, 1, ("1.pt: looks like a gzip",)),
    "absent": (lambda folder: (folder / "1.pt").unlink(), ALL, 1, ("1.pt: ", "No such file")),
    "FIFO": (replaced(os.mkfifo), ALL, 1, ("1.pt: is not a regular file",)),
    "folder": (replaced(Path.mkdir), ALL, 2, ("1.pt: is a folder",)),
    "device": (nothing, ("/dev/null", "-o", "out.pt"), 1, ("/dev/null: is not a regular",)),
    "no match": (nothing, ("no_*.pt", "-o", "out.pt"), 2, ("no_*.pt: matches no file",)),
    "no such key": (nothing, (*ALL, "--key", "ema"), 1, ("has no state_dict at 'ema'",)),
    "existing output": (write("out.pt", b"old"), ALL, 1, ("out.pt: exists already", "--force")),
    "output is a folder": (
        lambda folder: (folder / "out.pt").mkdir(), (*ALL, "-f"), 1, ("out.pt: is a folder",)
    ),
    "output is an input": (nothing, (*ALL[:3], "-f", "-o", "2.pt"), 1, ("is one of the inputs",)),
    "output links to an input": (
        lambda folder: (folder / "out.pt").symlink_to("0.pt"), (*ALL, "-f"), 1,
        ("out.pt: is one of the inputs",),
    ),
    "output is an input's other name": (
        lambda folder: (folder / "out.pt").hardlink_to(folder / "0.pt"), (*ALL, "-f"), 1,
        ("out.pt: is one of the inputs",),
    ),
    "missing parent": (nothing, (*ALL[:3], "-o", "no/o.safetensors"), 1, ("no/o.safetensors",)),
    "parent is a file": (nothing, (*ALL[:3], "-o", "0.pt/o.pt"), 1, ("0.pt/o.pt: cannot be wr",)),
    "long name": (nothing, (*ALL[:3], "-o", "x" * 300), 1, ("File name too long",)),
    "control characters": (
        lambda folder: [
            torch.save({"a": torch.ones(n), "\x1b[31m\n": torch.ones(n)}, folder / f"{n}.pt")
            for n in range(3)
        ] and None,
        ALL, 1, ("a: has shape [0], expected [2]",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_is_one_line_and_leaves_no_trace(folder: Path, name: str) -> None:
    """Each fault: its exit code, its line, and the folder as it was."""
    make, arguments, code, says = REFUSED[name]
    make(folder)
    line = fails(folder, *arguments, code=code)
    assert all(part in line for part in says), line
    assert line.isprintable()


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Control characters in the names of tensors and files are shown as escapes."""
    for number in range(2):
        name = f"\x1b]0;x\x07{number}.pt"
        torch.save({"\x1b[31mred\n": torch.ones(number + 1)}, tmp_path / name)
    line = fails(tmp_path, *sorted(p.name for p in tmp_path.iterdir()))
    assert "\\x1b[31mred\\n: has shape" in line
    assert "\\x1b]0;x\\x070.pt" in line


@pytest.mark.parametrize(
    "arguments",
    [(), ("--no-such",), ("0.pt", "--dtype", "int8"), ("0.pt", "--threads", "0"), ("-o",)],
)
def test_wrong_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    """Exit code 2, told how it is used, nothing done."""
    before = snapshot(folder)
    ended = run(folder, *arguments)
    assert ended.returncode == 2
    assert "Error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert snapshot(folder) == before


# What is refused, from the numbers.


def test_nan_in_one_input_is_refused_and_the_old_output_stays(folder: Path) -> None:
    """The file and the tensor are named; --force replaces nothing with half an average."""
    changed(c=torch.full((7,), torch.nan))(folder)
    (folder / "out.pt").write_bytes(b"the old one")
    assert "1.pt: c: has nan" in fails(folder, *ALL, "--force")


def test_disk_that_is_too_small_is_refused(folder: Path) -> None:
    """A limit on the size of files stands for a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    line = fails(folder, *ALL[:3], "-o", "out.safetensors", preexec_fn=limit)
    assert "out.safetensors: cannot be written: File too large" in line


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Eight checkpoints of 2 GB that take no room on disk, and some seconds to read."""
    folder = tmp_path_factory.mktemp("large")
    size = 2**31
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    for number in range(8):
        with (folder / f"{number}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("number", "code", "writing"),
    [(signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True), (signal.SIGINT, 130, True)],
)
def test_signal_ends_the_run_without_a_trace(
    large: Path, number: int, code: int, writing: bool
) -> None:
    """Interrupted when the temporary file has come, or when it is written to: it goes."""
    before = snapshot(large)
    process = subprocess.Popen(
        [*COMMAND, "*.safetensors", "-o", "out.pt"],
        cwd=large, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (there := list(large.glob(".swa-avg-*.tmp"))):
        assert process.poll() is None
    made = there[0].stat().st_mtime_ns
    while writing and there[0].stat().st_mtime_ns == made:
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == ""
    assert snapshot(large) == before


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


def test_output_that_is_replaced_keeps_its_mode_and_its_links(folder: Path) -> None:
    """--force puts the new file where the link points, with the old one's mode; -q is quiet."""
    (folder / "real").mkdir()
    old = folder / "real" / "old.pt"
    old.write_bytes(b"old")
    old.chmod(0o604)
    (folder / "out.pt").symlink_to("real/old.pt")
    ended = run(folder, *ALL, "--force", "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert (folder / "out.pt").readlink() == Path("real/old.pt")
    assert old.stat().st_mode & 0o777 == 0o604
    assert set(torch.load(old, weights_only=True)) == set(state())


def test_same_file_twice_is_counted_once_and_said_as_json(folder: Path) -> None:
    """By the same name, another path, a symlink or a hard link; the report is JSON."""
    odd = folder / "a folder\nwith é"
    odd.mkdir()
    (odd / "sym.pt").symlink_to(folder / "0.pt")
    (odd / "hard.pt").hardlink_to(folder / "1.pt")
    names = ["0.pt", "0.pt", "./0.pt", "1.pt", "2.pt", str(odd / "sym.pt"), str(odd / "hard.pt")]
    out = odd / "out é.safetensors"
    ended = run(folder, *names, "-o", str(out), "--json")
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert len(report["inputs"]) == 3
    assert len(report["notes"]) == 4
    assert all("the same file as" in n and "counted once" in n for n in report["notes"])
    assert report["counts"] == {"averaged": 2, "kept": 0, "reset": 0, "copied": 1}
    assert report["bytes_written"] == out.stat().st_size
    mean = sum(state(n)["c"].double() for n in range(3)) / 3
    assert torch.equal(load_file(out)["c"], mean.float())


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


@pytest.mark.parametrize("how", ["closed", "unread"])
def test_nobody_reads_stdout(folder: Path, how: str) -> None:
    """A closed stdout or a pipe without a reader changes nothing about the output."""
    if how == "closed":
        arguments = " ".join(ALL)
        ended = subprocess.run(
            ["/bin/sh", "-c", f"exec {sys.executable} -m swa_avg {arguments} >&-"],
            cwd=folder, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    else:
        reading, writing = os.pipe()
        os.close(reading)
        ended = run(folder, *ALL, capture_output=False, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert set(torch.load(folder / "out.pt", weights_only=True)) == set(state())


def test_help_needs_no_torch(tmp_path: Path) -> None:
    """--help, --version and wrong usage answer at once."""
    code = (
        "import sys; from swa_avg.cli import main\n"
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
        for parameter in cli.command.params
        if isinstance(parameter.type, click.Choice)
    }
    assert choices["bn_buffers"] == averaging.BN_BUFFERS
    assert choices["dtype"] == averaging.OUTPUT_DTYPES
