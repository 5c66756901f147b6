"""The kernel's frequency governors as deterministic state machines (Linux 6.12; podgov: OE4T 5.10).

The formulas are pure functions in the kernel's integers; the classes around them only remember what
the kernel remembers. A simulator calls `update` every `period_ms` with the busy time of the window.
Not modelled: iowait boost, RT, DL and interrupt time, powersave_bias, the re-used load after a long
idle (ondemand); uclamp is the two bounds of `schedutil_perf`.
"""

import math
from typing import ClassVar

from dynlib.boards.board import Unit, highest_to, lowest_from
from dynlib.boards.pelt import CAPACITY_SCALE, Pelt, util_est
from dynlib.errors import DynlibError, near

TICK_MS = 4.0  # CONFIG_HZ = 250


def schedutil_perf(util: int, cap: int, util_min: int = 0, util_max: int | None = None) -> int:
    """`sugov_effective_cpu_perf`: 25 % headroom, between the two bounds (default 0 and `cap`)."""
    highest = cap if util_max is None else min(cap, util_max)
    wanted = util + (util >> 2)
    return max(util_min, min(wanted, highest))


def schedutil_next_khz(util: int, cap: int, max_khz: int) -> int:
    """The frequency schedutil asks for, before it is rounded up to an OPP (`get_next_freq`)."""
    perf = schedutil_perf(util, cap)
    return max_khz * perf // cap


def simple_ondemand_target(
    busy: int, total: int, cur_hz: int, max_hz: int, up: int = 90, down: int = 5
) -> int:
    """What devfreq's simple_ondemand asks for in Hz, before it is rounded up to an OPP."""
    if total == 0 or cur_hz == 0:
        return max_hz
    busy_pct = busy * 100  # of `total`
    if busy_pct > total * up:
        return max_hz
    if busy_pct > total * (up - down):
        return cur_hz
    aim = up - down // 2
    return busy * cur_hz // total * 100 // aim


# Tunables of nvhost_podgov: loads in per mille, damping in tenths.
_LOAD_MAX, _LOAD_TARGET = 900, 700
_BIAS, _SMOOTH, _DAMP = 80, 10, 7


def podgov_step(cur: int, norm: int, avg: int, favg: int, fmax: int) -> tuple[int, int]:
    """One evaluation of nvhost_podgov, in whole MHz: (target before limits, new `favg`).

    `norm` = clock * busy share of the last poll, `avg` its running mean, `favg` the running mean of
    the results. A burst above 900 per mille jumps by a third of the highest clock, undamped.
    """
    highest_boost = fmax // 3
    if 1000 * norm // cur > _LOAD_MAX:
        boost, damp = highest_boost, 10
    else:
        busyness = 1000 * avg // cur
        product = (busyness - _LOAD_TARGET) * _BIAS * cur
        # C divides toward zero: a floor would ask for 1 MHz less on the way down.
        size = abs(product) // (100 * _LOAD_TARGET)
        boost = min(size if product > 0 else -size, highest_boost)
        damp = _DAMP
    result = cur + boost
    favg = (favg * _SMOOTH + result) // (_SMOOTH + 1)
    return (damp * result + (10 - damp) * favg) // 10, favg


def ondemand_target(load: int, min_khz: int, max_khz: int, up_threshold: int = 95) -> int:
    """What ondemand asks for in kHz at `load` percent, before it is rounded to the closest OPP."""
    if load > up_threshold:
        return max_khz
    return min_khz + load * (max_khz - min_khz) // 100


class Governor:
    """Chooses the clock of one unit among those between two limits."""

    period_ms = TICK_MS
    tunables: ClassVar[dict[str, float | None]] = {}

    def __init__(self, unit: Unit, min_mhz: float | None, max_mhz: float | None, **tunables):
        self.unit = unit
        self.set_limits(min_mhz, max_mhz)
        vars(self).update(self.tunables | tunables)
        self.reset()

    def reset(self):
        """Forget the load seen so far."""

    def update(self, now_ms: float, busy_ms: float, total_ms: float, cur_mhz: float) -> float:
        """Target MHz, an OPP of the unit within its limits.

        Args:
            now_ms: time, not decreasing.
            busy_ms: busy time of the unit in the last window; of its busiest core for a CPU.
            total_ms: length of that window.
            cur_mhz: the clock during that window.
        """
        return self._target(now_ms, busy_ms, total_ms, cur_mhz)

    def set_limits(self, min_mhz: float | None = None, max_mhz: float | None = None):
        """Allow only the OPPs from `min_mhz` to `max_mhz`; raises when there is none."""
        low = self.unit.min_mhz if min_mhz is None else min_mhz
        high = self.unit.max_mhz if max_mhz is None else max_mhz
        self.allowed = [f for f in self.unit.freqs if low <= f <= high]
        if not self.allowed:
            raise DynlibError(
                f"{self.unit.name}: no OPP from {low:g} to {high:g} MHz; "
                f"its clocks go from {self.unit.min_mhz:g} to {self.unit.max_mhz:g} MHz"
            )

    def above(self, mhz: float) -> float:
        """Lowest allowed clock >= `mhz`, else the highest (RELATION_L)."""
        return lowest_from(self.allowed, mhz)

    def below(self, mhz: float) -> float:
        """Highest allowed clock <= `mhz`, else the lowest (RELATION_H)."""
        return highest_to(self.allowed, mhz)


class Performance(Governor):
    """Always the highest allowed clock."""

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        return self.allowed[-1]


class Powersave(Governor):
    """Always the lowest allowed clock."""

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        return self.allowed[0]


class Userspace(Governor):
    """The last `setspeed_mhz` written (highest clock before that), rounded up and clamped."""

    tunables: ClassVar = {"setspeed_mhz": math.inf}

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        return self.above(self.setspeed_mhz)


class Schedutil(Governor):
    """PELT utilisation with 25 % headroom, as a share of the highest clock.

    The kernel re-evaluates at every wake-up and tick; here once per tick, and a window in which the
    task ran sees its estimate `util_est`, because its last wake-up did. An idle core has no tick:
    that its clock falls nevertheless stands for the background work every board has.
    """

    tunables: ClassVar = {"rate_limit_us": None}

    def reset(self):
        """Start idle; the default rate limit follows the driver's transition latency."""
        if self.rate_limit_us is None:
            self.rate_limit_us = 1.5 * self.unit.transition_latency_us or 1000.0
        self.pelt = Pelt()
        self.estimate = 0
        self._changed_ms = -math.inf

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        unit, pelt = self.unit, self.pelt
        idle_ms = total_ms - busy_ms
        was_idle = idle_ms > 1e-6  # a rest of adding floats is no idle time
        if busy_ms > 0:
            scale = min(cur_mhz / unit.max_mhz, 1.0) * unit.capacity / CAPACITY_SCALE
            util = pelt.run(busy_ms * 1e6 / 1024, min(scale, 1.0))
            if was_idle:
                self.estimate = util_est(self.estimate, util)
        if was_idle:
            pelt.idle(idle_ms * 1e6 / 1024)
        util = pelt.util_avg
        if busy_ms > 0:
            util = max(util, self.estimate)
        if now_ms - self._changed_ms < self.rate_limit_us / 1000:
            return self.above(cur_mhz)
        cap = unit.capacity
        khz = schedutil_next_khz(min(util, cap), cap, round(unit.max_mhz * 1000))
        target = self.above(khz / 1000)
        if unit.cores == 1 and not was_idle:
            # Its utilisation can only have dropped because others stole time.
            target = max(target, self.above(cur_mhz))
        if target != cur_mhz:
            self._changed_ms = now_ms
        return target


class Ondemand(Governor):
    """Highest clock above 95 % load, else in proportion to the load."""

    period_ms = 2 * TICK_MS
    tunables: ClassVar = {"up_threshold": 95}

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        min_khz = round(self.unit.min_mhz * 1000)
        max_khz = round(self.unit.max_mhz * 1000)
        load = _load(busy_ms, total_ms)
        want = ondemand_target(load, min_khz, max_khz, self.up_threshold) / 1000
        return min(self.allowed, key=lambda f: (abs(f - want), -f))


class Conservative(Governor):
    """Steps of 5 % of the highest clock; what it asked for is kept unrounded in between."""

    period_ms = 2 * TICK_MS
    tunables: ClassVar = {"up_threshold": 80, "down_threshold": 20, "freq_step": 5}

    def reset(self):
        """Ask for the current clock first."""
        self.requested_mhz: float | None = None

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        low, high = self.allowed[0], self.allowed[-1]
        load = _load(busy_ms, total_ms)
        step = self.freq_step * high / 100
        asked = self.requested_mhz
        if asked is None or not low <= asked <= high:
            asked = min(max(cur_mhz, low), high)
        if load > self.up_threshold:
            asked = min(asked + step, high)
            target = self.below(asked)
        elif load < self.down_threshold:
            asked = max(asked - step, low)
            target = self.above(asked)
        else:
            target = self.above(cur_mhz)
        self.requested_mhz = asked
        return target


class SimpleOndemand(Governor):
    """devfreq's simple_ondemand: aims at 88 % busy, holds between 85 and 90 %."""

    period_ms = 50.0
    tunables: ClassVar = {"upthreshold": 90, "downdifferential": 5}

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        busy_us = round(busy_ms * 1000)
        total_us = round(total_ms * 1000)
        cur_hz = round(cur_mhz * 1e6)
        max_hz = round(self.unit.max_mhz * 1e6)
        up, down = self.upthreshold, self.downdifferential
        hz = simple_ondemand_target(busy_us, total_us, cur_hz, max_hz, up, down)
        return self.above(hz / 1e6)


class NvhostPodgov(Governor):
    """The Jetson GPU governor: smoothed load with a bias, at most one change in 50 ms."""

    period_ms = 25.0  # polling interval of nvgpu's devfreq profile
    tunables: ClassVar = {"block_window_ms": 50.0}

    def reset(self):
        """Both means start at 0, and the first evaluation is not blocked."""
        self.avg = self.favg = 0
        self._changed_ms = -math.inf

    def _target(self, now_ms, busy_ms, total_ms, cur_mhz):
        keep = self.above(cur_mhz)
        if total_ms <= 0 or cur_mhz < 1:
            return keep
        cur = int(cur_mhz)
        busy_us = round(busy_ms * 1000)
        total_us = round(total_ms * 1000)
        norm = cur * busy_us // max(total_us, 1)
        self.avg = (self.avg * 10 + norm) // 11
        if now_ms - self._changed_ms < self.block_window_ms:
            return keep
        highest = int(self.unit.max_mhz)
        want, self.favg = podgov_step(cur, norm, self.avg, self.favg, highest)
        target = self.above(want)
        if target != cur_mhz:
            self._changed_ms = now_ms
        return target


GOVERNORS: dict[str, type[Governor]] = {
    "performance": Performance,
    "powersave": Powersave,
    "userspace": Userspace,
    "schedutil": Schedutil,
    "ondemand": Ondemand,
    "conservative": Conservative,
    "simple_ondemand": SimpleOndemand,
    "nvhost_podgov": NvhostPodgov,
}


def make_governor(
    name: str,
    unit: Unit,
    *,
    min_mhz: float | None = None,
    max_mhz: float | None = None,
    **tunables: float,
) -> Governor:
    """A governor by its kernel name; raises `DynlibError` for an unknown name or tunable."""
    if name not in GOVERNORS:
        raise DynlibError(f"unknown governor {name!r}; {near(name, GOVERNORS)}")
    governor = GOVERNORS[name]
    for key in tunables:
        if key not in governor.tunables:
            known = near(key, governor.tunables)
            raise DynlibError(f"governor {name}: unknown tunable {key!r}; {known}")
    return governor(unit, min_mhz, max_mhz, **tunables)


def _load(busy_ms: float, total_ms: float) -> int:
    return int(100 * busy_ms / total_ms) if total_ms > 0 else 0
