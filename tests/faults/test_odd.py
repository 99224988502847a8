"""The catalogue of faults, 60 to 84: tensors and names that are sound, and rare."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import folders
import oracle
import pytest
import torch
from command import OUT, Averaged, averaged, each_refused, fault, refused, run
from safetensors.torch import save_file
from torch import Tensor, nn

QUIET = pytest.mark.filterwarnings("ignore")


def save(folder: Path, *states: Any) -> None:
    for number, state in enumerate(states):
        torch.save(state, folder / f"{number}.pt")


# One average of all that has one.


class Subclass(torch.Tensor):
    """A tensor of a class of one's own."""


def zoo(seed: int) -> dict[str, Tensor]:
    """A state_dict with all that is rare and can be averaged or copied, of one of two epochs."""
    torch.manual_seed(seed)
    base = torch.randn(50, 10)
    state: dict[str, Tensor] = {
        "bn.running_mean": torch.randn(4),
        "bn.running_var": torch.rand(4),
        "bn.num_batches_tracked": torch.tensor(10 * seed + 1),
        "double.running_mean": torch.randn(4),
        "double.running_var": torch.rand(4),
        "double.num_batches_tracked": torch.tensor(10.0 * seed + 1),
        "large": torch.tensor([2**53 + 1, -(2**62) - 1]),
        "differing": torch.tensor([2**53 + seed]),
        "bool": torch.tensor([True, False, True]),
        "complex64": torch.randn(5, dtype=torch.complex64),
        "complex128": torch.randn(5, dtype=torch.complex128),
        "float4": torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "bits8": torch.arange(6, dtype=torch.uint8).view(torch.bits8),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 3),
        "transposed": torch.randn(5, 7).t(),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": base[10:12],
        "parameter": nn.Parameter(torch.randn(3)),
        "grad": torch.randn(3).requires_grad_(),
        "subclass": torch.randn(3).as_subclass(Subclass),
        "имя.\u2603.\U0001f600": torch.randn(3),
        "lone \ud800 surrogate": torch.randn(3),
        "__metadata__": torch.randn(3),
    }
    for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"):
        state[f"float8_{kind}"] = torch.randn(33).to(getattr(torch, f"float8_{kind}"))
    return {**state, "tied": state["scalar"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Averaged:
    """The average of two zoos; `--bn-buffers mean` tempts it to average the counters."""
    folder = tmp_path_factory.mktemp("zoo")
    save(folder, zoo(0), zoo(1))
    return averaged(folder, "?.pt", "--bn-buffers", "mean")


def assert_mean(done: Averaged, *names: str) -> None:
    """The mean, and a plain tensor."""
    for name in names:
        inputs = [zoo(seed)[name].detach().as_subclass(torch.Tensor) for seed in range(2)]
        assert oracle.same_bits(done.tensors[name], oracle.mean(inputs)), name
        assert type(done.tensors[name]) is torch.Tensor and not done.tensors[name].requires_grad


@fault(62, "`num_batches_tracked`", "the last input's; never a mean")
@fault(63, "int64 above 2^53", "copied to the bit")
@fault(64, "bool", "copied")
def test_counters_integers_and_bool(done: Averaged) -> None:
    """What has no mean is copied, to the bit; where inputs differ, that is said."""
    for name in ("bn.num_batches_tracked", "double.num_batches_tracked"):
        assert done.tensors[name] == zoo(1)[name] == 11
    for name in ("large", "differing", "bool"):
        assert torch.equal(done.tensors[name], zoo(1)[name])
    assert any(note.startswith("differing: differs between checkpoints") for note in done.notes)
    assert_mean(done, "bn.running_mean", "double.running_var")


@fault(65, "complex", "averaged; complex128 refused for safetensors, with its name")
@fault(66, "float8", "averaged, rounded once")
@fault(71, "0-dim and empty tensors", "averaged")
@fault(76, "Parameters, requires_grad", "averaged; plain tensors")
@fault(77, "tensor subclasses, DTensor", "a subclass averaged as a plain tensor, a DTensor refused")
@fault(
    79,
    "names in any script; a lone surrogate",
    "averaged; a lone surrogate refused for safetensors, with its name",
)
@fault(80, "a tensor called `__metadata__`", "averaged; refused for safetensors, with its name")
def test_floats_of_every_kind(done: Averaged) -> None:
    """Whatever they are called and wrapped in, numbers that have a mean get it."""
    assert_mean(done, "complex64", "complex128", "scalar", "empty", "parameter", "grad", "subclass")
    assert_mean(done, *(name for name in zoo(0) if name.startswith("float8")))
    assert_mean(done, "имя.\u2603.\U0001f600", "lone \ud800 surrogate", "__metadata__")


@fault(67, "float4 and bits", "copied if identical, else refused")
def test_identical_bits_are_copied(done: Averaged) -> None:
    """Elements without arithmetic are copied as they are."""
    for name in ("float4", "bits8"):
        assert done.tensors[name].dtype == zoo(1)[name].dtype
        assert done.tensors[name].view(torch.uint8).tolist() == list(range(6))


@fault(72, "transposed and channels_last", "averaged, with their strides")
@fault(73, "a view of a larger storage", "averaged; only the view is written")
@fault(74, "tied tensors", "averaged once, still tied")
def test_strides_views_and_ties(done: Averaged) -> None:
    """How a tensor lies in memory survives; what nothing looks at is not written."""
    assert_mean(done, "transposed", "channels_last", "view", "tied")
    for name in ("transposed", "channels_last"):
        assert done.tensors[name].stride() == zoo(1)[name].stride()
    assert done.tensors["view"].untyped_storage().nbytes() == 2 * 10 * 4
    assert done.tensors["tied"].data_ptr() == done.tensors["scalar"].data_ptr()


# Numbers without a mean.


@fault(60, "NaN or infinity in one input", "refused, naming file and tensor")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    """One element of one input is enough."""
    states = [{"w": torch.randn(1000), "v": torch.ones(2)} for _ in range(3)]
    states[1]["w"][777] = value
    save(tmp_path, *states)
    refused(tmp_path, "?.pt", says=f"error: 1.pt: w: has {value:g}, expected finite numbers")


@fault(61, "infinity made by rounding to a smaller dtype", "refused, naming the tensor")
def test_overflow_is_refused(tmp_path: Path) -> None:
    """A mean that the wanted dtype cannot hold is not written as infinity."""
    save(tmp_path, {"w": torch.tensor([1.0, 70000.0])}, {"w": torch.tensor([2.0, 70001.0])})
    refused(
        tmp_path, "?.pt", "--dtype", "float16", says="w: has 70000.5, which float16 cannot hold"
    )


@fault(67)
def test_differing_bits_are_refused(tmp_path: Path) -> None:
    """Elements without arithmetic that differ have neither a mean nor a winner."""
    for number in range(2):
        packed = torch.full((4,), number, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
        torch.save({"w": torch.ones(2), "packed": packed}, tmp_path / f"{number}.pt")
    says = (
        "error: 1.pt: packed: differs between checkpoints, and float4_e2m1fn_x2 cannot be averaged"
    )
    refused(tmp_path, "?.pt", says=says)


# Tensors that are no dense numbers.


@fault(68, "quantized and nested tensors", "refused by name")
@fault(69, "sparse tensors", "refused by name")
@fault(70, "meta tensors", "refused by name: no data")
@fault(75, "lazily conjugated or negated tensors", "refused by name")
@fault(77)
@fault(78, "keys that are not strings", "refused")
@fault(84, "no tensor at all", "refused")
@QUIET
def test_what_is_not_dense_is_refused_by_name(tmp_path: Path) -> None:
    """No mean is made of what cannot be read as numbers; nothing of it is left out silently."""
    conjugate = torch.ones(2, dtype=torch.complex64).conj()
    odd = {
        "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
        "coo": (torch.eye(3).to_sparse(), "sparse tensor"),
        "csr": (torch.eye(3).to_sparse_csr(), "sparse tensor"),
        "meta": (torch.ones(2, device="meta"), "meta tensor, which has no data"),
        "conj": (conjugate, "lazily conjugated"),
        "neg": (conjugate.imag, "lazily conjugated or negated"),
        "dtensor": (distributed_tensor(), "tensor subclass without a storage"),
    }
    cases = {}
    for name, (tensor, what) in odd.items():
        torch.save({"w": torch.ones(2), "v": torch.ones(1), name: tensor}, tmp_path / f"{name}.pt")
        cases[f"{name}.pt"] = f"{name}.pt: {name}: is a {what}"
    for number, key in enumerate((3, (1, 2), None, 10**5000)):
        torch.save({key: torch.ones(1), "a": torch.ones(1)}, tmp_path / f"key{number}.pt")
        cases[f"key{number}.pt"] = "has a key that is not a string"
    for number, content in enumerate(({}, {"epoch": 3}, [1, 2], {"state_dict": {}}, None)):
        torch.save(content, tmp_path / f"none{number}.pt")
        cases[f"none{number}.pt"] = "has no state_dict"
    save_file({}, tmp_path / "none.safetensors")
    each_refused(tmp_path, cases | {"none.safetensors": "has no state_dict"})


def distributed_tensor() -> Tensor:
    """A DTensor, as one rank of one has it."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        made: Tensor = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        return made
    finally:
        distributed.destroy_process_group()


@fault(65)
@fault(79)
@fault(80)
def test_what_safetensors_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    """Refused before a tensor is read; a `.pt` file holds them all."""
    cases = {
        "complex.pt": ({"w": torch.ones(1, dtype=torch.complex128)}, "w: has dtype complex128"),
        "lone.pt": ({"lone \ud800": torch.ones(1)}, "lone \\ud800: has a name that safetensors"),
        "meta.pt": ({"__metadata__": torch.ones(1)}, "__metadata__: has a name that safetensors"),
    }
    for name, (state, says) in cases.items():
        torch.save(state, tmp_path / name)
        refused(tmp_path, name, "-o", "new.safetensors", says=says)


@fault(81, "names that collide once they are flattened", "refused")
def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    """Two tensors never become one: in a distributed folder's flat names, or by two keys."""

    def same_place(metadata: Any) -> None:
        metadata.planner_data = dict.fromkeys(metadata.planner_data, ("model", "a"))

    def within(metadata: Any) -> None:
        metadata.planner_data = {"model.a": ("model", "a"), "model.b": ("model", "a", "b")}

    state = {"a": torch.ones(2), "b": torch.ones(2)}
    boxes = {name: [((0,), (2,))] for name in state}
    folders.save_chunks(tmp_path / "twice", state, boxes, change=same_place)
    folders.save_chunks(tmp_path / "within", state, boxes, change=within)
    cases = {"twice": "model.b: occurs twice", "within": "model.b: lies inside another item"}
    each_refused(tmp_path, cases)
    torch.save({"model": {"net.a": torch.ones(1)}, "net": {"a": torch.ones(1)}}, tmp_path / "0.pt")
    refused(
        tmp_path, "0.pt", "--key", "model", "--key", "net", says="0.pt: has net.a both at net and"
    )


# Many, and large.


@fault(82, "tens of thousands of tensors", "averaged")
@fault(83, "over 65,535 records; one over 4 GiB", "averaged")
def test_many_tensors(tmp_path: Path) -> None:
    """More than 16 bits can count: the directory of the output, read back by torch, is zip64."""
    count = 66_000
    values = torch.arange(count, dtype=torch.float32)
    names = [f"layer{number}.weight" for number in range(count)]
    entries = {
        name: {"dtype": "F32", "shape": [], "data_offsets": [4 * at, 4 * at + 4]}
        for at, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    for number, factor in enumerate((1, 3)):
        data = (factor * values).numpy().tobytes()
        content = len(header).to_bytes(8, "little") + header + data
        (tmp_path / f"{number}.safetensors").write_bytes(content)
    ended = run(tmp_path, "?.safetensors", "-o", OUT)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    # As `torch.load` reads it, but for making each number a tensor.
    reader = torch._C.PyTorchFileReader(str(tmp_path / OUT))
    found = re.findall(r"layer\d+\.weight", reader.get_record("data.pkl").decode("latin-1"))
    assert found == names
    read = b"".join(reader.get_record(f"data/{number}") for number in range(count))
    assert torch.equal(torch.frombuffer(bytearray(read), dtype=torch.float32), 2 * values)


@fault(83)
def test_record_over_4_gib(tmp_path: Path) -> None:
    """Behind a record of more than 32 bits can count, the weights are still where they are."""
    path = tmp_path / "in.pt"
    content = {"optimizer": {"x": torch.empty(2**30 + 5)}, "model": {"w": torch.empty(5)}}
    with torch.serialization.skip_data():  # a hole in the file, no room on the disk
        torch.save(content, path)
    assert path.stat().st_size > 2**32
    wanted = torch.arange(5.0)
    with path.open("r+b") as file:
        file.seek(torch._C.PyTorchFileReader(str(path)).get_record_offset("data/1"))
        file.write(wanted.numpy().tobytes())
    assert oracle.same_bits(averaged(tmp_path, "in.pt").tensors["w"], wanted)
