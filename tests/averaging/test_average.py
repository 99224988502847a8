"""End to end: real files in, one file out, every bit of it known beforehand."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model
from stored import settled
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import swa_avg
from swa_avg.errors import LayoutError, MismatchError, NotFiniteError, OutputError
from swa_avg.kernel import mean, tasks
from swa_avg.planning.settings import BN_BUFFERS, OUTPUT_DTYPES

Save = Callable[[Mapping[str, Any], Path], None]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def save_safetensors(state: Mapping[str, Any], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in state.items()}, path)


SAVERS: dict[str, Save] = {".pt": torch.save, ".safetensors": save_safetensors}
suffixes = pytest.mark.parametrize("suffix", SAVERS)


def save_all(folder: Path, states: list[Any], suffix: str = ".pt") -> list[Path]:
    paths = [folder / f"in_{number}{suffix}" for number in range(len(states))]
    for state, path in zip(states, paths, strict=True):
        SAVERS[suffix](state, path)
        settled(path)
    return paths


def load(path: Path) -> dict[str, Any]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def average(folder: Path, states: list[Any], out: str = "out.pt", **rules: Any) -> dict[str, Any]:
    """Save states with torch, average them, load the output."""
    swa_avg.average(save_all(folder, states), folder / out, **rules)
    return load(folder / out)


def has_mean(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert oracle.same_bits(found[name], value), (name, found[name], value)


def refused(folder: Path, states: list[Any], error: type, out: str = "out.pt", **rules: Any) -> str:
    """Average and expect a refusal that writes nothing; return its line."""
    paths = save_all(folder, states)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(error) as caught:
        swa_avg.average(paths, folder / out, **rules)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    return str(caught.value)


# A run of a BatchNorm network.


def network() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 6, 3),
            norm=nn.BatchNorm2d(6),
            act=nn.ReLU(),
            flat=nn.Flatten(),
            head=nn.Linear(6 * 4 * 4, 5, bias=False),
        )
    )


def train(epochs: int) -> tuple[list[dict[str, Any]], AveragedModel]:
    """Train for real; return each epoch's state_dict and torch's own running average."""
    model = network()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    states = []
    for _ in range(epochs):
        for _ in range(3):
            optimizer.zero_grad()
            images, labels = torch.randn(16, 1, 6, 6), torch.randint(5, (16,))
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        averaged.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))
    return states, averaged


def is_buffer(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def test_epochs_of_a_batchnorm_network(tmp_path: Path) -> None:
    """Weights are the exact mean, BatchNorm buffers those of epoch 11, not 9; it loads strictly."""
    states, _ = train(12)
    for epoch, state in enumerate(states):
        path = tmp_path / f"epoch_{epoch}.pt"
        torch.save({"epoch": epoch, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    out = tmp_path / "swa.pt"
    report = swa_avg.average(str(tmp_path / "epoch_*.pt"), out)
    found = torch.load(out, weights_only=True)
    assert type(found) is OrderedDict
    assert list(found) == list(states[-1])
    assert found._metadata == states[-1]._metadata
    for name, value in found.items():
        exact = states[11][name] if is_buffer(name) else oracle.mean([s[name] for s in states])
        assert oracle.same_bits(value, exact), name
    assert not torch.equal(found["norm.running_mean"], states[9]["norm.running_mean"])
    assert report.counts == {"averaged": 5, "kept": 3, "reset": 0, "copied": 0}
    assert report.stale
    assert [source.epoch for source in report.inputs] == list(range(12))
    assert not network().load_state_dict(found, strict=True).missing_keys


def test_epochs_in_safetensors(tmp_path: Path) -> None:
    """The same run gives the same bits from and to safetensors."""
    states, _ = train(11)
    paths = save_all(tmp_path, states, ".safetensors")
    swa_avg.average(paths, tmp_path / "a.safetensors")
    swa_avg.average(save_all(tmp_path, states), tmp_path / "a.pt")
    assert_same(load(tmp_path / "a.safetensors"), load(tmp_path / "a.pt"))
    network().load_state_dict(load(tmp_path / "a.safetensors"), strict=True)


def test_equals_the_average_that_torch_keeps_while_training(tmp_path: Path) -> None:
    """AveragedModel's running mean in float32 differs from ours by its own roundings only."""
    epochs = 10
    states, averaged = train(epochs)
    found = average(tmp_path, states)
    for name, theirs in averaged.module.named_parameters():
        largest = torch.stack([state[name] for state in states]).abs().amax(0)
        # Each of its updates a += (w - a) / n rounds three times.
        assert (found[name] - theirs).abs().le(3 * epochs * 2**-24 * largest).all(), name
    for name, theirs in averaged.module.named_buffers():
        assert found[name].shape == theirs.shape


def test_file_of_an_averaged_model_loads_into_the_plain_model(tmp_path: Path) -> None:
    """`module.` and n_averaged, the known trouble of a saved SWA model, are gone."""
    states, averaged = train(3)
    plain = average(tmp_path, [averaged.state_dict()])
    assert list(plain) == list(states[-1])
    network().load_state_dict(plain, strict=True)
    assert_same(plain, averaged.module.state_dict())


@pytest.mark.parametrize(
    ("wrapped", "counted"),
    [
        ("module.{}", None),
        ("_orig_mod.{}", None),
        ("module._orig_mod.{}", None),
        ("_orig_mod.module.{}", None),
        ("module.{}", "n_averaged"),
        ("module._orig_mod.{}", "n_averaged"),
        ("_orig_mod.module.{}", "_orig_mod.n_averaged"),
        ("module.module.{}", "n_averaged"),
        ("module.module.{}", "module.n_averaged"),
    ],
)
def test_prefixes_of_wrappers_are_stripped(
    tmp_path: Path, wrapped: str, counted: str | None
) -> None:
    """Whatever wraps the model, the output has the names, and _metadata, of the plain one."""
    plain = network().state_dict()
    state = OrderedDict((wrapped.format(name), value) for name, value in plain.items())
    state._metadata = {wrapped.format(p).removesuffix("."): v for p, v in plain._metadata.items()}
    if counted:
        state[counted] = torch.tensor(3)
    # One input is wrapped, the other is not.
    found = average(tmp_path, [plain, state])
    assert list(found) == list(plain)
    assert found._metadata == plain._metadata
    assert_same(found, plain)


def test_prefix_of_some_names_only_is_kept(tmp_path: Path) -> None:
    """A model may have a part that is called `module`."""
    state = {"module.a": torch.ones(2), "b": torch.ones(2), "n_averaged": torch.tensor(3)}
    assert list(average(tmp_path, [state])) == list(state)


# Kinds of tensors.


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def kinds(seed: int) -> dict[str, Tensor]:
    """A state_dict with all that a state_dict can have, different for each seed."""
    torch.manual_seed(seed)
    base = torch.randn(6, 10)
    state = {
        "plain": torch.randn(3, 4),
        "transposed": torch.randn(5, 7).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "rows": base[1:4],
        "columns": base[:, 2:7:2],
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "expanded": torch.randn(1, 4).expand(3, 4),
        "one": torch.randn(1, 1, 5, 1),
        "f64": torch.randn(9, dtype=torch.float64),
        "complex": torch.randn(4, dtype=torch.complex64),
        "mask": torch.full((3, 3), -torch.inf).triu(1),
    }
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        state[str(dtype)] = torch.randn(33).to(dtype)
    state["tied"] = state["plain"]
    return state


def exact_things() -> dict[str, Tensor]:
    return {
        "large": torch.tensor([2**53 + 1, -(2**62) - 1, 2**24 + 1]),
        "bool": torch.tensor([True, False, True]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "uint64": torch.tensor([2**64 - 1, 1], dtype=torch.uint64),
        "uint16": torch.tensor([65535, 1], dtype=torch.uint16),
        "int8": torch.arange(-128, 127, dtype=torch.int8),
        "step": torch.tensor(2**53 + 1),
    }


@pytest.mark.parametrize("out", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("count", [1, 3])
def test_kinds_of_tensors(tmp_path: Path, out: str, count: int) -> None:
    """Every kind has the right values, dtype and shape in both formats, and back again."""
    states = [{**kinds(seed), **exact_things()} for seed in range(count)]
    expected = {name: oracle.mean([s[name] for s in states]) for name in kinds(0)}
    expected.update(exact_things())
    found = average(tmp_path, states, out)
    if out.endswith(".safetensors"):  # one copy of what is tied; the alias is in the metadata
        tied = expected.pop("tied")
        assert_same(found, expected)
        expected["tied"] = tied
        swa_avg.average([], tmp_path / "back.pt", start_from=tmp_path / out)
        found = load(tmp_path / "back.pt")
    else:
        for name in ("transposed", "channels_last", "one"):
            assert found[name].stride() == states[-1][name].stride(), name
        assert found["rows"].untyped_storage().nbytes() == found["rows"].nbytes  # a view is cut out
    assert_same(found, expected)
    assert same_storage(found["tied"], found["plain"])
    assert not same_storage(found["rows"], found["columns"])


def test_complex128_goes_into_a_zip_and_not_into_safetensors(tmp_path: Path) -> None:
    """What safetensors cannot hold is refused by name."""
    states = [{"w": torch.randn(50, dtype=torch.complex128)} for _ in range(3)]
    assert_same(average(tmp_path, states), {"w": oracle.mean([s["w"] for s in states])})
    line = refused(tmp_path, states, OutputError, "o.safetensors")
    assert "w: has dtype complex128" in line


def test_integers_that_differ_are_those_of_the_last(tmp_path: Path) -> None:
    """Integers have no mean; the report says which were not the same."""
    states = [{"w": torch.ones(2), "ids": torch.tensor([n, 2**60 + n])} for n in range(3)]
    report = swa_avg.average(save_all(tmp_path, states), tmp_path / "out.pt")
    assert load(tmp_path / "out.pt")["ids"].tolist() == [2, 2**60 + 2]
    assert any(note.startswith("ids: differs between checkpoints") for note in report.notes)


def test_values_beside_the_tensors(tmp_path: Path) -> None:
    """Plain values are kept, of the last; the output still loads with weights_only."""
    extra = {"text": "a", "n": 3, "list": [1, (2.5, None)], "ordered": OrderedDict(b=1, a=b"\xff")}
    states = [{"w": torch.randn(3), "v": torch.randn(3), **extra, "last": n} for n in range(2)]
    for state in states:
        state.update({f"t{n}": torch.ones(1) for n in range(6)})
    found = average(tmp_path, states)
    assert list(found) == list(states[0])
    assert {name: found[name] for name in extra} == extra
    assert found["last"] == 1


def test_parameters_and_subclasses_become_tensors(tmp_path: Path) -> None:
    """What wraps a tensor is taken off; the numbers are its."""

    class Custom(torch.Tensor):
        pass

    values = [torch.randn(4) for _ in range(4)]
    state = {
        "parameter": nn.Parameter(values[0]),
        "frozen": nn.Parameter(values[1], requires_grad=False),
        "grad": values[2].clone().requires_grad_(),
        "buffer": nn.Buffer(values[3]),
    }
    found = average(tmp_path, [state])
    assert {type(value) for value in found.values()} == {torch.Tensor}
    assert not any(value.requires_grad for value in found.values())
    assert_same(found, dict(zip(state, values, strict=True)))


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.eye(3).to_sparse(), "sparse tensor"),
        (torch.ones(2, device="meta"), "meta tensor, which has no data"),
        (torch.ones(2, dtype=torch.complex64).conj(), "lazily conjugated"),
    ],
)
def test_tensor_without_dense_data_is_refused(tmp_path: Path, tensor: Tensor, what: str) -> None:
    """No mean is made of what cannot be read as numbers; the error names it."""
    line = refused(tmp_path, [{"w": torch.ones(2), "v": torch.ones(2), "odd": tensor}], LayoutError)
    assert f"odd: is a {what}" in line


# Ties, views and strides.


def test_views_of_one_storage_stay_views(tmp_path: Path) -> None:
    """q, k, v inside a fused qkv: averaged once, and still one storage."""
    states = []
    for _ in range(3):
        qkv = torch.randn(6, 4)
        states.append({"qkv": qkv, "q": qkv[:2], "k": qkv[2:4], "v": qkv[4:].t()})
    found = average(tmp_path, states)
    assert_same(found, {name: oracle.mean([s[name] for s in states]) for name in states[0]})
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 1
    assert found["v"].stride() == states[0]["v"].stride()
    swa_avg.average(save_all(tmp_path, states), tmp_path / "o.safetensors")
    assert_same(load(tmp_path / "o.safetensors"), found)


def test_views_without_a_whole_are_cut_apart(tmp_path: Path) -> None:
    """Overlapping views of which none covers the rest are written one by one."""
    states = []
    for _ in range(2):
        base = torch.randn(10)
        states.append({"a": base[:6], "b": base[4:], "c": base[:6:2]})
    found = average(tmp_path, states)
    assert_same(found, {name: oracle.mean([s[name] for s in states]) for name in states[0]})


def test_tie_in_some_checkpoints_only_gives_right_values_untied(tmp_path: Path) -> None:
    """Where one checkpoint has two tensors for the other's one, the output has two."""
    tied, untied = torch.randn(3, 4), {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    for states in ([untied, {"a": tied, "b": tied}], [{"a": tied, "b": tied}, untied]):
        found = average(tmp_path, states)
        assert_same(found, {name: oracle.mean([s[name] for s in states]) for name in untied})
        assert not same_storage(found["a"], found["b"])
        for path in tmp_path.iterdir():
            path.unlink()


def test_tie_of_another_shape_in_one_checkpoint_is_no_tie(tmp_path: Path) -> None:
    """One storage seen in two ways is one family only if all checkpoints see it so."""
    first, last = torch.randn(4, 4), torch.randn(4, 4)
    states = [{"a": first, "b": first.t()}, {"a": last, "b": last}]
    for pair in (states, states[::-1]):
        found = average(tmp_path, pair)
        assert_same(found, {name: oracle.mean([s[name] for s in pair]) for name in "ab"})
        for path in tmp_path.iterdir():
            path.unlink()


def test_statistics_inside_a_flat_buffer_are_kept_apart(tmp_path: Path) -> None:
    """Views with different treatments cannot be one storage in the output."""
    states = []
    for _ in range(3):
        flat = torch.rand(12)
        views = {"norm.running_mean": flat[:4], "norm.running_var": flat[4:8], "w": flat[8:]}
        states.append({"flat": flat, **views})
    found = average(tmp_path, states)
    for name in states[0]:
        kept = states[-1][name] if is_buffer(name) else oracle.mean([s[name] for s in states])
        assert oracle.same_bits(found[name], kept), name
    assert same_storage(found["w"], found["flat"])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "stepped": lambda x: x.repeat_interleave(7, 3)[..., ::7],
}


@pytest.mark.parametrize("last", LAYOUTS)
def test_strides_may_differ_between_inputs(tmp_path: Path, last: str) -> None:
    """Elements meet by their place in the tensor, not in the file."""
    shape = (3, 5, 4, 6)
    states = []
    for name in (*(n for n in LAYOUTS if n != last), last):
        value = LAYOUTS[name](torch.randn(shape))
        assert value.shape == shape
        states.append({"w": value, "ids": LAYOUTS[name](torch.arange(360).reshape(shape))})
    found = average(tmp_path, states)
    expected = {"w": oracle.mean([s["w"] for s in states]), "ids": states[0]["ids"].contiguous()}
    assert_same(found, expected)
    dense = last in ("contiguous", "channels_last", "transposed")
    assert found["w"].stride() == (states[-1]["w"] if dense else expected["w"]).stride()
    report = swa_avg.average(save_all(tmp_path, states), tmp_path / "o.safetensors")
    assert_same(load(tmp_path / "o.safetensors"), expected)
    assert not [note for note in report.notes if "differs" in note]


def test_formats_may_be_mixed(tmp_path: Path) -> None:
    """A .pt with strides and a .safetensors of one model are averaged."""
    states = [kinds(seed) for seed in range(2)]
    paths = [tmp_path / "0.safetensors", tmp_path / "1.pt"]
    save_safetensors({**states[0], "tied": states[0]["tied"].clone()}, paths[0])
    torch.save(states[1], paths[1])
    expected = {name: oracle.mean([s[name] for s in states]) for name in states[0]}
    for order in (paths, paths[::-1]):
        swa_avg.average(order, tmp_path / "out.pt", force=True)
        assert_same(load(tmp_path / "out.pt"), expected)


def test_tied_model_saved_by_safetensors(tmp_path: Path) -> None:
    """Aliases that save_model recorded are tensors like any other, and recorded again."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight

    models = [Tied(), Tied()]
    paths = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for model, path in zip(models, paths, strict=True):
        save_model(model, str(path))
    swa_avg.average(paths, tmp_path / "out.pt")
    found = load(tmp_path / "out.pt")
    assert same_storage(found["embed.weight"], found["head.weight"])
    expected = oracle.mean([model.embed.weight for model in models])
    assert_same(found, {"embed.weight": expected, "head.weight": expected})
    Tied().load_state_dict(found, strict=True)


def test_format_in_the_metadata_is_no_alias(tmp_path: Path) -> None:
    """A file of format "pt" that holds a tensor named pt has no tensor named format."""
    path = tmp_path / "in.safetensors"
    save_file({"pt": torch.ones(2), "b": torch.ones(2)}, path, metadata={"format": "pt"})
    swa_avg.average([path], tmp_path / "out.pt")
    assert set(load(tmp_path / "out.pt")) == {"pt", "b"}


# The rules.


@pytest.mark.parametrize("choice", BN_BUFFERS)
def test_bn_buffers(tmp_path: Path, choice: str) -> None:
    """Each choice does to BatchNorm buffers what it says, and to nothing else."""
    states, _ = train(4)
    found = average(tmp_path, states, bn_buffers=choice)
    reset = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    for name, value in found.items():
        buffer = name.rpartition(".")[2]
        if not is_buffer(name) or (choice == "mean" and value.is_floating_point()):
            expected = oracle.mean([state[name] for state in states])
        elif choice == "reset":
            expected = torch.full_like(value, reset[buffer])
        else:
            expected = states[0 if choice == "first" else -1][name]
        assert oracle.same_bits(value, expected), name


def test_statistics_need_both_names(tmp_path: Path) -> None:
    """A running_mean without a running_var is no BatchNorm statistic, but not trained either."""
    states = [{"a.running_mean": torch.randn(4), "w": torch.randn(1)} for _ in range(3)]
    expected = {**states[-1], "w": oracle.mean([s["w"] for s in states])}
    assert_same(average(tmp_path, states, bn_buffers="first"), expected)


@pytest.mark.parametrize("choice", OUTPUT_DTYPES[1:])
@pytest.mark.parametrize("mixed", [False, True])
def test_dtype(tmp_path: Path, choice: str, mixed: bool) -> None:
    """Means are rounded once, from the inputs to the dtype; integers are what they were."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64] if mixed else [torch.float32] * 3
    states = []
    for dtype in dtypes:
        weights = {"w": torch.randn(500).to(dtype), "mask": torch.full((4,), -torch.inf).to(dtype)}
        states.append({**weights, "ids": torch.tensor([2**40])})
    states.append({**states[0], "w": torch.randn(500)})
    found = average(tmp_path, states, dtype=choice)
    wanted = getattr(torch, choice)
    assert oracle.same_bits(found["w"], oracle.mean([s["w"] for s in states], wanted))
    assert oracle.same_bits(found["mask"], torch.full((4,), -torch.inf, dtype=wanted))
    assert_same({"ids": found["ids"]}, {"ids": states[0]["ids"]})


def test_kept_statistics_are_rounded_to_the_dtype(tmp_path: Path) -> None:
    """What is kept apart has the output's dtype too."""
    states, _ = train(2)
    found = average(tmp_path, states, dtype="bfloat16")
    kept = states[-1]["norm.running_var"]
    assert oracle.same_bits(found["norm.running_var"], kept.to(torch.bfloat16))
    assert found["norm.num_batches_tracked"].dtype == torch.int64


def test_identical_inputs_give_their_own_bits(tmp_path: Path) -> None:
    """NaN with a payload, infinities, -0.0: what all inputs agree on is not touched."""
    odd = oracle.from_bits([0x7FC00001, 0xFF812345, 0x7F800000, 0x80000000, 1], torch.float32)
    states = [{"odd": odd, "w": torch.randn(3)} for _ in range(3)]
    assert oracle.same_bits(average(tmp_path, states)["odd"], odd)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_number_that_is_not_finite_in_one_input_is_refused(
    tmp_path: Path, value: float, where: int
) -> None:
    """The error names the file and the tensor."""
    states = [{"a": torch.randn(9), "w": torch.randn(3, 50)} for _ in range(3)]
    states[where]["w"][2, 17] = value
    line = refused(tmp_path, states, NotFiniteError)
    assert line.startswith(f"{tmp_path / f'in_{where}.pt'}: w: has {value:g}")


def test_overflow_of_the_output_dtype_is_refused(tmp_path: Path) -> None:
    """A finite mean does not become infinite in silence."""
    states = [{"w": torch.tensor([1.0, 1e38])}, {"w": torch.tensor([1.0, 2e38])}]
    assert "w: has 1.5e+38" in refused(tmp_path, states, NotFiniteError, dtype="float16")
    assert "w: has 1e+38" in refused(tmp_path, states[:1], NotFiniteError, dtype="float16")


def test_all_disagreements_are_found(tmp_path: Path) -> None:
    """Each missing name, shape and dtype is listed, not the first only."""
    right = {name: torch.ones(2) for name in "abcdefgh"}
    wrong = {**right, "a": torch.ones(3), "b": torch.ones(2, 1), "c": torch.ones(2).half()}
    del wrong["d"]
    wrong["z"] = torch.ones(1)
    paths = save_all(tmp_path, [wrong, right])
    with pytest.raises(MismatchError) as caught:
        swa_avg.average(paths, tmp_path / "out.pt")
    assert len(caught.value.disagreements) == 5
    named = " ".join(map(str, caught.value.disagreements))
    for part in ("lacks 1 tensor", ": d", "has 1 tensor", ": z", "[3]", "[2, 1]", "float16"):
        assert part in named


# The same bytes, whatever the way.


def test_output_bytes_are_determined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of the files, threads, chunk size, symlinks: the same bytes."""
    states = []
    for seed in range(3):
        turned = torch.randn(50, 60).t()
        states.append({**kinds(seed), "big": torch.randn(700, 300), "turned": turned})
        states[0]["turned"] = states[0]["turned"].contiguous()
    paths = save_all(tmp_path, states)
    link = tmp_path / "link.pt"
    link.symlink_to(paths[1])
    paths.sort(key=str)

    def made(order: list[Path], **options: Any) -> tuple[bytes, bytes]:
        outs = tmp_path / "out.pt", tmp_path / "out.safetensors"
        for out in outs:
            swa_avg.average(order, out, force=True, **options)
        return outs[0].read_bytes(), outs[1].read_bytes()

    expected = made(paths)
    draw = random.Random(0)
    for threads in (1, 2, 7):
        assert made(draw.sample(paths, 3), threads=threads) == expected
    assert made([paths[0], paths[2], paths[1], paths[1]]) == expected
    # A file by another name is another in the provenance, which alone tells the name.
    renamed = made([paths[2], link, paths[0]])[1].replace(b"link.pt", paths[1].name.encode())
    assert sorted(renamed.replace(b" ", b"")) == sorted(expected[1].replace(b" ", b""))
    kernel = mean.Kernel
    for chunk in (1000, 4096, 10**6):
        monkeypatch.setattr(tasks, "_TASK_BYTES", 50 * chunk)
        monkeypatch.setattr(
            mean, "Kernel", lambda *args, c=chunk, **more: kernel(*args, **more, chunk=c)
        )
        assert made(paths, threads=3) == expected


# Against a reference, at random.

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from([d for d in oracle.FORMATS if d.itemsize > 1] + [torch.complex64])
integers = st.sampled_from([torch.int64, torch.uint8, torch.bool, torch.int16])


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of a shape and dtype, with strides, an offset and gaps of any kind."""
    order = draw(st.permutations(range(len(shape))))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    before = draw(st.integers(0, 2))
    outer = [shape[dim] * gap + before for dim, gap in zip(order, gaps, strict=True)]
    torch.manual_seed(draw(st.integers(0, 99)))
    base = (torch.randn(outer, dtype=torch.float64) * 100).to(torch.float32).to(dtype)
    slices = tuple(slice(before, before + shape[dim] * gap, gap)
                   for dim, gap in zip(order, gaps, strict=True))  # fmt: skip
    back = sorted(range(len(shape)), key=lambda place: order[place])
    value = base[slices].permute(back)
    assert value.shape == shape
    return value


@st.composite
def inputs(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    """State_dicts of one model, each with its own strides and ties."""
    names = [f"layer.{number}" for number in range(draw(st.integers(1, 4)))]
    kinds = {name: (draw(shapes), draw(dtypes | integers)) for name in names}
    states = []
    for _ in range(draw(st.integers(1, 4))):
        state = {name: draw(strided(*kind)) for name, kind in kinds.items()}
        for name in names:  # ties, and views of another where the shapes allow it
            other = draw(st.sampled_from(names))
            if kinds[other] == kinds[name]:
                state[name] = state[other]
        states.append(state)
    return states


def is_code(tensor: Tensor) -> bool:
    """Integers of several dimensions may be quantised weights; the same in all is no harm."""
    integer = tensor.dtype in (torch.int64, torch.uint8, torch.int16)
    return integer and tensor.ndim > 1 and tensor.numel() > 1


@settings(deadline=None, max_examples=60)
@given(states=inputs(), save=st.sampled_from(sorted(SAVERS)), out=st.sampled_from(sorted(SAVERS)))
def test_any_state_dicts(
    tmp_path_factory: pytest.TempPathFactory, states: list[dict[str, Tensor]], save: str, out: str
) -> None:
    """Saved by torch or safetensors, averaged, loaded: the exact reference; codes are refused."""
    # Two empty tensors of one dimension may be the placeholders of ZeRO-3, which are refused.
    assume(sum(value.shape == (0,) for value in states[-1].values()) < 2)
    for one, other in combinations(states, 2):  # the same twice is counted once
        assume(not all(oracle.same_bits(one[name], other[name]) for name in one))
    folder = tmp_path_factory.mktemp("any")
    if save == ".safetensors":
        states = [{name: value.clone() for name, value in state.items()} for state in states]
    target = folder / f"out{out}"
    paths = save_all(folder, states, save)
    if any(is_code(state[name]) and not torch.equal(state[name], states[-1][name])
           for state in states for name in state):  # fmt: skip
        with pytest.raises(MismatchError, match="differs between checkpoints"):
            swa_avg.average(paths, target)
        return
    swa_avg.average(paths, target)
    if out == ".safetensors":
        swa_avg.average([], folder / "back.pt", start_from=target)
        target = folder / "back.pt"
    found = load(target)
    for name, last in states[-1].items():
        exact = oracle.mean([s[name] for s in states]) if has_mean(last) else last
        assert oracle.same_bits(found[name], exact), name


def test_counter_is_never_averaged(tmp_path: Path) -> None:
    """Not with --bn-buffers mean either, and not if it was saved as a float."""
    for number in (1, 4):
        state = {"bn.running_mean": torch.ones(2) * number, "bn.running_var": torch.ones(2)}
        count = torch.tensor(float(number))
        torch.save(state | {"bn.num_batches_tracked": count}, tmp_path / f"{number}.pt")
    swa_avg.average(tmp_path / "?.pt", tmp_path / "swa.pt", bn_buffers="mean")
    made = torch.load(tmp_path / "swa.pt")
    assert made["bn.num_batches_tracked"] == 4
    assert made["bn.running_mean"].tolist() == [2.5, 2.5]


def test_what_is_plain_is_said(tmp_path: Path) -> None:
    """Plain values that differ, or that the output has no place for, are noted."""
    for number in (1, 2):
        state = {"w": torch.ones(3) * number, "scale": float(number), "kind": "a"}
        torch.save(state, tmp_path / f"{number}.pt")
    report = swa_avg.average(tmp_path / "?.pt", tmp_path / "swa.pt")
    assert any("scale" in note and "2.pt" in note for note in report.notes)
    assert not any("kind" in note for note in report.notes)
    # The output, with as many plain values as tensors, is read again.
    swa_avg.average([], tmp_path / "again.pt", start_from=tmp_path / "swa.pt")
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "swa.pt").read_bytes()
    report = swa_avg.average(tmp_path / "?.pt", tmp_path / "swa.safetensors")
    assert any("scale, kind" in note and "left out" in note for note in report.notes)


def test_ties_of_an_earlier_checkpoint_are_said(tmp_path: Path) -> None:
    """Names that were tied before but are not in the last: right values, untied, noted."""
    shared = torch.arange(4.0)
    torch.save({"a": shared, "b": shared}, tmp_path / "1.pt")
    torch.save({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "2.pt")
    report = swa_avg.average(tmp_path / "?.pt", tmp_path / "swa.pt")
    made = torch.load(tmp_path / "swa.pt")
    assert torch.equal(made["a"], shared / 2) and torch.equal(made["b"], (shared + 1) / 2)
    assert any("a, b" in note and "untied" in note for note in report.notes)


def test_averages_at_once_leave_torch_as_it_was(tmp_path: Path) -> None:
    """Threads that average beside each other give the right bytes, and torch its threads back."""
    for number in range(3):
        torch.save({"w": torch.randn(400_000)}, tmp_path / f"{number}.pt")
    swa_avg.average(tmp_path / "?.pt", tmp_path / "alone.out")
    before = torch.get_num_threads()
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda n: swa_avg.average(tmp_path / "?.pt", tmp_path / f"out_{n}.out"), range(8)
            )
        )
        assert set(pool.map(lambda _: torch.get_num_threads(), range(8))) == {before}
    for number in range(8):
        made = (tmp_path / f"out_{number}.out").read_bytes()
        assert made == (tmp_path / "alone.out").read_bytes()


@pytest.mark.parametrize(
    "options",
    [{"bn_buffers": "middle"}, {"dtype": "int8"}, {"keep_wrapper": True, "dtype": "float16"}],
)
def test_options_that_there_are_not(tmp_path: Path, options: dict[str, Any]) -> None:
    """A mistake in the program that calls, before anything is read: no such file is asked for."""
    with pytest.raises(ValueError):
        swa_avg.average(tmp_path / "no.pt", tmp_path / "out.pt", **options)
    assert not list(tmp_path.iterdir())
