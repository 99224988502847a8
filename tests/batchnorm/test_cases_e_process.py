"""CASES.md, part E: what the user's code does to the process, and to its own model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from command import run
from torch import nn
from users_module import NET, RECOMPUTE, data, done, failed, made, same

from swa_avg.batchnorm import recompute_batchnorm
from swa_avg.errors import DataError


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output where the user's code changes nothing."""
    folder = made(tmp_path_factory.mktemp("plain"))
    done(folder)
    return folder / "out.pt"


# --- the current folder -------------------------------------------------------------

ELSEWHERE = """
import os
os.makedirs("elsewhere/sub", exist_ok=True)
os.chdir("elsewhere")
def evaluate(model): return {"accuracy": float(model.conv.weight.mean())}
"""


def test_e_chdir_at_import_moves_no_output(tmp_path: Path, plain: Path) -> None:
    """Inputs, -o, --report, .py paths and --plot mean what they meant; messages show them."""
    made(tmp_path, ELSEWHERE)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/net.py").write_text("from mod import Net as net\n")
    (tmp_path / "elsewhere").mkdir()
    torch.save({"theirs": torch.zeros(1)}, tmp_path / "elsewhere/out.pt")
    (tmp_path / "elsewhere/report.json").write_text("theirs")
    before = (tmp_path / "elsewhere/out.pt").read_bytes()
    command = data("./mod.py:loader", "--model", "sub/net.py:net", "--report", "report.json")
    ended = run(tmp_path, *command)
    assert ended.returncode == 0, ended.stderr
    assert "wrote out.pt (" in ended.stdout
    assert "averaged 2 checkpoints: a.pt" in ended.stdout
    assert same(tmp_path / "out.pt", plain)
    assert json.loads((tmp_path / "report.json").read_text())["output"] == "out.pt"

    ended = run(tmp_path, "--recompute-bn", "--data", "mod:loader", "-o", "out.pt")
    assert ended.returncode == 0, ended.stderr
    assert same(tmp_path / "out.pt", plain)

    search = ("--recompute-bn", "--data", "mod:loader", "--report", "report.json", "--force")
    for option in ("--sweep", "--greedy"):
        ended = run(tmp_path, "a.pt", "b.pt", *search, option, "mod:evaluate", "-o", "best.pt")
        assert ended.returncode == 0, ended.stderr
        assert "wrote best.pt (" in ended.stdout
        (tmp_path / "best.pt").unlink()
    assert (tmp_path / "elsewhere/out.pt").read_bytes() == before
    assert (tmp_path / "elsewhere/report.json").read_text() == "theirs"
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {
        "out.pt", "report.json", "sub",
    }  # fmt: skip


# --- process-wide state -------------------------------------------------------------

STATE = """
import locale, os, signal, sys, warnings
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_flush_denormal(True)
torch.set_grad_enabled(False)
torch.autograd.set_detect_anomaly(True)
torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)
torch.manual_seed(5)
for name in ("de_DE.UTF-8", "C"):
    try:
        locale.setlocale(locale.LC_ALL, name)
        break
    except locale.Error: pass
os.umask(0o077)
os.environ["TMPDIR"] = "/nowhere"
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGPIPE"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
sys.path.clear()
sys.stdout = None
sys.argv = None
warnings.simplefilter("error")
class Net(Net):
    def __init__(self):
        with torch.device("cpu"):
            super().__init__()
        self.float()
model = Net
"""


def test_e_process_wide_state_changes_nothing_in_the_output(tmp_path: Path, plain: Path) -> None:
    """Default dtype and device, flush-to-zero, umask, handlers, streams, warnings and more."""
    made(tmp_path, STATE)
    os.umask(umask := os.umask(0o022))
    report = done(tmp_path)
    assert report["batchnorm"]["samples"] == 32
    assert same(tmp_path / "out.pt", plain)
    assert (tmp_path / "out.pt").stat().st_mode & 0o777 == 0o666 & ~umask


def test_e_small_values_survive_flush_to_zero(tmp_path: Path) -> None:
    """Statistics below the smallest normal float32 are those of the data."""
    made(
        tmp_path,
        "loader = [x * 1e-30 for x in loader]\n"
        "def model():\n"
        "    net = Net().double()\n"
        "    torch.set_flush_denormal(True)\n"
        "    return net\n"
        "def forward(model, batch): return model(batch.double())\n",
    )
    names: dict = {}
    exec(NET, names)
    for name in ("a.pt", "b.pt"):
        state = torch.load(tmp_path / name)
        state["conv.bias"].zero_()
        torch.save({key: value.double() for key, value in state.items()}, tmp_path / name)
    done(tmp_path)
    found = torch.load(tmp_path / "out.pt")
    model = names["Net"]().double()
    model.load_state_dict(found)
    seen = model.conv(torch.cat(names["loader"]).mul(1e-30).double()).detach()
    torch.testing.assert_close(found["bn.running_mean"], seen.mean((0, 2, 3)), rtol=1e-6, atol=0)


# --- whatever is raised -------------------------------------------------------------

RAISES = {
    "import": ("import sys\nsys.exit(0)\n", "mod:loader", "importing mod: SystemExit: 0"),
    "model": ("def model(): raise SystemExit\n", "mod:loader", "mod:model: SystemExit"),
    "data": (
        "class Module:\n"
        "    def train_dataloader(self): raise GeneratorExit\n",
        "mod:Module",
        "mod:Module: GeneratorExit",
    ),
    "loader": (
        "import asyncio\n"
        "def batches():\n    yield images(8)\n    raise asyncio.CancelledError\n",
        "mod:batches",
        "batch 1: CancelledError",
    ),
    "forward": (
        "def forward(model, batch): raise KeyboardInterrupt('mine')\n",
        "mod:loader",
        "batch 0: KeyboardInterrupt: mine",
    ),
    "an exception that cannot be shown": (
        "class Own(BaseException):\n    def __str__(self): raise SystemExit\n"
        "def forward(model, batch): raise Own\n",
        "mod:loader",
        "batch 0: Own; the call was forward(model, batch), where batch is float32[8,3,8,8].",
    ),
    "an attribute of the module that is computed": (
        "def __getattr__(name): raise SystemExit(0)\n",
        "mod:loader",
        "forward: SystemExit: 0",
    ),
    "a method of the model that no gate stands before": (
        "class Net(Net):\n    def named_modules(self, *a, **k): raise SystemExit(0)\nmodel = Net\n",
        "mod:loader",
        "error: SystemExit: 0.",
    ),
    "a method of the batch that no gate stands before": (
        "class Batch(dict):\n    def values(self): raise ValueError('mine')\n"
        "loader = [Batch(x=images(8))]\n",
        "mod:loader",
        "error: ValueError: mine.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("where", RAISES)
def test_e_any_base_exception_of_the_users_code_is_one_line(tmp_path: Path, where: str) -> None:
    """Exit code 1, nothing written."""
    module, spec, says = RAISES[where]
    assert says in failed(made(tmp_path, module), *data(spec))


def test_e_evaluate_that_exits_is_one_line(tmp_path: Path) -> None:
    """Also sys.exit(0) in the function that judges."""
    made(tmp_path, "def evaluate(model): raise SystemExit(0)\n")
    line = failed(tmp_path, "a.pt", "b.pt", "-o", "out.pt", "--sweep", "mod:evaluate")
    assert line == "error: evaluate of a.pt: SystemExit: 0."


def test_e_what_raises_at_exit_is_one_line_that_says_the_output_is_written(
    tmp_path: Path, plain: Path
) -> None:
    """Python would ignore it and end with 0; what else runs at exit still does."""
    made(
        tmp_path,
        "import atexit, sys\n"
        "from pathlib import Path\n"
        "atexit.register(Path('last').touch)\n"
        "atexit.register(sys.exit, 0)\n",
    )
    ended = run(tmp_path, *RECOMPUTE)
    assert ended.returncode == 1
    assert (
        ended.stderr == "error: a function that runs at exit: SystemExit: 0. out.pt is written.\n"
    )
    assert (tmp_path / "last").exists() and same(tmp_path / "out.pt", plain)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_e_a_real_signal_within_the_users_code_keeps_its_code(
    tmp_path: Path, name: str, code: int
) -> None:
    """Also where their code takes over the handler, or wraps the exception."""
    made(
        tmp_path,
        "import os, signal\n"
        f"signal.signal(signal.{name}, signal.SIG_IGN)\n"
        "def forward(model, batch):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        while True: pass\n"
        "    except BaseException as error:\n"
        "        raise RuntimeError('wrapped') from error\n",
    )
    ended = run(tmp_path, *RECOMPUTE)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out.pt").exists()


# --- a model that changes itself ----------------------------------------------------


class Net(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.conv, self.bn, self.change = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), change
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exec(self.change)
        return self.bn(self.conv(x))


CHANGES = {
    "self.eval()": "bn is in evaluation mode, expected training mode",
    "self.bn.eval()": "bn is in evaluation mode",
    "self.bn.training = False": "bn is in evaluation mode",
    "self.bn.momentum = 0.1": "bn has a new momentum",
    "self.bn.track_running_stats = False": "bn has a new momentum or track_running_stats",
    "self.bn.forward(self.conv(x))": "bn has counted 8 batches in 4 calls",
    "self.conv.weight.data.mul_(0.9)": "forward changes a weight, conv.weight",
    "self.bn.weight.add_(1)": "forward changes a weight, bn.weight",
    "self.conv.bias = nn.Parameter(self.conv.bias + 1)": "forward changes a weight, conv.bias",
}


@pytest.mark.parametrize("estimator", ["population", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_e_model_that_changes_itself_in_forward_is_refused(change: str, estimator: str) -> None:
    """By the name of the layer or weight; the model is then as it was."""
    if estimator == "torch" and "momentum" in change:
        change = "self.bn.momentum = 0.2"
    torch.manual_seed(0)
    model = Net(change)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with pytest.raises(DataError) as caught:
        recompute_batchnorm(model, [torch.randn(8, 3, 8, 8) for _ in range(4)], estimator=estimator)
    assert CHANGES.get(change, "bn has a new momentum") in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameters[name] is one for name, one in model.named_parameters())
    assert model.training and model.bn.training and model.bn.momentum is not None


def test_e_dropout_that_forward_turns_on_is_refused_by_the_population_estimator() -> None:
    """There it would be noise in the statistics; the other runs all in training mode."""
    batches = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    with pytest.raises(DataError, match=r"drop is in training mode after forward"):
        recompute_batchnorm(Net("self.drop.train()"), batches)
    recompute_batchnorm(Net("self.drop.train()"), batches, estimator="torch")


def test_e_model_that_leaves_training_mode_and_the_remedy(tmp_path: Path, plain: Path) -> None:
    """The command refuses; the forward of its own that the line names works."""
    made(
        tmp_path,
        "class Eval(Net):\n"
        "    def forward(self, x):\n"
        "        self.eval()\n"
        "        return super().forward(x)\n"
        "model = Eval\n",
    )
    line = failed(tmp_path)
    assert "forward changes a BatchNorm layer: bn is in evaluation mode" in line
    assert line.endswith("Use a forward(model, batch) that does not change the layers.")
    with (tmp_path / "mod.py").open("a") as file:
        file.write("def forward(model, batch): return Net.forward(model, batch)\n")
    done(tmp_path)
    assert same(tmp_path / "out.pt", plain)


def test_e_threads_and_deleted_files_of_the_users_code(tmp_path: Path, plain: Path) -> None:
    """A thread that changes the folder does not move the output; a lost output is an error."""
    made(
        tmp_path,
        "import os, threading\n"
        "from pathlib import Path\n"
        "def batches():\n"
        "    for number, batch in enumerate(loader):\n"
        "        thread = threading.Thread(target=os.chdir, args=('/',))\n"
        "        thread.start()\n"
        "        thread.join()\n"
        "        yield batch\n"
        "folder = Path.cwd()\n"
        "def deletes():\n"
        "    for path in folder.iterdir():\n"
        "        if path.suffix not in ('.py', '.pt') and path.is_file(): path.unlink()\n"
        "    yield from loader\n",
    )
    done(tmp_path, *data("mod:batches"))
    assert same(tmp_path / "out.pt", plain)
    (tmp_path / "out.pt").unlink()
    line = failed(tmp_path, *data("mod:deletes"))
    assert line.startswith("error: out.pt")
