"""A program with a numpy network of three widths, managed by the service: serves until stopped.

python numpy_program.py NAME SOCKET: prints a line whenever who manages it has changed.
"""

import sys
import time
from pathlib import Path

import numpy as np

from dynlib.deploy.client import Client

WIDTHS = {"small": 64, "middle": 128, "large": 256}
ACCURACY_PCT = {"small": 70.0, "middle": 75.0, "large": 80.0}
FRAME_MS = 200.0  # of the largest: so much that what emulation adds to every message is little
MAX_KHZ = 2_400_000
DEPTH, BATCH = 4, 64
name, path = sys.argv[1:]
weights = np.random.default_rng(0).standard_normal((DEPTH, 256, 256), dtype=np.float32)
frame = np.ones((BATCH, 256), dtype=np.float32)


def answer(subnet: str, repeats: int = 1) -> None:
    """Each sub-network is a prefix of the largest one's weights."""
    width = WIDTHS[subnet]
    for _ in range(repeats):
        x = frame[:, :width]
        for layer in weights:
            x = np.maximum(x @ layer[:width, :width], 0)


def stretched(cpus: tuple[int, ...]) -> int:
    """Repeats of a frame at the clock in force, which changes no emulated CPU's speed by itself."""
    (cpu,) = cpus or (0,)
    clock = Path(f"/sys/devices/system/cpu/cpufreq/policy{cpu}/scaling_cur_freq")
    return round(repeats * MAX_KHZ / int(clock.read_text()))


def latency_ms(subnet: str, repeats: int = 1) -> float:
    times = []
    for _ in range(5):
        began = time.perf_counter()
        answer(subnet, repeats)
        times.append(1000 * (time.perf_counter() - began))
    return sorted(times)[2]


repeats = max(round(FRAME_MS / latency_ms("large")), 1)
table = [
    {"subnet": subnet, "unit": unit, "latency_ms": ms, "accuracy_val_pct": ACCURACY_PCT[subnet],
     "source": "measured"}
    for subnet, ms in ((subnet, latency_ms(subnet, repeats)) for subnet in WIDTHS)
    for unit in ("first", "second")
]  # fmt: skip
managed = None
need = {"deadline_ms": 3000.0, "period_ms": 1500.0, "accuracy_floor_pct": 80.0}
with Client(name, table, path=path, **need) as client:
    while True:
        order = client.ask()
        if order:
            answer(order.subnet, stretched(order.cpus))
            client.done()
        if client.managed != managed:
            managed = client.managed
            print(time.monotonic(), int(managed), client.problem, flush=True)  # noqa: T201
        time.sleep(0.5)
