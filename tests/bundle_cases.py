"""A small super-network whose points share weights, a table of them, and images."""

import torch
from small_nets import fresh

from dynlib.images import Dataset, Images
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.points import make_table
from dynlib.space import SearchSpace

SPACE = SearchSpace((12, 16), ((1,), (1, 2)), ((16, 32), (32, 64)))
POINTS = (SPACE.smallest, SPACE.decode([1, 0, 1, 0, 1]), SPACE.largest)


def bundled() -> Supernet:
    """Random weights, none of them equal, with statistics of each of `POINTS`."""
    supernet = fresh(SPACE)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in supernet.net.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.rand(weight.shape, generator=generator)
    for config in POINTS:
        calibrate(supernet, config, [torch.randn(32, 3, 16, 16, generator=generator)])
    return supernet


def photos() -> Dataset:
    """Every value that a pixel may have, in each channel; their mean and deviation differ."""
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    few = Images(values.repeat(2, 3, 1, 1), torch.tensor([0, 9]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return Dataset("photos", tuple("abcdefghij"), few, few, few, mean, std)


def table(points=POINTS, **columns):
    about = {"model": "net", "board": "jetson-nano", "unit": "gpu", "batch": 1, "latency_ms": 1.0}
    about["source"] = "estimated"
    return make_table(about | {"subnet": str(config)} | columns for config in points)
