"""What a sub-network is: its configuration, its layers, and the space it is drawn from."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dynlib.errors import ConfigError


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


# The elastic dimensions in canonical order, and their letters in a configuration's string.
LETTERS = {name: name[0] for name in ("resolution", "depth", "width", "kernel", "expand", "heads")}
DIMENSIONS = tuple(LETTERS)[1:]  # those with one entry per place in the network


@dataclass(frozen=True, slots=True)
class SubnetConfig:
    """A sub-network: input resolution, and for each elastic place in the network its size.

    A family of networks says what its places are: stages for `depth` (blocks) and `width`
    (channels), blocks for `kernel` (pixels), `expand` (a ratio or a hidden width) and `heads`; an
    absent dimension is fixed. The canonical string, such as ``r32-d1.2-w64.256``, is the key of the
    sub-network in every table.
    """

    resolution: int
    depth: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    expand: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "resolution", int(self.resolution))
        for name in DIMENSIONS:
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))

    def __str__(self) -> str:
        parts = [f"r{self.resolution}"]
        for name in DIMENSIONS:
            if values := getattr(self, name):
                parts.append(LETTERS[name] + ".".join(map(str, values)))
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> "SubnetConfig":
        """Read a canonical string; raises `ConfigError` when it is not one."""
        places = "".join(rf"(?:-{LETTERS[name]}(\d+(?:\.\d+)*))?" for name in DIMENSIONS)
        match = re.fullmatch(rf"r(\d+){places}", text)
        if not match:
            raise ConfigError(f"{text!r} is not a sub-network; expected e.g. 'r32-d1.2-w64.256'")
        resolution, *rest = match.groups()
        return cls(int(resolution), *(tuple(v.split(".")) if v else () for v in rest))


@dataclass(frozen=True)
class SearchSpace:
    """All sub-networks of one super-network: every combination of the listed choices.

    Args:
        resolution: input sizes in pixels, ascending.
        depth, width, kernel, expand, heads: for each place its possible values, ascending.
    """

    resolution: tuple[int, ...]
    depth: tuple[tuple[int, ...], ...] = ()
    width: tuple[tuple[int, ...], ...] = ()
    kernel: tuple[tuple[int, ...], ...] = ()
    expand: tuple[tuple[int, ...], ...] = ()
    heads: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "resolution", tuple(self.resolution))
        for name in DIMENSIONS:
            object.__setattr__(self, name, tuple(tuple(c) for c in getattr(self, name)))
        for name, choices in self.axes():
            if not choices or list(choices) != sorted(set(choices)) or choices[0] < 0:
                raise ConfigError(f"search space, {name}: {choices} is not ascending and positive")

    def axes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every elastic dimension as (name, choices), in the order `encode` uses."""
        places = [(f"{n}{i}", c) for n in DIMENSIONS for i, c in enumerate(getattr(self, n))]
        return [("resolution", self.resolution), *places]

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
        try:
            return self.check(config) is config
        except ConfigError:
            return False

    def check(self, config: SubnetConfig) -> SubnetConfig:
        """Return `config`; raises `ConfigError` naming the first axis it leaves the space on."""
        for name in DIMENSIONS:
            got, want = len(getattr(config, name)), len(getattr(self, name))
            if got != want:
                raise ConfigError(f"{config} has {got} entries of {name}, expected {want}")
        for value, (name, choices) in zip(self._values(config), self.axes(), strict=True):
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
        """A JSON-ready dictionary of the dimensions that are there; `from_dict` reads it back."""
        return {name: choices for name, choices in asdict(self).items() if choices}

    @classmethod
    def from_dict(cls, values: dict) -> "SearchSpace":
        """Build from `to_dict`; raises `ConfigError` naming missing or unknown keys."""
        if "resolution" not in values or not set(values) <= set(LETTERS):
            raise ConfigError(
                f"a search space needs the key 'resolution' and may have {list(DIMENSIONS)}, "
                f"got {list(values)}"
            )
        return cls(**values)

    def _values(self, config: SubnetConfig) -> list[int]:
        return [config.resolution, *(v for name in DIMENSIONS for v in getattr(config, name))]

    def _from_values(self, values: Sequence[int]) -> SubnetConfig:
        resolution, *rest = (int(v) for v in values)
        places = iter(rest)
        return SubnetConfig(
            resolution,
            *(tuple(itertools.islice(places, len(getattr(self, n)))) for n in DIMENSIONS),
        )
