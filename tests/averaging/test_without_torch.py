"""Averaging needs no torch: the command in a process in which importing torch fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command import load, run
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import make

RECORDED = json.loads(make.RECORDED.read_text(encoding="utf-8"))["3 checkpoints"]
COUNT = 3
_NAMES = (*(f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")),
          "uint16", "uint32", "uint64", "complex32")  # fmt: skip
YOUNG = [getattr(torch, name) for name in _NAMES]
half_complex = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
distributed = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How to run the command where torch cannot be imported."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('torch was imported')\n")
    return {"env": {**os.environ, "PYTHONPATH": str(folder)}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first three checkpoints of the recorded averages, in several formats."""
    folder = tmp_path_factory.mktemp("inputs")
    for number in range(COUNT):
        state = make.state(number, make.CASES["3 checkpoints"])
        # Views with gaps cannot be kept where they are.
        state = {name: value.clone() for name, value in state.items()}
        save = {"epoch": number, "model": state, "optimizer": {"lr": 0.1}}
        torch.save(save, folder / f"epoch_{number}.pt")
        # The old format has no float8: torch saves it, and cannot load it.
        old = {name: value for name, value in state.items() if value.dtype not in YOUNG}
        legacy = folder / f"legacy_{number}.pt"
        torch.save({"model": old}, legacy, _use_new_zipfile_serialization=False)
        kept = {name: value.contiguous() for name, value in state.items()
                if value.dtype not in (torch.complex128, torch.complex32)}  # fmt: skip
        save_file(kept, folder / f"epoch_{number}.safetensors")
        (folder / f"folder_{number}").mkdir()
        save_file(kept, folder / f"folder_{number}" / "model.safetensors", {"format": "pt"})
        plain = {name: value for name, value in kept.items() if value.is_floating_point()}
        dcp.save({"model": plain}, checkpoint_id=folder / f"dcp_{number}", no_dist=True)
    return folder


def succeeds(ended: subprocess.CompletedProcess[str]) -> str:
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@half_complex
@distributed
@pytest.mark.parametrize(
    ("given", "out", "options"),
    [
        ("epoch_?.pt", "zip.pt", ("--verify",)),
        ("legacy_?.pt", "legacy.pt", ()),
        ("epoch_?.safetensors", "single.safetensors", ("--verify", "--distances")),
        ("epoch_?.safetensors", "from_safetensors.pt", ("--threads", "1")),
        ("folder_?", "folder", ("--verify", "--max-shard-size", "20kB")),
        ("dcp_?", "dcp", ("--verify",)),
        ("epoch_?.pt", "kept.pt", ("--keep-wrapper", "--verify")),
        ("legacy_?.pt", "kept_legacy.pt", ("--keep-wrapper",)),
        ("epoch_?.safetensors", "kept.safetensors", ("--keep-wrapper",)),
        ("folder_?", "kept_folder", ("--keep-wrapper",)),
        ("dcp_?", "kept_dcp", ("--keep-wrapper",)),
    ],
)
def test_every_format_is_averaged_without_torch(
    inputs: Path, tmp_path: Path, no_torch: dict[str, Any], given: str, out: str,
    options: tuple[str, ...],
) -> None:  # fmt: skip
    """In and out, all dtypes, and not a bit differs from what is recorded."""
    paths = sorted(map(str, inputs.glob(given)))
    assert len(paths) == COUNT
    succeeds(run(tmp_path, *paths, "-o", out, *options, **no_torch))
    path = tmp_path / out
    if path.is_dir() and list(path.glob("*.safetensors")):
        found = {k: v for file in path.glob("*.safetensors") for k, v in load(file).items()}
    elif path.is_dir():
        found = read_distributed(path)
    else:
        found = load(path)
    found = found.get("model", found)
    assert len(found) > 20
    for name, value in found.items():
        assert make.described(value) == RECORDED[name], name


def read_distributed(path: Path) -> dict[str, Any]:
    reader = dcp.FileSystemReader(path)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): value for name, value in state.items()}


@half_complex
def test_all_else_is_done_without_torch(
    inputs: Path, tmp_path: Path, no_torch: dict[str, Any]
) -> None:
    """Choosing, looking, other dtypes, going on from an average, telling how one was made."""
    paths = sorted(map(str, inputs.glob("epoch_?.pt")))
    chosen = run(tmp_path, *paths, "--last", "2", "--dry-run", "-v", **no_torch)
    assert "would read" in succeeds(chosen)
    succeeds(run(tmp_path, *paths[:2], "-o", "two.pt", "--bn-buffers", "reset", **no_torch))
    going_on = ("--start-from", "two.pt", "-o", "three.pt", "--verify", "--json", "--distances")
    told = json.loads(succeeds(run(tmp_path, paths[2], *going_on, **no_torch)))
    assert len(told["distances"]["overall"]) == 2
    assert "epoch_2.pt" in succeeds(run(tmp_path, "--show", "three.pt", **no_torch))
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    averaged.update_parameters(torch.nn.Linear(2, 2))
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "next.pt")
    on = ("next.pt", "--start-from", "averaged.pt", "-o", "on.pt", "--dtype", "bfloat16")
    assert "2 checkpoints" in succeeds(run(tmp_path, *on, **no_torch))


def test_open_checkpoint_tells_without_torch_and_reads_with_it(tmp_path: Path) -> None:
    """Names, dtypes and shapes need no torch; a tensor that is handed out is torch's."""
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pt")
    code = (
        "import sys, swa_avg\n"
        "with swa_avg.open_checkpoint('a.pt') as checkpoint:\n"
        "    assert (checkpoint.dtype('a'), checkpoint.shape('a')) == ('float32', (3,))\n"
        "    assert 'torch' not in sys.modules\n"
        "    assert checkpoint.read('a').tolist() == [0.0, 1.0, 2.0]\n"
        "    assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
