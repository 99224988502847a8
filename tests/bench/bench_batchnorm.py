"""How long `recompute_batchnorm` takes, beside `torch.optim.swa_utils.update_bn`.

    python tests/bench/bench_batchnorm.py

With CUDA: a network of the size of ResNet-50, 20 batches of 128 images of 224x224
from pinned memory. Without: a quarter of its width, 40 batches of 16 images of
96x96. Prints the best of several passes, each over all batches, as a table.
What is compared alternates from pass to pass, so that a machine that gets slower
or warmer does so for all of it.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from swa_avg.batchnorm.statistics import recompute_batchnorm

CUDA = torch.cuda.is_available()
WIDTH, BATCHES, BATCH, SIDE, PASSES = (64, 20, 128, 224, 5) if CUDA else (16, 40, 16, 96, 3)
DEVICE = "cuda" if CUDA else "cpu"


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Bottleneck(nn.Module):
    """Three convolutions and a way around them (He et al. 2015)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.first = unit(inputs, width, 1)
        self.second = unit(width, width, 3, stride)
        self.third = unit(width, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.around = nn.Identity() if same else unit(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu_()).relu_()
        return (self.third(y) + self.around(x)).relu_()


def network() -> nn.Sequential:
    """ResNet-50: 16 blocks, 53 BatchNorm layers; the last two parts are its head."""
    torch.manual_seed(0)
    stem = nn.Sequential(unit(3, WIDTH, 7, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, 1))
    body, inputs = nn.Sequential(), WIDTH
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            width = WIDTH << stage
            body.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(stem, body, pool, nn.Linear(inputs, 1000))


def without_head(model: nn.Sequential, batch: Tensor) -> object:
    return model[1](model[0](batch))


def seconds(run: Callable[[], object]) -> float:
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    images = [torch.randn(BATCH, 3, SIDE, SIDE) for _ in range(BATCHES)]
    if CUDA:
        images = [batch.pin_memory() for batch in images]
    model = network().to(DEVICE)
    last = network().to(DEVICE, memory_format=torch.channels_last)
    runs: dict[str, Callable[[], object]] = {
        "update_bn, fp32": lambda: update_bn(images, model, DEVICE),
        "update_bn, fp32, channels_last": lambda: update_bn(images, last, DEVICE),
    }
    for layout, net in (("", model), (", channels_last", last)):
        for amp in ("off", "bf16") if CUDA else ("off",):  # few CPUs have bf16 arithmetic
            name = f"population, {amp.replace('off', 'fp32')}{layout}"
            runs[name] = lambda net=net, amp=amp: recompute_batchnorm(
                net, images, device=DEVICE, amp=amp
            )
    runs["population, fp32, without the head"] = lambda: recompute_batchnorm(
        model, images, device=DEVICE, forward=without_head
    )
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(PASSES + 1):  # the first to warm up: it counts only if it is the best
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
    machine = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {machine}: {BATCHES} batches of {BATCH}x3x{SIDE}x{SIDE}")
    base = best["update_bn, fp32"]
    print(f"{'':38}{'seconds':>9}{'images/s':>10}{'times as fast':>15}")
    for name, took in best.items():
        print(f"{name:38}{took:9.3f}{BATCHES * BATCH / took:10.0f}{base / took:15.2f}")


if __name__ == "__main__":
    main()
