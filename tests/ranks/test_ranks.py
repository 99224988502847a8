"""Several ranks average as one process does: the same bytes, and all or none of them.

The processes are real ones, joined by gloo. Where torchrun is not what is tested they are
forked from one that has imported torch (`preloaded.py`), with torchrun's environment.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from command import one_line, run, snapshot
from preloaded import TORCH, on_ranks, start_on_ranks
from preloaded import run as run_script
from safetensors.torch import save_file
from torch import nn

import swa_avg
from swa_avg.averaging.heartbeat import Heartbeat
from swa_avg.averaging.prepare import planned
from swa_avg.averaging.torchrun import ProcessRanks
from swa_avg.errors import SwaAvgError, as_parameters
from swa_avg.kernel.tasks import share

# torchrun itself is forked too; the ranks that it starts are not.
TORCHRUN = "from torch.distributed.run import main; main()"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}  # else torchrun has something to say
TIMEOUT = 100  # no law: a hang fails here
OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "out.pt": ("epoch_?.pt", {}),
    "out.safetensors": ("epoch_?.pt", {"dtype": "bfloat16", "bn_buffers": "mean"}),
    "kept.pt": ("epoch_?.pt", {"keep_wrapper": True}),
    "hf": ("hf_?", {"max_shard_size": 3_000_000, "verify": True}),
    "dcp": ("dcp_?", {}),
}
TOGETHER = f"""
import sys
from swa_avg.averaging import joint, planned
from swa_avg.averaging.torchrun import ranks
from swa_avg.planning import Options

with ranks() as group:
    for name, (inputs, options) in {OUTPUTS!r}.items():
        with (
            planned(inputs, f"{{sys.argv[1]}}/{{name}}", Options(**options)) as averaging,
            joint.written(averaging, group, threads=2) as made,
        ):
            assert (made is None) == (group.rank > 0)
            if made:
                made[0].commit()
            group.meet()
"""
# One rank, told by its number, runs the command in another way than the others.
ONE_DIFFERS = """
import os, signal, sys
from swa_avg.__main__ import main

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == sys.argv.pop(1):
    {}
main()
"""
DIES = ONE_DIFFERS.format("os.pwrite = die")  # at its first write
# The command that two ranks of torchrun run.
WITH_TORCHRUN = ("epoch_?.pt", "-o", "again.pt", "--json", "--distances", "--threads", "1",
                 "--report", "report.json")  # fmt: skip
SAME_FILES = "Give all ranks the same files, options and version of swa-avg."
ELSEWHERE = ONE_DIFFERS.format("os.chdir('elsewhere')")
# Without torchrun, which ends the others when a rank has died.
LEFT_ALONE = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from swa_avg.averaging import joint, planned
from swa_avg.averaging.torchrun import ranks
from swa_avg.errors import SwaAvgError

def die(*arguments):
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))

if os.environ["RANK"] == sys.argv[1]:
    Path(sys.argv[3]).write_text(str(os.getpid()))
    os.pwrite = die
try:
    with ranks(patience=timedelta(seconds=2)) as group, planned("epoch_?.pt", "alone.pt") as found:
        with joint.written(found, group, threads=1):
            group.meet()
except SwaAvgError as error:
    print(error)
"""


def state(seed: int) -> dict[str, torch.Tensor]:
    """Tensors that are read in ranges, in boxes and together; one is in several tasks."""
    torch.manual_seed(seed)
    return {
        **{f"small.{number}": torch.randn(30) for number in range(100)},
        "large": torch.randn(3_000_000),
        "turned": torch.randn(300, 200).t(),
        "bn.running_mean": torch.randn(30),
        "bn.running_var": torch.rand(30),
        "bn.num_batches_tracked": torch.tensor(seed),
        "half": torch.randn(500_000).half(),
        "empty": torch.empty(0, 3),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three checkpoints in each of three forms, and what one process makes of them in `one`."""
    made = tmp_path_factory.mktemp("ranks")
    for seed in range(3):
        torch.save({"model": state(seed), "epoch": seed}, made / f"epoch_{seed}.pt")
        plain = {name: value.contiguous() for name, value in state(seed).items()}
        (made / f"hf_{seed}").mkdir()
        save_file(plain, made / f"hf_{seed}" / "model.safetensors", {"format": "pt"})
        (made / f"hf_{seed}" / "config.json").write_text("{}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: no process group, so one process
            dcp.save({"model": plain}, checkpoint_id=made / f"dcp_{seed}", no_dist=True)
    for name in ("one", "2", "4"):
        (made / name).mkdir()
    for name, (inputs, options) in OUTPUTS.items():
        swa_avg.average(made / inputs, made / "one" / name, threads=2, **options)
    yield made
    shutil.rmtree(made)  # 55 MB


def torchrun(
    folder: Path, world: int, *arguments: str, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command on ranks by torchrun, or a script of this file."""
    what = ["-m", "swa_avg"]
    if code is not None:
        (folder / "script.py").write_text(code)
        what = ["script.py"]
    command = ("--standalone", f"--nproc-per-node={world}", *what, *arguments)
    try:
        return run_script(folder, command, ENVIRONMENT, TIMEOUT, TORCHRUN, TORCH)
    finally:
        (folder / "script.py").unlink(missing_ok=True)


def error_of(ended: list[subprocess.CompletedProcess[str]]) -> str:
    """Return the one line that the ranks say together."""
    assert all(one.returncode == 1 and one.stdout == "" for one in ended), ended
    lines = [line for one in ended for line in one.stderr.splitlines()]
    (line,) = (line for line in lines if line.startswith("error: "))
    return line


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_write_the_bytes_that_one_process_writes(folder: Path, world: int) -> None:
    """In every form of output, and nothing is left beside them."""
    ended = on_ranks(folder, world, str(world), script=TOGETHER)
    assert [one.returncode for one in ended] == [0] * len(ended), ended
    assert {path.name for path in (folder / str(world)).iterdir()} == OUTPUTS.keys()
    for name in OUTPUTS:
        assert content(folder / str(world) / name) == content(folder / "one" / name), name


def test_work_is_dealt_out_by_bytes(folder: Path) -> None:
    """Each task to one rank, neighbours to the same one, and to no rank more than its share
    and one task."""
    with (
        planned(folder / "epoch_?.pt", folder / "out.pt") as averaging,
        averaging.open_output() as file,
    ):
        works = averaging.plan.works
        dealt = averaging.kernel(file).tasks(4)
        sizes = [
            sum(
                sum(cell.numel for cell in item.cells())
                * sum(source.dtype.itemsize for source in works[item.number].sources)
                for item in task
            )
            for task in dealt
        ]
        assert len(dealt) > 5
        for world in range(1, 6):
            shares = [share(dealt, works, rank, world) for rank in range(world)]
            assert [task for part in shares for task in part] == dealt
            for part in shares:
                size = sum(sizes[dealt.index(task)] for task in part)
                assert abs(size - sum(sizes) / world) <= max(sizes)


@pytest.fixture(scope="module")
def by_torchrun(folder: Path) -> Iterator[Path]:
    """What the command has written and printed on two ranks of torchrun, in a folder."""
    made = folder / "by_torchrun"
    made.mkdir()
    ended = torchrun(folder, 2, *WITH_TORCHRUN)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    (made / "stdout").write_text(ended.stdout)
    for name in ("again.pt", "report.json"):
        (folder / name).rename(made / name)
    yield made
    shutil.rmtree(made)


def test_command_reports_what_one_process_reports(
    folder: Path, by_torchrun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, and the same: but for the last bits of distances, which are sums of floats."""
    several = json.loads((by_torchrun / "stdout").read_text())
    assert json.loads((by_torchrun / "report.json").read_text()) == several
    assert (by_torchrun / "again.pt").read_bytes() == (folder / "one" / "out.pt").read_bytes()
    monkeypatch.chdir(folder)
    report = swa_avg.average("epoch_?.pt", "again.pt", force=True, distances=True)
    alone = json.loads(json.dumps(report.to_dict()))
    several["notes"] = list(map(as_parameters, several["notes"]))
    distances = [report.pop("distances") for report in (several, alone)]
    assert several == alone
    for one_value, other in zip(*map(numbers, distances), strict=True):
        assert one_value == pytest.approx(other, rel=1e-9)
    (folder / "again.pt").unlink()


def numbers(content: object) -> list[float]:
    """Return all numbers in what JSON holds, in order."""
    if isinstance(content, dict):
        return [number for value in content.values() for number in numbers(value)]
    if isinstance(content, list):
        return [number for value in content for number in numbers(value)]
    return [content] if isinstance(content, float) else []


@pytest.mark.parametrize("name", ["half", "large"])
def test_damage_is_found_by_whoever_reads_it(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a record that one rank reads (the second one), and of one that both share: one line
    names file and tensor, once; it is the line of one process, but that it may tell the rank."""
    path = folder / "epoch_1.pt"
    whole = path.read_bytes()
    data = bytearray(whole)
    data[whole.index(state(1)[name].numpy(force=True).tobytes()) + 1000] ^= 1
    before = snapshot(folder)
    path.write_bytes(data)
    monkeypatch.chdir(folder)
    try:
        line = error_of(on_ranks(folder, 2, "epoch_?.pt", "-o", "out.pt", "--threads", "1"))
        with pytest.raises(swa_avg.SwaAvgError) as alone:
            swa_avg.average("epoch_?.pt", "out.pt")
    finally:
        path.write_bytes(whole)
    assert line.replace("rank 1 failed: ", "") == f"error: {alone.value}"
    assert ("rank 1" in line) == (name == "half")
    assert f"epoch_1.pt: {name}: is damaged" in line
    assert set(snapshot(folder)) == set(before)


@pytest.mark.parametrize(
    ("seeds", "says", "remedy"),
    [
        ((0, 7, 2), "rank 1 has another plan than rank 0: the headers", SAME_FILES),
        (
            (0, 1, 2),
            "rank 1 failed: out.pt: was opened by rank 0, but this rank does not find it",
            "Write to a file system that all ranks share.",
        ),
        (
            (0, 1),
            "rank 1 has another plan than rank 0: it averages 2 checkpoints, not 3",
            SAME_FILES,
        ),
    ],
)
def test_ranks_that_do_not_share_a_folder(
    folder: Path, seeds: tuple[int, ...], says: str, remedy: str
) -> None:
    """Copies of the inputs may be different files, the output may not; nothing is left.

    With the same files, and an output that all ranks share, the average is that of one process.
    """
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    for number, seed in enumerate(seeds):
        content = {"model": state(seed), "epoch": number}
        torch.save(content, elsewhere / f"epoch_{number}.pt")
    before = snapshot(folder)
    line = error_of(on_ranks(folder, 2, "1", "epoch_?.pt", "-o", "out.pt", script=ELSEWHERE))
    assert says in line and line.endswith(remedy)
    assert snapshot(folder).keys() == before.keys()
    same = [str(folder / f"epoch_{number}.pt") for number in range(3)]
    for arguments in (same if remedy == SAME_FILES else ["epoch_?.pt"], same):
        output = str(folder / "out.pt")
        ended = on_ranks(folder, 2, "1", *arguments, "-o", output, script=ELSEWHERE)
        assert [one.returncode for one in ended] == [0, 0], ended
        assert (folder / "out.pt").read_bytes() == (folder / "one" / "out.pt").read_bytes()
        (folder / "out.pt").unlink()
    shutil.rmtree(elsewhere)


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_leaves_no_output(folder: Path, victim: int) -> None:
    """The old output is whole, and when a run has come after it nothing else is there.

    Rank 1 under torchrun, which ends rank 0; rank 0 where the other one has to notice it.
    """
    target = folder / "target.pt"
    target.write_bytes(b"the old output")
    before = snapshot(folder)
    arguments = ["epoch_?.pt", "-o", "target.pt", "--force"]
    if victim == 1:
        ended = torchrun(folder, 2, "1", *arguments, code=DIES)
        assert ended.returncode == 1
        assert "exitcode  : -9" in ended.stderr and "rank      : 1 " in ended.stderr
    else:
        killed, other = on_ranks(folder, 2, "0", *arguments, script=DIES)
        assert (killed.returncode, other.returncode) == (-9, 1)
    left = snapshot(folder).keys() - before.keys()
    assert len(left) == (victim == 0), left  # who is killed cannot clean up behind itself
    assert target.read_bytes() == b"the old output"
    swa_avg.average(folder / "epoch_?.pt", target, force=True)
    assert snapshot(folder).keys() == before.keys()
    target.unlink()


@pytest.mark.parametrize(
    ("victim", "how", "says"),
    [
        (1, signal.SIGSTOP, "rank 1 has not responded for 2 s"),
        (0, signal.SIGKILL, "the connection to rank 0 is lost"),
    ],
)
def test_rank_that_is_gone_is_noticed(
    folder: Path, tmp_path: Path, victim: int, how: signal.Signals, says: str
) -> None:
    """Where nobody ends the others when one has died or hangs, they end by themselves."""
    before = snapshot(folder)
    arguments = (str(victim), how.name, str(tmp_path / "victim"))
    with ThreadPoolExecutor(2) as pool:
        ranks = start_on_ranks(pool, folder, 2, *arguments, script=LEFT_ALONE, timeout=TIMEOUT)
        try:
            other = ranks[1 - victim].result()
        finally:
            if how == signal.SIGSTOP:
                os.kill(int((tmp_path / "victim").read_text()), signal.SIGKILL)
    assert says in other.stdout, other
    left = [Path(path) for path in snapshot(folder).keys() - before.keys()]
    assert len(left) == (victim == 0)
    for path in left:
        path.unlink()


class StoreThatEnds(dist.Store):
    """A store whose process ends after some requests, as each rank but the first sees it."""

    def __init__(self, requests: int) -> None:
        super().__init__()
        self.left, self.inner = requests, dist.HashStore()

    def __getattribute__(self, name: str) -> Any:
        if name in ("add", "check", "get", "set"):
            self.left -= 1
            if self.left < 0:
                raise dist.DistNetworkError("failed to recv, got 0 bytes")
            return getattr(self.inner, name)
        return super().__getattribute__(name)


@pytest.mark.parametrize(("job", "requests"), [("meet", 3), ("tell", 5)])
def test_store_may_end_at_any_request(job: str, requests: int) -> None:
    """Rank 0 can be killed between any two requests: each leads to the same one line."""
    heartbeat = Heartbeat(dist.HashStore(), 0, 1, timedelta(minutes=1))
    try:
        for answered in range(requests):
            group = ProcessRanks(0, 1, 0, 1, StoreThatEnds(answered), heartbeat)
            with pytest.raises(SwaAvgError, match=r"^the connection to rank 0 is lost .*0 bytes"):
                getattr(group, job)()
        getattr(ProcessRanks(0, 1, 0, 1, StoreThatEnds(requests), heartbeat), job)()
    finally:
        heartbeat.stop()


NETWORK = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
batches = torch.randn(50, 3, generator=torch.Generator().manual_seed(5)).split(8)
"""


def save_networks(folder: Path, count: int) -> None:
    """Save checkpoints of a network with BatchNorm, and the module with its data."""
    (folder / "mod.py").write_text(NETWORK)
    for seed in range(count):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        torch.save(network.state_dict(), folder / f"epoch_{seed}.pt")


def test_ranks_average_and_recompute_batchnorm(tmp_path: Path) -> None:
    """In one go: the weights are those of one process, the statistics too but for rounding."""
    save_networks(tmp_path, 3)
    arguments = ["epoch_?.pt", "-q", "--recompute-bn", "--data", "mod:batches"]
    for ended in on_ranks(tmp_path, 2, *arguments, "-o", "several.pt"):
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert run(tmp_path, *arguments, "-o", "one.pt").returncode == 0
    several, one = (torch.load(tmp_path / name) for name in ("several.pt", "one.pt"))
    for name, value in one.items():
        close = 1e-6 if "running" in name else 0
        torch.testing.assert_close(several[name], value, rtol=close, atol=close)
    assert not list(tmp_path.glob(".swa-avg*"))


def test_ranks_without_torchrun(folder: Path, by_torchrun: Path) -> None:
    """WORLD_SIZE without the rest is refused; torchrun works, and so does one process."""
    alone = ENVIRONMENT | {"WORLD_SIZE": "2", "RANK": "0"}
    line = one_line(run(folder, *WITH_TORCHRUN, env=alone))
    assert line.startswith("error: the ranks cannot connect to each other (")
    assert line.endswith("Start them with torchrun, or unset WORLD_SIZE.")
    ended = run(folder, *WITH_TORCHRUN)
    assert ended.returncode == 0, ended.stderr
    (folder / "report.json").unlink()
    for place in (by_torchrun, folder):
        assert (place / "again.pt").read_bytes() == (folder / "one" / "out.pt").read_bytes()
    (folder / "again.pt").unlink()


def test_torch_estimator_on_ranks(tmp_path: Path) -> None:
    """It is refused; the population estimator works on ranks, and this one in one process."""
    save_networks(tmp_path, 2)
    arguments = ["epoch_?.pt", "-q", "--recompute-bn", "--data", "mod:batches", "-o", "out.pt"]
    torchs = [*arguments, "--bn-estimator", "torch"]
    line = error_of(on_ranks(tmp_path, 2, *torchs))
    assert line.endswith("not with 2. Use the population estimator, or one process.")
    assert not (tmp_path / "out.pt").exists()
    made = []
    for alone in (False, True):
        ended = [run(tmp_path, *torchs)] if alone else on_ranks(tmp_path, 2, *arguments)
        assert [one.returncode for one in ended] == [0] * len(ended), ended
        made.append(torch.load(tmp_path / "out.pt"))
        (tmp_path / "out.pt").unlink()
    assert torch.equal(made[0]["0.weight"], made[1]["0.weight"])
    assert torch.allclose(made[0]["1.running_mean"], made[1]["1.running_mean"], rtol=0.1, atol=0.1)
