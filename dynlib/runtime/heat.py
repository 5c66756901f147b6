"""Heat in a run: the board as one warm body, and its own thermal governor, which caps clocks.

The body warms with the power of every instant, exactly. The governor is the kernel's power
allocator between the two passive trips of the board (from 0 C on where it has one trip), polled at
the board's own intervals: below the lower trip clocks are free; from there on each unit may have
the highest clock whose power, at the load since the last poll, fits what it is granted. All units
of the board are its actors and weigh the same. Policies see the caps as any other limit.
"""

import math
from collections.abc import Sequence

from dynlib.boards.board import Board
from dynlib.boards.thermal import Actor, PowerAllocator, ThermalRC, granted_mhz
from dynlib.runtime.conditions import Conditions, static_mw, thermal_facts
from dynlib.runtime.units import UnitRun

# A guess, so every run with heat is labelled `estimated`. A die follows its power within a second,
# a board with its case in minutes. 20 s, on HiKey960 the capacity of 2 g of aluminium (R = 11 K/W,
# C = 1.8 J/K), is a package with a small spreader: slow against a poll, fast against a scenario.
TAU_S = 20.0


class Heat:
    """Temperature and caps of `board`, which is at first as warm as a room.

    `cap_mhz`: per unit, the highest where heat caps nothing. `wait_ms`: until the next poll.
    """

    def __init__(self, board: Board, outside: Conditions):
        """Raises `WorkloadError` for a board without `thermal_facts`."""
        self.board, self.outside, self.facts = board, outside, thermal_facts(board)
        self.body = ThermalRC.of(board, TAU_S)
        trips_c = self.facts.passive_c
        self.switch_on_c = min(trips_c) if len(trips_c) > 1 else 0.0
        self.governor = PowerAllocator(
            self.switch_on_c, max(trips_c), round(self.facts.sustainable_power_mw)
        )
        self.cap_mhz = tuple(unit.max_mhz for unit in board.units)
        self.static_mw = static_mw(board, self.body.temp_c)
        self.power_mw = self.now_ms = self.wait_ms = 0.0
        self.polled_ms = -math.inf
        self.loads = self.busy_ms = (0.0,) * len(board.units)

    def advance(self, now_ms: float) -> float:
        """Warm or cool until now; the temperature."""
        ms = now_ms - self.now_ms
        if ms > 0:
            self.body.step(self.power_mw, ms / 1000)
            self.busy_ms = tuple(
                [busy + ms * load for busy, load in zip(self.busy_ms, self.loads, strict=True)]
            )
            self.now_ms = now_ms
        return self.body.temp_c

    def draws(self, now_ms: float, power_mw: float, units: Sequence[UnitRun]) -> float:
        """Take over power and load from now on; the temperature."""
        temp_c = self.advance(now_ms)
        self.power_mw, self.loads = power_mw, tuple([unit.load for unit in units])
        return temp_c

    def limit(self, now_ms: float, outside: Conditions) -> Conditions:
        """What holds from now on: `outside`, with the lower of its caps and those from heat."""
        self.advance(now_ms)
        self.outside, self.body.ambient_c = outside, outside.ambient_c
        return outside._replace(cap_mhz=tuple(map(min, outside.cap_mhz, self.cap_mhz)))

    def poll(self, now_ms: float, units: Sequence[UnitRun]) -> list[tuple[UnitRun, float]]:
        """What the governor does at a poll: the units whose cap is another now, with that cap."""
        temp_c = self.advance(now_ms)
        span_ms = now_ms - self.polled_ms
        loads = [busy_ms / span_ms for busy_ms in self.busy_ms]
        self.busy_ms, self.polled_ms = (0.0,) * len(loads), now_ms
        self.static_mw = static_mw(self.board, temp_c)
        actors = [_actor(unit, load) for unit, load in zip(units, loads, strict=True)]
        grants = self.governor.grants_mw(temp_c, actors)  # below the lower trip, it forgets
        cool = temp_c < self.switch_on_c
        self.wait_ms = self.facts.polling_ms if cool else self.facts.passive_polling_ms
        before, caps = self.cap_mhz, []
        for unit, grant_mw, load in zip(units, grants, loads, strict=True):
            spec = unit.spec
            caps.append(spec.max_mhz if cool else granted_mhz(spec, grant_mw, load))
        self.cap_mhz = tuple(caps)
        pairs = zip(units, caps, before, strict=True)
        return [(unit, mhz) for unit, mhz, old_mhz in pairs if mhz != old_mhz]


def _actor(unit: UnitRun, load: float) -> Actor:
    """As the kernel: a request is the power of the load at the present clock."""
    spec = unit.spec
    request_mw = round(spec.dynamic_mw(unit.mhz, load))
    return Actor(request_mw, round(spec.dynamic_mw(spec.max_mhz, spec.cores)))
