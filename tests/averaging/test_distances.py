"""How far checkpoints lie from their mean: against what double precision gives directly."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from command import run
from hypothesis import given, settings
from hypothesis import strategies as st

import swa_avg
from swa_avg.averaging.distances import groups


def state(seed: int, base: int = 0, step: float = 0.01) -> dict[str, torch.Tensor]:
    """Return a checkpoint near a common one."""
    made = {}
    for name, shape in (("conv.weight", (30, 7)), ("conv.bias", (7,)), ("head.0.weight", (50,))):
        common = torch.randn(shape, generator=torch.Generator().manual_seed(base))
        moved = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
        made[name] = common + step * moved
    made["ids"] = torch.arange(5)
    return made


def save(folder: Path, states: list[dict[str, torch.Tensor]]) -> list[Path]:
    paths = [folder / f"epoch_{number}.pt" for number in range(len(states))]
    for made, path in zip(states, paths, strict=True):
        torch.save(made, path)
    return paths


def flat(made: dict[str, torch.Tensor], prefix: str = "") -> torch.Tensor:
    wanted = [v for k, v in made.items() if v.is_floating_point() and k.startswith(prefix)]
    return torch.cat([value.double().reshape(-1) for value in wanted])


@given(
    seeds=st.lists(st.integers(0, 1000), min_size=2, max_size=7, unique=True),
    step=st.sampled_from([1.0, 1e-2, 1e-4]),
)
@settings(deadline=None, max_examples=25)
def test_distances_are_those_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory, seeds: list[int], step: float
) -> None:
    """|w_i - w| / |w|, overall and in each module, and cosines of successive steps."""
    folder = tmp_path_factory.mktemp("near")
    states = [state(seed, step=step) for seed in seeds]
    report = swa_avg.average(save(folder, states), folder / "swa.pt", distances=True)
    found = report.distances
    assert found is not None
    for prefix, distances in {"": found.overall, **found.modules}.items():
        rows = torch.stack([flat(made, prefix) for made in states])
        mean = rows.mean(0)
        expected = (rows - mean).norm(dim=1) / mean.norm()
        torch.testing.assert_close(torch.tensor(distances), expected.float(), rtol=1e-5, atol=1e-9)
    assert list(found.modules) == ["conv", "head"]
    steps = torch.stack([flat(made) for made in states]).diff(dim=0)
    cosines = torch.cosine_similarity(steps[:-1], steps[1:])
    assert torch.tensor(found.cosines).tolist() == pytest.approx(cosines.tolist(), abs=1e-5)


def test_they_cost_no_second_reading(tmp_path: Path) -> None:
    """The bytes read are the same with them, and so are the bytes of the output."""
    paths = save(tmp_path, [state(seed) for seed in range(4)])
    plain = swa_avg.average(paths, tmp_path / "plain.pt")
    told = swa_avg.average(paths, tmp_path / "told.pt", distances=True)
    assert told.bytes_read == plain.bytes_read
    assert (tmp_path / "told.pt").read_bytes() == (tmp_path / "plain.pt").read_bytes()


def test_two_runs_mixed_up_are_noticed(tmp_path: Path) -> None:
    """Checkpoints of independent weights are far from their mean: the user is asked."""
    paths = save(tmp_path, [state(seed, base=seed // 3) for seed in range(6)])
    report = swa_avg.average(paths, tmp_path / "swa.pt", distances=True)
    assert any("may not be from one run" in note for note in report.notes)
    one = swa_avg.average(paths[:3], tmp_path / "one.pt", distances=True)
    assert one.notes == ()


def test_an_outlier_is_named(tmp_path: Path) -> None:
    """One epoch far from the others, though not as far as another run, is named."""
    states = [state(seed, step=0.2 if seed == 4 else 0.01) for seed in range(6)]
    report = swa_avg.average(save(tmp_path, states), tmp_path / "swa.pt", distances=True)
    (note,) = report.notes
    assert note.startswith(f"{tmp_path / 'epoch_4.pt'}: its distance from the mean is ")


def test_average_weighs_in_them(tmp_path: Path) -> None:
    """The mean from which distances are taken is the weighted one, of --start-from."""
    states = [state(seed) for seed in range(4)]
    paths = save(tmp_path, states)
    swa_avg.average(paths[:3], tmp_path / "base.pt")
    report = swa_avg.average(
        paths[3], tmp_path / "all.pt", start_from=tmp_path / "base.pt", distances=True
    )
    assert report.distances is not None
    mean, last = flat(torch.load(tmp_path / "all.pt")), flat(states[3])
    expected = float((last - mean).norm() / mean.norm())
    assert report.distances.overall[1] == pytest.approx(expected, rel=1e-4)


def test_command_tells_them(tmp_path: Path) -> None:
    """--distances prints a line for each checkpoint; --json has modules too."""
    save(tmp_path, [state(seed) for seed in range(3)])
    inputs = [f"epoch_{n}.pt" for n in range(3)]
    shown = run(tmp_path, *inputs, "--distances", "-o", "a.pt")
    lines = shown.stdout.splitlines()
    start = lines.index("distance from the mean, relative to the norm of the mean:") + 1
    assert [line.split()[1] for line in lines[start : start + 3]] == inputs
    assert "cosine of the steps before and after -0." in lines[start + 1]
    told = run(tmp_path, *inputs, "--distances", "-o", "b.pt", "--json")
    found = json.loads(told.stdout)["distances"]
    assert [f"{distance:.4f}" for distance in found["overall"]] == [
        line.split()[0] for line in lines[start : start + 3]
    ]
    assert list(found["modules"]) == ["conv", "head"]


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (["a.x", "a.y", "b.x"], ["a", "b"]),
        (["model.a.x", "model.b.x"], ["model.a", "model.b"]),
        (["model.a.x", "model.a.y"], ["model.a"]),
        (["w"], ["w"]),
        (["w", "a.x"], ["w", "a"]),
        ([], []),
    ],
)
def test_top_level_modules(names: list[str], modules: list[str]) -> None:
    """What every name begins with is no module of its own; a bare name is one."""
    found, numbers = groups(names)
    assert found == modules
    assert all(name.startswith(found[number]) for name, number in zip(names, numbers, strict=True))


def test_verbose_tells_the_modules(tmp_path: Path) -> None:
    """One line for each module with -v, the figures those of the report; without, none."""
    save(tmp_path, [state(seed) for seed in range(3)])
    inputs = [f"epoch_{n}.pt" for n in range(3)]
    lines = {}
    for flag in ("-v", "--json", "--force"):
        ended = run(tmp_path, *inputs, "--distances", "--force", flag)
        assert ended.returncode == 0, ended.stderr
        lines[flag] = ended.stdout
    found = json.loads(lines["--json"])["distances"]["modules"]
    assert set(found) == {"conv", "head"}
    width = max(map(len, found))
    for module, distances in found.items():
        line = f"  {module:<{width}}  {' '.join(f'{distance:.4f}' for distance in distances)}"
        assert line in lines["-v"].splitlines()
        assert line not in lines["--force"].splitlines()


def test_steps_are_the_lengths_between_checkpoints(tmp_path: Path) -> None:
    """Relative to the norm of the mean, from the vectors themselves."""
    vectors = [torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])]
    for number, vector in enumerate(vectors):
        extra = torch.tensor([float(number)])  # no two checkpoints are copies
        torch.save({"w": vector, "b": extra}, tmp_path / f"e_{number}.pt")
    report = swa_avg.average(tmp_path / "e_*.pt", tmp_path / "o.pt", distances=True)
    assert report.distances is not None
    whole = [torch.cat([v, torch.tensor([float(n)])]).double() for n, v in enumerate(vectors)]
    mean = torch.stack(whole).mean(0).norm()
    expected = [float((b - a).norm() / mean) for a, b in pairwise(whole)]
    assert list(report.distances.steps) == pytest.approx(expected, rel=1e-6)
