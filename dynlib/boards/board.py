"""A board: its units, their clocks, and what running them costs.

Power follows the kernel's energy model (`drivers/opp/of.c`): one fully busy core draws
``P_mw = C * f_mhz * V_mv**2 / 1e9`` with C in uW/MHz/V^2. The kernel knows no static power; a board
adds it. Every coefficient says whether it was published, fitted or estimated, so that each number
computed from a board can be labelled.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from dynlib.errors import BoardError, near

Status = Literal["published", "fitted", "estimated"]  # where a coefficient comes from
_TOLERANCE = 1e-9  # clocks and busy cores come from sums of floats


def lowest_from(freqs: Sequence[float], mhz: float) -> float:
    """The lowest of ascending clocks that is at least `mhz`, else the highest."""
    place = bisect_left(freqs, mhz - _TOLERANCE)
    return freqs[min(place, len(freqs) - 1)]


def highest_to(freqs: Sequence[float], mhz: float) -> float:
    """The highest of ascending clocks that is at most `mhz`, else the lowest."""
    place = bisect_right(freqs, mhz + _TOLERANCE) - 1
    return freqs[max(place, 0)]


@dataclass(frozen=True, slots=True)
class Opp:
    """An operating performance point; `voltage_mv` is 0 where nobody knows it."""

    freq_mhz: float
    voltage_mv: float


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What a layer costs on a unit at its highest clock; see `dynlib.boards.latency`.

    `asynchronous`: the launch of a layer overlaps the work of the one before (GPU), so that the
    larger of the two counts; else (CPU) they add. `cores`: how many cores ran in the measurement.
    """

    overhead_us: float
    us_per_mmac: float
    us_per_mmac_depthwise: float
    us_per_kweight_depthwise: float
    us_per_mbyte: float
    asynchronous: bool
    cores: int
    status: Status


@dataclass(frozen=True, slots=True)
class Unit:
    """A CPU cluster, a GPU or an NPU: everything that shares one clock.

    Args:
        kind: cpu, gpu or npu. Tables and logs have the clock of an NPU where that of a GPU stands.
        c_uw_mhz_v2: dynamic-power coefficient of one core (CPU) or of the whole unit (GPU); None
            where no power model exists.
        idle_fraction: share of the dynamic power that a clocked unit draws while it waits.
        memory_share: share of the run time, at the highest clock, that no clock of this unit
            changes.
        freqs: all clocks in MHz, ascending.
        noise_cv: coefficient of variation of execution times (specs: 0.036 GPU, 0.10 CPU).
        stall_ms: the unit stands still so long when its clock changes.
        settle_ms: a new clock acts after so long (arXiv 2606.16106: CPU 1, GPU 5).
        transition_latency_us: what the driver tells the kernel; sets schedutil's rate limit.
    """

    name: str
    kind: str
    cores: int
    opps: tuple[Opp, ...]
    c_uw_mhz_v2: float | None
    idle_fraction: float
    stall_ms: float
    settle_ms: float
    governor: str
    model: str = ""
    cpus: tuple[int, ...] = ()
    capacity: int = 1024
    transition_latency_us: float = 0.0
    memory_share: float = 0.0
    noise_cv: float = 0.0
    cost: LayerCost | None = None
    c_status: Status = "estimated"
    voltage_status: Status = "estimated"
    idle_status: Status = "estimated"
    memory_share_status: Status = "estimated"
    freqs: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # Not a property: every lookup of a simulation goes through it.
        object.__setattr__(self, "freqs", tuple(opp.freq_mhz for opp in self.opps))

    @property
    def min_mhz(self) -> float:
        """Lowest clock."""
        return self.opps[0].freq_mhz

    @property
    def max_mhz(self) -> float:
        """Highest clock."""
        return self.opps[-1].freq_mhz

    @property
    def power_source(self) -> str:
        """`simulated`, or `estimated` when a power coefficient is a guess."""
        return _source(self.c_status, self.voltage_status, self.idle_status)

    @property
    def latency_source(self) -> str:
        """`simulated`, or `estimated` when a latency coefficient is a guess or missing."""
        return _source(self.memory_share_status, self.cost.status if self.cost else "estimated")

    @property
    def source(self) -> str:
        """The weaker of `power_source` and `latency_source`."""
        return _source(self.power_source, self.latency_source)

    def at_or_above(self, mhz: float) -> float:
        """Lowest clock that is at least `mhz`, else the highest (the kernel's RELATION_L)."""
        return lowest_from(self.freqs, mhz)

    def at_or_below(self, mhz: float) -> float:
        """Highest clock that is at most `mhz`, else the lowest (the kernel's RELATION_H)."""
        return highest_to(self.freqs, mhz)

    def clock_scale(self, freq_mhz: float) -> float:
        """Run time at `freq_mhz` over run time at the highest clock: ``a + (1 - a) * max / f``."""
        if not 0 < freq_mhz <= self.max_mhz * (1 + _TOLERANCE):
            raise BoardError(
                f"{self.name}: clock of {freq_mhz} MHz; "
                f"expected above 0 and up to {self.max_mhz} MHz"
            )
        share = self.memory_share
        return share + (1 - share) * self.max_mhz / freq_mhz

    def memory_scale(self, freq_mhz: float, emc: float) -> float:
        """Run time with the memory clock lowered by `emc`, over that at its highest: the share of a
        frame that no clock of the unit changes waits for memory."""
        if emc == 1:  # nearly always, in a simulation
            return 1.0
        memory = self.memory_share
        compute = (1 - memory) * self.max_mhz / freq_mhz
        return (memory * emc + compute) / (memory + compute)

    def voltage_mv(self, freq_mhz: float) -> float:
        """Voltage of the OPP at or above `freq_mhz`; raises above the highest clock."""
        if not 0 <= freq_mhz <= self.max_mhz + _TOLERANCE:
            raise BoardError(
                f"{self.name}: {freq_mhz} MHz is outside 0..{self.max_mhz} MHz, its highest clock"
            )
        return self.opps[bisect_left(self.freqs, freq_mhz - _TOLERANCE)].voltage_mv

    def dynamic_mw(self, freq_mhz: float, busy: float = 1.0) -> float:
        """C * f * V^2 in mW for `busy` cores (CPU) or a utilisation of `busy` (GPU, 0..1)."""
        if self.c_uw_mhz_v2 is None:
            raise BoardError(f"{self.name}: no power model for this unit")
        if not 0 <= busy <= self.cores + _TOLERANCE:
            raise BoardError(f"{self.name}: busy = {busy}; expected 0..{self.cores}")
        return busy * self.c_uw_mhz_v2 * freq_mhz * self.voltage_mv(freq_mhz) ** 2 / 1e9

    def idle_mw(self, freq_mhz: float) -> float:
        """Power of the clocked unit with nothing to do, above the board's static power."""
        return self.idle_fraction * self.dynamic_mw(freq_mhz, self.cores)

    def power_mw(self, freq_mhz: float, busy: float = 1.0) -> float:
        """Idle power, plus what `busy` adds: the whole of `dynamic_mw` when nothing idles."""
        return self.idle_mw(freq_mhz) + (1 - self.idle_fraction) * self.dynamic_mw(freq_mhz, busy)


@dataclass(frozen=True, slots=True)
class MemoryController:
    """The memory controller: its clocks (voltage 0 = not public) and when a new one acts."""

    model: str
    opps: tuple[Opp, ...]
    settle_ms: float
    status: Status


@dataclass(frozen=True, slots=True)
class Mode:
    """A vendor's power mode: cores per cluster, and caps on the clocks."""

    name: str
    cores: tuple[tuple[str, int], ...]
    cpu_mhz: float
    gpu_mhz: float | None
    emc_mhz: float | None
    budget_w: float | None


@dataclass(frozen=True, slots=True)
class Thermal:
    """Trip points and, where published, the power that can be sustained."""

    zones: str
    status: Status
    passive_c: tuple[float, ...] = ()
    fan_active_c: tuple[float, ...] = ()
    hysteresis_c: float | None = None
    critical_c: float | None = None
    polling_ms: float | None = None
    passive_polling_ms: float | None = None
    sustainable_power_mw: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Meter:
    """A power meter: what it is, what its channels are called, where to read it.

    `total`: the rails whose sum, over all meters, is the power of the whole board.
    """

    kind: str
    label: str
    total: tuple[str, ...] = ()
    path: str = ""
    unit: str = ""
    shunt_uohm: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """A table somebody measured on this board; units are in the column names."""

    what: str
    columns: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]

    def column(self, name: str) -> tuple[float, ...]:
        """One column; raises `BoardError` when there is none of that name."""
        if name not in self.columns:
            raise BoardError(f"measured table: no column {name!r}; {near(name, self.columns)}")
        return tuple(row[self.columns.index(name)] for row in self.rows)


@dataclass(frozen=True, slots=True)
class Board:
    """A board as its file describes it; `digest` is the SHA-256 of that file, which does not count
    when boards are compared.

    `static_slope_per_c`: relative growth of static power per degree above `reference_c`.
    `fitted_within_pct`, `estimated_within_pct`: how far off fitted and guessed coefficients may be,
    either way; the fits of the built-in boards miss their own measurements by up to 5 %.
    """

    name: str
    soc: str
    units: tuple[Unit, ...]
    memory: MemoryController | None
    static_mw: float | None
    static_status: Status
    modes: tuple[Mode, ...]
    thermal: Thermal | None
    sensors: tuple[Meter, ...]
    measured: tuple[Measured, ...]
    digest: str = field(compare=False)
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    static_slope_per_c: float = 0.0
    static_slope_status: Status = "estimated"
    reference_c: float = 40.0
    fitted_within_pct: float = 10.0
    estimated_within_pct: float = 30.0

    @property
    def gpu(self) -> Unit | None:
        """The GPU, if the board has one whose clocks are known."""
        return next((unit for unit in self.units if unit.kind == "gpu"), None)

    @property
    def cpus(self) -> tuple[Unit, ...]:
        """The CPU clusters."""
        return tuple(unit for unit in self.units if unit.kind == "cpu")

    @property
    def power_source(self) -> str:
        """`simulated`, or `estimated` when any power coefficient of the board is a guess."""
        return _source(self.static_status, *(unit.power_source for unit in self.units))

    def unit(self, name: str) -> Unit:
        """The unit of that name; raises `BoardError` naming the ones there are."""
        for unit in self.units:
            if unit.name == name:
                return unit
        known = near(name, (unit.name for unit in self.units))
        raise BoardError(f"board {self.name!r} has no unit {name!r}; {known}")

    def source(self, units_used: Iterable[str]) -> str:
        """Label of a number computed from the static power and these units' coefficients."""
        return _source(self.static_status, *(self.unit(name).source for name in units_used))

    def power_mw(
        self, clocks: Mapping[str, float], busy: Mapping[str, float], temp_c: float | None = None
    ) -> float:
        """Power of the whole board.

        Args:
            clocks: MHz per unit; a unit left out sits at its lowest clock.
            busy: busy cores (CPU) or utilisation 0..1 (GPU) per unit; left out means idle.
            temp_c: of the die, for the static power; None is `reference_c`. The slope is a guess.

        Raises `BoardError` for an unknown unit, and without a power model.
        """
        if self.static_mw is None:
            raise BoardError(f"board {self.name!r}: no power model (its static power is unknown)")
        for name in (*clocks, *busy):
            self.unit(name)
        units_mw = 0.0
        for unit in self.units:
            mhz = clocks.get(unit.name, unit.min_mhz)
            units_mw += unit.power_mw(mhz, busy.get(unit.name, 0.0))
        warmer_c = 0.0 if temp_c is None else temp_c - self.reference_c
        return self.static_mw * (1 + self.static_slope_per_c * warmer_c) + units_mw

    def perturbed(self, count: int, seed: int = 0) -> list["Board"]:
        """`count` boards that this one may be: every guessed and every fitted coefficient drawn
        on its own, even over its interval, as a Latin hypercube (McKay et al. 1979).

        A coefficient is multiplied by 1 +- `fitted_within_pct` or `estimated_within_pct`; shares
        stay at most 1. C and V enter power only as C*V^2: C is drawn for the level of both, V for
        how far the lower clocks are below the voltage of the highest. Units of the same model are
        the same silicon and share their draws. What was published is left alone.
        """
        from scipy.stats import qmc  # the manager reads boards, and does without scipy

        within = self._uncertain()
        if not within:
            return [self] * count
        hypercube = qmc.LatinHypercube(len(within), rng=seed).random(count)
        factors = 1 + (2 * hypercube - 1) * list(within.values())
        return [self._scaled(dict(zip(within, row, strict=True))) for row in factors.tolist()]

    def _uncertain(self) -> dict[tuple[str, str], float]:
        """What nobody has published, as (model, field), and by how much it may be off, from 0."""
        within = {
            "published": 0.0,
            "fitted": self.fitted_within_pct / 100,
            "estimated": self.estimated_within_pct / 100,
        }
        found = {
            ("", "static_mw"): within[self.static_status],
            ("", "static_slope_per_c"): within[self.static_slope_status],
        }
        for unit in self.units:
            model = unit.model or unit.name
            for name, status in _STATUS_OF.items():
                found[model, name] = within[getattr(unit, status)]
            if unit.cost:
                found |= {(model, name): within[unit.cost.status] for name in _COST_TIMES}
        return {key: half for key, half in found.items() if half}

    def _scaled(self, factors: Mapping[tuple[str, str], float]) -> "Board":
        """This board with coefficients multiplied; keys as in `_uncertain`."""
        changes: dict[str, object] = {}
        for name in ("static_mw", "static_slope_per_c"):
            value = getattr(self, name)
            if value is not None:
                changes[name] = value * factors.get(("", name), 1.0)
        units = []
        for unit in self.units:
            model = unit.model or unit.name
            own = {name: factor for (of, name), factor in factors.items() if of == model}
            units.append(_scaled_unit(unit, own))
        return replace(self, units=tuple(units), **changes)


def _source(*statuses: str) -> str:
    return "estimated" if "estimated" in statuses else "simulated"


# The coefficients of a unit, and which of its fields says where they come from.
_STATUS_OF = {
    "c_uw_mhz_v2": "c_status",
    "opps": "voltage_status",
    "idle_fraction": "idle_status",
    "memory_share": "memory_share_status",
}
_COST_TIMES = tuple(name for name in LayerCost.__slots__ if "us" in name.split("_"))


def _scaled_unit(unit: Unit, factors: Mapping[str, float]) -> Unit:
    changes: dict[str, object] = {}
    if unit.c_uw_mhz_v2 is not None and "c_uw_mhz_v2" in factors:
        changes["c_uw_mhz_v2"] = unit.c_uw_mhz_v2 * factors["c_uw_mhz_v2"]
    for share in ("idle_fraction", "memory_share"):
        if share in factors:
            changes[share] = min(getattr(unit, share) * factors[share], 1.0)
    if "opps" in factors:
        top_mv = unit.opps[-1].voltage_mv
        changes["opps"] = tuple(
            replace(opp, voltage_mv=top_mv - (top_mv - opp.voltage_mv) * factors["opps"])
            for opp in unit.opps
        )
    if unit.cost:
        times = {
            name: getattr(unit.cost, name) * factors[name]
            for name in _COST_TIMES
            if name in factors
        }
        changes["cost"] = replace(unit.cost, **times)
    return replace(unit, **changes)
