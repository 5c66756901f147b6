"""What a search brings over another one at equal effort: samplers by trials, archives by
evaluations; and a front that a study of Optuna should show.

The samplers are compared on a replay, because what they cost is evaluations: accuracy as measured
where there is a row, and for the others, if there are any, as predicted from those.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from tqdm.auto import tqdm

from dynlib.pareto import hypervolume
from dynlib.searching.guided import GuidedSampler
from dynlib.searching.predictor import AccuracyPredictor, WorkOf
from dynlib.searching.stopping import StopHopeless
from dynlib.searching.study import distributions, measured, open_study, params, search
from dynlib.space import SearchSpace, SubnetConfig
from suite.papers.evolution import BandArchive, Evaluate, evolve, published_evolution
from suite.record.statistics import geometric_ratio, volumes

_GOALS = {"accuracy_val_pct": "maximize", "cost": "minimize"}


def replayed(
    known: Mapping[str, float], space: SearchSpace, work: WorkOf, rng: np.random.Generator
) -> dict[SubnetConfig, float]:
    """Accuracy in percent of every sub-network of `space`, as a search would find it.

    Measured where it is `known`; the others are predicted from those, each with a draw of the
    spread that measured ones have about their prediction, so that no search meets a smooth world.
    """
    rows = {SubnetConfig.parse(subnet): accuracy for subnet, accuracy in known.items()}
    if len(rows) == space.size:
        return {config: rows[config] for config in space}
    predictor = AccuracyPredictor(space, work).fit(list(rows), list(rows.values()))
    fitted, _ = predictor.predict(list(rows))
    spread = np.std(np.array(list(rows.values())) - fitted)
    configs = list(space)
    predicted, _ = predictor.predict(configs)
    drawn = predicted + spread * rng.standard_normal(len(configs))
    return dict(zip(configs, drawn.tolist(), strict=True)) | rows


def compare_samplers(
    space: SearchSpace,
    accuracy: Mapping[SubnetConfig, float],
    cost: Callable[[SubnetConfig], float],
    work: WorkOf,
    *,
    trials: int,
    seeds: Iterable[int],
    start: Sequence[SubnetConfig] = (),
    population: int = 10,
    caps: int = 5,
    generations: int = 30,
) -> pd.DataFrame:
    """The guided sampler, Optuna's own, chance and evolution on the same accuracies, each with as
    many trials; and evolution once more as published, "evolution, published", with a population of
    100 for `generations` below each of `caps` limits on the cost, whatever that takes.

    Returns a row per sampler and seed: ``sampler, seed, hypervolume, share_of_truth, trials,
    generations, s_per_trial``. Hypervolumes have one reference point, the worst corner of the whole
    space, and `share_of_truth` is over that of all its sub-networks; `trials` are different ones,
    `generations` (NaN where there are none) the fewest below any cap; times are process seconds of
    the sampler alone.
    """

    def objective(config: SubnetConfig) -> dict[str, float]:
        return {"accuracy_val_pct": accuracy[config], "cost": cost(config)}

    everything = [objective(config) for config in accuracy]
    costs = [measures["cost"] for measures in everything]
    limits = np.geomspace(min(costs), max(costs), caps + 1)[1:]
    evolve_below = partial(
        published_evolution, space, objective, cost, limits, score="accuracy_val_pct"
    )
    rows, found = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a Gaussian process of so few trials only waits for more
    for seed in tqdm(seeds, desc="samplers", disable=None):
        by_name = {
            "guided": GuidedSampler(space, cost, work, seed=seed),
            "gp": optuna.samplers.GPSampler(seed=seed, n_startup_trials=population),
            "tpe": "tpe",
            "nsga2": "nsga2",
            "random": "random",
        }
        searches = {
            name: partial(search, space, objective, _GOALS, trials=trials, seed=seed,
                          sampler=sampler, population=population, start=start)
            for name, sampler in by_name.items()
        }  # fmt: skip
        searches["evolution"] = partial(
            evolve_below, trials=trials, seed=seed, start=start, population=6
        )
        searches["evolution, published"] = partial(
            evolve_below, trials=None, seed=seed, population=100, generations=generations
        )
        for name, run in searches.items():
            started = time.process_time()
            table = run()
            seconds = time.process_time() - started
            rows.append({
                "sampler": name, "seed": seed, "trials": len(table),
                "generations": table.attrs.get("generations", np.nan),
                "s_per_trial": seconds / len(table),
            })  # fmt: skip
            found.append(table)
    torch.set_num_threads(threads)
    *reached, truth = volumes([*found, pd.DataFrame(everything)], _GOALS)
    rows = pd.DataFrame(rows).assign(hypervolume=reached)
    return rows.assign(share_of_truth=rows["hypervolume"] / truth)


def compare_stopping(
    space: SearchSpace,
    accuracy: Mapping[SubnetConfig, float],
    cost: Callable[[SubnetConfig], float],
    *,
    images: int,
    trials: int,
    seeds: Iterable[int],
    start: Sequence[SubnetConfig] = (),
    population: int = 10,
    looks: int = 20,
    risks: Sequence[float] = (0.0, 0.05),
) -> pd.DataFrame:
    """The same searches with and without `StopHopeless`, on known accuracies (percent).

    No image is shown: of a network that is right about K of N images in random order, the answers
    to any of the first are draws without putting back, and are drawn here, as `looks` equal parts.
    Chance proposes the same networks whether trials end early or not; NSGA-II breeds from what it
    is told.

    Returns a row per sampler, seed and risk (0 is without): ``sampler, seed, risk, images,
    stopped`` (trials) and ``hypervolume`` of what was shown all images, below the worst corner of
    the whole space.
    """
    number = {config: position for position, config in enumerate(accuracy)}

    def answers(config: SubnetConfig, seed: int) -> list[np.ndarray]:
        right = round(min(accuracy[config], 100.0) / 100 * images)  # a prediction may be above
        rng = np.random.default_rng([seed, number[config]])
        in_random_order = rng.permutation(np.arange(images) < right)
        return np.array_split(in_random_order, looks)

    def costs(config: SubnetConfig) -> dict[str, float]:
        return {"cost": cost(config)}

    rows, found = [], []
    for sampler, seed, risk in tqdm(
        list(itertools.product(("nsga2", "random"), seeds, risks)), desc="stopping", disable=None
    ):
        objective = StopHopeless(partial(answers, seed=seed), costs, images=images, risk=risk)
        table = search(
            space, objective, _GOALS, trials=trials, seed=seed, sampler=sampler, start=start,
            population=population,
        )  # fmt: skip
        whole = table["images"] == images
        rows.append({
            "sampler": sampler, "seed": seed, "risk": risk,
            "images": int(table["images"].sum()), "stopped": int((~whole).sum()),
        })  # fmt: skip
        found.append(table[whole])
    everything = [{"accuracy_val_pct": accuracy[config], **costs(config)} for config in accuracy]
    *reached, _ = volumes([*found, pd.DataFrame(everything)], _GOALS)
    return pd.DataFrame(rows).assign(hypervolume=reached)


class RankedPopulation:
    """What `BandArchive` is measured against: NSGA-II's survivors (Deb et al. 2002), no bands.

    Whole fronts survive, the best first; of the last the points with the widest gaps about them.
    """

    size = 256  # as many as the offspring of a generation

    def __init__(self, edges: np.ndarray, axes: int):
        """`edges` of bands are not used."""
        self.genes = np.zeros((0, axes), np.int8)
        self.score = np.zeros(0)
        self.cost = np.zeros(0)

    def add(self, genes: np.ndarray, score: np.ndarray, cost: np.ndarray) -> None:
        """Let (N, axes) networks compete with those that are here."""
        genes = np.concatenate([self.genes, genes])
        score = np.concatenate([self.score, score])
        cost = np.concatenate([self.cost, cost])
        _, different = np.unique(np.stack([cost, -score], axis=1), axis=0, return_index=True)
        kept = different[self._survivors(score[different], cost[different])]
        self.genes, self.score, self.cost = genes[kept], score[kept], cost[kept]

    def elite(self, slack: float = 0.0) -> np.ndarray:
        """Networks within `slack` of the best at no more cost; without slack the front."""
        reach = np.maximum.accumulate(self.score)
        if slack:
            return np.flatnonzero(self.score >= reach - slack)
        return np.flatnonzero(self.score > np.r_[-np.inf, reach[:-1]])

    def _survivors(self, score: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Positions that stay, ascending; the points come sorted by cost, then by falling score."""
        rest = np.arange(len(score))
        kept = np.zeros(0, int)
        while len(kept) < self.size and len(rest):
            reach = np.maximum.accumulate(score[rest])
            leads = np.r_[True, score[rest][1:] > reach[:-1]]
            front, rest = rest[leads], rest[~leads]
            room = self.size - len(kept)
            if len(front) > room:
                gap = _gaps(cost[front]) + _gaps(score[front])
                front = front[np.argsort(-gap, kind="stable")[:room]]
            kept = np.concatenate([kept, front])
        return np.sort(kept)


def _gaps(values: np.ndarray) -> np.ndarray:
    """Distance between both neighbours of each of some sorted values; the ends have infinite."""
    gaps = np.full(len(values), np.inf)
    gaps[1:-1] = (values[2:] - values[:-2]) / (values[-1] - values[0] or 1.0)
    return gaps


def compare_archives(
    evaluate: Evaluate,
    choices: Sequence[int],
    places: Sequence[int],
    kinds: Sequence[int],
    reference: tuple[float, float],
    *,
    generations: Sequence[int],
    seeds: Iterable[int],
) -> pd.DataFrame:
    """The same evolution with bands and with ranks, after the same numbers of evaluations.

    Args:
        evaluate, choices, places, kinds: as for `evolve`.
        reference: cost and negative score below which the hypervolume is taken.
        generations: after how many to look.

    Returns a row per archive, seed and look: ``archive, seed, evaluations, hypervolume, seconds``
    (of the process, for all generations).
    """
    rows = []
    for seed in tqdm(seeds, desc="archives", disable=None):
        for name, archive in (("bands", BandArchive), ("ranks", RankedPopulation)):
            counter = itertools.count()  # a clock that counts generations
            started = time.process_time()
            looks = list(
                evolve(
                    evaluate,
                    choices,
                    places,
                    kinds,
                    seed=seed,
                    checkpoints=generations,
                    archive=archive,
                    clock=counter.__next__,
                )
            )
            seconds = time.process_time() - started
            for look in looks:
                points = np.stack([look.cost, -look.score], axis=1)
                rows.append({
                    "archive": name, "seed": seed, "evaluations": look.evaluations,
                    "hypervolume": hypervolume(points, reference), "seconds": seconds,
                })  # fmt: skip
    return pd.DataFrame(rows)


def gains(table: pd.DataFrame, kind: str, ours: str) -> pd.DataFrame:
    """By how much `ours` covers more than each rival, over paired seeds.

    `table` has a row per `kind` and `seed`. Returns a row per rival: ``gain_pct, low, high, n``,
    geometric means with 95 % t intervals.
    """
    by_kind = table.pivot(index="seed", columns=kind, values="hypervolume")
    rows = {}
    for rival in by_kind.columns.drop(ours):
        ratios = geometric_ratio(by_kind[ours], by_kind[rival])
        rows[rival] = [100 * (ratio - 1) for ratio in ratios]
    found = pd.DataFrame.from_dict(rows, "index", columns=["gain_pct", "low", "high"])
    return found.assign(n=len(by_kind)).rename_axis("rival")


def record_front(
    space: SearchSpace,
    table: pd.DataFrame,
    directions: Mapping[str, str],
    *,
    storage: str | Path,
    name: str,
) -> optuna.Study:
    """Write rows found by another search (`subnet` and measures) into a study, as finished trials.

    So a vectorised search's front lies where every other study does. Rows already there are kept
    once. Returns the study.
    """
    study = open_study(space, directions, storage, name)
    known = measured(study)
    columns = table.select_dtypes("number").columns
    for _, row in table[~table["subnet"].isin(known)].iterrows():
        measures = {column: float(row[column]) for column in columns}
        trial = optuna.trial.create_trial(
            params=params(space, SubnetConfig.parse(row["subnet"])),
            distributions=distributions(space),
            values=[row[key] for key in directions],
            user_attrs={"subnet": row["subnet"], "measures": measures},
        )
        study.add_trial(trial)
    return study
