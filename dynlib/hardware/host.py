"""This machine as a board: its clocks where the kernel tells them, and no guess at its power."""

import hashlib
import platform
from pathlib import Path

import psutil

from dynlib.hardware.board import Board, Opp, Unit

CPUFREQ = Path("/sys/devices/system/cpu/cpufreq")


def host_board(cpufreq: Path = CPUFREQ) -> Board:
    """The machine this runs on; its `power_mw` raises, because nobody fitted a power model.

    One unit per cpufreq policy with its table of clocks (lowest and highest where the driver has no
    table); without cpufreq a single CPU unit with one clock.
    """
    policies = sorted(cpufreq.glob("policy*"), key=lambda p: int(p.name.removeprefix("policy")))
    units = tuple(unit for unit in map(_policy_unit, policies) if unit)
    if not units:
        freq = psutil.cpu_freq()
        mhz = (freq.max or freq.current) if freq else 0.0
        # Where even the clock is hidden (some virtual machines), 1000 MHz stands for "its clock".
        cpus = tuple(range(psutil.cpu_count() or 1))
        units = (_unit("cpu", cpus, (mhz or 1000.0,), "performance", 0.0),)
    name = platform.node() or "this machine"
    return Board(
        name=name,
        soc=platform.machine(),
        units=units,
        memory=None,
        static_mw=None,
        static_status="estimated",
        modes=(),
        thermal=None,
        sensors=(),
        measured=(),
        digest=hashlib.sha256(repr((name, units)).encode()).hexdigest(),
    )


def _policy_unit(policy: Path) -> Unit | None:
    table = _words(policy / "scaling_available_frequencies") or [
        *_words(policy / "cpuinfo_min_freq"),
        *_words(policy / "cpuinfo_max_freq"),
    ]
    try:
        mhz = sorted({int(word) / 1000 for word in table if int(word) > 0})
        cpus = tuple(int(word) for word in _words(policy / "related_cpus"))
        latency_ns = int((_words(policy / "cpuinfo_transition_latency") or ["0"])[0])
    except ValueError:
        return None
    if not mhz or not cpus:
        return None
    governor = (_words(policy / "scaling_governor") or ["performance"])[0]
    unknown_latency = latency_ns >= 2**32 - 1  # the driver gives none
    return _unit(policy.name, cpus, mhz, governor, 0.0 if unknown_latency else latency_ns / 1000)


def _unit(name: str, cpus, mhz, governor: str, latency_us: float) -> Unit:
    return Unit(
        name=name,
        kind="cpu",
        cores=len(cpus),
        opps=tuple(Opp(float(f), 0.0) for f in mhz),
        c_uw_mhz_v2=None,
        idle_fraction=0.0,
        stall_ms=0.1,
        settle_ms=1.0,
        governor=governor,
        model=platform.processor() or platform.machine(),
        cpus=tuple(cpus),
        transition_latency_us=latency_us,
        noise_cv=0.10,
    )


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
