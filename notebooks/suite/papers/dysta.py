"""Dysta (MICRO'23, arXiv 2310.11096): its benchmark, with the defects of its public simulator.

The layer traces are synthetic (the published ones are not in its repository), made with the models
that the paper's simulator uses; numbers on them are comparable with ours, not with its tables.
Everything is written after the equations; the repository has no licence, so none of it is here.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from dynlib.errors import DataError
from dynlib.files import repo_root
from dynlib.runtime.drain import Offered, Profile, Request, Row, Trace, drain, rows
from dynlib.runtime.schedulers import SURE, Fcfs, Ready, Scheduler

WORKLOADS = {"attnn": 30.0, "cnn": 3.0}  # -> requests per second
SLO = 10.0  # deadline over the mean time of the network
_FOLDERS = {"attnn": "sanger", "cnn": "eyerissv2"}
_DRAWN = 7  # defect: inputs are drawn from the first seven of each trace


@cache
def traces(workload: str, folder: Path | None = None) -> dict[str, Trace]:
    """The synthetic traces of a workload, model -> trace, sorted by name.

    A Sanger layer of density d and balance b takes 0.884736 + 0.524288 (x + x^2) ms, x = d / b; an
    Eyeriss layer lists its time in seconds and the part of its input that is zero.

    Raises `DataError` for a file that is missing or malformed.
    """
    folder = (folder or repo_root() / "data" / "traces") / _FOLDERS[workload]
    found = {}
    for path in sorted(folder.glob("*.csv")):
        try:
            table = pd.read_csv(path)
            layers = int(table["layer-indx"].max()) + 1
            if workload == "attnn":
                density = table["overall-sparsity"].to_numpy(float)  # its name notwithstanding
                x = density / table["50%-skip"].to_numpy(float)
                ms = 0.884736 + 0.524288 * (x + x**2)
            else:
                density = 1 - table["overall-sparsity"].to_numpy(float)
                ms = 1000 * table["sim_lat"].to_numpy(float)
            shape = (-1, layers)
            found[path.stem] = Trace(path.stem, ms.reshape(shape), density.reshape(shape))
        except (KeyError, ValueError, OSError) as error:
            raise DataError(f"{path}: not a layer trace: {error}") from error
    if not found:
        raise DataError(f"{folder}: no traces, expected one CSV file per network")
    return found


def architecture(model: str) -> str:
    """A convolutional network without its sparsity pattern; attention networks have none."""
    return model if model.startswith("load_balance") else model.partition("_")[0]


@cache
def profiles(workload: str, pattern: bool) -> dict[str, Profile]:
    """What a scheduler knows ahead: of the pruned network, or pooled over its patterns."""
    found = traces(workload)
    if pattern:
        return {name: Profile(trace) for name, trace in found.items()}
    pooled = {}
    for name in found:
        pooled.setdefault(architecture(name), []).append(found[name])
    profile = {name: Profile(*group) for name, group in pooled.items()}
    return {name: profile[architecture(name)] for name in found}


@cache
def known(workload: str, estimate: str) -> dict[str, list[Row]]:
    """The rows of all traces for an estimate of `dynlib`, or `blind` to patterns and inputs."""
    profile = profiles(workload, estimate != "blind")
    how = "profile" if estimate == "blind" else estimate
    return {name: rows(trace, profile[name], how) for name, trace in traces(workload).items()}


# The requests.


class Benchmark(NamedTuple):
    """Requests, and how long each takes alone."""

    workload: str
    offered: Offered
    alone_ms: np.ndarray


def benchmark(
    workload: str, rate: float, arrival_ms, model: np.ndarray, sample: np.ndarray,
    priority, slo: float = SLO,
) -> Benchmark:  # fmt: skip
    """Requests for the numbers of models and samples."""
    found = traces(workload)
    names = list(found)
    means = np.array([profiles(workload, False)[name].mean_ms for name in names])
    alone = [trace.ms.sum(1) for trace in found.values()]
    model_names = [names[i] for i in model]
    offered = Offered(arrival_ms, model_names, sample, slo * means[model], priority)
    alone_ms = np.array([alone[i][j] for i, j in zip(model, sample, strict=True)])
    return Benchmark(workload, offered, alone_ms)


def poisson(
    workload: str, rate: float, count: int, seed: int | Sequence[int], slo: float = SLO
) -> Benchmark:
    """Poisson requests of equally likely models, inputs from the whole traces."""
    rng = np.random.default_rng(seed)
    inputs = np.array([len(trace.ms) for trace in traces(workload).values()])
    arrival_ms = rng.exponential(1000 / rate, count).cumsum()
    model = rng.integers(len(inputs), size=count)
    sample = (rng.random(count) * inputs[model]).astype(int)
    priority = rng.choice([1, 3, 9], count).tolist()
    return benchmark(workload, rate, arrival_ms, model, sample, priority, slo)


def published_requests(
    workload: str, rate: float, count: int, seed: int, slo: float = SLO, drawn: int | None = _DRAWN
) -> Benchmark:
    """The requests of the public simulator's run number `seed`, draw by draw.

    `drawn`: how many inputs of each trace it knows of; None: all.
    """
    inputs = [drawn or len(trace.ms) for trace in traces(workload).values()]
    draw = random.Random(1 + seed)
    now_s, drawn_rows = 0.0, []
    for _ in range(count):
        now_s += draw.expovariate(rate)
        model = draw.randint(0, len(inputs) - 1)
        priority = draw.choice([1, 3, 9])
        drawn_rows.append((now_s, model, priority, draw.randint(0, inputs[model] - 1)))
    arrival_s, model, priority, sample = (list(column) for column in zip(*drawn_rows, strict=True))
    arrival_ms = 1000 * np.array(arrival_s)
    return benchmark(workload, rate, arrival_ms, np.array(model), np.array(sample), priority, slo)


@dataclass(frozen=True)
class Dysta(Scheduler):
    """The shortest estimated remaining time, with a little slack and waiting time added (MICRO'23).

        score = left + beta (slack + wait),   slack = max(0, deadline - now - left),
        wait = (now - last run) / mean time / requests at hand

    with left, slack in seconds, so that beta = 0.01 adds seconds to a pure number, as published.
    beta = 0 is the shortest remaining time first.
    """

    beta: float = 0.01
    name: str = "Dysta"

    def best(self, ready: Ready, now_ms: float) -> tuple[Request, float]:
        """The lowest score (the earliest of equals), and the second lowest."""
        if len(ready) == 1:
            return ready[0], math.inf
        beta = self.beta
        per_wait = 1000 * beta / len(ready)  # ms of a score per mean time waited
        chosen, lowest, second = None, math.inf, math.inf
        for job in ready:
            score = job.left_ms
            slack_ms = job.deadline_at_ms - now_ms - score
            if slack_ms > 0:
                score += beta * slack_ms
            if beta:
                score += per_wait * (now_ms - job.idle_since_ms) / job.mean_ms
            if score < lowest:
                chosen, lowest, second = job, score, lowest
            elif score < second:
                second = score
        return chosen, second

    def hold(self, job: Request, rival: float, now_ms: float) -> int:
        """To its end if it stays below the rivals, whose scores fall by beta at most."""
        beta, row, stop = self.beta, job.row, job.segment + 1
        if beta >= 1:
            return stop
        end = len(row.cum_ms) - 1
        # score < rival - beta (t - now): without slack, and with it, where t cancels out
        lowest = rival - beta * (row.cum_ms[end] - row.cum_ms[job.segment])
        with_slack = (rival + beta * (now_ms - job.deadline_at_ms)) / (1 - beta)
        lowest = min(lowest, with_slack) - (1 - SURE) * now_ms
        return end if row.most_left_ms[stop] < lowest else stop


# The rivals, and what the public simulator does otherwise.


@dataclass(frozen=True)
class Prema(Scheduler):
    """Of those with a high token the one with the least left (HPCA'20).

    Tokens are priorities, which grow with waiting: priority (1 + waited / mean time).
    """

    name: str = "PREMA"

    def choose(self, ready: Sequence[Request], now_ms: float) -> Request:
        """The least left among the tokens at or above a threshold of 9, 3 or 1."""
        tokens = [self.token(job, now_ms) for job in ready]
        return least_left(ready, tokens, max(tokens))

    @staticmethod
    def token(job: Request, now_ms: float) -> float:
        """What a request has come to by waiting."""
        waited_ms = now_ms - job.arrival_ms - (job.size_ms - job.left_ms)
        return job.priority * (1 + max(waited_ms, 0.0) / job.mean_ms)


def least_left(ready: Sequence[Request], tokens: Sequence[float], most: float) -> Request:
    """The request with the least left, of those whose token reaches the threshold for `most`."""
    threshold = 9 if most >= 9 else 3 if most >= 3 else 1
    high = [job for job, token in zip(ready, tokens, strict=True) if token >= threshold]
    return min(high, key=attrgetter("left_ms"))


@dataclass(frozen=True)
class Planaria(Scheduler):
    """The most important per time to its deadline; late ones last (MICRO'20, time sharing only)."""

    name: str = "Planaria"

    def choose(self, ready: Sequence[Request], now_ms: float) -> Request:
        """The highest priority / (deadline - now)."""
        return max(ready, key=lambda job: _per(job.priority, job.deadline_at_ms - now_ms, late=0.0))


@dataclass(frozen=True)
class Sdrm3(Scheduler):
    """Urgency, and fairness in units of the next segment; late ones are urgent (2212.03414)."""

    alpha: float = 1.0
    name: str = "SDRM3"

    def choose(self, ready: Sequence[Request], now_ms: float) -> Request:
        """The highest min(1, left / (deadline - now)) + alpha idle / next segment."""

        def score(job: Request) -> float:
            urgency = _per(job.left_ms, job.deadline_at_ms - now_ms, late=1.0)
            idle_ms = now_ms - job.idle_since_ms
            return min(1.0, urgency) + self.alpha * idle_ms / job.row.step_ms[job.segment]

        return max(ready, key=score)


def _per(value: float, ms: float, late: float) -> float:
    return value / ms if ms > 0 else late


@dataclass(frozen=True)
class CompatPrema(Prema):
    """Tokens grow at every decision by priority times the whole time idle, thus quadratically.

    A request met for the first time has no say yet in the threshold. One object serves one run: it
    remembers the tokens.
    """

    tokens: dict[Request, float] = field(default_factory=dict)

    def choose(self, ready: Sequence[Request], now_ms: float) -> Request:
        """See `Prema`."""
        entered = []
        for job in ready:
            met = self.tokens.get(job)
            if met is None:
                self.tokens[job] = job.priority
                entered.append(0.0)
            else:
                idle_ms = now_ms - job.idle_since_ms
                self.tokens[job] = met + job.priority * idle_ms / job.mean_ms
                entered.append(self.tokens[job])
        most = max(entered)
        return least_left(ready, [self.tokens[job] for job in ready], most)


@dataclass(frozen=True)
class CompatPlanaria(Planaria):
    """Scores of late requests are negative, and the last of them wins where there is no other."""

    def choose(self, ready: Sequence[Request], now_ms: float) -> Request:
        """See `Planaria`."""
        chosen, best = None, -1.0
        for job in ready:
            score = job.priority / (job.deadline_at_ms - now_ms)
            if best < 0 or score > best:
                chosen, best = job, score
        return chosen


@dataclass(frozen=True)
class CompatSdrm3(Sdrm3):
    """Urgency turns negative after the deadline."""

    def choose(self, ready: Sequence[Request], now_ms: float) -> Request:
        """See `Sdrm3`."""

        def score(job: Request) -> float:
            urgency = min(1.0, job.left_ms / (job.deadline_at_ms - now_ms))
            idle_ms = now_ms - job.idle_since_ms
            return urgency + self.alpha * idle_ms / job.row.step_ms[job.segment]

        return max(ready, key=score)


class Entry(NamedTuple):
    """A scheduler of the comparison: what it estimates, and how it is made, compatible or not."""

    estimate: str
    make: type
    compat: type
    published: str  # its name in the files of the public simulator
    options: Mapping = {}

    def scheduler(self, compat: bool = False, **options) -> Scheduler:
        """A fresh one."""
        return (self.compat if compat else self.make)(**{**self.options, **options})


ENTRIES = {
    "FCFS": Entry("blind", Fcfs, Fcfs, "FCFS_Scheduler"),
    "SJF": Entry("blind", Dysta, Dysta, "SJF_Scheduler", {"beta": 0.0, "name": "SJF"}),
    "PREMA": Entry("blind", Prema, CompatPrema, "PREMA_Scheduler"),
    "Planaria": Entry("blind", Planaria, CompatPlanaria, "Planaria"),
    "SDRM3": Entry("blind", Sdrm3, CompatSdrm3, "SDRM3_Scheduler"),
    "oracle": Entry("exact", Dysta, Dysta, "Dysta_Oracle_Scheduler", {"name": "oracle"}),
    "Dysta": Entry("density", Dysta, Dysta, "Dysta_Scheduler+sparse"),
    "Dysta naive": Entry("blind", Dysta, Dysta, "Dysta_Scheduler", {"name": "Dysta naive"}),
    "SJF sparse": Entry("density", Dysta, Dysta, "SJF_Scheduler+sparse",
                        {"beta": 0.0, "name": "SJF sparse"}),
}  # fmt: skip


def finish_times(bench: Benchmark, name: str, compat: bool = False, **options) -> np.ndarray:
    """Finish times in ms of one of `ENTRIES`."""
    entry = ENTRIES[name]
    requests = bench.offered.requests(known(bench.workload, entry.estimate))
    return drain(requests, entry.scheduler(compat, **options), rewind=compat).finish_ms


# Against the files of the public simulator.


def reference(name: str) -> pd.DataFrame:
    """A file of the public simulator's results on the synthetic traces."""
    return pd.read_csv(repo_root() / "data" / "traces" / f"{name}.csv")


def compat_error_s() -> pd.Series:
    """Largest difference of a finish time to the public simulator's, scheduler by scheduler."""
    theirs_s = reference("finish_attnn30_seed1")
    bench = published_requests("attnn", 30, len(theirs_s), 0)
    errors = {}
    for name, entry in ENTRIES.items():
        if entry.published in theirs_s:
            ours_s = finish_times(bench, name, compat=True) / 1000
            errors[name] = float(np.abs(ours_s - theirs_s[entry.published]).max())
    return pd.Series(errors)


_MEASURES = {"violation": 1e-9, "antt": 1e-6, "stp": 1e-6, "mean_turnaround_s": 1e-6,
             "p95_ntt": 1e-4}  # fmt: skip


def summary(bench: Benchmark, finish_ms: np.ndarray) -> dict[str, float]:
    """The measures of the public simulator: parts, mean slowdown, requests per second, seconds."""
    arrival_ms = np.asarray(bench.offered.arrival_ms)
    turnaround_ms = finish_ms - arrival_ms
    slowdown = turnaround_ms / bench.alone_ms
    return {
        "violation": float((turnaround_ms > bench.offered.deadline_ms).mean()),
        "antt": float(slowdown.mean()),
        "stp": 1000 * len(finish_ms) / float(finish_ms.max() - arrival_ms[0]),
        "mean_turnaround_s": float(turnaround_ms.mean()) / 1000,
        "p95_ntt": float(np.percentile(slowdown, 95)),
    }


def reproduce(run: str, seed: int, slo: float, theirs: Sequence[Mapping]) -> list[dict]:
    """Rows of reference_results.csv of one run, seed and deadline, run again: each with `equal`.

    A row is equal if all five measures agree to the digits that the file has.
    """
    names = {entry.published: name for name, entry in ENTRIES.items()}
    first = theirs[0]
    drawn = _DRAWN if first["samples"] == "repo7" else None
    bench = published_requests(first["workload"], first["rate"], 1000, seed, slo, drawn)
    found = []
    for row in theirs:
        name = names.get(row["scheduler"])
        same = None
        if name:
            beta = {"beta": row["beta"]} if "Dysta" in row["scheduler"] else {}
            ours = summary(bench, finish_times(bench, name, compat=True, **beta))
            same = all(abs(ours[m] - row[m]) <= digit for m, digit in _MEASURES.items())
        found.append({"run": run, "seed": seed, "slo": slo, "scheduler": row["scheduler"],
                      "equal": same, **{m: row[m] for m in _MEASURES}})  # fmt: skip
    return found


def reference_jobs(runs: Iterable[str] | None = None) -> list[tuple]:
    """Arguments of `reproduce` for all of reference_results.csv, or for some of its runs."""
    table = reference("reference_results")
    if runs is not None:
        table = table[table["run"].isin(list(runs))]
    groups = table.groupby(["run", "seed_index", "slo_mult"])
    return [(*key, rows_.to_dict("records")) for key, rows_ in groups]


def plain_loop(bench: Benchmark, beta: float = 0.01) -> np.ndarray:
    """Dysta as its equations say it, with suffix sums and nothing else: finish times in ms.

    It decides after every layer and knows no kernel; what that is compared with.
    """
    found, known_ahead = traces(bench.workload), profiles(bench.workload, True)
    arrival_ms, model, sample, deadline_ms, _ = bench.offered
    arrival_ms, deadline_ms = list(map(float, arrival_ms)), list(map(float, deadline_ms))
    tables = {
        name: (trace.ms.tolist(), trace.density.tolist(), known_ahead[name].density.tolist(),
               known_ahead[name].rest_ms.tolist())
        for name, trace in found.items()
    }  # fmt: skip
    finish_ms, ready, now_ms, coming = [0.0] * len(model), [], 0.0, 0
    while ready or coming < len(model):
        if not ready:
            now_ms = max(now_ms, arrival_ms[coming])
        while coming < len(model) and arrival_ms[coming] <= now_ms:
            ms, density, mean, rest = tables[model[coming]]
            i = sample[coming]
            ready.append(_Plain(coming, ms[i], density[i], mean, rest, arrival_ms[coming],
                                arrival_ms[coming] + deadline_ms[coming]))  # fmt: skip
            coming += 1
        lowest = np.inf
        for job in ready:
            gamma = job.ratios / job.done if job.done else 1.0
            left_ms = gamma * job.rest[job.done]
            slack_ms = max(0.0, job.due_ms - now_ms - left_ms)
            wait = (now_ms - job.last_ms) / job.rest[0] / len(ready)
            score = left_ms + beta * (slack_ms + 1000 * wait)
            if score < lowest:
                chosen, lowest = job, score
        now_ms += chosen.ms[chosen.done]
        chosen.ratios += chosen.density[chosen.done] / chosen.mean[chosen.done]
        chosen.done += 1
        chosen.last_ms = now_ms
        if chosen.done == len(chosen.ms):
            ready.remove(chosen)
            finish_ms[chosen.frame] = now_ms
    return np.array(finish_ms)


@dataclass(slots=True, eq=False)
class _Plain:
    frame: int
    ms: list[float]
    density: list[float]
    mean: list[float]
    rest: list[float]
    last_ms: float
    due_ms: float
    done: int = 0
    ratios: float = 0.0
