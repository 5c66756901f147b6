"""Networks trained together with what decides in them: exits, and DS-Net's width gate.

Elsewhere in this study all networks are frozen. Here a copy of the shipped largest network learns
while its exits do, so that early features serve both; the shipped one, frozen, teaches them all.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from dynlib.data import augment
from dynlib.decide import Walk, train_gate
from dynlib.decide.gate import Gate
from dynlib.files import atomic_write, repo_root
from dynlib.images import Dataset, Images
from dynlib.nets.chain import chain
from dynlib.nets.resnet import Stage
from dynlib.nets.supernet import Supernet, calibrate, crop, macs_m
from dynlib.space import LayerSpec, SubnetConfig
from dynlib.training import calibration_batches
from suite.studies.adapt import (
    BATCH,
    RECALLS,
    THRESHOLDS,
    Exits,
    Routes,
    answers,
    cheapest,
    exit_choices,
    exits_of,
    halves,
    macs_at,
    paired_drop,
    right,
    routes_of,
)
from suite.studies.adapt_train import read_exits, restricted, round_to_halves, write_exits

PLACES = ("stages.0.blocks.0", "stages.1.blocks.0")  # ends of narrow sub-networks fit there
ALLOWED = (1.5, 0.6, 0.3, 0.1, 0.0)  # points that a choice may lose on validation images
KNOBS = np.append(np.linspace(-8, 16, 241), 1e6)
CALIBRATION = 5000  # images
SMOOTHING = 0.1
PAD = 4
_LOG = logging.getLogger(__name__)


def joint_path(dataset: str) -> Path:
    """Where the network with exits trained jointly lies, if one is shipped for the data set."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.joint_exits.safetensors"


def joint_rows_path(dataset: str) -> Path:
    """Where the rows of all seeds lie, as `train_all` writes them."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.joint.csv"


# -- exits ------------------------------------------------------------------------------------


class NarrowExit(nn.Module):
    """Maps (N, C, H, W) -> logits (N, classes): the stages that are still to come, but narrow.

    Its parameters have the names of the network's own and begin as slices of them: what is a narrow
    sub-network's end in the super-network has not to be learnt from nothing.

    Args:
        behind: name of the block, in a residual network of `dynlib.nets.resnet`.
    """

    def __init__(self, supernet: Supernet, behind: str):
        super().__init__()
        narrow, large = supernet.space.smallest, supernet.space.largest
        channels = supernet.blocks(large)[behind][-1].out_channels
        later = range(_stage_of(behind) + 1, len(narrow.width))
        config = replace(large, depth=narrow.depth, width=narrow.width)
        blocks = supernet.kind.layers(config, supernet.classes)
        rest = [layer for name, layers in blocks.items() for layer in layers
                if name == "head" or (name != "stem" and _stage_of(name) in later)]  # fmt: skip
        self.layers: list[LayerSpec] = [replace(rest[0], in_channels=channels), *rest[1:]]
        self.stages = nn.ModuleDict()
        for stage in later:
            self.stages[str(stage)] = Stage(channels, narrow.width[stage], narrow.depth[stage])
            channels = narrow.width[stage]
        self.head = nn.Linear(channels, supernet.classes)
        store = dict(supernet.net.named_parameters())
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(crop(store[name], parameter.shape))
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        """Shapes as in the class."""
        for stage in self.stages.values():
            x = stage.reduce(x)
            for block in stage.blocks:
                x = block(x)
        return self.head(x.amax((2, 3)))


def _stage_of(block: str) -> int:
    """The number of the stage that a block is of, such as 1 of ``stages.1.blocks.0``."""
    return int(block.split(".")[1])


@dataclass(frozen=True)
class JointExits:
    """A network of its own and the exits that were trained with it.

    Args:
        trunk: a super-network of one configuration.
        heads: by the name of the block that each is behind, in order.
    """

    trunk: Supernet
    heads: Mapping[str, NarrowExit]

    @property
    def places(self) -> list[str]:
        """Names of the blocks with an exit."""
        return list(self.heads)

    def prepare(self) -> nn.Module:
        """The network without its exits, in evaluation."""
        return self.trunk.prepare(self.trunk.space.largest)

    def macs_at(self, places: Sequence[str]) -> list[float]:
        """Millions of multiply-accumulates of an image that leaves at each place, or at the end."""
        own = {place: head.layers for place, head in self.heads.items()}
        return macs_at(self.trunk, self.trunk.space.largest, places, own)

    @torch.inference_mode()
    def said(self, images: Dataset, part: Images) -> Exits:
        """What all exits and the end say to the images of a part: the table to choose from."""
        pieces = chain(self.prepare()).cut(self.places)
        found = []
        for batch in part.images.split(BATCH):
            found.append(_say(pieces, self.heads.values(), images.normalise(batch)))
        return Exits(torch.cat(found), part.labels, self.places, self.macs_at)

    def walk(self, row: Mapping, example: torch.Tensor) -> Walk:
        """The network as it runs with the choice that is a row of `Exits.table`."""
        return exits_of(self.prepare(), row, self.heads, example)

    def save(self, path: Path, about: Mapping[str, object]) -> None:
        """Weights as halves, statistics as they are, and the hash of all of it."""
        tensors = {f"trunk.{n}": p.detach().half() for n, p in self.trunk.net.named_parameters()}
        (statistics,) = self.trunk.statistics.values()
        tensors |= {f"statistics.{name}": value for name, value in statistics.items()}
        for place, head in self.heads.items():
            parameters = dict(head.named_parameters())
            for name, value in head.state_dict().items():
                kept = value.half() if name in parameters else value
                tensors[f"heads/{place}/{name}"] = kept
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        write_exits(path, tensors, json.dumps(about))


def _as_shipped(supernet: Supernet, places: Sequence[str]) -> JointExits:
    """A copy of the largest network, and exits that are slices of it."""
    trunk = restricted(supernet, [supernet.space.largest])
    return JointExits(trunk, {place: NarrowExit(supernet, place) for place in places})


def _say(pieces: Sequence, heads, x: torch.Tensor) -> torch.Tensor:
    """Logits (N, classes, P) behind all pieces but the last, and of that itself."""
    *early, rest = pieces
    said = []
    for piece, head in zip(early, heads, strict=True):
        x = piece(x)
        said.append(head(x))
    return torch.stack([*said, rest(x)], 2)


def train_exits_jointly(
    supernet: Supernet,
    images: Dataset,
    *,
    seed: int,
    epochs: float = 1.0,
    places: Sequence[str] = PLACES,
    teacher: torch.Tensor | None = None,
    batch_size: int = 125,
    lr: float = 1e-4,
    lr_heads: float = 3e-4,
) -> JointExits:
    """A copy of the largest network, trained on together with exits that begin as slices of it.

    `loss = mean over exits and end of CE(z_i, y) + KL(softmax(z) || softmax(z_i))`, labels smoothed
    and z what the frozen largest network says to the image before it is augmented. (HADAS's loss;
    there the trunk is frozen.) Afterwards weights are rounded to halves, as they are stored, and
    statistics computed again.

    Args:
        teacher: z of all training images, (N, classes), as of `teacher_of`; computed if absent.
        epochs: 0 leaves all weights as they are shipped: the control.
        lr: peak of the trunk's rate, `lr_heads` of the exits'.
    """
    joint = _as_shipped(supernet, places)
    heads = nn.ModuleList(joint.heads.values()).train()
    if teacher is None and epochs:
        teacher = teacher_of(supernet, images)
    pieces = chain(joint.trunk.net).cut(joint.places)
    groups = [{"params": [p for p in joint.trunk.net.parameters() if p.requires_grad]},
              {"params": list(heads.parameters()), "lr": lr_heads}]  # fmt: skip

    def losses(index: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        labels = images.train.labels[index]
        said = _say(pieces, heads, x).unbind(2)
        return [_taught(logits, labels, teacher[index]) for logits in said]

    _learn(images, groups, losses, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed)
    for net in (joint.trunk.net, heads):
        round_to_halves(net)
    calibrate(joint.trunk, joint.trunk.space.largest, calibration_batches(images, CALIBRATION))
    _calibrate_heads(joint, heads, images)
    return joint


@torch.inference_mode()
def teacher_of(supernet: Supernet, images: Dataset) -> torch.Tensor:
    """What the frozen largest network says to the training images, (N, classes)."""
    return answers(supernet.prepare(supernet.space.largest), images, images.train)


def _taught(logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the labels plus the divergence from the teacher."""
    logs = logits.log_softmax(1)
    drift = F.kl_div(logs, teacher.log_softmax(1), reduction="batchmean", log_target=True)
    return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING) + drift


def _learn(
    images: Dataset,
    groups: Sequence[Mapping],
    losses_of: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
    *,
    lr: float,
    epochs: float,
    batch_size: int,
    seed: int,
) -> None:
    """AdamW with one cycle of the rate, up and down to nothing.

    Args:
        groups: of parameters, as the solver takes them.
        losses_of: numbers of training images, and what is seen of them -> losses, to be averaged.
    """
    count = round(epochs * len(images.train) / batch_size)
    if not count:
        return
    solver = torch.optim.AdamW(groups, lr, weight_decay=0.05)
    peaks = [group["lr"] for group in solver.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, peaks, count, pct_start=0.2)
    draws = torch.Generator().manual_seed(seed)
    lately = []
    for step, index in enumerate(_orders(len(images.train), batch_size, count, draws), start=1):
        batch = augment(images.train.images[index], draws, pad=PAD)
        losses = torch.stack(losses_of(index, images.normalise(batch)))
        losses.mean().backward()
        solver.step()
        solver.zero_grad()
        schedule.step()
        lately.append(losses.detach())
        if step % 20 == 0 or step == count:
            _LOG.info("step %d of %d: %s", step, count, torch.stack(lately).mean(0).tolist())
            lately.clear()


def _orders(images: int, batch_size: int, count: int, draws) -> Iterator[torch.Tensor]:
    """So many batches of numbers, every epoch in an order of its own."""
    per_epoch = max(1, images // batch_size)
    for epoch in range(math.ceil(count / per_epoch)):
        order = torch.randperm(images, generator=draws)
        yield from order.split(batch_size)[: min(per_epoch, count - epoch * per_epoch)]


@torch.no_grad()
def _calibrate_heads(joint: JointExits, heads: nn.ModuleList, images: Dataset) -> None:
    """Statistics of the exits' normalisations, from un-augmented training images."""
    for module in heads.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # cumulative average
    pieces = chain(joint.prepare()).cut(joint.places)
    heads.train()
    for batch in calibration_batches(images, CALIBRATION):
        _say(pieces, heads, batch)
    heads.eval().requires_grad_(False)


def load_joint_exits(path: Path, supernet: Supernet) -> JointExits:
    """What `JointExits.save` wrote, of the largest network of `supernet`.

    Raises:
        SuiteError: the content has not the hash that the file carries.
        CheckpointError: it belongs to another network.
    """
    tensors = read_exits(path)

    def those(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value.float() if value.is_floating_point() else value
                for name, value in tensors.items() if name.startswith(prefix)}  # fmt: skip

    places = {name.split("/")[1] for name in tensors if name.startswith("heads/")}
    large = supernet.space.largest
    names = list(supernet.blocks(large))
    joint = _as_shipped(supernet, sorted(places, key=names.index))
    joint.trunk.assign(those("trunk."), {str(large): those("statistics.")}, path)
    for place, head in joint.heads.items():
        head.load_state_dict(those(f"heads/{place}/"))
        head.eval().requires_grad_(False)
    return joint


def choose(table: pd.DataFrame, floor_pct: float) -> pd.Series:
    """The row with the least work that is at least so accurate; if none is, the most accurate."""
    reached = min(floor_pct, table["accuracy_pct"].max())
    return cheapest(table, reached)


# -- width gate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointGate:
    """Routes of their own and the gate that was trained with them.

    Args:
        supernet: of the routes.
        ways: the routes, smallest first.
        behind: name of the block that the gate is behind.
    """

    supernet: Supernet
    ways: Sequence[SubnetConfig]
    behind: str
    gate: Gate

    def routes(self, images: Dataset, part: Images) -> Routes:
        """What all routes say to the images of a part."""
        return routes_of(self.supernet, self.ways, self.behind, images, part)


def ways_of(supernet: Supernet) -> tuple[list[SubnetConfig], str]:
    """Three routes with the largest network's first stage: narrow, medium and all of it; and the
    name of the last block of that stage."""
    large = supernet.space.largest
    later = supernet.space.width[1:]

    def wide_first(width: Sequence[int], depth: Sequence[int]) -> SubnetConfig:
        depths = (large.depth[0], *depth)
        return SubnetConfig(large.resolution, depths, (large.width[0], *width))

    least = [depths[0] for depths in supernet.space.depth[1:]]
    deeper = [supernet.space.depth[1][-1], *least[1:]]
    narrow = wide_first([widths[0] for widths in later], least)
    medium = wide_first([widths[len(widths) // 2] for widths in later], deeper)
    return [narrow, medium, large], f"stages.0.blocks.{large.depth[0] - 1}"


def train_gate_jointly(
    supernet: Supernet,
    images: Dataset,
    *,
    seed: int,
    epochs: float = 1.0,
    teacher: torch.Tensor | None = None,
    thrift: float = 0.5,
    batch_size: int = 125,
    lr: float = 2e-4,
    lr_heads: float = 3e-3,
) -> JointGate:
    """A copy of three routes, trained on together with the gate before them.

    `loss = sum_k p_k l_k + CE(p, t) + thrift * (mean sum_k p_k m_k)^2`, as in `train_gate`, plus
    what each route is taught, as exits are, so that none starves; plus the cross-entropy of a
    linear classifier on what the gate sees, which is dropped afterwards: so that the features know
    more of the image. All routes run on all images, so the expectation is exact; DS-Net draws one
    route and trains the gate before frozen networks.

    Args:
        teacher: as in `train_exits_jointly`.
        thrift: weight of the work.
    """
    ways, behind = ways_of(supernet)
    own = restricted(supernet, ways)
    teacher = teacher_of(supernet, images) if teacher is None else teacher
    trunk, rest = chain(own.net).cut([behind])
    channels = own.blocks(ways[-1])[behind][-1].out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gate = Gate(channels, len(ways))
        helper = nn.Linear(channels, own.classes)
    share = torch.tensor([macs_m(own, config) for config in ways])
    share = share / share.max()
    groups = [{"params": [p for p in own.net.parameters() if p.requires_grad]},
              {"params": [*gate.parameters(), *helper.parameters()], "lr": lr_heads}]  # fmt: skip

    def losses(index: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        labels = images.train.labels[index]
        maps = trunk(x)
        pooled = maps.mean((2, 3))
        routes = [own(x, config) for config in ways[:-1]] + [rest(maps)]
        taught = [_taught(said, labels, teacher[index]) for said in routes]
        errors = [F.cross_entropy(said, labels, reduction="none") for said in routes]
        scores = gate(pooled)
        p = scores.softmax(1)
        expected = (p * torch.stack(errors, 1)).sum(1).mean()
        target = torch.where(routes[0].argmax(1) == labels, 0, len(ways) - 1)
        sandwich = F.cross_entropy(scores, target)
        spent = thrift * (p @ share).mean() ** 2
        helped = F.cross_entropy(helper(gate.norm(pooled)), labels)
        return [torch.stack(taught).mean(), expected, sandwich, spent, helped]

    _learn(images, groups, losses, lr=lr, epochs=epochs, batch_size=batch_size, seed=seed)
    round_to_halves(own.net)
    for config in ways:
        calibrate(own, config, calibration_batches(images, CALIBRATION))
    _calibrate_gate(own, behind, gate, images)
    return JointGate(own, ways, behind, gate.requires_grad_(False).eval().fold())


@torch.no_grad()
def _calibrate_gate(supernet: Supernet, behind: str, gate: Gate, images: Dataset) -> None:
    gate.norm.reset_running_stats()
    gate.norm.momentum = None  # cumulative average
    trunk, _ = chain(supernet.prepare(supernet.space.largest)).cut([behind])
    gate.train()
    for batch in calibration_batches(images, CALIBRATION):
        gate(trunk(batch))


# -- rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What the shipped largest network gets right, (N,), on validation and on test images."""

    val: np.ndarray
    test: np.ndarray
    macs_m: float

    @classmethod
    def of(cls, supernet: Supernet, images: Dataset) -> "Base":
        """From what it says to them."""
        largest = supernet.space.largest
        net = supernet.prepare(largest)
        with torch.inference_mode():
            val, test = (right(answers(net, images, part), part)
                         for part in (images.val, images.test))  # fmt: skip
        return cls(val, test, macs_m(supernet, largest))

    def row(self, ours: np.ndarray, macs: float) -> dict[str, float]:
        """Accuracy, paired loss and work of a choice on test images."""
        drop = paired_drop(self.test, ours)
        return {
            "accuracy_test_pct": 100 * ours.mean(),
            "drop_pp": drop["value"],
            "low": drop["low"],
            "high": drop["high"],
            "macs_ratio": macs / self.macs_m,
        }


def exit_rows(joint: JointExits, images: Dataset, base: Base, seed: int) -> list[dict]:
    """Each exit alone on all images, then what is chosen for each loss allowed on validation."""
    val = joint.said(images, images.val)
    test = joint.said(images, images.test)
    rows = []
    for place, name in enumerate([*joint.places, "end"]):
        macs = base.macs_m if name == "end" else joint.macs_at([name])[0]
        ours = {part: right(told.logits[..., place], getattr(images, part))
                for part, told in (("val", val), ("test", test))}  # fmt: skip
        alone = {"kind": "exit alone", "seed": seed, "choice": name, "threshold": 0.0,
                 "accuracy_val_pct": 100 * ours["val"].mean()}  # fmt: skip
        rows.append(alone | base.row(ours["test"], macs))
    choices = exit_choices(joint.places)
    for kind, recalls in (("exits", RECALLS), ("exits, stronger recall", (*RECALLS, 0.5))):
        table = val.table(choices, THRESHOLDS, recalls)
        for allowed in ALLOWED:
            row = choose(table, 100 * base.val.mean() - allowed)
            chosen = {"kind": kind, "seed": seed, "allowed_pp": allowed, "choice": row["places"],
                      "recall": row["recall"], "threshold": row["threshold"],
                      "accuracy_val_pct": row["accuracy_pct"]}  # fmt: skip
            rows.append(chosen | base.row(test.right(row), test.at(row)["macs_m"]))
    return rows


def gate_rows(joint: JointGate, images: Dataset, base: Base, seed: int) -> list[dict]:
    """Each route alone, then the gate as it was trained, and one trained anew on what its routes
    say to one half of the validation images; knobs are chosen on the other half."""
    val = joint.routes(images, images.val)
    test = joint.routes(images, images.test)
    rows = []
    for place, config in enumerate(joint.ways):
        alone = {"kind": "route alone", "seed": seed, "choice": str(config),
                 "accuracy_val_pct": 100 * val.right[:, place].float().mean().item()}  # fmt: skip
        macs = macs_m(joint.supernet, config)
        rows.append(alone | base.row(test.right[:, place].numpy(), macs))
    learn, held = halves(len(images.val), seed)
    few = val.take(learn)
    anew = train_gate(few.features, few.losses, few.right[:, 0], few.macs_m, seed=seed)
    for kind, gate in (("gate", joint.gate), ("gate, trained anew", anew)):
        table = val.take(held).table(gate, KNOBS)
        for allowed in ALLOWED:
            row = choose(table, 100 * base.val[held].mean() - allowed)
            tested = test.table(gate, [row["threshold"]]).iloc[0]
            ours = test.right[torch.arange(len(tested["taken"])), tested["taken"]].numpy()
            chosen = {"kind": kind, "seed": seed, "allowed_pp": allowed, "choice": "3 routes",
                      "threshold": row["threshold"],
                      "accuracy_val_pct": row["accuracy_pct"]}  # fmt: skip
            rows.append(chosen | base.row(ours, tested["macs_m"]))
    return rows


def train_all(
    supernet: Supernet,
    images: Dataset,
    *,
    exits: Sequence[tuple[int, float]],
    gates: Sequence[tuple[int, float]],
    rows_path: Path,
    checkpoint: Path,
    teacher: torch.Tensor | None = None,
) -> pd.DataFrame:
    """Train all seeds; rows are written after every one, and the exits of the first seed kept.

    Args:
        exits, gates: seeds and epochs, of either kind.
        rows_path: a table that is there already is continued.
        checkpoint: where the exits of seed 0 go, once they are trained.
    """
    teacher = teacher_of(supernet, images) if teacher is None else teacher
    base = Base.of(supernet, images)
    rows = pd.read_csv(rows_path) if rows_path.is_file() else pd.DataFrame()
    jobs = [(train_exits_jointly, exit_rows, exits), (train_gate_jointly, gate_rows, gates)]
    for train, judge, seeds in jobs:
        for seed, epochs in seeds:
            joint = train(supernet, images, seed=seed, epochs=epochs, teacher=teacher)
            if seed == 0 and epochs and isinstance(joint, JointExits):
                trained = f"{epochs} epochs with exits, from the largest network, seed {seed}"
                joint.save(checkpoint, {"dataset": images.name, "trained": trained})
            new = pd.DataFrame(judge(joint, images, base, seed)).assign(epochs=epochs)
            rows = pd.concat([rows, new], ignore_index=True)
            atomic_write(rows_path, rows.to_csv(index=False, float_format="%.6g").encode())
            _LOG.info("%s", new.to_string())
    return rows
