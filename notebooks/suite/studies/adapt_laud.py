"""LAUDNet (arXiv 2308.15949) trained: maskers of whole branches or channels, and static rivals.

`python -m suite.studies.adapt_laud DATASET SEED...` trains all `KINDS` of a network for
``cifar10`` or ``imagenette``, all from one dense start and on the same views, adds a row for each
to `data/checkpoints/laud.csv` and ships the networks of seed 0.

The network is small, but nearly all of its work lies in residual branches, which is what maskers
can save. With the paper's loss alone maskers soon decide the same for every image, so here

* no block has a bound of its own, only the network;
* maskers see standardised features, and start from a regression on them of how hard the dense
  network finds an image (`start`), at a mean probability of about 0.7 to keep a part;
* an image's work costs the more the easier the dense network finds it (`learn_masked`);
* after the first third of the training decisions are those of the test time, so that the weights
  get used to them.

Groups of channels are nested: one is kept if all before it are, so that what is kept are views of
the weights.
"""

import copy
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynlib._vision import timm
from dynlib.data import augment, load_dataset
from dynlib.decide.bottleneck import Bottleneck, Columns
from dynlib.decide.decisions import Kept
from dynlib.decide.maskers import ChannelMasker, PatchMasker, bounds_loss, drawn, tau_at
from dynlib.decide.walk import Seen, one_of
from dynlib.files import atomic_write, repo_root, work_dir
from dynlib.images import Dataset, Images
from dynlib.nets.chain import Chain, Row, chain
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.nets.trace import layers_of
from dynlib.training import Recipe, calibration_batches, train
from dynlib.training.step import rate
from suite.studies.adapt import BATCH, answers, paired_drop, per_image, right, time_rounds
from suite.studies.adapt_train import read_exits, write_exits
from suite.studies.own_model import find_photos
from suite.studies.static import ONE

Widths = Sequence[Sequence[int]]  # inner channels of every block of every stage

DENSE = ((24,) * 3, (48,) * 4)
RIVALS = {  # static networks: blocks taken away, or inner channels
    "control": DENSE,
    "depth 2 3": ((24,) * 2, (48,) * 3),
    "depth 1 2": ((24,) * 1, (48,) * 2),
    "width 5/6": ((20,) * 3, (40,) * 4),
    "width 2/3": ((16,) * 3, (32,) * 4),
}
MODES = ("layer", "channel")
KINDS = (*MODES, *RIVALS)
STEM = 32  # channels
SHIPPED = repo_root() / "data" / "checkpoints"
GROUPS = 4  # of inner channels
TARGET = 0.55  # of the network's work
LAMBDA, GUIDE = 10.0, 2.0  # weights of the losses on how much work is done, and on which images
DISTILL, TEMPERATURE = 0.5, 4.0
MASKER_RATE = 3e-3
FIRST = 40  # steps whose views maskers start from
SETTLED = 0.3  # share of the training after which nothing is drawn any more


@dataclass(frozen=True)
class Plan:
    """How long: epochs from scratch, steps of fine-tuning, images in a step of each; and the peak
    rate of fine-tuning."""

    dense: int
    dense_batch: int
    finetune: int
    batch: int
    rate: float


PLANS = {
    "cifar10": Plan(2, 250, 200, 100, 0.02),
    "imagenette": Plan(8, 100, 100, 50, 0.02),
}


class Net(Row):
    """Bottlenecks of timm in two stages, of 16 and 8 pixels: (N, 3, size, size) -> logits.

    A block puts out twice the inner channels that it has in `DENSE`, however many it has.
    """

    def __init__(self, classes: int, size: int, widths: Widths = DENSE):
        super().__init__()
        stride = size // 16
        conv = nn.Conv2d(3, STEM, stride + 1, stride, (stride + 1) // 2, bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm2d(STEM), nn.ReLU())
        self.stages = nn.ModuleList()
        channels = STEM
        for number, (inner, (whole, *_)) in enumerate(zip(widths, DENSE, strict=True)):
            out = 2 * whole
            blocks = []
            for place, width in enumerate(inner):
                step = 2 if number and not place else 1
                shortcut = None
                if not place:
                    projection = nn.Conv2d(channels, out, 1, step, bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))
                base = 256 * (width + 0.5) / out  # timm rounds out / 4 * base / 64 down
                block = timm.models.resnet.Bottleneck(
                    channels, out // 4, step, shortcut, base_width=base
                )
                blocks.append(block)
                channels = out
            self.stages.append(nn.ModuleList(blocks))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )
        self.to(memory_format=torch.channels_last)

    def row(self):
        """As in `Row`."""
        yield "stem", self.stem
        yield from self.blocks()
        yield "head", self.head

    def blocks(self) -> Iterator[tuple[str, nn.Module]]:
        """Names and bottlenecks, in order."""
        for number, stage in enumerate(self.stages):
            for place, block in enumerate(stage):
                yield f"stages.{number}.{place}", block


def work_of(classes: int, size: int, widths: Widths = DENSE) -> dict[str, list[float]]:
    """Multiply-accumulates in millions of each layer of each part; of a block its three first."""
    with torch.device("meta"):
        net = Net(classes, size, widths)
    found = layers_of(net, size, chain(net).blocks)
    return {name: [layer.macs / 1e6 for layer in layers] for name, layers in found.items()}


@torch.no_grad()
def put_in_order(net: Net) -> None:
    """Sort each block's inner channels, those first that weigh most on the layer behind.

    What the network computes stays the same.
    """
    for _, block in net.blocks():
        layers = (block.conv1, block.bn1, block.conv2), (block.conv2, block.bn2, block.conv3)
        for before, norm, behind in layers:
            weight = behind.weight.abs().sum((0, 2, 3)) * norm.weight.abs()
            order = weight.argsort(descending=True)
            before.weight.copy_(before.weight[order])
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                values.copy_(values[order])
            behind.weight.copy_(behind.weight[:, order])


@torch.no_grad()
def cut_from(dense: Net, classes: int, size: int, widths: Widths) -> Net:
    """A copy with fewer blocks in a stage, of the last ones, or with the first inner channels."""
    net = Net(classes, size, widths)
    whole = dense.state_dict()
    for name, value in net.state_dict().items():
        value.copy_(whole[name][tuple(map(slice, value.shape))])
    return net


class Masked(nn.Module):
    """A network whose branches are multiplied by masks: the definition, and what is trained.

    Args:
        net: whose weights are used, not copied.
        mode: one of `MODES`.
        work: as of `work_of`.
    """

    def __init__(self, net: Net, mode: str, work: Mapping[str, Sequence[float]]):
        super().__init__()
        self.net = net
        self.mode = mode
        self.work = work
        self.total = sum(map(sum, work.values()))
        maskers = []
        for _, block in net.blocks():
            channels = block.conv1.in_channels
            if mode == "layer":
                masker = PatchMasker(channels, 1)
            else:
                masker = ChannelMasker(channels, GROUPS)
            maskers.append(Scaled(masker, channels))
        self.maskers = nn.ModuleList(maskers)

    def forward(self, images, decide: Callable | None = None):
        """Logits (N, classes), and the share of the work that each image takes, (N,).

        `decide`: logits of a masker -> masks; by default as at test time.
        """
        decide = decide or kept
        x = self.net.stem(images)
        left = torch.zeros(len(images))
        for (name, block), masker in zip(self.net.blocks(), self.maskers, strict=True):
            first, second, third, *_ = self.work[name]
            mask = decide(masker(x))
            if self.mode == "layer":
                branch = mask[:, None, None, None] * masked_branch(block, x)
                dropped = (1 - mask) * (first + second + third)
            else:
                mask = nested(mask)
                branch = masked_branch(block, x, mask)
                r1, r2 = mask.mean(2).unbind(1)
                dropped = (1 - r1) * first + (1 - r1 * r2) * second + (1 - r2) * third
            left = left - dropped
            shortcut = x if block.downsample is None else block.downsample(x)
            x = F.relu(branch + shortcut)
        return self.net.head(x), 1 + left / self.total


class Scaled(nn.Module):
    """A masker that is given standardised means of the maps; shapes as the masker's."""

    def __init__(self, masker: nn.Module, channels: int):
        super().__init__()
        self.masker = masker
        self.first = "logits" if isinstance(masker, PatchMasker) else "hidden"
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def forward(self, x):
        """As in the class."""
        means = (x.mean((2, 3)) - self.mean) / self.std
        return self.masker(means[..., None, None])

    @torch.no_grad()
    def start(self, means: torch.Tensor, hard: torch.Tensor) -> None:
        """Standardise as these means (N, C), and keep parts where a regression says hard (N,).

        Logits to keep and to drop differ by 1 +- 1.5, in the mean and standard deviation.
        """
        self.mean.copy_(means.mean(0))
        self.std.copy_(means.std(0) + 1e-3)
        scaled = (means - self.mean) / self.std
        ridge = 1e-2 * torch.eye(scaled.shape[1])
        weight = torch.linalg.solve(scaled.T @ scaled / len(hard) + ridge, scaled.T @ hard)
        weight /= (scaled @ weight).std()
        bias_keep, bias_drop = self.masker.logits.bias.chunk(2)
        keep, drop = self.masker.logits.weight.flatten(1).chunk(2)
        bias_drop.fill_(0.0)
        if self.first == "logits":
            bias_keep.fill_(1.0)
            keep.copy_(1.5 * weight)
            drop.zero_()
        else:  # one hidden unit says how hard, and is nearly always positive
            self.masker.hidden.weight[0] = weight
            self.masker.hidden.bias[0] = 3.0
            bias_keep.fill_(1.0 - 1.5 * 3.0)
            keep[:, 0] = 1.5
            drop[:, 0] = 0.0

    @torch.no_grad()
    def folded(self) -> nn.Module:
        """The masker with the scale in its first layer."""
        masker = copy.deepcopy(self.masker)
        layer = getattr(masker, self.first)
        scale = 1 / self.std
        layer.bias -= layer.weight.flatten(1) @ (self.mean * scale)
        layer.weight *= scale.view(-1, *layer.weight.shape[2:])
        return masker


@torch.no_grad()
def start(net: Masked, lessons) -> None:
    """Let all maskers start from what the means of their maps say of how hard images are.

    Args:
        lessons: of (progress, view, labels, what the dense network says).
    """
    means = [[] for _ in net.maskers]
    hard = []
    for _, view, labels, said in lessons:
        hard.append(harder(said, labels))
        x = net.net.stem(view)
        for found, (_, block) in zip(means, net.net.blocks(), strict=True):
            found.append(x.mean((2, 3)))
            x = block(x)
    for found, masker in zip(means, net.maskers, strict=True):
        masker.start(torch.cat(found), torch.cat(hard))


def masked_branch(block: nn.Module, x, mask=None):
    """The residual branch, its inner channels multiplied by a mask (N, 2, groups)."""
    scales = [1, 1]
    if mask is not None:
        each = block.conv1.out_channels // mask.shape[2]
        scales = mask.repeat_interleave(each, 2)[..., None, None].unbind(1)
    hidden = scales[0] * block.act1(block.bn1(block.conv1(x)))
    hidden = scales[1] * block.act2(block.bn2(block.conv2(hidden)))
    return block.bn3(block.conv3(hidden))


def kept(logits: torch.Tensor) -> torch.Tensor:
    """Masks (N, *parts) of 0 and 1 as at test time, straight through: as `drawn`, but not drawn."""
    soft = logits.softmax(1)[:, 0]
    keep, drop = logits.unbind(1)
    hard = (keep >= drop).to(soft.dtype)
    return hard + soft - soft.detach()


def nested(mask: torch.Tensor) -> torch.Tensor:
    """A group of (N, 2, groups) is kept if all before it are; the first one always."""
    first = torch.ones_like(mask[..., :1])
    return torch.cat([first, mask[..., 1:]], 2).cumprod(2)


def harder(said: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How hard the dense network finds each image of a batch, (N,): ranks of its loss, -1 to 1."""
    loss = F.cross_entropy(said, labels, reduction="none")
    rank = loss.argsort().argsort()
    return 2 * rank / max(1, len(rank) - 1) - 1


# -- training ---------------------------------------------------------------------------------


def views(images: Dataset, steps: int, batch: int, seed: int):
    """Yields (progress, view, labels) of every step: the same ones for one seed."""
    draws = torch.Generator().manual_seed(seed)
    size = images.train.images.shape[-1]
    count = len(images.train)
    batch = min(batch, count)
    order = torch.randperm(count, generator=draws)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(count, generator=draws)
        index, order = order[:batch], order[batch:]
        part = images.train.take(index)
        view = images.normalise(augment(part.images, draws, pad=size // 16))
        yield step / steps, view, part.labels


def fit(net: nn.Module, steps, peak: float, loss: Callable) -> None:
    """Train in place, weights by SGD and maskers by Adam.

    Args:
        steps: of (progress, view, labels, ...).
        peak: learning rate of the weights.
        loss: (net, *step) -> scalar.
    """
    maskers = list(net.maskers.parameters()) if isinstance(net, Masked) else []
    free = (net.net if maskers else net).parameters()
    weights, rest = [], []
    for parameter in free:
        (weights if parameter.ndim > 1 else rest).append(parameter)
    groups = [{"params": weights, "weight_decay": 5e-4}, {"params": rest}]
    solvers = [(torch.optim.SGD(groups, peak, momentum=0.9, nesterov=True), peak)]
    if maskers:
        solvers.append((torch.optim.Adam(maskers, MASKER_RATE), MASKER_RATE))
    net.train()
    for progress, *step in steps:
        value = loss(net, progress, *step)
        for solver, highest in solvers:
            for group in solver.param_groups:
                group["lr"] = highest * rate(progress, 0.1)
        value.backward()
        for solver, _ in solvers:
            solver.step()
            solver.zero_grad()
    net.eval()


def taught(logits, labels, said):
    """Cross-entropy, and half of the distance from what the dense network said."""
    log_p, log_q = ((some / TEMPERATURE).log_softmax(1) for some in (logits, said))
    far = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    return F.cross_entropy(logits, labels) + DISTILL * TEMPERATURE**2 * far


def learn_static(net, progress, view, labels, said):
    """Loss of a static network in fine-tuning."""
    return taught(net(view), labels, said)


def learn_masked(net: Masked, progress, view, labels, said):
    """Loss of a dynamic network: of the labels, of its work, and of who works.

    `10 (F / F_full - t)^2 - 2 mean_i(z_i F_i / F_full)`, z_i of image i as in `harder`
    """
    decide = partial(drawn, tau=tau_at(progress)) if progress < SETTLED else kept
    logits, work = net(view, decide)
    whole = bounds_loss(torch.zeros(1), work.mean(), TARGET, 1.0)
    who = -(harder(said, labels) * work).mean()
    return taught(logits, labels, said) + LAMBDA * whole + GUIDE * who


def dense_of(images: Dataset, seed: int = 0) -> Net:
    """The network that all others start from, its channels in order; kept in the work folder.

    Trained from scratch by the solver and augmentation of the super-networks.
    """
    plan = PLANS[images.name]
    path = work_dir() / "cache" / f"{images.name}.laud-{seed}-{plan.dense}.safetensors"
    classes, size = len(images.classes), images.train.images.shape[-1]
    net = Net(classes, size).eval()
    if path.is_file():
        net.load_state_dict(read_exits(path))
        return net
    torch.manual_seed(seed)
    supernet = Supernet(ONE, classes, build=lambda config, classes: Net(classes, size))
    recipe = Recipe(epochs=plan.dense, batch_size=plan.dense_batch, pad=size // 16)
    train(supernet, images, recipe, seed=seed, watch=0)
    calibrate(supernet, ONE.largest, calibration_batches(images))
    net.load_state_dict(supernet.prepare(ONE.largest).state_dict(), strict=False)
    put_in_order(net)
    write_exits(path, {k: v.contiguous() for k, v in net.state_dict().items()}, images.name)
    return net


def tuned(kind: str, dense: Net, said: Sequence[torch.Tensor], images: Dataset, seed: int):
    """One of `KINDS`, a `Net` or `Masked`, fine-tuned from the dense network, weights rounded.

    Args:
        said: what the dense network says of the views of every step.
    """
    plan = PLANS[images.name]
    torch.manual_seed(seed)
    net = new(kind, len(images.classes), images.train.images.shape[-1], dense)

    def lessons():
        steps = views(images, plan.finetune, plan.batch, seed)
        return ((*step, some) for step, some in zip(steps, said, strict=True))

    if kind in MODES:
        start(net, itertools.islice(lessons(), FIRST))
    fit(net, lessons(), plan.rate, learn_masked if kind in MODES else learn_static)
    for parameter in net.parameters():  # what is reported is what is shipped
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    return net


def new(kind: str, classes: int, size: int, dense: Net | None = None) -> nn.Module:
    """One of `KINDS`, cut from the dense network or with weights by chance, in evaluation."""
    widths = RIVALS.get(kind, DENSE)
    net = cut_from(dense, classes, size, widths) if dense else Net(classes, size, widths)
    if kind in MODES:
        net = Masked(net, kind, work_of(classes, size))
    return net.eval()


@torch.inference_mode()
def shares(net: nn.Module, images: Dataset, part: Images) -> np.ndarray:
    """Share of the dense network's work that each image takes, (N,)."""
    classes, size = len(images.classes), images.train.images.shape[-1]
    if isinstance(net, Masked):
        work = [net(images.normalise(batch))[1] for batch in part.images.split(BATCH)]
        return torch.cat(work).numpy()
    widths = [[block.conv1.out_channels for block in stage] for stage in net.stages]
    ours, whole = (sum(map(sum, work_of(classes, size, w).values())) for w in (widths, DENSE))
    return np.full(len(part), ours / whole)


def row_of(kind: str, net: nn.Module, images: Dataset, seed: int) -> dict:
    """A row of `laud.csv`: accuracy of what is executed, and the work of the test images."""
    run = executed(net, images.normalise(images.val.images[:1]))
    share = shares(net, images, images.test)
    classes, size = len(images.classes), images.train.images.shape[-1]
    row = {"dataset": images.name, "mode": kind, "seed": seed}
    for name, part in (("test", images.test), ("val", images.val)):
        row[f"accuracy_{name}_pct"] = 100 * right(answers(run, images, part), part).mean()
    return row | {
        "macs_m": sum(map(sum, work_of(classes, size).values())) * share.mean(),
        "macs_share_mean": share.mean(),
        "macs_share_sd": share.std(),
    }


def train_all(images: Dataset, seeds: Sequence[int], folder: Path) -> None:
    """Train all `KINDS` with every seed; write their rows, and ship the networks of seed 0."""
    plan = PLANS[images.name]
    dense = dense_of(images)
    for seed in seeds:
        with torch.inference_mode():
            steps = views(images, plan.finetune, plan.batch, seed)
            said = [dense(view) for _, view, _ in steps]
        said = [some.clone() for some in said]
        nets = {}
        for kind in KINDS:
            nets[kind] = tuned(kind, dense, said, images, seed)
            row = row_of(kind, nets[kind], images, seed)
            add_row(folder / "laud.csv", row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
            if seed == 0:
                ship(nets, images, folder)


def add_row(path: Path, row: Mapping) -> None:
    """Add a row to the table, in place of one for the same data set, mode and seed."""
    table = pd.DataFrame([row])
    if path.is_file():
        table = pd.concat([pd.read_csv(path), table], ignore_index=True)
    table = table.drop_duplicates(["dataset", "mode", "seed"], keep="last")
    atomic_write(path, table.round(4).to_csv(index=False).encode())


def ship(nets: Mapping[str, nn.Module], images: Dataset, folder: Path) -> None:
    """Write the networks into one file, matrices at half precision."""
    tensors = {}
    for kind, net in nets.items():
        for name, value in net.state_dict().items():
            small = value.half() if value.ndim > 1 else value
            tensors[f"{kind}:{name}"] = small.contiguous()
    plan = asdict(PLANS[images.name])
    about = {"dataset": images.name, "classes": len(images.classes), "plan": plan, "seed": 0}
    write_exits(folder / f"{images.name}.laud.safetensors", tensors, json.dumps(about))


# -- what is shipped --------------------------------------------------------------------------


def is_shipped(images: Dataset, folder: Path = SHIPPED) -> bool:
    """Whether networks are shipped for these images."""
    return (folder / f"{images.name}.laud.safetensors").is_file()


def shipped(images: Dataset, folder: Path = SHIPPED) -> dict[str, nn.Module]:
    """The shipped networks by kind: `Masked` ones of `MODES`, and static ones, in evaluation.

    Raises `SuiteError` where the file is not as it was written.
    """
    tensors = read_exits(folder / f"{images.name}.laud.safetensors")
    found = {name.partition(":")[0] for name in tensors}
    nets = {}
    for kind in sorted(found, key=KINDS.index):
        net = new(kind, len(images.classes), images.train.images.shape[-1])
        mine = {name.partition(":")[2]: value for name, value in tensors.items()
                if name.startswith(f"{kind}:")}  # fmt: skip
        net.load_state_dict(mine)
        nets[kind] = net
    return nets


@torch.inference_mode()
def executed(net: nn.Module, example: torch.Tensor) -> Chain:
    """A `Net` or `Masked` as it runs at test time: normalisation folded in, only what is kept.

    `example`: a normalised image (1, 3, size, size).
    """
    static = net.net if isinstance(net, Masked) else net
    conv, norm, _ = static.stem
    stem = nn.Sequential(fuse_conv_bn_eval(conv, norm), nn.ReLU(inplace=True))
    blocks: dict[str, Callable] = {"stem": stem}
    x = stem(example)
    for number, (name, block) in enumerate(static.blocks()):
        whole = Bottleneck(block)
        blocks[name] = whole
        if net is not static:
            masker = net.maskers[number].folded()
            if net.mode == "layer":
                blocks[name] = one_of([whole.bypass, whole], masker, Kept(), x)
            else:
                blocks[name] = Columns(block, masker, GROUPS, kept_nested)
        x = whole(x)
    return Chain(blocks | {"head": static.head})


def kept_nested(seen: Seen) -> torch.Tensor:
    """A decision of `Columns`: what `Kept` keeps, (n, 2, groups), but `nested`."""
    return nested(Kept()(seen))


def times_of(
    runs: Mapping[str, Callable], images: Dataset, part: Images, batch: int = 1, rounds: int = 5
) -> pd.DataFrame:
    """Time of executed networks on the same images, interleaved; as `time_rounds`."""
    with torch.inference_mode():
        return time_rounds(runs, images.normalise(part.images), batch, rounds)


def static_at(taken: pd.Series, answered: Mapping, mode: str):
    """What the static network of equal time answers, of the mode's own kind.

    That is blocks taken away (layer) or inner channels (channel). It lies between two measured ones
    and answers as either with the probability that makes the times equal; beyond the slowest or the
    fastest it is that one.

    Args:
        taken: time by kind.
        answered: accuracy by kind, or whether each image is answered rightly, (N,).
        mode: one of `MODES`.
    """
    own = "depth" if mode == "layer" else "width"
    curve = [name for name in RIVALS if name == "control" or name.startswith(own)]
    curve = sorted(set(curve) & set(taken.index) & set(answered), key=taken.get)
    place = np.interp(taken[mode], taken[curve], np.arange(len(curve)))
    below, above = curve[int(place)], curve[min(int(place) + 1, len(curve) - 1)]
    share = place - int(place)
    return (1 - share) * answered[below] + share * answered[above]


def against_static(
    times: pd.DataFrame, answered: Mapping[str, np.ndarray], mode: str, column: str = "latency_ms"
) -> dict[str, float]:
    """Points of accuracy that a dynamic network gains on the static one of equal time.

    Args:
        times: of all runs on the same images, as of `times_of`: means over images of medians over
            rounds count.
        answered, mode: as of `static_at`.

    Returns:
        value, low and high (95 %, paired by image), n; and time, that of the dynamic network over
        the control's.
    """
    taken = per_image(times, column)["mean_ms"]
    gain = paired_drop(answered[mode].astype(float), static_at(taken, answered, mode))
    return gain | {"time": taken[mode] / taken["control"]}


def over_seeds(times: pd.DataFrame, rows: pd.DataFrame, mode: str) -> dict[str, pd.Series]:
    """Points of accuracy that a dynamic network gains, by seed, of rows of `laud.csv`.

    Args:
        times: as of `against_static`, of the shipped networks, which are of one seed.
        rows: of one data set.
        mode: one of `MODES`.

    Returns:
        ``accuracy_vs_static``, of equal time, and ``accuracy_vs_control``.
    """
    taken = per_image(times)["mean_ms"]
    table = rows.pivot(index="seed", columns="mode", values="accuracy_test_pct").dropna()
    static = [static_at(taken, accuracy, mode) for accuracy in table.to_dict("records")]
    rivals = {"accuracy_vs_static": static, "accuracy_vs_control": table["control"]}
    return {key: table[mode] - rival for key, rival in rivals.items()}


if __name__ == "__main__":
    name, *seeds = sys.argv[1:]
    photos = {"imagenette": {"name": find_photos(), "size": 128}}
    images = load_dataset(**photos.get(name, {"name": name}))
    train_all(images, [int(seed) for seed in seeds], SHIPPED)
