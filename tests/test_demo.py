"""The demo: its data are the real ones, its run is honest, its folder is safe.

The run itself happens once, as the command that a user types; the tests read
what it printed and what it left behind.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import command
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from swa_avg import demo
from swa_avg.errors import OutputError


@dataclass(frozen=True)
class Run:
    folder: Path
    stdout: str
    accuracy: dict[str, float]
    difference: float


@pytest.fixture(scope="module")
def run(demo_run: tuple[Path, str]) -> Run:
    folder, stdout = demo_run
    rows = re.findall(r"^(\S.*?) +([0-9.]+) %$", stdout, flags=re.MULTILINE)
    difference = re.search(r"^largest difference.* (\S+)$", stdout, re.MULTILINE)
    assert difference is not None, stdout
    accuracy = {label: float(percent) for label, percent in rows}
    return Run(folder, stdout, accuracy, float(difference[1]))


def checkpoints(run: Run) -> list[dict[str, torch.Tensor]]:
    return [torch.load(run.folder / name, weights_only=True)["model"] for name in demo.CHECKPOINTS]


# The data.


def test_data_are_pinned_to_the_bit() -> None:
    """The pixels and labels are these bytes, whatever gzip does around them."""
    images, labels = demo.digits()
    raw = bytes((images * demo.BRIGHTEST).to(torch.uint8).flatten().tolist())
    raw += bytes(labels.tolist())
    assert hashlib.sha256(raw).hexdigest() == (
        "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
    )


def test_data_are_those_of_scikit_learn() -> None:
    """Every image and label is scikit-learn's, scaled to 0..1."""
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    images, labels = demo.digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (images[:, 0] * 16).tolist() == theirs.images.tolist()
    assert labels.tolist() == theirs.target.tolist()


def test_loader_gives_the_training_set_once_and_no_test_image() -> None:
    """An epoch is a permutation of the first 1,000 images; each loader repeats it."""
    images, _ = demo.digits()
    first, again = (torch.cat([batch[0] for batch in demo.loader()]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, images[:1000])
    assert sorted(first.flatten(1).tolist()) == sorted(images[:1000].flatten(1).tolist())


def test_demo_is_importable_without_numpy() -> None:
    """The data module gives its batches where numpy cannot be imported."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from swa_avg.demo import loader, model\n"
        "print(model()(next(iter(loader()))[0]).shape[0])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == f"{demo.BATCH}\n", ended.stderr


# The run.


def test_run_prints_the_commands_and_five_accuracies(run: Run) -> None:
    """Both commands are shown as typed, before the table of five."""
    assert f"\n$ {demo.AVERAGE}\n" in run.stdout
    assert f"\n$ {demo.RECOMPUTE}\n" in run.stdout
    assert len(run.accuracy) == 5, run.stdout


def test_average_equals_torchs_in_training_average(run: Run) -> None:
    """Our weights are AveragedModel's within the rounding of its running mean."""
    assert 0 < run.difference < 1e-6


def test_output_is_the_mean_of_exactly_the_saved_epochs(run: Run) -> None:
    """Every weight is the float64 mean of epochs 8 to 19, rounded to float32."""
    averaged = demo.load(run.folder / demo.OUTPUT)
    saved = checkpoints(run)
    assert len(saved) == len(list((run.folder / "ckpts").iterdir())) == 12
    for name, parameter in averaged.named_parameters():
        exact = torch.stack([state[name].double() for state in saved]).mean(dim=0)
        assert torch.equal(parameter, exact.float()), name


def test_recomputed_statistics_are_those_of_the_training_set(run: Run) -> None:
    """The first BN layer holds mean and variance of what it sees of all images."""
    network = demo.load(run.folder / demo.OUTPUT)
    assert isinstance(network, nn.Sequential)
    images, _ = demo.digits()
    with torch.inference_mode():
        seen = network[0](images[: demo.TRAINING_IMAGES]).double()
    for statistic, expected in [
        ("running_mean", seen.mean(dim=(0, 2, 3))),
        ("running_var", seen.var(dim=(0, 2, 3), correction=0)),
    ]:
        found = getattr(network[1], statistic).double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(found, checkpoints(run)[-1][f"1.{statistic}"].double())


def test_accuracies_tell_the_story_of_swa(run: Run) -> None:
    """Stale BN hurts the average, recomputing mends it; ours and torch's agree.

    The margins hold for every seed from 0 to 7, not just for the one that is
    used: on another machine the same seed trains another network.
    """
    last, stale, recomputed, torch_stale, torch_updated = run.accuracy.values()
    assert recomputed >= 95
    assert recomputed > stale
    assert recomputed >= last - 1
    assert stale == pytest.approx(torch_stale, abs=0.3)
    assert recomputed == pytest.approx(torch_updated, abs=0.6)


def test_sweep_finds_the_best_average_of_the_run(run: Run, demo_folder: Path) -> None:
    """The README's sweep: its output is as good on the test set as the best row says."""
    recompute = ["--recompute-bn", "--data", "swa_avg.demo:loader"]
    search = ["--sweep", "swa_avg.demo:evaluate", "--plot", "sweep.svg", "--json"]
    ended = command.run(demo_folder, "ckpts/epoch_*.pt", "-o", "best.pt", *recompute, *search)
    assert ended.returncode == 0, ended.stderr
    content = json.loads(ended.stdout)["search"]
    best = max(one["score"] for one in content["tried"])
    assert len(content["tried"]) == len(content["singles"]) == 12
    assert demo.accuracy(demo.load(demo_folder / "best.pt")) == best
    assert (
        best
        >= content["tried"][-1]["score"]
        == pytest.approx(run.accuracy["swa-avg, BatchNorm recomputed"], abs=0.3)
    )
    assert (demo_folder / "sweep.svg").read_text().startswith("<?xml")


# The folder.


def test_a_folder_of_the_demos_own_is_started_anew(tmp_path: Path) -> None:
    """An earlier run's files go, and the folder is ready for the next."""
    demo.prepare(tmp_path)
    for name in [demo.OUTPUT, *demo.CHECKPOINTS, *demo.BESIDE]:
        (tmp_path / name).write_text("an earlier run")
    demo.prepare(tmp_path)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left == sorted([demo.MARKER, *demo.BESIDE, "ckpts"])


@pytest.mark.parametrize(
    ("foreign", "earlier_demo"),
    [
        ("notes.txt", False),
        ("notes.txt", True),
        ("ckpts/epoch_20.pt", False),
        ("ckpts/epoch_20.pt", True),
        (demo.OUTPUT, False),
    ],
)
def test_nothing_of_the_users_is_deleted(tmp_path: Path, foreign: str, earlier_demo: bool) -> None:
    """A folder that the demo did not fill is refused, even if the names are its own."""
    if earlier_demo:
        demo.prepare(tmp_path)
    (tmp_path / "ckpts").mkdir(exist_ok=True)
    (tmp_path / "ckpts" / "epoch_8.pt").write_text("mine")
    (tmp_path / foreign).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="Name a new folder"):
        demo.prepare(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    demo.prepare(tmp_path / "new")
    assert (tmp_path / "new" / demo.MARKER).is_file()


def test_a_failing_command_is_one_line_and_exit_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo stops at the first command that fails and says which it was."""
    monkeypatch.setattr(demo, "train", lambda folder: None)
    result = CliRunner().invoke(demo.main, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: `{demo.AVERAGE}` ended with exit code ")
    assert result.stderr.count("\n") == 1
    assert demo.RECOMPUTE not in result.stdout
