"""What others set for the whole process has no influence on an average."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from command import load, run

from swa_avg.kernel.arithmetic import default_arithmetic

MODULE = """
import ctypes, torch, numpy
from torch import nn

torch.set_flush_denormal(True)
torch.set_default_dtype(torch.float64)
numpy.seterr(all="raise")
ctypes.CDLL(None).fesetround(0x800)  # upward
model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).float()
forward = lambda model, batch: model(batch.float())
loader = [torch.eye(3) * n for n in range(1, 4)]
"""
UPWARD = 0x800  # FE_UPWARD on x86-64
x86 = pytest.mark.skipif("__import__('platform').machine() != 'x86_64'")


def state(seed: int) -> dict[str, Any]:
    """Return weights of that module, and tiny numbers of each dtype."""
    torch.manual_seed(seed)
    made: dict[str, Any] = {
        name: value.clone()
        for name, value in torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        .state_dict()
        .items()
    }
    made["0.weight"] = torch.tensor(
        [[1.0, 2.0**-140, 0.1], [2.0**-149, 1.0, 0.3], [0.7, 1.0, 1e-40]]
    )
    made["0.weight"] *= seed + 1
    return made


@x86
@pytest.mark.parametrize("threads", ["1", "2"])
def test_settings_of_the_users_module_change_no_bit(tmp_path: Path, threads: str) -> None:
    """Flush-to-zero, upward rounding, numpy that raises: the mean is right, --verify agrees."""
    states = [state(seed) for seed in range(3)]
    for number, made in enumerate(states):
        torch.save(made, tmp_path / f"epoch_{number}.pt")
    (tmp_path / "mod.py").write_text(MODULE)
    bn = ("--recompute-bn", "--data", "mod:loader", "--verify", "--threads", threads)
    ended = run(tmp_path, "epoch_0.pt", "epoch_1.pt", "epoch_2.pt", "-o", "out.pt", *bn)
    assert ended.returncode == 0, ended.stderr
    found = load(tmp_path / "out.pt")
    for name in ("0.weight", "0.bias", "1.weight"):
        assert oracle.same_bits(found[name], oracle.mean([made[name] for made in states])), name


@x86
def test_arithmetic_is_the_default_inside_and_what_it_was_outside() -> None:
    """Rounding mode, flush-to-zero and numpy's reactions are put back."""
    library = ctypes.CDLL(None)
    before, warned = library.fegetround(), np.geterr()
    tiny = np.array([2.0**-1074, 2.0**-1073])
    try:
        library.fesetround(UPWARD)
        torch.set_flush_denormal(True)
        with default_arithmetic():
            assert library.fegetround() == 0
            assert (tiny * 1.0 == tiny).all() and tiny.sum() == 3 * 2.0**-1074
            assert np.array([1.0]) + 2.0**-60 == 1.0
            assert np.array([1e300]) * 1e300 == np.inf
        assert library.fegetround() == UPWARD
        assert (tiny * 1.0 == 0).all()
    finally:
        torch.set_flush_denormal(False)
        library.fesetround(before)
    assert np.geterr() == warned


def test_zero_mean_has_no_distances(tmp_path: Path) -> None:
    """Checkpoints whose mean is zero, or too large to be squared: null, and JSON."""
    torch.manual_seed(0)
    values = torch.randn(9)
    huge = torch.full((5,), 1e200, dtype=torch.float64)
    for number, sign in enumerate((1, -1)):
        torch.save({"a.w": sign * values}, tmp_path / f"zero_{number}.pt")
        torch.save({"a.w": (2 + sign) * huge}, tmp_path / f"huge_{number}.pt")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for name in ("zero", "huge"):
        paths = (f"{name}_0.pt", f"{name}_1.pt", "-o", f"{name}.pt", "--distances")
        ended = run(tmp_path, *paths, "--json")
        assert ended.returncode == 0, ended.stderr
        told = json.loads(ended.stdout, parse_constant=refuse)["distances"]
        assert told["overall"] == [None, None] and told["modules"] == {"a": [None, None]}
        assert "-  zero_0.pt" in run(tmp_path, *paths, "-f").stdout or name == "huge"
