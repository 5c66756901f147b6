"""A duty clock, for machines whose CPU clocks cannot be set: a share of the time at the full one.

A CPU that runs d of every period works like one at d times its clock, frame for frame once these
are longer than a period. It saves no energy of its own, as a lower voltage would, but it leaves
the rest to others, keeps a machine cool, and is a clock that works where there is no other.
"""

import sys

from dynlib.machine.control import Knob, MachineUnit, Parts

STEPS = (0.2, 0.4, 0.6, 0.8, 1.0)
# Short against a frame. The kernel counts in ticks of 1 to 4 ms and makes up for what it missed.
_PERIOD_US = 10_000


def duty_mhz(max_mhz: float) -> tuple[float, ...]:
    """What the steps make of a clock."""
    return tuple([round(max_mhz * step, 3) for step in STEPS])


class _DutyKnob(Knob):
    """The share of its time that each thread of this process may run on `unit`, as a clock.

    It turns the CPU quota of the process, which it takes over: whoever sets one beside it undoes
    what was set before. So many threads count as the numeric library has.
    """

    kind = "clock_mhz"

    def __init__(self, unit: MachineUnit, quota: Knob, max_mhz: float):
        self.unit, self.quota = unit.name, quota
        self.cpus = len(unit.cpus)
        self.choices = duty_mhz(max_mhz)

    def get(self) -> float:
        share = self.quota.get() / (100 * self._threads())
        nearest = min(range(len(STEPS)), key=lambda i: abs(STEPS[i] - min(share, 1.0)))
        return self.choices[nearest]

    def put(self, value: float) -> None:
        share = STEPS[self.choices.index(value)]
        self.quota.period_us = _PERIOD_US
        self.quota.put(100 * share * self._threads() if share < 1 else self.quota.unlimited)

    def _threads(self) -> int:
        library = sys.modules.get("torch")
        return min(library.get_num_threads(), self.cpus) if library else self.cpus


def duty_parts(parts: Parts, max_mhz: float) -> Parts:
    """A duty clock for the CPUs, where nothing among `parts` sets a clock of theirs."""
    cpus = [unit for unit in parts.units if unit.kind == "cpu"]
    quotas = [knob for knob in parts.knobs if knob.kind == "quota_pct"]
    clocked = {knob.unit for knob in parts.knobs if knob.kind == "clock_mhz"}
    if len(cpus) != 1 or not quotas or cpus[0].name in clocked:
        return Parts()
    return Parts(knobs=[_DutyKnob(cpus[0], quotas[0], max_mhz)])
