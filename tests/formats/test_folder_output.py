"""The laws of a Hugging Face folder as output: what `save_pretrained` would have written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import swa_avg
from swa_avg.errors import OutputError

SIZE = 100  # elements of each tensor


def folder(path: Path, seed: int, names: str = "abcdef", shards: int = 1) -> Path:
    """Write a folder as save_pretrained does, with the small files of a model."""
    path.mkdir()
    generator = torch.Generator().manual_seed(seed)
    state = {f"layer.{name}": torch.randn(SIZE, generator=generator) for name in names}
    if shards == 1:
        save_file(state, path / "model.safetensors", {"format": "pt"})
    else:
        weight_map = {}
        for number in range(shards):
            name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
            part = {key: state[key] for key in list(state)[number::shards]}
            save_file(part, path / name, {"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 4 * SIZE * len(names)}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "none"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": seed * 10}))
    (path / "optimizer.pt").write_bytes(b"not to be copied")
    return path


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Read a folder as transformers does: by its index, or its only file."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return load_file(path / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    parts = {name: load_file(path / name) for name in set(weight_map.values())}
    assert sum(map(len, parts.values())) == len(weight_map)
    return {key: parts[name][key] for key, name in weight_map.items()}


def mean(paths: list[Path]) -> dict[str, torch.Tensor]:
    states = [loaded(path) for path in paths]
    return {
        key: torch.stack([state[key].double() for state in states]).mean(0).float()
        for key in states[0]
    }


@pytest.mark.parametrize(("limit", "files"), [(None, 1), (2 * 4 * SIZE, 3), (1, 6)])
def test_folder_in_folder_out(tmp_path: Path, limit: int | None, files: int) -> None:
    """Folders give a folder: the mean in so many shards, and the small files of the last."""
    paths = [folder(tmp_path / f"checkpoint-{seed}", seed, shards=seed) for seed in (1, 2, 3)]
    output = tmp_path / "averaged"
    swa_avg.average(paths, output, max_shard_size=limit)
    expected = mean(paths)
    made = loaded(output)
    assert made.keys() == expected.keys()
    for name, value in made.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=0)
    index = {"model.safetensors.index.json"} if files > 1 else set()
    beside = {"config.json", "tokenizer.json", "swa_avg.json"} | index
    assert {path.name for path in output.iterdir() if path.suffix == ".json"} == beside
    assert len(list(output.glob("*.safetensors"))) == files
    assert not list(output.glob("optimizer*"))
    # Our own reader takes it as a checkpoint again, and averages it with the others.
    swa_avg.average([], tmp_path / "again", start_from=output)
    for path in output.iterdir():
        if path.suffix == ".safetensors" and files == 1:
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_output_form_follows_its_name(tmp_path: Path) -> None:
    """A suffix decides; without one the output has the form of the inputs."""
    paths = [folder(tmp_path / f"checkpoint-{seed}", seed) for seed in (1, 2)]
    swa_avg.average(paths, tmp_path / "swa.pt")
    swa_avg.average(paths, tmp_path / "swa.safetensors")
    swa_avg.average(paths, tmp_path / "llama-3.1")
    swa_avg.average([], tmp_path / "bare", start_from=tmp_path / "swa.safetensors")
    expected = loaded(tmp_path / "llama-3.1")
    for made in (
        torch.load(tmp_path / "swa.pt"),
        load_file(tmp_path / "swa.safetensors"),
        load_file(tmp_path / "bare"),
    ):
        assert all(torch.equal(made[name], expected[name]) for name in expected)


def test_existing_folders(tmp_path: Path) -> None:
    """A folder is replaced with force only, an input never, and nothing is left beside it."""
    paths = [folder(tmp_path / f"checkpoint-{seed}", seed) for seed in (1, 2)]
    output = tmp_path / "swa"
    swa_avg.average(paths[:1], output)
    with pytest.raises(OutputError, match="exists already"):
        swa_avg.average(paths, output)
    with pytest.raises(OutputError, match="one of the inputs"):
        swa_avg.average(paths, paths[0], force=True)
    swa_avg.average(paths, output, force=True, max_shard_size=1)
    swa_avg.average(paths, output, force=True)
    assert len(list(output.glob("*.safetensors"))) == 1
    torch.testing.assert_close(loaded(output), mean(paths))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "swa"}


@pytest.mark.parametrize("dear", ["thesis.tex", ".git/HEAD", "optimizer.bin", "runs/model.bin"])
def test_nothing_dear_is_lost(tmp_path: Path, dear: str) -> None:
    """A folder with more than weights in it is not ours to replace, force or not."""
    paths = [folder(tmp_path / f"checkpoint-{seed}", seed) for seed in (1, 2)]
    swa_avg.average(paths, tmp_path / "home")
    (tmp_path / "home" / dear).parent.mkdir(exist_ok=True)
    (tmp_path / "home" / dear).write_text("years of work")
    with pytest.raises(OutputError, match="would be lost"):
        swa_avg.average(paths, tmp_path / "home", force=True)
    assert (tmp_path / "home" / dear).read_text() == "years of work"


def test_folder_around_the_inputs_is_never_replaced(tmp_path: Path) -> None:
    """Trainer's output folder holds the final model and, beneath it, the checkpoints."""
    output = folder(tmp_path / "out", 9)
    paths = [folder(output / f"checkpoint-{seed}", seed) for seed in (1, 2)]
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for wrapped in (False, True):
        with pytest.raises(OutputError, match="contains one of the inputs"):
            swa_avg.average(paths, output, force=True, keep_wrapper=wrapped)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_failed_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the new folder cannot take the name, the old one has it again."""
    paths = [folder(tmp_path / f"checkpoint-{seed}", seed) for seed in (1, 2)]
    swa_avg.average(paths[:1], tmp_path / "swa")
    before = (tmp_path / "swa" / "model.safetensors").read_bytes()
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError, match="Input/output error"):
        swa_avg.average(paths, tmp_path / "swa", force=True)
    assert (tmp_path / "swa" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "swa"}


def test_links_in_a_folder_that_is_kept(tmp_path: Path) -> None:
    """Two names of one small file are copied both; weights under two names are refused."""
    one, two = (folder(tmp_path / f"checkpoint-{seed}", seed) for seed in (1, 2))
    (two / "generation_config.json").symlink_to(two / "config.json")
    swa_avg.average([one, two], tmp_path / "swa", keep_wrapper=True)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "swa" / name).read_text() == (two / name).read_text()
    (two / "zlink.safetensors").symlink_to(two / "model.safetensors")
    with pytest.raises(OutputError, match="two names"):
        swa_avg.average([one, two], tmp_path / "other", keep_wrapper=True)


def test_ties_in_shards_are_found_again(tmp_path: Path) -> None:
    """Names tied in the inputs are tied in a sharded output, for our own reader too."""
    for seed in (1, 2):
        folder(tmp_path / f"checkpoint-{seed}", seed, names="ab")
        state = load_file(tmp_path / f"checkpoint-{seed}" / "model.safetensors")
        alias = {"format": "pt", "tied": "layer.a"}
        save_file(state, tmp_path / f"checkpoint-{seed}" / "model.safetensors", alias)
    swa_avg.average(tmp_path / "checkpoint-?", tmp_path / "swa", max_shard_size=1)
    with swa_avg.open_checkpoint(tmp_path / "swa") as made:
        assert sorted(made.names) == ["layer.a", "layer.b", "tied"]
        assert torch.equal(made.read("tied"), made.read("layer.a"))
        assert not made.notes


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    """A number that has no mean: an error, and neither a folder nor a temporary one."""
    paths = [folder(tmp_path / f"checkpoint-{seed}", seed, shards=2) for seed in (1, 2)]
    broken = load_file(paths[0] / "model-00001-of-00002.safetensors")
    next(iter(broken.values()))[3] = float("nan")
    save_file(broken, paths[0] / "model-00001-of-00002.safetensors")
    with pytest.raises(swa_avg.SwaAvgError, match="nan"):
        swa_avg.average(paths, tmp_path / "swa")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_large_files_beside_the_weights_are_not_copied(tmp_path: Path) -> None:
    """Small files come along; what is no small file for its size stays where it is."""
    source = tmp_path / "in"
    source.mkdir()
    save_file({"a": torch.ones(3)}, source / "model.safetensors")
    for name, size in (("config.json", 100_000_000), ("vocab.txt", 100_000_001)):
        (source / name).touch()
        with (source / name).open("r+b") as file:
            file.truncate(size)
    swa_avg.average(source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "config.json" in names and "vocab.txt" not in names
