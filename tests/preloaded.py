"""The command in a process that is forked from one that has imported its modules already.

Most tests run the command, and importing torch takes two seconds. `run` does what
`subprocess.run` does with `python -m swa_avg`: the same entry point in a process of its own
with its own folder, arguments, environment and streams. The start of Python and the imports are
shared, and a few small averages have been made. `SWA_AVG_TESTS=processes` starts every command
from the beginning instead.

Run as a program this module is the process that is forked. There are several of them: torch
makes a fork four times as slow, so one has torch, for the commands that run a model, and one
does not; and each is started with the variables that Python and the libraries read early.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

_MOST_BYTES = 1 << 20
# Modules that read the environment, the arguments or the streams when they are imported are
# not among these. What `swa_avg.__main__` looks for among the imported modules is only where
# torch is: a command that runs a model, and a rank, would import one of them by itself.
TORCH = ("torch", "safetensors.torch", "swa_avg.search")
# What a script imports that shards tensors. Each rank would import the last one by itself.
SHARDING = (*TORCH, "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo")
# What of the variables of Python is a switch that can be set later (see `_become`).
_LATER = "PYTHONDONTWRITEBYTECODE"
# After so many runs the interpreter has adapted the code.
_TIMES = 5
# Options whose command imports torch.
_RUN_A_MODEL = ("--recompute-bn", "--sweep", "--greedy")
_OF_PROTOCOLS = {"http": ("aiohttp", "fsspec.implementations.http"), "s3": ("s3fs",)}
_SHARED = (
    *("numpy", "click", "tqdm", "zlib_ng", "zlib_ng.zlib_ng"),
    *("swa_avg.cli.command", "swa_avg.averaging.execution", "swa_avg.averaging.prepare"),
    *("swa_avg.kernel.mean", "swa_avg.kernel.workers", "swa_avg.kernel.writing"),
)


def run(
    folder: Path,
    arguments: tuple[str, ...],
    environment: Mapping[str, str],
    timeout: float,
    script: str | None = None,
    imports: tuple[str, ...] = (),
    limits: Mapping[str, tuple[int | None, int | None]] | None = None,
    stderr: int | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, and return what `subprocess.run` returns.

    Args:
        folder: The current folder.
        arguments: The arguments.
        environment: All environment variables.
        timeout: The most seconds that it may take.
        script: A script to run instead of the command.
        imports: Modules that may be imported before.
        limits: Of each limited resource the soft and the hard limit, or None for that of before.
        stderr: The file for what it prints there; by default it is returned.
    """
    order = {
        "folder": str(folder),
        "arguments": arguments,
        "environment": dict(environment),
        "script": script,
        "limits": dict(limits or {}),
    }
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = [out.fileno(), stderr or err.fileno()]
        here, process = _forked(order, imports or imports_of(arguments), files)
        here.settimeout(timeout)
        try:
            code = int.from_bytes(_received(here, 8), "little", signed=True)
        except TimeoutError as error:
            os.kill(process, signal.SIGKILL)
            raise subprocess.TimeoutExpired(list(arguments), timeout) from error
        finally:
            here.close()
        texts = []
        for file in (out, err):
            file.seek(0)
            # As `text=True` reads: universal newlines.
            texts.append(file.read().decode().replace("\r\n", "\n").replace("\r", "\n"))
    return subprocess.CompletedProcess(["swa-avg", *arguments], code, *texts)


class Started:
    """The command in a session of its own: what tests need of `subprocess.Popen`.

    Args:
        folder: The current folder.
        arguments: The arguments.
        environment: All environment variables.
    """

    def __init__(
        self, folder: Path, arguments: tuple[str, ...], environment: Mapping[str, str]
    ) -> None:
        order = {"folder": str(folder), "arguments": arguments, "environment": dict(environment),
                 "script": None, "limits": {}, "session": True}  # fmt: skip
        pairs = [os.pipe(), os.pipe()]
        self._streams = [read for read, _ in pairs]
        writing = [write for _, write in pairs]
        self._answer, self.pid = _forked(order, imports_of(arguments), writing)
        for file in writing:
            os.close(file)
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Return what it has printed, once it has ended and nobody has its pipes any more."""
        try:
            out, err = (_whole(file, timeout).decode() for file in self._streams)
            self._answer.settimeout(timeout)
            self.returncode = int.from_bytes(_received(self._answer, 8), "little", signed=True)
        except TimeoutError as error:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired("swa-avg", timeout) from error
        finally:
            self._answer.close()
            for file in self._streams:
                os.close(file)
        return out, err


def _whole(file: int, timeout: float) -> bytes:
    """Return all that comes through a pipe, which may be silent for so many seconds."""
    found = b""
    while select.select([file], [], [], timeout)[0]:
        more = os.read(file, 1 << 16)
        if not more:
            return found
        found += more
    raise TimeoutError


def _forked(
    order: Mapping[str, object], imports: tuple[str, ...], streams: list[int]
) -> tuple[socket.socket, int]:
    """Have a process forked; return where it is told how it ended, and its process id."""
    environment = order["environment"]
    assert isinstance(environment, dict)
    early = tuple(sorted(item for item in environment.items() if read_early(item[0])))
    here, there = socket.socketpair()
    with there:
        message = json.dumps(order).encode()
        socket.send_fds(_server(imports, early), [message], [*streams, there.fileno()])
    return here, int.from_bytes(_received(here, 8), "little")


def read_early(name: str) -> bool:
    """Return whether Python or a library may read a variable when it starts."""
    prefixes = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "TORCH_", "TQDM_")
    return name.startswith(prefixes) and name != _LATER


def imports_of(arguments: Iterable[str]) -> tuple[str, ...]:
    """Return the modules that a command with these arguments imports besides the shared ones."""
    if any(text.startswith(_RUN_A_MODEL) for text in arguments):
        return TORCH
    protocols = {text.partition("://")[0] for text in arguments if "://" in text}
    found = (_OF_PROTOCOLS.get(protocol, ()) for protocol in sorted(protocols))
    return tuple(name for names in found for name in names if find_spec(name.partition(".")[0]))


def on_ranks(
    folder: Path, world: int, *arguments: str, script: str | None = None, timeout: float = 100
) -> list[subprocess.CompletedProcess[str]]:
    """Run the command, or a script, on several ranks with the environment that torchrun gives.

    Nobody ends the other ranks when one has failed, as torchrun does.
    """
    with ThreadPoolExecutor(world) as pool:
        ranks = start_on_ranks(pool, folder, world, *arguments, script=script, timeout=timeout)
        return [rank.result() for rank in ranks]


def start_on_ranks(
    pool: Executor,
    folder: Path,
    world: int,
    *arguments: str,
    script: str | None = None,
    timeout: float = 100,
) -> list[Future[subprocess.CompletedProcess[str]]]:
    """As `on_ranks`, with a thread of a pool that waits for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    common = os.environ | meeting | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world)}

    def one(rank: int) -> subprocess.CompletedProcess[str]:
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run(folder, arguments, environment, timeout, script, TORCH)

    return [pool.submit(one, rank) for rank in range(world)]


def ended(script: str | None = None) -> int:
    """Run the command as the interpreter does, but for the half second in which torch ends."""
    gc.unfreeze()  # the command counts what is frozen, which would take a while
    code: object = 0
    try:
        if script is None:
            from swa_avg.__main__ import main

            main()
        else:
            exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})
    except SystemExit as asked:
        code = asked.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


@functools.cache
def _server(imports: tuple[str, ...], early: tuple[tuple[str, str], ...]) -> socket.socket:
    """Start the process that is forked. It ends with this process.

    Args:
        imports: What it imports.
        early: The variables of its environment that are read when it starts.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        process = subprocess.Popen(
            [sys.executable, __file__, str(there.fileno()), *imports],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            env={name: text for name, text in os.environ.items() if not read_early(name)}
            | dict(early),
        )
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
    atexit.register(_end, here, process)
    return here


def _end(orders: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """End the process that is forked."""
    orders.close()
    process.wait()


def _received(place: socket.socket, count: int) -> bytes:
    """Receive exactly so many bytes."""
    found = b""
    while len(found) < count:
        more = place.recv(count - len(found))
        if not more:
            raise EOFError("the process that runs the commands has ended")
        found += more
    return found


def import_shared(more: Iterable[str] = ()) -> None:
    """Import what all commands share, and keep the pages of these objects shared too."""
    # As the package does: a thread of its own would not survive the fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for name in (*_SHARED, *more):
        importlib.import_module(name)
    if "torch" in more:
        _share_torch()
    _warm_up()
    gc.collect()
    gc.freeze()


def _warm_up() -> None:
    """Average a few times, as Python runs quickly only what it has run before."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    average = importlib.import_module("swa_avg").average
    with tempfile.TemporaryDirectory() as folder:
        for number in (1, 2):
            data = len(header).to_bytes(8, "little") + header + bytes([number] * 8)
            path = Path(folder, f"{number}.safetensors")
            path.write_bytes(data)
            os.utime(path, (1.5, 1.5))  # long ago: nothing has to settle
        for _ in range(_TIMES):
            average(f"{folder}/?.safetensors", f"{folder}/out.pt", force=True)
            os.utime(f"{folder}/out.pt", (1.5, 1.5))
            again = [f"{folder}/out.pt", f"{folder}/1.safetensors"]
            average(again, f"{folder}/again.pt", force=True)
    tempfile.tempdir = None  # it depends on the variables of each command


def _share_torch() -> None:
    """Have torch do once what takes it long the first time, and nothing when a command ends."""
    import torch

    if torch.get_num_threads() == 1:  # else there would be threads, which no fork has
        torch.nn.BatchNorm1d(2)(torch.ones(2, 2))
    for function in list(weakref.finalize._registry):
        function.atexit = False


def _serve(orders: socket.socket, more: Iterable[str]) -> None:
    """Fork a process for each order, and send its process id and how it ended, to the last."""
    import_shared(more)
    running: dict[int, tuple[int, int]] = {}
    ready = select.poll()
    ready.register(orders, select.POLLIN)
    while True:
        for file, _ in ready.poll():
            if file in running:
                ready.unregister(file)
                process, answer = running.pop(file)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with suppress(BrokenPipeError):  # nobody waits any more
                    os.write(answer, code.to_bytes(8, "little", signed=True))
                os.close(answer)
                os.close(file)
                continue
            message, files, _, _ = socket.recv_fds(orders, _MOST_BYTES, 3)
            if not message:
                return
            *streams, answer = files
            process = os.fork()
            if not process:
                orders.close()
                for other in (answer, *running, *(pair[1] for pair in running.values())):
                    os.close(other)
                _become(json.loads(message), *streams)
            os.write(answer, process.to_bytes(8, "little"))
            file = os.pidfd_open(process)
            running[file] = process, answer
            ready.register(file, select.POLLIN)
            for stream in streams:
                os.close(stream)


def _become(order: dict[str, object], out: int, err: int) -> None:
    """Make this process the command, to its end."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    folder, arguments, environment = (order[key] for key in ("folder", "arguments", "environment"))
    os.chdir(folder)
    if order.get("session"):
        os.setsid()
    for name, limits in order["limits"].items():
        number = getattr(resource, name)
        pairs = zip(limits, resource.getrlimit(number), strict=True)
        resource.setrlimit(number, [old if new is None else new for new, old in pairs])
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get(_LATER))
    sys.argv = ["swa-avg", *arguments]
    # As `python -m` has it.
    sys.path[0] = str(folder)
    os._exit(ended(order["script"]))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
