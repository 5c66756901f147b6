"""Networks that spend less on easy images: what they lose, and what the clock says they gain.

Weights are frozen, so what each network says to each image is computed once; thresholds are then
chosen by look-up on validation images. The chosen ones are executed, as walks, and timed.
"""

import base64
import io
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from dynlib.boards import Board
from dynlib.decide import Sure, Walk, cascade, confidence, exit_layers, gated, with_exits
from dynlib.decide.decisions import Highest, threshold_table
from dynlib.decide.exits import GRID
from dynlib.decide.walk import STOP, Step
from dynlib.images import Dataset, Images
from dynlib.nets.chain import chain
from dynlib.nets.supernet import Supernet, macs_m
from dynlib.points import PointTable
from dynlib.profile.timing import undisturbed
from dynlib.runtime.case import Case
from dynlib.space import LayerSpec, SubnetConfig
from dynlib.workload import App, Change, Workload

THRESHOLDS = np.round(np.linspace(0.3, 1.0, 141), 4)
RECALLS = (0.0, 0.2)  # weights of what was said before
BATCH = 250
IN_A_ROW = 20  # images that a run is timed with before the next one's turn, or one batch


@torch.inference_mode()
def answers(net: Callable, images: Dataset, part: Images) -> torch.Tensor:
    """Logits (N, classes) of a network or walk, in fp32."""
    batches = part.images.split(BATCH)
    return torch.cat([net(images.normalise(batch)) for batch in batches])


def right(logits: torch.Tensor, part: Images) -> np.ndarray:
    """Whether each image is answered rightly, (N,)."""
    return (logits.argmax(1) == part.labels).numpy()


def paired_drop(whole: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """Points of accuracy that `ours` loses on the same images, with its 95 % interval."""
    lost = 100 * (whole.astype(float) - ours)
    half = 1.96 * lost.std(ddof=1) / math.sqrt(len(lost))
    mean = lost.mean()
    return {"value": mean, "low": mean - half, "high": mean + half, "n": len(lost)}


def cheapest(table: pd.DataFrame, floor_pct: float) -> pd.Series:
    """The row with the least work among those at least so accurate."""
    kept = table[table["accuracy_pct"] >= floor_pct]
    return kept.loc[kept["macs_m"].idxmin()]


def most_accurate(table: pd.DataFrame, most_macs_m: float) -> pd.Series:
    """The most accurate row with at most so much work; of equal ones that with the least."""
    kept = table[table["macs_m"] <= most_macs_m].sort_values("macs_m")
    return kept.loc[kept["accuracy_pct"].idxmax()]


# -- cascade ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """What two networks say to the same images: all that a cascade's look-up needs.

    Args:
        first, last: logits (N, classes) of either.
        labels: (N,).
        macs_m: work of either.
        temperature: calibrates the first one.
    """

    first: torch.Tensor
    last: torch.Tensor
    labels: torch.Tensor
    macs_m: tuple[float, float]
    temperature: float

    def goes_on(self, threshold: float) -> np.ndarray:
        """Which images the second network sees, (N,)."""
        return (confidence(self.first, self.temperature) < threshold).numpy()

    def right(self, threshold: float, recall: float) -> np.ndarray:
        """Which images the cascade answers rightly, (N,)."""
        both = self.last.log_softmax(1) + recall * self.first.log_softmax(1)
        late = both.argmax(1) == self.labels
        early = self.first.argmax(1) == self.labels
        return np.where(self.goes_on(threshold), late, early)

    def table(self, thresholds: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
        """One row per threshold and recall: accuracy_pct, macs_m, and goes_on_pct."""
        rows = []
        for recall, threshold in itertools.product(RECALLS, thresholds):
            share = self.goes_on(threshold).mean()
            row = {
                "recall": recall,
                "threshold": threshold,
                "accuracy_pct": 100 * self.right(threshold, recall).mean(),
                "macs_m": self.macs_m[0] + share * self.macs_m[1],
                "goes_on_pct": 100 * share,
            }
            rows.append(row)
        return pd.DataFrame(rows)

    def shuffled_drop(self, threshold: float, recall: float, seeds: int) -> np.ndarray:
        """Points lost when as many images go on, but any: one value a seed."""
        chosen = self.goes_on(threshold)
        both = self.last.log_softmax(1) + recall * self.first.log_softmax(1)
        late = (both.argmax(1) == self.labels).numpy()
        early = (self.first.argmax(1) == self.labels).numpy()
        ours = np.where(chosen, late, early).mean()
        drops = []
        for seed in range(seeds):
            any_of = np.random.default_rng(seed).permutation(chosen)
            drops.append(100 * (ours - np.where(any_of, late, early).mean()))
        return np.array(drops)


def cascade_of(runs: Sequence[Callable], rule: Sure, recall: float, example) -> Walk:
    """The cascade of two networks, or of two engines' callables."""
    if all(isinstance(run, nn.Module) for run in runs):
        return cascade(runs, [rule], example, recall)
    first, last = runs
    steps = [Step(first, (STOP, 1), rule, None, True), Step(last, from_images=True, recall=recall)]
    return Walk(steps, example)


# -- exits ------------------------------------------------------------------------------------


class Exit(nn.Module):
    """Maps (N, C, H, W) -> logits: the pooling that exits are trained behind, then the exit."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, x):
        """Shapes as in the class."""
        return self.classifier(F.adaptive_avg_pool2d(x, GRID).flatten(1))


@dataclass(frozen=True)
class Exits:
    """What exits say to the same images: all that choosing among them by look-up needs.

    Args:
        logits: (N, classes, P) of all places in order, and last of the network's end.
        labels: (N,).
        places: names of the blocks with an exit.
        macs_m: chosen places -> work of an image that leaves at each of them, or at the end.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    places: Sequence[str]
    macs_m: Callable[[Sequence[str]], Sequence[float]]

    def said(self, places: Sequence[str], recall: float) -> tuple[np.ndarray, np.ndarray]:
        """Whether each chosen place and the end are right, and how sure; both (N, places + 1)."""
        columns = [*map(list(self.places).index, places), len(self.places)]
        answers = [self.logits[..., column] for column in columns]
        if recall:
            for place in range(1, len(answers)):
                before = answers[place - 1].log_softmax(1)
                answers[place] = answers[place].log_softmax(1) + recall * before
        sure, guess = torch.stack(answers, 1).softmax(2).max(2)
        return (guess == self.labels[:, None]).numpy(), sure.numpy()

    def table(
        self,
        choices: Sequence[Sequence[str]],
        thresholds: Sequence[float] = THRESHOLDS,
        recalls: Sequence[float] = RECALLS,
    ) -> pd.DataFrame:
        """One row per choice of places, recall and threshold, with accuracy_pct and macs_m."""
        found = []
        for places, recall in itertools.product(choices, recalls):
            table = threshold_table(*self.said(places, recall), self.macs_m(places), thresholds)
            found.append(table.assign(places=" ".join(places), recall=recall))
        names = {"exit_threshold": "threshold", "cost": "macs_m", "stays_pct": "goes_on_pct"}
        return pd.concat(found, ignore_index=True).rename(columns=names)

    def at(self, row: Mapping) -> pd.Series:
        """What the choice that is a row of another part's table does here, as a row."""
        return self.table([row["places"].split()], [row["threshold"]], [row["recall"]]).iloc[0]

    def right(self, row: Mapping) -> np.ndarray:
        """Which images are answered rightly by the choice that is a row of `table`, (N,)."""
        answered, sure = self.said(row["places"].split(), row["recall"])
        leaves = sure >= row["threshold"]
        leaves[:, -1] = True
        return answered[np.arange(len(answered)), leaves.argmax(1)]


@torch.inference_mode()
def exits_said(
    supernet: Supernet,
    config: SubnetConfig,
    exits: Sequence[nn.Module],
    seen: tuple[Sequence[torch.Tensor], torch.Tensor],
    part: Images,
) -> Exits:
    """What exits behind all blocks of a frozen network say; `seen` as of `features_of`."""
    features, logits = seen
    said = [net(some) for net, some in zip(exits, features, strict=True)]
    places = list(supernet.blocks(config))[1:-2]
    return Exits(
        torch.stack([*said, logits], 2), part.labels, places, partial(macs_at, supernet, config)
    )


def macs_at(
    supernet: Supernet,
    config: SubnetConfig,
    places: Sequence[str],
    own: Mapping[str, Sequence[LayerSpec]] | None = None,
) -> list[float]:
    """Work of an image that leaves at each of the places, or at the end, in MMACs.

    `own`: layers of the exits, by place, if they are not those of `exit_head`.
    """
    segments, heads = exit_layers(supernet, config, places)
    if own is not None:
        heads = [*(own[place] for place in places), heads[-1]]
    spent = 0.0
    macs = []
    for segment, head in zip(segments, heads, strict=True):
        spent += sum(layer.macs for layer in [*segment, *head]) / 1e6
        macs.append(spent)
    return macs


def exit_choices(places: Sequence[str], most: int = 3) -> list[tuple]:
    """All choices of one to `most` places."""
    sizes = range(1, most + 1)
    return [some for size in sizes for some in itertools.combinations(places, size)]


def exits_of(
    net: nn.Module,
    row: Mapping,
    heads: Mapping[str, nn.Module],
    example: torch.Tensor,
    engine: str = "torch",
) -> Walk:
    """A walk through `net` with the choice that is a row of `Exits.table`; `heads` by place."""
    places = row["places"].split()
    chosen = [heads[place] for place in places]
    rules = [Sure(row["threshold"])] * len(places)
    return with_exits(net, places, chosen, rules, example, row["recall"], engine)


# -- width gate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routes:
    """What routes behind a common trunk say to the same images.

    Args:
        features: what the gate sees, pooled, (N, C).
        logits: (N, routes, classes).
        labels: (N,).
        macs_m: work of each route with the trunk and the gate.
    """

    features: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    macs_m: tuple[float, ...]

    def take(self, index) -> "Routes":
        """Some of the images."""
        parts = (self.features[index], self.logits[index], self.labels[index])
        return Routes(*parts, self.macs_m)

    @property
    def right(self) -> torch.Tensor:
        """(N, routes)."""
        return self.logits.argmax(2) == self.labels[:, None]

    @property
    def losses(self) -> torch.Tensor:
        """Cross-entropy, (N, routes)."""
        logs = self.logits.log_softmax(2)
        index = self.labels.view(-1, 1, 1).expand(-1, logs.shape[1], 1)
        return -logs.gather(2, index)[..., 0]

    @torch.inference_mode()
    def table(self, gate: nn.Module, knobs: Sequence[float]) -> pd.DataFrame:
        """One row per turn of the knob: accuracy_pct, macs_m, and the routes (N,) taken."""
        scores = gate(self.features)
        work = torch.tensor(self.macs_m)
        everyone = torch.arange(len(self.labels))
        rows = []
        for knob in knobs:
            taken = (scores + knob * work / work.max()).argmax(1)
            row = {
                "threshold": knob,
                "accuracy_pct": 100 * self.right[everyone, taken].float().mean().item(),
                "macs_m": work[taken].mean().item(),
                "taken": taken.numpy(),
            }
            rows.append(row)
        return pd.DataFrame(rows)


def halves(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of two random halves of `count` images: one to train a gate on, one to turn it on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.chunk(2)


@torch.inference_mode()
def routes_of(
    supernet: Supernet, configs: Sequence[SubnetConfig], behind: str, images: Dataset, part: Images
) -> Routes:
    """All routes on all images; the trunk is that of the last, the largest."""
    ends = [chain(supernet.prepare(config)).cut([behind]) for config in configs]
    trunk, _ = ends[-1]
    features = []
    logits = []
    for batch in part.images.split(BATCH):
        x = trunk(images.normalise(batch))
        features.append(x.mean((2, 3) if x.ndim == 4 else 1))
        logits.append(torch.stack([rest(x) for _, rest in ends], 1))
    features = torch.cat(features)
    extra = gate_macs_m(features.shape[1], len(configs))
    work = tuple(macs_m(supernet, config) + extra for config in configs)
    return Routes(features, torch.cat(logits), part.labels, work)


def gate_macs_m(channels: int, routes: int) -> float:
    """Millions of multiply-accumulates of a gate, pooled features given."""
    layers = [
        LayerSpec("linear", channels, channels // 4),
        LayerSpec("linear", channels // 4, routes),
    ]
    return sum(layer.macs for layer in layers) / 1e6


def gated_of(supernet, configs, behind, gate, knob: float, macs: Sequence[float], example) -> Walk:
    """The routes behind a gate whose knob is turned so far; `macs` as in `Routes`."""
    nets = [supernet.prepare(config) for config in configs]
    bonus = tuple(knob * work / max(macs) for work in macs)
    return gated(nets, behind, gate, Highest(bonus), example)


# -- time -------------------------------------------------------------------------------------


def even_sample(score: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Numbers of `count` images, in random order, at equal steps through their sorted scores.

    So the sample has the whole set's share of images above any score, within 1 / count.
    """
    order = np.argsort(score, kind="stable")
    steps = (np.arange(count) + 0.5) * len(order) / count
    chosen = order[steps.astype(int)]
    return np.random.default_rng(seed).permutation(chosen)


@torch.inference_mode()
def time_rounds(
    runs: Mapping[str, Callable], images: torch.Tensor, batch: int, rounds: int
) -> pd.DataFrame:
    """Time of every batch in every run, interleaved: one row each, wall clock and CPU time.

    The runs take turns, so that a busy moment meets all of them. A turn is some images in a row, as
    in use: image by image each run would find in the caches what the one before it left there,
    which is of use to some and not to others (cascades lost 7 % so).

    Args:
        images: normalised, (N, 3, H, W).
    """
    parts = images.split(batch)
    step = max(1, IN_A_ROW // batch)
    turns = [range(len(parts))[at : at + step] for at in range(0, len(parts), step)]
    rows = []
    for run in runs.values():
        for part in parts[:3]:
            run(part)
    with undisturbed():
        for number in range(rounds):
            for turn, (name, run) in itertools.product(turns, runs.items()):
                for place in turn:
                    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
                    run(parts[place])
                    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
                    rows.append((name, number, place, wall / 1e6 / batch, cpu / 1e6 / batch))
    columns = ["run", "round", "part", "latency_ms", "cpu_ms"]
    return pd.DataFrame(rows, columns=columns).assign(batch=batch)


def speedup(times: pd.DataFrame, ours: str, base: str, column: str = "latency_ms") -> dict:
    """How many times faster `ours` is: median over the rounds, with the least and the most."""
    mean = times.pivot_table(column, "round", "run")
    ratio = mean[base] / mean[ours]
    return {"value": ratio.median(), "low": ratio.min(), "high": ratio.max(), "n": len(ratio)}


def per_image(times: pd.DataFrame, column: str = "latency_ms") -> pd.DataFrame:
    """Each run's mean and 95th percentile of its batches, each the median of its rounds."""
    median = times.groupby(["run", "part"], sort=False)[column].median()
    groups = median.groupby("run", sort=False)
    return pd.DataFrame({"mean_ms": groups.mean(), "p95_ms": groups.quantile(0.95)})


@torch.inference_mode()
def predicted_share(
    walks: Mapping[str, Walk],
    images: torch.Tensor,
    others: Mapping[str, Callable],
    base: str,
    rounds: int = 30,
) -> dict[str, float]:
    """Mean time of an image by itself in each walk, composed: each step's time x who comes to it,
    over the time of the run called `base`. (A machine's speed changes; of one run both change.)

    The steps take turns with `others`: what a network finds in the cache decides a good part of its
    time, and by itself again and again it finds all of it.

    Args:
        images: normalised; the first one is timed, all decide who comes where.
        base: one of the `others`.
    """
    example = images[:1]
    runs = dict(others)
    shares = {}
    for name, walk in walks.items():
        visits = walk.visits(images).float().mean(0)
        for number, run in enumerate(_steps_of(walk, example)):
            runs[name, number] = run
            shares[name, number] = visits[number].item()
    times = time_rounds(runs, example, 1, rounds)
    medians = times.groupby("run")["latency_ms"].median()
    total = dict.fromkeys(walks, 0.0)
    for (name, number), share in shares.items():
        total[name] += share * medians[name, number] / medians[base]
    return total


def _steps_of(walk: Walk, example: torch.Tensor) -> list[Callable]:
    """Each step by itself, on what it gets of the example."""
    rows = torch.arange(1)
    runs = []
    entering = {0: (example, None)}
    for number, step in enumerate(walk.steps):
        x, before = entering[number]
        x = example if step.from_images else x
        seen, _ = step.run(rows, x, before)
        for target in step.routes:
            entering.setdefault(target, (seen.features, seen.said))
        runs.append(lambda _, step=step, x=x, before=before: step.run(rows, x, before))
    return runs


# -- difficulty -------------------------------------------------------------------------------


def difficulty_ranks(macs: np.ndarray, difficulty: np.ndarray) -> tuple[dict, pd.DataFrame]:
    """Rank correlation of work and difficulty, image by image and decile by decile, and the
    deciles' mean work."""
    deciles = pd.qcut(difficulty, 10, labels=False)
    mean = pd.Series(macs).groupby(deciles).mean()
    found = {
        "images": float(spearmanr(macs, difficulty).statistic),
        "deciles": float(spearmanr(mean.index, mean).statistic),
        "hardest_over_easiest": float(mean.iloc[-1] / mean.iloc[0]),
    }
    table = pd.DataFrame({"decile": mean.index + 1, "macs_m": mean.to_numpy()})
    return found, table


# -- pictures, and the manager ----------------------------------------------------------------


def portraits(images: Dataset, part: Images, sure: np.ndarray, guess, count: int = 9):
    """The surest and the least sure images as rows: group, place, image (PNG), label, answer."""
    order = np.argsort(-sure, kind="stable")
    groups = {"surest: first network": order[:count], "least sure: both": order[-count:]}
    rows = []
    for group, chosen in groups.items():
        for place, number in enumerate(chosen.tolist()):
            file = io.BytesIO()
            pixels = part.images[number].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(file, "PNG")
            row = {
                "group": group,
                "place": place,
                "image": base64.b64encode(file.getvalue()).decode(),
                "label": images.classes[part.labels[number]],
                "answer": images.classes[guess[number]],
            }
            rows.append(row)
    return pd.DataFrame(rows)


def knob_case(table: pd.DataFrame, board: Board, periods: Sequence[float], each_s: float) -> Case:
    """One camera whose frames come ever faster: `periods` are shares of the largest latency.

    Deadlines are four periods: a cascade keeps pace on average, and a hard frame makes one wait.
    """
    model = table["model"].iloc[0]
    longest_ms = table["latency_ms"].max()

    def timing(share: float) -> dict:
        return {"period_ms": share * longest_ms, "deadline_ms": 4 * share * longest_ms}

    first, *later = periods
    app = App("camera", model, **timing(first))
    starts = each_s * np.arange(1, len(periods))
    changes = [Change(t, "camera", **timing(p)) for t, p in zip(starts, later, strict=True)]
    workload = Workload("faster", each_s * len(periods), (app,), tuple(changes))
    return Case(workload, board, PointTable.of_models(table, board))
