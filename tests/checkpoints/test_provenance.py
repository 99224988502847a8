"""Every output says how it was made: the same for the same inputs, and nothing private."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import zipfile
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import command
import pytest
import torch
from folders import save_one
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from stored import records

import swa_avg
from swa_avg.checkpoints import provenance
from swa_avg.errors import ProvenanceError
from swa_avg.formats.opening import Checkpoint

MODULE = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
loader = [torch.arange(40.).view(10, 4) * n for n in (1, 2)]
"""


def run(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    return command.run(folder, *line.split())


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "0.weight": torch.randn(3, 4),
        "0.bias": torch.randn(3),
        "1.weight": torch.ones(3),
        "1.bias": torch.zeros(3),
        "1.running_mean": torch.randn(3),
        "1.running_var": torch.rand(3),
        "1.num_batches_tracked": torch.tensor(seed),
    }


def save_run(folder: Path, suffix: str = ".pt") -> None:
    folder.mkdir(exist_ok=True)
    for epoch in range(3):
        path = folder / f"epoch_{epoch}{suffix}"
        if suffix == ".pt":
            torch.save({"epoch": epoch, "state_dict": weights(epoch)}, path)
        else:
            save_file(weights(epoch), path)


def said(folder: Path, name: str) -> dict[str, Any]:
    ended = run(folder, f"--show {name} --json")
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def by_hand(state: dict[str, torch.Tensor]) -> str:
    """Return the fingerprint of contiguous tensors, each alone in its storage."""
    described, crcs = [], []
    for name in sorted(state):
        tensor = state[name]
        if tensor.is_floating_point() and "running" not in name:
            dtype = str(tensor.dtype).removeprefix("torch.")
            described.append((name, dtype, tuple(tensor.shape), None))
            crcs.append(zlib.crc32(bytes(tensor.reshape(-1).view(torch.uint8).tolist())))
    return sha256(f"{described}{crcs}".encode()).hexdigest()[:16]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("out", ["swa.pt", "swa.safetensors"])
def test_it_lists_what_it_was_made_from(tmp_path: Path, suffix: str, out: str) -> None:
    """Name, size, epoch and fingerprint of each checkpoint, their count, and the options."""
    save_run(tmp_path, suffix)
    report = swa_avg.average(tmp_path / f"*{suffix}", tmp_path / out, bn_buffers="first")
    found = said(tmp_path, out)
    assert found["swa_avg"] == swa_avg.__version__
    assert found["count"] == 3
    assert found["options"] == {"bn_buffers": "first"}
    assert found["batchnorm"] == "first"
    for epoch, source in enumerate(found["checkpoints"]):
        path = tmp_path / f"epoch_{epoch}{suffix}"
        assert source == {
            "name": path.name,
            "size": path.stat().st_size,
            "fingerprint": by_hand(weights(epoch)),
            "epoch": epoch if suffix == ".pt" else None,
            "step": None,
            "count": 1,
        }
        assert report.inputs[epoch].fingerprint == source["fingerprint"]
        assert report.inputs[epoch].modified == path.stat().st_mtime


@pytest.mark.parametrize("out", ["swa.pt", "swa.safetensors"])
def test_same_inputs_same_bytes(tmp_path: Path, out: str) -> None:
    """Neither the folder nor the time is in the output."""
    save_run(tmp_path / "first secret place")
    shutil.copytree(tmp_path / "first secret place", tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        os.utime(path, (1, time.time() - 10**6))
    for folder in ("first secret place", "other"):
        swa_avg.average(tmp_path / folder, tmp_path / folder / out)
    made = (tmp_path / "other" / out).read_bytes()
    assert (tmp_path / "first secret place" / out).read_bytes() == made
    assert b"secret" not in made and b"tmp" not in made


def test_loaders_take_no_notice(tmp_path: Path) -> None:
    """torch, mapped or not, and safetensors load the output as if nothing were said."""
    save_run(tmp_path)
    swa_avg.average(tmp_path / "*.pt", tmp_path / "swa.pt")
    swa_avg.average(tmp_path / "epoch*", tmp_path / "swa.safetensors")
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        loaded = torch.load(tmp_path / "swa.pt", **options)
        assert list(loaded) == list(weights(0))
    with zipfile.ZipFile(tmp_path / "swa.pt") as archive:
        assert archive.testzip() is None
    with safe_open(tmp_path / "swa.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(weights(0))
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "new"])
def test_folders_say_it_in_a_side_file(tmp_path: Path, kept: bool) -> None:
    """A Hugging Face folder has it beside its weights; an older average's is not handed on."""
    for epoch in range(3):
        save_one(tmp_path / f"checkpoint-{epoch}", weights(epoch), "model.safetensors")
    swa_avg.average(tmp_path / "checkpoint-?", tmp_path / "swa", keep_wrapper=kept)
    assert json.loads((tmp_path / "swa/swa_avg.json").read_text()) == said(tmp_path, "swa")
    assert [one["name"] for one in said(tmp_path, "swa")["checkpoints"]] == [
        f"checkpoint-{epoch}" for epoch in range(3)
    ]


def test_kept_wrappers_say_it_where_they_can(tmp_path: Path) -> None:
    """A kept zip and a kept safetensors file say it; a file from before torch 1.6 cannot."""
    save_run(tmp_path)
    save_run(tmp_path, ".safetensors")
    swa_avg.average(tmp_path / "*.pt", tmp_path / "swa.ckpt", keep_wrapper=True)
    safe = tmp_path / "swa.safetensors"
    swa_avg.average(tmp_path / "epoch*.safetensors", safe, keep_wrapper=True)
    assert said(tmp_path, "swa.ckpt")["count"] == said(tmp_path, safe.name)["count"] == 3
    old = {"_use_new_zipfile_serialization": False}
    for epoch in range(2):
        torch.save(weights(epoch), tmp_path / f"old_{epoch}.bin", **old)
    swa_avg.average(tmp_path / "old_?.bin", tmp_path / "old.bin", keep_wrapper=True)
    ended = run(tmp_path, "--show old.bin")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "error: old.bin: has no record of how it was made,"
        " expected an average that swa-avg wrote.\n"
    )


@pytest.mark.parametrize("out", ["swa.pt", "swa.safetensors"])
@pytest.mark.parametrize("estimator", ["population", "torch"])
def test_recompute_says_so(tmp_path: Path, out: str, estimator: str) -> None:
    """After a recompute in place the file says so, and nothing else of it moves."""
    save_run(tmp_path)
    (tmp_path / "mod.py").write_text(MODULE)
    swa_avg.average(tmp_path / "*.pt", tmp_path / out)
    before, size = said(tmp_path, out), (tmp_path / out).stat().st_size
    assert before.pop("batchnorm") == "of the last checkpoint"
    line = f"--recompute-bn --data mod:loader -o {out} --bn-estimator {estimator}"
    for _ in range(2):
        ended = run(tmp_path, line)
        assert ended.returncode == 0, ended.stderr
        after = said(tmp_path, out)
        assert after.pop("batchnorm") == {"estimator": estimator, "batches": 2, "samples": 20}
        assert after == before
        assert (tmp_path / out).stat().st_size == size
    shown = run(tmp_path, f"--show {out}").stdout.splitlines()
    assert shown[0] == f"{out}: average of 3 checkpoints, by swa-avg {swa_avg.__version__}"
    assert shown[-1] == f"BatchNorm: recomputed (estimator {estimator}, batches 2, samples 20)"
    if out == "swa.pt":
        with zipfile.ZipFile(tmp_path / out) as archive:
            assert archive.testzip() is None


def test_report_goes_to_a_file(tmp_path: Path) -> None:
    """--report writes what --json prints; it never replaces a checkpoint or the output."""
    save_run(tmp_path)
    ended = run(tmp_path, "epoch_0.pt epoch_1.pt -o swa.pt --report report.json --json")
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(ended.stdout)
    found = json.loads(ended.stdout)
    assert found["versions"]["swa_avg"] == swa_avg.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert {"path", "size", "modified", "fingerprint", "epoch"} <= found["inputs"][0].keys()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for report, status in (("epoch_0.pt", 1), ("swa.pt", 2)):
        ended = run(tmp_path, f"epoch_0.pt epoch_1.pt -o swa.pt -f --report {report}")
        assert ended.returncode == status, ended.stderr
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_show_stands_alone(tmp_path: Path) -> None:
    """--show with anything that it would ignore is wrong usage."""
    save_run(tmp_path)
    assert run(tmp_path, "epoch_0.pt --show swa.pt").returncode == 2
    assert run(tmp_path, "--show epoch_0.pt --force").returncode == 2
    assert run(tmp_path, "--show epoch_0.pt").returncode == 1
    assert run(tmp_path, "--show missing.pt").returncode == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        name: json_values | st.integers(0, 5) | st.text(max_size=3)
        for name in ("name", "size", "fingerprint", "epoch", "step", "count")
    },
)
texts = st.one_of(
    st.text(),
    json_values.map(json.dumps),
    st.fixed_dictionaries(
        {},
        optional={
            "swa_avg": json_values | st.just("1"),
            "checkpoints": json_values | st.lists(entries, max_size=2),
            "options": json_values | st.just({}),
            "batchnorm": json_values,
        },
    ).map(json.dumps),
    st.just("[" * 100_000),
)


@given(texts)
def test_what_others_write_there_is_no_provenance(text: str) -> None:
    """Whatever stands in its place: ours, and then it can be written again, nothing, or refused."""
    try:
        found = provenance.of(Checkpoint(Path("x.pt"), "torch zip", {}, (), provenance=text))
    except ProvenanceError as error:
        assert "invalid record" in str(error)
        return
    if found is not None:
        assert json.loads(found.text())["count"] == found.count >= len(found.sources)


def test_foreign_record_of_that_name_is_no_obstacle(tmp_path: Path) -> None:
    """A checkpoint with such a record that is not ours is averaged as any other."""
    save_run(tmp_path)
    for epoch in range(3):
        with zipfile.ZipFile(tmp_path / f"epoch_{epoch}.pt", "a") as archive:
            archive.writestr(f"epoch_{epoch}/swa_avg.json", "{}")
    swa_avg.average(tmp_path / "epoch*.pt", tmp_path / "swa.pt")
    save_run(tmp_path)
    swa_avg.average(tmp_path / "epoch*.pt", tmp_path / "plain.pt")
    assert records(tmp_path / "swa.pt") == records(tmp_path / "plain.pt")


def test_options_that_matter_are_shown(tmp_path: Path) -> None:
    """What the output depends on and is not the default is told, and nothing else."""
    save_run(tmp_path)
    made = run(tmp_path, "epoch_0.pt epoch_1.pt --dtype float16 --bn-buffers reset -o swa.pt -q")
    assert made.returncode == 0, made.stderr
    told = run(tmp_path, "--show swa.pt").stdout.splitlines()
    said = [line for line in told if line.startswith("option ")]
    assert said == ["option bn_buffers: reset", "option dtype: float16"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("count", value) for value in (0, -1, "1", True, 2.0, 10**400, 1 << 27, None)),
        *(("size", value) for value in (None, -1, 10**309, 1e309)),
        *(("epoch", value) for value in (1.5, 10**20, "1")),
        ("name", None),
        ("fingerprint", 3),
        ("another", 1),
    ],
)
def test_history_that_cannot_be_is_refused(tmp_path: Path, field: str, value: object) -> None:
    """A record that claims to be ours and cannot be: it is neither used nor passed over."""
    save_run(tmp_path)
    swa_avg.average(tmp_path, tmp_path / "swa.pt")
    said = provenance.made_from(tmp_path / "swa.pt").to_dict()
    text = json.dumps(said)
    assert provenance.of(Checkpoint(tmp_path, "", {}, (), provenance=text)) is not None
    said["checkpoints"][0][field] = value  # type: ignore[index]
    changed = Checkpoint(tmp_path, "", {}, (), provenance=json.dumps(said))
    with pytest.raises(ProvenanceError, match="has an invalid record of how it was made"):
        provenance.of(changed)
