"""Training in several processes: joined by links that are slow, and ended in the middle."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch import nn
from torch.nn import functional as F

from dynlib.files import repo_root
from dynlib.images import Dataset
from dynlib.nets.chain import Row, chain
from dynlib.nets.resnet import ResNet
from dynlib.training.compress import Codec, Dense, TopK
from dynlib.training.pipeline import fence
from dynlib.training.trainer import accuracy_pct
from suite.errors import SuiteError
from suite.studies.across_worker import KINDS, NET

DEVICE = "eth0"  # in every namespace


# -- links ------------------------------------------------------------------------------------


@contextlib.contextmanager
def linked(rates_mbit: Sequence[float]) -> Iterator[list[str]]:
    """Network namespaces on one bridge, a machine each, shaped both ways; gone afterwards.

    Machine i has address 10.77.0.(i + 1) on `DEVICE`. Raises `SuiteError` where that is not
    allowed or the kernel lacks it.
    """
    _sweep()
    mark = f"dl{os.getpid()}"
    hub, names = f"{mark}h", [f"{mark}n{i}" for i in range(len(rates_mbit))]
    try:
        _ip("netns", "add", hub)
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for i, (name, rate) in enumerate(zip(names, rates_mbit, strict=True)):
            port = f"port{i}"
            _ip("netns", "add", name)
            _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", DEVICE,
                "netns", name)  # fmt: skip
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", name, "link", "set", device, "up")
            for space, device in ((name, DEVICE), (hub, port)):
                _shape(space, device, rate)
        yield names
    finally:
        for name in (*names, hub):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def _sweep() -> None:
    """Remove what a process left behind that had no time to."""
    for line in _ip("netns", "list").splitlines():
        made = re.match(r"(dl(\d+)(h|n\d+))\b", line)
        if made and not psutil.pid_exists(int(made[2])):
            _ip("netns", "del", made[1])


def _shape(space: str, device: str, rate_mbit: float, how: str = "add") -> None:
    # A bucket holds what passes between two ticks of a 250 Hz kernel.
    burst = max(5_000, int(rate_mbit * 125e3 / 250))
    _run("tc", "-n", space, "qdisc", how, "dev", device, "root", "tbf", "rate",
         f"{rate_mbit}mbit", "burst", f"{burst}", "latency", "400ms")  # fmt: skip


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
        return done.stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise SuiteError(f"{' '.join(command)}: {said.strip()}") from error


def can_link() -> str:
    """Empty if this process may make shaped links, else why not."""
    try:
        with linked([100.0]):
            return ""
    except SuiteError as error:
        return str(error)


# -- processes --------------------------------------------------------------------------------


@contextlib.contextmanager
def started(
    job: Mapping, world: int, spaces: Sequence[str] | None = None, more: Mapping | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Processes that do `job`, rank i in namespace `spaces[i]`; none is left at the end."""
    folder = Path(job["out"]).parent
    path = folder / "job.json"
    path.write_text(json.dumps({"device": DEVICE if spaces else None, "bucket_mbit": None} | job))
    host = "127.0.0.1"
    if spaces:
        host = f"10.77.0.{int(spaces[0].rpartition('n')[2]) + 1}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[subprocess.Popen] = []
    try:
        for rank in range(world):
            command = [sys.executable, "-m", "suite.studies.across_worker", str(path)]
            env = os.environ | {
                "RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": host,
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(repo_root()), str(repo_root() / "notebooks")]),
                "GLOO_SOCKET_IFNAME": DEVICE if spaces else "lo",
            }  # fmt: skip
            if spaces:
                command = ["ip", "netns", "exec", spaces[rank], *command]
            said = (folder / f"said{rank}.txt").open("w")
            with said:
                found.append(subprocess.Popen(
                    command, env=env | (more or {}), stdin=subprocess.PIPE, stdout=said,
                    stderr=said, start_new_session=True,
                ))  # fmt: skip
        yield found
    finally:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdin.close()
            process.wait()


def together(
    job: Mapping, world: int, spaces: Sequence[str] | None = None, timeout_s: float = 120.0,
    more: Mapping | None = None,
) -> list:  # fmt: skip
    """What each process of a job found; raises `SuiteError` with the words of one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"out": f"{folder}/found", "timeout_s": 30.0} | dict(job)
        with started(job, world, spaces, more) as processes:
            deadline = time.monotonic() + timeout_s
            codes = [None] * world
            while None in codes and not any(codes) and time.monotonic() < deadline:
                time.sleep(0.05)
                codes = [process.poll() for process in processes]
        bad = next((rank for rank, code in enumerate(codes) if code != 0), None)
        if bad is not None:
            words = Path(folder, f"said{bad}.txt").read_text().strip().splitlines()
            last = words[-1] if words else ""
            raise SuiteError(f"rank {bad} ended with {codes[bad]} within {timeout_s:g} s: {last}")
        return [json.loads(Path(f"{job['out']}.{rank}.json").read_text()) for rank in range(world)]


def ddp_losses(precision: str, world: int, seed: int, steps: int = 50, **more) -> pd.DataFrame:
    """Losses of every step of a sandwich, by one process or several."""
    options = {"hook": "exact"} | {k: v for k, v in more.items() if k == "hook"}
    job = {"work": "share", "precision": precision, "seed": seed, "steps": steps} | options
    threads = {"MKL_NUM_THREADS": str(more.get("threads", 1))}
    return pd.DataFrame(together(job, world, more=threads)[0])


def time_grid(
    rates_mbit: Sequence[Sequence[float]], cases: Sequence[Mapping], *, steps: int, batch: int,
    micro_batches: int,
) -> pd.DataFrame:  # fmt: skip
    """A row for each case on each network of machines, links emulated by the kernel where it may.

    Machines are taken in the order in which neighbours are well linked; without namespaces every
    sender waits as long as the slowest link would take.
    """
    rows = []
    for rates in rates_mbit:
        world = len(rates)
        job = {
            "work": "time", "cases": list(cases), "steps": steps, "batch": batch,
            "micro_batches": micro_batches, "timeout_s": 60.0,
        }  # fmt: skip
        pairs = [[min(one, other) * (i != j) for j, other in enumerate(rates)]
                 for i, one in enumerate(rates)]  # fmt: skip
        if can_link():
            found = together(job | {"bucket_mbit": min(rates)}, world, None, 280)
        else:
            order = fence(pairs)
            with linked(rates) as names:
                found = together(job, world, [names[i] for i in order], 280)
        for each in zip(*found, strict=True):
            first = dict(each[0])
            if first["sent_bytes"] is not None:
                for key in ("sent_bytes", "expected_bytes"):
                    first[key] = sum(row[key] for row in each)
            rows.append(first | {"rate_mbit": min(rates), "machines": world})
    return pd.DataFrame(rows)


def _training(folder: str, interval: int) -> dict:
    """A job of two stages that keep their state in `folder`."""
    return {
        "work": "train", "folder": folder, "interval": interval, "behind": "stages.1",
        "out": f"{folder}/found", "timeout_s": 30.0,
    }  # fmt: skip


def kill_some(kills: int, seed: int, interval: int = 5, steps: int = 40) -> pd.DataFrame:
    """Kill a stage at a random moment, start all again, and so on until `kills`; a row for each.

    `lost` are the steps that had to be done again. The last row is the run that came to its end,
    after steps * (kills + 1), with the `loss` it ended at.
    """
    rng = random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        job = _training(folder, interval)
        log = Path(folder, "steps.log")
        for kill in range(kills + 1):
            before = len(_lines(log))
            with started(job | {"steps": steps * (kill + 1)}, 2) as processes:
                if kill < kills:
                    wanted = before + rng.randint(1, 3 * interval)
                    deadline = time.monotonic() + 60
                    while len(_lines(log)) < wanted and time.monotonic() < deadline:
                        time.sleep(0.01)
                        if any(process.poll() is not None for process in processes):
                            break
                    victim = rng.randrange(2)
                    os.killpg(processes[victim].pid, signal.SIGKILL)
                    # The other must notice by itself, and end.
                    noticed = _ends(processes[1 - victim], 40)
                else:
                    noticed = all(_ends(process, 120) for process in processes)
            after = _lines(log)
            resumed = after[before] if len(after) > before else None
            lost = rows[-1]["last"] + 1 - resumed if rows and resumed is not None else 0
            last = after[-1] if after else -1
            rows.append({"kill": kill, "noticed": noticed, "last": last, "lost": lost})
        rows[-1]["loss"] = json.loads(Path(f"{job['out']}.1.json").read_text())["loss"]
    return pd.DataFrame(rows)


def drop_link(steps: int, interval: int = 5, rate_mbit: float = 100.0) -> pd.DataFrame:
    """Train two stages over a link that falls to a tenth half-way; a row for each step.

    Raises `SuiteError` where links cannot be made.
    """
    with tempfile.TemporaryDirectory() as folder, linked([rate_mbit] * 2) as names:
        job = _training(folder, interval) | {"steps": steps}
        log = Path(folder, "steps.log")
        hub = names[0].replace("n0", "h")
        with started(job, 2, names) as processes:
            deadline = time.monotonic() + 120
            while len(_lines(log)) < steps // 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            for space, device in ((names[1], DEVICE), (hub, "port1")):
                _shape(space, device, rate_mbit / 10, "change")
            dropped = len(_lines(log))
            codes = [process.wait(120) for process in processes]
        if any(codes):
            raise SuiteError(f"a stage ended with {codes} after the link had dropped")
        found = json.loads(Path(f"{job['out']}.1.json").read_text())
    table = pd.DataFrame({"step_s": found["seconds"], "loss": found["losses"]})
    slowed = table.index > dropped  # one is under way
    return table.assign(rate_mbit=[rate_mbit / 10 if late else rate_mbit for late in slowed])


def _lines(log: Path) -> list[int]:
    if not log.exists():
        return []
    return [int(line) for line in log.read_text().splitlines() if line]


def _ends(process: subprocess.Popen, within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


# -- what compression does to learning --------------------------------------------------------


def codecs_of(method: str, share: float, shapes: Sequence[tuple], slots: int) -> list[Codec]:
    """Compression that leaves `share` of the dense bytes at the last, slowest cut.

    ``uniform`` compresses all cuts alike, ``feedback`` is Top-K with error feedback, and ``dense``
    nothing.
    """
    made = [Codec(shape, Dense) for shape in shapes]
    if method == "dense":
        return made
    kind = KINDS.get(method, TopK)
    ratio = (2 if kind is TopK else 1) / share
    if method == "uniform":
        return [Codec(shape, TopK, ratio) for shape in shapes]
    made[-1] = Codec(shapes[-1], kind, ratio, feedback=method == "feedback", slots=slots)
    return made


def learn(
    method: str, share: float, seed: int, images: Dataset, steps: int, batch: int = 32, n: int = 4
) -> list[dict]:
    """A row of one training in three stages in this process, which learn what three processes do.

    `loss` is the mean of the last tenth of the steps, accuracy that of the network without any
    compression.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    net = ResNet(NET.largest).train()
    solver = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)

    def draw():
        part = images.train.take(torch.randint(len(images.train), (batch,)))
        return images.normalise(part.images), part.labels

    found = _learn(net, ["stages.0.blocks.0", "stages.1"], solver, draw, method, share, steps, n)
    held = images.test.take(slice(0, 2000))
    return [found | {"seed": seed, "accuracy_test_pct": accuracy_pct(net, images, held)}]


def learn_text(
    method: str, share: float, seed: int, steps: int, batch: int = 32, n: int = 4
) -> list[dict]:
    """The same of a small GPT on the bytes of this library's own source."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    files = sorted((repo_root() / "dynlib").rglob("*.py"))
    text = torch.frombuffer(
        bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8
    )
    net = Gpt()
    solver = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.1)

    def draw():
        starts = torch.randint(len(text) - net.tokens - 1, (batch, 1))
        rows = text[starts + torch.arange(net.tokens + 1)].long()
        return rows[:, :-1], rows[:, 1:]

    found = _learn(net, ["blocks.0", "blocks.2"], solver, draw, method, share, steps, n)
    return [found | {"seed": seed}]


def _learn(net: Row, behind, solver, draw, method: str, share: float, steps: int, n: int) -> dict:
    """Rates are warmed up and fall to zero."""
    pieces = chain(net).cut(behind)
    top = solver.defaults["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(solver, top, steps, pct_start=0.2)
    codecs: list[Codec] = []
    losses = []
    for _ in range(steps):
        batch, targets = draw()
        total = 0.0
        for x, y in zip(batch.chunk(n), targets.chunk(n), strict=True):
            if not codecs:
                with torch.no_grad():
                    first = pieces[0](x)
                    shapes = [tuple(first.shape), tuple(pieces[1](first).shape)]
                codecs = codecs_of(method, share, shapes, n)
            for piece, codec in zip(pieces, codecs, strict=False):
                x = codec.decode(codec.encode(piece(x)))
            loss = F.cross_entropy(pieces[-1](x), y) / n
            loss.backward()
            total += loss.item()
        solver.step()
        solver.zero_grad()
        schedule.step()
        losses.append(total)
    last = losses[-max(1, steps // 10) :]
    left = codecs[-1].floats / Dense(shapes[-1]).floats
    return {"method": method, "share": left, "loss": sum(last) / len(last)}


class Gpt(Row):
    """A small transformer of bytes: (N, tokens) -> logits (N, 256, tokens).

    What its blocks pass on is (N, width, tokens), channels where images have theirs.
    """

    def __init__(self, width: int = 64, depth: int = 4, tokens: int = 64):
        super().__init__()
        self.tokens = tokens
        self.byte, self.place = nn.Embedding(256, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(tokens))

    def row(self):
        """See `Row`."""
        yield "stem", lambda x: (self.byte(x) + self.place.weight).mT
        for i, block in enumerate(self.blocks):
            yield f"blocks.{i}", lambda x, block=block: block(x.mT, self.mask, is_causal=True).mT
        yield "head", lambda x: self.head(self.norm(x.mT)).mT
