"""Search when an evaluation costs microseconds: whole generations as arrays, a front as archive.

An archive keeps the best network of every narrow band of cost (Mouret and Clune, arXiv 1504.04909,
with cost as the only feature), so one search finds the front for all constraints at once, where
once-for-all's evolutionary search (`published_evolution` here) runs once per constraint.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd

from dynlib.errors import SearchError
from dynlib.space import SearchSpace, SubnetConfig

Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Front:
    """What a search knows after `cpu_s` seconds of process time and so many evaluations.

    `genes` (P, axes) are choice indices; the P points are sorted by `cost` and rise in `score`.
    """

    cpu_s: float
    evaluations: int
    genes: np.ndarray
    score: np.ndarray
    cost: np.ndarray

    def best_below(self, cost: float) -> float:
        """Highest score at that cost or less; -inf if there is none."""
        return self.score[self.cost <= cost].max(initial=-np.inf)


class BandArchive:
    """The best network of each band of cost.

    `genes`, `score` and `cost` have a row per band, those of an empty one -inf and inf.
    """

    def __init__(self, edges: np.ndarray, axes: int):
        bands = len(edges) + 1
        self.edges = edges
        self.genes = np.zeros((bands, axes), np.int8)
        self.score = np.full(bands, -np.inf)
        self.cost = np.full(bands, np.inf)

    def add(self, genes: np.ndarray, score: np.ndarray, cost: np.ndarray) -> None:
        """Keep of (N, axes) networks those that are better than what their band has."""
        band = np.searchsorted(self.edges, cost)
        order = np.argsort(score)  # of several in a band the last written, the best, stays
        best = np.full(len(self.score), -1)
        best[band[order]] = order
        filled = np.flatnonzero(best >= 0)
        better = filled[score[best[filled]] > self.score[filled]]
        chosen = best[better]
        self.genes[better] = genes[chosen]
        self.score[better] = score[chosen]
        self.cost[better] = cost[chosen]

    def elite(self, slack: float = 0.0) -> np.ndarray:
        """Bands whose network is within `slack` of the best at no more cost, by rising cost."""
        reach = np.maximum.accumulate(self.score)
        return np.flatnonzero(np.isfinite(self.score) & (self.score >= reach - slack))


@dataclass(frozen=True)
class _Axes:
    """What a network's genes mean; see `evolve`."""

    choices: np.ndarray
    places: np.ndarray
    traders: list[np.ndarray]  # axes of one kind, where there are several


def evolve(
    evaluate: Evaluate,
    choices: Sequence[int],
    places: Sequence[int],
    kinds: Sequence[int],
    *,
    seed: int,
    checkpoints: Sequence[float],
    islands: int = 1,
    merge_s: float = 0.0,
    population: int = 256,
    bands: int = 800,
    archive: Callable[[np.ndarray, int], BandArchive] = BandArchive,
    clock: Callable[[], float] = time.process_time,
) -> Iterator[Front]:
    """Search the whole front; yields a `Front` at each of the `checkpoints` (seconds of `clock`).

    Islands evolve alone for `merge_s` seconds in all towards different optima, then their archives
    become one, whose networks cross over.

    Args:
        evaluate: maps choice indices (N, axes) to score, to be high, and cost, to be low, (N,).
        choices: number of choices on every axis.
        places: the place in the network that each axis belongs to; crossover moves whole places.
        kinds: axes of one kind, such as all depths, trade: one goes up by a choice and another
            down, which keeps the cost about where it is.
        archive: makes what keeps the good networks, from the edges of the bands and the axes.
    """
    rng, started = np.random.default_rng(seed), clock()
    choices, places, kinds = map(np.asarray, (choices, places, kinds))
    alike = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    axes = _Axes(choices, places, [several for several in alike if len(several) > 1])
    ends = _ends(choices)
    score, cost = evaluate(ends)
    edges = np.linspace(0.9 * cost.min(), 1.1 * cost.max(), bands)
    archives = [archive(edges, len(choices)) for _ in range(islands)]
    archives[0].add(ends, score, cost)
    evaluations = len(ends)
    waiting = list(checkpoints)
    offspring = [rng.integers(0, choices, (population, len(choices)), np.int8) for _ in archives]
    while waiting:
        for i, island in enumerate(archives):
            island.add(offspring[i], *evaluate(offspring[i]))
            evaluations += population
            offspring[i] = _offspring(island, axes, population, rng)
        spent = clock() - started
        if len(archives) > 1 and spent > merge_s:
            for other in archives[1:]:
                archives[0].add(other.genes, other.score, other.cost)
            del archives[1:], offspring[1:]
        if spent >= waiting[0]:
            waiting.pop(0)
            yield _front(archives, spent, evaluations)


def _ends(choices: np.ndarray) -> np.ndarray:
    """For every value of the first axis the smallest and the largest network: all costs' span."""
    smallest = np.tile(choices * 0, (choices[0], 1))
    largest = np.tile(choices - 1, (choices[0], 1))
    ends = np.concatenate([smallest, largest])
    ends[:, 0] = np.tile(np.arange(choices[0]), 2)
    return ends.astype(np.int8)


def _offspring(
    archive: BandArchive, axes: _Axes, population: int, rng: np.random.Generator
) -> np.ndarray:
    """A new generation (population, axes): crossed, mutated, and some of them traded.

    One child, on the axes resolution, two depths, two widths, at places 0, 1, 2, 1, 2::

        mother    1  0 3  2 2    of the archive's best
        father    1  1 2  0 3    of about the mother's cost
        crossed   1  0 2  2 3    place 2, a depth and a width, comes from the father
        mutated   1  0 2  2 1    the second width is drawn again
        traded    1  1 1  2 1    one depth up, the other down
    """
    mothers, fathers = _parents(archive, population, rng)
    crossed = rng.random((population, 1)) < 0.5
    from_father = rng.random((population, axes.places.max() + 1)) < 0.5
    swap = from_father[:, axes.places] & crossed
    children = np.where(swap, archive.genes[fathers], archive.genes[mothers])
    # Mostly few changes, sometimes many; less where crossover changes something already.
    changes = rng.exponential(1.5, (population, 1)) * np.where(crossed, 0.5, 1)
    children = _mutate(children, changes, axes.choices, rng)
    for alike in axes.traders:
        _trade(children, alike, axes.choices, 0.3 / len(axes.traders), rng)
    return children


def _parents(archive: BandArchive, population: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Rows of mothers, elite or nearly so, and for each of a father, elite and of similar cost."""
    elite, near = archive.elite(), archive.elite(slack=0.4)
    from_near = rng.random(population) < 0.3
    near_mothers = rng.choice(near, population)
    elite_mothers = rng.choice(elite, population)
    mothers = np.where(from_near, near_mothers, elite_mothers)
    neighbours = np.searchsorted(elite, mothers) + rng.integers(-10, 11, population)
    return mothers, elite[neighbours.clip(0, len(elite) - 1)]


def _mutate(children: np.ndarray, changes: np.ndarray, choices: np.ndarray, rng) -> np.ndarray:
    """Draw about so many `changes` (N, 1) of each child's axes again."""
    fresh = rng.integers(0, choices, children.shape, np.int8)
    redrawn = rng.random(children.shape) < changes / len(choices)
    return np.where(redrawn, fresh, children)


def _trade(children: np.ndarray, alike: np.ndarray, choices: np.ndarray, share: float, rng) -> None:
    """In a `share` of the children move one of the axes `alike` up by a choice, another down."""
    some = np.flatnonzero(rng.random(len(children)) < share)
    up, down = rng.choice(alike, (2, len(some)))
    children[some, up] = np.minimum(children[some, up] + 1, choices[up] - 1)
    children[some, down] = np.maximum(children[some, down] - 1, 0)


def _front(archives: Sequence[BandArchive], spent: float, evaluations: int) -> Front:
    """The non-dominated networks of all archives."""
    genes = np.concatenate([archive.genes for archive in archives])
    score = np.concatenate([archive.score for archive in archives])
    cost = np.concatenate([archive.cost for archive in archives])
    order = np.lexsort((-score, cost))
    order = order[np.isfinite(score[order])]
    reach = np.maximum.accumulate(score[order])
    leads = np.r_[True, score[order][1:] > reach[:-1]]
    order = order[leads]
    return Front(spent, evaluations, genes[order], score[order], cost[order])


def published_evolution(
    space: SearchSpace,
    objective: Callable[[SubnetConfig], Mapping[str, float]],
    cost: Callable[[SubnetConfig], float],
    caps: Sequence[float],
    *,
    score: str,
    trials: int | None,
    seed: int,
    population: int = 10,
    parents: float = 0.25,
    mutate: float = 0.4,
    start: Sequence[SubnetConfig] = (),
    patience: int = 20_000,
    generations: int = 20_000,
) -> pd.DataFrame:
    """Once-for-all's evolutionary search as Dynamic-OFA runs it: once for each cap on the cost.

    Of each generation the best quarter stays; half of the next are mutants of it, half its
    crossovers, and what costs more than the cap is drawn again. The caps share `trials` different
    sub-networks evenly; a repeated one costs nothing. Each ends with its share, or after so many
    `generations`; without `trials` all run that many (published: 500, of a population of 100).

    Returns a row per sub-network, as `study.search`; `attrs["generations"]` says how many
    generations followed the first one below the cap that had fewest.

    Raises `SearchError` when `patience` draws find nothing below a cap.
    """
    rng = np.random.default_rng(seed)
    measured: dict[SubnetConfig, dict[str, float]] = {}
    survivors = max(2, int(parents * population))

    def draw(make: Callable[[], SubnetConfig], cap: float) -> SubnetConfig:
        for _ in range(patience):
            if cost(config := make()) <= cap:
                return config
        raise SearchError(
            f"{patience} draws found nothing that costs {cap:g} or less; the smallest "
            f"sub-network {space.smallest} costs {cost(space.smallest):g}"
        )

    def child(best: Sequence[SubnetConfig], mutant: bool) -> SubnetConfig:
        one, two = (best[rng.integers(len(best))] for _ in range(2))
        if mutant:
            return space.mutate(one, rng, mutate)
        from_one = rng.random(len(space.axes())) < 0.5
        genes = np.where(from_one, space.encode(one), space.encode(two))
        return space.decode(genes)

    def run(config: SubnetConfig) -> float:
        if config not in measured and (trials is None or len(measured) < trials):
            measured[config] = {key: float(value) for key, value in objective(config).items()}
        return measured[config][score] if config in measured else -np.inf

    for config in start:
        run(config)
    followed = []
    for done, cap in enumerate(caps, start=1):
        share = math.inf
        if trials is not None:
            share = min(space.size, len(start) + (trials - len(start)) * done // len(caps))
        generation = [draw(partial(space.sample, rng), cap) for _ in range(population)]
        for number in range(generations + 1):
            generation.sort(key=run, reverse=True)
            if len(measured) >= share or number == generations:
                break
            best = generation[:survivors]
            makers = (partial(child, best, place % 2) for place in range(population - len(best)))
            generation = best + [draw(make, cap) for make in makers]
        followed.append(number)
    rows = [{"subnet": str(config), **values} for config, values in measured.items()]
    table = pd.DataFrame(rows).assign(trial=range(len(rows)), sampler="evolution", seed=seed)
    table.attrs["generations"] = min(followed, default=0)
    return table
