"""Search when an evaluation costs microseconds: whole generations as arrays, a front as archive.

An archive keeps the best network of every narrow band of cost (Mouret and Clune, arXiv 1504.04909,
with cost as the only feature), so one search finds the front for all constraints at once, where
once-for-all's evolutionary search (`published_evolution` here) runs once per constraint.
"""

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


class _Archive:
    """The best network of each band of cost."""

    def __init__(self, edges: np.ndarray, axes: int):
        self.edges = edges
        self.genes = np.zeros((len(edges) + 1, axes), np.int8)
        self.score = np.full(len(edges) + 1, -np.inf)
        self.cost = np.full(len(edges) + 1, np.inf)

    def add(self, genes: np.ndarray, score: np.ndarray, cost: np.ndarray) -> None:
        band = np.searchsorted(self.edges, cost)
        order = np.argsort(score)  # of several in a band the last written, the best, stays
        best = np.full(len(self.score), -1)
        best[band[order]] = order
        better = np.flatnonzero(best >= 0)
        better = better[score[best[better]] > self.score[better]]
        self.genes[better] = genes[best[better]]
        self.score[better], self.cost[better] = score[best[better]], cost[best[better]]

    def elite(self, slack: float = 0.0) -> np.ndarray:
        """Bands whose network is within `slack` of the best at no more cost."""
        reach = np.maximum.accumulate(self.score)
        return np.flatnonzero(np.isfinite(self.score) & (self.score >= reach - slack))


def evolve(
    evaluate: Evaluate, choices: Sequence[int], places: Sequence[int], kinds: Sequence[int], *,
    seed: int, checkpoints: Sequence[float], islands: int = 1, merge_s: float = 0.0,
    population: int = 256, bands: int = 800, clock: Callable[[], float] = time.process_time,
) -> Iterator[Front]:  # fmt: skip
    """Search the whole front; yields a `Front` at each of the `checkpoints` (seconds of `clock`).

    Islands evolve alone for `merge_s` seconds in all towards different optima, then their archives
    become one, whose networks cross over.

    Args:
        evaluate: maps choice indices (N, axes) to score, to be high, and cost, to be low, (N,).
        choices: number of choices on every axis.
        places: the place in the network that each axis belongs to; crossover moves whole places.
        kinds: axes of one kind, such as all depths, trade: one goes up by a choice and another
            down, which keeps the cost about where it is.
    """
    rng, started = np.random.default_rng(seed), clock()
    choices, places, kinds = map(np.asarray, (choices, places, kinds))
    traders = [axes for kind in np.unique(kinds) if len(axes := np.flatnonzero(kinds == kind)) > 1]
    # The ends of the first axis's values, all else smallest and largest, span the costs.
    ends = np.concatenate([np.tile(v, (choices[0], 1)) for v in (choices * 0, choices - 1)])
    ends[:, 0] = np.tile(np.arange(choices[0]), 2)
    score, cost = evaluate(ends.astype(np.int8))
    edges = np.linspace(0.9 * cost.min(), 1.1 * cost.max(), bands)
    archives = [_Archive(edges, len(choices)) for _ in range(islands)]
    archives[0].add(ends, score, cost)
    evaluations = len(ends)
    waiting = list(checkpoints)
    offspring = [rng.integers(0, choices, (population, len(choices)), np.int8) for _ in archives]
    while waiting:
        for i, archive in enumerate(archives):
            archive.add(offspring[i], *evaluate(offspring[i]))
            evaluations += population
            offspring[i] = _offspring(archive, choices, places, traders, population, rng)
        spent = clock() - started
        if len(archives) > 1 and spent > merge_s:
            for other in archives[1:]:
                archives[0].add(other.genes, other.score, other.cost)
            del archives[1:], offspring[1:]
        if spent >= waiting[0]:
            waiting.pop(0)
            yield _front(archives, spent, evaluations)


def _offspring(archive, choices, places, traders, population, rng) -> np.ndarray:
    """Mutants of near-elite networks; half crossed with an elite of similar cost, some trading."""
    elite, near = archive.elite(), archive.elite(slack=0.4)
    mothers = np.where(
        rng.random(population) < 0.3, rng.choice(near, population), rng.choice(elite, population)
    )
    at = np.searchsorted(elite, mothers) + rng.integers(-10, 11, population)
    fathers = elite[at.clip(0, len(elite) - 1)]
    crossed = rng.random((population, 1)) < 0.5
    swap = (rng.random((population, places.max() + 1)) < 0.5)[:, places] & crossed
    children = np.where(swap, archive.genes[fathers], archive.genes[mothers])
    # Mostly few changes, sometimes many; less where crossover changes something already.
    rate = rng.exponential(1.5, (population, 1)) / len(choices) * np.where(crossed, 0.5, 1)
    fresh = rng.integers(0, choices, children.shape, np.int8)
    children = np.where(rng.random(children.shape) < rate, fresh, children)
    for axes in traders:
        some = np.flatnonzero(rng.random(population) < 0.3 / len(traders))
        up, down = rng.choice(axes, (2, len(some)))
        children[some, up] = np.minimum(children[some, up] + 1, choices[up] - 1)
        children[some, down] = np.maximum(children[some, down] - 1, 0)
    return children


def _front(archives, spent: float, evaluations: int) -> Front:
    genes, score, cost = (
        np.concatenate([getattr(a, name) for a in archives]) for name in ("genes", "score", "cost")
    )
    order = np.lexsort((-score, cost))
    order = order[np.isfinite(score[order])]
    best = np.maximum.accumulate(score[order])
    order = order[np.r_[True, score[order][1:] > best[:-1]]]
    return Front(spent, evaluations, genes[order], score[order], cost[order])


def published_evolution(
    space: SearchSpace, objective: Callable[[SubnetConfig], Mapping[str, float]],
    cost: Callable[[SubnetConfig], float], caps: Sequence[float], *, score: str, trials: int,
    seed: int, population: int = 10, parents: float = 0.25, mutate: float = 0.4,
    start: Sequence[SubnetConfig] = (), patience: int = 20_000,
) -> pd.DataFrame:  # fmt: skip
    """Once-for-all's evolutionary search as Dynamic-OFA runs it: once for each cap on the cost.

    Of each generation the best quarter stays; half of the next are mutants of it, half its
    crossovers, and what costs more than the cap is drawn again. The caps share `trials` different
    sub-networks evenly; a repeated one costs nothing. Returns a row for each, as `study.search`.

    Raises `SearchError` when `patience` draws find nothing below a cap.
    """
    rng, measured = np.random.default_rng(seed), {}

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
        pick = rng.random(len(space.axes())) < 0.5
        return space.decode(np.where(pick, space.encode(one), space.encode(two)))

    def run(config: SubnetConfig) -> float:
        if config not in measured and len(measured) < trials:
            measured[config] = {k: float(v) for k, v in objective(config).items()}
        return measured.get(config, {score: -np.inf})[score]

    for config in start:
        run(config)
    for i, cap in enumerate(caps):
        share = len(start) + (trials - len(start)) * (i + 1) // len(caps)
        generation = [draw(partial(space.sample, rng), cap) for _ in range(population)]
        for _ in range(patience):
            generation.sort(key=run, reverse=True)
            if len(measured) >= min(share, space.size):
                break
            best = generation[: max(2, int(parents * population))]
            children = [
                draw(partial(child, best, j % 2), cap) for j in range(population - len(best))
            ]
            generation = best + children
    rows = [{"subnet": str(config), **values} for config, values in measured.items()]
    return pd.DataFrame(rows).assign(trial=range(len(rows)), sampler="evolution", seed=seed)
