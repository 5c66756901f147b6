"""One optimisation step of a recipe: who learns, from whom, and how the weights move."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dynlib.nets.supernet import Supernet, macs_m
from dynlib.nets.trace import NORMS
from dynlib.space import SubnetConfig
from dynlib.training.parallel import Alone, Peers, join
from dynlib.training.recipes import PHASES, Average, Recipe, draw_configs

TRIES = 3  # candidates of best-up sampling (AttentiveNAS, section 4: BestUp-3)


def bf16_pays(device: torch.device | None = None) -> bool:
    """Whether a device (None: this processor) multiplies bfloat16 natively; without that it is
    slower than single precision."""
    if device is not None and device.type == "cuda":
        return True
    available = torch.backends.mkldnn.is_available()
    return available and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _slow_in_bf16(net: nn.Module, device: torch.device) -> bool:
    """Depth-wise networks on a CPU: some of oneDNN's gradients (stride 2, 5 x 5) take three times
    as long in bfloat16, which made EfficientNet-Lite0 train at 0.6 times the speed."""
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    return device.type == "cpu" and any(module.groups > 1 for module in convolutions)


def optimisers(supernet: Supernet, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Of all weights that are free: AdamW, Muon for the convolutions and SGD for the rest, or Muon
    for all matrices and AdamW for the rest."""
    from dynlib.training.muon import Muon  # imports timm, which takes seconds

    device = next(supernet.parameters()).device
    dtype = torch.bfloat16 if bf16_pays(device) else torch.float32
    if recipe.solver == "muon+adamw":
        return [_of_matrices(supernet.net, recipe, dtype)]
    from_scratch = recipe.solver == "muon"
    for module in supernet.net.modules():
        if from_scratch and isinstance(module, NORMS) and bool((module.weight == 1).all()):
            # Behind a convolution of fixed norm a scale of one is right, and one less to learn.
            # Others are there for a reason: zero is how timm begins a residual branch.
            module.weight.requires_grad_(False)
    free = {name: p for name, p in supernet.net.named_parameters() if p.requires_grad}
    linear = [p for p in free.values() if p.ndim == 2]
    convolutions = [p for p in free.values() if p.ndim == 4]
    biases = [p for name, p in free.items() if p.ndim == 1 and name.endswith("bias")]
    known = {id(p) for p in (*linear, *convolutions, *biases)}
    others = [p for p in free.values() if id(p) not in known]  # scales, tokens, embeddings
    if not from_scratch:
        decayed = {"params": linear + convolutions, "weight_decay": recipe.decay / recipe.lr}
        rest = {"params": biases + others, "weight_decay": 0.0}
        return [torch.optim.AdamW([decayed, rest], recipe.lr)]
    muon = Muon(
        convolutions,
        dtype=dtype,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=0.0,
        adjust_lr_fn="original",
    )
    groups = []
    for params, rate_of_500, decay in (
        (linear, recipe.lr_head, recipe.decay),
        (biases, recipe.lr_bias, recipe.decay),
        (others, recipe.lr_head, 0.0),
    ):
        lr = rate_of_500 * recipe.batch_size / 500
        groups.append({"params": params, "lr": lr, "weight_decay": decay / lr})
    return [muon, torch.optim.SGD(groups, lr=0.0, momentum=0.85, nesterov=True)]


def _of_matrices(net: nn.Module, recipe: Recipe, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Muon for the hidden layers, at AdamW's size of step (arXiv 2502.16982, 2.2), else AdamW.

    Both look ahead by Nesterov's momentum.
    """
    from dynlib.training.muon import Muon

    layers = [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    *hidden, classifier = [weight for weight in layers if weight.requires_grad]
    known = {id(weight) for weight in layers}
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    decay = recipe.decay / recipe.lr
    groups = [
        {"params": hidden, "weight_decay": decay},
        {"params": [classifier], "weight_decay": decay, "use_fallback": True},
        {"params": others, "weight_decay": 0.0, "use_fallback": True},
    ]
    return Muon(groups, recipe.lr, dtype=dtype, adjust_lr_fn="match_rms_adamw", nesterov=True)


@torch.no_grad()
def normalise_(solver: torch.optim.Optimizer) -> None:
    """Scale each convolution (O, I, H, W) to the norm sqrt(O); a normalisation undoes the scale."""
    for group in solver.param_groups:
        for weight in group["params"]:
            scale = len(weight) ** 0.5 / weight.norm()
            weight.mul_(scale)


def rate(progress: float, warmup: float) -> float:
    """Share of the peak learning rate: up to it, then linearly to almost zero."""
    rising = progress < warmup
    share = progress / warmup if rising else (1 - progress) / (1 - warmup)
    return max(share, 0.01)


class Step:
    """A callable that trains one batch; everything that must survive a kill is in its state.

    Args:
        supernet: trained in place.
        recipe: how.
        guide: a trained network, images -> logits, that teaches all sub-networks in place of the
            labels and of the recipe's teacher.
        hook: what becomes of gradients on their way between processes, as in `Peers`.
    """

    def __init__(
        self,
        supernet: Supernet,
        recipe: Recipe,
        guide: Callable | None = None,
        hook: str = "exact",
    ):
        self.supernet = supernet
        self.recipe = recipe
        self.guide = guide
        self.device = next(supernet.parameters()).device
        self.bf16 = bf16_pays(self.device) and not _slow_in_bf16(supernet.net, self.device)
        self.solvers = optimisers(supernet, recipe)
        self._peaks = []  # learning rates of every solver's groups, before warm-up and decay
        for solver in self.solvers:
            self._peaks.append([group["lr"] for group in solver.param_groups])
        self.peers = Alone()
        if join(backend="cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"):
            self.peers = Peers(supernet.net, recipe.batch_size, hook)
        self._average = None
        if recipe.teacher in ("ema", "ensemble"):
            self._average = Average(supernet, recipe.ema)
        elif recipe.teacher == "frozen":
            self._average = Average(supernet, decay=0.0)

    def __call__(
        self,
        view: Callable[[], torch.Tensor],
        labels: torch.Tensor,
        *,
        step: int,
        progress: float,
        rng: np.random.Generator,
    ) -> list[float]:
        """Train on one batch and return the losses, the first configuration's first.

        Under torchrun each process trains on its share, and the losses are those of all.

        Args:
            view: draws an augmentation of the batch, (N, 3, H, W) normalised.
            labels: (N,).
            step, progress: number of the step in its epoch, and share of the training done.
        """
        self._set_rates(progress)
        configs = draw_configs(self.recipe, self.supernet.space, step, progress, rng)
        with self.peers as peers:
            own = peers.share(labels)
            losses = self.gradients(lambda: peers.share(view()), own, configs, progress, rng)
            peers.exchange()
        for solver in self.solvers:
            solver.step()
            solver.zero_grad()
        if self.recipe.solver == "muon":
            normalise_(self.solvers[0])
        if self._average and not self._is_frozen(progress):
            self._average.update(self.supernet)
        return self.peers.mean(losses)

    def gradients(self, view, labels, configs, progress: float = 0.0, rng=None) -> list[float]:
        """Accumulate the gradients of one sandwich and return its losses."""
        recipe = self.recipe
        labels = labels.to(self.device)
        images = view().to(self.device)
        if recipe.sampling == "best-up":
            configs = [self._best_up(config, images, labels, rng) for config in configs]
        target = self._target(images, progress)
        losses = []
        # Each loss runs backward at once, so that only one sub-network's activations are held.
        for place, config in enumerate(configs):
            seen = view().to(self.device) if place and recipe.own_view else images
            logits = self._logits(self.supernet, seen, config)
            truth = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            is_teacher = place == 0 and config == self.supernet.space.largest
            if self.guide is not None:
                loss = F.cross_entropy(logits, target)
            elif target is None or is_teacher:
                loss = truth
                if recipe.teacher == "live":
                    target = logits.detach().softmax(1)
            else:
                soft = self._ensemble(target, seen, config, configs)
                loss = recipe.distill * F.cross_entropy(logits, soft)
                if recipe.teacher == "frozen":
                    loss = loss + truth
            loss.backward()
            losses.append(loss.item())
        return losses

    def state_dict(self) -> dict:
        """Solvers and averaged weights."""
        solvers = [solver.state_dict() for solver in self.solvers]
        average = self._average.state_dict() if self._average else None
        return {"solvers": solvers, "average": average}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`."""
        for solver, saved in zip(self.solvers, state["solvers"], strict=True):
            solver.load_state_dict(saved)
        if self._average:
            self._average.load_state_dict(state["average"])

    def _logits(self, supernet, images, config) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return supernet(images, config).float()

    @torch.no_grad()
    def _target(self, images: torch.Tensor, progress: float) -> torch.Tensor | None:
        """What a teacher outside this step says, (N, classes) probabilities, or None."""
        if self.guide is not None:
            return self.guide(images).float().softmax(1)
        if self._average is None:
            return None
        if self.recipe.teacher == "frozen" and not self._is_frozen(progress):
            return None  # nothing has been learnt yet
        return self._says(images, self.supernet.space.largest)

    @torch.no_grad()
    def _ensemble(self, target, images, config: SubnetConfig, configs) -> torch.Tensor:
        """The target of `config`; for the smallest of an ensemble the mean of all its elders."""
        if self.recipe.teacher != "ensemble" or config != self.supernet.space.smallest:
            return target
        others = [self._says(images, other) for other in configs[1:] if other != config]
        return torch.stack([target, *others]).mean(0)

    def _says(self, images: torch.Tensor, config: SubnetConfig) -> torch.Tensor:
        """Probabilities (N, classes) of an averaged sub-network."""
        return self._logits(self._average.supernet, images, config).softmax(1)

    def _is_frozen(self, progress: float) -> bool:
        """Whether the teacher is one that has learnt all it will: the first phase is over."""
        return self.recipe.teacher == "frozen" and progress >= 1 / (len(PHASES) + 1)

    @torch.no_grad()
    def _best_up(self, config: SubnetConfig, images, labels, rng) -> SubnetConfig:
        """Of `config` and others of within a tenth of its MACs the one with the lowest loss."""
        space = self.supernet.space
        if config in (space.largest, space.smallest):
            return config

        def loss(candidate: SubnetConfig) -> float:
            logits = self._logits(self.supernet, images, candidate)
            return self.peers.mean([F.cross_entropy(logits, labels).item()])[0]

        work = macs_m(self.supernet, config)
        drawn = [space.sample(rng) for _ in range(10 * TRIES)]
        near = [other for other in drawn if abs(macs_m(self.supernet, other) / work - 1) < 0.1]
        return min([config, *near[: TRIES - 1]], key=loss)

    def _set_rates(self, progress: float) -> None:
        """Learning rates of this step, from those at the peak."""
        factor = rate(progress, self.recipe.warmup)
        for solver, rates in zip(self.solvers, self._peaks, strict=True):
            for group, peak in zip(solver.param_groups, rates, strict=True):
                group["lr"] = peak * factor
