"""The laws of `recompute_batchnorm`: what it computes, and that it leaves no trace."""

import json
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import count

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset

from swa_avg import Progress
from swa_avg.batchnorm.statistics import recompute_batchnorm, recomputed_buffers
from swa_avg.errors import DataError, SwaAvgError

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def network(dims: int = 2, momentum: float | None = 0.1) -> nn.Sequential:
    """Two BatchNorm layers with dropout between; weights and statistics at random."""
    torch.manual_seed(dims)
    layers = [
        CONV[dims](3, 6, 3),
        NORM[dims](6, momentum=momentum),
        nn.ReLU(),
        nn.Dropout(0.5),
        CONV[dims](6, 4, 1),
        NORM[dims](4, momentum=momentum, affine=False),
    ]
    net = nn.Sequential(*layers)
    for layer in norms(net):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
        layer.num_batches_tracked.fill_(17)
    return net


def data(*sizes: int, dims: int = 2, mean: float = 0.5, std: float = 2.0) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, 3, *[5] * dims) * std + mean for n in sizes]


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@contextmanager
def inputs_of(model: nn.Module) -> Iterator[dict[nn.Module, list[Tensor]]]:
    """Collect what each BatchNorm layer sees, as [channels, values] in float64."""
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in norms(model)}

    def collect(layer: nn.Module, args: tuple[Tensor]) -> None:
        seen[layer].append(args[0].detach().double().transpose(0, 1).flatten(1))

    hooks = [layer.register_forward_pre_hook(collect) for layer in seen]
    yield seen
    for hook in hooks:
        hook.remove()


def two_pass(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and population variance per channel: first the one, then the other."""
    values = torch.cat(parts, 1)
    mean = values.sum(1) / values.shape[1]
    return mean, (values - mean[:, None]).square().sum(1) / values.shape[1]


def assert_population(model: nn.Module, batches: list[Tensor], tolerance: float) -> None:
    """Statistics are those of what the layers saw: means to a share of the larger of
    their size and the standard deviation, variances to a share of themselves."""
    with inputs_of(model) as seen:
        recompute_batchnorm(model, batches, device="cpu")
    for layer, parts in seen.items():
        mean, var = two_pass(parts)
        size = torch.maximum(mean.abs(), var.sqrt())
        assert ((layer.running_mean.double() - mean).abs() / size).max() <= tolerance
        assert ((layer.running_var.double() - var).abs() / var).max() <= tolerance


def trace(model: nn.Module) -> dict[str, object]:
    """All that a failed run could leave behind: tensors by identity and bits, and flags."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        state[name] = (
            module.training,
            getattr(module, "momentum", None),
            len(module._forward_pre_hooks) + len(module._forward_hooks),
            sorted(vars(module)),
            {key: (id(t), None if t is None else t.tolist()) for key, t in tensors.items()},
        )
    return state


# --- the population estimator -------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_population_is_the_two_pass_mean_and_variance(dims: int, momentum: float | None) -> None:
    """In float32 to 1e-6, for batches of different sizes."""
    assert_population(network(dims, momentum), data(5, 7, 2, dims=dims), 1e-6)


def test_population_in_float64_is_exact() -> None:
    """In float64 to 1e-13: nothing on the way is narrower."""
    assert_population(network().double(), [b.double() for b in data(5, 7, 2)], 1e-13)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ratio", [1, 30, 1e3, 1e4])
@pytest.mark.parametrize("std", [1e-3, 1.0, 1e3])
def test_steep_data_keep_their_variance(
    ratio: float, std: float, memory: torch.memory_format
) -> None:
    """Up to mean/std 1e4 the relative error is at most 1e-5, also where the batch means
    differ more than the values within a batch."""
    torch.manual_seed(0)
    steps = [0.0, 3.0, -2.0, 1.0]
    batches = [
        ((torch.randn(4, 3, 4, 4) + ratio + step) * std).contiguous(memory_format=memory)
        for step in steps
    ]
    assert_population(nn.Sequential(nn.BatchNorm2d(3)), batches, 1e-5)


def test_batches_count_by_their_elements() -> None:
    """64 zeros, then 2 tens: the mean is 20/66, where equal weights would give 5."""
    model = nn.Sequential(nn.BatchNorm1d(1))
    recompute_batchnorm(model, [torch.zeros(64, 1), torch.full((2, 1), 10.0)])
    assert model[0].running_mean.item() == pytest.approx(20 / 66, rel=1e-7)
    assert model[0].running_var.item() == pytest.approx(200 / 66 - (20 / 66) ** 2, rel=1e-7)
    assert model[0].num_batches_tracked.item() == 2


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 23), max_size=6),
    mean=st.floats(-20, 20),
    std=st.floats(0.1, 10),
    channels_last=st.booleans(),
)
def test_splitting_does_not_matter_to_the_first_layer(
    cuts: set[int], mean: float, std: float, channels_last: bool
) -> None:
    """However the same samples are cut into batches: each mean is right to 1e-6 of a standard
    deviation and its rounding to float32, each variance to 1e-6 and what the means add to it."""
    torch.manual_seed(0)
    samples = torch.randn(48, 3, 3, 3) * std + mean
    if channels_last:
        samples = samples.contiguous(memory_format=torch.channels_last)
    whole, split = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    recompute_batchnorm(whole, [samples])
    recompute_batchnorm(split, samples.tensor_split(sorted(2 * cut for cut in cuts)))
    std_seen = whole.running_var.sqrt()
    limit = 2e-6 + whole.running_mean.abs() / std_seen * 2**-23
    assert ((whole.running_mean - split.running_mean).abs() / std_seen <= limit).all()
    assert torch.allclose(whole.running_var, split.running_var, rtol=3e-6, atol=0)


def test_large_batch_after_a_small_one_is_as_accurate() -> None:
    """A layer whose float32 moments are right for 18 values adds up float64 for 400,000, if it
    must: the mean is right to 1e-6 of a standard deviation and the rounding to float32."""
    torch.manual_seed(0)
    samples = (torch.randn(5002, 3, 9, 9) + 1).contiguous(memory_format=torch.channels_last)
    layer = nn.BatchNorm2d(3)
    recompute_batchnorm(layer, [samples[:2], samples[2:]])
    exact = samples.double().mean((0, 2, 3))
    assert ((layer.running_mean - exact).abs() <= 1e-6 + 2**-23).all()


def test_everything_else_is_in_eval_mode() -> None:
    """Dropout is off: the second layer sees the same as in a network without dropout."""
    model, without = network(), network()
    without[3] = nn.Identity()
    recompute_batchnorm(model.train(), data(5, 7))
    recompute_batchnorm(without.train(), data(5, 7))
    assert torch.equal(model[5].running_var, without[5].running_var)


def test_batches_of_ever_new_shapes_are_weighted_right() -> None:
    """A hundred sizes, each once: more than are remembered."""
    assert_population(nn.Sequential(nn.BatchNorm2d(3)), data(*range(2, 102)), 1e-6)


def test_every_call_of_a_layer_counts() -> None:
    """A layer that runs three times in one forward has the statistics of all three."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)
            self.again = self.norm

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.norm(self.conv(self.norm(x))) * 5 + 3)

    model = Shared()
    assert_population(model, data(5, 7, 2), 1e-6)
    assert model.norm.num_batches_tracked == 3
    report = recompute_batchnorm(model, data(5))
    assert [layer.name for layer in report.layers] == ["norm"]
    buffers = recomputed_buffers(model, report)
    assert set(buffers) == {k for k in model.state_dict() if "norm." in k or "again." in k} - {
        f"{name}.{key}" for name in ("norm", "again") for key in ("weight", "bias")
    }


def test_a_layer_of_another_make_has_its_input_measured() -> None:
    """A subclass that normalises by itself and leaves its buffers alone gets them right."""

    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.mean((0, 2, 3), keepdim=True)
            return x - mean

    model = nn.Sequential(Own(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    assert_population(model, data(5, 7, 2), 1e-6)


def test_sync_batchnorm_needs_no_process_group() -> None:
    """It gets what BatchNorm gets, bit for bit, and is SyncBatchNorm afterwards."""
    plain = network()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(plain))
    before = trace(synced)["1"]
    recompute_batchnorm(plain, data(5, 7))
    recompute_batchnorm(synced, data(5, 7))
    assert torch.equal(plain[5].running_var, synced[5].running_var)
    assert trace(synced)["1"][:4] == before[:4]
    assert type(synced[1]).forward == synced[1].forward.__func__


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_scripted_models_are_refused_for_what_they_are() -> None:
    """Not for having no BatchNorm layer: they have some, which nobody can watch."""
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(DataError, match=r"the model is compiled by torch\.jit"):
        recompute_batchnorm(scripted, data(5))


def test_lazy_layers_work_once_they_have_a_shape() -> None:
    """Before that the error names one; a shape from a batch or a loaded state_dict will do."""
    fresh = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(DataError, match=r"Run one batch through the model first\.$"):
        recompute_batchnorm(fresh, data(5))
    fresh(next(iter(data(5))))
    assert_population(fresh, data(5, 7), 1e-6)
    lazy = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(DataError, match=r"lazy layers that have no shape yet \(1\.weight\)"):
        recompute_batchnorm(lazy, data(5))
    lazy.load_state_dict(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).state_dict())
    assert_population(lazy, data(5, 7), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_have_statistics_of_float32(dtype: torch.dtype) -> None:
    """Merged in float64, rounded once into the buffers' own dtype."""
    model = network().to(dtype)
    with inputs_of(model) as seen:
        recompute_batchnorm(model, [b.to(dtype) for b in data(50, 70, 2)])
    for layer, parts in seen.items():
        mean, var = two_pass(parts)
        assert layer.running_var.dtype is dtype
        torch.testing.assert_close(layer.running_mean, mean.to(dtype), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.running_var, var.to(dtype))


def test_mixed_precision_keeps_statistics_in_float32() -> None:
    """Under autocast the layers see bfloat16, and get its exact moments in float32."""
    model = network()
    with inputs_of(model) as seen:
        recompute_batchnorm(model, data(5, 7), device="cpu", amp="bf16")
    mean, var = two_pass(seen[model[5]])
    assert torch.equal(seen[model[5]][0], seen[model[5]][0].bfloat16().double())
    assert torch.allclose(model[5].running_mean, mean.float(), atol=1e-6)
    assert torch.allclose(model[5].running_var, var.float(), rtol=1e-6)


# --- the torch estimator ------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_estimator_is_update_bn_to_the_bit(dims: int, momentum: float | None) -> None:
    """With dropout active and seeded, all of the state_dict is the same."""
    ours, torchs = network(dims, momentum), network(dims, momentum)
    batches = data(5, 7, 2, dims=dims)
    torch.manual_seed(1)
    recompute_batchnorm(ours, batches, device="cpu", estimator="torch")
    torch.manual_seed(1)
    update_bn(batches, torchs)
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_torch_estimator_leaves_other_statistics_alone() -> None:
    """InstanceNorm buffers, which training mode would move, are as before, and named."""
    model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.BatchNorm2d(3))
    report = recompute_batchnorm(model, data(5, 7), estimator="torch")
    assert report.instance_norms == ("0",)
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert model[0].running_var.tolist() == [1, 1, 1]


# --- layers that keep what they have ------------------------------------------------


class WithUnusedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.BatchNorm2d(3)
        self.unused = nn.BatchNorm2d(3)
        self.unused.running_mean.fill_(7)
        self.untracked = nn.BatchNorm2d(3, track_running_stats=False)
        self.switched_off = nn.BatchNorm2d(3)
        self.switched_off.track_running_stats = False

    def forward(self, x: Tensor) -> Tensor:
        return self.switched_off(self.untracked(self.used(x)))


@pytest.mark.parametrize("estimator", ["population", "torch"])
def test_layers_without_data_keep_their_statistics_and_are_named(estimator: str) -> None:
    """Neither a layer never reached nor one that tracks nothing is touched."""
    model = WithUnusedHead()
    before = deepcopy(model.state_dict())
    report = recompute_batchnorm(model, data(5, 7), estimator=estimator)
    assert [layer.name for layer in report.layers] == ["used"]
    assert report.unreached == ("unused",)
    assert report.frozen == ("untracked", "switched_off")
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(recomputed_buffers(model, report))


def test_a_layer_reached_by_some_batches_counts_those() -> None:
    """Its statistics and its number of batches are those of the batches that came."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.small = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.always(x) if len(x) > 4 else self.small(self.always(x))

    model = Sometimes()
    assert_population(model, data(5, 3, 7, 4), 1e-6)
    assert (model.always.num_batches_tracked, model.small.num_batches_tracked) == (4, 2)


def test_a_model_without_batchnorm_is_refused() -> None:
    """There would be nothing to do, and the user thinks there is."""
    with pytest.raises(DataError, match="no BatchNorm layer with running statistics"):
        recompute_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)), data(5))


# --- how batches come and go --------------------------------------------------------


Pair = namedtuple("Pair", "image label")


class Bag:
    """A batch class of a framework: it knows how to go to a device, and no more."""

    def __init__(self, image: Tensor) -> None:
        self.image = image

    def to(self, device: torch.device) -> "Bag":
        return Bag(self.image.to(device))


@pytest.mark.parametrize(
    ("wrap", "forward"),
    [
        (lambda x: x, None),
        (lambda x: (x, torch.zeros(len(x))), None),
        (lambda x: [x, {"any": "thing"}], None),
        (lambda x: Pair(x, None), None),
        (lambda x: {"input": x}, None),
        (lambda x: OrderedDict(input=x), None),
        (lambda x: UserDict(input=x), None),
        (lambda x: Pair(x, 1), lambda model, batch: model(batch.image)),
        (lambda x: {"a": [0, (x,)]}, lambda model, batch: model(batch["a"][1][0])),
        (Bag, lambda model, batch: {"logits": model(batch.image)}),
    ],
)
def test_every_kind_of_batch_reaches_the_model(wrap: Callable, forward: Callable | None) -> None:
    """Tensor, tuple, list, mapping or object: the same statistics; samples counted if certain."""
    plain, wrapped = network(), network()
    recompute_batchnorm(plain, data(5, 7))
    seen: list[Progress] = []
    report = recompute_batchnorm(
        wrapped, map(wrap, data(5, 7)), forward=forward, progress=seen.append
    )
    assert torch.equal(plain[5].running_var, wrapped[5].running_var)
    made = wrap(torch.zeros(2))
    hidden = isinstance(made, Bag) or (isinstance(made, dict) and "a" in made)
    assert (report.batches, report.samples) == (2, None if hidden else 12)
    assert [(one.done, one.samples * (not hidden)) for one in seen] == [
        (0, 0),
        (1, 5 * (not hidden)),
        (2, 12 * (not hidden)),
    ]


def test_an_endless_loader_is_not_asked_for_one_batch_too_many() -> None:
    """With `max_batches` exactly so many are fetched."""
    fetched = []

    def endless() -> Iterator[Tensor]:
        for number in count():
            fetched.append(number)
            yield torch.randn(4, 3, 5, 5)

    assert recompute_batchnorm(network(), endless(), max_batches=3).batches == 3
    assert fetched == [0, 1, 2]


def test_a_wrapped_model_is_unwrapped() -> None:
    """DataParallel is looked through; names are those of its state_dict."""
    inner = network()
    wrapped = nn.DataParallel(inner)
    report = recompute_batchnorm(wrapped, data(5, 7))
    assert [layer.name for layer in report.layers] == ["module.1", "module.5"]
    assert set(recomputed_buffers(wrapped, report)) <= set(wrapped.state_dict())
    plain = network()
    recompute_batchnorm(plain, data(5, 7))
    assert torch.equal(inner[5].running_var, plain[5].running_var)


# --- what is left behind ------------------------------------------------------------


def mixed_modes(model: nn.Sequential) -> nn.Sequential:
    model.eval()
    model[1].train()
    model[2].train()
    return model


@pytest.mark.parametrize("estimator", ["population", "torch"])
def test_success_changes_the_statistics_and_nothing_else(estimator: str) -> None:
    """The buffers are the same tensors with new values; modes and momenta are as set."""
    model = mixed_modes(network())
    before = trace(model)
    recompute_batchnorm(model, data(5, 7), estimator=estimator)
    after = trace(model)
    for name, module in model.named_modules():
        assert after[name][:4] == before[name][:4]
        for key, (identity, values) in after[name][4].items():
            moved = isinstance(module, _BatchNorm) and key not in ("weight", "bias")
            assert identity == before[name][4][key][0]
            assert (values != before[name][4][key][1]) == moved


class BoomError(Exception):
    pass


def failing(error: BaseException) -> Iterator[Tensor]:
    yield from data(5, 7)
    raise error


def forward_failing(error: BaseException) -> Callable[[nn.Module, Tensor], None]:
    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        if len(batch) == 7:
            raise error

    return forward


class Broken(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        if index == 8:
            raise OSError("no sample 8")
        return torch.full((3, 5, 5), float(index))


NAN = torch.full((2, 3, 5, 5), torch.nan)
FAILURES = {
    "the loader raises": (lambda: failing(BoomError("a\nb")), None, DataError, 2, "BoomError: a"),
    "the loader is interrupted": (
        lambda: failing(KeyboardInterrupt()),
        None,
        KeyboardInterrupt,
        None,
        "",
    ),
    "no iterable": (lambda: 5, None, DataError, None, "batches is of type int, expected an"),
    "forward raises": (
        lambda: data(5, 7),
        forward_failing(BoomError("x")),
        DataError,
        1,
        "BoomError: x",
    ),
    "forward is interrupted": (
        lambda: data(5, 7),
        forward_failing(KeyboardInterrupt()),
        KeyboardInterrupt,
        None,
        "",
    ),
    "forward stops an iteration": (
        lambda: data(5, 7),
        forward_failing(StopIteration()),
        DataError,
        1,
        "StopIteration",
    ),
    "the model raises": (lambda: [torch.zeros(4, 9, 5, 5)], None, DataError, 0, "RuntimeError"),
    "channels elsewhere": (
        lambda: [torch.zeros(4, 3, 5, 5)],
        lambda model, batch: model[1](batch),
        DataError,
        0,
        "1 got an input of shape (4, 3, 5, 5), expected 6 channels in dimension 1",
    ),
    "a worker of the loader raises": (
        lambda: DataLoader(Broken(), batch_size=4, num_workers=1),
        None,
        DataError,
        2,
        "batch 2: OSError: no sample 8.",
    ),
    "an exception without a word": (
        lambda: failing(BoomError()),
        None,
        DataError,
        2,
        "batch 2: BoomError.",
    ),
    "an empty tuple": (lambda: [()], None, DataError, 0, "IndexError: tuple index out of range"),
    "no batch": (list, None, DataError, None, "no batches"),
    "NaN": (lambda: [*data(5), NAN, *data(7)], None, DataError, 1, "1 got values that are NaN"),
    "infinity": (lambda: [*data(5, 7), NAN.nan_to_num(torch.inf)], None, DataError, 2, "infinite"),
    "one value per channel": (
        lambda: [*data(5), torch.zeros(1, 3, 3, 3)],
        None,
        DataError,
        1,
        "1 got 1 value per channel",
    ),
    "no value": (lambda: [torch.zeros(0, 3, 3, 3)], None, DataError, 0, "0 values per channel"),
}


@pytest.mark.parametrize("estimator", ["population", "torch"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_leaves_no_trace_and_names_the_batch(failure: str, estimator: str) -> None:
    """Tensors, modes, momenta and hooks are as before; the error is one line."""
    batches, forward, kind, number, says = FAILURES[failure]
    model = mixed_modes(network())
    before = trace(model)
    with pytest.raises(kind) as caught:
        recompute_batchnorm(model, batches(), forward=forward, estimator=estimator)
    assert trace(model) == before
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    if kind is DataError:
        assert caught.value.batch == number
        assert number is None or f"batch {number}: " in str(caught.value)


@pytest.mark.parametrize("estimator", ["population", "torch"])
def test_statistics_too_large_for_their_buffers_are_refused(estimator: str) -> None:
    """All or none: the second layer's overflow leaves the first as it was, too."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Hardtanh(-1, 1), nn.Conv2d(3, 3, 1))
    model.append(nn.BatchNorm2d(3))
    model[2].weight.data.fill_(1e25)
    before = trace(model)
    with pytest.raises(DataError, match="too large"):
        recompute_batchnorm(model, data(5, 7), estimator=estimator)
    assert trace(model) == before


def test_their_exception_is_chained() -> None:
    """Whoever debugs finds the original behind ours."""
    error = BoomError("x")
    with pytest.raises(DataError) as caught:
        recompute_batchnorm(network(), data(5, 7), forward=forward_failing(error))
    assert caught.value.__cause__ is error


def test_progress_that_raises_leaves_no_trace() -> None:
    """The caller's own callback fails as itself."""
    model = mixed_modes(network())
    before = trace(model)

    def progress(now: Progress) -> None:
        if now.done:
            raise BoomError

    with pytest.raises(BoomError):
        recompute_batchnorm(model, data(5, 7), progress=progress)
    assert trace(model) == before


def test_buffers_and_tables_of_the_model_stay_usable() -> None:
    """A buffer written in forward is put back, and a table made there can be trained with."""

    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.register_buffer("calls", torch.tensor(0))
            self.table = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.table is None:
                self.table = torch.ones(5)
            return self.norm(x) * self.table

    model = Keeper()
    recompute_batchnorm(model, data(5, 7))
    assert model.calls == 0
    model(data(5)[0].requires_grad_()).sum().backward()
    assert not model.table.is_inference()


# --- the report and the arguments ---------------------------------------------------


def test_shifts_are_in_standard_deviations() -> None:
    """From mean 0 and variance 1, to mean 6 and variance 4: 3 deviations, twice as wide."""
    model = nn.Sequential(nn.BatchNorm1d(1, eps=1e-12))
    batch = torch.tensor([[4.0], [8.0]])
    (layer,) = recompute_batchnorm(model, [batch]).layers
    assert (layer.mean_shift, layer.std_ratio, layer.batches) == (
        pytest.approx(3),
        pytest.approx(2),
        1,
    )
    (layer,) = recompute_batchnorm(model, [batch / 4]).layers
    assert layer.mean_shift == pytest.approx(4.5 / 0.5)
    assert layer.std_ratio == pytest.approx(4)


def test_the_report_is_json() -> None:
    """Also where the old statistics were no numbers."""
    model = network()
    model[1].running_mean.fill_(torch.nan)
    report = recompute_batchnorm(model, data(5, 7), device="cpu").to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["layers"][0]["mean_shift"] is None
    assert report["device"] == "cpu"


def test_a_device_that_is_not_there_is_refused() -> None:
    """By name, before the loader is asked for anything."""
    with pytest.raises(SwaAvgError, match="device cuda:99 is not available"):
        recompute_batchnorm(network(), failing(BoomError()), device="cuda:99")
    with pytest.raises(SwaAvgError, match="device quantum is not available"):
        recompute_batchnorm(network(), failing(BoomError()), device="quantum")


@pytest.mark.parametrize("wrong", [{"estimator": "x"}, {"amp": "x"}, {"max_batches": 0}])
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    """They are mistakes of the program, not of the data."""
    with pytest.raises(ValueError, match="expected"):
        recompute_batchnorm(network(), data(5), **wrong)


# --- on a GPU -----------------------------------------------------------------------


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_cuda_equals_cpu(memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within float32 rounding, from pinned memory, with the model back on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    here, there = network(), network()
    batches = [b.contiguous(memory_format=memory) for b in data(32, 48, 2)]
    recompute_batchnorm(here, batches, device="cpu")
    before = trace(there)
    recompute_batchnorm(there, [b.pin_memory() for b in batches], device="cuda")
    assert [trace(there)[n][:4] for n in before] == [before[n][:4] for n in before]
    for key, value in here.state_dict().items():
        assert there.state_dict()[key].device.type == "cpu"
        torch.testing.assert_close(there.state_dict()[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("ratio", [1, 100, 1e4])
def test_cuda_keeps_the_variance_of_steep_data(ratio: float) -> None:
    """Whatever cuDNN does inside, the relative error is at most 1e-5."""
    torch.manual_seed(0)
    batches = [torch.randn(16, 3, 16, 16) + ratio + step for step in (0, 3, -2)]
    model = nn.BatchNorm2d(3)
    recompute_batchnorm(model, batches, device="cuda")
    mean, var = two_pass([b.double().transpose(0, 1).flatten(1) for b in batches])
    assert ((model.running_mean - mean).abs() / mean).max() <= 1e-5
    assert ((model.running_var - var).abs() / var).max() <= 1e-5


@pytest.mark.gpu
@cuda
def test_cuda_names_the_batch_of_the_first_nan() -> None:
    """Though it is looked for only at the end."""
    with pytest.raises(DataError) as caught:
        recompute_batchnorm(network(), [*data(5), NAN, *data(7), NAN], device="cuda")
    assert caught.value.batch == 1
