"""The laws of working side by side: the same results, the same errors, nobody left behind."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import preloaded
import pytest
from command import COMMAND, one_line, snapshot
from kernel.test_memory import write_sparse

from swa_avg.errors import FormatError, SwaAvgError
from swa_avg.kernel import workers
from swa_avg.kernel.workers import in_threads

WAYS = [workers.in_threads, workers.in_processes]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: descendants without a parent become own children
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@ways
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_task_is_done_once(way: Any, count: int, workers: int) -> None:
    """Each number comes with what came of it, whoever did it and in whatever order."""
    with way(lambda number: [number, number**2], count, workers) as results:
        assert sorted(results) == [(n, [n, n**2]) for n in range(count)]


@ways
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_earliest_failure_is_raised(way: Any, workers: int) -> None:
    """Though a later task has failed before it: which error is shown is not chance."""
    event: Any = (threading if way is in_threads else multiprocessing).Event()

    def do(number: int) -> None:
        if number == 2:
            assert workers == 1 or event.wait(60)
            raise FormatError("two", file="a.pt", tensor="w", expected="one")
        if number == 3:
            event.set()
            raise FormatError("three")

    with pytest.raises(FormatError, match="two") as refused, way(do, 9, workers) as results:
        for _ in results:
            pass
    assert vars(refused.value) == vars(FormatError("two", file="a.pt", tensor="w", expected="one"))


def test_a_mistake_of_ours_comes_with_its_traceback() -> None:
    """What no user can mend is told as it happened in the process."""
    with (
        pytest.raises(RuntimeError, match=r"(?s)Traceback .* in blunder\n.*KeyError: 1"),
        workers.in_processes(blunder, 3, 2) as results,
    ):
        list(results)


def blunder(number: int) -> object:
    return {0: "first"}[number]


def test_killed_process_is_told() -> None:
    """Instead of being waited for."""

    def do(number: int) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        pytest.raises(SwaAvgError, match=r"died \(exit code -9\)"),
        workers.in_processes(do, 5, 2) as results,
    ):
        list(results)
    assert not multiprocessing.active_children()


def test_nobody_is_left_when_results_are_not_wanted_any_more() -> None:
    """Leaving the context ends processes that still work."""
    with pytest.raises(KeyError), workers.in_processes(lambda _: signal.pause(), 5, 2):
        assert len(multiprocessing.active_children()) == 2
        raise KeyError
    assert not multiprocessing.active_children()


def test_no_forks_beside_a_thread() -> None:
    """A forked process would wait for ever for a lock that another thread had."""
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    assert not workers.can_fork()
    stop.set()
    thread.join()


# The command.

# Says how many processes it has forked, which this process's own threads would prevent.
SAME = """
import os, sys, torch
import swa_avg
from swa_avg.averaging.prepare import planned
from swa_avg.kernel import mean, tasks
from swa_avg.storage import AtomicFile
from pathlib import Path

forks = []
tasks._LEAST_TASK_BYTES = 1000
os.register_at_fork(after_in_parent=lambda: forks.append(1))
sys.path.insert(0, sys.argv[1])
from kernel.test_mean import model, saved

paths = saved(Path(), [model(seed) for seed in range(4)])
for name, worth in (("threads", 1 << 60), ("processes", 0)):
    mean._WORTH_FORKING = worth
    swa_avg.average(paths, f"{name}.pt", threads=3)
    with planned(paths, f"{name}_last.pt") as averaging:
        files = [AtomicFile(Path(f"{name}_{k}.pt"), averaging.layout.size) for k in range(4)]
        outcome = averaging.compute(files[-1], partials=files[:-1], threads=2)
        for file in files:
            file.commit()
            file.__exit__()
    print(len(forks), outcome.bytes_read, outcome.checksums, outcome.partial_checksums)
"""


def test_processes_write_the_bytes_that_threads_write(tmp_path: Path) -> None:
    """Of tensors of all kinds, of the means of the last k too."""
    tests = str(Path(__file__).parents[1])
    ended = preloaded.run(tmp_path, (tests,), os.environ, 100, SAME, preloaded.TORCH)
    assert ended.returncode == 0, ended.stderr
    (none, *rest), (some, *same) = (line.split(" ", 1) for line in ended.stdout.splitlines())
    assert (none, rest) == ("0", same) and int(some) == 5
    for name in ("{}.pt", *(f"{{}}_{k}.pt" for k in range(4))):
        one, other = (tmp_path / name.format(way) for way in ("threads", "processes"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Four checkpoints of 60 MB: worth forking."""
    write_sparse(tmp_path, 4, 3, 5_000_000)
    return tmp_path


class Running:
    """The command while it averages: one of its two processes stands still."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before = snapshot(folder)
        self.process = subprocess.Popen(
            [*COMMAND, *sorted(path.name for path in folder.glob("?.pt")), "-o", "out.pt"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while not (children := self.children()):
            assert self.process.poll() is None
        self.stopped = children[0]
        os.kill(self.stopped, signal.SIGSTOP)
        while len(self.children()) < 2:
            assert self.process.poll() is None

    def children(self) -> list[int]:
        """Return the processes that it has forked, and that live."""
        pid = self.process.pid
        with suppress(OSError):
            return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        return []

    def ended(self) -> subprocess.CompletedProcess[str]:
        """Wait for it; everything but what it was told to write is as it was."""
        out, err = self.process.communicate(timeout=60)
        # Its workers have closed these pipes by now. They are this process's children since their
        # parent has ended (see `running`), so the end of each can be awaited.
        with suppress(ChildProcessError):
            while True:
                os.waitpid(-self.process.pid, 0)
        assert not self.alive()
        return subprocess.CompletedProcess([], self.process.returncode, out, err)

    def alive(self) -> bool:
        """Tell whether any process of its session lives."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture
def running(inputs: Path) -> Iterator[Running]:
    adopts = ctypes.CDLL(None).prctl
    adopts(SUBREAPER, 1)
    made = Running(inputs)
    yield made
    with suppress(ProcessLookupError):
        os.killpg(made.process.pid, signal.SIGKILL)
    adopts(SUBREAPER, 0)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGHUP, 129, ""), (signal.SIGTERM, 143, "")],
)
def test_signal_to_all_ends_all(
    running: Running, number: signal.Signals, code: int, says: str
) -> None:
    """As a terminal sends them: one line at most, and nothing is left."""
    os.killpg(running.process.pid, number)
    ended = running.ended()
    assert (ended.returncode, ended.stderr, ended.stdout) == (code, says, "")
    assert snapshot(running.folder) == running.before


def test_killed_worker_ends_the_command(running: Running) -> None:
    """As the system does it where memory runs out: an error, and nothing is left."""
    os.kill(running.stopped, signal.SIGKILL)
    line = one_line(running.ended())
    assert "died (exit code -9). If the machine ran out of memory, use --threads 1" in line
    assert snapshot(running.folder) == running.before
    inputs = sorted(path.name for path in running.folder.glob("?.pt"))
    for name, threads in (("out.pt", "1"), ("two.pt", "2")):
        again = [*COMMAND, *inputs, "-o", name, "--threads", threads, "-q"]
        assert subprocess.run(again, cwd=running.folder).returncode == 0
    assert (running.folder / "out.pt").read_bytes() == (running.folder / "two.pt").read_bytes()


def test_workers_end_when_the_command_is_killed(running: Running) -> None:
    """By themselves, though nobody is left to tell them; the next run clears up."""
    running.process.kill()
    os.kill(running.stopped, signal.SIGCONT)
    running.process.communicate(timeout=60)  # until nobody is left who could say anything
    left = snapshot(running.folder).keys() - running.before.keys()
    assert len(left) == 1 and not (running.folder / "out.pt").exists()
    again = subprocess.run([*COMMAND, "0.pt", "1.pt", "-o", "out.pt", "-q"], cwd=running.folder)
    assert again.returncode == 0
    made = {str(running.folder / "out.pt")}
    assert snapshot(running.folder).keys() - running.before.keys() == made


def test_damage_is_found_by_processes(inputs: Path) -> None:
    """The same line as from one thread, and nothing is left."""
    with (inputs / "2.pt").open("r+b") as file:
        file.seek(30_000_000)
        file.write(b"\x01")
    before = snapshot(inputs)
    lines = {
        one_line(
            subprocess.run(
                [*COMMAND, "0.pt", "1.pt", "2.pt", "-o", "out.pt", "--threads", threads],
                cwd=inputs,
                capture_output=True,
                text=True,
            )
        )
        for threads in ("1", "2", "3")
    }
    assert len(lines) == 1 and "2.pt: w1: is damaged" in lines.pop()
    assert snapshot(inputs) == before
