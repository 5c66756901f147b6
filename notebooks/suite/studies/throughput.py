"""Training speed, against a network that everybody knows: ResNet-20 of He et al. (2015)."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.nets.supernet import Supernet
from dynlib.training.recipes import Recipe
from dynlib.training.step import Step


class BasicBlock(nn.Module):
    """(N, I, H, W) -> (N, O, H / stride, W / stride), with a parameter-free shortcut (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.padding = stride, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        """Shapes as in the class."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)), inplace=True)))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            shortcut = F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + shortcut, inplace=True)


def resnet20(classes: int = 10) -> nn.Module:
    """(N, 3, 32, 32) -> (N, classes); 40.6 MMACs and 0.27 M parameters (He et al., section 4.2)."""
    widths = [16] * 3 + [32] * 3 + [64] * 3
    inputs = [16, *widths[:-1]]
    blocks = [BasicBlock(i, o, 2 if o > i else 1) for i, o in zip(inputs, widths, strict=True)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    )


def images_per_s(step: Callable[[], object], batch: int, steps: int = 8) -> float:
    """Images per second of `step`, which handles `batch` images: median after two warm-up calls."""
    times = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return batch / statistics.median(times[2:])


def reference_step(batch: int = 256, *, bf16: bool, seed: int = 0) -> Callable[[], object]:
    """One forward, backward and SGD step of ResNet-20 on random images, channels_last."""
    generator = torch.Generator().manual_seed(seed)
    net = resnet20().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator)
    solver = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(net(images), labels)
        solver.zero_grad()
        loss.backward()
        solver.step()

    return step


def sandwich_step(
    supernet: Supernet, recipe: Recipe, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], object]:
    """One step of a super-network: the largest, the smallest and one between them learn."""
    step = Step(supernet, recipe)
    ends = [supernet.space.largest, supernet.space.smallest]
    between = supernet.space.ladder(3)[1]

    def whole():
        step.gradients(lambda: images, labels, [*ends, between])
        for solver in step.solvers:
            solver.zero_grad()

    return whole
