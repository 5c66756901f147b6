"""What it is worth to know the noise of a frame ahead, as the optimum does and no policy can.

All that a policy learns of a frame that runs is that it has not ended yet. So, once network and
unit are chosen, it is no more than a clock for every share of the work done (PACE: Lorch and Smith,
IEEE Transactions on Computers, 2004): with S(x) the probability that the work exceeds x, and ms(f)
and mJ(f) those of all the work at clock f,

    min over f(x) of  int S(x) mJ(f(x)) dx  s.t.  int ms(f(x)) dx <= window,

both up to the quantile that has to be in time: a linear programme with one constraint, whose dual
is a concave function of its price.
"""

from collections import Counter

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from dynlib.errors import DynlibError
from dynlib.pareto import lower_hull
from dynlib.points import Point
from dynlib.runtime.case import Case
from dynlib.runtime.oracle import offered

_STEPS = 1000  # shares of the work, and draws of the noise


def foresight(case: Case, seed: int = 0, late_pct: float = 1.0) -> float:
    """Least energy above idle that a policy needs which does not know the noise, over that of one
    which does: no policy is expected to be nearer to `optimum`.

    Each frame counts as if it had the board for itself from arrival to deadline, at clocks that
    cost no time to change; competitors, caps and heat are left out.

    Args:
        late_pct: of the frames of either kind, at most so many may be late.

    Raises `DynlibError` where no network at all is that often in time.
    """
    kinds = Counter((f.model, round(f.end_ms - f.start_ms, 6), f.floor_pct)
                    for f in offered(case, seed))  # fmt: skip
    known, blind, in_time = 0.0, 0.0, 1 - late_pct / 100
    for (model, window_ms, floor_pct), count in kinds.items():
        points = [p for unit in case.board.units for p in case.tables[model].on(unit.name)
                  if p.accuracy_val_pct >= floor_pct - 1e-9]  # fmt: skip
        pairs = [(_known_uj(p, window_ms, in_time), _blind_uj(p, window_ms, in_time))
                 for p in points]  # fmt: skip
        each, least = np.min([k for k, _ in pairs], 0), min(b for _, b in pairs)
        if not np.isfinite(least):
            raise DynlibError(
                f"{case.workload.name}: no network with {floor_pct:g} % is in time within "
                f"{window_ms:g} ms in {100 * in_time:g} % of the cases"
            )
        known += count * each[np.isfinite(each)].mean()
        blind += count * least
    return blind / known


def _known_uj(point: Point, window_ms: float, in_time: float) -> np.ndarray:
    """Energy of the shortest frames, `_STEPS` of them equally likely, each at its best mix of
    clocks; inf: too long."""
    ms, uj = np.array(lower_hull(zip(point.latency_ms, _uj(point), strict=True))).T
    draws = norm.ppf((np.arange(_STEPS) + 0.5) / _STEPS * in_time)
    work = np.array([point.noise(z) for z in draws])
    return work * np.interp(window_ms / work, ms, uj, left=np.inf)


def _blind_uj(point: Point, window_ms: float, in_time: float) -> float:
    """Expected energy of the best clock for every share of the work; inf: too long."""
    ms, uj = np.array(point.latency_ms), np.array(_uj(point))
    sigma, worst = point.sigma, point.noise(norm.ppf(in_time))
    step = worst / _STEPS
    share = (np.arange(_STEPS) + 0.5) * step
    longer = norm.sf((np.log(share) + sigma**2 / 2) / max(sigma, 1e-9))

    if worst * ms.min() > window_ms:
        return np.inf

    def dual(price: float) -> float:
        return price * window_ms - (longer[:, None] * uj + price * ms).min(1).sum() * step

    highest = np.ptp(uj) / np.diff(np.sort(ms)).min(initial=window_ms)
    return -float(minimize_scalar(dual, bounds=(0, highest), method="bounded").fun)


def _uj(point: Point) -> list[float]:
    return [ms * mw for ms, mw in zip(point.latency_ms, point.active_mw, strict=True)]
