"""How much slower a network runs beside others.

Two situations. The **same** network served to n clients: what waits runs as one batch, so part of
the time is shared (`Queue`). **Other** applications on the unit: each takes its part of the time
(`Coupling`); on a CPU nearly all of it, on a GPU less, because kernels of two applications overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dynlib.errors import DynlibError


@dataclass(frozen=True, slots=True)
class Queue:
    """Latency of one network with n clients: ``alone * (1 - share)*n + alone * share*min(n, 2)``.

    `share` is the part of `alone_ms` that a batch pays once; the rest is paid per image. From two
    clients on two batches alternate and a client waits for both, see `dynlib.boards.calibration`.
    """

    alone_ms: float
    share: float

    @classmethod
    def fit(cls, alone_ms: float, concurrency: int, latency_ms: float) -> "Queue":
        """From the latency alone and at one more concurrency of at least 3.

        Two clients tell nothing: whatever the share, they wait twice. The further away, the better.
        """
        if concurrency < 3 or not 0 < alone_ms <= latency_ms:
            raise DynlibError(
                f"latency {alone_ms} ms alone, {latency_ms} ms with {concurrency} clients; "
                "expected at least 3 clients, and not faster than alone"
            )
        share = (concurrency - latency_ms / alone_ms) / (concurrency - 2)
        return cls(alone_ms, min(max(share, 0.0), 1.0))

    def latency_ms(self, concurrency: int) -> float:
        """Latency with so many clients."""
        return self.alone_ms * ((1 - self.share) * concurrency + self.share * min(concurrency, 2))


@dataclass(frozen=True, slots=True)
class PublishedCase:
    """A network alone and beside one application, as published: unit, clock, two latencies."""

    name: str
    unit: str
    mhz: float
    alone_ms: float
    beside_ms: float


# Read off two figures of Dynamic-OFA (arXiv 2105.03596), Jetson Xavier NX: 1, points A to H (to
# within 3 %); and 7, level 4 before and after the second application (middle of the ranges).
CASES = (
    PublishedCase("A, C", "gpu", 1100, 43, 50),
    PublishedCase("B, D", "gpu", 803, 50, 69),
    PublishedCase("Fig. 7", "gpu", 1100, 46.5, 62.55),
    PublishedCase("E, G", "cpu", 1400, 570, 1125),
    PublishedCase("F, H", "cpu", 1200, 835, 1445),
)


@dataclass(frozen=True, slots=True)
class Coupling:
    """Slow-down beside other applications: ``1 + kappa * load``, load in fully busy applications.

    `kappa` 1 is time-sharing, 0 is no contention.
    """

    kappa: float

    @classmethod
    def fit(cls, cases: Sequence[PublishedCase]) -> "Coupling":
        """Least squares over cases with one other application."""
        if not cases:
            raise DynlibError("no case to fit a coupling to; expected at least one")
        return cls(sum(case.beside_ms / case.alone_ms - 1 for case in cases) / len(cases))

    def slowdown(self, load: float) -> float:
        """Latency beside others over latency alone."""
        return 1 + self.kappa * load


def judged_cases(cases: Sequence[PublishedCase] = CASES) -> list[dict[str, float | str]]:
    """Each case beside what the other cases of its unit predict for it (leave-one-out)."""
    rows = []
    for case in cases:
        others = [c for c in cases if c.unit == case.unit and c is not case]
        predicted_ms = case.alone_ms * Coupling.fit(others).slowdown(1.0)
        rows.append({
            "case": case.name, "unit": case.unit, "mhz": case.mhz, "alone_ms": case.alone_ms,
            "measured_ms": case.beside_ms, "predicted_ms": predicted_ms,
        })  # fmt: skip
    return rows
