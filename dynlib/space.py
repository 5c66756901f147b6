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
        pixels = self.kernel**2
        dense = pixels * self.in_channels * self.out_channels
        return dense // self.groups

    @property
    def macs(self) -> float:
        """Multiply-accumulates for one image (one MAC is two floating-point operations)."""
        pixels = self.out_size**2
        return self.params * pixels * self.density


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

    >>> SubnetConfig(32, depth=(1, 2), width=(64, 256))
    SubnetConfig(resolution=32, depth=(1, 2), width=(64, 256), kernel=(), expand=(), heads=())
    >>> str(_), SubnetConfig.parse("r32-d1.2-w64.256") == _
    ('r32-d1.2-w64.256', True)
    """

    resolution: int
    depth: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    expand: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "resolution", int(self.resolution))
        # Numbers of numpy and of strings too: equal sub-networks have equal strings.
        for name in DIMENSIONS:
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(map(int, values)))

    def __str__(self) -> str:
        parts = [f"r{self.resolution}"]
        for name in DIMENSIONS:
            values = getattr(self, name)
            if values:
                numbers = ".".join(map(str, values))
                parts.append(LETTERS[name] + numbers)
        return "-".join(parts)

    @classmethod
    def parse(cls, text: str) -> "SubnetConfig":
        """Read a canonical string; raises `ConfigError` when it is not one."""
        numbers = r"(\d+(?:\.\d+)*)"
        places = "".join(rf"(?:-{LETTERS[name]}{numbers})?" for name in DIMENSIONS)
        match = re.fullmatch(rf"r(\d+){places}", text)
        if not match:
            raise ConfigError(f"{text!r} is not a sub-network; expected e.g. 'r32-d1.2-w64.256'")
        resolution, *lists = match.groups()
        values = [tuple(part.split(".")) if part else () for part in lists]
        return cls(int(resolution), *values)


@dataclass(frozen=True)
class SearchSpace:
    """All sub-networks of one super-network: every combination of the listed choices.

    Args:
        resolution: input sizes in pixels, ascending.
        depth, width, kernel, expand, heads: for each place its possible values, ascending.

    Raises `ConfigError` for choices that are none, negative or not ascending.

    >>> space = SearchSpace(resolution=(28, 32), depth=((1, 2), (1, 2)), width=((16, 32), (32, 64)))
    >>> space.size, str(space.smallest), str(space.largest)
    (32, 'r28-d1.1-w16.32', 'r32-d2.2-w32.64')
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
            places = getattr(self, name)
            object.__setattr__(self, name, tuple(map(tuple, places)))
        for name, choices in self.axes():
            ascends = list(choices) == sorted(set(choices))
            if not choices or not ascends or choices[0] < 0:
                raise ConfigError(f"search space, {name}: {choices} is not ascending and positive")

    def axes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every elastic dimension as (name, choices), in the order `encode` uses."""
        axes = [("resolution", self.resolution)]
        for name in DIMENSIONS:
            for place, choices in enumerate(getattr(self, name)):
                axes.append((f"{name}{place}", choices))
        return axes

    @property
    def size(self) -> int:
        """Number of distinct sub-networks."""
        counts = [len(choices) for _, choices in self.axes()]
        return math.prod(counts)

    @property
    def largest(self) -> SubnetConfig:
        """The sub-network with the last choice on every axis."""
        lasts = [choices[-1] for _, choices in self.axes()]
        return self._from_values(lasts)

    @property
    def smallest(self) -> SubnetConfig:
        """The sub-network with the first choice on every axis."""
        firsts = [choices[0] for _, choices in self.axes()]
        return self._from_values(firsts)

    def at(self, share: float) -> SubnetConfig:
        """The sub-network so far up on every axis: 0 is the smallest, 1 the largest.

        Raises `ConfigError` for any other share.
        """
        if not 0 <= share <= 1:
            raise ConfigError(f"share {share}: expected 0 (the smallest) to 1 (the largest)")
        lasts = np.array([len(choices) - 1 for _, choices in self.axes()])
        return self.decode(np.round(share * lasts))

    def ladder(self, rungs: int) -> list[SubnetConfig]:
        """Sub-networks that grow along all axes at once, from the smallest to the largest."""
        grown = [self.at(share) for share in np.linspace(0, 1, rungs)]
        return list(dict.fromkeys(grown))

    def __iter__(self) -> Iterator[SubnetConfig]:
        choices = (choices for _, choices in self.axes())
        for values in itertools.product(*choices):
            yield self._from_values(values)

    def __contains__(self, config: SubnetConfig | str) -> bool:
        try:
            self.check(config)
        except ConfigError:
            return False
        return True

    def check(self, config: SubnetConfig | str) -> SubnetConfig:
        """Return `config`; raises `ConfigError` naming the first axis it leaves the space on.

        Its canonical string, as a table has it, will do.
        """
        if isinstance(config, str):
            config = SubnetConfig.parse(config)
        for name in DIMENSIONS:
            entries = len(getattr(config, name))
            places = len(getattr(self, name))
            if entries != places:
                raise ConfigError(f"{config} has {entries} entries of {name}, expected {places}")
        values = zip(self._values(config), self.axes(), strict=True)
        for value, (name, choices) in values:
            if value not in choices:
                raise ConfigError(f"{config}: {name} is {value}, expected one of {choices}")
        return config

    def sample(self, rng: np.random.Generator) -> SubnetConfig:
        """Draw every axis uniformly and independently."""
        drawn = [rng.choice(choices) for _, choices in self.axes()]
        return self._from_values(drawn)

    def mutate(self, config: SubnetConfig, rng: np.random.Generator, p: float) -> SubnetConfig:
        """Redraw every axis of `config` with probability `p`."""
        old = self._values(config)
        redrawn = self._values(self.sample(rng))
        keep = rng.random(len(redrawn)) >= p
        values = np.where(keep, old, redrawn)
        return self._from_values(values)

    def encode(self, config: SubnetConfig) -> np.ndarray:
        """Index of the choice on every axis, an integer vector of shape (axes,)."""
        self.check(config)
        values = zip(self._values(config), self.axes(), strict=True)
        indices = [choices.index(value) for value, (_, choices) in values]
        return np.array(indices)

    def decode(self, indices: Sequence[int]) -> SubnetConfig:
        """The inverse of `encode`."""
        picked = zip(indices, self.axes(), strict=True)
        values = [choices[int(index)] for index, (_, choices) in picked]
        return self._from_values(values)

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
        values = [config.resolution]
        for name in DIMENSIONS:
            values += getattr(config, name)
        return values

    def _from_values(self, values: Sequence[int]) -> SubnetConfig:
        resolution, *rest = values
        rest = iter(rest)
        dimensions = []
        for name in DIMENSIONS:
            count = len(getattr(self, name))
            entries = itertools.islice(rest, count)
            dimensions.append(tuple(entries))
        return SubnetConfig(resolution, *dimensions)
