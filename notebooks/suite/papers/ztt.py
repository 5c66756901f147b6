"""A rival that learns clocks by trial and error: tabular Q-learning in the manner of zTT.

zTT (MobiSys 2021) learns CPU and GPU clocks with a deep Q-network from clocks, power, temperature
and frame rate, rewarded for the frame rate kept and the power saved. Ours is small enough for a
table: per unit, the state is whether a frame is there, the present clock, and the load (cycles of
the last frame over those that fit, at the highest clock, before the deadline); the action is a
clock. Network and placement stay as the Linux default has them.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np
import pandas as pd

from dynlib.errors import DynlibError
from dynlib.manager.policy import Action, AppState, State, fifo
from dynlib.runtime.case import Case
from dynlib.runtime.rivals import Static, linux_default
from dynlib.runtime.simulation import Simulation
from dynlib.runtime.summary import MISS_LIMIT_PCT, Run
from suite.studies.compare import compare_policies

MISS_COST = 10.0  # of a missed frame, in energies of a frame at the highest clock
DISCOUNT = 0.8  # per decision: there are two a frame, when it comes and when it is done
EXPLORE = 30.0  # visits of a state after which half of the clocks taken there are random
_LOADS = np.geomspace(0.2, 1.1, 20)  # edges of the bins of load, 9 % apart
_CLOCKS = 4  # groups of present clocks: all that it changes is how slowly a frame starts


@dataclass(frozen=True, eq=False)
class QAgent:
    """Clocks from a learnt table, everything else from `base`; made by `train_agent`.

    Args:
        freqs: the clocks of each unit that it drives.
        values: unit -> value of (frame is there, group of the present clock, bin of load, clock).
        visits: unit -> how often each was tried; given while it trains and takes random clocks.
        draws: seed and episode, which with the number of a decision fix what is random.
    """

    base: Static
    freqs: Mapping[str, tuple[float, ...]]
    values: Mapping[str, np.ndarray]
    visits: Mapping[str, np.ndarray] | None = None
    draws: tuple[int, ...] = ()
    name, static = "q-learning", False
    choose = staticmethod(fifo)

    @property
    def governors(self) -> dict[str, str]:
        """The base's, on the units that it does not drive."""
        return {u: g for u, g in self.base.governors.items() if u not in self.freqs}

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """See `dynlib.manager.policy`; raises `DynlibError` on a board that it was not trained on.

        It remembers the cycles of each app's last frame; in training also what it did when.
        """
        cycles, trail = state.memory or ({}, ())
        cycles = cycles | {f.app: sum(mhz * ms for mhz, ms in f.ran) for f in state.finished}
        rng = np.random.default_rng([*self.draws, len(trail)]) if self.visits else None
        chosen = {}
        for unit, freqs in self.freqs.items():
            if state.targets.get(unit) not in freqs:
                raise DynlibError(f"this agent was trained on a unit {unit!r} with the clocks "
                                  f"{freqs}, found {dict(state.targets)}")  # fmt: skip
            here = [a for a in state.apps if self.base.placements[a.name].unit == unit]
            there = any(a.waiting or a.running for a in here)
            load = _mhz(here, cycles, state.t_ms) / freqs[-1]
            # Without a frame the present clock makes no difference to what comes.
            clock = _CLOCKS * freqs.index(state.targets[unit]) // len(freqs) if there else 0
            at = int(there), clock, int(np.searchsorted(_LOADS, load))
            top = bisect_right(freqs, limits[unit]) or 1
            if rng and rng.random() < EXPLORE / (EXPLORE + self.visits[unit][at].sum()):
                chosen[unit] = (*at, int(rng.integers(top)))
            else:
                chosen[unit] = (*at, int(self.values[unit][at][:top].argmax()))
        trail = (*trail, (state.t_ms / 1000, chosen)) if rng else ()
        clocks = {unit: self.freqs[unit][at[-1]] for unit, at in chosen.items()}
        action = self.base.decide(state, limits)
        return replace(action, clocks=clocks, memory=(cycles, trail), reason=self.name)


def _mhz(apps: Iterable[AppState], cycles: Mapping[str, float], now_ms: float) -> float:
    """The clock at which all frames at hand, each like its app's last one, meet their deadlines;
    of an app without any, one that came now. The work of overdue frames delays the others."""
    frames = []
    for app in apps:
        need = cycles.get(app.name, np.inf)
        here = [(w.deadline_at_ms, need) for w in app.waiting]
        for job in app.running:
            done = sum(mhz * ms for mhz, ms in job.ran)
            here.append((job.deadline_at_ms, max(need - done, 0.0)))
        frames += [*here, (now_ms + app.need.deadline_ms, 0.0 if here else need)]
    frames.sort()
    work = accumulate(cycles for _, cycles in frames)
    left = [(w, due_ms - now_ms) for w, (due_ms, _) in zip(work, frames, strict=True)]
    return max((w / ms for w, ms in left if ms > 0), default=0.0)


def q_update(values: np.ndarray, visits: np.ndarray, steps: Iterable[tuple],
             discount: float = DISCOUNT) -> None:  # fmt: skip
    """Q-learning (Watkins & Dayan 1992) over `steps`, in place.

    A step is (index of state and action, reward, index of the next state or None at the end); the
    learning rate is visits^-0.7 (polynomial: Even-Dar & Mansour, JMLR 2003).
    """
    for at, reward, then in steps:
        visits[at] += 1
        target = reward + (0.0 if then is None else discount * values[then].max())
        values[at] += (target - values[at]) / visits[at] ** 0.7


def train_agent(
    make: Callable[[int], Case], episodes: int = 150, seed: int = 0
) -> tuple[QAgent, pd.DataFrame]:
    """Train on a scenario, an episode a run of it, until the learning curve `is_flat`.

    The reward of a decision is minus the energy above idle until the next one, in energies of a
    frame at the highest clock, and minus `MISS_COST` for every frame missed meanwhile. A clock is
    random with chance `EXPLORE` / (`EXPLORE` + visits of the state), else the most valuable.

    `make`: seed -> case; training uses seeds from 1,000,000 on. Returns the agent, which now
    explores no more, and the learning curve of the one that did: episode, energy_per_frame_mj
    (board energy per on-time frame), miss_pct, reward (per frame). Raises `DynlibError` for a unit
    with nothing to choose and for the table of another board.
    """
    case = make(seed)
    board, tables = case.board, case.tables
    for table in tables.values():
        if other := set(table.frame["board"]) - {board.name}:
            raise DynlibError(f"table of {table.model!r}: it is of board {', '.join(other)}, "
                              f"expected {board.name!r}")  # fmt: skip
    base = linux_default(make, name="q-learning")
    freqs = {u: board.unit(u).freqs for u in sorted({p.unit for p in base.placements.values()})}
    if fixed := [unit for unit, clocks in freqs.items() if len(clocks) < 2]:
        raise DynlibError(f"board {board.name!r}: unit {fixed[0]!r} has one clock, expected more")
    values = {u: np.full((2, _CLOCKS, len(_LOADS) + 1, len(f)), -MISS_COST / (1 - DISCOUNT))
              for u, f in freqs.items()}  # fmt: skip
    for value in values.values():
        value[..., -1] = -1 / (1 - DISCOUNT)  # all that is known is that the highest clock serves
    visits, trusted = {u: np.zeros_like(v) for u, v in values.items()}, dict(values)
    points = [tables[app.model].point(*base.placements[app.name]) for app in case.workload.apps]
    frame_mj = np.mean([p.latency_ms[-1] * p.active_mw[-1] / 1000 for p in points])
    curve: list[tuple[int, float, float, float]] = []
    while len(curve) < episodes and not is_flat([row[-1] for row in curve]):
        number = 1_000_000 + 1000 * seed + len(curve)
        learner = QAgent(base, freqs, trusted, visits, (seed, len(curve)))
        episode = Simulation(make(number), learner, number)
        done = Run(case, episode.run())
        frames = done.frames()
        at_s, chosen = zip(*episode.memory[1], strict=True)
        rewards = _rewards(done.log, frames, at_s, frame_mj, board.power_mw({}, {}))
        for unit in freqs:
            moves = pairwise(did[unit] for did in chosen)
            steps = [(at, r, then[:-1]) for (at, then), r in zip(moves, rewards, strict=True)]
            q_update(values[unit], visits[unit], reversed(steps))
            # Of many guesses the best is too good by chance: what was seldom tried counts less.
            trusted[unit] = values[unit] - 1 / np.sqrt(1 + visits[unit])
            trusted[unit].setflags(write=False)
        served = frames["on_time"].sum()
        curve.append((len(curve), done.energy_mj / max(served, 1),
                      100 * (1 - served / len(frames)), rewards.sum() / len(frames)))  # fmt: skip
    columns = ("episode", "energy_per_frame_mj", "miss_pct", "reward")
    return QAgent(base, freqs, trusted), pd.DataFrame(curve, columns=columns)


def is_flat(rewards: Sequence[float], span: int = 15, share: float = 0.03) -> bool:
    """Whether the mean of the last `span` episodes is within `share` of that of as many before."""
    before, now = np.mean(rewards[-2 * span : -span] or 0.0), np.mean(rewards[-span:] or 0.0)
    return len(rewards) >= 2 * span and bool(abs(now - before) <= share * abs(before))


def matches(
    runs: pd.DataFrame, agent: str = "q-learning", rival: str = "schedutil"
) -> pd.DataFrame:
    """Whether an agent at least matches a rival: `compare_policies` with two columns more.

    energy_ratio: board energy per on-time frame over the rival's; kept: a ratio of at most 1 with
    no less accuracy (equal work) and no more misses than the rival or 1 %, whichever is larger.
    """
    table = compare_policies(runs, rival, agent)
    ratio = table["energy_per_frame_mj_manager"] / table["energy_per_frame_mj_baseline"]
    allowed = table["deadline_miss_pct_baseline"].clip(lower=MISS_LIMIT_PCT)
    equal = table["accuracy_mean_pct_manager"] >= table["accuracy_mean_pct_baseline"] - 1e-6
    kept = equal & (ratio <= 1) & (table["deadline_miss_pct_manager"] <= allowed)
    return table.assign(energy_ratio=ratio, kept=kept)


def _rewards(log, frames, at_s, frame_mj, idle_mw):
    samples = [(e["t_s"], e["power_mw"] - idle_mw) for e in log if e["event"] == "sample"]
    t_s, power_mw = (np.array(column) for column in zip(*samples, strict=True))
    spent_mj = np.append(0.0, np.cumsum(np.diff(t_s) * power_mw[:-1]))
    # What is below its floor is the network's fault, not the clock's.
    missed = frames[~frames["on_time"] & (frames["reason"] != "below floor")]
    end_s = missed["finish_s"].fillna(missed["arrival_s"] + missed["deadline_ms"] / 1000)
    misses = np.searchsorted(np.sort(end_s), at_s, side="right")
    return -np.diff(np.interp(at_s, t_s, spent_mj)) / frame_mj - MISS_COST * np.diff(misses)
