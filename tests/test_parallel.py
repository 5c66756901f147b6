"""Processes that train together: as one would, or refused by name, and none left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from small_nets import SPACE, fresh
from torch import nn

from dynlib.errors import PeerError, RecipeError
from dynlib.training.parallel import Alone, Peers, join
from suite.errors import SuiteError
from suite.studies.across import ddp_losses, together

ROOT = Path(__file__).parents[1]


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert not join()
    alone = Alone()
    batch = torch.randn(6, 3)
    with alone as peers:
        assert peers.share(batch) is batch
    assert alone.mean([1.0, 2.0]) == [1.0, 2.0]
    assert alone.tell(b"x") == b"x"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK is 2; expected 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": ""}, "MASTER_PORT is ''"),
    ],
)
def test_a_malformed_environment_is_named(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PeerError, match=message):
        join(1.0)


@pytest.mark.faults
def test_a_rank_that_never_comes_is_named_in_time():
    job = {"work": "train", "timeout_s": 2.0}
    started = time.monotonic()
    with pytest.raises(SuiteError, match="rank 1 has not come within 2 s"):
        together(job, 1, more={"WORLD_SIZE": "2"}, timeout_s=60)
    assert time.monotonic() - started < 60


@pytest.mark.faults
def test_processes_that_expect_other_numbers_are_named():
    code = "from dynlib.training.parallel import join; join(10.0)"
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671"}
    sizes = ("2", "3")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=env | {"RANK": str(rank), "WORLD_SIZE": size},
        )
        for rank, size in enumerate(sizes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=90)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert "rank 1 expects 3 processes, rank 0 2" in said[0]
    assert "rank 0 expects 2 processes, rank 1 3" in said[1]


def test_two_processes_learn_what_one_does():
    one = ddp_losses("double", 1, 0, steps=6)
    two = ddp_losses("double", 2, 0, steps=6)
    columns = ["loss_max", "loss_student"]
    assert (one - two)[columns].abs().max().max() < 1e-5
    assert one["loss_max"].iloc[-1] < one["loss_max"].iloc[0]


@pytest.mark.faults
def test_torchrun_goes_on_after_a_killed_worker(tmp_path):
    """It restarts both, which lose no epoch whose state was written, and learn the same."""
    steps, state = 24, tmp_path / "state.pt"
    job = {
        "work": "share", "precision": "double", "seed": 0, "steps": steps, "hook": "exact",
        "state": str(state), "out": str(tmp_path / "found"),
    }  # fmt: skip
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts",
        "1", "--standalone", "-m", "suite.studies.across_worker", str(path),
    ]  # fmt: skip
    places = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
    env = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (tmp_path / "said").open("w") as said:
        agent = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=said, stderr=said)
    try:
        _wait_for(lambda: state.exists() or agent.poll() is not None)
        workers = psutil.Process(agent.pid).children(recursive=True)
        victim = next(w for w in workers if w.environ().get("RANK") == "1")
        kept = torch.load(state, weights_only=True)["history"]
        victim.send_signal(signal.SIGKILL)
        assert agent.wait(120) == 0, (tmp_path / "said").read_text()[-2000:]
    finally:
        for process in [*psutil.Process().children(recursive=True)]:
            if process.pid == agent.pid or agent.pid in [p.pid for p in process.parents()]:
                process.kill()
        agent.stdin.close()
        agent.wait()
    found = json.loads((tmp_path / "found.0.json").read_text())
    assert len(found["seconds"]) == steps
    assert 0 < len(kept) < steps
    assert found["seconds"][: len(kept)] == [row["seconds"] for row in kept]  # not done again
    alone = ddp_losses("double", 1, 0, steps=steps)
    assert abs(alone["loss_max"] - pd.Series(found["loss_max"])).max() < 1e-5


def _wait_for(happened, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("hook", ["exact", "fp16", "powersgd"])
def test_exchanged_gradients_are_those_given(hook, lonely):
    net = fresh(SPACE).net
    peers = Peers(net, 8, hook)
    weights = [p for p in net.parameters() if p.requires_grad]
    for weight in weights[1:]:
        weight.grad = torch.randn_like(weight)
    before = [weight.grad.clone() for weight in weights[1:]]
    peers.exchange()
    assert weights[0].grad is None
    tolerance = 1e-2 if hook == "fp16" else 1e-6
    for weight, expected in zip(weights[1:], before, strict=True):
        torch.testing.assert_close(weight.grad, expected, atol=tolerance, rtol=tolerance)


def test_normalisation_over_all_shares_is_that_of_torch(lonely):
    net = fresh(SPACE).net
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight)
    other = nn.BatchNorm2d(5)
    other.load_state_dict(norm.state_dict())
    x = torch.randn(4, 5, 3, 3) * 3 + 1
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with Peers(net, 8):
        norm(mine).square().mul(torch.arange(5.0).view(1, 5, 1, 1)).sum().backward()
    other(theirs).square().mul(torch.arange(5.0).view(1, 5, 1, 1)).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(norm.running_var, other.running_var)
    torch.testing.assert_close(norm.running_mean, other.running_mean)


def test_an_unknown_hook_is_refused(lonely):
    net = fresh(SPACE).net
    with pytest.raises(RecipeError, match="hook: 'zip'"):
        Peers(net, 8, "zip")
