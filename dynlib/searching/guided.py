"""A sampler that asks an accuracy predictor where the front would grow most, knowing all costs."""

from collections.abc import Callable

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import TrialState

from dynlib.errors import SearchError
from dynlib.pareto import pareto_mask
from dynlib.searching.predictor import AccuracyPredictor, WorkOf
from dynlib.searching.study import distributions, params
from dynlib.space import SearchSpace, SubnetConfig

DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]


class GuidedSampler(optuna.samplers.BaseSampler):
    """Proposes the sub-network whose predicted point adds most to the hypervolume so far.

    For two objectives: first accuracy, to maximise, then a cost, to minimise, which is known before
    anything is run (a latency table, a board model). The predictor learns from all finished trials
    (predictor-assisted search as in LINAS, arXiv 2202.12954), and every trial is a measured one.

    Args:
        cost: of a sub-network.
        work: what the predictor knows of a sub-network, such as its MACs.
        startup: random trials before the predictor is asked.
        candidates: sub-networks drawn to choose from, half random, half mutants of the front.

    Proposing raises `SearchError` in a study of other objectives.

    >>> space = SearchSpace((32,), ((1, 2, 3),) * 2, ((16, 32, 64),) * 2)
    >>> def work(config):
    ...     return float(sum(config.depth) * sum(config.width))
    >>> def objective(config):
    ...     return {"accuracy_pct": 90 - 100 / work(config), "cost": work(config)}

    >>> guided = GuidedSampler(space, work, work, seed=0)
    >>> goals = {"accuracy_pct": "maximize", "cost": "minimize"}
    >>> len(search(space, objective, goals, trials=12, seed=0, sampler=guided))
    12
    """

    def __init__(
        self,
        space: SearchSpace,
        cost: Callable[[SubnetConfig], float],
        work: WorkOf,
        *,
        seed: int,
        startup: int = 8,
        candidates: int = 300,
    ):
        self._space = space
        self._cost = cost
        self._predictor = AccuracyPredictor(space, work)
        self._startup = startup
        self._candidates = candidates
        self._rng = np.random.default_rng(seed)
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study, trial):
        """Every axis with a choice; all are proposed together."""
        return distributions(self._space)

    def sample_relative(self, study, trial, search_space):
        """The candidate of greatest predicted gain; nothing while starting up."""
        if study.directions != DIRECTIONS:
            names = [direction.name.lower() for direction in study.directions]
            raise SearchError(
                f"objectives to {names}; expected accuracy to maximize, then a cost to minimize"
            )
        done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        seen = {SubnetConfig.parse(t.user_attrs["subnet"]): t.values for t in done}
        if len(seen) < max(5, self._startup):
            return {}
        accuracy, spent = np.array(list(seen.values())).T
        points = np.stack([-accuracy, spent], axis=1)
        on_front = pareto_mask(points)
        best = [config for config, keep in zip(seen, on_front, strict=True) if keep]
        new = [config for config in self._draw(best) if config not in seen]
        if not new:
            return {}
        mean, sd = self._predictor.fit(list(seen), accuracy).predict(new)
        cost = np.array([self._cost(config) for config in new])
        hoped = np.stack([-(mean + sd), cost], axis=1)
        gain = added_area(points[on_front], hoped, reference=points.max(axis=0))
        return params(self._space, new[int(gain.argmax())])

    def sample_independent(self, study, trial, param_name, param_distribution):
        """A random choice, where no proposal was made."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _draw(self, best: list[SubnetConfig]) -> list[SubnetConfig]:
        """Different candidates: half random, half mutants of the `best`."""
        half = self._candidates // 2
        drawn = [self._space.sample(self._rng) for _ in range(half)]
        for _ in range(half):
            parent = best[self._rng.integers(len(best))]
            drawn.append(self._space.mutate(parent, self._rng, 0.3))
        return list(dict.fromkeys(drawn))


def added_area(front: np.ndarray, points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """What each point (N, 2) alone would add to the area that `front` dominates, all minimised."""
    front = front[np.argsort(front[:, 0])]
    # Between two neighbours of the front (or a neighbour and the reference) the free strip reaches
    # up to the left one's second value.
    left = np.r_[-np.inf, front[:, 0]]
    right = np.r_[front[:, 0], reference[0]]
    top = np.r_[reference[1], front[:, 1]]
    width = (right - np.maximum(left, points[:, :1])).clip(0)
    height = (top - points[:, 1:]).clip(0)
    return (width * height).sum(axis=1)
