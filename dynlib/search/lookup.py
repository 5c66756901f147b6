"""What every choice of exits does at every clock: one backbone as arrays to look up in.

The exits of a backbone do not depend on each other (`dynlib.decide.exits`), so what they say is
known once they are trained; what layers cost depends on the clocks alone.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dynlib.boards.platform import Platform
from dynlib.pareto import pareto_mask
from dynlib.space import LayerSpec

DESIGN_KNOBS = ("exits", "cpu", "gpu", "memory")
THRESHOLDS = (0.6, 0.8, 0.9, 0.97)


def exit_outcomes(
    right: np.ndarray, confidence: np.ndarray, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every choice of exits and thresholds does, all at once.

    An image leaves at the first exit in use that is at least as confident as its threshold.

    Args:
        right, confidence: of each image at each of P positions, (N, P); the last always answers.

    Returns:
        Choices (K, P - 1), each the index of a threshold or ``len(thresholds)`` for an exit not in
        use, the last exit's varying fastest; shares of images that leave at each position (K, P),
        and that leave there and are right (K, P).
    """
    count, positions = right.shape
    options = len(thresholds) + 1
    alive = np.packbits(np.ones((1, count), bool), axis=1)  # a bit an image
    left, good = np.zeros((1, 0)), np.zeros((1, 0))
    for p in range(positions):
        sure = np.zeros((options, count), bool)
        sure[:-1] = confidence[:, p] >= np.array(thresholds)[:, None]
        if p == positions - 1:
            sure = np.ones((1, count), bool)
        sure, correct = np.packbits(sure, axis=1), np.packbits(right[:, p])
        leave = (alive[:, None] & sure).reshape(-1, len(correct))
        repeats = len(sure)
        left = np.column_stack([left.repeat(repeats, 0), _count(leave)])
        good = np.column_stack([good.repeat(repeats, 0), _count(leave & correct)])
        alive = (alive[:, None] & ~sure).reshape(-1, len(correct))
    choices = np.stack(np.unravel_index(np.arange(len(left)), (options,) * (positions - 1)), 1)
    return choices, left / count, good / count


def _count(bits: np.ndarray) -> np.ndarray:
    return np.bitwise_count(bits).sum(axis=1, dtype=np.int64)


class Lookup:
    """One backbone on one platform: all that the inner search asks, for K exit choices, F settings.

    Args:
        name: of the backbone.
        right, confidence: of validation images at each position, (N, P).
        segments, heads: layers that lead to each position, and of its classifier (P).
        batch: images a run; a place that an image leaves is taken by the next one.
        reference: energy (mJ) and time (ms) that the score D relates to; default this backbone's
            own without exits at the highest clocks.
        powers: exponents a and c of D.
    """

    def __init__(
        self, name: str, right: np.ndarray, confidence: np.ndarray,
        segments: Sequence[Sequence[LayerSpec]], heads: Sequence[Sequence[LayerSpec]],
        platform: Platform, *, batch: int = 1, thresholds: Sequence[float] = THRESHOLDS,
        reference: tuple[float, float] | None = None, powers: tuple[float, float] = (1.0, 0.0),
    ):  # fmt: skip
        self.name, self.platform, self.thresholds, self.powers = name, platform, thresholds, powers
        self.choices, self.left, self.good = exit_outcomes(right, confidence, thresholds)
        self.accuracy_pct = 100 * self.good.sum(axis=1)
        off = len(thresholds)
        self.used = np.column_stack([self.choices < off, np.ones(len(self.choices), bool)])
        self.sizes = (*(off + 1,) * self.choices.shape[1], *platform.shape)
        self.segments, self.heads = (
            [platform.cost(part, batch) for part in parts] for parts in (segments, heads)
        )
        self.reference = 1.0, 1.0
        top = self.measure(len(self.choices) - 1, len(platform.settings) - 1)
        self.reference = reference or (float(top["energy_mj"]), float(top["latency_ms"]))

    def measure(self, k, f) -> dict[str, np.ndarray]:
        """Measures of exit choices `k` at settings `f`, which broadcast.

        `accuracy_val_pct` and `energy_mj` are means over images, `latency_ms` is the time of an
        image that no exit lets go, `score` is D.
        """
        spent_ms = spent_mj = energy_mj = score = 0.0
        for p, ((ms, mj), (head_ms, head_mj)) in enumerate(
            zip(self.segments, self.heads, strict=True)
        ):
            spent_ms = spent_ms + ms[f] + self.used[k, p] * head_ms[f]
            spent_mj = spent_mj + mj[f] + self.used[k, p] * head_mj[f]
            energy_mj = energy_mj + self.left[k, p] * spent_mj
            gain = self.good[k, p]
            for spent, known, power in zip(
                (spent_mj, spent_ms), self.reference, self.powers, strict=True
            ):
                gain = gain * (known / spent) ** power if power else gain
            score = score + gain
        accuracy = self.accuracy_pct[k] + 0 * energy_mj  # of the same shape
        return {"accuracy_val_pct": accuracy, "energy_mj": energy_mj,
                "latency_ms": spent_ms, "score": score}  # fmt: skip

    def free(self, knobs: Sequence[str] = DESIGN_KNOBS) -> tuple[np.ndarray, np.ndarray]:
        """Exit choices and settings when only `knobs` may move: else no exits, highest clocks."""
        top = self.platform.settings.max(axis=0)
        fixed = np.array([knob not in knobs for knob in DESIGN_KNOBS[1:]])
        f = np.flatnonzero(((self.platform.settings == top) | ~fixed).all(axis=1))
        k = np.arange(len(self.choices))
        return k if "exits" in knobs else k[-1:], f

    def efficient(self, f: np.ndarray) -> np.ndarray:
        """Those of the settings `f` of which no other one is as fast and as frugal in every part.

        Every measure gets worse with the cost of any part, so no optimum lies elsewhere.
        """
        costs = [cost[f] for part in (*self.segments, *self.heads) for cost in part]
        return f[pareto_mask(np.stack(costs, axis=1))]

    def table(self, k: np.ndarray, f: np.ndarray) -> pd.DataFrame:
        """One row for each pair of an exit choice and a setting, both (n,)."""
        clocks = dict(zip(("cpu_mhz", "gpu_mhz", "emc_mhz"), self.platform.settings[f].T,
                          strict=True))  # fmt: skip
        levels = [f"{t:g}" for t in self.thresholds] + [""]
        exits = ["+".join(f"{p}@{levels[c]}" for p, c in enumerate(row) if levels[c]) or "none"
                 for row in self.choices[k]]  # fmt: skip
        return pd.DataFrame({
            "subnet": self.name, "exits": exits, "choice": k, "setting": f, **clocks,
            **self.measure(k, f), "source": str(self.platform.source),
        })  # fmt: skip
