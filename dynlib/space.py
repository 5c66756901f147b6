"""What a sub-network is: its configuration, its layers, and the space it is drawn from."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from dynlib import DynlibError


class ConfigError(DynlibError):
    """A configuration is malformed, or lies outside its search space."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer as a board model sees it: enough to count work and traffic, nothing of its weights.

    `in_size` and `out_size` are the height (= width) of the feature maps in pixels; `density` is
    the share of the multiply-accumulates that is not skipped.
    """

    op: str
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    in_size: int = 1
    out_size: int = 1
    density: float = 1.0

    @property
    def params(self) -> int:
        """Number of weights, without bias and normalisation."""
        return self.kernel**2 * self.in_channels * self.out_channels // self.groups

    @property
    def macs(self) -> float:
        """Multiply-accumulates for one image (one MAC is two floating-point operations)."""
        return self.params * self.out_size**2 * self.density

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written for one image in float32: input, weights and output, once each."""
        activations = self.in_channels * self.in_size**2 + self.out_channels * self.out_size**2
        return 4 * (activations + self.params)


@dataclass(frozen=True, slots=True)
class SubnetConfig:
    """A sub-network: input resolution, and depth and width per stage.

    Its canonical string, such as ``r32-d1.2-w64.256``, is its key in every table.
    """

    resolution: int
    depth: tuple[int, ...]
    width: tuple[int, ...]

    def __post_init__(self):
        for name in ("depth", "width"):
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))
        object.__setattr__(self, "resolution", int(self.resolution))
        if len(self.depth) != len(self.width):
            raise ConfigError(f"{self}: depth and width need one entry per stage each")

    def __str__(self) -> str:
        dots = ".".join
        return f"r{self.resolution}-d{dots(map(str, self.depth))}-w{dots(map(str, self.width))}"

    @classmethod
    def parse(cls, text: str) -> "SubnetConfig":
        """Read a canonical string; raises `ConfigError` when it is not one."""
        match = re.fullmatch(r"r(\d+)-d(\d+(?:\.\d+)*)-w(\d+(?:\.\d+)*)", text)
        if not match:
            raise ConfigError(f"{text!r} is not a sub-network; expected e.g. 'r32-d1.2-w64.256'")
        resolution, depth, width = match.groups()
        return cls(int(resolution), tuple(depth.split(".")), tuple(width.split(".")))


@dataclass(frozen=True)
class SearchSpace:
    """All sub-networks of one super-network: every combination of the listed choices.

    Args:
        resolution: input sizes in pixels, ascending.
        depth: for each stage its possible numbers of blocks, ascending.
        width: for each stage its possible numbers of channels, ascending.
    """

    resolution: tuple[int, ...]
    depth: tuple[tuple[int, ...], ...]
    width: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "resolution", tuple(self.resolution))
        for name in ("depth", "width"):
            object.__setattr__(self, name, tuple(tuple(c) for c in getattr(self, name)))
        if len(self.depth) != len(self.width):
            raise ConfigError("a search space needs depth and width choices for every stage")
        for name, choices in self.axes():
            if not choices or list(choices) != sorted(set(choices)) or choices[0] < 0:
                raise ConfigError(f"search space, {name}: {choices} is not ascending and positive")

    def axes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every elastic dimension as (name, choices), in the order `encode` uses."""
        return [
            ("resolution", self.resolution),
            *((f"depth{i}", c) for i, c in enumerate(self.depth)),
            *((f"width{i}", c) for i, c in enumerate(self.width)),
        ]

    @property
    def size(self) -> int:
        """Number of distinct sub-networks."""
        return math.prod(len(choices) for _, choices in self.axes())

    @property
    def largest(self) -> SubnetConfig:
        """The sub-network with the last choice on every axis."""
        return self._from_values([c[-1] for _, c in self.axes()])

    @property
    def smallest(self) -> SubnetConfig:
        """The sub-network with the first choice on every axis."""
        return self._from_values([c[0] for _, c in self.axes()])

    def ladder(self, rungs: int) -> list[SubnetConfig]:
        """Sub-networks that grow along all axes at once, from the smallest to the largest."""
        shares = np.linspace(0, 1, rungs)
        picks = ([c[round(s * (len(c) - 1))] for _, c in self.axes()] for s in shares)
        return list(dict.fromkeys(self._from_values(pick) for pick in picks))

    def __iter__(self) -> Iterator[SubnetConfig]:
        for values in itertools.product(*(c for _, c in self.axes())):
            yield self._from_values(values)

    def __contains__(self, config: SubnetConfig) -> bool:
        values = self._values(config)
        axes = self.axes()
        return len(values) == len(axes) and all(
            v in c for v, (_, c) in zip(values, axes, strict=True)
        )

    def check(self, config: SubnetConfig) -> SubnetConfig:
        """Return `config`; raises `ConfigError` naming the first axis it leaves the space on."""
        values, axes = self._values(config), self.axes()
        if len(values) != len(axes):
            raise ConfigError(f"{config} has {len(config.depth)} stages, not {len(self.depth)}")
        for value, (name, choices) in zip(values, axes, strict=True):
            if value not in choices:
                raise ConfigError(f"{config}: {name} is {value}, expected one of {choices}")
        return config

    def sample(self, rng: np.random.Generator) -> SubnetConfig:
        """Draw every axis uniformly and independently."""
        return self._from_values([rng.choice(c) for _, c in self.axes()])

    def mutate(self, config: SubnetConfig, rng: np.random.Generator, p: float) -> SubnetConfig:
        """Redraw every axis of `config` with probability `p`."""
        redrawn = self._values(self.sample(rng))
        keep = rng.random(len(redrawn)) >= p
        kept = zip(keep, self._values(config), redrawn, strict=True)
        return self._from_values([old if k else new for k, old, new in kept])

    def encode(self, config: SubnetConfig) -> np.ndarray:
        """Index of the choice on every axis, an integer vector of shape (axes,)."""
        self.check(config)
        values = zip(self._values(config), self.axes(), strict=True)
        return np.array([choices.index(value) for value, (_, choices) in values])

    def decode(self, indices: Sequence[int]) -> SubnetConfig:
        """The inverse of `encode`."""
        return self._from_values(
            [c[int(i)] for i, (_, c) in zip(indices, self.axes(), strict=True)]
        )

    def to_dict(self) -> dict:
        """A JSON-ready dictionary; `SearchSpace(**d)` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "SearchSpace":
        """Build from `to_dict`; raises `ConfigError` naming missing or unknown keys."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"a search space needs the keys {sorted(names)}, got {list(values)}")
        return cls(**values)

    def _values(self, config: SubnetConfig) -> list[int]:
        return [config.resolution, *config.depth, *config.width]

    def _from_values(self, values: Sequence[int]) -> SubnetConfig:
        stages = len(self.depth)
        resolution, *rest = (int(v) for v in values)
        return SubnetConfig(resolution, tuple(rest[:stages]), tuple(rest[stages:]))
