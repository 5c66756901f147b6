"""Time of static and dynamic convolutions on a parallel processor, from first principles.

The predictor of LAUDNet (arXiv 2308.15949, "DyNetSimulator"): an exhaustive search over tiles of
the output that N_PE processors of P lanes work on; time is compute plus traffic to DRAM and to the
L2 cache, plus a launch. It answers what the FLOPs of a dynamic network hide: whether skipping half
of the work saves time depends on how coarse the skipped pieces are and on the device.

Symbols as in the paper: B batch, S side of a patch, r share of active patches, channels or blocks.
All sizes count float32 elements; sizes of a layer are those of its output, without padding.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import binom

LAUNCH_S = 8e-6
_SECTOR = 8  # floats that the L2 cache moves at once
_DEPTH = 4  # pipeline depth: a lane is full with so many elements


@dataclass(frozen=True, slots=True)
class Device:
    """A processor: clock, `pes` of `lanes` float32 lanes each, DRAM bandwidth, L2 times faster."""

    name: str
    pes: int
    lanes: int
    clock_mhz: float
    dram_gb_s: float
    l2_ratio: float
    batch: int

    @property
    def macs_s(self) -> float:
        """Multiply-accumulates per second of one processor: ``f * P``."""
        return self.clock_mhz * 1e6 * self.lanes

    @property
    def floats_s(self) -> float:
        """float32 elements per second from DRAM."""
        return self.dram_gb_s * 1e9 / 4


# The devices of the public simulator, with the batch its figures use.
DEVICES = {
    device.name: device
    for device in (
        Device("v100", 80, 64, 1500, 700, 4, 128),
        Device("rtx3090", 82, 128, 1250, 936, 1, 128),
        Device("rtx3060", 28, 128, 1777, 360, 4, 128),
        Device("tx2", 2, 128, 1300, 59.7, 4, 1),
        Device("nano", 1, 128, 921, 25.6, 4, 1),
    )
}


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution: channels in and out, side of the output map, kernel, stride, groups."""

    channels: int
    out: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.channels // self.groups * self.out * self.kernel**2

    @property
    def macs_per_output(self) -> int:
        """Multiply-accumulates of one output element."""
        return self.channels // self.groups * self.kernel**2


def tiles(n: int) -> np.ndarray:
    """Candidate tile sides for a dimension of `n`."""
    powers = {2**k for k in range(8) if 2**k <= 2 * n}
    parts = {-(-n // i) for i in range(1, min(n, 8))}
    return np.array(sorted(powers | parts | set(range(2, min(n, 8)))))


@lru_cache(maxsize=4096)
def conv_s(device: Device, conv: Conv, in_density: float = 1.0, out_density: float = 1.0) -> float:
    """Time of a convolution, best tile, launch included; densities are shares of live channels."""
    c, h, w, s, count = _cut(conv.out, conv.size)
    batch = device.batch
    compute = s * conv.macs_per_output * batch / device.macs_s * in_density
    compute = compute * _slowest(conv.out, c, in_density * out_density)
    compute = compute / _full(s, device) * _ceil(count, device.pes)
    # A large batch needs all weights: some image has each channel live.
    rho = (out_density, in_density * out_density) if batch == 1 else (1.0, 1.0)
    area = conv.size**2
    dram = conv.weights * rho[0] + batch * (
        conv.channels * area * conv.stride**2 * in_density + conv.out * area * out_density
    )
    tile = c * conv.macs_per_output * rho[1]
    tile = tile + batch * (_read(conv, c, h, w) * in_density + s * out_density)
    l2 = count * tile / (device.l2_ratio * _coalesced(w, conv.size))
    return float((compute + (dram + l2) / device.floats_s).min()) + LAUNCH_S


def add_s(device: Device, channels: int, size: int) -> float:
    """Time of an element-wise addition of two maps."""
    *_, s, count = _cut(channels, size)
    batch = device.batch
    compute = s * batch / device.macs_s / _full(s, device) * _ceil(count, device.pes)
    return float((compute + 3 * s * count * batch / device.floats_s).min()) + LAUNCH_S


def spatial_conv_s(device: Device, conv: Conv, patch: int, density: float, gathered: bool) -> float:
    """Time of a convolution on the active patches only.

    Tiles are chosen for the mean number of patches and kept for the real one, as the number is only
    known at run time. `gathered`: patches were copied together with their halo; else the whole map
    is indexed.
    """
    b, batch = device.floats_s, device.batch
    n_max = _ceil(conv.size, patch) ** 2
    par, c, h, w, s, count = _cut(conv.out, patch, 256)

    def time_s(n):
        compute = s * conv.macs_per_output * par * batch / device.macs_s
        compute = compute / _full(s * batch * par, device) * _ceil(n, par)
        if gathered:
            read = n * conv.channels * (patch + conv.kernel - 1) ** 2 * conv.stride**2
        else:
            read = conv.channels * conv.size**2 * conv.stride**2
        dram = conv.weights + batch * (read + n * conv.out * patch**2)
        tile = c * conv.macs_per_output + batch * n * (_read(conv, c, h, w) + s)
        compute = compute * _ceil(count, device.pes)
        return compute + dram / b + count * tile / (device.l2_ratio * b)

    return _planned(time_s, density, n_max)


def scatter_add_s(device: Device, channels: int, size: int, patch: int, density: float) -> float:
    """Time of adding the active patches of a branch to the identity."""
    b, batch = device.floats_s, device.batch
    n_max = _ceil(size, patch) ** 2
    par, _, _, w, s, count = _cut(channels, patch, n_max)

    def time_s(n):
        compute = s * par * batch / device.macs_s / _full(s * batch * par, device) * _ceil(n, par)
        dram = batch * (n * channels * patch**2 + 2 * channels * size**2)
        l2 = 3 * s * n * count * batch / (device.l2_ratio * b * _coalesced(w, patch))
        return compute * _ceil(count, device.pes) + dram / b + l2

    return _planned(time_s, density, n_max)


def channel_masker_s(device: Device, channels: int, size: int, group: int) -> float:
    """Time of global pooling and two linear layers that choose groups of `group` channels."""
    groups = channels // group
    hidden = groups // min(16, groups)
    moved = device.batch * (channels * size**2 + channels) / device.floats_s
    pool = moved * (1 + 1 / device.l2_ratio) + LAUNCH_S
    return pool + _linear_s(device, channels, hidden) + _linear_s(device, hidden, groups)


def _linear_s(device: Device, channels: int, out: int) -> float:
    co, ci = np.meshgrid(tiles(out), tiles(channels), indexing="ij", sparse=True)
    batch, b = device.batch, device.floats_s
    count = co * ci  # sizes, not counts: so does the source
    compute = co * ci * batch / device.macs_s / _full(co * ci * batch, device)
    l2 = (co * ci + co + ci) * count * batch / (device.l2_ratio * b * _coalesced(ci, channels))
    moved = batch * (channels * out + channels + out) / b
    return float((compute * _ceil(count, device.pes) + moved + l2).min()) + LAUNCH_S


def _planned(time_s, density: float, n_max: int) -> float:
    """Choose for the mean number of patches, of equals the fewest at once; pay for the real one."""
    mean = time_s((1 + n_max) / 2)
    best = np.argmax(mean <= mean.min() * (1 + 1e-9))  # a rest of rounding is no difference
    return float(time_s(np.ceil(density * n_max)).flat[best]) + LAUNCH_S


def _slowest(out: int, c: np.ndarray, share: float) -> np.ndarray:
    """Expected largest share of live channels over the tiles (the source draws it 100 times)."""
    if share in (0.0, 1.0):
        return np.full(c.shape, share)
    expected = {}
    for width in np.unique(c).tolist():
        below = binom.cdf(np.arange(width), width, share) ** -(-out // width)
        expected[width] = (1 - below).sum() / width
    return np.vectorize(expected.get)(c)


def _full(elements, device: Device):
    """Share of the lanes that a tile of so many elements keeps busy."""
    lanes = _DEPTH * device.lanes
    return elements / (_ceil(elements, lanes) * lanes)


def _coalesced(w, width: int):
    """Share of each sector that reading rows of `w` out of rows of `width` uses."""
    q = _SECTOR
    narrow = w / q if width > q else w / np.maximum(w, width)
    return np.where(w > q, w / (_ceil(w, q) * q), narrow)


def _cut(channels: int, side: int, patches: int | None = None) -> tuple[np.ndarray, ...]:
    """All ways to tile a map: (patches at once,) channels, height, width, elements, tiles."""
    sides = [channels, side, side] if patches is None else [patches, channels, side, side]
    axes = np.meshgrid(*map(tiles, sides), indexing="ij", sparse=True)
    c, h, w = axes[-3:]
    return *axes, c * h * w, _ceil(channels, c) * _ceil(side, h) * _ceil(side, w)


def _read(conv: Conv, c, h, w):
    """Elements of the input, halo included, that a tile of the output reads."""
    side = conv.kernel - 1
    groups = _ceil(c * conv.groups, conv.out) * (conv.channels // conv.groups)
    return groups * (h + side) * (w + side) * conv.stride**2


def _ceil(a, b):
    return np.ceil(a / b) if isinstance(a, np.ndarray | float) else -(-a // b)
