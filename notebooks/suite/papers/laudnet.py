"""Blocks and networks of LAUDNet (arXiv 2308.15949) on the processors of `laud_operators`.

A bottleneck runs whole (static), on the active patches of its map (spatial), with a probability
(layer), or with the active groups of its inner channels (channel). Four stages of a ResNet count;
its stem, pooling and classifier do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dynlib.errors import DynlibError
from suite.papers.laud_operators import (
    DEVICES,
    Conv,
    Device,
    add_s,
    channel_masker_s,
    conv_s,
    scatter_add_s,
    spatial_conv_s,
)

# Milliseconds per image that the public simulator gives (dynamic_networks.md 3.4), in the order of
# `DEVICES`: depths, mode, granularity per stage.
_R50, _R101, _ALL1, _ALL2 = (3, 4, 6, 3), (3, 4, 23, 3), (1, 1, 1, 1), (2, 2, 2, 2)
REFERENCE = (
    (_R101, "static", _ALL1, (1.677, 1.440, 2.074, 32.24, 84.51)),
    (_R101, "spatial", _ALL1, (2.066, 2.491, 2.313, 21.86, 53.93)),
    (_R101, "spatial", (4, 4, 2, 1), (1.393, 1.508, 1.688, 21.65, 54.21)),
    (_R101, "spatial", (8, 4, 7, 1), (1.186, 1.259, 1.572, 24.37, 61.97)),
    (_R101, "layer", _ALL1, (0.943, 0.837, 1.209, 17.85, 46.12)),
    (_R101, "channel", _ALL2, (0.894, 0.927, 1.281, 15.87, 37.16)),
    (_R50, "static", _ALL1, (0.908, 0.775, 1.142, 17.23, 44.98)),
    (_R50, "spatial", (4, 4, 2, 1), (0.779, 0.843, 0.988, 12.01, 30.04)),
    (_R50, "layer", _ALL1, (0.532, 0.472, 0.692, 9.91, 25.53)),
    (_R50, "channel", _ALL2, (0.530, 0.552, 0.778, 9.23, 21.88)),
)


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A residual block 1x1, 3x3 (with the stride), 1x1; `size` is the side of its output."""

    channels: int
    out: int
    size: int
    stride: int = 1

    @property
    def convs(self) -> tuple[Conv, Conv, Conv]:
        """Its three convolutions."""
        mid = self.out // 4
        return (
            Conv(self.channels, mid, self.size * self.stride),
            Conv(mid, mid, self.size, 3, self.stride),
            Conv(mid, self.out, self.size),
        )

    def down_s(self, device: Device) -> float:
        """Time of its projection; the source counts one only where the stride is 2."""
        if self.stride == 1:
            return 0.0
        return conv_s(device, Conv(self.channels, self.out, self.size, 1, self.stride))


def static_s(device: Device, block: Bottleneck) -> float:
    """Time of a block that always runs."""
    convs = sum(conv_s(device, conv) for conv in block.convs)
    return convs + add_s(device, block.out, block.size) + block.down_s(device)


def spatial_s(device: Device, block: Bottleneck, patch: int, density: float) -> float:
    """Time of a block of which only active patches run; the masker is fused where that pays."""
    first, second, third = block.convs
    fused = conv_s(device, _with_masker(first))
    masker = conv_s(device, Conv(first.channels, 2, first.size))
    unfused = masker + spatial_conv_s(device, first, patch, density, gathered=False)
    return (
        min(fused, unfused)
        + spatial_conv_s(device, second, patch, density, gathered=False)
        + spatial_conv_s(device, third, patch, density, gathered=True)
        + scatter_add_s(device, block.out, block.size, patch, density)
        + block.down_s(device)
    )


def layer_s(device: Device, block: Bottleneck, density: float) -> float:
    """Mean time of a block that runs with probability `density`; its masker always does."""
    masker = conv_s(device, _with_masker(block.convs[0]), out_density=0.0)
    down = block.down_s(device)
    return masker + down + density * (static_s(device, block) - down)


def channel_s(device: Device, block: Bottleneck, group: int, density: float) -> float:
    """Time of a block of which only active groups of its inner channels run."""
    first, second, third = block.convs
    return (
        channel_masker_s(device, block.channels, first.size, group)
        + conv_s(device, first, 1.0, density)
        + conv_s(device, second, density, density)
        + conv_s(device, third, density, 1.0)
        + scatter_add_s(device, block.out, block.size, 1, 1.0)
        + block.down_s(device)
    )


def resnet_blocks(depths: Sequence[int]) -> list[list[Bottleneck]]:
    """The four stages of a ResNet at 224 px: (3, 4, 6, 3) is ResNet-50, (3, 4, 23, 3) 101."""
    stages, channels = [], 64
    for i, (out, size) in enumerate(((256, 56), (512, 28), (1024, 14), (2048, 7))):
        stride = 2 if i else 1
        first = Bottleneck(channels, out, size, stride)
        stages.append([first, *[Bottleneck(out, out, size)] * (depths[i] - 1)])
        channels = out
    return stages


def laud_network_ms(
    device: Device,
    depths: Sequence[int],
    mode: str = "static",
    granularity: Sequence[int] = (1, 1, 1, 1),
    density: float = 0.5,
) -> float:
    """Time per image of the four stages of a ResNet, in ms.

    Args:
        mode: static, spatial (granularity: patch side), layer, or channel (group size), per stage.

    Raises `DynlibError` for an unknown mode, and for a density outside 0..1.
    """
    if not 0 <= density <= 1:
        raise DynlibError(f"density {density}; expected a share from 0 to 1")
    blocks: dict[str, Callable[[Bottleneck, int], float]] = {
        "static": lambda block, _: static_s(device, block),
        "spatial": lambda block, patch: spatial_s(device, block, patch, density),
        "layer": lambda block, _: layer_s(device, block, density),
        "channel": lambda block, group: channel_s(device, block, group, density),
    }
    if mode not in blocks:
        raise DynlibError(f"unknown mode {mode!r}; expected one of {', '.join(blocks)}")
    total_s = sum(
        blocks[mode](block, size)
        for stage, size in zip(resnet_blocks(depths), granularity, strict=True)
        for block in stage
    )
    return 1e3 * total_s / device.batch


def judge() -> list[dict[str, object]]:
    """Every published value beside ours: network, mode, granularity, device, both ms, error_pct."""
    rows = []
    for depths, mode, granularity, published in REFERENCE:
        for device, expected in zip(DEVICES.values(), published, strict=True):
            got = laud_network_ms(device, depths, mode, granularity)
            rows.append({
                "network": f"ResNet-{50 if depths == _R50 else 101}", "mode": mode,
                "granularity": "-".join(map(str, granularity)), "device": device.name,
                "published_ms": expected, "latency_ms": got,
                "error_pct": 100 * (got / expected - 1),
            })  # fmt: skip
    return rows


def _with_masker(conv: Conv) -> Conv:
    """A convolution with one more output, the difference of the masker's two logits."""
    return replace(conv, out=conv.out + 1)
