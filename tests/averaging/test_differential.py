"""Random models through torch or safetensors, the command and back: the exact reference.

Any finite bits, any dtype, shape and stride, ties, wrappers, odd names; the command
proves its output (`--verify`) on the way, so that a false alarm would be seen too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import oracle
import pytest
import stored
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from injection import Commands
from safetensors.torch import load_file, save_file
from torch import Tensor

from swa_avg.tensors.tensor import is_dense

SCALE = 100 if os.environ.get("SWA_AVG_FAULTS") == "all" else 4  # of the number of examples
FLOATS = list(oracle.FORMATS)
COMPLEX = list(oracle.PARTS)
EXACT = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
# What safetensors can hold.
PLAIN = [*FLOATS, torch.complex64, *EXACT]
NAMES = (
    *("weight", "layer.0.weight", "module.a", "a.b.c.d", "état", "ключ", "a b", "a/b", "x" * 200),
    *("\x1b[31m", "tab\there", "0", "state_dict", "epoch", "модель.вес", "emb🙂", "..", "a\\b"),
)


def finite(draw: st.DrawFn, dtype: torch.dtype, count: int) -> Tensor:
    """Return any finite numbers, chosen by their bits: subnormal, huge, zeros of both signs."""
    if dtype in oracle.PARTS:
        return torch.view_as_complex(finite(draw, oracle.PARTS[dtype], 2 * count).view(count, 2))
    if dtype in EXACT:
        high = 1 if dtype == torch.bool else torch.iinfo(dtype).max
        made = draw(st.lists(st.integers(0, high), min_size=count, max_size=count))
        return torch.tensor(made, dtype=dtype)
    form = oracle.FORMATS[dtype]
    magnitudes = st.integers(0, form.largest) | st.sampled_from([0, 1, form.largest])
    signs = st.sampled_from([0, form.sign])
    patterns = []
    for _ in range(count):
        sign, magnitude = draw(signs), draw(magnitudes)
        patterns.append(magnitude | (0 if form.unsigned_zero and not magnitude else sign))
    return oracle.from_bits(patterns, dtype)


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype], views: bool) -> Any:
    """Return how to draw one tensor, of the same kind for each checkpoint."""
    dtype = draw(st.sampled_from(dtypes))
    # Integers of more dimensions that differ are quantised weights, which are refused.
    most = 1 if dtype in EXACT and dtype != torch.bool else 3
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=most)))
    order = draw(st.permutations(range(len(shape)))) if views else range(len(shape))
    gap = draw(st.sampled_from([1, 1, 1, 2])) if views and shape else 1

    def make() -> Tensor:
        outer = [shape[dim] for dim in order]
        if outer:
            outer[-1] *= gap
        count = int(torch.Size(outer).numel())
        base = finite(draw, dtype, count).reshape(outer)
        base = base[..., ::gap] if outer else base
        return base.permute([list(order).index(dim) for dim in range(len(shape))])

    return make


WRAPPERS = {
    "none": (lambda state: state, ()),
    "state_dict": (lambda state: {"epoch": 1, "state_dict": state, "lr": [0.1, None]}, ()),
    "model": (lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(3)}}}, ()),
    "odd": (lambda state: {"мой": {"вес": state}, "other": 1}, ("--key", "мой.вес")),
    "prefix": (lambda state: {f"module.{name}": value for name, value in state.items()}, ()),
}


@st.composite
def models(draw: st.DrawFn, dtypes: list[torch.dtype], views: bool) -> list[dict[str, Tensor]]:
    """Checkpoints of one model, tied alike."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    kinds = {name: draw(tensors(dtypes, views)) for name in names}
    ties = {name: draw(st.sampled_from(names)) for name in names} if views else {}
    tied = {n: of for n, of in ties.items() if names.index(of) < names.index(n)}
    states = []
    for _ in range(draw(st.integers(1, 3))):
        state: dict[str, Tensor] = {}
        for name in names:
            state[name] = state[tied[name]] if name in tied else kinds[name]()
        states.append(state)
    for number, one in enumerate(states):  # the same twice is counted once
        for other in states[:number]:
            assume(not all(oracle.same_bits(one[name], other[name]) for name in names))
    # Empty tensors alone are the stand-ins of ZeRO-3, which are refused.
    empty = [value for value in states[-1].values() if value.shape == (0,)]
    assume(len(empty) <= 1)
    # Integers beside optimizer state are no model.
    assume(any(value.is_floating_point() or value.is_complex() for value in states[-1].values()))
    # A root that looks like wrappers, or bears their prefix, is another test's matter.
    assume(not {"state_dict", "epoch"} & set(names))
    assume(not all(name.startswith("module.") for name in names))
    return states


def check(path: Path, states: list[dict[str, Tensor]], found: dict[str, Tensor]) -> None:
    """Compare an output with the exact reference; our own reader sees the same."""
    assert list(found) == list(states[-1]) or path.suffix == ".safetensors"
    for name, last in states[-1].items():
        mean = last.dtype in oracle.FORMATS or last.dtype in oracle.PARTS
        exact = oracle.mean([state[name] for state in states]) if mean else last
        assert oracle.same_bits(found[name], exact), name
    ours = stored.tensors(path)
    assert all(oracle.same_bits(ours[name], value) for name, value in found.items())


@settings(max_examples=10 * SCALE, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_torch_in_torch_out(
    tmp_path_factory: pytest.TempPathFactory, commands: Commands, data: st.DataObject
) -> None:
    """In either of torch's formats and any wrapper: values, order, strides and ties."""
    states = data.draw(models([*FLOATS, *COMPLEX, *EXACT], views=True))
    wrap, key = WRAPPERS[data.draw(st.sampled_from(sorted(WRAPPERS)))]
    legacy = data.draw(st.booleans())
    protocol = data.draw(st.sampled_from([0, 2, 4]))
    folder = tmp_path_factory.mktemp("torch")
    for number, state in enumerate(states):
        torch.save(
            wrap(state),
            folder / f"{number}.pt",
            _use_new_zipfile_serialization=not legacy,
            pickle_protocol=protocol,
        )
    sources = [f"{number}.pt" for number in range(len(states))]
    ended = commands.run(folder, *sources, "-o", "out.pt", "--verify", *key)
    assert ended.code == 0, ended.err
    assert "\nverified: the output was read again" in ended.out
    found = torch.load(folder / "out.pt", weights_only=True)
    check(folder / "out.pt", states, found)
    last = states[-1]
    for name, value in last.items():
        if value.numel() and is_dense(tuple(value.shape), value.stride()):
            assert found[name].stride() == value.stride()
        for other, tied in last.items():
            if value.numel() and tied is value:
                assert found[name].data_ptr() == found[other].data_ptr()


@settings(max_examples=6 * SCALE, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_safetensors_in_and_out(
    tmp_path_factory: pytest.TempPathFactory, commands: Commands, data: st.DataObject
) -> None:
    """As files, and as folders in shards."""
    states = data.draw(models(PLAIN, views=False))
    folder = tmp_path_factory.mktemp("safe")
    sharded = data.draw(st.booleans())
    sources = []
    for number, state in enumerate(states):
        plain = {name: value.contiguous() for name, value in state.items()}
        path = (
            folder / str(number) / "model.safetensors"
            if sharded
            else folder / f"{number}.safetensors"
        )
        path.parent.mkdir(exist_ok=True)
        save_file(plain, path, {"format": "pt"})
        sources.append(path.relative_to(folder).parts[0])
    output = "out" if sharded else "out.safetensors"
    more = ["--max-shard-size", "20"] if sharded else []
    ended = commands.run(folder, *sources, "-o", output, "--verify", *more)
    assert ended.code == 0, ended.err
    target = folder / output
    parts = sorted(target.glob("*.safetensors")) if sharded else [target]
    found = {name: value for part in parts for name, value in load_file(part).items()}
    in_order = {name: found[name] for name in states[-1]}
    assert in_order.keys() == found.keys()
    check(target, states, in_order)


@settings(max_examples=4 * SCALE, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_average_that_goes_on(
    tmp_path_factory: pytest.TempPathFactory, commands: Commands, data: st.DataObject
) -> None:
    """An average of n checkpoints weighs n."""
    count = data.draw(st.integers(2, 4))
    kinds = data.draw(
        st.lists(tensors([torch.float32, torch.float16], True), min_size=1, max_size=3)
    )
    states = [{f"w{n}": make() for n, make in enumerate(kinds)} for _ in range(count + 1)]
    for number, one in enumerate(states):
        for other in states[:number]:
            assume(not all(oracle.same_bits(one[name], other[name]) for name in one))
    # Empty tensors alone are the stand-ins of ZeRO-3, which are refused.
    assume(sum(value.shape == (0,) for value in states[-1].values()) <= 1)
    folder = tmp_path_factory.mktemp("on")
    for number, state in enumerate(states):
        torch.save(state, folder / f"{number}.pt")
    sources = [f"{number}.pt" for number in range(count)]
    assert commands.run(folder, *sources, "-o", "base.pt").code == 0
    ended = commands.run(
        folder, f"{count}.pt", "--start-from", "base.pt", "-o", "out.pt", "--verify"
    )
    assert ended.code == 0, ended.err
    base = torch.load(folder / "base.pt", weights_only=True)
    found = torch.load(folder / "out.pt", weights_only=True)
    for name, last in states[-1].items():
        same = [base[name]] * count
        assert oracle.same_bits(found[name], oracle.mean([*same, last])), name
