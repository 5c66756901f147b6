"""What every choice of exits does at every clock: one backbone as arrays to look up in.

The exits of a backbone do not depend on each other (`dynlib.decide.exits`), so what they say is
known once they are trained; what layers cost depends on the clocks alone.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dynlib.boards.platform import Platform
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

    Two images, an exit and the last position, one threshold of 0.8. The exit is sure of the first
    image and wrong about the second; the last position is right about both::

        right = [[1, 1], [0, 1]]; confidence = [[0.9, 1], [0.5, 1]]
        choice 0 (exit in use):      leave 1/2 and 1/2, right 1/2 and 1/2
        choice 1 (exit not in use):  leave 0   and 1,   right 0   and 1
    """
    count, positions = right.shape
    # One bit an image, so that millions of choices fit; a row for each choice made so far.
    all_bits = np.ones((1, count), bool)
    everyone = np.packbits(all_bits, axis=1)
    waiting = everyone
    left = np.zeros((1, 0))
    good = np.zeros((1, 0))
    exits = positions - 1
    # Position by position every choice branches into the options that its exit has.
    for position in range(positions):
        sure = everyone
        if position < exits:
            sure = _sure(confidence[:, position], thresholds)
        leaving = _branch(waiting, sure)
        waiting = _branch(waiting, ~sure)
        correct = np.packbits(right[:, position])
        branches = len(sure)
        left = left.repeat(branches, axis=0)
        left = np.column_stack([left, _count(leaving)])
        good = good.repeat(branches, axis=0)
        good = np.column_stack([good, _count(leaving & correct)])
    # A choice's number, written to the base of the options of an exit, has a digit for each exit.
    options = len(thresholds) + 1
    numbers = np.arange(len(left))
    digits = np.unravel_index(numbers, (options,) * exits)
    choices = np.stack(digits, axis=1)
    return choices, left / count, good / count


def _sure(confidence: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Bits of the images that each option lets go: every threshold, then the exit not in use."""
    least = np.array(thresholds)[:, None]
    passes = confidence >= least
    nobody = np.zeros((1, len(confidence)), bool)
    options = np.concatenate([passes, nobody])
    return np.packbits(options, axis=1)


def _branch(images: np.ndarray, options: np.ndarray) -> np.ndarray:
    """Every row of `images` with every one of `options`, which varies fastest."""
    pairs = images[:, None] & options
    return pairs.reshape(-1, images.shape[1])


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
        self,
        name: str,
        right: np.ndarray,
        confidence: np.ndarray,
        segments: Sequence[Sequence[LayerSpec]],
        heads: Sequence[Sequence[LayerSpec]],
        platform: Platform,
        *,
        batch: int = 1,
        thresholds: Sequence[float] = THRESHOLDS,
        reference: tuple[float, float] | None = None,
        powers: tuple[float, float] = (1.0, 0.0),
    ):
        self.name = name
        self.platform = platform
        self.thresholds = thresholds
        self.powers = powers
        self.choices, self.left, self.good = exit_outcomes(right, confidence, thresholds)
        self.accuracy_pct = 100 * self.good.sum(axis=1)
        count, exits = self.choices.shape
        off = len(thresholds)
        last = np.ones(count, bool)
        self.used = np.column_stack([self.choices < off, last])
        options = (off + 1,) * exits
        self.sizes = (*options, *platform.shape)
        self.segments = [platform.cost(layers, batch) for layers in segments]
        self.heads = [platform.cost(layers, batch) for layers in heads]
        self.reference = 1.0, 1.0  # no matter for energy and time, which are measured next
        if reference is None:
            # The last choice has no exit in use, the last setting the highest clocks.
            fastest = len(platform.settings) - 1
            top = self.measure(count - 1, fastest)
            reference = float(top["energy_mj"]), float(top["latency_ms"])
        self.reference = reference

    def measure(self, k, f) -> dict[str, np.ndarray]:
        """Measures of exit choices `k` at settings `f`, which broadcast.

        `accuracy_val_pct` and `energy_mj` are means over images, `latency_ms` is the time of an
        image that no exit lets go, `score` is D.
        """
        reference_mj, reference_ms = self.reference
        power_mj, power_ms = self.powers
        spent_ms = spent_mj = energy_mj = score = 0.0
        parts = zip(self.segments, self.heads, strict=True)
        for position, (segment, head) in enumerate(parts):
            segment_ms, segment_mj = segment
            head_ms, head_mj = head
            # Every image that comes this far pays for the classifier, if it is in use.
            used = self.used[k, position]
            spent_ms = spent_ms + segment_ms[f] + used * head_ms[f]
            spent_mj = spent_mj + segment_mj[f] + used * head_mj[f]
            leaving = self.left[k, position]
            energy_mj = energy_mj + leaving * spent_mj
            gain = self.good[k, position]
            if power_mj:
                gain = gain * (reference_mj / spent_mj) ** power_mj
            if power_ms:
                gain = gain * (reference_ms / spent_ms) ** power_ms
            score = score + gain
        accuracy = self.accuracy_pct[k] + 0 * energy_mj  # of the same shape
        return {
            "accuracy_val_pct": accuracy,
            "energy_mj": energy_mj,
            "latency_ms": spent_ms,
            "score": score,
        }

    def free(self, knobs: Sequence[str] = DESIGN_KNOBS) -> tuple[np.ndarray, np.ndarray]:
        """Exit choices and settings when only `knobs` may move: else no exits, highest clocks."""
        choices = np.arange(len(self.choices))
        if "exits" not in knobs:
            choices = choices[-1:]
        settings = self.platform.settings
        movable = np.array([knob in knobs for knob in DESIGN_KNOBS[1:]])
        is_highest = settings == settings.max(axis=0)
        allowed = (is_highest | movable).all(axis=1)
        return choices, np.flatnonzero(allowed)

    def table(self, k: np.ndarray, f: np.ndarray) -> pd.DataFrame:
        """One row for each pair of an exit choice and a setting, both (n,)."""
        cpu_mhz, gpu_mhz, emc_mhz = self.platform.settings[f].T
        columns = {
            "subnet": self.name,
            "exits": [self._words(row) for row in self.choices[k]],
            "choice": k,
            "setting": f,
            "cpu_mhz": cpu_mhz,
            "gpu_mhz": gpu_mhz,
            "emc_mhz": emc_mhz,
            **self.measure(k, f),
            "source": str(self.platform.source),
        }
        return pd.DataFrame(columns)

    def _words(self, choice: np.ndarray) -> str:
        """Exits in use with their thresholds, such as ``0@0.8+2@0.9``."""
        off = len(self.thresholds)
        used = []
        for exit, option in enumerate(choice):
            if option < off:
                used.append(f"{exit}@{self.thresholds[option]:g}")
        return "+".join(used) or "none"
