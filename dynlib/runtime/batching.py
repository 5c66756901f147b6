"""Batches on one accelerator for a network with exits: who joins, who waits, who has left.

A network is a row of nodes; a request leaves after as many as its exit needs, which is known only
when it is there. Between two nodes the batch may give way to newcomers, which catch up and join it
(LazyBatching, HPCA'21), and may shrink by those who have left (Fluid Batching, ICCAD'22).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dynlib.errors import WorkloadError


@dataclass(frozen=True)
class Batching:
    """How batches are made.

    Args:
        most: requests in a batch, counting those that wait to join it.
        window_ms: the first to come waits so long for others, unless the batch is full before.
        preempt: newcomers may run first, up to where the batch is, if nobody there will be late.
        reclaim: those that have left make room, and the rest runs as a smaller batch.
        exit_aware: slack counts with the nodes that are expected, instead of all that there are.
        benefit: newcomers run first only if the larger batch takes less per request.
    """

    name: str
    most: int = 8
    window_ms: float = 0.0
    preempt: bool = False
    reclaim: bool = False
    exit_aware: bool = False
    benefit: bool = False


BATCHINGS = (
    Batching("single", most=1),
    Batching("static", window_ms=50.0),
    Batching("adaptive"),
    Batching("lazy", preempt=True),
    Batching("lazy, reclaims", preempt=True, reclaim=True),
    Batching("fluid", preempt=True, reclaim=True, exit_aware=True),
)


@dataclass
class _Batch:
    """Requests at the same node; those that have left may still take room."""

    node: int
    members: list[int]
    room: int


@dataclass
class Batched:
    """What came of the requests.

    Attributes:
        finish_ms: per request.
        sizes: (time in ms, node, requests, room) of every node that ran.
    """

    finish_ms: np.ndarray
    sizes: list[tuple[float, int, int, int]] = field(default_factory=list)


def serve_batches(
    arrival_ms: Sequence[float],
    nodes: Sequence[int],
    deadline_ms: float,
    node_ms: np.ndarray,
    how: Batching,
    reached: Sequence[float] | None = None,
) -> Batched:
    """Serve all requests, node by node.

    Args:
        arrival_ms: in ascending order.
        nodes: how many each request needs until its exit.
        deadline_ms: from its arrival, of each.
        node_ms: (nodes, batch sizes) time of a node at a batch of 1, 2, ...
        reached: part of all requests that come to each node, for those who know the exits; default:
            all.

    Raises `WorkloadError` for no requests, times that are negative, not finite or out of order, a
    deadline that is none, and for nodes or batches that the table does not have.
    """
    arrivals, needs = np.asarray(arrival_ms, float), np.asarray(nodes)
    _check(arrivals, needs, deadline_ms, node_ms, how)
    ms = node_ms.T.tolist()  # [batch - 1][node]
    passed = np.cumsum(np.pad(node_ms, ((1, 0), (0, 0))), axis=0).T.tolist()
    remain = _remaining(node_ms, reached if how.exit_aware else None).tolist()
    arrival, need = arrivals.tolist(), needs.tolist()
    due = [t + deadline_ms for t in arrival]
    finish = [0.0] * len(arrival)
    stack: list[_Batch] = []  # the one on top runs; those below wait to be caught up with
    done = Batched(np.empty(0))
    now_ms, first = 0.0, 0  # the first request that waits
    while first < len(arrival) or stack:
        if not stack:
            now_ms = _begin(arrival, first, now_ms, how)
        last = first
        taken = sum(batch.room for batch in stack)
        while last < len(arrival) and arrival[last] <= now_ms and last - first < how.most - taken:
            last += 1
        new = last - first
        if new and (not stack or _may_join(stack, new, now_ms, due, ms, passed, remain, how)):
            stack.append(_Batch(0, list(range(first, last)), new))
            first = last
        top = stack[-1]
        done.sizes.append((now_ms, top.node, len(top.members), top.room))
        now_ms += ms[top.room - 1][top.node]
        top.node += 1
        for request in [r for r in top.members if need[r] == top.node]:
            finish[request] = now_ms
            top.members.remove(request)
        if how.reclaim:
            top.room = len(top.members)
        if not top.members:
            stack.pop()
        elif len(stack) > 1 and stack[-2].node == top.node:
            stack.pop()
            stack[-1].members += top.members
            stack[-1].room += top.room
    done.finish_ms = np.array(finish)
    return done


def _begin(arrival: list[float], first: int, now_ms: float, how: Batching) -> float:
    """When an idle device takes up the next batch."""
    now_ms = max(now_ms, arrival[first])
    if how.window_ms:
        full = first + how.most - 1
        ends_ms = arrival[first] + how.window_ms
        now_ms = max(now_ms, min(ends_ms, arrival[full]) if full < len(arrival) else ends_ms)
    return now_ms


def _may_join(stack, new, now_ms, due, ms, passed, remain, how) -> bool:
    """Whether newcomers may run first: nobody of those who run is expected to be late then."""
    if not how.preempt:
        return False
    size = new + sum(batch.room for batch in stack)
    top = stack[-1]
    if how.benefit:
        apart = ms[new - 1][top.node] + ms[top.room - 1][top.node]
        if ms[new + top.room - 1][top.node] >= apart:
            return False
    for batch in stack:
        end_ms = now_ms + passed[new - 1][batch.node] + remain[size - 1][batch.node]
        if any(due[request] < end_ms for request in batch.members):
            return False
    return True


def _remaining(node_ms: np.ndarray, reached: Sequence[float] | None) -> np.ndarray:
    """(batch sizes, nodes + 1) time from a node on: of all nodes, or expected with the exits.

    Example: of nodes of 3 ms, of which 1, 1 and 1/4 are reached, 3 + 3 / 4 ms are left after the
    first.
    """
    count = len(node_ms)
    reached = [*(np.ones(count) if reached is None else reached), 0.0]
    remain = np.zeros((node_ms.shape[1], count + 1))
    for node in reversed(range(count)):
        go_on = reached[node + 1] / max(reached[node], 1e-12)
        remain[:, node] = node_ms[node] + go_on * remain[:, node + 1]
    return remain


def _check(arrivals, needs, deadline_ms, node_ms, how) -> None:
    if len(arrivals) == 0 or len(needs) != len(arrivals):
        got = f"{len(arrivals)} arrivals and {len(needs)} exits"
        raise WorkloadError(f"{got}, expected as many, at least one")
    good = (arrivals >= 0) & np.isfinite(arrivals) & (np.diff(arrivals, prepend=0.0) >= 0)
    if not good.all():
        request = int(good.argmin())
        raise WorkloadError(
            f"request {request}, arrival_ms: got {arrivals[request]}, "
            "expected times >= 0 in ascending order"
        )
    good = (needs >= 1) & (needs <= len(node_ms))
    if not good.all():
        request = int(good.argmin())
        raise WorkloadError(
            f"request {request}, nodes: got {needs[request]}, expected 1 to {len(node_ms)}"
        )
    if not deadline_ms > 0:
        raise WorkloadError(f"deadline_ms: got {deadline_ms}, expected a time above 0")
    if not (np.isfinite(node_ms).all() and (node_ms > 0).all() and how.most <= node_ms.shape[1]):
        raise WorkloadError(
            f"node_ms: expected times above 0 of batches up to {how.most}, got {node_ms.shape[1]}"
        )
