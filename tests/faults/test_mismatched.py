"""The catalogue of faults, 49 to 59: sound checkpoints that do not belong together."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import oracle
import pytest
import torch
from command import averaged, fails, fault, refused, run
from safetensors.torch import save_file
from torch import Tensor, nn


def weights(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Weights of a small model; None takes one away."""
    torch.manual_seed(seed)
    made = {"a.weight": torch.randn(4, 3), "b": torch.randn(5), "c": torch.randn(7), **changes}
    return {name: value for name, value in made.items() if value is not None}


def save(folder: Path, *states: Any) -> None:
    for number, state in enumerate(states):
        torch.save(state, folder / f"{number}.pt")


def mean(*states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: oracle.mean([state[name] for state in states]) for name in states[0]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert all(oracle.same_bits(found[name], value) for name, value in expected.items())


MANY = {f"layer{number}": torch.ones(1) for number in range(5)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"b": None},
            "0.pt: lacks 1 tensor that 1.pt has: b",
            marks=fault(49, "a key missing in one", "refused: both files, the first few, a count"),
        ),
        pytest.param(
            {"a.weight": None, "b": None, "c": None, "d": torch.ones(1)},
            "0.pt: lacks 3 tensors that 1.pt has: a.weight, b, c",
            marks=fault(49),
        ),
        pytest.param(
            MANY,
            "0.pt: has 5 tensors that 1.pt lacks: layer0, layer1, layer2 and 2 more",
            marks=fault(50, "an extra key in one", "as 49"),
        ),
        pytest.param(
            {"b": torch.ones(6)},
            "0.pt: b: has shape [6], expected [5] as in 1.pt",
            marks=fault(51, "another shape", "refused, naming both"),
        ),
        pytest.param(
            {"b": torch.ones(5).half()},
            "0.pt: b: has dtype float16, expected float32 as in 1.pt. Choose one with --dtype",
            marks=fault(52, "another dtype", "refused; averaged with `--dtype`"),
        ),
        pytest.param(
            {"b": 0.5},
            "0.pt: lacks 1 tensor that 1.pt has: b",
            marks=fault(54, "a tensor in one, a number in another", "refused"),
        ),
    ],
)
def test_checkpoints_that_do_not_agree_are_refused(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    """The line names both files and the tensor, before a tensor is read."""
    save(tmp_path, weights(0, **changes), weights(1))
    refused(tmp_path, "?.pt", says=f"error: {says}")


@pytest.mark.parametrize("place", [0, 2, 4])
@fault(51)
def test_odd_one_out_is_named(tmp_path: Path, place: int) -> None:
    """Wherever it stands, the last one included; the option in the line leaves it out."""
    states = [weights(number) for number in range(5)]
    states[place] |= {"b": torch.ones(6), "d": torch.ones(1)}
    save(tmp_path, *states)
    other = 4 if place != 4 else 3
    said = fails(tmp_path, "?.pt", "-o", "out.pt")
    assert said == (
        f"error: {place}.pt: has 1 tensor that {other}.pt lacks: d. The other 4 agree with each "
        f"other: leave it out with --exclude {place}.pt (1 more disagreement: -v lists all)."
    )
    every = run(tmp_path, "?.pt", "-o", "out.pt", "-v")
    assert every.returncode == 1 and f"{place}.pt: b: has shape [6]" in every.stderr
    del states[place]
    done = averaged(tmp_path, "?.pt", "--exclude", f"{place}.pt")
    assert_same(done.tensors, mean(*states))


@fault(52)
def test_dtypes_are_made_one_on_demand(tmp_path: Path) -> None:
    """What the hint says helps: the mean of both, rounded once to the dtype asked for."""
    states = [weights(0, b=torch.randn(5).half()), weights(1)]
    save(tmp_path, *states)
    done = averaged(tmp_path, "?.pt", "--dtype", "float16")
    expected = {n: oracle.mean([s[n] for s in states], torch.float16) for n in states[1]}
    assert_same(done.tensors, expected)


@fault(53, "weights tied in some inputs only", "averaged, untied, with a note")
def test_ties_that_differ(tmp_path: Path) -> None:
    """Two tensors in one checkpoint, one in the other: two in the output, both right."""
    tied = torch.randn(5)
    states = [weights(0), weights(1, b=tied, b2=tied)]
    states[0]["b2"] = torch.randn(5)
    save(tmp_path, *states)
    done = averaged(tmp_path, "?.pt")
    assert_same(done.tensors, mean(*states[::-1]))
    assert done.tensors["b"].data_ptr() != done.tensors["b2"].data_ptr()
    assert any("tied only in some checkpoints; written untied" in note for note in done.notes)


@fault(55, "a prefix on the names of some inputs only", "averaged under the plain names")
def test_prefix_on_some(tmp_path: Path) -> None:
    """DDP's and compile's prefixes are taken off where they are."""
    states = [weights(seed) for seed in range(3)]
    prefixes = ("module.", "", "_orig_mod.module.")
    wrapped = [
        {prefix + name: value for name, value in state.items()}
        for prefix, state in zip(prefixes, states, strict=True)
    ]
    save(tmp_path, *wrapped)
    assert_same(averaged(tmp_path, "?.pt").tensors, mean(*states))


@fault(56, "`--key` names nothing", "refused, listing where tensors are")
def test_absent_key_is_refused_with_candidates(tmp_path: Path) -> None:
    """The places where there are tensors are named."""
    save(tmp_path, {"nets": {"gen": weights(), "dis": weights()}, "epoch": 3})
    says = ["0.pt: has no state_dict at 'nets.ema'", "tensors are at: nets.gen, nets.dis"]
    refused(tmp_path, "0.pt", "--key", "nets.ema", says=says)


@fault(57, "EMA and optimizer beside the weights", "averaged; only the weights are read")
def test_only_the_chosen_dict_is_read(tmp_path: Path) -> None:
    """Bytes read are those of the weights; damage to what lies beside them does not matter."""
    states = [weights(seed) for seed in range(2)]
    for number, state in enumerate(states):
        moments = torch.rand(1000)
        content = {
            "optimizer": {"state": {0: {"exp_avg": moments}}, "param_groups": [{"lr": 0.1}]},
            "state_dict": state,
            "ema": weights(9),
        }
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        data = bytearray(path.read_bytes())
        data[data.index(moments.numpy().tobytes()) + 77] ^= 1
        path.write_bytes(data)
    done = averaged(tmp_path, "?.pt", "--json")
    assert_same(done.tensors, mean(*states))
    report = json.loads(done.stdout)
    assert report["bytes_read"] == sum(v.nbytes for state in states for v in state.values())
    assert any(
        "also contains averaged weights, at ema; not used" in note for note in report["notes"]
    )


@fault(58, "a whole pickled module", "averaged from its inert state")
def test_whole_module(tmp_path: Path) -> None:
    """Its parameters and buffers are read from what its pickle says; no class of it is needed."""
    networks = []
    for number in range(2):
        torch.manual_seed(number)
        networks.append(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(networks[-1], tmp_path / f"{number}.pt")
    done = averaged(tmp_path, "?.pt")
    states = [network.state_dict() for network in networks]
    assert set(done.tensors) == set(states[0])
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        assert oracle.same_bits(done.tensors[name], oracle.mean([state[name] for state in states]))
    networks[0].load_state_dict(done.tensors)


def save_dcp(state: dict[str, Tensor], path: Path) -> None:
    boxes = {name: [((0,) * value.dim(), tuple(value.shape))] for name, value in state.items()}
    folders.save_chunks(path, state, boxes)


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "0.pt": torch.save,
    "1.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "2.safetensors": save_file,
    "3": lambda state, path: folders.save_shards(path, state),
    "4": save_dcp,
    "5.ckpt": lambda state, path: torch.save({"state_dict": state, "epoch": 5}, path),
}


@fault(59, "inputs of different formats", "averaged")
def test_formats_mix(tmp_path: Path) -> None:
    """A zip, a legacy file, safetensors, shards, a distributed folder, a framework's wrapper."""
    for seed, (name, saver) in enumerate(SAVERS.items()):
        saver(weights(seed), tmp_path / name)
    done = averaged(tmp_path, *SAVERS)
    assert_same(done.tensors, mean(*(weights(seed) for seed in range(len(SAVERS)))))
