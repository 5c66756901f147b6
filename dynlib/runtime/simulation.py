"""A run on a simulated board, event by event.

Rules a number depends on, beside those of `loop`:
- the speed of a job follows the clock of its unit, and power is constant between events;
- a requested clock acts after the unit's settling time, a newer request replaces an older one; a
  cap acts at once, whatever was requested; and when a clock acts the unit stands still for the
  stall time (drawing the power of the new clock);
- competitors that stretch execution by x keep 1 - 1/x of the unit busy while none of our jobs runs;
- changing an app's sub-network costs `switch_ms` before its next frame, at full power;
- heat plays a part only where the workload changes the air (see `heat`); a cap from it is a `set`
  for the reason "heat", with the highest clock the unit may have.
"""

import math
from collections.abc import Mapping
from time import process_time
from types import MappingProxyType

from dynlib.boards.board import Unit
from dynlib.boards.governors import make_governor
from dynlib.errors import PolicyError, WorkloadError, near
from dynlib.manager.policy import Action, Policy, State
from dynlib.runtime.conditions import Conditions, Setup
from dynlib.runtime.drain import Trace
from dynlib.runtime.heat import Heat
from dynlib.runtime.jobs import Job
from dynlib.runtime.loop import CHANGE, CLOCK, DONE, TICK, Loop, Observed
from dynlib.runtime.units import UnitRun
from dynlib.source import weakest
from dynlib.workload import Workload

_LOOKS = {TICK}  # most of what happens, so it has to be quick
SWITCH_MS = 1.0  # at most: 99 % of switches between prepared networks take less


class Simulation(Loop):
    """The simulated world.

    Args:
        switch_ms: cost of another sub-network.
        displace_ms: cost of another job while the last one is not done.
        traces: app -> what its frames take, one by one; a point's latency is that of their mean.
        decision_ms: a list that collects how much CPU time each decision took.

    Raises `WorkloadError` for a workload without an end or whose frames are pushed, and for the
    trace of an unknown app; `BoardError` for a board without a power model.
    """

    def __init__(
        self,
        case: Setup,
        policy: Policy,
        seed: int = 0,
        *,
        switch_ms: float = SWITCH_MS,
        displace_ms: float = 0.0,
        traces: Mapping[str, Trace] = MappingProxyType({}),
        decision_ms: list[float] | None = None,
    ):
        board = case.board
        board.power_mw({}, {})  # raises for a board without a power model
        _check_times(case.workload)
        warms = any(change.ambient_c is not None for change in case.workload.changes)
        power_source = "estimated" if warms else board.power_source
        source = weakest(power_source, *(table.source for table in case.tables.values()))
        super().__init__(case, policy, seed, str(source))
        self.switch_ms, self.displace_ms = switch_ms, displace_ms
        self.decision_ms = decision_ms
        for app, trace in traces.items():
            if app not in self.apps:
                raise WorkloadError(f"trace of app {app!r}: no such app; {near(app, self.apps)}")
            self.apps[app].trace = trace
        self.units = {unit.name: _unit_run(unit, policy) for unit in board.units}
        self.heat = None if self.now.ambient_c is None else Heat(board, self.now)
        self.last_power_mw = math.nan
        self.handlers |= {DONE: self.on_done, CLOCK: self.on_clock, TICK: self.on_tick}

    def wait(self, until_ms: float) -> float:
        """Time passes at once."""
        return until_ms

    def clock_ms(self) -> float:
        """The time of what is being handled."""
        return self.now_ms

    def schedule(self) -> None:
        """The polls of heat, and those of governors, too."""
        if self.heat:
            self.push(0.0, CHANGE, self.heat)
        super().schedule()
        for unit in self.units.values():
            if unit.governor:
                self.push(unit.governor.period_ms, TICK, unit)

    def free(self) -> list[str]:
        """The units that have nothing to do."""
        return [name for name, unit in self.units.items() if unit.job is None and not unit.lost]

    def dispatch(self, place: str, job: Job) -> None:
        """Run the next segment of a job on a unit."""
        unit = self.units[place]
        unit.advance(self.now_ms)
        self._wake_governor(unit)
        if job.point is None:
            self.start(job, self.switch_ms)
        if job.share <= 0:
            job.share = job.shares[job.segment]
        if unit.last not in (None, job):
            job.fixed_ms += self.displace_ms
        unit.job = unit.last = job
        self._reschedule(unit)

    def settle(self) -> None:
        """As everywhere. Where governors have looked at their units, and no more, none has come
        free and none draws another power: only time has passed for the frames that wait."""
        if self.happened != _LOOKS or self.heat:
            super().settle()
        elif self.late == "drop":
            waiting = [run for run in self.apps.values() if run.waiting]
            if waiting and self.free():
                for run in waiting:
                    self.drop_expired(run)

    def sample(self, last: bool = False) -> None:
        """Log the power of the board where it changes."""
        more = {}
        static_mw = (self.heat or self.board).static_mw
        power_mw = static_mw + sum([unit.power_mw() for unit in self.units.values()])
        if self.heat:
            last = last or self.heat.polled_ms == self.now_ms
            more["temp_c"] = self.heat.draws(self.now_ms, power_mw, [*self.units.values()])
        if power_mw != self.last_power_mw or last:
            self.last_power_mw = power_mw
            self.log.add(self.now_ms / 1000, "sample", power_mw=power_mw, **more)

    def on_change(self, change) -> None:
        """Heat is polled; all else as everywhere."""
        if not isinstance(change, Heat):
            super().on_change(change)
            return
        capped = change.poll(self.now_ms, [*self.units.values()])
        for unit, cap_mhz in capped:
            self._log_clock(unit, cap_mhz, "heat")
        if capped:
            self.impose(change.outside)
        self.push(self.now_ms + change.wait_ms, CHANGE, change)

    def impose(self, now: Conditions) -> None:
        """Heat may cap what others allow."""
        super().impose(self.heat.limit(self.now_ms, now) if self.heat else now)

    def constrain(self, unit: str, stretch: float, cap_mhz: float, emc: float) -> None:
        """What others do to a unit changes its speed, its clock, or takes it away."""
        run = self.units[unit]
        run.advance(self.now_ms)
        self._wake_governor(run)
        run.impose(stretch, cap_mhz, emc)
        above = run.mhz > run.cap_mhz
        if above:
            run.mhz = run.cap_mhz
            run.frozen_ms = self.now_ms + run.spec.stall_ms
        self._request(run, min(run.target_mhz, run.cap_mhz), "cap")
        if above:
            self._log_clock(run, run.mhz, "acts")
        self._reschedule(run)

    def evict(self, job: Job) -> None:
        """A frame that runs leaves its unit."""
        unit = self.units[job.point.unit]
        if unit.job is job:
            unit.advance(self.now_ms)
            unit.job = None
            self._reschedule(unit)
        if unit.last is job:
            unit.last = None
        super().evict(job)

    def on_done(self, item) -> None:
        """A segment has ended, unless it has been rescheduled since."""
        unit, token = item
        if token != unit.token:
            return
        unit.advance(self.now_ms)
        job, unit.job = unit.job, None
        job.ended_ms = self.now_ms
        if job.end_segment():
            unit.last = None
            self.finish(job)

    def _reschedule(self, unit: UnitRun) -> None:
        unit.token += 1
        if unit.job is not None:
            begin_ms = max(self.now_ms, unit.frozen_ms) + unit.job.fixed_ms
            left_ms = max(unit.job.share, 0.0) * unit.job_ms(unit.job)
            self.push(begin_ms + left_ms, DONE, (unit, unit.token))

    # Clocks.

    def request(self, unit: str, mhz: float) -> None:
        """A clock that the policy wants; units under a governor do not obey it."""
        run = self.units[unit]
        if mhz != run.target_mhz and run.governor is None:
            self._request(run, mhz, "policy")

    def _request(self, unit: UnitRun, mhz: float, reason: str) -> None:
        if mhz == unit.target_mhz:
            return
        if mhz not in unit.freq_index:
            known = unit.spec.freqs
            raise PolicyError(f"{unit.spec.name}: {mhz} MHz is not one of its clocks {known}")
        mhz = min(mhz, unit.cap_mhz)
        if mhz != unit.target_mhz:
            unit.target_mhz = mhz
            unit.asked += 1
            self._log_clock(unit, mhz, reason)
            # A request that returns to the present clock only cancels the one under way.
            if mhz != unit.mhz:
                self.push(self.now_ms + unit.spec.settle_ms, CLOCK, (unit, mhz, unit.asked))

    def on_clock(self, item) -> None:
        """A requested clock acts, unless another was requested since."""
        unit, mhz, asked = item
        if asked != unit.asked:
            return
        unit.advance(self.now_ms)
        unit.mhz = mhz
        unit.frozen_ms = self.now_ms + unit.spec.stall_ms
        self._log_clock(unit, mhz, "acts")
        self._reschedule(unit)

    def _log_clock(self, unit: UnitRun, mhz: float, reason: str) -> None:
        field = "cpu_mhz" if unit.spec.kind == "cpu" else "gpu_mhz"
        self.log.add(self.now_ms / 1000, "set", unit=unit.spec.name, reason=reason, **{field: mhz})

    def on_tick(self, unit: UnitRun) -> None:
        """A governor looks at its unit."""
        unit.advance(self.now_ms)
        self._request(unit, unit.tick(self.now_ms), unit.spec.governor)
        if not unit.asleep:
            self.push(self.now_ms + unit.governor.period_ms, TICK, unit)

    def _wake_governor(self, unit: UnitRun) -> None:
        if unit.asleep:
            self.push(unit.catch_up(self.now_ms), TICK, unit)

    # Decisions.

    def consult(self, state: State, limits: Mapping[str, float]) -> Action:
        """Ask the policy, and time it if somebody wants to know."""
        if self.decision_ms is None:
            return super().consult(state, limits)
        begin = process_time()
        action = super().consult(state, limits)
        self.decision_ms.append((process_time() - begin) * 1000)
        return action

    def observe_units(self) -> Observed:
        """Clocks and power of the board as it would show them."""
        clocks, targets = {}, {}
        for name, unit in self.units.items():
            if unit.job is not None:
                unit.advance(self.now_ms)
            clocks[name] = unit.mhz
            targets[name] = unit.target_mhz
        temp_c = self.heat.advance(self.now_ms) if self.heat else math.nan
        return Observed(clocks, targets, self.last_power_mw, temp_c)


def _check_times(workload: Workload) -> None:
    if math.isinf(workload.horizon_s):
        raise WorkloadError(f"{workload.name}: no horizon_s; a simulation needs one")
    for app in workload.apps:
        if app.arrival == "pushed":
            raise WorkloadError(
                f"{workload.name}: app {app.name!r}: nobody knows when frames will be pushed; "
                "a simulation needs another arrival, such as their trace"
            )


def _unit_run(unit: Unit, policy: Policy) -> UnitRun:
    name = policy.governors.get(unit.name)
    return UnitRun(unit, make_governor(name, unit) if name else None)
