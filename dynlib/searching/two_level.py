"""Co-design: backbone, exits, thresholds and three clocks searched together.

HADAS (arXiv 2212.03354) searches at two levels: an outer search over backbones b, and for each an
inner one over exits x and clocks f, whose best value the outer selection sees,

``b* = best of (S(b), D(x*, f* | b))``,  ``D = sum_i N_i * (E_ref / E_i,f)^a * (L_ref / L_i,f)^c``

where S is the accuracy of the static backbone, N_i the share of images that leave at exit i and are
right, and E_i, L_i the energy and time of an image that leaves there. N_i is the dissimilarity of
exits: one that solves no image which an earlier one has not solved adds nothing and costs its
classifier. The released code averages over exits instead, never hands the inner result to the outer
search, and has no energy model; reference values are common here, so D compares backbones.

All exits of a backbone are trained once, so the inner search is a look-up in arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.errors import InfeasibleError
from dynlib.searching.lookup import DESIGN_KNOBS, Lookup
from dynlib.searching.study import BETTER, best_within, search
from dynlib.space import SearchSpace, SubnetConfig

DIRECTIONS = {
    "score": "maximize",
    "accuracy_val_pct": "maximize",
    "energy_mj": "minimize",
    "latency_ms": "minimize",
}
_FAR = 1e9  # no score is so large
_KICK = 0.3  # share of the knobs that are drawn anew to leave a local optimum


def worst_miss(values: Mapping, limits: Mapping[str, float], span: Mapping | None = None):
    """By how much the worst limit is missed, in shares of it or of `span`; 0 where all are kept."""
    scale = limits if span is None else span
    misses = []
    for name, limit in limits.items():
        sign = BETTER[DIRECTIONS[name]]
        short = sign * (limit - values[name])
        misses.append(short / scale[name])
    if not misses:
        return 0.0 * values["score"]  # of the same shape
    worst = np.maximum.reduce(misses)
    return np.maximum(worst, 0)


class _Climb:
    """Points looked up so far, as one number for exits and clocks, and how good they are."""

    def __init__(self, lookup: Lookup, limits: Mapping[str, float], budget: int):
        self.lookup = lookup
        self.limits = limits
        self.budget = budget
        self.sizes = np.array(lookup.sizes)  # choices of every knob: each exit, three clocks
        self.seen: dict[int, float] = {}

    @property
    def is_spent(self) -> bool:
        return len(self.seen) == self.budget

    def look(self, points: np.ndarray) -> np.ndarray:
        """Values of points (n, knobs); of new ones only as many as may still be looked up."""
        flat = np.ravel_multi_index(points.T, self.sizes)
        left = self.budget - len(self.seen)  # the last line may only be looked at in part
        unseen = [i for i in flat if i not in self.seen]
        new = np.array(unseen[:left], int)
        k, f = self.pairs(new)
        values = self.lookup.measure(k, f)
        miss = worst_miss(values, self.limits)
        # What misses a limit is worse than all that does not, the less it misses the better.
        judged = np.where(miss > 0, -_FAR * miss, values["score"])
        self.seen.update(zip(new.tolist(), judged, strict=True))
        known = [self.seen.get(i, -np.inf) for i in flat]
        return np.array(known)

    def pairs(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Exit choice and setting of each point."""
        settings = self.lookup.platform.settings
        return np.divmod(flat, len(settings))

    def ascend(self, point: np.ndarray, knobs: np.ndarray, rng) -> tuple[np.ndarray, float]:
        """The best point that changing one of the `knobs` after the other leads to."""
        level = -np.inf
        stuck = 0  # knobs in a row that did not help
        while stuck < len(knobs):
            for knob in rng.permutation(knobs):
                count = self.sizes[knob]
                line = np.repeat(point[None], count, axis=0)
                line[:, knob] = np.arange(count)
                values = self.look(line)
                best = values.argmax()
                stuck += 1
                if values[best] > level:
                    point = line[best]
                    level = values[best]
                    stuck = 0
        return point, level


def inner_search(
    lookup: Lookup,
    limits: Mapping[str, float] | None = None,
    *,
    evaluations: int,
    seed,
    knobs: Sequence[str] = DESIGN_KNOBS,
    start: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """Climb towards the highest score D within `limits`, one knob at a time.

    From `start`, a choice and a setting; without it from the backbone without exits at the highest
    clocks.

    All values of a knob are looked up at once and the best is kept, until no knob helps; then some
    are drawn anew, or all exits from the choices that are accurate enough (no clock changes that,
    so they are known), and the climb goes on from there. Every exit is a knob, so is every clock.

    Returns the different points looked up, at most `evaluations`, in order, feasible or not;
    `best_within` takes the best.
    """
    limits = dict(limits or {})
    rng = np.random.default_rng(seed)
    k, f = lookup.free(knobs)
    if len(k) * len(f) <= evaluations:
        every_k, every_f = np.meshgrid(k, f, indexing="ij")
        return lookup.table(every_k.ravel(), every_f.ravel())
    climb = _Climb(lookup, limits, evaluations)
    clocks = list(DESIGN_KNOBS[1:])
    exits = len(climb.sizes) - len(clocks)
    kinds = ["exits"] * exits + clocks
    free = np.flatnonzero(np.isin(kinds, knobs))
    settings = len(lookup.platform.settings)
    k, f = start or (len(lookup.choices) - 1, settings - 1)
    digits = np.unravel_index(k * settings + f, climb.sizes)
    point = best = np.array(digits)
    record = -np.inf
    floor_pct = limits.get("accuracy_val_pct", 0)
    accurate = np.flatnonzero(lookup.accuracy_pct >= floor_pct)
    for _ in range(evaluations):
        point, level = climb.ascend(point, free, rng)
        if level > record:
            best = point
            record = level
        if climb.is_spent:
            break
        point = best.copy()
        # From the best so far, changed at random: a new start elsewhere would forget it.
        if "exits" in knobs and len(accurate) and rng.random() < 0.5:
            choice = rng.choice(accurate)
            point[:exits] = lookup.choices[choice]
        else:
            is_drawn = rng.random(len(free)) < _KICK
            drawn = free[is_drawn]
            point[drawn] = rng.integers(0, climb.sizes[drawn])
    seen = np.array(list(climb.seen))
    k, f = climb.pairs(seen)
    return lookup.table(k, f)


def codesign(
    space: SearchSpace,
    lookup: Callable[[SubnetConfig], Lookup],
    *,
    evaluations: int,
    per_backbone: int,
    seed: int,
    limits: Mapping[str, float] | None = None,
    knobs: Sequence[str] = DESIGN_KNOBS,
    slacks_pp: Sequence[float] = (0.0, 1.0, 3.0),
    storage: str | Path | None = None,
    name: str = "codesign",
) -> pd.DataFrame:
    """Both levels: NSGA-II over backbones, each judged by its accuracy and by its inner search.

    For every backbone one inner search runs for each of `slacks_pp`, the points of accuracy that
    may be lost, each from the best of the one before; the first gives the score that the outer
    search sees. Backbones without free knobs have one point each. All backbones are taken in turn
    where the budget allows it; else the outer search is the study `name` in `storage`, as for
    `search`, and a resumed one gives the points of the whole.

    Returns every different point looked up, at most `evaluations`.
    """
    limits = dict(limits or {})
    points: list[pd.DataFrame] = []
    judged: set[str] = set()
    slacks = slacks_pp if "exits" in knobs else slacks_pp[:1]  # clocks lose no accuracy

    def judge(config: SubnetConfig) -> dict[str, float]:
        judged.add(str(config))
        backbone = lookup(config)
        static = float(backbone.accuracy_pct[-1])
        score = 0.0
        start = None
        for i, slack in enumerate(slacks):
            kept = limits | {"accuracy_val_pct": static - slack}
            found = inner_search(
                backbone,
                limits=kept,
                evaluations=per_backbone // len(slacks),
                seed=[seed, i],
                knobs=knobs,
                start=start,
            )
            points.append(found)
            with suppress(InfeasibleError):
                best = best_within(found, "score", DIRECTIONS, kept)
                start = best["choice"], best["setting"]
                score = score or best["score"]
        return {"accuracy_val_pct": static, "score": score}

    trials = max(1, evaluations // per_backbone) if knobs else evaluations
    if trials >= space.size:
        for config in space:
            judge(config)
    else:
        done = search(
            space,
            judge,
            {"accuracy_val_pct": "maximize", "score": "maximize"},
            trials=trials,
            seed=seed,
            population=6,
            start=space.ladder(3),
            storage=storage,
            name=name,
        )
        # A resumed study has judged backbones in an earlier run, whose points are not here yet.
        for earlier in done["subnet"]:
            if earlier not in judged:
                judge(SubnetConfig.parse(earlier))
    table = pd.concat(points, ignore_index=True)
    return table.drop_duplicates(["subnet", "choice", "setting"])
