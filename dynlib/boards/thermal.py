"""Temperature of a board, and the kernel's power allocator (IPA, Linux 6.12).

One thermal resistance and one capacity: ``C dT/dt = P - (T - ambient)/R``. Where a board publishes
its sustainable power at its highest passive trip, R follows; the time constant is a guess.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dynlib.errors import DynlibError

AMBIENT_C = 25.0  # of a room


@dataclass
class ThermalRC:
    """A board as one warm body.

    Args:
        r_k_w: thermal resistance to the air, K/W.
        tau_s: time constant ``R * C``.
    """

    r_k_w: float
    tau_s: float
    ambient_c: float = AMBIENT_C
    temp_c: float = math.nan

    def __post_init__(self):
        if self.r_k_w <= 0 or self.tau_s <= 0:
            raise DynlibError(f"R = {self.r_k_w} K/W, tau = {self.tau_s} s; expected above 0")
        if math.isnan(self.temp_c):
            self.temp_c = self.ambient_c

    @classmethod
    def of(cls, board, tau_s: float, ambient_c: float = AMBIENT_C) -> "ThermalRC":
        """R from the sustainable power and the highest passive trip of a board's file."""
        thermal = board.thermal
        if thermal is None or not thermal.sustainable_power_mw or not thermal.passive_c:
            raise DynlibError(f"board {board.name!r} publishes no sustainable power and trip")
        rise_k = max(thermal.passive_c) - ambient_c
        sustained_w = thermal.sustainable_power_mw / 1e3
        return cls(rise_k / sustained_w, tau_s, ambient_c)

    def step(self, power_mw: float, seconds: float) -> float:
        """Temperature after `seconds` at constant power; exact, so any step length will do."""
        final_c = self.ambient_c + self.r_k_w * power_mw / 1e3
        left = math.exp(-seconds / self.tau_s)
        self.temp_c = final_c + (self.temp_c - final_c) * left
        return self.temp_c


@dataclass(frozen=True, slots=True)
class Actor:
    """Something that draws power and can be told to draw less."""

    request_mw: int
    max_mw: int
    weight: float = 1.0


class PowerAllocator:
    """The IPA governor: a PID controller of the power budget, in the kernel's integers.

    Args:
        switch_on_c: below it full power is allowed and the controller forgets.
        control_c: the temperature it holds.
        sustainable_mw: the power that can be sustained there.
    """

    _BITS = 10

    def __init__(self, switch_on_c: float, control_c: float, sustainable_mw: int):
        self.switch_on = round(1000 * switch_on_c)
        self.control = round(1000 * control_c)
        range_mc = self.control - self.switch_on
        if range_mc <= 0:
            raise DynlibError(
                f"control at {control_c} C, switch-on at {switch_on_c} C; expected it above"
            )
        self.sustainable_mw = sustainable_mw
        scaled = sustainable_mw << self._BITS
        self.k_po = scaled // range_mc
        self.k_pu = 2 * scaled // range_mc
        self.k_i = max(self.k_pu // 10, 1)
        self.error_sum = 0

    def budget_mw(self, temp_c: float, max_mw: int) -> int:
        """Power that may be drawn until the next poll, at most `max_mw`.

        Errors are summed only above the control temperature (cutoff 0) and only while the integral
        term stays below the highest power.
        """
        temp = round(1000 * temp_c)
        if temp < self.switch_on:
            self.error_sum = 0
            return max_mw
        error = self.control - temp
        too_hot = error < 0
        proportional = (self.k_po if too_hot else self.k_pu) * error
        integral = self.k_i * self.error_sum
        grown = integral + self.k_i * error
        if too_hot and abs(grown) < max_mw << self._BITS:
            integral = grown
            self.error_sum += error
        correction = (proportional + integral) >> self._BITS
        return min(max(self.sustainable_mw + correction, 0), max_mw)

    def grants_mw(self, temp_c: float, actors: Sequence[Actor]) -> list[int]:
        """The budget shared by weighted requests; what one cannot use goes to the others.

        With 900 mW for requests of 600 and 300 mW of which the first can use 400 at most, the
        first gets these and the other, if it can use them, the 300 it asked for and 200 more.
        """
        budget = self.budget_mw(temp_c, sum(actor.max_mw for actor in actors))
        wanted = [actor.weight * actor.request_mw for actor in actors]
        total = sum(wanted) or 1.0
        fair = [round(want * budget / total) for want in wanted]
        most = [actor.max_mw for actor in actors]
        grants = [min(share, high) for share, high in zip(fair, most, strict=True)]
        room = [high - grant for high, grant in zip(most, grants, strict=True)]
        all_room = sum(room)
        extra = min(sum(fair) - sum(grants), all_room)
        if extra > 0:
            more = [r * extra // all_room for r in room]
            grants = [grant + mw for grant, mw in zip(grants, more, strict=True)]
        return grants


def granted_mhz(unit, grant_mw: float, load: float) -> float:
    """Highest clock whose power at the last `load` (busy cores, or 0..1 for a GPU) fits a grant."""
    fits = [f for f in unit.freqs if unit.dynamic_mw(f, load) <= grant_mw]
    return fits[-1] if fits else unit.min_mhz
