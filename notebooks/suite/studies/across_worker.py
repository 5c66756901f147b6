"""One of several processes that train together: `python -m suite.studies.across_worker JOB.json`.

The job says what to do; what comes out goes to ``<out>.<rank>.json``. Ends with its parent.
"""

import copy
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import distributed as dist
from torch.nn import functional as F

from dynlib.data import load_dataset
from dynlib.errors import DynlibError
from dynlib.images import Dataset
from dynlib.nets import Supernet
from dynlib.nets.chain import chain
from dynlib.nets.resnet import ResNet
from dynlib.space import SearchSpace
from dynlib.training import Recipe, train
from dynlib.training import step as training_step
from dynlib.training.compress import Codec, Columns, Dense, Levels, TopK, adaptive_ratios
from dynlib.training.parallel import Peers, join
from dynlib.training.pipeline import (
    Link,
    Pipeline,
    iteration_s,
    measure_links,
    place,
    survey,
    wire_bytes,
)  # fmt: skip
from suite.papers.powersgd import LowRank

NET = SearchSpace((32,), ((1,), (1,)), ((16,), (32,)))
KINDS = {"dense": Dense, "top-k": TopK, "levels": Levels, "columns": Columns, "low rank": LowRank}
FIT = {"placed": True, "ratio": 100.0, "kind": "top-k"}
ELASTIC = SearchSpace((16,), ((1,), (0, 1)), ((8, 16), (16, 24)))


class Double(Dataset):
    """Images in double precision."""

    def normalise(self, images):
        """As float64."""
        return super().normalise(images).double()


def share_batches(job: dict) -> dict:
    """Losses of a sandwich training, one step an epoch, alone or under torchrun's variables."""
    double = job["precision"] == "double"
    training_step.bf16_pays = lambda device: job["precision"] == "bf16"
    images = load_dataset("generated", size=16, generated=(45, 20))
    torch.manual_seed(job["seed"])
    supernet = Supernet(ELASTIC)
    if double:
        supernet.double()
        images = Double(**{field.name: getattr(images, field.name) for field in fields(Dataset)})
    recipe = Recipe(epochs=job["steps"], batch_size=40)
    history = train(supernet, images, recipe, seed=job["seed"], watch=0, hook=job["hook"],
                    state_file=job.get("state"))  # fmt: skip
    return history[["loss_max", "loss_student", "seconds"]].to_dict("list")


def equal_layers(names: Sequence[str], stages: int) -> list[str]:
    """Blocks that end stages of equally many blocks."""
    return [names[round(len(names) * (stage + 1) / stages) - 1] for stage in range(stages - 1)]


def time_stages(job: dict) -> list[dict]:
    """Seconds and bytes of a step for each case of the job, and what the formulas say."""
    join(job["timeout_s"])
    rank, world, n = dist.get_rank(), dist.get_world_size(), job["micro_batches"]
    torch.manual_seed(0)
    net = ResNet(NET.largest)
    images, labels = torch.randn(job["batch"], 3, 32, 32), torch.arange(job["batch"]) % 10
    told = [survey(net, images[: job["batch"] // n], repeats=5), measure_links(100_000)]
    dist.broadcast_object_list(told, 0)
    costs, links = told
    if job["bucket_mbit"]:
        links = [Link(link.name, job["bucket_mbit"] * 125e3, link.latency_s) for link in links]
    rows = []
    factors: dict[str, float] = {}
    fits = [FIT | {"schedule": s} for s in dict.fromkeys(c["schedule"] for c in job["cases"])]
    # The first ones fit how much slower blocks are in a pipeline than timed alone.
    for case in [*fits, *job["cases"]]:
        steps = job["steps"] * (3 if case["ratio"] > 1 else 1)  # short ones
        kind = KINDS[case["kind"]]
        # What has no index beside each value keeps twice as many in as many bytes.
        ratio = case["ratio"] if kind is TopK else case["ratio"] / 2

        def ratios(shapes, r=ratio):
            dense_s = [link.time_s(4 * prod(s)) for link, s in zip(links, shapes, strict=True)]
            return adaptive_ratios(dense_s, r)

        def crossing_s(link, block, r=ratio, kind=kind):
            slowest = min(each.bytes_per_s for each in links)
            own = max(1.0, 3 * r * slowest / links[link].bytes_per_s)
            return links[link].time_s(4 * kind(block.shape, own).floats)

        behind = equal_layers([cost.name for cost in costs], world)
        if case["placed"]:
            behind = place(costs, crossing_s, world, n)
        shape = {cost.name: cost.shape for cost in costs}
        kept = ratios([shape[name] for name in behind])

        def codec(cut, shape, kept=kept, kind=kind):
            made = Codec(shape, kind, kept[cut])
            if job["bucket_mbit"]:
                made.encode.send = _slow(made.encode.send, links[cut])
                made.decode.back = _slow(made.decode.back, links[cut])
            return made

        pipeline = Pipeline(net, behind, costs, n, schedule=case["schedule"], codec=codec)
        over_s = [link.time_s(b) for link, b in zip(links, pipeline.payload_bytes, strict=True)]
        for _ in range(0 if n * sum(over_s) > 0.8 else 2):  # where bytes are all, none need warm up
            pipeline.step(images, labels)
        dist.barrier()
        sent, times = _sent_bytes(job), []
        for _ in range(steps):
            started = time.perf_counter()
            pipeline.step(images, labels)
            times.append(time.perf_counter() - started)
        dist.barrier()
        step_s = statistics.median(times)
        mine = [2, n * (wire_bytes(pipeline.payload_bytes[min(rank, world - 2)]))]
        if 0 < rank < world - 1:
            mine[1] += n * wire_bytes(pipeline.payload_bytes[rank - 1])
        stages = [[cost for cost in costs if cost.name in piece.names]
                  for piece in chain(net).cut(behind)]  # fmt: skip
        forward_s = [sum(cost.forward_s for cost in stage) for stage in stages]
        backward_s = [sum(cost.backward_s for cost in stage) for stage in stages]
        total = (_sent_bytes(job) - sent) / steps if job["device"] else None
        compute_s = iteration_s(forward_s, backward_s, [0.0] * (world - 1), n, case["schedule"])
        if case["schedule"] not in factors:
            heard = torch.tensor([(step_s - 2 * sum(over_s)) / compute_s])
            dist.broadcast(heard, 0)
            factors[case["schedule"]] = max(float(heard), 0.1)
            continue
        factor = factors[case["schedule"]]
        forward_s, backward_s = ([factor * s for s in own] for own in (forward_s, backward_s))
        rows.append(case | {
            "stages": world, "behind": " ".join(behind), "step_s": step_s, "factor": factor,
            "formula_s": iteration_s(forward_s, backward_s, over_s, n, case["schedule"]),
            "compute_s": factor * compute_s,
            "payload_bytes": sum(pipeline.payload_bytes), "sent_bytes": total,
            "expected_bytes": mine[1], "slowest_mbit": min(k.bytes_per_s for k in links) / 125e3,
        })  # fmt: skip
    return rows


def train_stages(job: dict) -> dict:
    """Train with a checkpoint every few steps; what was there is gone on with."""
    join(job["timeout_s"])
    torch.manual_seed(0)
    net = ResNet(NET.largest)
    folder = Path(job["folder"])
    example = torch.randn(8, 3, 32, 32)
    costs = survey(net, example, repeats=1)
    codec = partial(Codec, kind=TopK, ratio=12.0, feedback=True, slots=4)
    pipeline = Pipeline(net, [job["behind"]], costs, 4, codec=lambda cut, shape: codec(shape))
    solver = torch.optim.SGD(pipeline.weights, 0.02, momentum=0.9)
    first = pipeline.load(folder, solver)
    losses, seconds = [], []
    for step in range(first, job["steps"]):
        draws = torch.Generator().manual_seed(step)
        images = torch.randn(32, 3, 32, 32, generator=draws)
        started = time.perf_counter()
        loss = pipeline.step(images, (images.mean((1, 2, 3)) > 0).long())
        seconds.append(time.perf_counter() - started)
        solver.step()
        solver.zero_grad()
        losses.append(loss)
        if dist.get_rank() == 0:
            with (folder / "steps.log").open("a") as log:
                log.write(f"{step}\n")
        if (step + 1) % job["interval"] == 0:
            pipeline.save(folder, step + 1, solver)
    last = losses[-1] if losses else None
    return {"first": first, "loss": last, "losses": losses, "seconds": seconds}


def compare_gradients(job: dict) -> list[dict]:
    """Each case's largest differences to one process that compresses alike, in a second step.

    It meets what compression remembers of the first; weights stay as they are.
    """
    join(job["timeout_s"])
    rank, n = dist.get_rank(), 4
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.randn(32, 3, 32, 32, generator=draws), torch.arange(32) % 10
    rows = []
    for case in job["cases"]:
        make = partial(Codec, kind=KINDS[case["kind"]], ratio=case["ratio"],
                       feedback=case["feedback"], slots=n)  # fmt: skip
        torch.manual_seed(0)
        net = ResNet(NET.largest).train()
        alone = copy.deepcopy(net)
        costs = survey(net, images[: len(images) // n], repeats=1)
        pipeline = Pipeline(net, [job["behind"]], costs, n, schedule=case["schedule"],
                            codec=lambda cut, shape, make=make: make(shape))  # fmt: skip
        front, back = chain(alone).cut([job["behind"]])
        shape = {cost.name: cost.shape for cost in costs}[job["behind"]]
        codec = make(shape)
        for _ in range(2):
            net.zero_grad()
            alone.zero_grad()
            pipeline.step(images, labels)
            for x, y in zip(images.chunk(n), labels.chunk(n), strict=True):
                out = back(codec.decode(codec.encode(front(x))))
                F.cross_entropy(out, y).backward()
        theirs = dict(alone.named_parameters())
        pairs = [(weight.grad, theirs[name].grad / n) for name, weight in net.named_parameters()
                 if weight.grad is not None]  # fmt: skip
        homes = [name.rpartition(".")[0] for name, weight in net.named_parameters()
                 if weight.grad is not None]  # fmt: skip
        moments = dict(alone.named_buffers())
        buffers = [(moment.double(), moments[name].double()) for name, moment in net.named_buffers()
                   if name.rpartition(".")[0] in homes]  # fmt: skip
        rows.append(case | {
            "rank": rank, "gradients": len(pairs), "buffers": len(buffers),
            "gradient_max": max(float(own.abs().max()) for own, _ in pairs),
            "gradient_diff": max(float((own - other).abs().max()) for own, other in pairs),
            "buffer_diff": max(float((own - other).abs().max()) for own, other in buffers),
        })  # fmt: skip
    return rows


def meet_refusals(job: dict) -> dict[str, str]:
    """What this process is told about each bad input; nothing for one that is let through."""
    join(job["timeout_s"])
    rank, folder = dist.get_rank(), Path(job["folder"])
    net = ResNet(NET.largest).train()
    costs = survey(net, torch.randn(4, 3, 32, 32), repeats=1)
    bare = [*costs[:-1], replace(costs[-1], weights=())]
    head = [costs[-2].name]

    def reopen(spoil) -> None:
        pipeline = Pipeline(net, ["stages.1"], costs, 2)
        solver = torch.optim.SGD(pipeline.weights, 0.1)
        pipeline.save(folder, 5, solver)
        if rank == 1:
            spoil(pipeline, solver)
        pipeline.behind = ["stages.1"]
        pipeline.load(folder, solver)

    def cut_elsewhere(pipeline, solver) -> None:
        pipeline.behind = ["stages.0"]
        pipeline.save(folder, 5, solver)

    def measure() -> None:
        if rank == 1:  # not there when it is asked
            time.sleep(1.25 * job["timeout_s"])
        measure_links(400, 1)

    tries = {
        "stages": lambda: Pipeline(net, ["stages.0", "stages.1"], costs, 2),
        "weights": lambda: Pipeline(net, head, bare, 2),
        "ratio": lambda: adaptive_ratios([1.0], 0.3),
        "batch": lambda: Peers(net, 7),
        "zero": lambda: Link("0-1", 0.0),
        "cut": lambda: reopen(cut_elsewhere),
        "spoilt": lambda: reopen(lambda *_: (folder / "stage1-5.pt").write_bytes(b"?")),
        "silent": measure,  # the last: nothing can be exchanged afterwards
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except DynlibError as error:
            said[name] = f"{type(error).__name__}: {error}"
    dist.destroy_process_group()
    return said


def _slow(send, link: Link):
    """A sender that takes as long as its link would."""

    def sent(x):
        buffer = send(x)
        time.sleep(link.time_s(4 * buffer.numel()))
        return buffer

    return sent


def _sent_bytes(job: dict) -> int:
    if not job["device"]:
        return 0
    return int(Path(f"/sys/class/net/{job['device']}/statistics/tx_bytes").read_text())


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def main() -> None:
    """Do the job and write what came out."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    work = {
        "share": share_batches, "time": time_stages, "train": train_stages,
        "compare": compare_gradients, "refuse": meet_refusals,
    }[job["work"]]  # fmt: skip
    found = work(job)
    rank = os.environ.get("RANK", "0")
    Path(f"{job['out']}.{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()  # the first keeps the store until all are done


if __name__ == "__main__":
    main()
