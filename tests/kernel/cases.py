"""What Linux answers to reads and writes of cpufreq and hotplug files: one table, for the fake tree
and for a real kernel alike."""

import errno
import os
import re
import time
from dataclasses import dataclass, field

import pytest

from dynlib.machine.knobs import CPU

KHZ = (800_000, 1_000_000, 1_200_000, 1_600_000, 2_000_000, 2_400_000)
GOVERNORS = ("conservative", "ondemand", "userspace", "powersave", "performance", "schedutil")


@dataclass(frozen=True)
class Case:
    """Write `steps`, of which only the last may fail, with `error`; then `reads` hold.

    A step is (file, text), a text of None reads; files are relative to policy0, or start with cpu1.
    """

    name: str
    steps: tuple
    error: int = 0
    reads: dict = field(default_factory=dict)


def path(name: str) -> str:
    if name.startswith("policy"):
        return f"{CPU}/cpufreq/{name}"
    switch = name.startswith("cpu") and "/" in name
    return f"{CPU}/{name}" if switch else f"{CPU}/cpufreq/policy0/{name}"


def reset(fs) -> None:
    fs.write(path("cpu1/online"), "1")
    for policy in ("policy0", "policy1"):
        for name, text in (("scaling_governor", "schedutil"), ("scaling_max_freq", "2400000"),
                           ("scaling_min_freq", "800000")):  # fmt: skip
            fs.write(path(f"{policy}/{name}"), text)


def do(fs, name: str, text: str | None) -> None:
    if text is None:
        fs.read(path(name))
    else:
        fs.write(path(name), text)


def run(fs, case: Case) -> None:
    """Assert what the case expects, reading again for a while: a limit may show late."""
    reset(fs)
    *before, last = case.steps
    for step in before:
        do(fs, *step)
    if case.error:
        with pytest.raises(OSError, match=re.escape(os.strerror(case.error))) as caught:
            do(fs, *last)
        assert caught.value.errno == case.error
    else:
        do(fs, *last)
    for name, text in case.reads.items():
        end = time.monotonic() + 0.5
        while (now := fs.read(path(name))) != str(text) and time.monotonic() < end:
            time.sleep(0.005)
        assert now == str(text), f"{name} reads {now}"


GOV, SPEED, LOW, HIGH, CUR = (
    "scaling_governor", "scaling_setspeed", "scaling_min_freq", "scaling_max_freq",
    "scaling_cur_freq",
)  # fmt: skip
US = (GOV, "userspace")
OFF = ("cpu1/online", "0")


def _cases():
    for name in GOVERNORS:
        yield Case(f"governor-{name}", ((GOV, name),), reads={GOV: name})
    for label, text in (("newline", "performance\n"), ("case", "PERFORMANCE")):
        yield Case(f"governor-{label}", ((GOV, text),), reads={GOV: "performance", CUR: 2_400_000})
    yield Case("governor-two-words", ((GOV, "userspace extra"),), reads={GOV: "userspace"})
    for label, text in (("unknown", "nosuch"), ("blank", "\n"), ("long", "x" * 40)):
        yield Case(f"governor-{label}", ((GOV, text),), errno.EINVAL, {GOV: "schedutil"})
    yield Case("governor-powersave-clock", ((GOV, "powersave"),), reads={CUR: 800_000})
    yield Case("governor-empty-write", ((GOV, ""),), reads={GOV: "schedutil"})
    for name in set(GOVERNORS) - {"userspace"}:
        yield Case(f"setspeed-under-{name}", ((GOV, name), (SPEED, "1200000")), errno.EINVAL,
                   {SPEED: "<unsupported>"})  # fmt: skip
    for khz in KHZ:
        yield Case(f"setspeed-{khz}", (US, (SPEED, str(khz))), reads={SPEED: khz, CUR: khz})
        yield Case(f"max-{khz}", ((HIGH, str(khz)),), reads={HIGH: khz, LOW: 800_000})
        yield Case(f"min-{khz}", ((LOW, str(khz)),), reads={LOW: khz, HIGH: 2_400_000})
        yield Case(f"pinned-{khz}", (US, (LOW, str(khz)), (HIGH, str(khz))),
                   reads={CUR: khz, LOW: khz, HIGH: khz})  # fmt: skip
    for text, khz in (("1300000", 1_600_000), ("1", 800_000), ("0", 800_000), ("900000", 1_000_000),
                      ("99999999", 2_400_000), ("2400001", 2_400_000), ("1200000abc", 1_200_000),
                      ("1.2e6", 800_000), ("0x124f80", 800_000)):  # fmt: skip
        yield Case(f"setspeed-rounds-{text}", (US, (SPEED, text)), reads={CUR: khz})
    for text in ("abc", "-5"):
        yield Case(f"setspeed-{text}", (US, (SPEED, "1200000"), (SPEED, text)), errno.EINVAL,
                   {CUR: 1_200_000})  # fmt: skip
    yield Case("min-above-max", ((HIGH, "1200000"), (LOW, "1600000")),
               reads={LOW: 1_200_000, HIGH: 1_200_000})  # fmt: skip
    yield Case("max-below-min", ((LOW, "1200000"), (HIGH, "1000000")),
               reads={LOW: 1_000_000, HIGH: 1_000_000})  # fmt: skip
    yield Case("min-comes-back", ((HIGH, "1200000"), (LOW, "1600000"), (HIGH, "2400000")),
               reads={LOW: 1_600_000, HIGH: 2_400_000})  # fmt: skip
    yield Case("max-rounds-down", ((HIGH, "1500000"),), reads={HIGH: 1_200_000})
    for text in ("0", "1"):
        yield Case(f"max-{text}", ((HIGH, text),), reads={HIGH: 800_000, LOW: 800_000})
    yield Case("max-above-all", ((HIGH, "9999999"),), reads={HIGH: 2_400_000})
    yield Case("min-above-all", ((LOW, "2400001"),), reads={LOW: 2_400_000})
    for name in (LOW, HIGH):
        for text in ("junk", "-1"):
            yield Case(f"{name}-{text}", ((name, text),), errno.EINVAL,
                       {LOW: 800_000, HIGH: 2_400_000})  # fmt: skip
    yield Case("limits-hold-setspeed", (US, (HIGH, "1200000"), (SPEED, "2000000")),
               reads={CUR: 1_200_000})  # fmt: skip
    yield Case("performance-under-max", ((HIGH, "1600000"), (GOV, "performance")),
               reads={CUR: 1_600_000})  # fmt: skip
    for name in ("scaling_available_frequencies", "scaling_available_governors", "related_cpus",
                 "affected_cpus", "cpuinfo_max_freq", CUR):  # fmt: skip
        yield Case(f"write-{name}", ((name, "1"),), errno.EACCES)
    yield Case("no-hardware-clock", (("cpuinfo_cur_freq", None),), errno.ENOENT)
    yield Case("first-cpu-has-no-switch", (("cpu0/online", None),), errno.ENOENT)
    yield Case("online-junk", (("cpu1/online", "junk"),), errno.EINVAL, {"cpu1/online": 1})
    yield Case("offline-twice", (OFF, OFF), reads={"cpu1/online": 0})
    for name in (GOV, HIGH, "affected_cpus", "related_cpus"):
        yield Case(f"offline-read-{name}", (OFF, (f"policy1/{name}", None)), errno.EBUSY)
    for name, text in ((GOV, "performance"), (HIGH, "1200000")):
        yield Case(f"offline-write-{name}", (OFF, (f"policy1/{name}", text)), errno.EBUSY)
    yield Case("offline-other-policy", (OFF, US, (SPEED, "1600000")), reads={CUR: 1_600_000})
    governor, high = f"policy1/{GOV}", f"policy1/{HIGH}"
    yield Case("online-keeps-its-state",
               ((governor, "userspace"), (high, "1600000"), OFF, ("cpu1/online", "1")),
               reads={governor: "userspace", high: 1_600_000})  # fmt: skip


CASES = sorted(_cases(), key=lambda case: case.name)
