"""The catalogue of faults, 85 to 107: the machine, the user and other processes get in the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import oracle
import pytest
import torch
from command import (
    COMMAND,
    OLD,
    OUT,
    UNMEASURED,
    averaged,
    each_refused,
    fault,
    load,
    one_line,
    refused,
    snapshot,
)
from command import run as run_command
from torch import Tensor, nn

INPUTS = ("0.pt", "1.pt", "2.pt")


def weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(4, 3), "b": torch.arange(5), "c": torch.randn(700)}


def means(seeds: int = 3) -> dict[str, Tensor]:
    made = {n: oracle.mean([weights(s)[n] for s in range(seeds)]) for n in ("a.weight", "c")}
    return {"a.weight": made["a.weight"], "b": torch.arange(5), "c": made["c"]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(oracle.same_bits(found[name], value) for name, value in expected.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three checkpoints, 0.pt to 2.pt."""
    for seed, name in enumerate(INPUTS):
        torch.save(weights(seed), tmp_path / name)
    return tmp_path


@pytest.fixture
def unreadable(folder: Path) -> Path:
    """The folder, but every tensor is damaged: who reads one says so, and nothing else."""
    for seed, name in enumerate(INPUTS):
        data = bytearray((folder / name).read_bytes())
        data[data.index(weights(seed)["c"].numpy().tobytes()) + 9] ^= 1
        (folder / name).write_bytes(data)
    return folder


# Which files.


@fault(85, "a pattern that matches nothing", "refused, exit 2")
def test_pattern_without_matches(folder: Path) -> None:
    """Nothing to average is wrong usage; the pattern is named."""
    refused(folder, "0.pt", "no_*.pt", says="error: no_*.pt: matches no file", code=2)


@fault(86, "one input", "averaged")
@fault(103)
def test_one_input(folder: Path) -> None:
    """The average of one is itself, to the bit; a new file's mode is what any program gives."""
    assert_same(averaged(folder, "1.pt", umask=0o027).tensors, weights(1))
    assert (folder / OUT).stat().st_mode & 0o777 == 0o640


@fault(87, "one file twice: by path, link, hard link, as a copy", "counted once, with a note")
@fault(105, "paths with spaces, line ends, non-ASCII", "averaged; shown escaped")
def test_same_file_twice(folder: Path) -> None:
    """However a file comes twice, it counts once, and that is said; odd paths are shown escaped."""
    odd = folder / "a folder\nwith é"
    odd.mkdir()
    (odd / "link.pt").symlink_to(folder / "0.pt")
    (odd / "hard.pt").hardlink_to(folder / "1.pt")
    shutil.copy(folder / "2.pt", odd / "copy.pt")
    names = ["0.pt", "0.pt", "./0.pt", "1.pt", "2.pt"]
    names += [str(odd / f"{name}.pt") for name in ("link", "hard", "copy")]
    done = averaged(folder, *names, "--json", out="out é\n.pt")
    report = json.loads(done.stdout)
    assert len(report["inputs"]) == 3
    assert sum("counted once" in note for note in report["notes"]) == 5
    assert report["counts"] == {"averaged": 2, "kept": 0, "reset": 0, "copied": 1}
    assert report["bytes_written"] == (folder / "out é\n.pt").stat().st_size
    assert_same(done.tensors, means())


# Where to.


@fault(88, "the output is an input, also by a link", "refused, with `--force` too")
@fault(89, "the output exists", "refused without `--force`")
@fault(91, "the output's folder is missing", "refused before a tensor is read")
@fault(92, "the output's folder is not writable, its name too long", "as 91")
def test_outputs_that_may_not_be_are_refused_before_reading(unreadable: Path) -> None:
    """All tensors are damaged, and nothing says so: none was read."""
    (unreadable / "link.pt").symlink_to("0.pt")
    (unreadable / "hard.pt").hardlink_to(unreadable / "0.pt")
    (unreadable / OUT).write_bytes(OLD)
    (unreadable / "locked").mkdir(mode=0o555)
    for name in ("2.pt", "./2.pt", "link.pt", "hard.pt"):
        refused(unreadable, *INPUTS, "--force", "-o", name, says=f"error: {Path(name)}: is one of")
    refused(unreadable, *INPUTS, "-o", OUT, says=f"error: {OUT}: exists already. Choose another")
    for name, says in {
        "no/out.pt": "error: no/out.pt: cannot be written: No such file or directory",
        "0.pt/out.pt": "error: 0.pt/out.pt: cannot be written: Not a directory",
        "x" * 300 + ".pt": "cannot be written: File name too long",
        "locked/out.pt": "error: locked/out.pt: cannot be written: Permission denied",
    }.items():
        refused(unreadable, *INPUTS, "-o", name, says=says, without_privileges=True)


@fault(90, "the output is a symbolic link", "the file behind it is replaced, the link stays")
@fault(103, "the mode of the output", "the old file's, else what the umask leaves")
def test_link_and_mode_of_an_old_output_stay(folder: Path) -> None:
    """The new bytes are where the link leads, with the old file's mode."""
    (folder / "real").mkdir()
    old = folder / "real" / "old.pt"
    old.write_bytes(OLD)
    old.chmod(0o604)
    (folder / OUT).symlink_to("real/old.pt")
    ended = run_command(folder, *INPUTS, "-o", OUT, "--force", "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert (folder / OUT).readlink() == Path("real/old.pt")
    assert old.stat().st_mode & 0o777 == 0o604
    assert_same(load(old), means())
    assert sorted(path.name for path in folder.iterdir()) == sorted([*INPUTS, OUT, "real"])
    assert [path.name for path in old.parent.iterdir()] == ["old.pt"]


@fault(93, "a full disk, a limit on the size of files", "refused before a tensor is read")
def test_full_disk_is_refused_before_reading(unreadable: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    for name in (OUT, "new.safetensors"):
        says = f"error: {name}: cannot be written: File too large"
        limited = {"limits": "ulimit -f 1", "env": UNMEASURED}
        refused(unreadable, *INPUTS, "-o", name, "--force", says=says, **limited)


@fault(94, "fsync fails", "refused, not tried again")
def test_failed_fsync_is_final(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """After one failed fsync there is no second, and no rename."""
    log = tmp_path_factory.mktemp("strace") / "log"
    strace = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=fsync,rename,renameat,renameat2"]
    try:
        subprocess.run([*strace, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"strace does not work here: {error}")
    (folder / OUT).write_bytes(OLD)
    before = snapshot(folder)
    strace += ["-e", "inject=fsync,fdatasync:error=EIO"]
    strace[strace.index("trace=fsync,rename,renameat,renameat2")] += ",fdatasync"
    ended = subprocess.run(
        [*strace, *COMMAND, *INPUTS, "-o", OUT, "--force"],
        cwd=folder, capture_output=True, text=True, env=UNMEASURED,
    )  # fmt: skip
    assert one_line(ended) == f"error: {OUT}: cannot be written: Input/output error."
    calls = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    assert len(calls) == 1 and calls[0].startswith("fsync("), calls
    assert snapshot(folder) == before


# Killed, and inputs that change.


@fault(95, "SIGKILL while writing", "the old file is whole; a temporary file may stay")
@fault(96, "Ctrl-C", "exit 130, nothing left")
@fault(97, "SIGTERM, SIGHUP", "exit 143, 129, nothing left")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        (signal.SIGHUP, 129),
    ],
)
def test_signal_while_writing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """While the temporary file is written to, a signal ends the run; the target is as it was."""
    size = 2**28
    entry = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    for name in range(4):  # a hole, which takes no room on the disk, and some time to read
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header + struct.pack("<f", name))
            file.truncate(8 + len(header) + size)
    (tmp_path / OUT).write_bytes(OLD)
    before = snapshot(tmp_path)
    with stopped_before_reading(tmp_path, "?.safetensors") as process:
        temporary = next(tmp_path.glob(".swa-avg-*"))
    made = temporary.stat().st_mtime_ns
    while temporary.stat().st_mtime_ns == made:
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert out == ""
    assert err == ("interrupted\n" if number is signal.SIGINT else "")
    if number is signal.SIGKILL:
        temporary.unlink()
    assert snapshot(tmp_path) == before


@contextmanager
def stopped_before_reading(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a run and stop it when headers are read, and tensors are not; then let it go on."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "-o", OUT, "--force"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # The temporary file comes before torch does, which takes a second.
    while not list(folder.glob(".swa-avg-*")):
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.read_bytes().index(weights(1)["c"].numpy().tobytes()))
        file.write(bytes(64))


def rewritten_alike(path: Path) -> None:
    path.write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(cut, marks=fault(98, "an input cut while it is read", "refused, no SIGBUS")),
        pytest.param(
            overwritten, marks=fault(99, "an input overwritten while it is read", "refused")
        ),
        pytest.param(rewritten_alike, marks=fault(99)),
    ],
)
def test_input_that_changes_is_refused(folder: Path, change: Callable[[Path], None]) -> None:
    """Between its headers and its tensors a checkpoint changes: no mixture is written."""
    (folder / OUT).write_bytes(OLD)
    with stopped_before_reading(folder, *INPUTS) as process:
        change(folder / "1.pt")
        changed = {name: (folder / name).read_bytes() for name in (*INPUTS, OUT)}
    out, err = process.communicate()
    line = one_line(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    assert line.startswith("error: 1.pt: ") and ("changed while being read" in line), line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == changed


@fault(100, "an input replaced by a rename while it is read", "averaged from the opened file")
def test_input_that_is_replaced_is_read_on(folder: Path) -> None:
    """Who writes a new checkpoint and renames it does us no harm."""
    with stopped_before_reading(folder, *INPUTS) as process:
        torch.save(weights(9), folder / "new")
        (folder / "new").replace(folder / "1.pt")
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert_same(load(folder / OUT), means())
    assert_same(load(folder / "1.pt"), weights(9))


# What is no file, or none of ours.


@fault(101, "a FIFO, a device, /dev/stdin", "refused: not a regular file")
@fault(102, "an input that may not be read", "refused with the system's reason")
def test_what_cannot_be_read_is_refused(folder: Path) -> None:
    """No waiting for who may never write; the system's reason is passed on."""
    os.mkfifo(folder / "fifo.pt")
    for name in ("fifo.pt", "/dev/zero", "/dev/stdin"):
        says = f"error: {name}: is not a regular file"
        refused(folder, "0.pt", name, says=says, stdin=subprocess.PIPE, timeout=60)
    (folder / "1.pt").chmod(0)
    (folder / "locked").mkdir(mode=0)
    cases = {
        "1.pt": "1.pt: cannot be opened: Permission denied",
        "gone.pt": "gone.pt: cannot be opened: No such file or directory",
    }
    each_refused(folder, cases, without_privileges=True)
    (folder / "locked").chmod(0o700)


@fault(102)
def test_folder_in_a_folder_that_cannot_be_read(tmp_path: Path) -> None:
    """It is named, not the folder around it; what the line says helps."""
    inner = tmp_path / "run" / "lost+found"
    inner.mkdir(parents=True)
    for number in range(2):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / "run" / f"{number}.pt")
    inner.chmod(0)
    said = one_line(run_command(tmp_path, "run", "-o", OUT, without_privileges=True))
    assert said.startswith("error: run/lost+found: cannot be read: Permission denied. If it is no")
    ended = run_command(tmp_path, "run/?.pt", "-o", OUT, without_privileges=True)
    assert ended.returncode == 0, ended.stderr
    inner.chmod(0o700)


@fault(104, "two runs to one output", "one whole file wins")
def test_two_runs_to_one_output(folder: Path) -> None:
    """Both are done, and the file is one's or the other's."""
    processes = [
        subprocess.Popen(
            [*COMMAND, name, "-o", OUT, "-q", "-f"], cwd=folder, stderr=subprocess.PIPE
        )
        for name in INPUTS[:2]
    ]
    for process in processes:
        _, err = process.communicate()
        assert (process.returncode, err) == (0, b"")
    found = load(folder / OUT)
    assert_same(found, weights(0 if torch.equal(found["c"], weights(0)["c"]) else 1))
    assert sorted(path.name for path in folder.iterdir()) == sorted([*INPUTS, OUT])


@fault(106, "stdout closed, unread or no terminal", "averaged; no bars in logs")
@pytest.mark.parametrize("how", ["closed", "unread", "full"])
def test_nobody_reads_stdout(folder: Path, how: str) -> None:
    """Whatever stdout is, the output is there, and stderr is empty: no bar, no complaint."""
    arguments = [*COMMAND, *INPUTS, "-o", OUT]
    if how == "closed":
        ended = subprocess.run(
            ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *arguments], cwd=folder, capture_output=True
        )
    else:
        reading, writing = os.pipe()
        os.close(reading)
        if how == "full":
            os.close(writing)
            writing = os.open("/dev/full", os.O_WRONLY)
        ended = subprocess.run(arguments, cwd=folder, stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
    if how == "full":
        assert (ended.returncode, ended.stderr) == (
            1,
            b"error: standard output: cannot be written: No space left on device."
            b" out.pt is written.\n",
        )
    else:
        assert (ended.returncode, ended.stderr) == (0, b"")
    assert_same(load(folder / OUT), means())


MODULE = """
import torch
from torch import nn

def model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

def breaks():
    yield torch.ones(8, 3)
    yield torch.ones(8, 3)
    raise OSError("the disk of the data is gone")

def nothing(): return []
def not_numbers(): return [torch.ones(8, 3), torch.full((8, 3), float("nan"))]
"""


@fault(107, "the loader raises, is empty, gives NaN", "refused with the batch's number")
@pytest.mark.parametrize(
    ("loader", "says"),
    [
        ("breaks", "batch 2: OSError: the disk of the data is gone"),
        ("nothing", "no batch"),
        ("not_numbers", "batch 1: "),
    ],
)
def test_loader_that_fails(tmp_path: Path, loader: str, says: str) -> None:
    """No old output is replaced; without checkpoints, the one that is there stays as it was."""
    (tmp_path / "mod.py").write_text(MODULE)
    for seed in range(2):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        torch.save(network.state_dict(), tmp_path / f"{seed}.pt")
    quiet = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    bn = ("--recompute-bn", "--data", f"mod:{loader}")
    refused(tmp_path, "?.pt", *bn, says=says, env=quiet)
    if loader == "breaks":
        refused(tmp_path, "-o", "0.pt", "--force", *bn, says=says, env=quiet)
