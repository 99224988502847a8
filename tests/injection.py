"""The real command with faults put into it, hundreds of times in little time.

A process that has imported what the command imports waits for orders, and forks a child for
each: the
child is the command from its entry point on. Between it and the C library lies
`injection.c`, which counts the calls that change files and does harm at the N-th. Run
as a program this module is that process.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from preloaded import ended, import_shared, imports_of

HERE = Path(__file__).parent
NONE, SIGNAL, HALF, FAIL, FLIP = range(5)


@dataclass(frozen=True)
class Fault:
    """What happens at which call.

    Attributes:
        when: At the N-th call that counts; 0 is never.
        action: NONE, SIGNAL before the call, HALF of a write and then the signal, FAIL, or
            FLIP a bit of what is written.
        value: The number of the signal, of the error or of the bit.
        call: The only one that counts (open, fallocate, write, fsync, chmod, rename,
            exchange, mkdir, unlink); by default all do. `look`, the opening of a file to
            read, counts only where it is named here.
        without: A call that the system does not know.
        file_size: The most bytes that a file may have, or None.
    """

    when: int = 0
    action: int = NONE
    value: int = 0
    call: str = ""
    without: str = ""
    file_size: int | None = None


SOUND = Fault()


@dataclass(frozen=True)
class Ended:
    """How a command ended: as a shell would say it, what it printed, and its calls."""

    code: int
    out: str
    err: str
    calls: tuple[tuple[str, str], ...]


class Commands:
    """Runs the command, with faults."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None or sys.platform != "linux":
            raise LookupError("no C compiler")
        self._library = folder / "faults.so"
        source = str(HERE / "injection.c")
        options = ["-shared", "-fPIC", "-o", self._library, source, "-ldl"]
        subprocess.run([compiler, *options], check=True)
        self._servers: dict[tuple[str, ...], subprocess.Popen[str]] = {}
        self._started: dict[int, subprocess.Popen[str]] = {}

    def start(self, folder: Path, *arguments: str, fault: Fault = SOUND) -> int:
        """Start the command in a folder, below which calls count; return its process id."""
        order = {"folder": str(folder), "arguments": arguments, **asdict(fault)}
        server = self._server(imports_of(arguments))
        process = int(_asked(server, order))
        self._started[process] = server
        return process

    def wait(self, process: int) -> Ended:
        """Wait until a command has ended, or was stopped by SIGSTOP."""
        answer = json.loads(_asked(self._started[process], {"wait": process}))
        calls = tuple(tuple(line.split(" ", 1)) for line in answer.pop("log").splitlines())
        return Ended(**answer, calls=calls)  # type: ignore[arg-type]

    def run(self, folder: Path, *arguments: str, fault: Fault = SOUND) -> Ended:
        """Run the command to its end."""
        return self.wait(self.start(folder, *arguments, fault=fault))

    def close(self) -> None:
        for server in self._servers.values():
            server.communicate()

    def _server(self, imports: tuple[str, ...]) -> subprocess.Popen[str]:
        """Return the process that has imported these modules, started when it is needed."""
        if imports not in self._servers:
            self._servers[imports] = subprocess.Popen(
                [sys.executable, "-B", __file__, self._library, *imports],
                env={**os.environ, "LD_PRELOAD": str(self._library)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._servers[imports]


def _asked(server: subprocess.Popen[str], order: dict[str, Any]) -> str:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(order) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


def serve(library: str, imports: list[str]) -> None:
    """Take orders until there are no more."""
    import_shared(imports)
    started: dict[int, list[int]] = {}
    for line in iter(sys.stdin.readline, ""):
        order = json.loads(line)
        if "wait" in order:
            answer: object = waited(order["wait"], started)
        else:
            files = [os.memfd_create(name) for name in ("out", "err", "log")]
            process = os.fork()
            if not process:
                become(order, library, *files)
            started[process] = files
            answer = process
        print(json.dumps(answer), flush=True)


def waited(process: int, started: dict[int, list[int]]) -> dict[str, object]:
    """Return how a child ended or that it was stopped."""
    status = os.waitpid(process, os.WUNTRACED)[1]
    code = os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
    found: dict[str, object] = {"code": code}
    for name, file in zip(("out", "err", "log"), started[process], strict=True):
        found[name] = os.pread(file, 1 << 24, 0).decode(errors="replace")
        if not os.WIFSTOPPED(status):
            os.close(file)
    return found


def become(order: dict[str, Any], library: str, out: int, err: int, log: int) -> None:
    """Make this process the command that was ordered, to its end."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(order["folder"])
    sys.argv = ["swa-avg", *order["arguments"]]
    if order["file_size"] is not None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"], before[1]))
        # Not for who measures coverage: what was registered later, our own, is called earlier.
        atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    texts = (os.fsencode(order["folder"]), order["call"].encode(), order["without"].encode())
    numbers = (ctypes.c_long(order["when"]), order["action"], order["value"], log)
    ctypes.CDLL(library).faults_arm(*texts, *numbers)
    os._exit(ended())


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
