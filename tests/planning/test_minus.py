"""The difference of two averages is the mean of the checkpoints that only one of them has."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from command import averaged, fails, load, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import swa_avg
from swa_avg.errors import NotFiniteError, SwaAvgError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
number = st.floats(-(2.0**9), 2.0**9, width=32)


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "0.weight": torch.randn(3, 5),
        "1.weight": torch.randn(5, dtype=torch.float64),
        "1.bias": torch.randn(5).bfloat16(),
        "1.running_mean": torch.randn(5),
        "1.running_var": torch.rand(5),
        "1.num_batches_tracked": torch.tensor(seed),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve checkpoints; `all.pt` is their mean, `first.pt` that of five, `one.pt` another."""
    made = tmp_path_factory.mktemp("minus")
    paths = [made / f"epoch_{n}.pt" for n in range(12)]
    for n, path in enumerate(paths):
        torch.save(weights(n), path)
    swa_avg.average(paths, made / "all.pt")
    swa_avg.average(paths[:5], made / "first.pt")
    swa_avg.average(paths[5:], made / "rest.pt")
    return made


def as_averaged_model(count: int, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {f"module.{name}": value for name, value in tensors.items()}
    return {"n_averaged": torch.tensor(count), **named}


@given(
    pairs=st.lists(st.tuples(number, number), min_size=1, max_size=6),
    counts=st.lists(st.integers(1, 2**26), min_size=2, max_size=2, unique=True),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None)
def test_difference_is_rounded_once(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[float, float]],
    counts: list[int],
    dtype: torch.dtype,
) -> None:
    """(n_b b - n_a a) / (n_b - n_a) is exact, and rounded once, for all counts and dtypes."""
    made = tmp_path_factory.mktemp("exact")
    few, many = sorted(counts)
    part, whole = (torch.tensor(column).to(dtype) for column in zip(*pairs, strict=True))
    torch.save(as_averaged_model(few, w=part), made / "part.pt")
    torch.save(as_averaged_model(many, w=whole), made / "whole.pt")
    files: dict[str, Any] = {"start_from": made / "whole.pt", "minus": made / "part.pt"}
    weights = [-few, many]
    try:
        expected = oracle.mean([part, whole], weights=weights)
    except AssertionError:  # the difference is larger than the largest number
        with pytest.raises(NotFiniteError, match="cannot hold"):
            swa_avg.average([], made / "rest.pt", **files)
        return
    swa_avg.average([], made / "rest.pt", verify=True, **files)
    assert oracle.same_bits(load(made / "rest.pt")["w"], expected)


def test_extreme_numbers(tmp_path: Path) -> None:
    """Equal elements keep their bits, infinity included; a difference too large is refused."""
    same = torch.tensor([math.inf, -0.0, math.nan, 5e-324, -1.7e308], dtype=torch.float64)
    torch.save(as_averaged_model(3, w=same), tmp_path / "a.pt")
    torch.save(as_averaged_model(4, w=same), tmp_path / "b.pt")
    averaged(tmp_path, "--start-from", "b.pt", "--minus", "a.pt", out="same.pt")
    assert oracle.same_bits(load(tmp_path / "same.pt")["w"], same)
    torch.save(as_averaged_model(4, w=-same), tmp_path / "c.pt")
    line = fails(tmp_path, "--start-from", "c.pt", "--minus", "a.pt")
    assert "a.pt: w: has inf, expected finite numbers" in line
    torch.save(as_averaged_model(3, w=same[4:]), tmp_path / "a.pt")
    torch.save(as_averaged_model(4, w=-same[4:]), tmp_path / "c.pt")
    line = fails(tmp_path, "--start-from", "c.pt", "--minus", "a.pt")
    assert "w: has inf, which float64 cannot hold" in line


def test_the_rest_of_a_run(folder: Path) -> None:
    """All minus the first is the mean of the rest, as far as the two were rounded."""
    made = averaged(folder, "--start-from", "all.pt", "--minus", "first.pt", out="diff.pt")
    first_line = made.stdout.splitlines()[0]
    assert first_line == "mean of 7 checkpoints: all.pt (12) minus first.pt (5)"
    assert any("2.43 times their rounding errors" in note for note in made.notes), made.notes
    inputs = [load(folder / name) for name in ("first.pt", "all.pt")]
    for name in ("0.weight", "1.weight", "1.bias"):
        exact = oracle.mean([tensors[name] for tensors in inputs], weights=[-5, 12])
        assert oracle.same_bits(made.tensors[name], exact), name
    direct = load(folder / "rest.pt")["0.weight"]
    largest = max(float(t["0.weight"].abs().max()) for t in inputs)
    allowed = (17 / 7 + 1) * 2.0 ** (math.frexp(largest)[1] - 25)
    assert (made.tensors["0.weight"] - direct).abs().max().item() <= allowed
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(made.tensors[name], weights(11)[name])
    said = json.loads(run(folder, "--show", "diff.pt", "--json").stdout)
    assert [one["name"] for one in said["checkpoints"]] == [f"epoch_{n}.pt" for n in range(5, 12)]
    assert said["options"] == {"minus": "first.pt"}
    (folder / "diff.pt").unlink()


def test_averaged_models_of_one_run(tmp_path: Path) -> None:
    """Two files of an AveragedModel give the mean of its updates between them."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    average, updates = AveragedModel(model), []
    for n in range(9):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        average.update_parameters(model)
        updates.append({k: v.clone() for k, v in model.state_dict().items()})
        if n in (2, 8):
            torch.save(average.state_dict(), tmp_path / f"after_{n + 1}.pt")
    made = averaged(tmp_path, "--start-from", "after_9.pt", "--minus", "after_3.pt").tensors
    for name, found in made.items():
        exact = oracle.mean([update[name] for update in updates[3:]])
        assert torch.allclose(found, exact, rtol=0, atol=20 * 2.0**-53), name
    said = json.loads(run(tmp_path, "--show", "out.pt", "--json").stdout)
    assert [(one["name"], one["count"]) for one in said["checkpoints"]] == [("after_9.pt", 6)]


def icefall(steps: list[int], period: int) -> Iterator[tuple[dict[str, Any], list[torch.Tensor]]]:
    """Yield icefall's file after each of these steps, and the models averaged so far.

    update_averaged_model in icefall/checkpoint.py: every `average_period` steps,
    avg = cur * period / step + avg * (1 - period / step).
    """
    torch.manual_seed(1)
    models: list[torch.Tensor] = []
    average = torch.zeros(40, dtype=torch.float64)
    for step in range(1, max(steps) + 1):
        current = torch.randn(40, dtype=torch.float64)
        if step % period == 0:
            models.append(current)
            average = average * (1 - period / step) + current * (period / step)
        if step in steps:
            yield (
                {
                    "model": {"encoder.weight": current.clone()},
                    "model_avg": {"encoder.weight": average.clone()},
                    "optimizer": None,
                    "batch_idx_train": step,
                    "average_period": period,
                },
                list(models),
            )


def test_icefalls_range_of_steps(tmp_path: Path) -> None:
    """The refusal of several `model_avg` names a command; it gives the mean of the range.

    The steps are no multiples of the period: icefall's
    average_checkpoints_with_averaged_model rounds them down, and so must we.
    """
    files = list(icefall([105, 207, 319], 10))
    for n, (file, _) in enumerate(files):
        torch.save(file, tmp_path / f"epoch-{n}.pt")
    line = fails(tmp_path, "epoch-0.pt", "epoch-1.pt", "epoch-2.pt", "--ema", "-o", "out.pt")
    command = line[line.index("--start-from") : line.index(")", line.index("--minus"))]
    found = averaged(tmp_path, *shlex.split(command)).tensors["encoder.weight"]
    between = files[2][1][len(files[0][1]) :]
    assert len(between) == 21
    columns = zip(*(model.tolist() for model in between), strict=True)
    exact = [sum(map(Fraction, column), Fraction(0)) / 21 for column in columns]
    largest = max(float(model.abs().max()) for model in files[2][1])
    errors = [abs(Fraction(a) - b) for a, b in zip(found.tolist(), exact, strict=True)]
    # The run rounds each of its updates three times; the difference amplifies that.
    assert max(errors) <= Fraction(31 + 10, 21) * 3 * 31 * Fraction(largest) / 2**53
    line = fails(tmp_path, "--start-from", "epoch-2.pt", "--minus", "epoch-0.pt", "-o", "no.pt")
    assert "epoch-2.pt: does not record" in line and "--ema" in line


REFUSED = {
    "--start-from first.pt --minus all.pt": "no checkpoints are left. Give the later average",
    "--start-from all.pt --minus all.pt": "no checkpoints are left",
    "--start-from rest.pt --minus first.pt": "first.pt: was made from epoch_0.pt, which is not",
    "--start-from all.pt --minus epoch_1.pt": "epoch_1.pt: does not record how many checkpoints",
    "--start-from all.pt --minus [fr]*st.pt": "2 are given with --minus. Give one file",
    "--start-from [ar]*.pt --minus first.pt": "2 are given with --start-from",
}


@pytest.mark.parametrize("line", REFUSED)
def test_no_difference(folder: Path, line: str) -> None:
    """What cannot be the mean of the rest is refused in one line that says why."""
    code = 2 if "2 are given" in REFUSED[line] else 1
    assert REFUSED[line] in fails(folder, *line.split(), "-o", "no.pt", code=code)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--minus first.pt", "--minus needs one --start-from"),
        ("--start-from all.pt --start-from rest.pt --minus first.pt", "needs one --start-from"),
        ("epoch_1.pt --start-from all.pt --minus first.pt", "--minus takes no checkpoints"),
        ("--start-from all.pt --minus first.pt --bn-buffers mean", "cannot be combined with"),
    ],
)
def test_wrong_usage(folder: Path, line: str, says: str) -> None:
    """Options that --minus cannot be combined with are refused: exit 2."""
    ended = run(folder, *line.split(), "-o", "no.pt")
    assert ended.returncode == 2 and says in ended.stderr
    assert not (folder / "no.pt").exists()


def test_refused_by_the_api(folder: Path) -> None:
    """The API refuses what the command refuses, before it reads a file."""
    both: dict[str, Any] = {"start_from": folder / "all.pt", "minus": folder / "first.pt"}
    out = folder / "no.pt"
    with pytest.raises(ValueError, match="checkpoints"):
        swa_avg.average(folder / "epoch_1.pt", out, **both)
    for name, value in {"bn_buffers": "mean", "distances": True, "keep_wrapper": True}.items():
        with pytest.raises(ValueError, match=name):
            swa_avg.average([], out, **both, **{name: value})
    with pytest.raises(ValueError, match="start_from"):
        swa_avg.average([], out, minus=folder / "first.pt")
    with pytest.raises(SwaAvgError, match=r"Give one file with start_from"):
        swa_avg.average([], out, start_from=[folder / "all.pt", folder / "rest.pt"],
                        minus=folder / "first.pt")  # fmt: skip
    assert not out.exists()
