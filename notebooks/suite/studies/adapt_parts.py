"""What running parts of a ResNet-50 saves by the clock: the three kinds of masks of LAUDNet.

Which parts run is drawn: time does not depend on what the network has learnt. Half of all blocks,
groups of channels or patches are kept, each as often as any other.
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import nn

from dynlib._vision import timm
from dynlib.decide.bottleneck import Bottleneck, Columns, Patches
from dynlib.decide.maskers import ChannelMasker, PatchMasker
from dynlib.decide.walk import Decide, Seen, one_of
from dynlib.nets.chain import Chain
from suite.studies.adapt import time_rounds

GROUP = 8  # channels
MODES = ("layer", "channel prefix", "channel groups", "spatial")
# Sides of a patch in pixels, by the pixels of a stage's maps; the first is the one that counts.
SIZES = {56: (14, 4, 2), 28: (14, 4, 2), 14: (7, 2, 1), 7: (1,)}


class Halves:
    """A decision that keeps another half of an image's parts at every call, then the other half.

    Of one part alone, `shape` (), it is kept at every second call on average, in random order.
    """

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator):
        self.shape = shape
        self.generator = generator
        self.waiting: list[torch.Tensor] = []

    def __call__(self, seen: Seen) -> torch.Tensor:
        """(1, *shape), of one image."""
        if not self.waiting:
            count = torch.Size(self.shape).numel()
            order = torch.randperm(count, generator=self.generator)
            half = (order < (count + 1) // 2).view(self.shape)
            first = int(torch.randint(2, (), generator=self.generator))
            self.waiting = [half, ~half] if first else [~half, half]
        return self.waiting.pop()[None].long()


def prefix(groups: int) -> Decide:
    """A decision that keeps the first half of the channels of both layers."""
    half = (torch.arange(groups) < groups // 2).expand(1, 2, groups)
    return lambda seen: half


def stage_runs(
    blocks: Sequence[nn.Module], pixels: int, generator: torch.Generator
) -> Mapping[tuple[str, int], Callable]:
    """A stage whole and in all modes, by mode and side of a patch (0 where there are none)."""
    rows: dict[tuple[str, int], list] = {}
    for block in blocks:
        channels, inner = block.conv1.in_channels, block.conv1.out_channels
        example = torch.zeros(1, channels, pixels * block.stride, pixels * block.stride)
        whole = Bottleneck(block)
        ways = [whole.bypass, whole]
        groups = inner // GROUP
        masker = ChannelMasker(channels, groups).eval()
        drawn = Halves((2, groups), generator)
        made = {
            ("whole", 0): whole,
            ("layer", 0): one_of(ways, PatchMasker(channels, 1), Halves((), generator), example),
            ("channel prefix", 0): Columns(block, masker, groups, prefix(groups)),
            ("channel groups", 0): Columns(block, masker, groups, drawn),
        }
        for size in SIZES[pixels]:
            side = pixels // size
            decide = Halves((side, side), generator)
            made["spatial", size] = Patches(block, PatchMasker(channels, side), side, decide)
        for key, dynamic in made.items():
            rows.setdefault(key, []).append(dynamic)
    return {key: Chain(dict(enumerate(row))) for key, row in rows.items()}


@torch.inference_mode()
def part_times(rounds: int, seed: int = 0) -> tuple[pd.DataFrame, float]:
    """Time of every stage of ResNet-50 at 224 px, whole and in part, one image at a time.

    A round is two images: what one runs, the other leaves out.

    Returns:
        One row per stage, mode, side of a patch, round and image: pixels, mode, size, round, part,
        latency_ms. And the largest difference of what ran from the same by definition.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = timm.create_model("resnet50", zero_init_last=False).eval()
    found = []
    worst = 0.0
    for number, pixels in enumerate(SIZES, start=1):
        blocks = list(net.get_submodule(f"layer{number}"))
        first = blocks[0]
        side = pixels * first.stride
        maps = torch.randn(2, first.conv1.in_channels, side, side, generator=generator).relu()
        maps = maps.contiguous(memory_format=torch.channels_last)
        runs = stage_runs(blocks, pixels, generator)
        worst = max(worst, largest_difference(blocks[-1], pixels, generator))
        times = time_rounds(runs, maps, 1, rounds)
        mode, size = zip(*times["run"], strict=True)
        found.append(times.assign(pixels=pixels, mode=mode, size=size).drop(columns="run"))
    return pd.concat(found, ignore_index=True), worst


def largest_difference(block: nn.Module, pixels: int, generator: torch.Generator) -> float:
    """Between executed parts and the definition, relative to the largest value: worst of modes."""
    channels, inner = block.conv1.in_channels, block.conv1.out_channels
    x = torch.randn(1, channels, pixels, pixels, generator=generator).relu()
    x = x.contiguous(memory_format=torch.channels_last)
    groups, side = inner // GROUP, pixels // SIZES[pixels][0]
    some, where = (torch.rand(1, *shape, generator=generator) < 0.5
                   for shape in ((2, groups), (side, side)))  # fmt: skip
    worst = 0.0
    for dynamic in (
        Columns(block, ChannelMasker(channels, groups), groups, lambda _: some),
        Patches(block, PatchMasker(channels, side), side, lambda _: where),
    ):
        expected = dynamic.masked(x)
        difference = (dynamic(x) - expected).abs().max() / expected.abs().max()
        worst = max(worst, difference.item())
    return worst


def saved_pct(times: pd.DataFrame, mode: str, pixels: Sequence[int] = tuple(SIZES)) -> dict:
    """Percent of the time of these stages that a mode saves, of a spatial one at its first size:
    median over the rounds, with the least and the most."""
    mine = times[times["pixels"].isin(pixels)]
    total = mine[_counts(mine)].pivot_table("latency_ms", "round", "mode", aggfunc="sum")
    saved = 100 * (1 - total[mode] / total["whole"])
    return {"value": saved.median(), "low": saved.min(), "high": saved.max(), "n": len(saved)}


def part_table(times: pd.DataFrame) -> pd.DataFrame:
    """Time of each stage in each mode over that of the whole stage: pixels, mode, size, ratio, and
    whether that size counts."""
    mean = times.groupby(["pixels", "mode", "size"], sort=False)["latency_ms"].mean()
    whole = mean.xs("whole", level="mode").droplevel("size")
    ratio = (mean / mean.index.get_level_values("pixels").map(whole)).rename("ratio")
    table = ratio.reset_index()
    table["counted"] = _counts(table)
    return table[table["mode"] != "whole"]


def _counts(table: pd.DataFrame) -> pd.Series:
    first = table["pixels"].map(lambda pixels: SIZES[pixels][0])
    return (table["size"] == 0) | (table["size"] == first)
