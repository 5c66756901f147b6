"""The width gate of DS-Net (arXiv 2103.13258): a tiny network that sends images on their way."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


class Gate(nn.Module):
    """Maps (N, C, H, W) or tokens (N, T, C) -> scores (N, routes): pooled, a hidden layer of C / 4,
    no bias at the end.

    The slimming head of the paper's double-headed gate. Its other head, attention, multiplies the
    maps by 1 + tanh(...) and starts at one: before frozen networks it stays there.
    """

    def __init__(self, channels: int, routes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.hidden = nn.Linear(channels, channels // 4)
        self.slimming = nn.Linear(channels // 4, routes, bias=False)

    def forward(self, x):
        """Shapes as in the class; pooled features (N, C) do as well."""
        if x.ndim > 2:
            x = x.mean((2, 3) if x.ndim == 4 else 1)
        if self.norm is not None:
            x = self.norm(x)
        # Calling a layer as a module takes longer than what so small a one computes.
        hidden = F.linear(x, self.hidden.weight, self.hidden.bias).relu_()
        return F.linear(hidden, self.slimming.weight)

    @torch.no_grad()
    def fold(self) -> "Gate":
        """Let the hidden layer do what the trained normalisation does: one operation less."""
        scale = (self.norm.running_var + self.norm.eps).rsqrt()
        self.hidden.weight.mul_(scale)
        self.hidden.bias.sub_(self.hidden.weight @ self.norm.running_mean)
        self.norm = None
        return self


def train_gate(
    features: torch.Tensor,
    losses: torch.Tensor,
    right: torch.Tensor,
    work: Sequence[float],
    *,
    seed: int,
    thrift: float = 0.5,
    epochs: int = 30,
    batch_size: int = 250,
    lr: float = 3e-3,
) -> Gate:
    """A gate before frozen networks, from a table of what each of them says.

    With p the probabilities of the K routes, l_k the loss of route k, m_k its work relative to the
    largest, and t the smallest route if that is right about the image, else the largest (sandwich
    gate sparsification):

    `loss = sum_k p_k l_k + CE(p, t) + thrift * (mean sum_k p_k m_k)^2`

    The paper draws routes by Gumbel-softmax; with the table the expectation is exact.

    Args:
        features: pooled, (N, C).
        losses: cross-entropy of each route on each image, (N, K).
        right: whether the smallest route is right about it, (N,).
        work: of each route, in any unit.
        thrift: weight of the work.
    """
    routes = losses.shape[1]
    share = torch.tensor(work) / max(work)
    target = torch.where(right, 0, routes - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(features.shape[1], routes)
        solver = torch.optim.AdamW(gate.parameters(), lr, weight_decay=0.01)
        steps = epochs * math.ceil(len(losses) / batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(solver, steps)
        for _ in range(epochs):
            for index in torch.randperm(len(losses)).split(batch_size):
                scores = gate(features[index])
                p = scores.softmax(1)
                expected = (p * losses[index]).sum(1).mean()
                sandwich = F.cross_entropy(scores, target[index])
                spent = (p @ share).mean() ** 2
                loss = expected + sandwich + thrift * spent
                loss.backward()
                solver.step()
                solver.zero_grad()
                schedule.step()
    return gate.eval().requires_grad_(False).fold()
