"""The trainer: it learns, resumes bit for bit, and ships what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_nets import fresh, weights

from dynlib._vision import timm
from dynlib.data import load_dataset
from dynlib.errors import CheckpointError, ModelError, RecipeError
from dynlib.nets.convert import elastify
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace
from dynlib.training.muon import Muon
from dynlib.training.recipes import Recipe
from dynlib.training.shipping import accuracy_table, checkpoint_path, choose_points, guide_of, ship
from dynlib.training.step import Step, bf16_pays
from dynlib.training.trainer import _batches, _patch, accuracy_pct, evaluate, train

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


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, cutmix=0.5, cutout=4)])
def test_an_interrupted_run_ends_bit_equal(recipe, tmp_path):
    whole, state = fresh(SPACE), tmp_path / "state.pt"
    expected = train(whole, tiny(), recipe)
    for _ in range(3):
        net = fresh(SPACE)  # a new process would start like this
        history = train(net, tiny(), recipe, state_file=state, stop_after_epochs=1)
    assert len(history) == 3
    assert torch.equal(weights(net), weights(whole))
    assert history["loss_max"].tolist() == expected["loss_max"].tolist()


@given(st.integers(4, 32), st.integers(0, 2**32))
def test_labels_are_mixed_by_the_area_of_the_patch(size, seed):
    patch, share = _patch(size, np.random.default_rng(seed))
    kept = torch.ones(size, size)
    kept[patch] = 0
    assert share == pytest.approx(kept.mean().item())


def test_a_mixed_batch_shows_another_image_in_the_patch_and_says_so():
    data, rng = tiny(), np.random.default_rng(0)
    recipe = Recipe(batch_size=50, pad=0, cutmix=1.0)
    view, labels = next(iter(_batches(data, recipe, 0, 0, rng)))
    plain, hard = next(
        iter(_batches(data, replace(recipe, cutmix=0.0), 0, 0, np.random.default_rng(0)))
    )
    mixed, alone = view(), plain()
    own = (mixed == alone).all(1).float().mean((1, 2))
    other = (mixed == alone.roll(1, 0)).all(1).float().mean((1, 2))
    assert torch.all(own + other >= 1 - 1e-6)
    share = labels[torch.arange(50), hard]
    different = hard != hard.roll(1)
    assert share[different].std() == 0
    assert own[different].min() >= share[different].min() - 1e-6
    assert torch.allclose(labels.sum(1), torch.ones(50))


def test_a_foreign_or_broken_state_is_refused(tmp_path):
    state = tmp_path / "state.pt"
    train(fresh(SPACE), tiny(), RECIPE, state_file=state, stop_after_epochs=1)
    with pytest.raises(CheckpointError, match="seed"):
        train(fresh(SPACE), tiny(), RECIPE, state_file=state, seed=1)
    only = r"run: recipe\.epochs is 3, expected 9; delete"
    with pytest.raises(CheckpointError, match=only):
        train(fresh(SPACE), tiny(), Recipe(epochs=9, batch_size=50), state_file=state)
    with pytest.raises(CheckpointError, match="guide"):
        train(fresh(SPACE), tiny(), RECIPE, state_file=state, about={"guide": ["another"]})
    with pytest.raises(CheckpointError, match="dataset"):
        train(fresh(SPACE), replace(tiny(), name="other"), RECIPE, state_file=state)
    images = tiny()
    images.train.images[7, 0, 0, 0] ^= 1
    with pytest.raises(CheckpointError, match="run: hash of the images is"):
        train(fresh(SPACE), images, RECIPE, state_file=state)
    whole = state.read_bytes()
    earlier = torch.load(state)
    del earlier["identity"]["hash of the images"]
    torch.save(earlier, state)
    with pytest.raises(CheckpointError, match="hash of the images is None, expected"):
        train(fresh(SPACE), tiny(), RECIPE, state_file=state)
    torch.save({"identity": {}}, tmp_path / "other.pt")
    for broken in (whole[:500], b"", (tmp_path / "other.pt").read_bytes()):
        state.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            train(fresh(SPACE), tiny(), RECIPE, state_file=state)


@pytest.mark.parametrize("outputs", [2, 5])
def test_a_network_with_other_outputs_than_classes_is_refused(outputs):
    images = replace(tiny(), name="photos", classes=("cat", "dog", "owl"))
    net = Supernet(SPACE, outputs)
    message = rf"has {outputs} outputs, photos has 3 classes \(cat, dog, owl\)"
    with pytest.raises(ModelError, match=message):
        train(net, images, RECIPE)
    if outputs < 3:  # of more, the classes may be the first
        with pytest.raises(ModelError, match=message):
            evaluate(net, SPACE.smallest, images, images.test)


def test_a_schedule_cut_short_never_goes_back_whenever_it_is_resumed(tmp_path, monkeypatch, caplog):
    recipe, state, seen = Recipe(epochs=6, batch_size=50), tmp_path / "state.pt", []
    whole = Step.__call__

    def watched(self, *args, progress, **more):
        seen.append(progress)
        return whole(self, *args, progress=progress, **more)

    monkeypatch.setattr(Step, "__call__", watched)

    def go_on(**more):
        return train(fresh(SPACE), tiny(), recipe, state_file=state, watch=0, **more)

    go_on(stop_after_epochs=1)
    go_on(finish_in=2, stop_after_epochs=1)  # as if killed before its second epoch
    history = go_on(finish_in=2)
    assert (seen == np.sort(seen)).all()
    assert seen[-1] < 1 <= seen[-1] + 2.5 / 6 / 7  # seven batches an epoch
    assert "already trained" not in caplog.text
    assert len(go_on(finish_in=2)) == len(history)  # done is done
    assert f"already trained, from {state}" in caplog.text


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


@pytest.mark.parametrize("name", ["cifar10", "generated"])
def test_every_shipped_checkpoint_says_how_it_was_trained(name):
    supernet, provenance = Supernet.from_checkpoint(checkpoint_path(name))
    assert Recipe(**provenance["recipe"]).epochs >= provenance["epochs_run"] > 0
    assert provenance["seconds"] > 0
    assert provenance["threads"] > 0
    table = pd.read_csv(checkpoint_path(name).with_suffix(".accuracy.csv"))
    assert list(table["subnet"]) == [str(config) for config in supernet.statistics]


def test_training_goes_on_from_a_checkpoint_and_says_so(trained, tmp_path, monkeypatch):
    from dynlib.training import __main__ as room

    first = tmp_path / "first.safetensors"
    ship(trained[0], tiny(), first, candidates=2, recipe={"epochs": 3}, epochs_run=3)
    monkeypatch.setattr(room, "load_dataset", lambda *_, **__: tiny())
    wider = SearchSpace(SPACE.resolution, SPACE.depth, ((8, 16), (16, 32)))
    monkeypatch.setattr(room, "CIFAR_SPACE", wider)
    started = []

    def watch(net, *_, **__):
        started.append(net)
        return pd.DataFrame({"seconds": [1.0]})

    monkeypatch.setattr(room, "train", watch)
    second = tmp_path / "second.safetensors"
    room.main(["--start", str(first), "--out", str(second), "--epochs", "1"])
    images = torch.randn(4, 3, 16, 16)
    before = Supernet.from_checkpoint(first)[0](images, SPACE.largest)
    torch.testing.assert_close(started[0](images, wider.largest), before, atol=1e-3, rtol=1e-3)
    now, provenance = Supernet.from_checkpoint(second)
    assert now.space == wider
    assert provenance["start"]["epochs_run"] == 3
    assert provenance["recipe"]["epochs"] == 1


def test_checkpoints_of_one_name_in_two_folders_have_two_training_states(tmp_path):
    from dynlib.training.__main__ import _state_of

    one, other = (tmp_path / folder / "net.safetensors" for folder in "ab")
    assert _state_of(one) == _state_of(tmp_path / "b" / ".." / "a" / "net.safetensors")
    assert _state_of(one) != _state_of(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "absent"], "data set 'absent'"),
        (["--dataset", "generated", "--epochs", "0"], "recipe, epochs: 0"),
        (["--dataset", "generated", "--size", "0"], "size is 0"),
        (["--dataset", "generated", "--start", "absent"], "absent"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    from dynlib.training import __main__ as room

    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        room.main([*options, "--out", str(tmp_path / "net.safetensors")])
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("options", "fit"), [([], {}), (["--size", "24"], {"size": 24, "resize": True})]
)
def test_images_are_brought_to_a_size_that_is_asked_for(options, fit, tmp_path, monkeypatch):
    from dynlib.training import __main__ as room

    asked = []

    def watch(*_, **more):
        asked.append(more)
        raise CheckpointError("far enough")

    monkeypatch.setattr(room, "load_dataset", watch)
    with pytest.raises(SystemExit):
        room.main([*options, "--out", str(tmp_path / "net.safetensors")])
    assert asked == [{"seed": 0, **fit}]


def test_every_option_is_explained():
    from dynlib.training.__main__ import _parser

    assert all(action.help for action in _parser()._actions)


def test_checkpoints_teach_together_one_of_them_through_a_mirror(trained, tmp_path):
    path = tmp_path / "net.safetensors"
    ship(trained[0], tiny(), path, candidates=2)
    net, _ = Supernet.from_checkpoint(path)
    images = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16_pays()):
        largest = net.prepare(SPACE.largest)
        one, other = (largest(x).float().softmax(1) for x in (images, images.flip(-1)))
    both = guide_of([path, path])(images)
    torch.testing.assert_close(both, ((one + other) / 2).log())
    torch.testing.assert_close(both.flip(0), guide_of([path, path])(images.flip(0)))
    torch.testing.assert_close(guide_of([path])(images), one.log())


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


def timm_net(name="resnet18", **options):
    torch.manual_seed(0)
    return elastify(timm.create_model(name, num_classes=10, **options), resolution=(16,))


def one_step(supernet, recipe, progress=0.5):
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    step = Step(supernet, recipe)
    step(lambda: images, torch.arange(20) % 10, step=0, progress=progress, rng=rng)


@pytest.mark.parametrize(
    ("recipe", "low", "high"), [(Recipe.finetune(), 0, 0.05), (Recipe(), 0.2, 10)]
)
def test_finetuning_begins_where_the_weights_stand_and_training_does_not(recipe, low, high):
    supernet = timm_net("mobilenetv3_small_050")  # its gates are convolutions without BatchNorm
    with torch.no_grad():  # as trained weights are: of another norm, with scales of their own
        for parameter in supernet.net.parameters():
            parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    largest = supernet.space.largest
    before = supernet(images, largest).detach()
    one_step(supernet, recipe, progress=0.0)
    after = supernet(images, largest).detach()
    assert low <= ((after - before).norm() / before.norm()).item() <= high


def test_scales_that_begin_at_zero_are_trained_and_those_at_one_stay():
    """timm begins residual branches at zero: with frozen scales they never take part."""
    supernet = timm_net()
    parameters = dict(supernet.net.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    assert not before["layer1.0.bn2.weight"].any()
    one_step(supernet, Recipe(batch_size=20))
    assert parameters["layer1.0.bn2.weight"].any()
    assert torch.equal(parameters["layer1.0.bn1.weight"], before["layer1.0.bn1.weight"])
    supernet = timm_net()
    one_step(supernet, Recipe.finetune())
    moved = dict(supernet.net.named_parameters())  # behind a zero nothing moves in the first step
    assert not torch.equal(moved["bn1.weight"], before["bn1.weight"])


@pytest.mark.parametrize("recipe", [Recipe(batch_size=20), Recipe.finetune()])
def test_tokens_and_embeddings_are_trained(recipe):
    supernet = timm_net("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2)
    before = {name: p.detach().clone() for name, p in supernet.net.named_parameters()}
    one_step(supernet, recipe)
    still = [name for name, p in supernet.net.named_parameters() if torch.equal(p, before[name])]
    assert not {name for name in still if not name.endswith(("k.bias", "k.weight"))}


@pytest.mark.parametrize("solver", ["muon", "muon+adamw"])
@pytest.mark.parametrize("pays", [True, False])
def test_bfloat16_is_orthogonalised_in_only_where_it_pays(pays, solver, monkeypatch):
    home, asked = timm.optim.muon, []
    given_one = home.zeropower_via_newtonschulz

    def noted(gradient, *args, dtype, **more):
        asked.append(dtype)
        return given_one(gradient, *args, dtype=dtype, **more)

    monkeypatch.setattr(home, "zeropower_via_newtonschulz", noted)
    monkeypatch.setattr("dynlib.training.step.bf16_pays", lambda device=None: pays)
    one_step(fresh(SPACE), replace(RECIPE, solver=solver))
    assert set(asked) == {torch.bfloat16 if pays else torch.float32}
    assert home.zeropower_via_newtonschulz is noted  # as it was found


@pytest.mark.parametrize(("name", "half"), [("resnet18", True), ("mobilenetv3_small_050", False)])
def test_depth_wise_networks_are_trained_in_single_precision_on_a_cpu(name, half, monkeypatch):
    monkeypatch.setattr("dynlib.training.step.bf16_pays", lambda device=None: True)
    assert Step(timm_net(name), RECIPE).bf16 is half


def test_a_step_that_fails_leaves_the_orthogonalisation_as_it_was():
    home = timm.optim.muon
    given_one = home.zeropower_via_newtonschulz
    weight = torch.nn.Parameter(torch.ones(2, 2))
    solver = Muon([weight], lr=0.1, dtype=torch.float32)
    weight.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(RuntimeError):
        solver.step()
    assert home.zeropower_via_newtonschulz is given_one


def test_statistics_of_weights_that_have_moved_are_dropped():
    net = fresh(SPACE)
    calibrate(net, SPACE.largest, [torch.randn(20, 3, 16, 16)])
    train(net, tiny(), replace(RECIPE, epochs=1), watch=0)
    assert not net.statistics


def test_an_unknown_solver_is_named():
    with pytest.raises(RecipeError, match="solver: 'sgd', expected one of"):
        Recipe(solver="sgd")
