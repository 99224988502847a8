"""Inputs that change while they are read: refused, or averaged as they were; never mixed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import stored
import torch
from folders import COPIED
from injection import SIGNAL, Commands, Ended, Fault
from safetensors.torch import save, save_file

import swa_avg
from swa_avg.errors import FileError, SwaAvgError
from swa_avg.storage.files import InputFile

ALL = os.environ.get("SWA_AVG_FAULTS") == "all"  # else a bounded number of moments
SUFFIXES = (".pt", ".safetensors")
SIZE = 200_000  # elements: more than are read at once


def write(path: Path, value: float, size: int = SIZE) -> None:
    """Save a checkpoint in which every number is `value`, in the file that is there."""
    state = {"a": torch.full((size,), value), "b": torch.full((size,), value)}
    torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)


def overwritten(path: Path) -> None:
    """As torch.save does: the same file, from its start."""
    with path.open("r+b") as file:
        new = path.with_name("new" + path.suffix)
        write(new, 9.0)
        file.write(new.read_bytes()[: path.stat().st_size])
        new.unlink()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replaced(path: Path) -> None:
    """As careful trainers do: another file takes the name."""
    write(path.with_name("new" + path.suffix), 9.0)
    path.with_name("new" + path.suffix).replace(path)


CHANGES: dict[str, tuple[Callable[[Path], None], bool]] = {
    "overwritten": (overwritten, False),
    "cut": (cut, False),
    "grown": (grown, False),
    "replaced": (replaced, True),
    "removed": (Path.unlink, True),
}


def assert_means_of(path: Path, value: float) -> None:
    found = stored.tensors(path)
    assert found.keys() == {"a", "b"}
    assert all(bool((tensor == value).all()) for tensor in found.values())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("at", [1, 3])
def test_input_that_changes_in_the_middle(tmp_path: Path, suffix: str, name: str, at: int) -> None:
    """Changed when the first and when a later piece has been read; the whole old one, or none."""
    change, right = CHANGES[name]
    for number in range(3):
        write(tmp_path / f"{number}{suffix}", float(number), 5 * SIZE)
    pieces = 0

    def progress(now: swa_avg.Progress) -> None:
        nonlocal pieces
        read = now.step == "averaging" and now.done > 0
        pieces += read
        if read and pieces == at:
            change(tmp_path / f"1{suffix}")

    options = {"threads": 1, "progress": progress}
    if right:
        swa_avg.average(f"{tmp_path}/[0-2]{suffix}", tmp_path / "out.pt", **options)
        assert_means_of(tmp_path / "out.pt", 1.0)
    else:
        with pytest.raises(SwaAvgError, match=rf"1{suffix}: .*") as refused:
            swa_avg.average(f"{tmp_path}/[0-2]{suffix}", tmp_path / "out.pt", **options)
        changed = "changed while being read" in str(refused.value)
        assert changed or (suffix == ".pt" and "is damaged" in str(refused.value))
        assert not (tmp_path / "out.pt").exists()
        if changed and name == "overwritten":  # the run has finished writing it
            says = "Wait until the run has finished writing it, then run the command again."
            assert refused.value.of_command().endswith(says)
            write(tmp_path / f"1{suffix}", 4.0, 5 * SIZE)
            swa_avg.average(f"{tmp_path}/[0-2]{suffix}", tmp_path / "out.pt")
            assert_means_of(tmp_path / "out.pt", 2.0)
    assert pieces >= at
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", CHANGES)
def test_command_whose_input_changes(
    tmp_path: Path, commands: Commands, suffix: str, name: str
) -> None:
    """The real command, stopped at each of its writes in turn while the input changes."""
    change, right = CHANGES[name]
    (tmp_path / "out").mkdir()
    sources = [str(tmp_path / f"{number}{suffix}") for number in range(3)]
    arguments = (*sources, "-o", "swa.pt", "-f", "--threads", "1")

    def save_all() -> None:
        for number in range(3):
            write(tmp_path / f"{number}{suffix}", float(number))

    save_all()
    undisturbed = commands.run(tmp_path / "out", *arguments)
    writes = [call for call, _ in undisturbed.calls].count("write")
    assert (undisturbed.code, writes > 4) == (0, True)
    for at in range(1, writes + 1, 1 if ALL else 4):
        save_all()
        stop = Fault(at, SIGNAL, signal.SIGSTOP, call="write")
        process = commands.start(tmp_path / "out", *arguments, fault=stop)
        assert commands.wait(process).code == signal.SIGSTOP
        change(Path(sources[1]))
        os.kill(process, signal.SIGCONT)
        ended: Ended = commands.wait(process)
        if right:
            assert ended.code == 0
            assert_means_of(tmp_path / "out" / "swa.pt", 1.0)
            continue
        assert ended.code == 1
        assert ended.err.startswith(f"error: {sources[1]}: "), ended.err
        assert ended.err.count("\n") == 1
        assert not list((tmp_path / "out").glob(".*"))


def test_writer_beside_the_command(tmp_path: Path, commands: Commands) -> None:
    """A trainer that saves without pause: each outcome is one of its checkpoints, or refused."""
    code = (
        "import os, sys, torch\n"
        "path, n = sys.argv[1], 0\n"
        "while True:\n"
        "    n += 1\n"
        f"    state = {{k: torch.full(({SIZE},), float(n % 7)) for k in 'ab'}}\n"
        "    if n % 3:\n"
        "        torch.save(state, path)\n"
        "    else:\n"
        "        torch.save(state, path + '.new')\n"
        "        os.replace(path + '.new', path)\n"
        "    if n == 3:\n"
        "        print('running', flush=True)\n"
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    path = tmp_path / "in" / "last.pt"
    trainer = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "running\n"
    codes = []
    try:
        for _ in range(200 if ALL else 15):
            ended = commands.run(tmp_path / "out", str(path), "-o", "swa.pt", "-f")
            codes.append(ended.code)
            assert ended.code in (0, 1), ended
            if ended.code:
                assert ended.err.startswith(f"error: {path}"), ended.err
                assert ended.err.count("\n") == 1
                continue
            found = stored.tensors(tmp_path / "out" / "swa.pt")
            assert_means_of(tmp_path / "out" / "swa.pt", found["a"][0].item())
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    print(f"{codes.count(0)} right, {codes.count(1)} refused")


@pytest.mark.parametrize("kind", COPIED)
def test_copied_checkpoint_that_changes(tmp_path: Path, kind: str) -> None:
    """Any file of the last, with weights or only copied: refused when the headers are written.

    So is a file of weights of an earlier checkpoint. The old output stays, and nothing else.
    """
    save, name = COPIED[kind]
    paths = [tmp_path / name.format(number) for number in (1, 2)]
    for number, path in enumerate(paths, 1):
        save(path, {"a": torch.full((2, 90), float(number)), "n.bias": torch.ones(3)}, number)
    output = tmp_path / ("out.nemo" if kind == "nemo" else "out")
    swa_avg.average(paths, output, keep_wrapper=True)
    before = stored.content(output)
    last = sorted(path for path in (paths[1], *paths[1].rglob("*")) if path.is_file())
    assert len(last) > (kind != "nemo")
    # The first file of weights of the other checkpoint, which is read only for these.
    named = [path for path in last if "model" in path.name or path.suffix == ".distcp"]
    others = [paths[0] / path.relative_to(paths[1]) for path in named if path.suffix != ".yaml"]
    for path in (*last, *(others[:1] if kind != "nemo" else paths[:1])):
        sound = path.read_bytes()
        steps = set()

        def change(now: swa_avg.Progress, path: Path = path, steps: set[str] = steps) -> None:
            if now.step == "writing headers" and now.step not in steps:
                with path.open("r+b") as file:
                    file.write(bytes(8))
            steps.add(now.step)

        with pytest.raises(SwaAvgError, match="changed while being read") as refused:
            swa_avg.average(paths, output, keep_wrapper=True, force=True, progress=change)
        assert str(path) in str(refused.value)
        assert stored.content(output) == before
        assert {entry.name for entry in tmp_path.iterdir()} == {
            output.name, *(one.name for one in paths)
        }  # fmt: skip
        path.write_bytes(sound)
    swa_avg.average(paths, output, keep_wrapper=True, force=True)
    assert stored.content(output) == before


def test_write_in_the_same_tick_is_told_from_the_last_one(tmp_path: Path) -> None:
    """A file of this moment is opened when the clock of the file system has gone on."""
    path = tmp_path / "x"
    for precise in (True, False):
        path.write_bytes(b"x")
        now = time.time_ns()
        at = now if precise else now // 10**9 * 10**9
        os.utime(path, ns=(at, at + (at % 10**9 == 0 and precise)))
        file = InputFile(path)
        assert time.time_ns() - at >= (20_000_000 if precise else 2 * 10**9)
        file.close()


def test_file_that_is_always_being_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was written to again, however often one waits, is not read at all."""
    path = tmp_path / "x"
    path.write_bytes(b"x")
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(path))
    with pytest.raises(FileError, match="x: is being written to") as refused:
        InputFile(path)
    assert "Wait until the run has finished writing it" in str(refused.value)
    monkeypatch.undo()
    InputFile(path).close()


def test_shard_that_is_replaced_between_two(tmp_path: Path, commands: Commands) -> None:
    """Shards of two moments are never taken for one checkpoint: stopped before each opening."""
    sound = '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    outcomes = set()
    at = 0
    while True:
        at += 1
        folder = tmp_path / f"in{at}"
        folder.mkdir()
        (folder / "model.safetensors.index.json").write_text(sound)
        for number, name in ((1, "a"), (2, "b")):
            save_file({name: torch.ones(4)}, folder / f"{number}.safetensors")
        (tmp_path / f"out{at}").mkdir()
        stop = Fault(at, SIGNAL, signal.SIGSTOP, call="look")
        arguments = (str(folder), "-o", f"../out{at}/swa.safetensors")
        process = commands.start(folder, *arguments, fault=stop)
        ended = commands.wait(process)
        if ended.code != signal.SIGSTOP:
            break
        for number, name in ((1, "a"), (2, "b")):
            (folder / "new").write_bytes(save({name: torch.zeros(4)}))
            (folder / "new").replace(folder / f"{number}.safetensors")
        os.kill(process, signal.SIGCONT)
        ended = commands.wait(process)
        if ended.code:
            assert "was replaced while its folder was being read" in ended.err
            assert "Wait until the run has finished writing it" in ended.err
            assert commands.run(folder, *arguments).code == 0
            outcomes.add("refused")
        else:
            found = stored.tensors(tmp_path / f"out{at}" / "swa.safetensors")
            assert torch.equal(found["a"], found["b"])
            outcomes.add(f"all {found['a'][0]:g}")
    assert "refused" in outcomes
    assert ended.code == 0
