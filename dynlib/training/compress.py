"""What crosses the cut between two stages of a pipeline: a tensor made small and restored.

A `Codec` is two modules. `encode` is the last of a stage and `decode` the first of the next; what
passes between them is one flat float32 buffer of fixed length, in both directions.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import nn
from torch.nn import functional as F

from dynlib.errors import RecipeError


def adaptive_ratios(times_s: Sequence[float], ratio: float) -> list[float]:
    """Top-K ratio of each link: 3 r R / max R, at least 1 (AdaTopK, FusionLLM, arXiv 2410.12707).

    Of N entries N / ratio are kept. The 3 is for a kept entry's index of 8 bytes beside its value
    of 4; ours has 4, so that the slowest link carries 2 / (3 r) of the dense bytes. Equal links
    make it uniform Top-K, and r = 1/3 leaves all dense.

    Args:
        times_s: of a dense tensor over each link.
        ratio: r.

    Raises `RecipeError` for a ratio below 1/3, which would keep more than there is.

    >>> adaptive_ratios([1.0, 0.1], 10)
    [30.0, 3.0]
    """
    if not ratio >= 1 / 3:
        raise RecipeError(f"compression, ratio: {ratio}, expected at least 1/3, which is dense")
    slowest = max(times_s)
    return [max(1.0, 3 * ratio * time_s / slowest) for time_s in times_s]


class Dense:
    """All entries as they are.

    Args:
        shape: of one micro-batch's activation, (N, C, H, W) or (N, ...).
        ratio: entries over entries kept, before anything that has to go with them.
    """

    def __init__(self, shape: Sequence[int], ratio: float = 1.0):
        self.shape = tuple(shape)

    @property
    def floats(self) -> int:
        """Length of the buffer, indices counted."""
        return prod(self.shape)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(shape) -> (floats,)."""
        return x.flatten()

    def unpack(self, buffer: torch.Tensor) -> torch.Tensor:
        """(floats,) -> (shape)."""
        return buffer.view(self.shape)

    @property
    def memory(self) -> torch.Tensor | None:
        """What one tensor leaves for the next, which a run that goes on must be given back."""
        return None

    @memory.setter
    def memory(self, memory: torch.Tensor | None) -> None:
        pass


class TopK(Dense):
    """The N / ratio entries of largest magnitude, each with its index; dense where that is more."""

    def __init__(self, shape: Sequence[int], ratio: float):
        super().__init__(shape)
        self.kept = max(1, round(prod(self.shape) / ratio))
        self._is_dense = 2 * self.kept >= prod(self.shape)

    @property
    def floats(self):
        """See `Dense`."""
        return prod(self.shape) if self._is_dense else 2 * self.kept

    def pack(self, x):
        """See `Dense`."""
        if self._is_dense:
            return x.flatten()
        flat = x.flatten()
        index = flat.abs().topk(self.kept, sorted=False).indices
        # Bits of an integer in a float: the transport must not compute with them, and does not.
        return torch.cat([flat[index], index.int().view(torch.float32)])

    def unpack(self, buffer):
        """See `Dense`. Indices out of range, from a buffer nobody wrote, are clamped."""
        if self._is_dense:
            return buffer.view(self.shape)
        values, bits = buffer.split(self.kept)
        size = prod(self.shape)
        index = bits.contiguous().view(torch.int32).long().clamp(0, size - 1)
        return values.new_zeros(size).scatter(0, index, values).view(self.shape)


class Levels(Dense):
    """Each entry as one of 2 ** bits levels between the extremes of its channel; bits are 8 or 4.

    Rounded up as often as it is near the upper level, so that the mean of many is right.

    Args:
        ratio: 32 / bits, or near it; below 3 all is dense. A channel's lowest level and step come
            on top.
    """

    def __init__(self, shape: Sequence[int], ratio: float):
        super().__init__(shape)
        self.bits = 32 if ratio < 3 else 8 if ratio < 6 else 4
        self._draws = torch.Generator().manual_seed(0)

    @property
    def floats(self):
        """See `Dense`."""
        size = prod(self.shape)
        if self.bits == 32:
            return size
        return 2 * self.shape[1] + -(-size * self.bits // 32)

    def pack(self, x):
        """See `Dense`."""
        if self.bits == 32:
            return x.flatten()
        rows = x.movedim(1, 0).flatten(1)
        low, high = rows.aminmax(dim=1, keepdim=True)
        top = 2**self.bits - 1
        step = (high - low) / top
        place = (rows - low) / step.clamp_min(torch.finfo(step.dtype).tiny)
        up = torch.rand(place.shape, generator=self._draws)
        level = (place + up).floor().clamp(0, top).byte().flatten()
        level = F.pad(level, (0, -len(level) % (32 // self.bits)))
        if self.bits == 4:
            level = level[0::2] | level[1::2] << 4
        return torch.cat([low.flatten(), step.flatten(), level.view(torch.float32)])

    def unpack(self, buffer):
        """See `Dense`."""
        if self.bits == 32:
            return buffer.view(self.shape)
        samples, channels, *places = self.shape
        low, step, words = buffer.split([channels, channels, len(buffer) - 2 * channels])
        level = words.contiguous().view(torch.uint8)
        if self.bits == 4:
            level = torch.stack([level & 15, level >> 4], 1).flatten()
        level = level[: prod(self.shape)].view(channels, -1)
        rows = low[:, None] + step[:, None] * level
        return rows.view(channels, samples, *places).movedim(0, 1)

    @property
    def memory(self):
        """See `Dense`: where the draws are."""
        return self._draws.get_state()

    @memory.setter
    def memory(self, memory):
        self._draws.set_state(memory)


class Columns(Dense):
    """The first C / ratio coordinates of the channels in a fixed orthonormal basis: no indices."""

    def __init__(self, shape: Sequence[int], ratio: float):
        super().__init__(shape)
        channels = self.shape[1]
        self.kept = max(1, round(channels / ratio))
        drawn = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0))
        self.basis = torch.linalg.qr(drawn).Q[:, : self.kept]

    @property
    def floats(self):
        """See `Dense`."""
        return prod(self.shape) // self.shape[1] * self.kept

    def pack(self, x):
        """See `Dense`."""
        return (x.movedim(1, -1) @ self.basis).flatten()

    def unpack(self, buffer):
        """See `Dense`."""
        samples, _, *places = self.shape
        rows = buffer.view(samples, *places, self.kept) @ self.basis.T
        return rows.movedim(-1, 1)


class LowRank(Dense):
    """Two factors of the matrix (entries of a channel, channels): PowerSGD (arXiv 1905.13727).

    Its power iteration starts where that of the last tensor ended.
    """

    def __init__(self, shape: Sequence[int], ratio: float):
        super().__init__(shape)
        channels = self.shape[1]
        rows = prod(self.shape) // channels
        whole = min(rows, channels)
        self.rank = min(whole, max(1, int(rows * channels / ratio / (rows + channels))))
        drawn = torch.randn(channels, self.rank, generator=torch.Generator().manual_seed(0))
        self.right = torch.linalg.qr(drawn).Q

    @property
    def floats(self):
        """See `Dense`."""
        return (prod(self.shape) // self.shape[1] + self.shape[1]) * self.rank

    def pack(self, x):
        """See `Dense`."""
        matrix = x.movedim(1, -1).flatten(0, -2)
        left = torch.linalg.qr(matrix @ self.right).Q
        right = matrix.T @ left
        self.right = torch.linalg.qr(right).Q
        return torch.cat([left.flatten(), right.flatten()])

    def unpack(self, buffer):
        """See `Dense`."""
        samples, channels, *places = self.shape
        rows = prod(self.shape) // channels
        left, right = buffer.split([rows * self.rank, channels * self.rank])
        matrix = left.view(rows, self.rank) @ right.view(channels, self.rank).T
        return matrix.view(samples, *places, channels).movedim(-1, 1)

    @property
    def memory(self):
        """See `Dense`: where the power iteration is."""
        return self.right

    @memory.setter
    def memory(self, memory):
        self.right = memory


class Codec:
    """The pair of modules at a cut, each way with a packing of its own.

    Args:
        shape: of one micro-batch's activation, (N, C, H, W) or (N, ...).
        kind: how it is packed.
        ratio: of `kind`, if it has one.
        feedback: add what was left out to the next tensor of the same place in the batch.
        slots: micro-batches in a step, each of which has its own remainder.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kind: type[Dense] = Dense,
        ratio: float = 1.0,
        *,
        feedback: bool = False,
        slots: int = 1,
    ):
        # Each direction has its own, for some remember what they sent.
        forward, backward = (_Sender(kind(shape, ratio), feedback, slots) for _ in range(2))
        self.floats = forward.packing.floats
        self.encode, self.decode = _Encode(forward, backward), _Decode(forward, backward)


class _Sender:
    """A packing and what it has left out so far."""

    def __init__(self, packing: Dense, feedback: bool, slots: int):
        self.packing = packing
        self.left_out = [0.0] * slots if feedback else []
        self.turn = 0

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.left_out:
            return self.packing.pack(x)
        self.turn = (self.turn + 1) % len(self.left_out)
        whole = x + self.left_out[self.turn]
        buffer = self.packing.pack(whole)
        self.left_out[self.turn] = whole - self.packing.unpack(buffer)
        return buffer

    def state_dict(self) -> dict:
        form, memory = self._form(), self.packing.memory
        owed = list(self.left_out)
        return {"left_out": owed, "turn": self.turn, "form": form, "memory": memory}

    def load_state_dict(self, state: dict) -> None:
        """What another packing left out is still owed; what else it remembers is of no use."""
        if len(state["left_out"]) == len(self.left_out):
            self.left_out, self.turn = list(state["left_out"]), state["turn"]
        if state["form"] == self._form():
            self.packing.memory = state["memory"]

    def _form(self) -> str:
        return f"{type(self.packing).__name__} {self.packing.floats}"


class _Encode(nn.Module):
    def __init__(self, forward: _Sender, backward: _Sender):
        super().__init__()
        self.send, self.back = forward, backward

    def forward(self, x):
        return _Cross.apply(x, self.send, self.back.packing.unpack)


class _Decode(nn.Module):
    def __init__(self, forward: _Sender, backward: _Sender):
        super().__init__()
        self.unpack, self.back = forward.packing.unpack, backward

    def forward(self, buffer):
        return _Cross.apply(buffer, self.unpack, self.back)


class _Cross(torch.autograd.Function):
    """One function forward, another for the gradient, which need not be its derivative."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.back(gradient), None, None
