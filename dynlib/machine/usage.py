"""How busy other programs keep the CPUs, from the kernel's own account of them."""

import time
from collections import deque
from collections.abc import Callable, Collection

from dynlib.machine.control import Missing
from dynlib.sysfs import SysFs

_WINDOW_S = 0.05  # the kernel counts in hundredths of a second: of less there is nothing to say


CALM = 0.25  # a share of the CPUs that others may use without being felt


class Usage:
    """What share of some CPUs others use.

    Args:
        cpus: their numbers.
        own_s: CPU time of this process so far.
    """

    def __init__(
        self,
        cpus: Collection[int],
        fs: SysFs | None = None,
        now_s: Callable[[], float] = time.perf_counter,
        own_s: Callable[[], float] = time.process_time,
    ):
        self.names = {f"cpu{cpu}" for cpu in cpus}
        self.fs = fs or SysFs("/")
        self.now_s, self.own_s = now_s, own_s
        # (time, idle time of all the CPUs, own CPU time), the oldest being the last before a window
        self.seen: deque[tuple[float, float, float]] = deque()

    def others(self) -> float | Missing:
        """Share of the CPUs' time that others have used in the last 50 ms, from 0 to 1."""
        try:
            idle_s = self._idle_s()
        except (OSError, ValueError, IndexError) as error:
            return Missing(f"proc/stat: {error}")
        now = self.now_s(), idle_s, self.own_s()
        self.seen.append(now)
        while len(self.seen) > 2 and self.seen[1][0] <= now[0] - _WINDOW_S:
            self.seen.popleft()
        passed_s, idle_s, own_s = (b - a for a, b in zip(self.seen[0], now, strict=True))
        if passed_s < _WINDOW_S:
            return Missing("it has only just begun")
        whole_s = passed_s * len(self.names)
        return min(max((whole_s - idle_s - own_s) / whole_s, 0.0), 1.0)

    def _idle_s(self) -> float:
        """Waiting for a disk is idle too."""
        ticks, missing = 0, set(self.names)
        for line in self.fs.read("proc/stat").splitlines():
            name, _, counts = line.partition(" ")
            if name in missing:
                _, _, _, idle, disk, _ = counts.split(" ", 5)
                ticks += int(idle) + int(disk)
                missing.remove(name)
                if not missing:
                    break
        if missing:
            raise ValueError(f"no {', '.join(sorted(missing))}")
        return ticks / 100
