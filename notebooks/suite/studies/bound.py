"""Whether anybody gets below the optimum: policies that try, and what they would have to beat."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynlib.manager.manager import Manager
from dynlib.manager.policy import Action, Placement, Policy, State, edf
from dynlib.runtime.case import Case
from dynlib.runtime.conditions import conditions
from dynlib.runtime.oracle import offered, optimum
from dynlib.runtime.rivals import Static

_SAME_MS = 1e-6


def below_optimum(
    case: Case, policies: Mapping[str, Policy], seed: int = 0, search_s: float = 1.0
) -> list[dict]:
    """One row per policy: policy, on_time (frames), most_on_time (of the optimum), energy_mj, and
    least_mj (of the optimum for the same frames), gap (of the latter), and is_below: it was better
    than the optimum, which is then none."""
    best = optimum(case, seed, search_s=search_s)
    most, rows = best.served, []
    known = {frozenset((frame.app, frame.frame) for frame in offered(case, seed)): best}
    for name, policy in policies.items():
        done = case.simulate(policy, seed)
        frames = done.frames()
        served = frames[frames["on_time"]]
        only = frozenset(zip(served["app"], served["frame"], strict=True))
        if only not in known:  # many serve the same frames
            known[only] = optimum(case, seed, only, search_s)
        same = known[only]
        on_time, energy_mj = len(served), done.energy_mj
        is_below = on_time > most or energy_mj < same.energy_mj * (1 - 1e-9)
        rows.append({
            "policy": name, "on_time": on_time, "most_on_time": most, "energy_mj": energy_mj,
            "least_mj": same.energy_mj, "gap": same.gap, "is_below": is_below,
        })  # fmt: skip
    return rows


def attackers(case: Case, seed: int = 0) -> dict[str, Policy]:
    """Policies from the idle to the clairvoyant, for `below_optimum`."""
    board, apps = case.board, case.workload.apps
    highest = {unit.name: unit.max_mhz for unit in board.units}
    lowest = {unit.name: unit.min_mhz for unit in board.units}
    found: dict[str, Policy] = {
        "manager": Manager(board, case.tables),
        "accurate": Manager(board, case.tables, objective="accuracy"),
        "clairvoyant": Clairvoyant(case, seed),
        "nobody": Static("nobody", dict.fromkeys(app.name for app in apps)),
    }
    for size, which in (("small", 0), ("large", -1)):
        homes = {app.name: case.tables[app.model].main_unit for app in apps}
        main = _placed(case, homes, which)
        governors = {unit.name: unit.governor for unit in board.units}
        found[f"{size}, governed"] = Static("governed", main, governors=governors, choose=edf)
        found[f"{size}, restless"] = Restless(main, lowest, highest)
        for unit in board.units:
            there = _placed(case, dict.fromkeys(homes, unit.name), which)
            for speed, clocks in (("highest", highest), ("lowest", lowest)):
                name = f"{size}, {unit.name}, {speed}"
                found[name] = Static(name, there, clocks, choose=edf)
    return found


def _placed(case: Case, units: Mapping[str, str], which: int) -> dict[str, Placement]:
    """Every app with the fastest (0) or slowest (-1) network of its unit, or of its main one."""
    placed = {}
    for app in case.workload.apps:
        table = case.tables[app.model]
        points = table.on(units[app.name]) or table.on(table.main_unit)
        point = points[which]
        placed[app.name] = Placement(point.subnet, point.unit, point.setting)
    return placed


@dataclass
class Restless:
    """Asks for the lowest and the highest clocks in turn, every 3 ms."""

    placements: Mapping[str, Placement]
    lowest: Mapping[str, float]
    highest: Mapping[str, float]
    name: str = "restless"
    static: bool = False
    governors: Mapping[str, str] = field(default_factory=dict)
    choose = staticmethod(edf)

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """The other clocks."""
        here = {app.name: self.placements[app.name] for app in state.apps}
        clocks = self.highest if int(state.t_ms / 3) % 2 else self.lowest
        return Action(here, clocks, wake_ms=state.t_ms + 3)


class Clairvoyant:
    """Knows noise and conditions: every frame gets the cheapest network and clock in time, alone.

    A unit with nothing to do is at its lowest clock.
    """

    name, static = "clairvoyant", False
    choose = staticmethod(edf)

    def __init__(self, case: Case, seed: int):
        self.case, self.governors = case, {}
        self.under = conditions(case.workload, case.board)
        self.draws: dict[tuple[str, int], float] = {}
        for frame in offered(case, seed):
            key = frame.app, round(frame.start_ms / _SAME_MS)
            self.draws[key] = max(frame.draw, self.draws.get(key, frame.draw))

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """Where the next frame of every app runs, and how fast."""
        now = next(now for t_ms, now in reversed(self.under) if t_ms <= state.t_ms + _SAME_MS)
        clocks = {unit.name: unit.min_mhz for unit in self.case.board.units}
        for app in state.apps:
            for job in app.running:
                clocks[job.unit] = state.targets[job.unit]
        placements = {}
        for app in state.apps:
            if app.waiting:
                frame = min(app.waiting, key=lambda frame: frame.deadline_at_ms)
                draw = self.draws[app.name, round(frame.arrival_ms / _SAME_MS)]
                left_ms = frame.deadline_at_ms - state.t_ms + _SAME_MS
                ways = self._ways(app.model, frame.floor_pct, draw, now, limits)
                in_time = [way for way in ways if way[1] <= left_ms]
                if in_time or ways:
                    _, _, mhz, placement = min(in_time or ways, key=lambda way: way[:3])
                    placements[app.name] = placement
                    clocks[placement.unit] = max(clocks[placement.unit], mhz)
        return Action(placements, clocks)

    def _ways(self, model: str, floor_pct: float, draw: float, now, limits):
        """(mJ above waiting, ms, MHz, placement) of all that can be done with a frame."""
        ways = []
        for unit, stretch in zip(self.case.board.units, now.stretch, strict=True):
            for point in self.case.tables[model].on(unit.name):
                if point.accuracy_val_pct < floor_pct or point.memory_mb > now.memory_mb:
                    continue
                placement = Placement(point.subnet, unit.name, point.setting)
                scale = point.noise(draw) * stretch
                for mhz, ms, mw in zip(unit.freqs, point.latency_ms, point.active_mw, strict=True):
                    if mhz <= limits[unit.name]:
                        ms = ms * scale * unit.memory_scale(mhz, now.emc)
                        ways.append((ms * mw / 1000, ms, mhz, placement))
        return ways
