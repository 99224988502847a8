"""The law of `--keep-wrapper` for folders of many ranks: the last one, with the mean in it.

Four ranks write a model of mixed sharding (`sharded.py`); `dcp.load` reads the outputs on 1, 2
and 4 ranks.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import oracle
import pytest
import sharded
import torch
import torch.distributed.checkpoint as dcp
from folders import save_chunks
from preloaded import on_ranks
from stored import tensors as read
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

import swa_avg
from swa_avg.averaging import planned
from swa_avg.errors import FormatError, OutputError, SwaAvgError
from swa_avg.planning import Options

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
STEPS = (1, 2, 3)
# On how many ranks an output is loaded; one load takes a second.
LOADED = {"fsdp": (1, 2, 4), "megatron": (1, 2, 4), "others before": (1, 4)}
# Each output with its layout, and the folders that it is made from.
OUTPUTS = {
    "fsdp": ("fsdp", ("fsdp4/step1", "fsdp4/step2", "fsdp4/step3")),
    "titan": ("titan", ("titan4/step1", "titan4/step2", "titan4/step3")),
    "megatron": ("megatron", ("megatron4/step1", "megatron4/step2", "megatron4/step3")),
    "others before": ("fsdp", ("fsdp1/step1", "fsdp2/step2", "fsdp4/step3")),
    "others after": ("fsdp", ("fsdp4/step1", "fsdp1/step2", "fsdp2/step3")),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What 4, 2 and 1 ranks wrote, and in `out` the averages with kept wrappers."""
    folder = sharded.written(tmp_path_factory.mktemp("ranks"))
    (folder / "out").mkdir()
    for name, (_, inputs) in OUTPUTS.items():
        paths = [folder / path for path in inputs]
        swa_avg.average(paths, folder / "out" / name, keep_wrapper=True, verify=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def loaded(run: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """What `dcp.load` gives for each output, by the number of ranks that load it."""
    plain = {run / "plain": "bare"}
    swa_avg.average(run / "fsdp4/step?", run / "plain")
    kinds = {run / "out" / name: kind for name, (kind, _) in OUTPUTS.items()}
    tasks = {path: (kind, LOADED.get(path.name, (2,))) for path, kind in (kinds | plain).items()}
    found = sharded.loaded(tasks, run)
    return {path.name: of_ranks for path, of_ranks in found.items()}


@cache
def means() -> sharded.Weights:
    """Return the exact means; what has none is that of the last."""
    steps = [sharded.model(step) for step in STEPS]
    found = dict(steps[-1])
    for name, value in found.items():
        column = [step[name] for step in steps]
        if name == "large":
            found[name] = mean(column)
        elif value.is_floating_point() and name not in sharded.BATCHNORM:
            found[name] = oracle.mean(column)
    return found


@pytest.mark.parametrize("name", [*OUTPUTS, "plain"])
def test_dcp_load_gives_the_mean_on_any_number_of_ranks(name: str, loaded: Any) -> None:
    """Rows, columns, grids, replicas, uneven and empty shares: to the bit, also resharded.

    Optimizer state and what is not a tensor are those of the last.
    """
    kind, _ = OUTPUTS.get(name, ("bare", ()))
    last = sharded._flat(sharded.tree(3, 1, kind))
    expected = dict(zip([*last][: len(means())], means().values(), strict=True))
    for ranks, found in loaded[name].items():
        for key, value in (last | expected).items():
            if isinstance(value, torch.Tensor):
                assert oracle.same_bits(found[key], value), (ranks, key)
            elif isinstance(value, BytesIO):
                assert found[key].getvalue() == value.getvalue()
            else:
                assert found[key] == value


def items(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield each item of a folder: its name, its file and its bytes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        data = (folder / info.relative_path).read_bytes()[info.offset :][: info.length]
        yield index.fqn, info.relative_path, data


@pytest.mark.parametrize("name", OUTPUTS)
def test_all_but_the_averaged_bytes_is_that_of_the_last(name: str, run: Path) -> None:
    """Same files, same sizes, same items; a new item differs in its data and their checksum."""
    last, out = run / OUTPUTS[name][1][-1], run / "out" / name
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert json.loads(after.pop("swa_avg.json"))["count"] == 3
    assert {n: len(data) for n, data in after.items()} == {n: len(d) for n, d in before.items()}
    covered = dict.fromkeys(after, 0)
    averaged = {name.removeprefix("model.") for name, value in means().items()}
    changed = set()
    for (key, file, one), (_, _, other) in zip(items(last), items(out), strict=True):
        covered[file] += len(one)
        if one == other:
            continue
        changed.add(key)
        old, new = zipfile.ZipFile(BytesIO(one)), zipfile.ZipFile(BytesIO(other))
        assert new.testzip() is None, key
        for a, b in zip(old.infolist(), new.infolist(), strict=True):
            assert (a.filename, a.header_offset, a.extra) == (b.filename, b.header_offset, b.extra)
            assert a.filename.endswith("/data/0") or old.read(a) == new.read(b)
    # Nothing lies between the items.
    assert all(after[n] == before[n] for n in after if not n.endswith(".distcp"))
    assert all(covered[n] == len(after[n]) for n in after if n.endswith(".distcp"))
    assert not [key for key in changed if "optim" in key or "_extra_state" in key]
    floating = [n for n in averaged if not n.startswith(("bn.", "table"))]
    assert len(changed) == len(floating)


def test_safetensors_of_ranks(run: Path, tmp_path: Path) -> None:
    """Of HuggingFaceStorageWriter: parts are refused, and the remedy gives the mean of each.

    Joined ones are a Hugging Face folder; with the parts beside them no wrapper is kept.
    """
    with pytest.raises(SwaAvgError, match=r"Average each part separately, as in .*/shard-00001-"):
        swa_avg.average(run / "parts" / "step?", tmp_path / "out")
    for number in (1, 2):
        name = f"shard-0000{number}-model-00001-of-00001.safetensors"
        (tmp_path / "parts").mkdir(exist_ok=True)
        swa_avg.average(run / "parts" / "step?" / name, tmp_path / "parts" / name)
    with pytest.raises(OutputError, match="has its weights a second time"):
        swa_avg.average(run / "joined" / "step?", tmp_path / "out", keep_wrapper=True)
    swa_avg.average(run / "joined" / "step?", tmp_path / "joined")
    for out in ("parts", "joined"):
        found = {name: torch.zeros_like(means()[name]) for name in sharded.SAFE}
        reader = dcp.HuggingFaceStorageReader(str(tmp_path / out))
        dcp.load(found, storage_reader=reader, no_dist=True)
        for name, value in found.items():
            assert oracle.same_bits(value, means()[name]), (out, name)


def test_several_ranks_write_the_same_bytes(run: Path, tmp_path: Path) -> None:
    """Two ranks share the work; the folder is that of one process."""
    paths = [str(run / path) for path in OUTPUTS["fsdp"][1]]
    options = ["-o", "out", "--keep-wrapper", "--threads", "1"]
    ended = on_ranks(tmp_path, 2, *paths, *options)
    assert [one.returncode for one in ended] == [0, 0], ended
    assert content(tmp_path / "out") == content(run / "out" / "fsdp")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# By hand --------------------------------------------------------------------------------------

HALVES = [((0, 0), (300, 70)), ((0, 70), (300, 50))]
QUARTERS = [((row, 0), (75, 120)) for row in (0, 75, 150, 225)]


def whole_numbers() -> torch.Tensor:
    return torch.randint(-999, 999, (300, 120)).float()


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors of whole numbers, for which rounding twice is rounding once."""
    return torch.stack([*tensors]).double().mean(0).float()


def steps(folder: Path, boxes: Sequence[Any] = (HALVES, HALVES)) -> list[torch.Tensor]:
    """Write a folder for each list of boxes; return the tensors."""
    torch.manual_seed(0)
    tensors = [whole_numbers() for _ in boxes]
    for number, (tensor, cut) in enumerate(zip(tensors, boxes, strict=True)):
        save_chunks(folder / f"step{number}", {"w": tensor}, {"w": cut})
    return tensors


def test_each_byte_is_read_once_if_all_are_cut_alike(tmp_path: Path) -> None:
    """Also columns: each part is one range in every checkpoint."""
    tensors = steps(tmp_path)
    report = swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
    assert report.bytes_read == sum(tensor.nbytes for tensor in tensors)


def test_grids_that_are_cut_otherwise(tmp_path: Path) -> None:
    """A part of the last is put together from all parts that touch it, of any size."""
    rows = [((row, column), (20, 60)) for row in range(0, 300, 20) for column in (0, 60)]
    columns = [((row, column), (50, 8)) for row in range(0, 300, 50) for column in range(0, 120, 8)]
    mixed = [((0, 0), (300, 7)), *(((row, 7), (100, 113)) for row in (0, 100, 200))]
    tensors = steps(tmp_path, (rows, mixed, [((0, 0), (300, 120))], columns))
    swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
    assert oracle.same_bits(read(tmp_path / "out")["w"], mean(tensors))


@pytest.mark.parametrize("other", [HALVES, QUARTERS], ids=["alike", "otherwise"])
def test_flipped_bit_in_any_part_is_found(other: Any, tmp_path: Path) -> None:
    """In every checkpoint, cut alike or not; nothing is written."""
    steps(tmp_path, (other, HALVES))
    for path in tmp_path.glob("step?/__*"):
        sound = path.read_bytes()
        if not sound:
            continue
        data = bytearray(sound)
        data[len(data) * 2 // 5] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match="w: is damaged") as caught:
            swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
        assert caught.value.file == str(path)
        assert not (tmp_path / "out").exists()
        path.write_bytes(sound)


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    """Without --force nothing is replaced, with it only weights and files that come again."""
    steps(tmp_path)
    swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
    before = content(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
    swa_avg.average([tmp_path / "step1"], tmp_path / "out", keep_wrapper=True, force=True)
    assert content(tmp_path / "out").keys() == before.keys()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"would be lost: notes\.txt"):
        swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True, force=True)


@pytest.mark.parametrize("name", ["common.pt", "__1_0.distcp", ".metadata"])
def test_input_that_changes_is_refused(name: str, tmp_path: Path) -> None:
    """Also a file that is only copied; nothing is written."""
    steps(tmp_path)
    torch.save({"iteration": 1}, tmp_path / "step1" / "common.pt")
    path, options = tmp_path / "step1" / name, Options(keep_wrapper=True)
    with planned(tmp_path / "step?", tmp_path / "out", options) as averaging:
        with path.open("r+b") as file:
            file.write(bytes(8))
        with averaging.open_output() as output, pytest.raises(SwaAvgError, match="changed while"):
            averaging.write_to(output)
    assert {path.name for path in tmp_path.iterdir()} == {"step0", "step1"}


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_beside_the_weights_is_run_or_read(tmp_path: Path) -> None:
    """Payloads in `common.pt` and in the items of `_extra_state` are copied as bytes.

    The optimizer's file is not read as tensors: random bytes do.
    """
    marker = tmp_path / "marker"

    def beside(metadata: Any) -> None:
        items = {"layer._extra_state/shard_0_1": "extra.distcp", "optimizer.state.exp_avg.w": "o"}
        metadata.state_dict_metadata["layer._extra_state/shard_0_1"] = BytesStorageMetadata()
        described = metadata.state_dict_metadata["model.w"]
        metadata.state_dict_metadata["optimizer.state.exp_avg.w"] = described
        for key, file in items.items():
            metadata.planner_data[key] = tuple(key.split(".", 1)) if "opt" in key else (key,)
            metadata.storage_data[MetadataIndex(key)] = _StorageInfo(file, 0, 60)

    tensor = whole_numbers()
    for number in (0, 1):
        path = tmp_path / f"step{number}"
        save_chunks(path, {"w": tensor + number}, {"w": HALVES}, change=beside)
        torch.save({"iteration": number, "args": Payload(marker)}, path / "common.pt")
        (path / "extra.distcp").write_bytes(pickle.dumps(Payload(marker)))
        (path / "o").write_bytes(os.urandom(60))
    swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True, verify=True)
    assert not marker.exists()
    for name in ("common.pt", "extra.distcp", "o", ".metadata"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "step1" / name).read_bytes()
    assert oracle.same_bits(read(tmp_path / "out")["w"], mean([tensor, tensor + 1]))


@pytest.mark.parametrize("inner", ["weights", "model_and_optim", "pytorch_model_fsdp_0"])
def test_model_in_a_sub_folder(inner: str, tmp_path: Path) -> None:
    """NeMo, OLMo-core and accelerate: the folder is copied with all that is around the model."""
    tensors = [whole_numbers() for _ in range(2)]
    for number, tensor in enumerate(tensors):
        save_chunks(tmp_path / f"step{number}" / inner, {"w": tensor}, {"w": HALVES})
        (tmp_path / f"step{number}" / "context").mkdir()
        (tmp_path / f"step{number}" / "context" / "io.json").write_text(str(number))
    bare = swa_avg.average(tmp_path / "step?", tmp_path / "bare")
    assert any(f"not in a sub-folder {inner}" in note for note in bare.notes)
    kept = swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
    assert not any("sub-folder" in note for note in kept.notes)
    assert (tmp_path / "out" / "context" / "io.json").read_text() == "1"
    assert oracle.same_bits(read(tmp_path / "out" / inner)["w"], mean(tensors))


def test_two_parts_on_one_item_are_refused(tmp_path: Path) -> None:
    """A part whose bytes another tensor shares cannot be replaced alone."""
    steps(tmp_path)

    def share(metadata: Any) -> None:
        """Give `v` the first item of `w`, and a second one of its own."""
        infos = dict(metadata.storage_data)
        first = next(info for index, info in infos.items() if index.fqn == "model.w")
        for index in infos:
            if index.fqn == "model.v" and tuple(index.offset) == (0, 0):
                metadata.storage_data[index] = first

    tensor = whole_numbers()
    for number in (0, 1):
        state = {"w": tensor + number, "v": tensor + number}
        path = tmp_path / f"step{number}"
        shutil.rmtree(path)
        save_chunks(path, state, {"w": HALVES, "v": HALVES}, change=share)
    with pytest.raises(OutputError, match="shares bytes with another"):
        swa_avg.average(tmp_path / "step?", tmp_path / "out", keep_wrapper=True)
