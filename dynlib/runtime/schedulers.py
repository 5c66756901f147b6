"""Who runs next on a device that many networks share: pure functions of the requests at hand.

A scheduler's ``choose(ready, now_ms)`` returns one of `ready`, which is in order of arrival, to run
until its next segment ends. What it reads are the attributes of `drain.Request`. Two more methods
save time and change nothing: ``best`` returns also what the answer was measured by, and
``hold(job, that, now_ms)`` up to which segment it surely stays the same while nobody comes.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from dynlib.errors import PolicyError, near
from dynlib.manager.policy import Action, Policy, State
from dynlib.manager.policy import Ready as Job
from dynlib.runtime.drain import Profile, Request

Ready = Sequence[Request]
SURE = 1 - 1e-9  # a bound holds with so much to spare, whatever was rounded
_LATE = 0.1  # weight of a request that `Strict` has given up


class Scheduler:
    """What schedulers have in common; a subclass has a `name` and `best` or `choose`."""

    name = ""

    def choose(self, ready: Ready, now_ms: float) -> Request:
        """One of `ready`."""
        return self.best(ready, now_ms)[0]

    def best(self, ready: Ready, now_ms: float) -> tuple[Request, object]:
        """The choice, and what `hold` has to know of the others."""
        return self.choose(ready, now_ms), None

    def hold(self, job: Request, rival, now_ms: float) -> int:
        """The segment before which the choice of `job` stays the same, if nobody comes."""
        return job.segment + 1

    def level(self, job: Request, ready: Ready) -> int:
        """How far down its ladder a request starts; 0: the full network."""
        return 0


@dataclass(frozen=True)
class Fcfs(Scheduler):
    """First come, first served."""

    name: str = "FCFS"

    def choose(self, ready: Ready, now_ms: float) -> Request:
        """The first to come."""
        return ready[0]

    def hold(self, job: Request, rival, now_ms: float) -> int:
        """To its end."""
        return len(job.row.cum_ms) - 1


@dataclass(frozen=True)
class Index(Scheduler):
    """Ours: the largest worth per size and remaining time, a missed deadline being dear.

        index = v / (size (left + switch)),
        v = 1 + dear exp(-slack / (patience mean)) while there is slack,
        v = 1 + old exp(-(time to 5 deadlines) / (10 mean)) after that

    dear = 0 minimises mean slowdown on average if estimates are exact (SPTP in M/G/1).

    Args:
        dear: what a miss weighs; 1 and a patience of 4 are balanced, 2.8 and 1.7 miss less.
        switch_ms: what it costs to displace the unfinished request that ran last.
        old: above 0 late requests age, so that none waits for ever.
        backlog: above 0 a request that starts takes level g of its ladder, the first with
            (sum of left / mean of all at hand) <= backlog (g + 1).
    """

    dear: float = 1.0
    patience: float = 4.0
    switch_ms: float = 0.0
    old: float = 0.0
    backlog: float = 0.0
    name: str = "balanced"

    def best(self, ready: Ready, now_ms: float) -> tuple[Request, tuple[float, float]]:
        """The highest index (the earliest of equals); the second one, and the shortest mean."""
        dear, patience, switch_ms, old = self.dear, self.patience, self.switch_ms, self.old
        chosen, highest, second, shortest_ms = None, -1.0, -1.0, math.inf
        for job in ready:
            left_ms, mean_ms = job.left_ms, job.mean_ms
            slack_ms = job.deadline_at_ms - now_ms - left_ms
            if switch_ms and not (job.segment and job.idle_since_ms == now_ms):
                left_ms += switch_ms
            index = 1 / (job.size_ms * left_ms)
            if slack_ms >= 0:
                index *= 1 + dear * math.exp(-slack_ms / (patience * mean_ms))
            elif old:
                again_ms = slack_ms + 4 * (job.deadline_at_ms - job.arrival_ms)
                index *= 1 + old * math.exp(-max(again_ms, 0.0) / (10 * mean_ms))
            if mean_ms < shortest_ms:
                shortest_ms = mean_ms
            if index > highest:
                chosen, highest, second = job, index, highest
            elif index > second:
                second = index
        return chosen, (second, shortest_ms)

    def hold(self, job: Request, rival: tuple[float, float], now_ms: float) -> int:
        """To its end if it stays above the rivals, whose worth grows by its exponential at most."""
        second, shortest_ms = rival
        row, stop = job.row, job.segment + 1
        end = len(row.cum_ms) - 1
        # A late rival jumps to another curve, of which only the height is a bound.
        fastest_ms = self.patience * shortest_ms if not self.old else 1e-9
        ms = row.cum_ms[end] - row.cum_ms[job.segment]
        growth = min(1 + max(self.dear, self.old), math.exp(min(ms / fastest_ms, 700.0)))
        return end if second * growth * row.most_product[stop] < SURE else stop

    def level(self, job: Request, ready: Ready) -> int:
        """How far down its ladder a request starts."""
        if not self.backlog:
            return 0
        work = sum([other.left_ms / other.mean_ms for other in ready])
        return max(math.ceil(work / self.backlog) - 1, 0)


@dataclass(frozen=True)
class Strict(Scheduler):
    """Ours, deadlines first: the largest 1 / (size left) that makes nobody late.

    Moore and Hodgson's rule says which requests can be in time in order of their deadlines: as long
    as their remaining times add up to too much, the longest is given up. The others keep a slack,
    which a request with a later deadline may use up to `reserve` mean times.
    """

    reserve: float = 0.5
    name: str = "strict"

    def choose(self, ready: Ready, now_ms: float) -> Request:
        """The best of those that everybody before them can afford."""
        if len(ready) == 1:
            return ready[0]
        order = sorted(ready, key=_DEADLINE)
        kept = in_time(order, now_ms)
        reserve_ms = self.reserve * sum([job.mean_ms for job in ready]) / len(ready)
        chosen, highest, sum_ms, spare_ms = None, 0.0, 0.0, math.inf
        given_up = []
        for job in order:
            if job not in kept:
                given_up.append(job)
                continue
            left_ms = job.left_ms
            if spare_ms >= left_ms + reserve_ms:  # the first one always may
                index = 1 / (job.size_ms * left_ms)
                if index > highest:
                    chosen, highest = job, index
            sum_ms += left_ms
            spare_ms = min(spare_ms, job.deadline_at_ms - now_ms - sum_ms)
        for job in given_up:
            if spare_ms >= job.left_ms + reserve_ms:
                index = _LATE / (job.size_ms * job.left_ms)
                if index > highest:
                    chosen, highest = job, index
        return chosen


def in_time(order: Ready, now_ms: float) -> set[Request]:
    """The most requests that can be in time by their estimates; `order` is that of the deadlines.

    Example: with 3, 4 and 2 ms left and due in 4, 6 and 7 ms, the second would end at 7 > 6 ms, so
    that the longest so far, itself, is given up; the others end at 3 and 5 ms.
    """
    heap, sum_ms = [], 0.0
    for i, job in enumerate(order):
        ms = job.deadline_at_ms - now_ms
        if job.left_ms > ms:
            continue
        heapq.heappush(heap, (-job.left_ms, i))
        sum_ms += job.left_ms
        if sum_ms > ms + job.row.sigma_ms[job.segment]:
            sum_ms += heapq.heappop(heap)[0]
    return {order[i] for _, i in heap}


@dataclass(frozen=True)
class Ordered:
    """A policy for the loop of the house: `base` decides, a scheduler says who is next.

    Args:
        profiles: app -> what is known of its network ahead.
        by_density: remaining time is estimated from densities, as Dysta has it; default: from the
            time that a frame has taken so far, which holds at a fixed clock.
        late: see `dynlib.manager.policy`.
    """

    base: Policy
    scheduler: Scheduler
    profiles: Mapping[str, Profile]
    by_density: bool = False
    late: str = "keep"

    @property
    def name(self) -> str:
        """The scheduler's."""
        return self.scheduler.name

    @property
    def static(self) -> bool:
        """That of `base`, as are its governors."""
        return self.base.static

    @property
    def governors(self) -> Mapping[str, str]:
        """Those of `base`."""
        return self.base.governors

    def decide(self, state: State, limits: Mapping[str, float]) -> Action:
        """What `base` decides."""
        return self.base.decide(state, limits)

    def choose(self, ready: Sequence[Job], now_ms: float) -> Job:
        """The scheduler's choice; raises `PolicyError` for an app without a profile."""
        jobs = sorted(ready, key=_ARRIVAL)
        requests = [self._request(job) for job in jobs]
        chosen = self.scheduler.choose(requests, now_ms)
        return next((j for j, r in zip(jobs, requests, strict=True) if r is chosen), chosen)

    def elapsed_ms(self, job: Job) -> float:
        """How long a frame has run, at the clock of its profile."""
        return sum(job.ran.values())

    def _request(self, job: Job) -> Request:
        if job.app not in self.profiles:
            known = near(job.app, self.profiles)
            raise PolicyError(f"{self.name}: no profile for app {job.app!r}; {known}")
        profile, done = self.profiles[job.app], job.segment
        elapsed_ms = self.elapsed_ms(job)
        if self.by_density:
            seen = [d / mean for d, mean in zip(job.density[:done], profile.density)]  # noqa: B905
            left_ms = profile.left_by_density(done, sum(seen) / done if done else 1.0)
        else:
            left_ms = profile.left_by_time(done, elapsed_ms)
        request = Request(job.frame, job.arrival_ms, 0.0, job.priority, profile.row)
        request.deadline_at_ms, request.idle_since_ms = job.deadline_at_ms, job.ended_ms
        request.segment = done
        request.left_ms, request.size_ms = float(left_ms), float(elapsed_ms + left_ms)
        return request


_ARRIVAL = attrgetter("arrival_ms", "app", "frame")
_DEADLINE = attrgetter("deadline_at_ms")
