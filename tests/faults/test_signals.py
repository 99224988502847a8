"""Signals at moments that are known exactly: one line at most, the documented code, nothing left.

The moment is an import, a request that a server has received, or a batch that a loader
worker has begun: no test waits for a time to pass.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from command import OLD, OUT, fault, snapshot
from preloaded import Started
from torch import nn

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SAID = {signal.SIGINT: "interrupted\n", signal.SIGTERM: "", signal.SIGHUP: ""}

# The command, which sends itself three signals when it is about to import a module.
AT_IMPORT = """
import os, sys

module, number = sys.argv[1], int(sys.argv[2])

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            for _ in range(3):
                os.kill(os.getpid(), number)

sys.meta_path.insert(0, Sender())
from swa_avg.__main__ import main
sys.argv[1:] = sys.argv[3:]
main_of = main
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints of a small network with BatchNorm, and an old output."""
    for seed in range(3):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        torch.save(network.state_dict(), tmp_path / f"{seed}.pt")
    (tmp_path / OUT).write_bytes(OLD)
    return tmp_path


def assert_ended(
    process: subprocess.Popen[str] | Started, number: signal.Signals, folder: Path, before: object
) -> None:
    """The command has ended as it documents, and the folder is as it was."""
    out, err = process.communicate(timeout=120)  # ends when nobody has its pipes any more
    assert (process.returncode, out, err) == (CODES[number], "", SAID[number])
    assert kept(folder) == before


def kept(folder: Path) -> dict[str, object]:
    """Return all that is in a folder but for its FIFOs, which have times of their own."""
    found = snapshot(folder)
    return {path: what for path, what in found.items() if not Path(path).is_fifo()}


def started(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    """Start a program in a process group of its own."""
    return subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, **options,
    )  # fmt: skip


@fault(140, "Ctrl-C, SIGTERM, SIGHUP at start-up, three times", "exit 130, 143, 129; one line")
@pytest.mark.parametrize("number", CODES)
def test_signals_from_the_first_instruction_on(folder: Path, number: signal.Signals) -> None:
    """Three signals at an import: of the first module of the command line, of the last one."""
    before = kept(folder)
    program = AT_IMPORT.replace("main_of = main", "main()")
    for module in ("swa_avg.cli", "click", "swa_avg.averaging", "swa_avg.kernel.mean"):
        arguments = (module, str(int(number)), "0.pt", "1.pt", "-o", OUT, "-f")
        process = started(folder, sys.executable, "-c", program, *arguments)
        assert_ended(process, number, folder, before)


@fault(141, "a signal that the caller ignores (nohup)", "ignored")
def test_ignored_signal_stays_ignored(folder: Path) -> None:
    """Who starts the command with nohup wants it to go on when the terminal closes."""
    program = AT_IMPORT.replace(
        "main_of = main", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); main()"
    )
    arguments = ("swa_avg.cli", str(int(signal.SIGHUP)), "0.pt", "1.pt", "-o", "new.pt")
    process = started(folder, sys.executable, "-c", program, *arguments)
    _, err = process.communicate()
    assert (process.returncode, (folder / "new.pt").exists()) == (0, True), err


WORKERS = """
import os
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

def model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

class Waits(Dataset):
    def __len__(self): return 64
    def __getitem__(self, number):
        with open("begun", "w") as fifo:
            fifo.write("x")
        open("never").read()

loader = DataLoader(Waits(), batch_size=8, num_workers=2)
"""


def begun(folder: Path) -> None:
    """Return when the user's code has come to where it waits."""
    with (folder / "begun").open() as fifo:
        assert fifo.read(1) == "x"


@fault(142, "a signal to the process group, with loader workers", "one line, no worker left")
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("to_all", [True, False])
def test_signals_with_loader_workers(folder: Path, number: signal.Signals, to_all: bool) -> None:
    """Three signals to the command, or to all its processes, while workers make a batch."""
    (folder / "mod.py").write_text(WORKERS)
    for name in ("begun", "never"):
        os.mkfifo(folder / name)
    before = kept(folder)
    bn = ("--recompute-bn", "--data", "mod:loader")
    process = Started(folder, ("0.pt", "1.pt", "-o", OUT, "-f", *bn), os.environ)
    begun(folder)
    for _ in range(3):
        (os.killpg if to_all else os.kill)(process.pid, number)
    assert_ended(process, number, folder, before)


CATCHES = """
import torch
from torch import nn

def model(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

def wait():
    with open("begun", "w") as fifo:
        fifo.write("x")
    open("never").read()

def goes_on():
    try:
        wait()
    except BaseException:
        pass
    yield torch.randn(8, 3)

def stays():
    while True:
        try:
            wait()
        except BaseException:
            open("never").read()
"""


@fault(143, "the user's code catches the signal's exception", "nothing is written; it ends")
@pytest.mark.parametrize("loader", ["goes_on", "stays"])
def test_user_code_that_catches_everything(folder: Path, loader: str) -> None:
    """Statistics without a batch are not written; a loader that waits on is not waited for."""
    (folder / "mod.py").write_text(CATCHES)
    for name in ("begun", "never"):
        os.mkfifo(folder / name)
    before = kept(folder)
    bn = ("--recompute-bn", "--data", f"mod:{loader}")
    process = Started(folder, ("0.pt", "1.pt", "-o", OUT, "-f", *bn), os.environ)
    begun(folder)
    process.send_signal(signal.SIGINT)
    assert_ended(process, signal.SIGINT, folder, before)


class Stalls(BaseHTTPRequestHandler):
    """Serves files in ranges; where a range is `stalled`, it says so and never answers."""

    protocol_version = "HTTP/1.1"
    folder: Path
    stalled: range
    reached: threading.Event
    release: threading.Event

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        data = (self.folder / self.path.strip("/")).read_bytes()
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            if first in self.stalled:
                self.reached.set()
                self.release.wait()
                return
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[first : last + 1]
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def stalling(folder: Path, stalled: range) -> Iterator[tuple[str, threading.Event]]:
    """A server, and what is set when it does not answer a request."""
    reached, release = threading.Event(), threading.Event()
    names = {"folder": folder, "stalled": stalled, "reached": reached, "release": release}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Of", (Stalls,), names))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", reached
    finally:
        release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@fault(144, "a server stalls, and a signal comes", "ends at once")
@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("stalled", [range(1), range(1 << 17, 1 << 40)])
def test_signal_while_a_server_stalls(
    tmp_path: Path, number: signal.Signals, stalled: range
) -> None:
    """While headers are opened, or tensors read: the server is not waited for."""
    pytest.importorskip("aiohttp")
    served, place = tmp_path / "served", tmp_path / "place"
    served.mkdir()
    place.mkdir()
    for seed in range(3):
        torch.save({"w": torch.full((500_000,), float(seed))}, served / f"{seed}.pt")
    with stalling(served, stalled) as (url, reached):
        inputs = [f"{url}/{seed}.pt" for seed in range(3)]
        process = Started(place, (*inputs, "-o", OUT), os.environ)
        assert reached.wait(120)
        process.send_signal(number)
        assert_ended(process, number, place, {})
