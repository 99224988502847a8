"""Killed, failed or out of room at any moment: the old output whole, or the new one.

The real command, with real system calls that are counted and made to fail
(`faults.py`). With SWA_AVG_FAULTS=all every moment is tried with every signal, else
a bounded number of them; `python -m pytest -s tests/test_crash.py` prints how many.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from folders import save_accelerate, save_chunks, save_deepspeed, save_nemo
from injection import FAIL, HALF, SIGNAL, Commands, Ended, Fault
from safetensors.torch import save_file
from stored import content

ALL = os.environ.get("SWA_AVG_FAULTS") == "all"
HALVES = [((0, 0), (40, 50)), ((0, 50), (40, 40))]
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
FORMS = ("file", "folder")
# Copies of the last checkpoint: a folder that several ranks wrote, a folder with a sub-folder, a
# folder of several models, and an archive.
COPIES = ("ranks", "deepspeed", "accelerate", "nemo")
ALL_FORMS = (*FORMS, *COPIES)
# Of how many calls one is tried.
STEPS = {"file": 1, "folder": 1, "ranks": 3, "deepspeed": 5, "accelerate": 8, "nemo": 4}
# SIGTERM and SIGINT go the same way: of copies, the one over an old output, the other without.
KILLED = [
    (form, number, old)
    for form in ALL_FORMS
    for number in CODES
    for old in (True, False)
    if ALL or form in FORMS or number == signal.SIGKILL or old == (number == signal.SIGTERM)
]
KEEP = {"ranks": ["--keep-wrapper"], "accelerate": ["--keep-wrapper"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files and folders of two kinds, and what their averages look like."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = {"a": torch.randn(40, 90), "b": torch.randn(70, 30), "n": torch.tensor(seed)}
        torch.save(state, folder / f"{seed}.pt")
        (folder / str(seed)).mkdir()
        save_file(state, folder / str(seed) / "model.safetensors", {"format": "pt"})
        (folder / str(seed) / "config.json").write_text(json.dumps({"seed": seed}))
        save_chunks(folder / f"ranks{seed}", {"a": state["a"]}, {"a": HALVES})
        save_deepspeed(folder / f"deepspeed{seed}", state, seed)
        save_accelerate(folder / f"accelerate{seed}", {"a": state["a"]}, seed)
        save_nemo(folder / f"nemo{seed}.nemo", state, seed)
    return folder


class Case:
    """A folder to write in, with an old output there or none, and how to write a new one."""

    def __init__(self, commands: Commands, inputs: Path, place: Path, form: str) -> None:
        self.commands = commands
        self.place, self.form = place, form
        name = {"file": "swa.pt", "nemo": "swa.nemo"}.get(form, "swa")
        names = {"file": "{}.pt", "folder": "{}", "nemo": "nemo{}.nemo"}
        sources = [str(inputs / names.get(form, form + "{}").format(n)) for n in (1, 2)]
        kept = KEEP.get(form, [])
        shards = ["--max-shard-size", "10KB"] if form == "folder" else kept
        self.target = place / name
        self.arguments = [*sources, "-o", name, "-f", "--threads", "1", *shards]
        self.inputs = inputs
        self.before = content(inputs)
        assert self.run().code == 0
        self.new = content(self.target)
        self.reset(old=False)
        # The old one is another: only one of the inputs.
        assert commands.run(place, *sources[:1], "-o", name, *kept).code == 0
        self.old = content(self.target)
        self.backup = Path(tempfile.mkdtemp(dir=inputs.parent)) / name
        shutil.move(self.target, self.backup)

    def reset(self, old: bool) -> None:
        """Empty the place, but for the old output, if there is to be one."""
        for path in self.place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if old:
            copy = shutil.copytree if self.backup.is_dir() else shutil.copy2
            copy(self.backup, self.target)

    def run(self, fault: Fault = Fault()) -> Ended:  # noqa: B008
        return self.commands.run(self.place, *self.arguments, fault=fault)

    def found(self) -> str:
        """Return what the output is."""
        there = content(self.target)
        kinds = {"old": self.old, "new": self.new, "none": {}}
        return next((kind for kind, whole in kinds.items() if whole == there), "neither")

    def left(self) -> list[str]:
        """Return what else is in the folder."""
        return [path.name for path in self.place.iterdir() if path != self.target]


@pytest.fixture
def case(request: pytest.FixtureRequest, commands: Commands, inputs: Path, tmp_path: Path) -> Case:
    return Case(commands, inputs, tmp_path, request.param)


def moments(case: Case, fault: Fault = Fault(), old: bool = True) -> list[str]:  # noqa: B008
    """Return the calls of an undisturbed run, in their order."""
    case.reset(old)
    ended = case.run(fault)
    assert (ended.code, case.found(), case.left()) == (0, "new", [])
    return [call for call, _ in ended.calls]


# Killed.


@pytest.mark.parametrize(("case", "number", "old"), KILLED, indirect=["case"])
def test_killed_at_any_call(case: Case, number: signal.Signals, old: bool) -> None:
    """Before each call in turn, and half-way through each write.

    The output is the old one whole or the new one whole. After a signal that can be
    caught nothing else is left; after SIGKILL the next run removes it.
    """
    kills = 0
    step = 1 if ALL else 2 if number == signal.SIGKILL else 4
    step *= 1 if ALL else STEPS[case.form]
    calls = moments(case, old=old)
    for action in (SIGNAL, HALF):
        for at, call in list(enumerate(calls, 1))[:: step if action == SIGNAL else 2 * step]:
            if action == HALF and call != "write":
                continue
            case.reset(old)
            ended = case.run(Fault(at, action, number))
            assert ended.code == CODES[number], (at, call, ended)
            assert "Traceback" not in ended.err
            assert case.found() in ("new", "old" if old else "none"), (at, call)
            assert len(case.left()) <= (number == signal.SIGKILL), (at, call)
            kills += 1
            if case.left():
                assert case.run().code == 0
                assert (case.found(), case.left()) == ("new", [])
    assert content(case.inputs) == case.before
    assert kills >= len(calls) / step
    print(f"{number.name}: {kills} kills at {len(calls)} calls")


@pytest.mark.parametrize("case", ["folder"], indirect=True)
def test_killed_where_folders_cannot_change_places(case: Case) -> None:
    """Without the exchange of two names, as on NFS: a whole folder is always there.

    Between two renames the old one has another name; nobody removes it.
    """
    calls = moments(case, Fault(without="exchange"))
    assert calls.count("rename") == 3  # one that finds the place taken, and two that work
    for at in range(1, len(calls) + 1) if ALL else range(calls.index("rename"), len(calls) + 1):
        case.reset(old=True)
        ended = case.run(Fault(at, SIGNAL, signal.SIGKILL, without="exchange"))
        assert ended.code == -9
        if not case.target.exists():
            (moved,) = case.place.glob(".swa-avg-*.old")
            assert content(moved) == case.old
            assert case.run(Fault(1, FAIL, errno.EIO, call="write")).code == 1
            assert case.left() == [moved.name]
        else:
            assert case.found() in ("old", "new")
        assert case.run().code == 0
        assert case.run().code == 0
        assert (case.found(), case.left()) == ("new", [])


# Refused by the system.


@pytest.mark.parametrize("case", ALL_FORMS, indirect=True)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_any_call_that_fails(case: Case, number: int) -> None:
    """One line that names the output and says why, exit code 1, and everything as it was."""
    calls = moments(case)
    failures = 0
    step = 1 if ALL else 2 if number == errno.ENOSPC else 4
    step *= 1 if ALL else STEPS[case.form]
    for at, call in list(enumerate(calls, 1))[::step]:
        if call == "unlink":
            continue  # of what is gone already, or will be removed by the next run
        case.reset(old=True)
        ended = case.run(Fault(at, FAIL, number))
        if call == "fsync" and "rename" in calls[:at]:
            assert case.found() == "new"
            assert "is written, but its name could not be synced to disk" in ended.err
        else:
            assert case.found() == "old", (at, call)
        assert ended.code == 1, (at, call)
        assert ended.err.startswith(f"error: {case.target.name}"), ended.err
        assert os.strerror(number) in ended.err
        assert ended.err.count("\n") == 1 and ".tmp" not in ended.err
        assert case.left() == []
        failures += 1
    assert content(case.inputs) == case.before
    print(f"{errno.errorcode[number]}: {failures} failed calls")


@pytest.mark.parametrize("case", ["folder"], indirect=True)
def test_rename_that_fails_puts_the_old_folder_back(case: Case) -> None:
    """Without the exchange of two names: whichever rename fails, the old folder has its name."""
    for number in (1, 2, 3):
        case.reset(old=True)
        ended = case.run(Fault(number, FAIL, errno.EIO, call="rename", without="exchange"))
        assert (ended.code, case.found(), case.left()) == (1, "old", [])
        assert os.strerror(errno.EIO) in ended.err
    case.reset(old=True)
    ended = case.run(Fault(1, FAIL, errno.EIO, call="exchange"))
    assert (ended.code, case.found(), case.left()) == (1, "old", [])


@pytest.mark.parametrize("case", ALL_FORMS, indirect=True)
def test_failed_fsync_is_not_tried_again(case: Case) -> None:
    """The kernel may have dropped what it could not write, and say yes the second time."""
    calls = moments(case)
    for number in range(1, calls.count("fsync") + 1):
        case.reset(old=True)
        ended = case.run(Fault(number, FAIL, errno.EIO, call="fsync"))
        paths = [path for _, path in ended.calls]
        assert ended.code == 1
        assert len(paths) == number
        assert paths.count(paths[-1]) == 1


@pytest.mark.parametrize("case", ALL_FORMS, indirect=True)
def test_everything_is_on_disk_before_it_has_its_name(case: Case) -> None:
    """After a power failure too: bytes, then names in the folder, then the name, then its folder.

    A file that is renamed before its bytes are on disk may be found empty.
    """
    case.reset(old=True)
    calls = case.run().calls
    renamed = max(at for at, (call, _) in enumerate(calls) if call in ("rename", "exchange"))
    written: dict[str, int] = {}
    synced: dict[str, int] = {}
    for at, (call, path) in enumerate(calls):
        if call in ("write", "fallocate", "open", "chmod"):
            assert at < renamed
            written[path] = at
            written[str(Path(path).parent)] = max(at, written.get(str(Path(path).parent), 0))
        if call == "fsync":
            synced[path] = at
    del written[str(case.place)]
    for path, at in written.items():
        assert at < synced[path] < renamed, path
    assert synced[str(case.place)] > renamed


# No room.


@pytest.mark.parametrize("case", FORMS, indirect=True)
@pytest.mark.parametrize("without", ["", "fallocate"])
def test_files_may_not_be_so_large(case: Case, without: str) -> None:
    """A limit of the size of files, at any size: found before the work, or in a write."""
    largest = max(map(len, case.new.values()))
    refusals = 0
    for limit in range(4096, largest, 1024 if ALL else 3000):
        case.reset(old=True)
        ended = case.run(Fault(file_size=limit, without=without))
        assert (ended.code, case.found(), case.left()) == (1, "old", [])
        assert ended.err.count("\n") == 1
        assert ended.err.startswith(f"error: {case.target.name}")
        assert "cannot be written: File too large" in ended.err
        assert any(call == "write" for call, _ in ended.calls) == bool(without)
        refusals += 1
    case.reset(old=True)
    assert case.run(Fault(file_size=largest, without=without)).code == 0
    assert case.found() == "new"
    print(f"{refusals} limits refused")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as refused:
        pytest.skip(f"may not mount a file system: {refused}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("without", ["", "fallocate"])
def test_disk_becomes_full(
    commands: Commands, inputs: Path, small_disk: Path, form: str, without: str
) -> None:
    """A real full disk, with less and less room: refused, and nothing left, until it fits."""
    place = small_disk / "place"
    place.mkdir()
    case = Case(commands, inputs, place, form)
    filler = small_disk / "filler"
    refusals = 0
    for free in count(0, 4096):
        case.reset(old=True)
        status = os.statvfs(small_disk)
        filler.write_bytes(bytes(status.f_bavail * status.f_frsize - free))
        ended = case.run(Fault(without=without))
        filler.unlink()
        if ended.code == 0:
            break
        assert (ended.code, case.found(), case.left()) == (1, "old", [])
        assert ended.err.startswith(f"error: {case.target.name}")
        assert "cannot be written: No space left on device" in ended.err
        refusals += 1
    assert case.found() == "new"
    assert refusals > 3
    print(f"{refusals} full disks refused")


# What is left over.


@pytest.mark.parametrize("case", FORMS, indirect=True)
def test_leftovers_go_with_the_next_run_to_the_same_output(case: Case) -> None:
    """Not with a run to another output in the folder, of whatever name; before room is made."""
    case.reset(old=False)
    assert case.run(Fault(4, SIGNAL, signal.SIGKILL)).code == -9
    (left,) = case.left()
    for other in ("other.pt", f"{case.target.name}.pt", "s.pt"):
        sources = [str(case.inputs / "1.pt"), str(case.inputs / "2.pt")]
        assert case.commands.run(case.place, *sources, "-o", other).code == 0
        assert left in case.left()
        (case.place / other).unlink()
    calls = [call for call, path in case.run().calls if path.startswith(str(case.place / left))]
    assert calls
    assert (case.found(), case.left()) == ("new", [])


@pytest.mark.parametrize("case", FORMS, indirect=True)
def test_run_that_is_alive_is_left_alone(case: Case) -> None:
    """Two runs to one output, the first stopped in the middle: both finish, and it is whole."""
    calls = moments(case)
    tried = range(2, len(calls) + 1, 1 if ALL else 4)
    for at in tried:
        case.reset(old=True)
        stop = Fault(at, SIGNAL, signal.SIGSTOP)
        first = case.commands.start(case.place, *case.arguments, fault=stop)
        assert case.commands.wait(first).code == signal.SIGSTOP
        assert case.run().code == 0
        assert case.found() == "new"
        os.kill(first, signal.SIGCONT)
        assert case.commands.wait(first).code == 0, (at, calls[at - 1])
        assert (case.found(), case.left()) == ("new", [])


def test_name_as_long_as_a_name_can_be(case_of_file: Case) -> None:
    """255 bytes are written, and so is what is left of a killed run; 256 are refused."""
    case = case_of_file
    sources = case.arguments[:2]
    longest = "é" * 126 + ".pt"
    assert len(longest.encode()) == 255
    killed = case.commands.run(
        case.place, *sources, "-o", longest, fault=Fault(4, SIGNAL, signal.SIGKILL)
    )
    assert killed.code == -9
    assert case.commands.run(case.place, *sources, "-o", longest).code == 0
    assert [path.name for path in case.place.iterdir()] == [longest]
    ended = case.commands.run(case.place, *sources, "-o", f"x{longest}")
    assert (ended.code, ended.calls) == (1, ())
    assert "File name too long" in ended.err


@pytest.fixture
def case_of_file(commands: Commands, inputs: Path, tmp_path: Path) -> Case:
    return Case(commands, inputs, tmp_path, "file")
