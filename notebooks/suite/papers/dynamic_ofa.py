"""Dynamic-OFA (arXiv 2105.03596): the operating points it publishes, and its
loop."""

from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from dynlib.boards.board import Board
from dynlib.manager.policy import Action, State, fifo
from dynlib.points import PointTable, Tables, make_table
from dynlib.runtime.rivals import ladder_of

# DynamicOFA (its repository): (name, measured top-1 %, measured ms on the GPU, MMAC, M parameters).
GPU_LEVELS = (
    ("level0", 74.202, 41.159, 235.5, 5.339), ("level1", 74.968, 45.421, 254.0, 5.900),
    ("level2", 76.134, 49.436, 288.8, 6.340), ("level3", 77.540, 51.079, 375.5, 7.121),
    ("level4", 78.346, 56.747, 522.1, 7.766), ("level5", 79.030, 61.735, 731.1, 9.718),
)  # fmt: skip
# Dynamic-OFA (arXiv 2105.03596), figure 4b: (name, top-1 %, ms on the CPU).
CPU_LEVELS = (
    ("cpu0", 72.5, 501.0), ("cpu1", 76.3, 683.0), ("cpu2", 77.1, 875.0), ("cpu3", 77.5, 1173.0),
    ("cpu4", 78.1, 1555.0), ("cpu5", 78.4, 1639.0), ("cpu6", 78.5, 1858.0),
)  # fmt: skip
PUBLISHED_MODEL = "ofa-mbv3-w1.2"
# How long Dynamic-OFA takes to change its network: (who measured it where, ms).
PUBLISHED_SWITCHES = (
    ("MathNAS, of Dynamic-OFA on a Jetson TX2", 244.0),  # MathNAS (NeurIPS 2023)
    # Without any frame in its figure 7: from 1.90 to 2.47 s, 4.99 to 5.60 s and 8.03 to 8.62 s.
    ("gaps in Dynamic-OFA's Fig. 7, Xavier NX", 570.0),
    ("gaps in Dynamic-OFA's Fig. 7, Xavier NX", 610.0),
    ("gaps in Dynamic-OFA's Fig. 7, Xavier NX", 590.0),
)
# Its figure 7, read off: the GPU gets a competitor at about 2.5 s, and 60 ms are allowed. Of each
# level (from s, to s, top-1 %, frames from ms, to ms); the last one goes on to the figure's end.
PUBLISHED_TRACE = (
    (0.0, 1.90, 77.5, 45.0, 48.0), (2.47, 4.99, 77.5, 59.6, 65.5),
    (5.60, 8.03, 76.1, 58.0, 63.0), (8.62, 10.0, 74.9, 50.5, 55.4),
)  # fmt: skip
PUBLISHED_TRACE_RECOVERY_S = 6.0  # from the first frame that is late: 2.47 to 8.62 s, about


def published_frame(board: Board) -> pd.DataFrame:
    """The points that Dynamic-OFA publishes, over the clocks of `board`.

    GPU: six measured levels (`GPU_LEVELS`). CPU: the seven of `CPU_LEVELS`. How
    many cores ran is not published: they are taken as the fastest cluster, all cores busy; a slower
    one takes longer in proportion to capacity, clock and cores. Only the latency at the highest
    clock is published; the other clocks follow a + b/f, and power and energy are the board's, so
    the whole table is labelled with the board's own source.
    """
    rows = []
    speed = {u.name: u.capacity * u.max_mhz * u.cores for u in board.cpus}
    for unit in board.units:
        gpu = unit.kind == "gpu"
        slower = 1.0 if gpu else max(speed.values()) / speed[unit.name]
        busy = 1.0 if gpu else float(unit.cores)
        idle_mw = board.power_mw({}, {})
        for name, accuracy_pct, latency_ms, *size in GPU_LEVELS if gpu else CPU_LEVELS:
            for mhz in unit.freqs:
                scale = slower * unit.clock_scale(mhz)
                scaled_ms = latency_ms * scale
                power_mw = board.power_mw({unit.name: mhz}, {unit.name: busy})
                rows.append(
                    {
                        "model": PUBLISHED_MODEL, "subnet": name, "board": board.name,
                        "unit": unit.name, "cores": busy, "batch": 1,
                        "gpu_mhz" if gpu else "cpu_mhz": mhz,
                        "accuracy_val_pct": accuracy_pct, "accuracy_test_pct": accuracy_pct,
                        "latency_ms": scaled_ms, "power_mw": power_mw,
                        "idle_power_mw": idle_mw, "energy_mj": power_mw * scaled_ms / 1000,
                        "source": board.source([unit.name]),
                        **dict(zip(("macs_m", "params_m"), size, strict=False)),
                    }
                )  # fmt: skip
    return make_table(rows)


def published_tables(board: Board) -> dict[str, PointTable]:
    """`published_frame` as the tables a run takes: one model, `ofa-mbv3-w1.2`."""
    return {PUBLISHED_MODEL: PointTable(published_frame(board), board)}


class _Level(NamedTuple):
    """Where an app stands on its ladder, the highest level not yet failed, and latencies since."""

    level: int
    ceiling: int
    seen_ms: tuple[float, ...]


class Reactive:
    """Dynamic-OFA's loop (demo in its repository): feedback alone, on the network alone.

    The mean of the last 20 latencies of an app above its deadline: one level down, and that level
    is never tried again. Below the floor or never failed, and the mean below 0.9 deadlines: one up.
    """

    name, static = "reactive", False
    choose = staticmethod(fifo)

    def __init__(self, board: Board, tables: Tables, samples: int = 20):
        self.tables, self.samples = tables, samples
        self.governors = {unit.name: unit.governor for unit in board.units}

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """See `dynlib.manager.policy`."""
        memory = dict(state.memory or {})
        placements = {}
        for app in state.apps:
            ladder = ladder_of(self.tables[app.model], app.start_unit)
            before = memory.get(app.name, _Level(0, 0, ()))
            measured = [
                sum(ms for _, ms in frame.ran) for frame in state.finished if frame.app == app.name
            ]
            now = self._react(before, (*before.seen_ms, *measured), app.need.deadline_ms, ladder)
            memory[app.name], placements[app.name] = now, ladder[now.level]
        return Action(placements, memory=memory, reason=self.name)

    def _react(self, before, seen_ms: tuple[float, ...], deadline_ms: float, ladder) -> "_Level":
        """One step down or up the ladder (level 0 is the largest network), or none."""
        level, ceiling, _ = before
        if len(seen_ms) < self.samples:
            return _Level(level, ceiling, seen_ms)
        mean_ms = sum(seen_ms) / len(seen_ms)
        if mean_ms > deadline_ms and level + 1 < len(ladder):
            return _Level(level + 1, level + 1, ())
        if mean_ms < 0.9 * deadline_ms and level > ceiling:
            return _Level(level - 1, ceiling, ())
        return _Level(level, ceiling, seen_ms[-self.samples :])
