"""The trainer: it learns, resumes bit for bit, and ships what it says."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from small_nets import fresh, weights

from dynlib.data import load_dataset
from dynlib.nets.supernet import Supernet
from dynlib.space import SearchSpace
from dynlib.training.recipes import Recipe
from dynlib.training.ship import accuracy_table, choose_points, ship
from dynlib.training.trainer import ResumeError, accuracy_pct, train

SPACE = SearchSpace((16,), ((1,), (0, 1)), ((8, 16), (16, 24)))
RECIPE = Recipe(epochs=3, batch_size=50)


def tiny():
    return load_dataset("generated", size=16, generated=(400, 80))


@pytest.fixture(scope="module")
def trained():
    net = fresh(SPACE)
    return net, train(net, tiny(), RECIPE)


def test_training_lowers_the_loss_and_reports_every_epoch(trained):
    _, history = trained
    assert list(history["epoch"]) == [1, 2, 3]
    assert history["loss_max"].iloc[-1] < history["loss_max"].iloc[0]
    assert (history["images_per_s"] > 0).all()


def test_an_interrupted_run_ends_bit_equal(trained, tmp_path):
    state = tmp_path / "state.pt"
    for _ in range(3):
        net = fresh(SPACE)  # a new process would start like this
        history = train(net, tiny(), RECIPE, state_file=state, stop_after_epochs=1)
    assert len(history) == 3
    assert torch.equal(weights(net), weights(trained[0]))
    assert history["loss_max"].tolist() == trained[1]["loss_max"].tolist()


def test_a_foreign_or_broken_state_is_refused(tmp_path):
    state = tmp_path / "state.pt"
    train(fresh(SPACE), tiny(), RECIPE, state_file=state, stop_after_epochs=1)
    with pytest.raises(ResumeError, match="seed"):
        train(fresh(SPACE), tiny(), RECIPE, state_file=state, seed=1)
    with pytest.raises(ResumeError, match="recipe"):
        train(fresh(SPACE), tiny(), Recipe(epochs=9, batch_size=50), state_file=state)
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ResumeError, match=r"state\.pt"):
        train(fresh(SPACE), tiny(), RECIPE, state_file=state)


@pytest.mark.faults
def test_a_killed_run_resumes_from_its_last_epoch(tmp_path):
    state = tmp_path / "state.pt"
    code = (
        "import sys; sys.path.insert(0, 'tests'); import test_training as t;"
        "recipe = t.Recipe(epochs=500, batch_size=50);"
        f"t.train(t.fresh(t.SPACE), t.tiny(), recipe, state_file={str(state)!r})"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 300
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    recipe = Recipe(epochs=500, batch_size=50)
    history = train(fresh(SPACE), tiny(), recipe, state_file=state, stop_after_epochs=1)
    assert len(history) >= 2


def test_shipping_stores_statistics_and_the_accuracies_of_the_stored_weights(trained, tmp_path):
    net, dataset = trained[0], tiny()
    path = tmp_path / "net.safetensors"
    table = ship(net, dataset, path, candidates=6, seed=0)
    assert table["macs_m"].is_monotonic_increasing
    assert path.stat().st_size < 2**20
    back, provenance = Supernet.from_checkpoint(path)
    assert provenance["dataset"] == "generated"
    assert json.dumps(provenance)
    assert {str(c) for c in back.statistics} == set(table["subnet"])
    again = accuracy_table(back, list(back.statistics), dataset).set_index("subnet")
    expected = table.set_index("subnet").loc[again.index]
    pd.testing.assert_series_equal(again["accuracy_test_pct"], expected["accuracy_test_pct"])
    written = pd.read_csv(path.with_suffix(".accuracy.csv"))
    assert list(written["subnet"]) == list(table["subnet"])


def test_training_goes_on_from_a_checkpoint_and_says_so(trained, tmp_path, monkeypatch):
    from dynlib.training import ship as room

    first = tmp_path / "first.safetensors"
    ship(trained[0], tiny(), first, candidates=2, recipe={"epochs": 3}, epochs_run=3)
    monkeypatch.setattr(room, "load_dataset", lambda *_, **__: tiny())
    started = []

    def watch(net, *_, **__):
        started.append(weights(net))
        return pd.DataFrame({"seconds": [1.0]})

    monkeypatch.setattr(room, "train", watch)
    second = tmp_path / "second.safetensors"
    room.main(["--start", str(first), "--out", str(second), "--epochs", "1"])
    torch.testing.assert_close(started[0], weights(Supernet.from_checkpoint(first)[0]))
    _, provenance = Supernet.from_checkpoint(second)
    assert provenance["start"]["epochs_run"] == 3
    assert provenance["recipe"]["epochs"] == 1


def test_chosen_points_include_both_ends(trained):
    net, dataset = trained[0], tiny()
    chosen = choose_points(net, dataset, count=4, candidates=5)
    assert chosen[0] == SPACE.smallest
    assert chosen[-1] == SPACE.largest
    assert len(set(chosen)) == len(chosen) <= 4


def test_accuracy_counts_hits():
    dataset = tiny()

    class Oracle(torch.nn.Linear):
        def forward(self, images):
            return torch.nn.functional.one_hot(dataset.test.labels, 10).float()

    assert accuracy_pct(Oracle(1, 1), dataset, dataset.test) == 100
