"""Requests of many networks on one device, one segment after the other, without a log.

The loop of the house logs every event of a run; this one only keeps finish times, so that a million
requests are a matter of seconds. Its rules are those of `loop` and `simulation` at a fixed clock,
with late frames kept and the run drained, and the tests hold both to the same finish times.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from dynlib.errors import PolicyError, ProfileError, WorkloadError, near

_LEAST = 0.01  # of the profile's remaining time: a fit must not promise less


class Trace:
    """What the segments of one network took, input by input.

    Args:
        ms: (inputs, segments) time of each segment alone on the device.
        density: of the same shape, the part of each segment's input that is not zero.

    Raises `ProfileError` naming network and input for an empty trace, and for times or densities
    that are NaN, negative, or (densities) zero or above 1.

    >>> Trace("net", [[1.0, 2.0], [1.0, 4.0]]).ms.mean(0)
    array([1., 3.])
    """

    def __init__(self, name: str, ms, density=None):
        self.name = name
        self.ms = np.asarray(ms, float)
        self.density = np.ones_like(self.ms) if density is None else np.asarray(density, float)
        if self.ms.ndim != 2 or self.ms.size == 0 or self.density.shape != self.ms.shape:
            got = f"times {self.ms.shape}, densities {self.density.shape}"
            raise ProfileError(f"trace {name!r}: {got}, expected the same (inputs, segments) > 0")
        self.mean_ms = float(self.ms.sum(1).mean())
        self._check("ms", self.ms, (self.ms > 0) & np.isfinite(self.ms), "a time above 0")
        inside = (self.density > 0) & (self.density <= 1)
        self._check("density", self.density, inside, "above 0, at most 1")

    def of(self, frame: int) -> tuple[list[float], list[float]]:
        """Times and densities of one frame; frames take the inputs in turn."""
        row = frame % len(self.ms)
        return self.ms[row].tolist(), self.density[row].tolist()

    def _check(self, what: str, values: np.ndarray, good: np.ndarray, expected: str) -> None:
        if not good.all():
            at = tuple(int(i) for i in np.argwhere(~good)[0])
            raise ProfileError(
                f"trace {self.name!r}, input {at[0]}, segment {at[1]}, {what}: "
                f"got {values[at]}, expected {expected}"
            )


class Profile:
    """What is known of a network ahead: the means over the inputs of its traces.

    `slope` and `intercept` fit, per number of segments done, the time that remains on the pace so
    far (measured over expected time); `sigma_ms` is what the fit leaves.

    >>> profile = Profile(Trace("net", [[1.0, 2.0], [3.0, 6.0]]))
    >>> profile.rest_ms
    array([6., 4., 0.])
    >>> float(profile.left_by_time(1, 3.0))  # the first segment took 1.5 times the mean
    6.0
    """

    def __init__(self, *traces: Trace):
        ms = np.concatenate([trace.ms for trace in traces])
        self.step_ms = ms.mean(0)
        self.density = np.concatenate([trace.density for trace in traces]).mean(0)
        self.rest_ms = np.append(self.step_ms[::-1].cumsum()[::-1], 0.0)
        self.mean_ms = float(self.rest_ms[0])
        self.done_ms = np.append(1.0, self.step_ms.cumsum())  # nothing done: divide by anything
        cum = _cumulated(ms)
        pace = cum / self.done_ms - 1
        left = cum[:, -1:] - cum
        spread = pace - pace.mean(0)
        variance = (spread**2).mean(0)
        covariance = (spread * left).mean(0)
        varies = variance > 1e-12  # it does not before the first segment
        self.slope = np.divide(covariance, variance, np.zeros_like(variance), where=varies)
        self.intercept = left.mean(0) - self.slope * pace.mean(0)
        self.sigma_ms = (left - self.intercept - self.slope * pace).std(0)

    def left_by_time(self, segment, elapsed_ms):
        """Remaining ms after `segment` segments that took `elapsed_ms`; numbers or arrays."""
        pace = elapsed_ms / self.done_ms[segment] - 1
        left_ms = self.intercept[segment] + self.slope[segment] * pace
        return np.maximum(left_ms, _LEAST * self.rest_ms[segment])

    def left_by_density(self, segment, ratio):
        """Remaining ms if it is denser than the mean by `ratio`, Dysta's gamma."""
        return ratio * self.rest_ms[segment]

    @cached_property
    def row(self) -> "Row":
        """An input that takes the mean times."""
        return rows(Trace("mean", [self.step_ms], [self.density]), self)[0]


def _cumulated(ms: np.ndarray) -> np.ndarray:
    """Time after 0, 1, ... segments."""
    return np.concatenate([np.zeros((len(ms), 1)), ms.cumsum(1)], axis=1)


def density_ratio(density: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Dysta's gamma after 0, 1, ... segments: the mean of density over expected density."""
    ratio = density / mean
    counts = np.arange(1, ratio.shape[1] + 1)
    return np.concatenate([np.ones((len(ratio), 1)), ratio.cumsum(1) / counts], axis=1)


class Row(NamedTuple):
    """One input of one network: its times, and what a scheduler estimates after each segment.

    Entry c of a list is what holds after c segments: `cum_ms` passed, `left_ms` seems to remain,
    so that it seems to take `size_ms` in all. `most_left_ms` and `most_product` bound `left_ms` and
    `size_ms * left_ms` of all later segments. `cheaper` is its ladder: the same input in cheaper
    networks.
    """

    model: str
    cum_ms: list[float]
    left_ms: list[float]
    size_ms: list[float]
    step_ms: list[float]
    sigma_ms: list[float]
    mean_ms: float
    most_left_ms: list[float]
    most_product: list[float]
    cheaper: tuple["Row", ...] = ()


ESTIMATES = ("profile", "density", "time", "exact")


def rows(trace: Trace, profile: Profile, estimate: str = "time", scale: float = 1.0) -> list[Row]:
    """The inputs of a trace as schedulers see them.

    Args:
        profile: what the scheduler was given; of `trace` itself, or pooled with others.
        estimate: what remains is the `profile`'s mean; that times the `density` seen so far, as
            Dysta has it; fitted on the `time` measured so far; or `exact`, which nobody knows.
        scale: of all times, for a cheaper version of the network.

    Raises `ProfileError` for an unknown estimate and for a profile of another network.
    """
    if estimate not in ESTIMATES:
        raise ProfileError(f"unknown estimate {estimate!r}; {near(estimate, ESTIMATES)}")
    count = trace.ms.shape[1]
    if len(profile.step_ms) != count:
        got = f"{count} segments, its profile {len(profile.step_ms)}"
        raise ProfileError(f"trace {trace.name!r}: {got}, expected as many")
    cum = _cumulated(trace.ms)
    after = np.arange(count + 1)
    means = np.full(len(cum), profile.mean_ms)
    sigma = profile.sigma_ms
    if estimate == "time":
        left = profile.left_by_time(after, cum)
    elif estimate == "exact":
        left, means, sigma = cum[:, -1:] - cum, cum[:, -1], np.zeros(count + 1)
    else:
        seen = density_ratio(trace.density, profile.density)
        left = profile.left_by_density(after, seen if estimate == "density" else np.ones_like(cum))
    left[:, -1] = 0.0
    cum, left, means = scale * cum, scale * left, scale * means
    size = cum + left
    later = (np.maximum.accumulate(v[:, ::-1], axis=1)[:, ::-1] for v in (left, size * left))
    steps, sigmas = (scale * profile.step_ms).tolist(), (scale * sigma).tolist()
    return [
        Row(trace.name, passed, remains, whole, steps, sigmas, mean, most, product)
        for passed, remains, whole, mean, most, product in zip(
            *(v.tolist() for v in (cum, left, size, means, *later)), strict=True
        )
    ]


def ladder(full: Sequence[Row], *cheaper: Sequence[Row]) -> list[Row]:
    """The rows of a network that may also be served by cheaper ones, in order of their cost."""
    return [row._replace(cheaper=others) for row, *others in zip(full, *cheaper, strict=True)]


class Request:
    """One request on its way through its segments, as a scheduler sees it.

    Attributes:
        left_ms, size_ms: estimated time that remains, and of the whole.
        mean_ms: what its network takes on average.
        idle_since_ms: when it last ran (first: came).
        row: its times and estimates; the schedulers here read its means alone.
        here: it has come and is not done.
        level: of the ladder of cheaper networks that serves it, 0 the full one.
    """

    __slots__ = (
        "arrival_ms", "deadline_at_ms", "frame", "here", "idle_since_ms", "left_ms", "level",
        "mean_ms", "priority", "row", "segment", "size_ms",
    )  # fmt: skip

    def __init__(self, frame: int, arrival_ms: float, deadline_ms: float, priority: int, row: Row):
        self.frame, self.priority, self.row = frame, priority, row
        self.arrival_ms = self.idle_since_ms = arrival_ms
        self.deadline_at_ms = arrival_ms + deadline_ms
        self.segment = self.level = 0
        self.left_ms = row.left_ms[0]
        self.size_ms = row.size_ms[0]
        self.mean_ms = row.mean_ms
        self.here = False

    def take(self, level: int) -> None:
        """Be served by a cheaper network, or the cheapest that there is."""
        self.level = min(level, len(self.row.cheaper))
        if self.level:
            self.row = self.row.cheaper[self.level - 1]
            self.left_ms, self.size_ms = self.row.left_ms[0], self.row.size_ms[0]
            self.mean_ms = self.row.mean_ms


class Offered(NamedTuple):
    """What is asked for, request by request, in order of arrival: arrays of equal length.

    `model` is a name, `sample` the number of one of its trace's inputs, `deadline_ms` counts from
    the arrival.
    """

    arrival_ms: Sequence[float]
    model: Sequence[str]
    sample: Sequence[int]
    deadline_ms: Sequence[float]
    priority: Sequence[int]

    def requests(self, known: Mapping[str, Sequence[Row]]) -> Iterator[Request]:
        """The requests, made one by one; `known`: model -> the rows of its trace.

        Raises `WorkloadError` naming the request for times that are negative, not finite or out of
        order, a deadline before the arrival, and a model or sample that is not known; and if there
        is no request.
        """
        arrival_ms = np.asarray(self.arrival_ms, float)
        if len(arrival_ms) == 0:
            raise WorkloadError("no requests, expected at least one")
        _refuse(~(arrival_ms >= 0) | np.isinf(arrival_ms), "arrival_ms", arrival_ms, "a time >= 0")
        early = np.diff(arrival_ms, prepend=0.0) < 0
        _refuse(early, "arrival_ms", arrival_ms, "times in ascending order")
        deadline_ms = np.asarray(self.deadline_ms, float)
        _refuse(~(deadline_ms > 0), "deadline_ms", deadline_ms, "a deadline after the arrival")
        for name in set(self.model) - set(known):
            frame = list(self.model).index(name)
            raise WorkloadError(f"request {frame}: no model {name!r}; {near(name, known)}")
        inputs = np.array([len(known[name]) for name in self.model])
        sample = np.asarray(self.sample)
        outside = (sample < 0) | (sample >= inputs)
        _refuse(outside, "sample", sample, "an input of its model's trace")
        offered = (arrival_ms.tolist(), self.model, sample.tolist(), deadline_ms.tolist())
        rest = zip(*offered, list(self.priority), strict=True)
        return (
            Request(frame, arrival, deadline, priority, known[model][input_])
            for frame, (arrival, model, input_, deadline, priority) in enumerate(rest)
        )


def _refuse(bad: np.ndarray, what: str, values: np.ndarray, expected: str) -> None:
    if bad.any():
        frame = int(bad.argmax())
        raise WorkloadError(f"request {frame}, {what}: got {values[frame]}, expected {expected}")


class Drained(NamedTuple):
    """What came of the requests, in the order in which they were offered.

    `switches` counts unfinished requests that had to give way.
    """

    finish_ms: np.ndarray
    level: np.ndarray
    switches: int


def drain(
    requests: Iterable[Request],
    scheduler,
    *,
    switch_ms: float = 0.0,
    rewind: bool = False,
    ask_always: bool = False,
    trail: list | None = None,
) -> Drained:
    """Serve all requests, the next segment always that of the request that the scheduler chooses.

    A scheduler that can tell how long its answer holds (see `schedulers`) is asked again only then
    or when somebody has come; that changes nothing but the time it takes.

    Args:
        requests: in order of arrival.
        switch_ms: lost whenever an unfinished request gives way to another.
        rewind: the clock of the public simulator of Dysta, which goes back to the arrival of a
            request that came during the last segment before the device fell idle.
        ask_always: ask after every segment: the plain loop, to compare with.
        trail: collects (frame, begin in ms, end in ms, first segment, segment after the last).

    Raises `PolicyError` for an answer that is not one of the requests at hand.
    """
    pending = iter(requests)
    coming = next(pending, None)
    ready: list[Request] = []
    frames, finished_ms, levels = [], [], []
    best, hold = scheduler.best, scheduler.hold
    now_ms, start_ms, last, switches = 0.0, 0.0, None, 0
    while ready or coming is not None:
        if not ready and (rewind or coming.arrival_ms > now_ms):
            now_ms = coming.arrival_ms
        while coming is not None and coming.arrival_ms <= now_ms:
            ready.append(coming)
            coming.here = True
            coming = next(pending, None)
        job, rival = best(ready, now_ms)
        if not getattr(job, "here", False):
            raise PolicyError(
                f"{scheduler.name}: chose {job!r} at {now_ms:g} ms, expected one of the "
                f"{len(ready)} requests at hand"
            )
        if job is not last:
            if last is not None:
                switches += 1
                now_ms += switch_ms
            if job.segment == 0 and job.row.cheaper:
                job.take(scheduler.level(job, ready))
            last = job
            # Every later time of this stretch is one sum, however often the scheduler is asked.
            start_ms = now_ms - job.row.cum_ms[job.segment]
        cum_ms, first = job.row.cum_ms, job.segment
        stop = first + 1
        if not ask_always:
            stop = len(cum_ms) - 1 if len(ready) == 1 else hold(job, rival, now_ms)
        if coming is not None and start_ms + cum_ms[stop - 1] >= coming.arrival_ms:
            stop = _seen_at(cum_ms, coming.arrival_ms, start_ms, first + 1, stop)
        begin_ms, now_ms = now_ms, start_ms + cum_ms[stop]
        if trail is not None:
            trail.append((job.frame, begin_ms, now_ms, first, stop))
        if stop + 1 == len(cum_ms):
            ready.remove(job)
            job.here, last = False, None
            frames.append(job.frame)
            finished_ms.append(now_ms)
            levels.append(job.level)
            continue
        job.segment, job.idle_since_ms = stop, now_ms
        job.left_ms, job.size_ms = job.row.left_ms[stop], job.row.size_ms[stop]
    order = np.argsort(frames)
    return Drained(np.array(finished_ms)[order], np.array(levels)[order], switches)


def _seen_at(cum_ms, arrival_ms: float, start_ms: float, low: int, high: int) -> int:
    """The first segment end of `low` to `high` at which somebody who comes has come."""
    stop = bisect_left(cum_ms, arrival_ms - start_ms, low, high)
    # The difference is rounded and the times are sums, so that it may be off by one.
    while stop > low and start_ms + cum_ms[stop - 1] >= arrival_ms:
        stop -= 1
    while stop < high and start_ms + cum_ms[stop] < arrival_ms:
        stop += 1
    return stop
