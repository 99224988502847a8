"""Folders of torch.distributed.checkpoint: chunks of tensors, put together by byte range."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import preloaded
import pytest
import torch
import torch.distributed.checkpoint as dcp
from folders import HALVES, WHOLE, Box, Weights, save_chunks, set_chunks, set_info, set_size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored import tensors as read
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
)

import swa_avg
from swa_avg.checkpoints.layout import find_state_dict
from swa_avg.errors import FileError, FormatError, SwaAvgError
from swa_avg.formats.opening import open_checkpoint
from swa_avg.kernel import tasks
from swa_avg.planning.inputs import expand
from swa_avg.planning.select import select
from swa_avg.storage import files

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert oracle.same_bits(found[name], tensor), name


def adam(model: nn.Module) -> Any:
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(4, 7)).sum().backward()
    optimizer.step()
    return optimizer


# By one rank ----------------------------------------------------------------------------------


def test_one_rank(tmp_path: Path) -> None:
    """What dcp.save wrote is read as dcp.load reads it; the optimizer stays unread."""
    model = network()
    optimizer = adam(model)
    tree = {"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 3}
    dcp.save(tree, checkpoint_id=tmp_path)
    target = {"model": network(9).state_dict()}
    dcp.load(target, checkpoint_id=tmp_path)
    assert_same(read(tmp_path), target["model"])
    state = find_state_dict(open_checkpoint(tmp_path))
    assert state.where == "model"


@pytest.mark.parametrize(
    ("wrap", "where"),
    [
        (lambda model: model.state_dict(), ""),
        (lambda model: {"app": {"model": model.state_dict(), "lr": 0.1}}, "app.model"),
        (lambda model: {"module": model.state_dict()}, "module"),
        (lambda model: {f"model.{k}": v for k, v in model.state_dict().items()}
         | {"optim.x": torch.ones(1)}, "model"),
        (lambda model: {f"model.{k}": v for k, v in model.state_dict().items()}, None),
        (lambda model: model.state_dict() | {"optimizer": adam(model).state_dict()}, ""),
    ],
)  # fmt: skip
def test_where_the_model_is(wrap: Any, where: str | None, tmp_path: Path) -> None:
    """The nested dicts are those that were saved; names without an optimizer stay as they are."""
    model = network()
    dcp.save(wrap(model), checkpoint_id=tmp_path)
    expected = model.state_dict()
    if where is None:
        where, expected = "", {f"model.{name}": value for name, value in expected.items()}
    state = find_state_dict(open_checkpoint(tmp_path))
    assert state.where == where
    assert_same(read(tmp_path), expected)


def test_module_and_dtypes(tmp_path: Path) -> None:
    """All dtypes, scalars, empty tensors and strides come through."""
    state = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.float8_e5m2, torch.int64, torch.bool)
    }
    state |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    state |= {"t": torch.rand(3, 4).t(), "view": torch.rand(9, 2)[3:5]}
    dcp.save(dict(state), checkpoint_id=tmp_path)
    assert_same(read(tmp_path), {name: tensor.contiguous() for name, tensor in state.items()})


def test_mean_of_folders(tmp_path: Path) -> None:
    """Three folders average to the oracle's mean, alone and mixed with a file."""
    paths = []
    for n in range(3):
        dcp.save({"model": network(n).state_dict()}, checkpoint_id=tmp_path / f"step{n}")
        paths.append(tmp_path / f"step{n}")
    torch.save(network(3).state_dict(), tmp_path / "step3.pt")
    for chosen in (paths, [*paths, tmp_path / "step3.pt"]):
        swa_avg.average(chosen, tmp_path / "out.pt", bn_buffers="mean", force=True)
        loaded = torch.load(tmp_path / "out.pt")
        states = [network(n).state_dict() for n in range(len(chosen))]
        for name, tensor in loaded.items():
            if tensor.is_floating_point():
                assert oracle.same_bits(tensor, oracle.mean([state[name] for state in states]))


def test_trainer_and_lightning_record_beside(tmp_path: Path) -> None:
    """accelerate's inner folder is found, and what stands beside it gives epoch and step."""
    inner = tmp_path / "checkpoint-4" / "pytorch_model_fsdp_0"
    dcp.save({"model": network().state_dict()}, checkpoint_id=inner)
    dcp.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "checkpoint-4" / "optimizer_0")
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch": 2, "global_step": 4}')
    lightning = tmp_path / "epoch=7.ckpt"
    dcp.save({"model": network(1).state_dict()}, checkpoint_id=lightning)
    torch.save({"epoch": 7, "global_step": 70}, lightning / "meta.pt")
    states = [find_state_dict(open_checkpoint(path)) for path in expand([tmp_path])]
    chosen = select(states).chosen
    assert [(state.epoch, state.step) for state in chosen] == [(2, 4), (7, 70)]


# By several ranks -----------------------------------------------------------------------------

RANKS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

def work(rank, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    for n in range(3):
        torch.manual_seed(n)
        whole = {"a": torch.rand(7, 5), "b": torch.rand(4, 9, 3), "c": torch.rand(11)}
        placed = {
            f"{name}{dim}": distribute_tensor(tensor, mesh, [Shard(dim)])
            for name, tensor in whole.items() for dim in range(tensor.dim())
        }
        placed |= {f"{k}_": distribute_tensor(v, mesh, [Replicate()]) for k, v in whole.items()}
        placed["one"] = distribute_tensor(torch.rand(1, 3), mesh, [Shard(0)])
        dcp.save({"model": placed}, checkpoint_id=f"{folder}/placed{n}")
        model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        fully_shard(model)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(4, 7)).sum().backward()
        optimizer.step()
        tree = {
            "model": get_model_state_dict(model),
            "optim": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(tree, checkpoint_id=f"{folder}/fsdp{n}")
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    # Forked, so that torch is imported once.
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that two ranks wrote together."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = preloaded.run(folder, (str(folder),), environment, 120, RANKS, preloaded.SHARDING)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def loaded_by_torch(path: Path, names: Sequence[str], model: Weights) -> Weights:
    target = {"model": {name: torch.empty_like(model[name]) for name in names}}
    dcp.load(target, checkpoint_id=path)
    return target["model"]


@pytest.mark.parametrize("kind", ["placed", "fsdp"])
def test_two_ranks(kind: str, ranks: Path, tmp_path: Path) -> None:
    """Tensors sharded along any dimension are those that dcp.load puts together."""
    states = []
    for n in range(3):
        found = read(ranks / f"{kind}{n}")
        states.append(loaded_by_torch(ranks / f"{kind}{n}", list(found), found))
        assert_same(found, states[-1])
    refs = find_state_dict(open_checkpoint(ranks / f"{kind}0")).tensors
    assert any(ref.parts for ref in refs.values())
    paths = [ranks / f"{kind}{n}" for n in range(3)]
    swa_avg.average(paths, tmp_path / "out.pt", bn_buffers="mean")
    for name, tensor in torch.load(tmp_path / "out.pt").items():
        if tensor.is_floating_point():
            assert oracle.same_bits(tensor, oracle.mean([state[name] for state in states]))


# By hand --------------------------------------------------------------------------------------


def cut(shape: tuple[int, ...], cuts: int, rng: random.Random) -> list[Box]:
    """Cut a tensor into boxes at random, none of them empty."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(cuts):
        start, size = boxes.pop(rng.randrange(len(boxes)))
        dims = [d for d, n in enumerate(size) if n > 1]
        if not dims:
            boxes.append((start, size))
            continue
        d = rng.choice(dims)
        at = rng.randrange(1, size[d])
        boxes.append((start, (*size[:d], at, *size[d + 1 :])))
        moved = (*start[:d], start[d] + at, *start[d + 1 :])
        boxes.append((moved, (*size[:d], size[d] - at, *size[d + 1 :])))
    rng.shuffle(boxes)
    return boxes


@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    cuts=st.integers(0, 12),
    zipped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_chunks(
    tmp_path_factory: Any, shape: tuple[int, ...], cuts: int, zipped: bool, seed: int
) -> None:
    """However a tensor is cut, differently in each checkpoint, its mean is the oracle's."""
    folder = tmp_path_factory.mktemp("any")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    states = [{"w": torch.rand(shape), "n": torch.tensor(seed)} for _ in range(3)]
    for number, state in enumerate(states):
        boxes = {"w": cut(shape, cuts, rng), "n": [((), ())]}
        path = save_chunks(folder / f"step{number}", state, boxes, zipped)
        assert_same(read(path), state)
        assert_same(loaded_by_torch(path, ["w", "n"], state), state)
    swa_avg.average([folder], folder / "out.pt")
    mean = oracle.mean([state["w"] for state in states])
    assert oracle.same_bits(torch.load(folder / "out.pt")["w"], mean)


def columns(shape: tuple[int, int], count: int) -> list[Box]:
    width = shape[1] // count
    return [((0, n * width), (shape[0], width)) for n in range(count)]


def rows(shape: tuple[int, int], count: int) -> list[Box]:
    height = shape[0] // count
    return [((n * height, 0), (height, shape[1])) for n in range(count)]


@pytest.mark.parametrize("shared", [columns, rows])
def test_each_byte_is_read_once_and_checked(
    shared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks cost one reading, checksums included, also across many boxes and several tasks."""
    monkeypatch.setattr(tasks, "_LEAST_TASK_BYTES", 1 << 21)
    states = [{"w": torch.rand(4096, 256), "v": torch.rand(256, 4096)} for _ in range(2)]
    state = states[0]
    boxes = {"w": shared((4096, 256), 4), "v": shared((256, 4096), 4)}
    paths = [save_chunks(tmp_path / f"{n}", states[n], boxes) for n in range(2)]
    read = []
    plain = files.InputFile.read_into

    def noted(file: files.InputFile, buffer: memoryview, offset: int) -> None:
        read.append(len(buffer))
        plain(file, buffer, offset)

    monkeypatch.setattr(files.InputFile, "read_into", noted)
    report = swa_avg.average(paths, tmp_path / "out.pt", threads=2)
    size = sum(tensor.nbytes for tensor in state.values())
    assert report.bytes_read == 2 * size
    assert sum(read) < 2 * size + 200_000
    loaded = torch.load(tmp_path / "out.pt")
    # Exact in float64, and rounded once.
    one, other = ({name: value.double() for name, value in found.items()} for found in states)
    assert_same(loaded, {name: ((one[name] + other[name]) / 2).float() for name in state})


def test_inputs_with_other_strides(tmp_path: Path) -> None:
    """Chunks are brought into the order that the last checkpoint has in memory."""
    one, two = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    boxes = {"w": cut((2, 3, 4, 5), 6, random.Random(1))}
    save_chunks(tmp_path / "step1", {"w": one}, boxes)
    torch.save({"w": two.to(memory_format=torch.channels_last)}, tmp_path / "step2.pt")
    swa_avg.average([tmp_path / "step1", tmp_path / "step2.pt"], tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")["w"]
    assert loaded.is_contiguous(memory_format=torch.channels_last)
    assert oracle.same_bits(loaded, oracle.mean([one, two]))


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_flipped_bit_is_found(place: float, tmp_path: Path) -> None:
    """torch loads a damaged chunk without a word; its checksum is compared here."""
    boxes = {"w": columns((600, 64), 4)}
    save_chunks(tmp_path / "1", {"w": torch.rand(600, 64)}, boxes)
    path = save_chunks(tmp_path / "2", {"w": torch.rand(600, 64)}, boxes) / "__1_0.distcp"
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="w: is damaged") as caught:
        swa_avg.average([tmp_path / "1", tmp_path / "2"], tmp_path / "out.pt")
    assert caught.value.file == str(path)
    assert not (tmp_path / "out.pt").exists()


# Refusals -------------------------------------------------------------------------------------


def add_twin(metadata: Metadata) -> None:
    for index, info in list(metadata.storage_data.items()):
        metadata.storage_data[MetadataIndex(index.fqn, [*index.offset])] = info
        twin = MetadataIndex(index.fqn, index.offset)
        object.__setattr__(twin, "offset", tuple(index.offset))
        metadata.storage_data[Twin(twin)] = info


class Twin:
    """A second key for the same item."""

    def __init__(self, index: MetadataIndex) -> None:
        self.fqn, self.offset = index.fqn, index.offset


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_info(relative_path="../../x"), r"is in the file '\.\./\.\./x'"),
        (set_info(relative_path="/etc/passwd"), "is in the file"),
        (set_info(relative_path=""), "is in the file ''"),
        (set_info(relative_path=3), "no item for its chunk"),
        (set_info(relative_path="absent.distcp"), "No such file"),
        (set_info(offset=-1), "ends at byte"),
        (set_info(length=2**50), "ends at byte"),
        (set_info(length=0), "is empty"),
        (set_info(transform_descriptors=["zstd"]), "compressed"),
        (set_chunks(HALVES[0]), "hole"),
        (set_chunks(), "hole"),
        (set_chunks(*HALVES, HALVES[0]), "overlap"),
        (set_chunks(HALVES[0], ((0, 2), (4, 3))), "overlap"),
        (set_chunks(HALVES[0], ((0, 3), (4, 4))), "outside"),
        (set_chunks(HALVES[0], ((0, 3, 0), (4, 3, 1))), "outside"),
        (set_chunks(HALVES[0], ((0, 3), (2, 3)), ((2, 3), (2, 3))), "for a chunk|no item"),
        (set_size(4, 7), "hole"),
        (set_size(4, 5), "outside"),
        (lambda metadata: metadata.storage_data.clear(), "no item for its chunk"),
        (add_twin, "lists an item twice"),
        (lambda metadata: setattr(metadata, "storage_data", None), "no storage_data"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", []), "no state_dict_metadata"),
    ],
)
def test_folders_that_are_not_sound_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    """Holes, overlaps, ways out of the folder and missing items are refused when it is opened."""
    save_chunks(tmp_path / "c", WHOLE, {"w": HALVES}, change=change)
    with pytest.raises((FormatError, FileError), match=message):
        open_checkpoint(tmp_path / "c")


def test_item_of_another_kind_is_refused(tmp_path: Path) -> None:
    """An item that is no tensor, or one of another shape, is not taken for a chunk."""
    for wrong in ({"w": torch.ones(4, 3)}, torch.ones(3, 4), [1]):
        folder = save_chunks(tmp_path / "c", WHOLE, {"w": HALVES})
        torch.save(wrong, folder / "__0_0.distcp")
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            if info.relative_path == "__0_0.distcp":
                info.length = (folder / "__0_0.distcp").stat().st_size
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(FormatError, match=r"for a chunk, expected a tensor of shape \[4, 3\]"):
            open_checkpoint(folder)


def test_folder_without_metadata_is_refused(tmp_path: Path) -> None:
    """A run that ended while saving leaves items without .metadata."""
    save_chunks(tmp_path / "c", WHOLE, {"w": HALVES})
    (tmp_path / "c" / ".metadata").unlink()
    for path in expand([tmp_path / "c"]):
        with pytest.raises(FormatError, match=r"has no \.metadata"):
            open_checkpoint(path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_folder_runs(tmp_path: Path) -> None:
    """Payloads in .metadata, in the planner's data and in items that are no tensors stay inert."""
    marker = tmp_path / "marker"

    def hide(metadata: Metadata) -> None:
        metadata.storage_meta = Payload(marker)  # type: ignore[assignment]
        metadata.version = Payload(marker)  # type: ignore[assignment]
        metadata.planner_data["x"] = Payload(marker)
        metadata.state_dict_metadata["bytes"] = BytesStorageMetadata()
        info = _StorageInfo("bytes.distcp", 0, 100)
        metadata.storage_data[MetadataIndex("bytes")] = info

    folder = save_chunks(tmp_path / "c", WHOLE, {"w": HALVES}, change=hide)
    (folder / "bytes.distcp").write_bytes(pickle.dumps(Payload(marker)))
    assert_same(read(folder), WHOLE)
    swa_avg.average([folder], tmp_path / "out.pt")
    item = folder / "__0_0.distcp"
    torch.save([Payload(marker)], item)
    with pytest.raises(SwaAvgError):
        open_checkpoint(folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(FormatError, match="no state_dict_metadata"):
        open_checkpoint(folder)
    assert not marker.exists()


@given(data=st.data())
@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_metadata_is_refused_or_harmless(tmp_path: Path, data: Any) -> None:
    """Any bytes changed or cut in .metadata give the tensors or a SwaAvgError, nothing else."""
    folder = tmp_path / "c"
    if not folder.exists():
        save_chunks(folder, WHOLE, {"w": HALVES})
        (tmp_path / "sound").write_bytes((folder / ".metadata").read_bytes())
    whole = bytearray((tmp_path / "sound").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    (folder / ".metadata").write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        read(folder)
    except SwaAvgError as error:
        assert str(tmp_path) in str(error)
