"""Several processes, on one machine or many, that train as one process would.

Each takes its share of every batch. What one process computes over the whole batch is computed
over all shares: the moments of batch normalisation, the mean loss, the mean gradient. All draw the
same random numbers, so that they agree on sub-networks and augmentation without asking.
"""

import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from dynlib.errors import PeerError, RecipeError

HOOKS = ("exact", "fp16", "powersgd")


def join(timeout_s: float = 300.0, backend: str | None = None) -> bool:
    """Meet the other processes that torchrun, or the same environment variables, announce.

    Returns whether there are any: False without ``RANK`` and ``WORLD_SIZE``, or for one alone.

    Args:
        timeout_s: for the others to come, and later for each exchange.
        backend: as torch names it, gloo by default.

    Raises:
        PeerError: a process has not come in time, named by its rank, or a variable is malformed.
    """
    if dist.is_initialized():
        return dist.get_world_size() > 1
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return False
    rank, world, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < world:
        raise PeerError(f"RANK is {rank}; expected 0 to {world - 1}, for WORLD_SIZE is {world}")
    if world == 1:
        return False
    # torchrun's agent keeps the store, and counts the restarts: old keys must not be met again.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    host = os.environ.get("MASTER_ADDR", "localhost")
    timeout = timedelta(seconds=timeout_s)
    try:
        keeper = rank == 0 and not agent
        server = dist.TCPStore(host, port, None, keeper, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise PeerError(f"rank {rank}: rank 0 is not there at {host}:{port}: {error}") from error
    store = dist.PrefixStore(f"dynlib/{attempt}", server)
    store.set(f"here/{rank}", str(world))
    for other in range(world):
        try:
            expects = store.get(f"here/{other}").decode()
        except dist.DistError as error:
            raise PeerError(
                f"rank {rank} of {world}: rank {other} has not come within {timeout_s:g} s"
            ) from error
        if expects != str(world):
            raise PeerError(f"rank {other} expects {expects} processes, rank {rank} {world}")
    dist.init_process_group(
        backend or "gloo", store=store, rank=rank, world_size=world, timeout=timeout
    )
    return True


class Alone:
    """One process: nothing to exchange."""

    rank = 0
    world = 1

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch (N, ...)."""
        return batch

    def mean(self, values: Sequence[float]) -> list[float]:
        """Means over all processes."""
        return list(values)

    def exchange(self) -> None:
        """Make every gradient the mean over all processes."""

    def tell(self, content: bytes | None) -> bytes | None:
        """What the first process says; the others pass nothing of use."""
        return content

    def __enter__(self):
        """Inside, batch normalisation takes the moments of the batches of all processes."""
        return self

    def __exit__(self, *_):
        pass


class Peers(Alone):
    """The processes of the default group, with the same `net` to train.

    The first one's weights become those of all.

    Args:
        net: whose gradients are exchanged; what needs none is left out.
        batch_size: of all processes together.
        hook: what torch makes of the gradients on their way: ``exact``; ``fp16``, half the bytes;
            ``powersgd``, rank 2 with error feedback after 10 exact steps (arXiv 1905.13727).

    Raises:
        RecipeError: an unknown hook, or a batch that cannot be shared equally.
    """

    def __init__(self, net: nn.Module, batch_size: int, hook: str = "exact"):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if hook not in HOOKS:
            raise RecipeError(f"hook: {hook!r}, expected one of {HOOKS}")
        if batch_size % self.world:
            raise RecipeError(
                f"recipe, batch_size: {batch_size}, expected a multiple of {self.world} processes"
            )
        self._weights = [p for p in net.parameters() if p.requires_grad]
        self._exchange = nn.parallel.DistributedDataParallel(_Given(net))
        if hook == "fp16":
            self._exchange.register_comm_hook(None, default_hooks.fp16_compress_hook)
        elif hook == "powersgd":
            state = powerSGD_hook.PowerSGDState(None, 2, start_powerSGD_iter=10)
            self._exchange.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        self._norm = _WholeBatch(self.world)

    def share(self, batch):
        """See `Alone`."""
        return batch.tensor_split(self.world)[self.rank]

    def mean(self, values):
        """See `Alone`."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.world).tolist()

    def exchange(self):
        """See `Alone`. Which weights have gradients is the same in all: they agree on the nets."""
        own = [weight.grad for weight in self._weights]
        for weight in self._weights:
            weight.grad = None
        self._exchange(own).backward()
        for weight, gradient in zip(self._weights, own, strict=True):
            if gradient is None:  # solvers leave out what had no part in the step
                weight.grad = None

    def tell(self, content):
        """See `Alone`."""
        size = torch.tensor([len(content or b"")])
        dist.broadcast(size, 0)
        text = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == 0 and content:
            text = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(text, 0)
        return text.numpy().tobytes()

    def __enter__(self):
        self._norm.__enter__()
        return self

    def __exit__(self, *error):
        self._norm.__exit__(*error)


class _Given(nn.Module):
    """A loss whose gradients are those it is given: DDP then buckets, hooks and averages them.

    A step of a sandwich runs backward once for each sub-network; DDP wants one backward a step.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, gradients):
        weights = [p for p in self.net.parameters() if p.requires_grad]
        return sum(
            (weight * (0.0 if given is None else given)).sum()
            for weight, given in zip(weights, gradients, strict=True)
        )


class _WholeBatch(TorchFunctionMode):
    """Batch normalisation in training with the moments over all processes; shares are equal.

    torch's own SyncBatchNorm does the same on GPUs only.
    """

    def __init__(self, world: int):
        super().__init__()
        self.world = world

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.batch_norm:
            return self._norm(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _norm(self, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training:
            return F.batch_norm(x, mean, var, weight, bias, False, momentum, eps)
        over = [axis for axis in range(x.ndim) if axis != 1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        own = torch.stack([wide.mean(over), wide.square().mean(over)])
        first, second = _Sum.apply(own) / self.world
        spread = second - first.square()
        if mean is not None:
            count = x.numel() // x.shape[1] * self.world
            with torch.no_grad():
                mean.lerp_(first, momentum)
                var.lerp_(spread * count / (count - 1), momentum)
        scale = (spread + eps).rsqrt()
        if weight is not None:
            scale = scale * weight
        shift = -first * scale
        if bias is not None:
            shift = shift + bias
        shape = [1, -1] + [1] * (x.ndim - 2)
        return torch.addcmul(shift.view(shape), wide, scale.view(shape)).to(x.dtype)


class _Sum(torch.autograd.Function):
    """Sum over all processes; so is its gradient, for each one's loss depends on every share."""

    @staticmethod
    def forward(ctx, own):
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise PeerError(f"{name} is {text!r}; expected a number, as torchrun sets it")
    return int(text)
