"""CASES.md C and E: what may be changed in place, folders included, and links in folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run as ran
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 36, 4), nn.BatchNorm1d(4), nn.Linear(4, 2),
    )

images = torch.randn(150, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 + 7
loader = DataLoader(TensorDataset(images, torch.zeros(150)), batch_size=32)

def breaks():
    yield images[:8]
    yield images[8:16]
    raise OSError("the disk of the data is gone")

def nothing(): return []
"""
Run = Callable[..., tuple[int, str, str]]
BN = ("--recompute-bn", "--data", "mod:loader")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mod.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Run:
    """Run the command in the folder: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        ended = ran(folder, *arguments)
        return ended.returncode, ended.stdout, ended.stderr

    return run


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    names: dict[str, Callable[[], nn.Module]] = {}
    exec(MODULE, names)
    return names["model"]()


def saved_as_folders(folder: Path, name: str = "model.safetensors") -> list[str]:
    """Write three checkpoints of the module's network as a Hugging Face library does."""
    names = []
    for seed in range(3):
        home = folder / f"checkpoint-{seed}"
        home.mkdir()
        state = network(seed).state_dict()
        if name.endswith(".bin"):
            torch.save(state, home / name)
        else:
            save_file(state, home / name, {"format": "pt"})
        (home / "config.json").write_text('{"architectures": ["Small"]}')
        names.append(home.name)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(run: Run, *arguments: str, says: str) -> str:
    """The command fails in one line."""
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("error: ") and says in err, err
    return err


def assert_statistics(state: dict[str, torch.Tensor]) -> None:
    """The first layer has the statistics of what it sees, all data at once, in float64."""
    names: dict[str, torch.Tensor] = {}
    exec(MODULE, names)
    model = network().double()
    model.load_state_dict(state)
    seen = model[0](names["images"].double()).detach()
    for found, expected in (
        (state["1.running_mean"], seen.mean([0, 2, 3])),
        (state["1.running_var"], seen.var([0, 2, 3], unbiased=False)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shards", [(), ("--max-shard-size", "1000")])
def test_bn_of_a_folder_after_averaging_and_in_place(
    folder: Path, run: Run, shards: tuple[str, ...]
) -> None:
    """Both ways give the same files, the statistics are the data's, and the record says so."""
    checkpoints = saved_as_folders(folder)
    code, out, err = run(*checkpoints, "-o", "one", *BN, *shards)
    assert code == 0 and "recomputed 2 BatchNorm layers" in out, err
    assert run(*checkpoints, "-o", "two", *shards)[0] == 0
    stale = run("--show", "two")[1]
    assert "BatchNorm: of the last checkpoint" in stale
    before = contents(folder / "two")
    (folder / "two/config.json").chmod(0o600)
    assert run("-o", "two", *BN)[0] == 0
    after = contents(folder / "two")
    assert after == contents(folder / "one")
    changed = {name for name in after if after[name] != before[name]}
    assert "swa_avg.json" in changed and "config.json" not in changed
    assert (folder / "two/config.json").stat().st_mode & 0o777 == 0o600
    state = {}
    for path in (folder / "two").glob("*.safetensors"):
        state |= load_file(path)
    assert_statistics(state)
    shown = json.loads(run("--show", "two", "--json")[1])
    assert shown["batchnorm"] == {"estimator": "population", "batches": 5, "samples": 150}
    assert run("--show", "two")[1] != stale
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    assert names == {"mod.py", "one", "two", *checkpoints}
    # One file of it by itself would make its record a false one; the remedy works.
    part = f"two/{next(iter(sorted(n for n in after if n.endswith('.safetensors'))))}"
    line = refused(run, "-o", part, *BN, "--force", says="is a part of the average")
    assert run("-o", line.rpartition("-o ")[2].rstrip().rstrip("."), *BN, "-q")[0] == 0


def test_bn_of_a_users_own_checkpoint_needs_force(folder: Path, run: Run) -> None:
    """Files and folders that are no averages are refused; with --force it is done, in place."""
    net = network()
    state = net.state_dict()
    torch.save({"epoch": 2, "state_dict": state, "optimizer": {"a": 1}}, "epoch=2.ckpt")
    save_file(state, "plain.safetensors")
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"model": state, "model_ema": AveragedModel(net).state_dict()}, "both.pth")
    saved_as_folders(folder)
    (folder / "checkpoint-0/optimizer.pt").write_bytes(b"state of the optimizer")
    for name in ("epoch=2.ckpt", "plain.safetensors", "old.pt", "checkpoint-0"):
        before = contents(folder)
        line = refused(run, "-o", name, *BN, says=f"{name}: is not an average")
        assert "add --force" in line
        assert contents(folder) == before
        code, _, err = run("-o", name, *BN, "--force")
        assert code == 0, err
        after = contents(folder)
        changed = {path for path in after if after[path] != before[path]}
        assert changed == {f"{name}/model.safetensors" if name == "checkpoint-0" else name}
    assert_statistics(load_file("plain.safetensors"))
    assert_statistics(load_file("checkpoint-0/model.safetensors"))
    # What a run has kept of averages does not make its checkpoint one; both are taken with it.
    refused(run, "-o", "both.pth", *BN, "--ema", says="is not an average")
    assert run("-o", "both.pth", *BN, "--ema", "--force")[0] == 0
    both = torch.load("both.pth")
    assert all(torch.equal(both["model"][name], state[name]) for name in state)
    averaged = {k.removeprefix("module."): v for k, v in both["model_ema"].items()}
    assert_statistics({k: v for k, v in averaged.items() if k != "n_averaged"})


def test_bn_of_an_average_needs_no_force(folder: Path, run: Run) -> None:
    """Ours of every form, and torch's AveragedModel, are averages."""
    checkpoints = saved_as_folders(folder)
    torch.save(AveragedModel(network()).state_dict(), "torch.pt")
    assert run("-o", "torch.pt", *BN, "-q")[0] == 0
    for name in ("swa.pt", "swa.safetensors", "swa"):
        assert run(*checkpoints, "-o", name, "-q")[0] == 0
        assert run("-o", name, *BN, "-q")[0] == 0
    assert run(*checkpoints, "-o", "kept", "--keep-wrapper", "-q")[0] == 0
    assert run("-o", "kept", *BN, "-q")[0] == 0
    assert_statistics(load_file("kept/model.safetensors"))


def test_bn_in_place_of_a_kept_wrapper_with_averages(folder: Path, run: Run) -> None:
    """The statistics go where the average is, as its record says; --ema takes it as well."""
    for epoch in range(3):
        raw, averaged = (network(seed).state_dict() for seed in (epoch, epoch + 9))
        torch.save({"epoch": epoch, "state_dict": raw, "state_dict_ema": averaged}, f"{epoch}.pth")
    wrapped = ("0.pth", "1.pth", "2.pth", "-o", "kept.pth", "--keep-wrapper", "--ema", "--force")
    for options in ((), ("--ema",)):
        assert run(*wrapped, "-q")[0] == 0
        raw = torch.load("kept.pth")["state_dict"]
        assert run("-o", "kept.pth", *BN, "-q", *options)[0] == 0
        made = torch.load("kept.pth")
        assert all(torch.equal(raw[name], made["state_dict"][name]) for name in raw)
        assert_statistics(made["state_dict_ema"])


def test_bn_of_a_torch_folder_in_place(folder: Path, run: Run) -> None:
    """A folder with pytorch_model.bin keeps its form, and its checksums are right."""
    checkpoints = saved_as_folders(folder, "pytorch_model.bin")
    assert run(*checkpoints, "-o", "kept", "--keep-wrapper", *BN)[0] == 0
    made = torch.load("kept/pytorch_model.bin")
    assert_statistics(made)
    assert run("-o", "kept", *BN, "--bn-batches", "2")[0] == 0
    again = torch.load("kept/pytorch_model.bin")
    changed = {name for name in made if not torch.equal(made[name], again[name])}
    assert changed == {name for name in made if name.endswith(("_mean", "_var", "_tracked"))}
    shown = json.loads(run("--show", "kept", "--json")[1])
    assert shown["batchnorm"]["batches"] == 2


def test_failed_bn_leaves_the_folder(folder: Path, run: Run) -> None:
    """Whatever fails, the folder is as it was, and nothing is beside it."""
    checkpoints = saved_as_folders(folder)
    assert run(*checkpoints, "-o", "swa", "-q")[0] == 0
    before, names = contents(folder), {path.name for path in folder.iterdir()}
    for data, says in (("mod:breaks", "batch 2"), ("mod:nothing", "no batch")):
        refused(run, "-o", "swa", "--recompute-bn", "--data", data, says=says)
        refused(run, *checkpoints, "-o", "new", "--recompute-bn", "--data", data, says=says)
        after = {name: data for name, data in contents(folder).items() if "pycache" not in name}
        assert after == before
        assert {path.name for path in folder.iterdir()} - {"__pycache__"} == names
    (folder / "swa/vocab.txt").symlink_to(folder / "mod.py")
    line = refused(run, "-o", "swa", *BN, says="contains links")
    assert "--start-from" in line and "-o" in line
    assert run("--start-from", "swa", "-o", "copied", *BN, "-q")[0] == 0
    assert_statistics(load_file("copied/model.safetensors"))


def test_models_without_bn_are_not_spoken_to_about_it(folder: Path, run: Run) -> None:
    """Neither the output of a run nor the record of its average says a word of BatchNorm."""
    for step in range(2):
        state = nn.Linear(3, 3).state_dict()
        (folder / f"step-{step}").mkdir()
        save_file(state, folder / f"step-{step}/model.safetensors")
        torch.save(state, f"step_{step}.pt")
    for inputs, output in ((("step-0", "step-1"), "avg"), (("step_0.pt", "step_1.pt"), "avg.pt")):
        code, out, err = run(*inputs, "-o", output, "-v")
        assert code == 0 and "BatchNorm" not in out + err
        assert "BatchNorm" not in run("--show", output)[1]
        assert json.loads(run("--show", output, "--json")[1])["batchnorm"] is None


def test_links_out_of_a_folder_are_not_followed_for_side_files(folder: Path, run: Run) -> None:
    """They are left out and said, also with the wrapper kept; the hub's cache is not one."""
    (folder / "secret").write_text("the password")
    (folder / "private").mkdir()
    (folder / "private/config.json").write_text("the password")
    checkpoints = saved_as_folders(folder)
    last = folder / checkpoints[-1]
    (last / "merges.txt").symlink_to("../secret")
    (last / "vocab.txt").symlink_to(folder / "secret")
    (last / "generation_config.json").symlink_to("config.json")
    (last / "notes.md").symlink_to("notes_of_the_model.md")
    (last / "notes_of_the_model.md").write_text("# notes")
    for options in ((), ("--keep-wrapper",)):
        code, _, err = run(*checkpoints, "-o", "avg", "--force", *options)
        assert code == 0
        assert "merges.txt, vocab.txt: links that lead out of the folder; not copied" in err
        names = {path.name for path in (folder / "avg").iterdir()}
        assert {"generation_config.json", "notes.md", "config.json"} <= names
        assert not names & {"merges.txt", "vocab.txt"}
        assert not any(b"password" in data for data in contents(folder / "avg").values())
        assert not any(path.is_symlink() for path in (folder / "avg").iterdir())


def test_links_of_the_hub_cache_are_followed(folder: Path, run: Run) -> None:
    """`snapshots/REVISION/FILE` is a link to `../../blobs/HASH`, of sub-folders one more up."""
    repository = folder / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    homes = []
    for number, source in enumerate(saved_as_folders(folder)):
        home = repository / "snapshots" / f"{number:040x}"
        homes.append(str(home.relative_to(folder)))
        (home / "additional_chat_templates").mkdir(parents=True)
        for path in (folder / source).iterdir():
            (repository / "blobs" / f"{number}{path.name}").write_bytes(path.read_bytes())
            (home / path.name).symlink_to(f"../../blobs/{number}{path.name}")
        (repository / "blobs" / "template").write_text("{{ messages }}")
        (home / "additional_chat_templates/rag.jinja").symlink_to("../../../blobs/template")
        (home / "README.md").symlink_to("../../refs/main")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("not of the snapshot")
    for options in ((), ("--keep-wrapper",)):
        code, _, err = run(*homes, "-o", "avg", "--force", *options)
        assert code == 0 and "README.md: a link that leads out of the folder; not copied" in err
        made = contents(folder / "avg")
        assert made["config.json"] == b'{"architectures": ["Small"]}'
        assert made["additional_chat_templates/rag.jinja"] == b"{{ messages }}"
        assert "README.md" not in made


def test_model_gets_its_extra_state_as_torch_load_gives_it(tmp_path: Path) -> None:
    """Tensors and streams in an extra state reach set_extra_state, and stay in the file."""
    (tmp_path / "mod.py").write_text(
        "import io, torch\n"
        "class Scaled(torch.nn.Linear):\n"
        "    def get_extra_state(self):\n"
        "        return {'scale': torch.full((2,), self.number), 'log': [io.BytesIO(b'a')]}\n"
        "    def set_extra_state(self, state):\n"
        "        assert state['log'][0].read() == b'a'\n"
        "        self.number = state['scale'][0].item()\n"
        "def model(number=0.0):\n"
        "    made = torch.nn.Sequential(Scaled(4, 4), torch.nn.BatchNorm1d(4))\n"
        "    made[0].number = number\n"
        "    return made\n"
        "loader = [torch.randn(8, 4) for _ in range(2)]\n"
        "def forward(made, batch):\n"
        "    assert made[0].number == 2.0\n"
        "    return made(batch)\n"
    )
    names: dict[str, Any] = {}
    exec((tmp_path / "mod.py").read_text(), names)
    for number in (1.0, 2.0):
        torch.save(names["model"](number).state_dict(), tmp_path / f"{number}.pt")
    arguments = ("1.0.pt", "2.0.pt", "-o", "x.pt", "--recompute-bn", "--data", "mod:loader")
    for ended in (ran(tmp_path, *arguments), ran(tmp_path, *arguments[2:])):
        assert ended.returncode == 0, ended.stderr
        found = torch.load(tmp_path / "x.pt", weights_only=False)
        assert found["0._extra_state"]["scale"].tolist() == [2, 2]
