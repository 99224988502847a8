"""CASES.md, part D: the user's code, its batches, its errors and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import run
from users_module import RECOMPUTE, data, done, failed, made, same, told

import swa_avg

REMEDY = re.compile(r"(def forward\(model, batch\)): (return .*)\.$")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output over four batches of eight images."""
    folder = made(tmp_path_factory.mktemp("plain"))
    report = done(folder)
    assert (report["batchnorm"]["batches"], report["batchnorm"]["samples"]) == (4, 32)
    return folder / "out.pt"


# --- arguments ----------------------------------------------------------------------


def test_d_module_that_parses_arguments_at_import_sees_none_of_ours(
    tmp_path: Path, plain: Path
) -> None:
    """`sys.argv` is the module's own name alone, also when its functions are called."""
    made(
        tmp_path,
        "import argparse, sys\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--size', type=int, default=8)\n"
        "size = parser.parse_args().size\n"
        "def batches():\n"
        "    assert sys.argv == ['mod'], sys.argv\n"
        "    assert parser.parse_args().size == 8\n"
        "    return loader\n",
    )
    done(tmp_path, *data("mod:batches"))
    assert same(tmp_path / "out.pt", plain)


# --- batches that do not fit --------------------------------------------------------

MISFITS = {
    "path first": (
        "loader = [(['p'] * 8, x) for x in loader]\n",
        "call was model(batch[0]), where batch is tuple of (list of 8 str, float32[8,3,8,8])",
        "model(batch[1])",
    ),
    "None first": (
        "loader = [[None, x, torch.zeros(8)] for x in loader]\n",
        "list of (None, float32[8,3,8,8], float32[8])",
        "model(batch[1])",
    ),
    "columns the model does not know": (
        "class Named(Net):\n"
        "    def forward(self, pixels, mask=None): return super().forward(pixels)\n"
        "model = Named\n"
        "loader = [{'id': torch.arange(8), 'pixels': x, 'path': ['p'] * 8} for x in loader]\n",
        "call was model(**batch), where batch is dict with id: int64[8], pixels: float32[8,3,8,8],"
        " path: list of 8 str",
        "model(pixels=batch['pixels'])",
    ),
    "a mapping for a model of one input": (
        "loader = [{'image': x, 'label': torch.zeros(8)} for x in loader]\n",
        "model(**batch)",
        "model(batch['image'])",
    ),
    "targets needed": (
        "class Judged(Net):\n"
        "    def forward(self, x, targets): return super().forward(x)\n"
        "model = Judged\n"
        "loader = [(x, torch.zeros(8)) for x in loader]\n",
        "missing 1 required positional argument",
        "model(batch[0], batch[1])",
    ),
    "a mapping that the model takes whole": (
        "class Whole(Net):\n"
        "    def forward(self, features): return super().forward(features['x'])\n"
        "model = Whole\n"
        "loader = [{'x': x, 'y': torch.zeros(8)} for x in loader]\n",
        "model(**batch)",
        "model(batch)",
    ),
    "parts of parts": (
        "loader = [((x, torch.zeros(8)), ['p'] * 8) for x in loader]\n",
        "where batch is tuple of (tuple of (float32[8,3,8,8], float32[8]), list of 8 str)",
        "model(batch[0][0])",
    ),
    "an array of numpy": (
        "loader = [x.double().numpy() for x in loader]\n",
        "call was model(batch), where batch is ndarray",
        "model(torch.as_tensor(batch).float())",
    ),
    "arrays of numpy": (
        "loader = [(x.numpy(), [1] * 8) for x in loader]\n",
        "where batch is tuple of (ndarray, list of 8 int)",
        "model(torch.as_tensor(batch[0]))",
    ),
    "another precision": (
        "loader = [(x.double(), torch.zeros(8)) for x in loader]\n",
        "where batch is tuple of (float64[8,3,8,8], float32[8])",
        "model(batch[0].float())",
    ),
    "a loader of DALI": (
        "loader = [[{'data': x, 'label': torch.zeros(8)}] for x in loader]\n",
        "where batch is list of (dict with data: float32[8,3,8,8], label: float32[8])",
        "model(batch[0]['data'])",
    ),
    "a dataclass": (
        "import dataclasses\n"
        "@dataclasses.dataclass\n"
        "class Batch:\n"
        "    labels: torch.Tensor\n"
        "    pixels: torch.Tensor\n"
        "loader = [Batch(torch.zeros(8), x) for x in loader]\n",
        "call was model(batch), where batch is Batch",
        "model(batch.pixels)",
    ),
    "an object": (
        "class Graph:\n"
        "    def __init__(self, x): self.x = x\n"
        "loader = [Graph(x) for x in loader]\n",
        "call was model(batch), where batch is Graph",
        "model(batch.x)",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_d_batch_that_does_not_fit_forward(tmp_path: Path, plain: Path, case: str) -> None:
    """The line says what was called with what; the forward that it prints works."""
    module, says, call = MISFITS[case]
    made(tmp_path, module)
    line = failed(tmp_path)
    assert line.startswith("error: batch 0: ") and says in line, line
    found = REMEDY.search(line)
    assert found and found[2] == f"return {call}", line
    with (tmp_path / "mod.py").open("a") as file:
        file.write(f"{found[1]}:\n    {found[2]}\n")
    report = done(tmp_path)
    assert report["batchnorm"]["batches"] == 4
    assert same(tmp_path / "out.pt", plain)


def test_d_batch_for_which_no_call_works_gets_no_remedy(tmp_path: Path) -> None:
    """A remedy is printed only if it runs."""
    line = failed(made(tmp_path, "loader = [(['p'] * 8, torch.zeros(8, 5)) for x in loader]\n"))
    assert "tuple of (list of 8 str, float32[8,5])" in line
    assert "def forward" not in line


def test_d_packed_sequence_is_one_input(tmp_path: Path) -> None:
    """It is a tuple of the parts of one input: an LSTM would run over its parts, too."""
    from torch import nn
    from torch.nn.utils.rnn import pack_sequence

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.norm = nn.LSTM(3, 4), nn.BatchNorm1d(4)

        def forward(self, packed):
            return self.norm(self.lstm(packed)[0].data)

    torch.manual_seed(0)
    model = Net()
    batches = [pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]) for _ in range(3)]
    report = swa_avg.recompute_batchnorm(model, batches)
    assert (report.batches, report.samples) == (3, 6)
    seen = torch.cat([model.lstm(packed)[0].data for packed in batches])
    torch.testing.assert_close(model.norm.running_mean, seen.mean(0))
    # Beside targets it is the input as any other.
    swa_avg.recompute_batchnorm(model, [(packed, torch.zeros(2)) for packed in batches])
    torch.testing.assert_close(model.norm.running_mean, seen.mean(0))


# --- names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "wanted", "says"),
    [
        ("val_loader = train_loader = loader\ndel loader\n", "loader", "mean train_loader?"),
        ("from torch.utils.data import DataLoader\n", "lodaer", "Did you mean loader?"),
        ("del loader\n", "loader", "'loader'."),
        ("import torch.utils.data as dataloader\ndel loader\n", "dataloder", "'dataloder'."),
    ],
)
def test_d_suggested_names_are_never_dunder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, wanted: str, says: str
) -> None:
    """A loader for training comes first; modules, imported classes and dunders never."""
    from swa_avg.batchnorm.isolation import importable
    from swa_avg.batchnorm.named import load_attribute
    from swa_avg.errors import DataError

    made(tmp_path, module)
    monkeypatch.delitem(sys.modules, "mod", raising=False)
    with importable(tmp_path), pytest.raises(DataError) as caught:
        load_attribute(f"mod:{wanted}", tmp_path)
    assert str(caught.value).endswith(says)


# --- datasets and loaders -----------------------------------------------------------


@pytest.mark.frameworks
def test_d_webdataset_loaders_are_never_batched_twice(tmp_path: Path, plain: Path) -> None:
    """A WebLoader is taken as it is, however it batches; a WebDataset of samples is batched."""
    webdataset = pytest.importorskip("webdataset")
    made(
        tmp_path,
        "import webdataset as wds\n"
        "def samples():\n"
        "    tar = wds.WebDataset('data.tar', shardshuffle=False)\n"
        "    return tar.decode().to_tuple('x.pth', 'cls')\n"
        "def batched(): return wds.WebLoader(samples().batched(8), batch_size=None)\n"
        "def collated(): return wds.WebLoader(samples(), batch_size=8)\n"
        "def batches(): return samples().batched(8)\n",
    )
    names: dict = {}
    exec((tmp_path / "mod.py").read_text().partition("import webdataset")[0], names)
    with webdataset.TarWriter(str(tmp_path / "data.tar")) as tar:
        for number, image in enumerate(torch.cat(names["loader"])):
            tar.write({"__key__": f"{number:03d}", "x.pth": image.clone(), "cls": number % 4})
    for attribute, batches in (("batched", 4), ("collated", 4), ("samples", 1)):
        report = done(tmp_path, *data(f"mod:{attribute}", "--force"))["batchnorm"]
        assert (report["batches"], report["samples"]) == (batches, 32), attribute
        if batches == 4:
            assert same(tmp_path / "out.pt", plain)
    (tmp_path / "out.pt").unlink()
    line = failed(tmp_path, *data("mod:batches"))
    assert "its items may be samples or batches" in line and "[8,3,8,8]" in line


def test_d_stream_of_batches_is_refused_and_both_remedies_work(tmp_path: Path, plain: Path) -> None:
    """A bare IterableDataset of tensors may yield either; a DataLoader of it says which."""
    made(
        tmp_path,
        "from torch.utils.data import DataLoader, IterableDataset\n"
        "class Stream(IterableDataset):\n"
        "    def __iter__(self): return iter([(x, torch.zeros(8)) for x in batches])\n"
        "class Images(IterableDataset):\n"
        "    def __iter__(self): return iter(torch.cat(batches))\n"
        "class Labelled(IterableDataset):\n"
        "    def __iter__(self): return ((x, 1) for x in torch.cat(batches))\n"
        "batches, loader = loader, Stream()\n"
        "images, labelled = Images(), Labelled()\n"
        "as_batches = DataLoader(Stream(), batch_size=None)\n"
        "as_samples = DataLoader(Images(), batch_size=8)\n"
        "unbatched = DataLoader(Labelled(), batch_size=None)\n"
        "weighted = DataLoader([(x, 0.5) for x in batches], batch_size=None)\n"
        "def iterated(): return iter(weighted)\n",
    )
    for attribute, item in (("loader", "tuple of (float32[8,3,8,8], float32[8])"),
                            ("images", "float32[3,8,8]")):  # fmt: skip
        line = failed(tmp_path, *data(f"mod:{attribute}"))
        assert f"the first is {item}. Use DataLoader(dataset, batch_size=None)" in line
    line = failed(tmp_path, *data("mod:unbatched"))
    assert "yields single samples, list of (float32[3,8,8], int), expected batches" in line
    assert "name a function that returns iter() of it" in failed(tmp_path, *data("mod:weighted"))
    ways = (("as_batches", 4), ("as_samples", 4), ("iterated", 4), ("labelled", 1))
    for attribute, batches in ways:
        report = done(tmp_path, *data(f"mod:{attribute}", "--force"))["batchnorm"]
        assert (report["batches"], report["samples"]) == (batches, 32), attribute
        assert batches == 1 or same(tmp_path / "out.pt", plain)


@pytest.mark.frameworks
def test_d_hugging_face_datasets_are_batched_once(tmp_path: Path) -> None:
    """Rows of a Dataset become batches of tensors, rows of a stream too; batches stay."""
    pytest.importorskip("datasets")
    made(
        tmp_path,
        "import datasets\n"
        "pixels = torch.cat(loader)\n"
        "rows = datasets.Dataset.from_dict({'x': pixels.tolist(), 'label': [*range(32)]})\n"
        "stream = rows.to_iterable_dataset()\n"
        "chosen = rows.with_format('torch', columns=['x', 'label'])\n"
        "batches = stream.with_format('torch').batch(8)\n"
        "def forward(model, batch): return model(batch['x'])\n",
    )
    for attribute in ("rows", "stream", "chosen"):
        report = done(tmp_path, *data(f"mod:{attribute}", "--force"))["batchnorm"]
        assert (report["batches"], report["samples"]) == (1, 32), attribute
    (tmp_path / "out.pt").unlink()
    assert "samples or batches" in failed(tmp_path, *data("mod:batches"))


@pytest.mark.parametrize("several", ["[loader, loader]", "{'a': loader, 'b': loader}"])
def test_d_several_loaders_are_refused_and_one_of_them_works(
    tmp_path: Path, plain: Path, several: str
) -> None:
    """A DataModule may give a list or a mapping of loaders; a function gives one of them."""
    made(
        tmp_path,
        "from torch.utils.data import DataLoader\n"
        "loader = DataLoader(torch.cat(loader), batch_size=8)\n"
        "class Module:\n"
        f"    def train_dataloader(self): return {several}\n"
        "def first(): return loader\n"
        "class Alone:\n"
        "    def train_dataloader(self): return [loader]\n",
    )
    assert "mod:Module gives several loaders, expected one" in failed(tmp_path, *data("mod:Module"))
    for attribute in ("first", "Alone"):
        done(tmp_path, *data(f"mod:{attribute}", "--force"))
        assert same(tmp_path / "out.pt", plain)


def test_d_module_named_like_one_of_python_or_of_ours(tmp_path: Path, plain: Path) -> None:
    """The file in the current folder is meant."""
    made(tmp_path)
    for name in ("random", "swa_avg"):
        (tmp_path / f"{name}.py").write_text("from mod import *\n")
        script = Path(sys.executable).parent / "swa-avg"
        command = [str(script), *data(f"{name}:loader", "--force", "--json")]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        assert same(tmp_path / "out.pt", plain)


# --- errors -------------------------------------------------------------------------

RAISING = {
    "import": ("from one import value\n", "importing mod: ZeroDivisionError: division by zero"),
    "model": ("def model():\n    from one import value\n", "mod:model: ZeroDivisionError"),
    "loader": ("def loader():\n    yield images(8)\n    from one import value\n", "batch 1: Zero"),
    "forward": ("def forward(model, batch):\n    from one import value\n", "batch 0: ZeroDiv"),
    "evaluate": (
        "def evaluate(model):\n    from one import value\n",
        "evaluate of a.pt: ZeroDivisionError",
    ),
}


@pytest.mark.parametrize("where", RAISING)
def test_d_traceback_of_the_users_frames_with_v(tmp_path: Path, where: str) -> None:
    """The user's code raises four imports deep: with -v their frames are shown, ours are not."""
    module, says = RAISING[where]
    made(
        tmp_path,
        module,
        one="from two import value\n",
        two="from three import value\n",
        three="value = 1 / 0  # four deep\n",
    )
    arguments = RECOMPUTE
    if where == "evaluate":
        arguments = ("a.pt", "b.pt", "-o", "out.pt", "--sweep", "mod:evaluate", "--mode", "max")
    lines = told(tmp_path, *arguments).stderr.splitlines()
    assert lines[-1].startswith("error: ") and says in lines[-1]
    assert lines[0] == "Traceback (most recent call last):"
    frames = [line for line in lines if line.startswith("  File ")]
    files = [Path(line.split('"')[1]).name for line in frames]
    assert files == ["mod.py", "one.py", "two.py", "three.py"]
    assert "    value = 1 / 0  # four deep" in lines
    assert lines[-2].endswith("ZeroDivisionError: division by zero")


def test_d_syntax_error_and_failing_worker_with_v(tmp_path: Path) -> None:
    """The line that does not parse is shown; so are the frames of a DataLoader worker."""
    made(tmp_path, "def broken(:\n    pass\n")
    lines = told(tmp_path).stderr.splitlines()
    assert "    def broken(:" in lines
    assert lines[-1].startswith("error: importing mod: SyntaxError: ")
    assert failed(tmp_path) == lines[-1]  # without -v: this line alone

    made(
        tmp_path,
        "from torch.utils.data import DataLoader, Dataset\n"
        "class Data(Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, number): raise OSError('no such image')\n"
        "loader = DataLoader(Data(), batch_size=2, num_workers=1)\n",
    )
    ended = told(tmp_path)
    assert "__getitem__" in ended.stderr
    assert ended.stderr.splitlines()[-1] == "error: batch 0: OSError: no such image."


# --- what the user's code prints ----------------------------------------------------

PRINTS = """
import atexit, os, subprocess, sys
print("at import")
atexit.register(print, "at exit")
def forward(model, batch):
    print("python")
    subprocess.run(["echo", "program"])
    os.write(1, b"descriptor\\n")
    sys.__stdout__.write("stream\\n")
    return model(batch)
class Closed:
    def write(self, text): raise ValueError("closed")
    flush = isatty = fileno = write
def silent(model, batch): return model(batch)
def break_streams(): sys.stdout = sys.stderr = Closed(); return loader
"""


def test_d_prints_of_the_user_go_to_stderr_and_q_keeps_them_out(
    tmp_path: Path, plain: Path
) -> None:
    """Under --json stdout is JSON, whoever printed; -q shows none of it."""
    made(tmp_path, PRINTS)
    ended = run(tmp_path, *RECOMPUTE, "--json")
    assert json.loads(ended.stdout)["batchnorm"]["batches"] == 4
    for text in ("at import", "python", "program", "descriptor", "stream", "at exit"):
        assert text in ended.stderr.splitlines(), ended.stderr
    ended = run(tmp_path, *RECOMPUTE, "-q", "--force")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    ended = run(
        tmp_path, *data("mod:break_streams", "--forward", "mod:silent", "--json", "--force")
    )
    assert ended.returncode == 0 and json.loads(ended.stdout)["batchnorm"]["samples"] == 32
    assert same(tmp_path / "out.pt", plain)


# --- how many samples ---------------------------------------------------------------


def test_d_number_of_samples_is_right_or_not_shown(tmp_path: Path) -> None:
    """Graphs are counted by the batch itself; lists of images and targets by the lists."""
    made(
        tmp_path,
        "class Graphs:\n"
        "    def __init__(self, x): self.x, self.num_graphs = x, 2\n"
        "class Bag:\n"
        "    def __init__(self, x): self.x = x\n"
        "graphs = [Graphs(x) for x in loader]\n"
        "bags = [Bag(x) for x in loader]\n"
        "detection = [([*x], [{'boxes': torch.zeros(n, 4)} for n in range(8)]) for x in loader]\n"
        "def forward(model, batch):\n"
        "    return model(torch.stack(batch[0]) if isinstance(batch, tuple) else batch.x)\n",
    )
    for attribute, samples in (("graphs", 8), ("bags", None), ("detection", 32)):
        ended = run(tmp_path, *data(f"mod:{attribute}", "--force", "--report", "report.json"))
        assert ended.returncode == 0, ended.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["batchnorm"]["samples"] == samples
        shown = re.search(r"over 4 batches( \((\d+) samples\))?$", ended.stdout, re.MULTILINE)
        assert shown and shown[2] == (samples and str(samples))
