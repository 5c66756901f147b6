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
from dynlib.search.lookup import DESIGN_KNOBS, Lookup
from dynlib.search.study import BETTER, best_within, search
from dynlib.space import SearchSpace, SubnetConfig

DIRECTIONS = {"score": "maximize", "accuracy_val_pct": "maximize", "energy_mj": "minimize",
              "latency_ms": "minimize"}  # fmt: skip
_FAR, _TIE = 1e9, 1e-12  # no objective is so large; no difference in a limit is so small
_KICK = 0.3  # share of the knobs that are drawn anew to leave a local optimum


def _miss(values: Mapping, limits: Mapping[str, float], span: Mapping | None = None):
    """By how much the worst limit is missed, in shares of it or of `span`; 0 where all are kept."""
    scale = limits if span is None else span
    misses = [BETTER[DIRECTIONS[n]] * (v - values[n]) / scale[n] for n, v in limits.items()]
    return np.maximum(np.maximum.reduce(misses), 0) if misses else 0.0 * values["score"]


def inner_search(
    lookup: Lookup, objective: str = "score", limits: Mapping[str, float] | None = None, *,
    evaluations: int, seed, knobs: Sequence[str] = DESIGN_KNOBS,
    start: tuple[int, int] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Climb from `start`, a choice and a setting, one knob at a time.

    Without it from the backbone without exits at the highest clocks.

    All values of a knob are looked up at once and the best is kept, until no knob helps; then some
    are drawn anew, or all exits from the choices that are accurate enough (no clock changes that,
    so they are known), and the climb goes on from there. Every exit is a knob, so is every clock.

    Returns the different points looked up, at most `evaluations`, in order, feasible or not;
    `best_within` takes the best.
    """
    limits, rng = dict(limits or {}), np.random.default_rng(seed)
    k, f = lookup.free(knobs)
    if len(k) * len(f) <= evaluations:
        return lookup.table(*(m.ravel() for m in np.meshgrid(k, f, indexing="ij")))
    sizes, settings = np.array(lookup.sizes), len(lookup.platform.settings)
    kinds = np.array(["exits"] * (len(sizes) - 3) + list(DESIGN_KNOBS[1:]))
    axes = np.flatnonzero(np.isin(kinds, knobs))
    seen: dict[int, float] = {}

    def look(flat: np.ndarray) -> np.ndarray:
        """Values of points; of those not seen before only as many as may still be looked up."""
        new = np.array([i for i in flat if i not in seen][: evaluations - len(seen)], int)
        values = lookup.measure(new // settings, new % settings)
        miss = _miss(values, limits)
        gain = BETTER[DIRECTIONS[objective]] * values[objective]
        seen.update(zip(new.tolist(), np.where(miss > 0, -_FAR * miss, gain), strict=True))
        return np.array([seen.get(i, -np.inf) for i in flat])

    k, f = start or (len(lookup.choices) - 1, settings - 1)
    best = np.array(np.unravel_index(k * settings + f, sizes))
    record, point, level = -np.inf, best, -np.inf
    enough = np.flatnonzero(lookup.accuracy_pct >= limits.get("accuracy_val_pct", 0))
    for _ in range(evaluations):
        stuck = 0
        while stuck < len(axes):
            for axis in rng.permutation(axes):
                line = np.repeat(point[None], sizes[axis], axis=0)
                line[:, axis] = np.arange(sizes[axis])
                values = look(np.ravel_multi_index(line.T, sizes))
                stuck += 1
                if values.max() > level:
                    point, level, stuck = line[values.argmax()], values.max(), 0
        if level > record:
            best, record = point, level
        if len(seen) == evaluations:
            break
        point, level = best.copy(), -np.inf
        if "exits" in knobs and len(enough) and rng.random() < 0.5:
            point[:-3] = lookup.choices[rng.choice(enough)]
        else:
            drawn = axes[rng.random(len(axes)) < _KICK]
            point[drawn] = rng.integers(0, sizes[drawn])
    found = np.array(list(seen))
    return lookup.table(found // settings, found % settings)


def codesign(
    space: SearchSpace, lookup: Callable[[SubnetConfig], Lookup], *, evaluations: int,
    per_backbone: int, seed: int, limits: Mapping[str, float] | None = None,
    knobs: Sequence[str] = DESIGN_KNOBS, slacks_pp: Sequence[float] = (0.0, 1.0, 3.0),
    population: int = 6, storage: str | Path | None = None, name: str = "codesign",
) -> pd.DataFrame:  # fmt: skip
    """Both levels: NSGA-II over backbones, each judged by its accuracy and by its inner search.

    For every backbone one inner search runs for each of `slacks_pp`, the points of accuracy that
    may be lost, each from the best of the one before; the first gives the score that the outer
    search sees. Backbones without free knobs have one point each. All backbones are taken in turn
    where the budget allows it; else the outer search is the study `name` in `storage`, as for
    `search`, and a resumed one gives the points of the whole.

    Returns every different point looked up, at most `evaluations`.
    """
    limits, points, judged = dict(limits or {}), [], set()
    slacks = slacks_pp if "exits" in knobs else slacks_pp[:1]  # clocks lose no accuracy

    def judge(config: SubnetConfig) -> dict[str, float]:
        judged.add(str(config))
        look, score, start = lookup(config), 0.0, None
        static = float(look.accuracy_pct[-1])
        for i, slack in enumerate(slacks):
            kept = limits | {"accuracy_val_pct": static - slack}
            points.append(inner_search(
                look, limits=kept, evaluations=per_backbone // len(slacks), seed=[seed, i],
                knobs=knobs, start=start,
            ))  # fmt: skip
            with suppress(InfeasibleError):
                best = best_within(points[-1], "score", DIRECTIONS, kept)
                start, score = (best["choice"], best["setting"]), score or best["score"]
        return {"accuracy_val_pct": static, "score": score}

    trials = max(1, evaluations // per_backbone) if knobs else evaluations
    if trials >= space.size:
        for config in space:
            judge(config)
    else:
        goals = {"accuracy_val_pct": "maximize", "score": "maximize"}
        done = search(space, judge, goals, trials=trials, seed=seed, population=population,
                      start=space.ladder(3), storage=storage, name=name)  # fmt: skip
        for earlier in done["subnet"]:
            if earlier not in judged:
                judge(SubnetConfig.parse(earlier))
    return pd.concat(points, ignore_index=True).drop_duplicates(["subnet", "choice", "setting"])
