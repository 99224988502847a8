"""The laws of `user_code` and `load_weights`: what is found, and what is said if not."""

import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from swa_avg.batchnorm.loading import batches_of
from swa_avg.batchnorm.userdata import Fit, load_weights, user_code
from swa_avg.errors import DataError

MODULE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = [torch.full((4, 3), float(i)) for i in range(3)]
loader = DataLoader(TensorDataset(torch.cat(X)), batch_size=4)

def make(): return X
def generate(): yield from X
def broken(): raise OSError("no such disk")
def needs(argument): return X
begun = generate()

class Module:
    calls = []
    def prepare_data(self): self.calls.append("prepare")
    def setup(self, stage): self.calls.append(stage)
    def train_dataloader(self): return X

class TwoLoaders:
    def train_dataloader(self): return {"a": loader, "b": loader}

class Namespace:
    inner = X

module = Module()
number = 5
net = nn.Linear(3, 2)
class Net(nn.Linear):
    def __init__(self): super().__init__(3, 2)
def model(): return net
def apply(model, batch): return model(batch)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a fresh module in the current folder."""
    name = f"swa_avg_test_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def first_values(batches: object) -> list[float]:
    return [float((b[0] if isinstance(b, list) else b).flatten()[0]) for b in batches]


# --- MOD:ATTR -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "attribute",
    ["X", "loader", "make", "generate", "Module", "module", "Namespace.inner"],
)
@pytest.mark.parametrize("as_path", [False, True])
def test_whatever_gives_batches_is_found(module: str, attribute: str, as_path: bool) -> None:
    """An iterable, a loader, a function, a generator, a DataModule; dotted or a file."""
    name = f"{module}.py" if as_path else module
    with user_code(f"{name}:{attribute}") as code:
        assert first_values(code.batches) == [0, 1, 2]
        assert isinstance(code.model, nn.Linear)
        assert code.forward is None


def test_a_data_module_is_prepared_then_set_up(module: str) -> None:
    """Its `prepare_data` is what only one process per machine may do."""
    jobs: list[Callable[[], object]] = []
    with user_code(f"{module}:Module", once=lambda job: jobs.append(job) or job()) as code:
        assert sys.modules[module].Module.calls == ["prepare", "fit"]
        assert first_values(code.batches) == [0, 1, 2]
    assert [job.__name__ for job in jobs] == ["prepare_data"]


def test_both_names_of_a_file_are_one_module(module: str) -> None:
    """The model of `mod` and the data of `mod.py` share their globals."""
    with user_code(f"{module}.py:X", model=f"{module}:net") as code:
        assert code.model is sys.modules[module].net


def test_a_file_is_found_beside_its_own_imports(module: str, tmp_path: Path) -> None:
    """The folder of a `.py` file is importable, and the current folder is as well."""
    folder = tmp_path / "else where"
    folder.mkdir()
    (folder / "beside.py").write_text("value = 4\n")
    (folder / "my-data.py").write_text(
        f"import beside, {module}\nmodel = {module}.model\ndata = [beside.value]\n"
    )
    with user_code("else where/my-data.py:data") as code:
        assert code.batches == [4]


@pytest.mark.parametrize("fails", [False, True])
def test_the_import_path_is_put_back(module: str, fails: bool) -> None:
    """Inside, code can still import what is beside it; afterwards all is as before."""
    before = list(sys.path)
    try:
        with user_code(f"{module}.py:X"):
            assert sys.path != before
            assert not fails or 1 / 0
    except ZeroDivisionError:
        pass
    assert sys.path == before


def test_defaults_and_choices_of_model_and_forward(module: str, tmp_path: Path) -> None:
    """`model` and `forward` of the data's module, unless others are named."""
    (tmp_path / f"{module}_more.py").write_text(
        f"from {module} import *\ndef forward(model, batch): return 'mine'\n"
    )
    with user_code(f"{module}_more:X") as code:
        assert code.forward(None, None) == "mine"
    with user_code(f"{module}_more:X", model=f"{module}:Net", forward=f"{module}:apply") as code:
        assert type(code.model).__name__ == "Net"
        assert code.forward.__name__ == "apply"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{m}", "names no attribute"),
        (":x", "names no attribute"),
        ("a.b", "expected MOD:ATTR, as in a:b"),
        ("{m}:", "names no attribute"),
        ("nowhere_at_all:x", "there is no module nowhere_at_all in the current folder"),
        ("nowhere.py:x", "there is no file"),
        ("{m}:lodaer", "has no attribute 'lodaer'. Did you mean loader?"),
        ("{m}:broken", "{m}:broken: OSError: no such disk"),
        ("{m}:needs", "{m}:needs needs arguments: argument, expected"),
        ("{m}:number", "{m}:number is of type int, expected an iterable of batches"),
        ("{m}:TwoLoaders", "{m}:TwoLoaders gives several loaders, expected one"),
        ("raising.py:x", "importing raising.py: ZeroDivisionError: division by zero"),
        ("exiting:x", "importing exiting: SystemExit: 3"),
        ("wanting:x", "importing wanting: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("unparsable:x", "importing unparsable: SyntaxError"),
        ("modelless:x", "the module of modelless:x has no `model`"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    module: str, tmp_path: Path, data: str, says: str
) -> None:
    """With the user's exception where there is one."""
    for name, text in {
        "raising": "1 / 0",
        "exiting": "raise SystemExit(3)",
        "wanting": "import nowhere_at_all",
        "unparsable": "def",
        "modelless": "x = []",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(DataError) as caught, user_code(data.format(m=module)):
        pass
    assert says.format(m=module) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "raising" not in sys.modules


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("model", "number", "is of type int, expected an nn.Module"),
        ("model", "broken", "OSError: no such disk"),
        ("model", "make", "is of type list, expected an nn.Module"),
        ("forward", "number", "is of type int, expected a function forward(model, batch)"),
    ],
)
def test_a_wrong_model_or_forward_is_named(module: str, option: str, value: str, says: str) -> None:
    """By its own MOD:ATTR."""
    spec = f"{module}:{value}"
    with pytest.raises(DataError) as caught, user_code(f"{module}:X", **{option: spec}):
        pass
    assert spec in str(caught.value)
    assert says in str(caught.value)


# --- datasets -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "batches"), [(1, [1]), (64, [64]), (129, [64, 64]), (130, [64, 64, 2])]
)
def test_a_dataset_gets_a_loader(size: int, batches: list[int]) -> None:
    """Shuffled, the same way each time, and no batch of one unless that is all there is."""
    dataset = TensorDataset(torch.arange(float(size)))
    loader = batches_of(dataset)
    assert isinstance(loader, DataLoader)
    values = [batch[0] for batch in loader]
    assert [len(v) for v in values] == batches
    again = torch.cat([batch[0] for batch in batches_of(dataset)])
    assert torch.equal(torch.cat(values), again)
    assert size == 1 or not torch.equal(again, again.sort().values)


class Stream(IterableDataset):
    def __iter__(self) -> object:
        return iter(torch.arange(70.0))


def test_a_stream_of_samples_is_batched_in_its_order() -> None:
    """An IterableDataset cannot be shuffled; a class is called first."""
    assert [len(b) for b in batches_of(Stream)] == [64, 6]
    assert torch.equal(torch.cat(list(batches_of(Stream()))), torch.arange(70.0))


@pytest.mark.parametrize("wrong", ["text", b"bytes", torch.zeros(3, 3), {"a": 1}, None, 5])
def test_iterables_that_hold_no_batches_are_refused(wrong: object) -> None:
    """Their items would be taken for batches."""
    with pytest.raises(DataError, match="expected an iterable of batches"):
        batches_of(wrong, "mod:x")


# --- weights ------------------------------------------------------------------------


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))


def wrapped() -> nn.Module:
    return nn.Sequential(OrderedDict(model=net()))


def filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for value in model.state_dict().values():
        value.copy_(torch.randn_like(value, dtype=torch.float) * 10)
    return model


@pytest.mark.parametrize(
    ("source", "target", "fit"),
    [
        (net, net, Fit()),
        (wrapped, net, Fit(dropped="model.")),
        (net, wrapped, Fit(added="model.")),
        (lambda: nn.DataParallel(wrapped()), net, Fit(dropped="module.model.")),
        (
            lambda: nn.BatchNorm2d(4),
            lambda: nn.DataParallel(nn.BatchNorm2d(4)),
            Fit(added="module."),
        ),
    ],
)
def test_a_prefix_of_all_keys_may_be_dropped(source: Callable, target: Callable, fit: Fit) -> None:
    """On either side; every value arrives, and keys translate both ways."""
    state, model = filled(source()).state_dict(), target()
    assert load_weights(model, state) == fit
    loaded = model.state_dict()
    assert {fit.in_state_dict(key) for key in loaded} == set(state)
    assert {fit.in_model(key) for key in state} == set(loaded)
    for key, value in state.items():
        assert torch.equal(loaded[fit.in_model(key)], value)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("versions", [True, False])
def test_checkpoints_older_than_num_batches_tracked_load(prefix: str, versions: bool) -> None:
    """It is the only key that may be missing, with or without the layers' versions."""
    old = filled(wrapped() if prefix else net()).state_dict()
    del old[f"{prefix}bn.num_batches_tracked"]
    model = net()
    load_weights(model, old if versions else dict(old))
    assert torch.equal(model.bn.running_var, old[f"{prefix}bn.running_var"])


def test_the_versions_of_layers_go_along() -> None:
    """`_metadata` is renamed with the keys: a layer sees the version it was saved with."""

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            self.loaded = metadata.get("version")
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    def make() -> nn.Module:
        return nn.Sequential(OrderedDict(inner=Versioned(2, 2)))

    for source, target in [(make(), make()), (nn.DataParallel(make()), make())]:
        load_weights(target, source.state_dict())
        assert target.inner.loaded == 7
    target = nn.DataParallel(make())
    load_weights(target, make().state_dict())
    assert target.module.inner.loaded == 7


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: s.pop("conv.bias"), "1 keys of the model are missing (conv.bias)"),
        (lambda s: s.update(extra=s["bn.bias"]), "1 keys are not in the model (extra)"),
        (
            lambda s: [s.update({f"x{i}": s["bn.bias"]}) for i in range(5)] + [s.pop("bn.weight")],
            "1 keys of the model are missing (bn.weight) and"
            " 5 keys are not in the model (x0, x1, x2 and 2 more)",
        ),
        (
            lambda s: s.update({"conv.weight": torch.zeros(5, 3, 1, 1)}),
            "shapes differ between the checkpoint and the model:"
            " conv.weight (5, 3, 1, 1) (model: (4, 3, 1, 1))",
        ),
        (
            lambda s: s.update({"conv.bias": "text"}),
            "loading the weights into the model: RuntimeError: Error(s) in loading state_dict for"
            ' Sequential: While copying the parameter named "conv.bias"',
        ),
    ],
)
def test_keys_that_do_not_fit_are_named(spoil: Callable, says: str) -> None:
    """The first few, and how many there are."""
    state = filled(net()).state_dict()
    spoil(state)
    with pytest.raises(DataError) as caught:
        load_weights(net(), state)
    assert says in str(caught.value)


def test_values_take_the_dtype_of_the_model() -> None:
    """A bfloat16 checkpoint goes into a float32 model."""
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in net().state_dict().items()}
    model = net()
    load_weights(model, state)
    assert model.conv.weight.dtype is torch.float32
    assert torch.equal(model.conv.weight.bfloat16(), state["conv.weight"])
