"""Every remedy works, where a disk is full: a small one, in a namespace of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import preloaded
import pytest
import torch
from command import load, one_line
from remedies import save, several
from torch import nn

import swa_avg
from swa_avg.errors import OutputError

SIDE = 512  # of a matrix of 1 MiB
MODULE = f"""
from collections import OrderedDict
from torch import nn
def model(): return nn.Sequential(OrderedDict(a=nn.Linear({SIDE}, {SIDE}, bias=False)))
def acc(network): return network.a.weight.mean().item()
"""


def big(n: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((SIDE, SIDE), float(n))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, functions that judge them, and empty folders."""
    save(tmp_path, {**several(big), "mod.py": MODULE})
    for name in ("small", "kept", "large"):
        (tmp_path / name).mkdir()
    return tmp_path


# The command where `small` is a disk of 1.5 MiB; its files are copied to `kept` at the end.
# 0x10020000 is CLONE_NEWUSER and CLONE_NEWNS, 0x44000 is MS_REC and MS_PRIVATE.
ON_A_SMALL_DISK = """
import ctypes, os, shutil, sys
from pathlib import Path
from swa_avg.__main__ import main

libc = ctypes.CDLL(None, use_errno=True)

def done(name, *arguments):
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), name)

maps = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
done("unshare", 0x10020000)
for name, text in maps.items():
    Path("/proc/self", name).write_text(text)
done("mount", b"none", b"/", None, 0x44000, None)
done("mount", b"tmpfs", b"small", b"tmpfs", 0, b"size=1500k")
process = os.fork()
if not process:
    main()
code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
for path in Path("small").glob("*.pt"):
    shutil.copy(path, "kept")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def namespaces(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Who runs the tests may mount a disk in a namespace of his own."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1500k", "small", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")


def on_a_small_disk(
    folder: Path, *arguments: str, temporary: str = "large"
) -> subprocess.CompletedProcess[str]:
    """Run the command where `small` is a disk of 1.5 MiB; its files are copied to `kept`."""
    environment = {**os.environ, "TMPDIR": str(folder / temporary)}
    imports = preloaded.imports_of(arguments)
    return preloaded.run(folder, arguments, environment, 300, ON_A_SMALL_DISK, imports)


SWEEP = "1.pt 2.pt --sweep mod:acc -o"
GREEDY = "1.pt 2.pt --greedy mod:acc -o"
EACH = "1.pt 2.pt --each --last 1,2 -o"
ELSEWHERE = "are free. Write to another disk with -o"


@pytest.mark.parametrize(
    ("given", "remedy", "then", "output", "mean"),
    [
        (f"{SWEEP} small/out.pt", f"{ELSEWHERE}, or compare fewer with --last.",
         f"{SWEEP} large/out.pt", "large/out.pt", 2),
        (f"{SWEEP} small/out.pt", f"{ELSEWHERE}, or compare fewer with --last.",
         f"{SWEEP} small/out.pt --last 1", "kept/out.pt", 2),
        (f"{GREEDY} small/out.pt", f"{ELSEWHERE}.",
         f"{GREEDY} large/out.pt", "large/out.pt", 2),
        (f"{EACH} small/m_{{name}}_{{last}}.pt", f"{ELSEWHERE}.",
         f"{EACH} large/m_{{name}}_{{last}}.pt", "large/m_2_2.pt", 1.5),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("namespaces")
def test_outputs_that_do_not_fit(
    folder: Path, given: str, remedy: str, then: str, output: str, mean: float
) -> None:
    """They are refused before anything is written; what the line tells fits."""
    line = one_line(on_a_small_disk(folder, *given.split()))
    assert line.endswith(remedy), line
    assert not any(any((folder / name).iterdir()) for name in ("kept", "large"))
    ended = on_a_small_disk(folder, *then.split())
    assert ended.returncode == 0, ended.stderr
    assert torch.equal(load(folder / output)["a.weight"], big(mean)["a.weight"])


@pytest.mark.usefixtures("namespaces")
def test_temporary_averages_that_do_not_fit(folder: Path) -> None:
    """Averages that are only scored are in the temporary folder: another one has the room."""
    scored = ["1.pt", "2.pt", "--each", "--last", "1,2", "--sweep", "mod:acc", "--json"]
    line = one_line(on_a_small_disk(folder, *scored, temporary="small"))
    assert line.endswith("are free. Set TMPDIR to a folder on another disk."), line
    ended = on_a_small_disk(folder, *scored, temporary="large")
    assert ended.returncode == 0, ended.stderr
    assert '"score": 1.5' in ended.stdout


@pytest.fixture
def gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The temporary folder is gone; the function sets TMPDIR to another one."""

    def found(path: Path) -> None:
        monkeypatch.setenv("TMPDIR", str(path))
        monkeypatch.setattr("tempfile.tempdir", None)  # as in a new process

    found(folder / "kept")
    assert tempfile.gettempdir() == str(folder / "kept")
    (folder / "kept").rmdir()
    return partial(found, folder / "large")


def test_temporary_folder_that_is_gone(folder: Path, gone: Callable[[], None]) -> None:
    """Averages that are only scored need one."""
    with pytest.raises(OutputError, match=r"\. Set TMPDIR to a folder that can be written\.$"):
        scored(folder)
    gone()
    assert scored(folder) == [1.5]


def scored(folder: Path) -> list[float]:
    model = nn.Sequential(OrderedDict(a=nn.Linear(SIDE, SIDE, bias=False)))

    def mean(network: nn.Module) -> float:
        return network.state_dict()["a.weight"].mean().item()

    given = [folder / "1.pt", folder / "2.pt"]
    report = swa_avg.score_windows(given, mean, 2, model=model, mode="min")
    return [one.score for one in report.scores.tried]


def test_upload_without_a_temporary_folder(folder: Path, gone: Callable[[], None]) -> None:
    """An output at a URL is written there first."""
    fs = pytest.importorskip("fsspec").filesystem("memory")
    given, output = [folder / "1.pt", folder / "2.pt"], "memory://remedies/out.pt"
    says = r"\. Set TMPDIR to a folder with space for the output\.$"
    with pytest.raises(OutputError, match=says):
        swa_avg.average(given, output)
    gone()
    swa_avg.average(given, output)
    (folder / "out.pt").write_bytes(fs.cat("/remedies/out.pt"))
    fs.rm("/remedies", recursive=True)
    assert torch.equal(load(folder / "out.pt")["a.weight"], big(1.5)["a.weight"])
