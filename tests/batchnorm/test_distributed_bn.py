"""Two processes do what one does, and fail together.

The processes are real ones with gloo, forked from one that has imported torch; what they do is
in `WORKER`. Statistics are compared in float64, where nothing hides in a rounding.
"""

from inspect import getsource
from pathlib import Path

import pytest
import torch
from preloaded import on_ranks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from swa_avg.batchnorm.batches import Alone
from swa_avg.batchnorm.statistics import recompute_batchnorm
from swa_avg.errors import SwaAvgError


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    return nn.Sequential(*layers, nn.SyncBatchNorm(4), nn.Dropout()).double()


def samples() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(46, 3, 5, 5, generator=generator).double() * 3 + 2


NETWORK = f"""
import torch
from torch import Tensor, nn

{getsource(network)}
{getsource(samples)}
"""

WORKER = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from network import network, samples
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from swa_avg.batchnorm import recompute_batchnorm
from swa_avg.averaging.torchrun import ranks
from swa_avg.errors import DataError


class Counting(TensorDataset):
    loaded = 0

    def __getitem__(self, index):
        self.loaded += 1
        return super().__getitem__(index)


def run(group, case, data, **options):
    model = network()
    torch.manual_seed(group.rank)  # as it happens to users
    report = recompute_batchnorm(model, data, device="cpu", ranks=group, **options)
    result = {"state": dict(model.state_dict()), "report": report.to_dict()}
    torch.save(result, f"{case}.{group.rank}")


def share(group):
    assert dist.get_rank() == group.rank
    dataset = Counting(samples())
    run(group, "loader", DataLoader(dataset, 8))
    Path(f"loaded.{group.rank}").write_text(str(dataset.loaded))
    run(group, "shuffled", DataLoader(dataset, 8, shuffle=True))
    run(group, "iterable", samples().split(8))
    run(group, "few", [samples()])
    run(group, "max", (batch for batch in samples().split(8)), max_batches=3)
    forty = Subset(dataset, range(40))
    run(group, "sampler", DataLoader(forty, 4, sampler=DistributedSampler(forty, shuffle=False)))
    try:
        run(group, "empty", [])
    except DataError as error:
        Path(f"empty.{group.rank}").write_text(str(error))


def broken(rank):
    for number, batch in enumerate(samples().split(8)):
        if number == 3 and rank == 1:
            raise OSError("disk on fire")
        yield batch


case = sys.argv[1]
error = None
try:
    with ranks() as group:
        if case == "share":
            share(group)
        else:
            run(group, case, broken(group.rank))
except Exception as caught:
    error = caught
Path(f"{case}.said.{group.rank}").write_text(str(error))
"""


def two_ranks(case: str, folder: Path) -> list[str]:
    """Run the worker on two ranks and return what each has to say: the error, or None."""
    (folder / "network.py").write_text(NETWORK)
    ended = on_ranks(folder, 2, case, script=WORKER)
    assert [one.returncode for one in ended] == [0, 0], ended
    return [(folder / f"{case}.said.{rank}").read_text() for rank in (0, 1)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what two ranks made of every kind of data."""
    folder = tmp_path_factory.mktemp("ranks")
    assert two_ranks("share", folder) == ["None", "None"]
    return folder


def batches(case: str) -> list[Tensor]:
    """The batches that both ranks together should see in a case."""
    if case == "few":
        return [samples()]
    if case == "max":
        return samples().split(8)[:3]
    if case == "sampler":  # what the user's own DistributedSampler deals out
        return [b for rank in (0, 1) for b in samples()[rank:40:2].split(4)]
    if case == "shuffled":  # as rank 0 does it
        torch.manual_seed(0)
        return [b for (b,) in DataLoader(TensorDataset(samples()), 8, shuffle=True)]
    return samples().split(8)


@pytest.mark.parametrize("case", ["loader", "shuffled", "iterable", "few", "max", "sampler"])
def test_two_ranks_are_one(case: str, shared: Path) -> None:
    """The same batches give the same statistics to 1e-12, on both ranks the same bits,
    also where one rank has fewer batches, or none; every sample counts once."""
    model: nn.Module = network()
    recompute_batchnorm(model, batches(case), device="cpu")
    first, second = (torch.load(shared / f"{case}.{rank}") for rank in (0, 1))
    for key, value in model.state_dict().items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        torch.testing.assert_close(first["state"][key], value, rtol=1e-12, atol=1e-12)
    assert first["report"] == second["report"]
    assert (first["report"]["ranks"], first["report"]["batches"]) == (2, len(batches(case)))
    assert first["report"]["samples"] == sum(map(len, batches(case)))


def test_a_loader_loads_each_sample_on_one_rank_only(shared: Path) -> None:
    """Six batches of eight, the last of six: three to each."""
    assert [(shared / f"loaded.{rank}").read_text() for rank in (0, 1)] == ["24", "22"]


def test_ranks_fail_together(tmp_path: Path) -> None:
    """If one raises, the other ends with the same error, instead of waiting for it."""
    said = "batch 3: OSError: disk on fire."
    assert two_ranks("broken", tmp_path) == [f"rank 1 failed: {said}", said]


def test_no_batch_on_any_rank_is_an_error(shared: Path) -> None:
    """On every one of them."""
    for rank in (0, 1):
        assert (shared / f"empty.{rank}").read_text().startswith("the loader gave no batches")


def test_the_torch_estimator_is_refused_on_several_ranks() -> None:
    """It does not say how its statistics would be merged."""
    with pytest.raises(SwaAvgError, match="only one process, not with 2"):
        recompute_batchnorm(network(), [samples()], estimator="torch", ranks=Alone(0, 2))
