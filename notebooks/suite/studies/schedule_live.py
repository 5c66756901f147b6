"""Networks that really give way to each other on this CPU, against what the simulator says."""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from dynlib._vision import timm
from dynlib.nets import chain
from dynlib.runtime.drain import Offered, Profile, Request, Trace, drain, rows
from dynlib.runtime.schedulers import Scheduler

NETWORKS = ("resnet18", "mobilenetv3_small_100", "efficientnet_lite0")
Blocks = Sequence[Callable[[torch.Tensor], torch.Tensor]]


def networks(pixels: int = 64, seed: int = 0) -> dict[str, tuple[Blocks, torch.Tensor]]:
    """Blocks and an image for each of `NETWORKS`; weights are random, since only time counts."""
    torch.manual_seed(seed)
    image = torch.randn(1, 3, pixels, pixels)
    found = {}
    for name in NETWORKS:
        net = timm.create_model(name, pretrained=False).eval()
        found[name] = list(chain(net).blocks.values()), image
    return found


@torch.inference_mode()
def measure(blocks: Blocks, image: torch.Tensor, repeats: int = 20, name: str = "net") -> Trace:
    """Wall-clock time of every block, `repeats` times, after a few that are not counted."""
    ms = np.empty((repeats + 3, len(blocks)))
    for row in ms:
        x = image
        for i, block in enumerate(blocks):
            begin_s = time.perf_counter()
            x = block(x)
            row[i] = 1000 * (time.perf_counter() - begin_s)
    return Trace(name, ms[3:])


def ask(
    found: Mapping[str, Trace], load: float, count: int, seed: int, slo: float = 5.0
) -> Offered:
    """Poisson requests of all networks alike, at a part of what this CPU can do."""
    rng = np.random.default_rng(seed)
    names = list(found)
    mean_ms = np.mean([trace.mean_ms for trace in found.values()])
    model = [names[i] for i in rng.integers(len(names), size=count)]
    return Offered(
        rng.exponential(mean_ms / load, count).cumsum(), model,
        [int(rng.integers(len(found[name].ms))) for name in model],
        [slo * found[name].mean_ms for name in model], [1] * count,
    )  # fmt: skip


@torch.inference_mode()
def execute(
    offered: Offered, nets: Mapping[str, tuple[Blocks, torch.Tensor]],
    profiles: Mapping[str, Profile], scheduler: Scheduler,
) -> np.ndarray:  # fmt: skip
    """Serve requests in real time, block by block; finish times in ms.

    What a scheduler sees is what was measured: `left_ms` follows from the time taken so far.
    """
    known = {name: [profile.row] * 1000 for name, profile in profiles.items()}
    pending = list(offered.requests(known))[::-1]
    state = {r.frame: (nets[offered.model[r.frame]][1], 0.0) for r in pending}
    ready: list[Request] = []
    finish_ms = np.empty(len(pending))
    begin_s = time.perf_counter()
    while pending or ready:
        now_ms = 1000 * (time.perf_counter() - begin_s)
        while pending and pending[-1].arrival_ms <= now_ms:
            ready.append(pending.pop())
        if not ready:
            # Awake, since sleeping overshoots by more than a block takes.
            continue
        job = scheduler.choose(ready, now_ms)
        name = offered.model[job.frame]
        blocks, profile = nets[name][0], profiles[name]
        x, elapsed_ms = state[job.frame]
        x = blocks[job.segment](x)
        end_ms = 1000 * (time.perf_counter() - begin_s)
        elapsed_ms += end_ms - now_ms
        state[job.frame] = x, elapsed_ms
        job.segment, job.idle_since_ms = job.segment + 1, end_ms
        job.left_ms = float(profile.left_by_time(job.segment, elapsed_ms))
        job.size_ms = elapsed_ms + job.left_ms
        if job.segment == len(blocks):
            ready.remove(job)
            del state[job.frame]
            finish_ms[job.frame] = end_ms
    return finish_ms


def live_rows(
    scheduler: Scheduler, load: float, count: int, seeds: Sequence[int], threads: int = 1
) -> list[dict]:
    """Mean turnaround per seed, really executed and simulated from times measured just before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        nets = networks()
        found = []
        for seed in seeds:
            traces = {name: measure(*net, name=name) for name, net in nets.items()}
            profiles = {name: Profile(trace) for name, trace in traces.items()}
            offered = ask(traces, load, count, seed)
            arrival_ms = np.asarray(offered.arrival_ms)
            known = {name: rows(trace, profiles[name]) for name, trace in traces.items()}
            seen_ms = execute(offered, nets, profiles, scheduler) - arrival_ms
            said_ms = drain(offered.requests(known), scheduler).finish_ms - arrival_ms
            found.append({
                "seed": seed, "requests": count, "live_ms": seen_ms.mean(),
                "simulated_ms": said_ms.mean(),
                "error_pct": 100 * abs(said_ms.mean() / seen_ms.mean() - 1),
            })  # fmt: skip
        return found
    finally:
        torch.set_num_threads(before)
