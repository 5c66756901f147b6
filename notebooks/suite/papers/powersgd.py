"""PowerSGD (arXiv 1905.13727) as a packing of what crosses a cut, beside those of the library."""

from collections.abc import Sequence
from math import prod

import torch

from dynlib.training.compress import Dense


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
