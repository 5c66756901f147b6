"""What switching costs: the switch itself, and the frame right after it. Knows no torch."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from dynlib.errors import ProfileError
from dynlib.profile.timing import undisturbed

SWITCH_COLUMNS = ("switch_us", "first_frame_us", "next_frame_us", "later_frame_us")


def profile_switches(
    switch: Callable[[str], object],
    frame: Callable[[], object],
    subnets: Sequence[str],
    *,
    count: int,
    rng: np.random.Generator,
    clock: Callable[[], int] = time.process_time_ns,
) -> pd.DataFrame:
    """Switch `count` times in random order, never to the same sub-network twice running.

    Each switch is followed by three frames of the new sub-network. The second is what the first
    would take if the switch left no trace; second against third is the noise of that comparison.

    Args:
        switch: makes the named sub-network serve.
        frame: serves one frame with it.
        clock: nanoseconds; by default CPU time of the process, which other programs do not disturb.

    Returns:
        One row per switch: `subnet`, then the `SWITCH_COLUMNS`.

    Raises `ProfileError` for fewer than two sub-networks or no switch.
    """
    if len(subnets) < 2 or count < 1:
        raise ProfileError(
            f"switching needs two sub-networks and one switch, got {len(subnets)} and {count}"
        )
    order = np.cumsum(rng.integers(1, len(subnets), size=count)) % len(subnets)
    for name in subnets:  # no cold start in the samples
        switch(name)
        for _ in SWITCH_COLUMNS[1:]:
            frame()
    switch(subnets[0])
    rows = []
    with undisturbed():
        for name in (subnets[i] for i in order):
            stamps = [clock()]
            switch(name)
            stamps.append(clock())
            for _ in SWITCH_COLUMNS[1:]:
                frame()
                stamps.append(clock())
            rows.append((name, *np.diff(stamps) / 1e3))
    return pd.DataFrame(rows, columns=["subnet", *SWITCH_COLUMNS])
