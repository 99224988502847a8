"""Going on from an average: it weighs what it was made from, and nothing counts twice."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import oracle
import pytest
import torch
from command import fails, run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import swa_avg
from swa_avg.errors import ProvenanceError, SelectionError

finite = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False)


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"a.weight": torch.randn(3, 5), "a.bias": torch.randn(5, dtype=torch.float64)}


def save(folder: Path, count: int, suffix: str = ".pt") -> list[Path]:
    paths = [folder / f"epoch_{number}{suffix}" for number in range(count)]
    for number, path in enumerate(paths):
        (torch.save if suffix == ".pt" else save_file)(weights(number), path)
    return paths


def spacing(largest: float) -> Fraction:
    """Return the distance between float32 numbers of that size."""
    return Fraction(2) ** (math.frexp(largest)[1] - 24)


@given(
    values=st.lists(
        st.lists(finite, min_size=4, max_size=4), min_size=2, max_size=9, unique_by=repr
    ),
    cuts=st.sets(st.integers(1, 8), max_size=3),
)
@settings(deadline=None, max_examples=25)
def test_any_split_into_runs(
    tmp_path_factory: pytest.TempPathFactory, values: list[list[float]], cuts: set[int]
) -> None:
    """k successive runs lie within k/2 ulp of the exact mean, so four within 2 ulp.

    An ulp is that of the largest number that the mean is made of: each run rounds once.
    """
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / f"epoch_{number}.pt" for number in range(len(values))]
    for path, row in zip(paths, values, strict=True):
        torch.save({"w": torch.tensor(row)}, path)
    edges = [0, *sorted(cut for cut in cuts if cut < len(values)), len(values)]
    before: list[Path] = []
    for number, (start, end) in enumerate(pairwise(edges)):
        swa_avg.average(paths[start:end], folder / f"run_{number}.pt", start_from=before)
        before = [folder / f"run_{number}.pt"]
    found = torch.load(before[0])["w"].tolist()
    for value, column in zip(found, zip(*values, strict=True), strict=True):
        exact = sum(map(Fraction, column), Fraction(0)) / len(column)
        allowed = Fraction(len(edges) - 1, 2) * spacing(max(map(abs, column)))
        assert abs(Fraction(value) - exact) <= allowed


@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=4), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=12)
def test_averages_merge_by_their_counts(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], seed: int
) -> None:
    """The merge of averages is their mean weighted by their counts, rounded once."""
    folder = tmp_path_factory.mktemp("merge")
    parts = []
    for part, count in enumerate(counts):
        paths = []
        for number in range(count):
            paths.append(folder / f"run{part}_{number}.pt")
            torch.save(weights(seed + 100 * part + number), paths[-1])
        parts.append(folder / f"part{part}.pt")
        swa_avg.average(paths, parts[-1])
    report = swa_avg.average([], folder / "all.pt", start_from=parts)
    loaded = [torch.load(part) for part in parts]
    found = torch.load(folder / "all.pt")
    for name in found:
        expected = oracle.mean([state[name] for state in loaded], weights=counts)
        assert oracle.same_bits(found[name], expected), name
    assert [source.count for source in report.inputs] == counts


def test_ten_more_epochs_as_one_types_it(tmp_path: Path) -> None:
    """Going on from an average of fifty gives the direct average of all sixty to one rounding."""
    paths = save(tmp_path, 60)
    swa_avg.average(paths[:50], tmp_path / "swa_50.pt")
    line = "swa-avg epoch_5?.pt --start-from swa_50.pt -o swa_60.pt"
    ended = run(tmp_path, *line.split()[1:])
    assert (ended.returncode, ended.stdout.splitlines()[0]) == (
        0,
        "averaged 60 checkpoints: swa_50.pt … epoch_59.pt",
    )
    found = torch.load(tmp_path / "swa_60.pt")
    direct = oracle.mean([weights(number)["a.weight"] for number in range(60)])
    largest = max(float(weights(number)["a.weight"].abs().max()) for number in range(60))
    assert (found["a.weight"] - direct).abs().max().item() <= 2 * spacing(largest)
    said = json.loads(run(tmp_path, "--show", "swa_60.pt", "--json").stdout)
    assert said["count"] == 60
    assert [one["name"] for one in said["checkpoints"]] == [path.name for path in paths]


def test_averaged_model_weighs_its_counter(tmp_path: Path) -> None:
    """An AveragedModel's file weighs `n_averaged` checkpoints; going on equals updating it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    averaged = AveragedModel(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    base = {name: value.clone() for name, value in averaged.module.state_dict().items()}
    later = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save(later, tmp_path / "epoch_3.pt")
    report = swa_avg.average(
        tmp_path / "epoch_3.pt", tmp_path / "swa.pt", start_from=tmp_path / "averaged.pt"
    )
    assert [source.count for source in report.inputs] == [3, 1]
    found = torch.load(tmp_path / "swa.pt")
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        expected = oracle.mean([base[name], later[name]], weights=[3, 1])
        assert oracle.same_bits(found[name], expected), name
    for name in ("1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(found[name], later[name])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_listed_checkpoint_is_refused(tmp_path: Path, suffix: str) -> None:
    """A checkpoint that the average was made from is refused, under whatever name and format."""
    paths = save(tmp_path, 4, suffix)
    swa_avg.average(paths[:3], tmp_path / "swa.pt")
    torch.save(weights(1), tmp_path / "renamed.pt")
    save_file(weights(1), tmp_path / "renamed.safetensors")
    for again in (paths[1], tmp_path / "renamed.pt", tmp_path / "renamed.safetensors"):
        with pytest.raises(ProvenanceError) as error:
            swa_avg.average([paths[3], again], tmp_path / "more.pt", start_from=tmp_path / "swa.pt")
        assert error.value.file == str(again)
        assert f"epoch_1{suffix}" in error.value.found
        assert not (tmp_path / "more.pt").exists()


def test_averages_of_one_checkpoint_do_not_merge(tmp_path: Path) -> None:
    """Two averages that share a checkpoint are not merged: it would count twice."""
    paths = save(tmp_path, 4)
    swa_avg.average(paths[:3], tmp_path / "a.pt")
    swa_avg.average(paths[2:], tmp_path / "b.pt")
    ended = run(tmp_path, "--start-from", "a.pt", "--start-from", "b.pt", "-o", "c.pt")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: b.pt: has the weights of epoch_2.pt, ")
    assert not (tmp_path / "c.pt").exists()


def test_average_among_the_checkpoints_is_left_out(tmp_path: Path) -> None:
    """A pattern that catches an earlier average does not average it; alone it is refused."""
    paths = save(tmp_path, 3)
    swa_avg.average(paths, tmp_path / "swa.pt")
    report = swa_avg.average(tmp_path, tmp_path / "again.pt")
    assert [Path(source.path).name for source in report.inputs] == [path.name for path in paths]
    assert any("swa.pt: is already an average" in note for note in report.notes)
    with pytest.raises(SelectionError, match="is already an average, and no other"):
        swa_avg.average(tmp_path / "swa.pt", tmp_path / "third.pt")
    line = fails(tmp_path, "swa.pt", "--recompute-bn", "--data", "no:no", code=2)
    assert line.endswith("in place, give no checkpoints and -o swa.pt."), line


@pytest.mark.parametrize(
    ("state", "found"),
    [
        (lambda: weights(9), "does not record how many checkpoints"),
        (
            lambda: AveragedModel(nn.Linear(2, 2)).state_dict(),  # never updated: n_averaged is 0
            "does not record how many checkpoints",
        ),
    ],
)
def test_average_without_a_count_is_refused(tmp_path: Path, state: object, found: str) -> None:
    """What does not say how much it weighs cannot be gone on from."""
    assert callable(state)
    torch.save(state(), tmp_path / "base.pt")
    torch.save(weights(0), tmp_path / "epoch_0.pt")
    with pytest.raises(ProvenanceError, match=found):
        swa_avg.average(
            tmp_path / "epoch_0.pt", tmp_path / "swa.pt", start_from=tmp_path / "base.pt"
        )


def test_wider_average_of_narrow_checkpoints(tmp_path: Path) -> None:
    """With --dtype float32 an average of bfloat16 files keeps what bfloat16 would round away."""
    states = [{"w": torch.randn(50).bfloat16()} for _ in range(6)]
    paths = [tmp_path / f"epoch_{number}.pt" for number in range(6)]
    for state, path in zip(states, paths, strict=True):
        torch.save(state, path)
    before: Sequence[Path] = ()
    for number, path in enumerate(paths):
        out = tmp_path / f"swa_{number}.pt"
        swa_avg.average(path, out, start_from=before, dtype="float32")
        before = [out]
    found = torch.load(before[0])["w"]
    exact = torch.stack([state["w"].double() for state in states]).mean(0)
    assert found.dtype is torch.float32
    assert (found - exact).abs().max() < 1e-6


def test_one_average_alone_is_written_anew(tmp_path: Path) -> None:
    """An average alone is its own mean: --start-from turns it into another format."""
    swa_avg.average(save(tmp_path, 3), tmp_path / "swa.pt")
    ended = run(tmp_path, "--start-from", "swa.pt", "-o", "swa.safetensors")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(run(tmp_path, "--show", "swa.safetensors", "--json").stdout) == json.loads(
        run(tmp_path, "--show", "swa.pt", "--json").stdout
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--last", "2"], "--last needs checkpoints"),
        (["--keep-wrapper"], "--keep-wrapper needs checkpoints"),
        (["--distances"], "--distances needs checkpoints"),
    ],
)
def test_options_of_checkpoints_need_some(tmp_path: Path, arguments: list[str], found: str) -> None:
    """An option that says something of checkpoints is no option of a merge: wrong usage."""
    ended = run(tmp_path, "--start-from", "swa.pt", *arguments)
    assert (ended.returncode, found in ended.stderr) == (2, True)
