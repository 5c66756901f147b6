"""A network in stages, one a process, over links that may be slow and unequal.

The stages are pieces of the network's chain of blocks, run by `torch.distributed.pipelining`. What
is decided here is where to cut: by the measured time of blocks and links.
"""

import io
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import inf
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.nn import functional as F

from dynlib.errors import CheckpointError, ModelError, PeerError
from dynlib.files import atomic_write
from dynlib.nets.chain import Chain, chain
from dynlib.training.compress import Codec

SCHEDULES = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}


def wire_bytes(payload_bytes: float) -> float:
    """What a message of gloo over TCP and Ethernet is at the interface.

    66 bytes of headers for each 1448 of payload, and about 400 for gloo's own and the answers.
    """
    return 1.046 * payload_bytes + 400


@dataclass(frozen=True)
class Link:
    """From one process to another; raises `PeerError` where nothing gets through."""

    name: str
    bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self):
        if not (self.bytes_per_s > 0 and self.latency_s >= 0):
            raise PeerError(
                f"link {self.name}: measured as {self.bytes_per_s} bytes/s after "
                f"{self.latency_s} s; expected more than 0 bytes/s"
            )

    def time_s(self, payload_bytes: float) -> float:
        """Latency + bytes / bandwidth, headers included."""
        return self.latency_s + wire_bytes(payload_bytes) / self.bytes_per_s


def measure_links(payload_bytes: int = 200_000, repeats: int = 2) -> list[Link]:
    """The link from each process to the next; all processes call it together.

    Raises `PeerError` on every process where a link lets nothing through in the group's time.
    """
    found = []
    sizes = (4, payload_bytes, 3 * payload_bytes)
    for one, other in pairwise(range(dist.get_world_size())):
        try:
            times = [_round_trip_s(one, other, size, repeats) / 2 for size in sizes]
            heard = torch.tensor(times, dtype=torch.float64)
            dist.broadcast(heard, one)
        except RuntimeError as error:  # gloo's own have no class
            raise PeerError(f"link {one}-{other}: nothing came through: {error}") from error
        latency_s, short_s, long_s = heard.tolist()
        # The difference, for a shaped link lets the first bytes pass at once. On a fast link
        # all three are about the same.
        payload_s = max(long_s - short_s, long_s / 3)
        rate = 2 * wire_bytes(payload_bytes) / payload_s
        found.append(Link(f"{one}-{other}", rate, latency_s))
    return found


def _round_trip_s(one: int, other: int, payload_bytes: int, repeats: int) -> float:
    """Shortest time there and back."""
    ball = torch.zeros(payload_bytes // 4)
    shortest_s = inf
    for _ in range(repeats + 1):  # the first one connects
        started = time.perf_counter()
        if dist.get_rank() == one:
            dist.send(ball, other)
            dist.recv(ball, other)
        elif dist.get_rank() == other:
            dist.recv(ball, one)
            dist.send(ball, one)
        shortest_s = min(shortest_s, time.perf_counter() - started)
    return shortest_s


def fence(bytes_per_s: np.ndarray, seed: int = 0) -> list[int]:
    """Machines in an order in which neighbours are well linked (OP-Fence, FusionLLM, 2410.12707).

    Communities of fast links stay together; what follows a machine is the one it has the fastest
    link to, of its own community as long as there is one.

    Args:
        bytes_per_s: (machines, machines), symmetric.
    """
    graph = nx.from_numpy_array(np.asarray(bytes_per_s, float))
    communities = nx.community.louvain_communities(graph, seed=seed)
    home = {machine: place for place, group in enumerate(communities) for machine in group}
    total = np.asarray(bytes_per_s).sum(1)
    order = [int(total.argmin())]  # at an end, the worst linked one needs one link only
    while len(order) < len(home):
        last = order[-1]
        rest = [machine for machine in home if machine not in order]
        order.append(max(rest, key=lambda m: (home[m] == home[last], bytes_per_s[last][m])))
    return order


@dataclass(frozen=True)
class BlockCost:
    """A block of a chain: its times for one micro-batch, what it returns, and its weights.

    `kept_bytes` are those that a micro-batch keeps for its backward pass.
    """

    name: str
    forward_s: float
    backward_s: float
    shape: tuple[int, ...]
    weights: tuple[str, ...]
    weight_bytes: int = 0
    kept_bytes: int = 0


def survey(net: nn.Module, images: torch.Tensor, repeats: int = 3) -> list[BlockCost]:
    """The blocks of a network, timed on one micro-batch; leaves the network as it was."""
    names, weights = zip(*net.named_parameters(), strict=True)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    costs = []
    x = images
    for block, module in chain(net).blocks.items():
        times = []
        for _ in range(repeats):
            entry = x.detach().requires_grad_(bool(costs))
            started = time.perf_counter()
            y = module(entry)
            turned = time.perf_counter()
            wanted = [*weights, *([entry] if costs else [])]
            found = torch.autograd.grad(y.sum(), wanted, allow_unused=True)
            times.append((turned - started, time.perf_counter() - turned))
        pairs = zip(names, weights, found, strict=False)
        used = {name: weight for name, weight, gradient in pairs if gradient is not None}
        shortest = np.min(times, axis=0).tolist()
        weight_bytes = sum(weight.nbytes for weight in used.values())
        kept_bytes = _kept_bytes(module, entry, used.values())
        shape = tuple(y.shape)
        costs.append(BlockCost(block, *shortest, shape, tuple(used), weight_bytes, kept_bytes))
        x = y
    for name, buffer in net.named_buffers():
        buffer.copy_(before[name])
    return costs


def _kept_bytes(module: Callable, x: torch.Tensor, weights: Iterable[torch.Tensor]) -> int:
    """Of the tensors that autograd keeps of one forward pass, each memory once."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, int] = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in known:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(kept.values())


def iteration_s(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    crossing_s: Sequence[float],
    micro_batches: int,
    schedule: str = "gpipe",
) -> float:
    """Time of one step: sum of all terms + (n - 1) times the largest (FusionLLM, section 3).

    GPipe has a forward and a backward phase, each with a largest term of its own. In 1F1B both
    alternate, so that a term is the sum of both; on slow links they do not pass at once even if
    the link is full-duplex, for the answers of one queue behind the data of the other.

    Args:
        forward_s, backward_s: of each stage, for one micro-batch.
        crossing_s: of each link, for one micro-batch in one direction.
    """
    once = sum(forward_s) + sum(backward_s) + 2 * sum(crossing_s)
    if schedule == "gpipe":
        worst = max(*forward_s, *crossing_s) + max(*backward_s, *crossing_s)
    else:
        both = [f + b for f, b in zip(forward_s, backward_s, strict=True)]
        worst = max(*both, 2 * max(crossing_s))
    return once + (micro_batches - 1) * worst


def place(
    costs: Sequence[BlockCost], crossing_s: Callable[[int, BlockCost], float],
    stages: int, micro_batches: int, memory_bytes: Sequence[float] | None = None,
) -> list[str]:  # fmt: skip
    """The blocks to cut behind for the shortest step, exactly, by dynamic programming.

    Kept for every (stage, last block) are all (sum of crossings, largest term) that no other beats
    in both. Terms are as in 1F1B; no stage is without weights.

    Args:
        crossing_s: (link, block) -> seconds for what the block returns to cross, one direction.
        memory_bytes: of each stage's machine, that `needed_bytes` may not exceed.

    Raises `ModelError` when there are fewer blocks with weights than stages, or none fit.
    """
    room = memory_bytes or [inf] * stages
    seconds = [0.0, *accumulate(cost.forward_s + cost.backward_s for cost in costs)]
    heavy = [0, *accumulate(bool(cost.weights) for cost in costs)]
    fronts: dict[int, list[tuple]] = {0: [(0.0, 0.0, ())]}
    for stage in range(stages):
        last = stage == stages - 1
        ends = [len(costs)] if last else range(1, len(costs))
        reached: dict[int, list[tuple]] = {}
        for end in ends:
            ways = []
            for start, known in fronts.items():
                if start >= end or heavy[start] == heavy[end]:
                    continue
                if needed_bytes(costs[start:end], stages - stage, micro_batches) > room[stage]:
                    continue
                own_s = seconds[end] - seconds[start]
                cross_s = 0.0 if last else crossing_s(stage, costs[end - 1])
                ways += [
                    (total + 2 * cross_s, max(worst, own_s, 2 * cross_s), (*cuts, end))
                    for total, worst, cuts in known
                ]
            if ways:
                reached[end] = _unbeaten(ways)
        fronts = reached
    if not fronts:
        limits = f" within {list(memory_bytes)} bytes" if memory_bytes else ""
        raise ModelError(
            f"{len(costs)} blocks, {heavy[-1]} with weights: no {stages} stages{limits}"
        )
    best = min(fronts[len(costs)], key=lambda way: way[0] + (micro_batches - 1) * way[1])
    return [costs[end - 1].name for end in best[2][:-1]]


def needed_bytes(costs: Iterable[BlockCost], stages_left: int, micro_batches: int) -> int:
    """Memory of a stage in 1F1B: its weights, their gradients and momentum, and what is in flight.

    A stage starts as many micro-batches as there are stages from it on before one comes back.
    """
    in_flight = min(stages_left, micro_batches)
    return sum(3 * cost.weight_bytes + in_flight * cost.kept_bytes for cost in costs)


def _unbeaten(ways: Iterable[tuple]) -> list[tuple]:
    kept: list[tuple] = []
    for way in sorted(ways):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


class Pipeline:
    """This process's stage of `net`, which all processes hold alike.

    Args:
        net: a static network with a chain of blocks, in training mode.
        behind: blocks that end a stage, one fewer than processes.
        costs: of its blocks for a micro-batch, from `survey`; their shapes are what is sent.
        micro_batches: per step.
        schedule: ``gpipe`` or ``1f1b``.
        codec: (cut, shape) -> what is done to the tensors there; by default nothing.
        loss: (outputs, targets) -> the mean loss of a micro-batch.

    Raises:
        PeerError: more or fewer stages than processes.
        ModelError: a stage has no weights, or a block is not there.
    """

    def __init__(
        self,
        net: nn.Module,
        behind: Sequence[str],
        costs: Sequence[BlockCost],
        micro_batches: int,
        *,
        schedule: str = "1f1b",
        codec: Callable[[int, tuple[int, ...]], Codec] = lambda cut, shape: Codec(shape),
        loss: Callable = F.cross_entropy,
    ):
        rank, world = dist.get_rank(), dist.get_world_size()
        self.net, self.behind = net, list(behind)
        if len(behind) + 1 != world:
            raise PeerError(f"{len(behind) + 1} stages for {world} processes; expected one each")
        known = {cost.name: cost for cost in costs}
        pieces = chain(net).cut(behind)
        self._names = [
            [name for block in piece.names for name in known[block].weights] for piece in pieces
        ]
        for stage, piece in enumerate(pieces):
            if not self._names[stage]:
                raise ModelError(f"stage {stage} ({', '.join(piece.names)}) has no weights")
        shapes = [known[name].shape for name in behind]
        codecs = [codec(cut, shape) for cut, shape in enumerate(shapes)]
        # Of a micro-batch over each link, in one direction.
        self.payload_bytes = [4 * crossing.floats for crossing in codecs]
        store = dict(net.named_parameters())
        self.weights = [store[name] for name in self._names[rank]]
        self._rank, self._last = rank, world - 1
        before, after = [None, *codecs][rank], [*codecs, None][rank]
        self._module = _Stage(before, pieces[rank], after, self.weights)
        self._senders = [after.encode.send] if after else []
        if before:
            self._senders.append(before.decode.back)
        self._entry = torch.zeros(before.floats, requires_grad=True) if before else None
        self._leaving = torch.zeros(after.floats if after else costs[-1].shape, requires_grad=True)
        self._micro_batches = micro_batches
        self._make = partial(SCHEDULES[schedule], n_microbatches=micro_batches, loss_fn=loss)
        self._schedule = None

    def step(self, images: torch.Tensor, targets: torch.Tensor) -> float | None:
        """Forward and backward of one batch, gradients left in `weights`; the loss, at the end.

        Images matter to the first stage only, targets to the last; others may pass any.
        """
        if self._schedule is None:
            self._start(images)
        if self._rank == 0:
            self._schedule.step(images)
        elif self._rank < self._last:
            self._schedule.step()
        if self._rank < self._last:
            return None
        losses: list[torch.Tensor] = []
        self._schedule.step(target=targets, losses=losses)
        return torch.stack(losses).mean().item()

    def _start(self, images: torch.Tensor) -> None:
        entry = self._entry
        if entry is None:
            entry = images.chunk(self._micro_batches)[0]
        # Without these torch finds the shapes by running every stage on memory that nobody has
        # written, which spoils the moments of batch normalisation.
        ends = {"input_args": entry, "output_args": self._leaving}
        stages = self._last + 1
        stage = pipelining.PipelineStage(self._module, self._rank, stages, entry.device, **ends)
        self._schedule = self._make(stage)

    def gather(self) -> None:
        """Give all processes the whole trained network."""
        state = self.net.state_dict()
        for stage, names in enumerate(self._names):
            homes = {name.rpartition(".")[0] for name in names}
            for name, value in state.items():
                if name.rpartition(".")[0] in homes:
                    dist.broadcast(value, stage)

    def save(self, folder: str | Path, step: int, solver: torch.optim.Optimizer) -> None:
        """Write this stage's state, its codecs' too; the save before is kept, older ones go."""
        state = {
            "behind": self.behind,
            "net": self.net.state_dict(),
            "solver": solver.state_dict(),
            "senders": [sender.state_dict() for sender in self._senders],
        }
        file = io.BytesIO()
        torch.save(state, file)
        atomic_write(self._path(folder, step), file.getvalue())
        for old in sorted(self._stored(folder))[:-2]:
            self._path(folder, old).unlink()

    def load(self, folder: str | Path, solver: torch.optim.Optimizer) -> int:
        """Go back to the last step that all stages have saved, and return it; 0 if there is none.

        Raises `CheckpointError` on every process if one of them has the state of another cut, or
        one that cannot be read.
        """
        stored = _everybodys(self._stored(folder))
        common = set.intersection(*map(set, stored))
        if not common:
            return 0
        step = max(common)
        path = self._path(folder, step)
        try:
            state = torch.load(path, weights_only=True)
            behind = state["behind"]
            wrong = behind != self.behind and f"cut behind {behind}, expected {self.behind}"
        except Exception as error:
            wrong = f"no readable state of a stage: {error!r:.200}"
        for complaint in _everybodys(wrong and f"{path}: {wrong}"):
            if complaint:
                raise CheckpointError(complaint)
        self.net.load_state_dict(state["net"])
        solver.load_state_dict(state["solver"])
        for sender, own in zip(self._senders, state["senders"], strict=True):
            sender.load_state_dict(own)
        return step

    def _path(self, folder, step: int) -> Path:
        return Path(folder) / f"stage{self._rank}-{step}.pt"

    def _stored(self, folder) -> list[int]:
        names = [path.name for path in Path(folder).glob(f"stage{self._rank}-*.pt")]
        return [int(re.findall(r"\d+", name)[1]) for name in names]


def _everybodys(own) -> list:
    """What each process says."""
    said: list = [None] * dist.get_world_size()
    dist.all_gather_object(said, own)
    return said


class _Stage(nn.Module):
    """A piece of a chain between two cuts; it owns the weights, which the blocks only use."""

    def __init__(self, before: Codec | None, piece: Chain, after: Codec | None, weights):
        super().__init__()
        self.decode = before.decode if before else nn.Identity()
        self.piece = piece
        self.encode = after.encode if after else nn.Identity()
        self.weights = nn.ParameterList(weights)

    def forward(self, x):
        return self.encode(self.piece(self.decode(x)))
