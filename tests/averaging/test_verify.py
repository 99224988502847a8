"""The output proven: read back before it takes its place, and with --verify made anew."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import oracle
import pytest
import stored
import torch
from folders import COPIED
from hypothesis import given, settings
from hypothesis import strategies as st
from injection import FLIP, Commands, Fault
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

import swa_avg
from swa_avg.averaging import verification
from swa_avg.averaging.prepare import planned
from swa_avg.averaging.sampling import _Elements
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.errors import OutputError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.tensors.strided import Box
from swa_avg.tensors.tensor import View

ALL = os.environ.get("SWA_AVG_FAULTS") == "all"  # else a bounded number of faults
FLOATS = list(oracle.FORMATS)
distributed = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    tied = torch.randn(6, 5)
    return {
        "a": torch.randn(30, 7),
        "half": torch.randn(4, 3, 2).half(),
        "brain": torch.randn(9).bfloat16(),
        "turned": torch.randn(5, 8).t(),
        "complex": torch.randn(5, dtype=torch.complex64),
        "tiny": torch.randn(6).to(torch.float8_e5m2),
        "n": torch.arange(7),
        "flag": torch.tensor([True, False]),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(float(seed)),
        "tied": tied,
        "alias": tied,
        "bn.running_mean": torch.randn(3),
        "bn.running_var": torch.rand(3),
        "bn.num_batches_tracked": torch.tensor(seed),
    }


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three checkpoints of many kinds of tensors, and folders of the same that are no views."""
    for seed in range(3):
        torch.save(state(seed), tmp_path / f"{seed}.pt")
        plain = {name: value.contiguous().clone() for name, value in state(seed).items()}
        (tmp_path / str(seed)).mkdir()
        save_file(plain, tmp_path / str(seed) / "model.safetensors", {"format": "pt"})
        dcp.save(
            {"model": plain, "epoch": seed}, checkpoint_id=tmp_path / f"dcp_{seed}", no_dist=True
        )
    return [tmp_path / f"{seed}.pt" for seed in range(3)]


OUTPUTS = {
    "torch": ("?.pt", "out.pt", {}),
    "safetensors": ("?.pt", "out.safetensors", {}),
    "wrapper": ("?.pt", "kept.pt", {"keep_wrapper": True}),
    "shards": ("[0-2]", "out", {"max_shard_size": 500}),
    "distributed": ("dcp_?", "out_dcp", {}),
    "wrapped distributed": ("dcp_?", "kept_dcp", {"keep_wrapper": True}),
    "wrapped folder": ("[0-2]", "kept", {"keep_wrapper": True}),
    "other dtype": ("?.pt", "half.pt", {"dtype": "bfloat16", "bn_buffers": "mean"}),
    "reset": ("?.pt", "reset.pt", {"bn_buffers": "reset"}),
    "one": ("2.pt", "one.pt", {"bn_buffers": "first"}),
}


@distributed
@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_right_is_found_right(tmp_path: Path, inputs: list[Path], name: str) -> None:
    """No false alarm, in any form, for any dtype; and the bytes are those of an unproven run."""
    pattern, output, options = OUTPUTS[name]
    swa_avg.average(tmp_path / pattern, tmp_path / output, verify=True, **options)
    there = stored.tensors(tmp_path / output)
    swa_avg.average(tmp_path / pattern, tmp_path / output, force=True, **options)
    again = stored.tensors(tmp_path / output)
    assert all(oracle.same_bits(there[n], again[n]) for n in there)


# Disks that write something else.

KINDS = ("deepspeed", "nemo")  # copies of the last checkpoint


@distributed
@pytest.mark.parametrize("form", ["zip", "safetensors", "shards", "wrapper", *KINDS])
def test_disk_that_writes_another_bit(
    tmp_path: Path, inputs: list[Path], commands: Commands, form: str
) -> None:
    """A bit flipped in each write in turn: --verify finds all of them, the reading back those
    in headers. Nothing is put in place, and the error names the output."""
    sources = [str(path) for path in inputs]
    more: list[str] = []
    names = {"zip": "o.pt", "safetensors": "o.safetensors", "wrapper": "o.pt", "nemo": "o.nemo"}
    output = names.get(form, "o")
    if form == "shards":
        sources = [str(path.with_suffix("")) for path in inputs]
        more = ["--max-shard-size", "500"]
    if form == "wrapper":
        more = ["--keep-wrapper"]
    if form in KINDS:
        save, name = COPIED[form]
        plain = [{name: value.contiguous() for name, value in state(n).items()} for n in range(3)]
        sources = [str(save(tmp_path / name.format(n), plain[n], n)) for n in range(3)]
    place = tmp_path / "place"
    place.mkdir()
    arguments = [*sources, "-o", output, "-f", "--threads", "1", *more]
    writes = [c for c, _ in commands.run(place, *arguments).calls].count("write")
    whole = stored.tensors(place / output)
    draw = random.Random(0)
    flips = found = 0
    for number in range(1, writes + 1, 1 if ALL else 1 + writes // 8):
        for verify in ([], ["--verify"]):
            fault = Fault(number, FLIP, draw.randrange(1 << 30), call="write")
            ended = commands.run(place, *arguments, *verify, fault=fault)
            if ended.code:
                assert ended.code == 1, ended.err
                assert ended.err.startswith(f"error: {output}: "), ended.err
                assert "was not written correctly" in ended.err
                found += not verify
                there = stored.tensors(place / output)
                assert all(oracle.same_bits(there[name], whole[name]) for name in whole)
            else:
                assert not verify, number
                assert commands.run(place, *arguments).code == 0
            assert [path.name for path in place.iterdir()] == [output]
        flips += 2
    # Every one of these lines tells to run the command again.
    ended = commands.run(place, *arguments, "--verify", fault=Fault(1, FLIP, 99, call="write"))
    assert ended.code == 1 and " Run the command again. If it fails again, " in ended.err
    assert commands.run(place, *arguments, "--verify").code == 0
    assert all(
        oracle.same_bits(stored.tensors(place / output)[name], whole[name]) for name in whole
    )
    print(f"{flips} writes with another bit: with --verify all found, else {found}")


DATA = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
data = [torch.arange(32.0).view(8, 4)]
"""


def test_disk_that_writes_another_statistic(tmp_path: Path, commands: Commands) -> None:
    """New BatchNorm statistics are read back too, in a file that is there already."""
    (tmp_path / "mine.py").write_text(DATA)
    (tmp_path / "place").mkdir()
    made: dict[str, Any] = {}
    exec(DATA, made)
    path = tmp_path / "place" / "swa.pt"
    torch.save(made["model"].state_dict(), path)
    before = path.read_bytes()
    arguments = (
        "--recompute-bn",
        "--data",
        f"{tmp_path / 'mine.py'}:data",
        "-o",
        "swa.pt",
        "--force",
    )
    calls = commands.run(tmp_path / "place", *arguments).calls
    assert path.read_bytes() != before
    writes = [call for call, _ in calls].count("write")
    assert writes > 6  # the copy, then three buffers and their checksums
    for number in range(2, writes + 1):
        path.write_bytes(before)
        fault = Fault(number, FLIP, 3, call="write")
        ended = commands.run(tmp_path / "place", *arguments, fault=fault)
        assert ended.code == 1
        assert ended.err.startswith("error: swa.pt: ") and ended.err.count("\n") == 1
        assert path.read_bytes() == before


# Averages that are wrong.


def proof(averaging: Any, path: Path, plan: Any = None) -> verification.Written:
    """Return what a file must be to be this average, its checksums as they are."""
    made = open_checkpoint(path)
    there = find_state_dict(made, "").tensors
    checksums = [there[work.name].record.crc32 or 0 for work in averaging.plan.works]
    made.close()
    return verification.Written(
        path=path,
        target=Path("target.pt"),
        states=averaging.states,
        plan=plan or averaging.plan,
        layout=averaging.layout,
        wrapped=False,
        checksums=checksums,
        headers=lambda: iter([]),
    )


def test_sample_finds_another_average(tmp_path: Path) -> None:
    """Whole and well-formed, but of other checkpoints, or with other weights."""
    for seed in range(3):
        torch.save({"w": state(seed)["a"], "v": state(seed)["half"]}, tmp_path / f"{seed}.pt")
    paths = [tmp_path / f"{seed}.pt" for seed in range(3)]
    swa_avg.average(paths, tmp_path / "right.pt")
    swa_avg.average(paths[1:], tmp_path / "wrong.pt")
    with planned(paths, tmp_path / "out.pt") as averaging:
        verification.verify(proof(averaging, tmp_path / "right.pt"))
        with pytest.raises(
            OutputError, match=r"target\.pt: [wv]: .* its value at \[0, 0.*is wrong"
        ):
            verification.verify(proof(averaging, tmp_path / "wrong.pt"))
        works = tuple(replace(work, weights=(1, 1, 2)) for work in averaging.plan.works)
        plan = replace(averaging.plan, works=works)
        with pytest.raises(OutputError, match=r"its value at .* is wrong"):
            verification.verify(proof(averaging, tmp_path / "right.pt", plan))


def test_reading_back_finds_another_file(tmp_path: Path) -> None:
    """Another name, dtype, shape, order of dimensions or tie than was planned."""
    torch.save({"w": torch.ones(4, 3), "v": torch.zeros(2)}, tmp_path / "in.pt")
    shared = torch.ones(12)
    others = {
        "is missing": {"w": torch.ones(4, 3)},
        "its dtype": {"w": torch.ones(4, 3).int(), "v": torch.zeros(2)},
        "its shape": {"w": torch.ones(3, 4), "v": torch.zeros(2)},
        "its stride": {"w": torch.ones(3, 4).t(), "v": torch.zeros(2)},
        "its place": {"v": torch.zeros(2), "w": torch.ones(4, 3)},
        "its checksum": {"w": torch.zeros(4, 3), "v": torch.zeros(2)},
        "is not planned": {"w": torch.ones(4, 3), "v": torch.zeros(2), "x": torch.zeros(2)},
        "its place ": {"w": shared.view(4, 3), "v": shared[:2]},
    }
    swa_avg.average(tmp_path / "in.pt", tmp_path / "right.pt")
    with planned(tmp_path / "in.pt", tmp_path / "out.pt") as averaging:
        written = proof(averaging, tmp_path / "right.pt")
        verification.read_back(written)
        for what, tensors in others.items():
            torch.save(tensors, tmp_path / "of_torch.pt")
            swa_avg.average(tmp_path / "of_torch.pt", tmp_path / "other.pt", force=True)
            other = replace(written, path=tmp_path / "other.pt")
            with pytest.raises(OutputError, match=what.strip()):
                verification.read_back(other)
        (tmp_path / "other.pt").write_bytes(b"PK\x03\x04")
        with pytest.raises(
            OutputError, match=r"target\.pt: was not written .* is not a complete zip"
        ):
            verification.read_back(other)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FLOATS), st.data())
def test_nearest_number_is_the_oracles(
    tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, data: st.DataObject
) -> None:
    """An element holds a fraction if, and only if, it is the nearest of its dtype, ties to even."""
    form = oracle.FORMATS[dtype]
    bits = st.integers(0, form.largest - 1)
    low = data.draw(bits)
    below, above = form.value(low), form.value(low + 1)
    assert below is not None and above is not None
    share = data.draw(st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1)])
                      | st.fractions(0, 1, max_denominator=10**6))  # fmt: skip
    exact = below + (above - below) * share
    negative = data.draw(st.booleans())
    exact = -exact if negative else exact
    sign = form.sign if negative else 0
    if form.unsigned_zero and negative and low == 0:
        return
    path = tmp_path_factory.mktemp("holds") / "x.pt"
    torch.save(oracle.from_bits([sign | low, sign | (low + 1)], dtype), path)
    stored.settled(path)
    opened = open_checkpoint(path)
    assert isinstance(opened.tree, View)
    found = _Elements(opened.located(opened.tree), Box((0,), (2,)))
    opened.close()
    nearest = form.bits(exact)
    for number, pattern in enumerate((sign | low, sign | (low + 1))):
        assert found.holds(number, exact) == (form.value(pattern) == form.value(nearest))
