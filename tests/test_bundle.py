"""A bundle answers as torch does, keeps shared weights once, and is whole or not there."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from bundle_cases import POINTS, bundled, photos, table
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from dynlib.boards.file import BOARD_DIR
from dynlib.deploy import bundle
from dynlib.deploy import runner as running
from dynlib.deploy.bundle import export_bundle
from dynlib.deploy.runner import MODES, Runner
from dynlib.errors import BundleError, ModelError
from dynlib.nets.chain import resized
from dynlib.nets.mobilenet import mobilenet_space
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.points import read_table

FRAMES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def supernet():
    return bundled()


@pytest.fixture(scope="module", params=[True, False], ids=["blocked", "portable"])
def folder(request, supernet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return export_bundle(supernet, table(), folder, board="jetson-nano", blocked=request.param)


def off(runner, supernet, config, frames=FRAMES):
    with torch.inference_mode():
        want = supernet.extract(config)(resized(frames, config.resolution)).numpy()
    runner.switch(config)
    return np.abs(runner(frames.numpy()) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("mode", MODES)
def test_every_point_answers_as_torch_does(folder, supernet, mode):
    runner = Runner(folder, mode=mode)
    assert runner.subnets == tuple(map(str, POINTS))
    assert max(off(runner, supernet, config) for config in (*POINTS, *POINTS)) < 2e-4


def test_shared_points_have_views_and_packed_ones_copies(folder):
    shared = Runner(folder, mode="shared")
    assert shared.shared_pct > 20
    assert Runner(folder).shared_pct == 0
    used = sum(view.numpy().nbytes for ready in shared._ready.values() for view in ready.views)
    starts = {view.data_ptr() for ready in shared._ready.values() for view in ready.views}
    assert len(starts) < sum(len(ready.views) for ready in shared._ready.values())
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = load_file(folder / "weights.safetensors")
    keys = {key for point in manifest["points"] for key, _ in point["shared"].values()}
    assert sum(kept[key].nbytes for key in keys) < used * (1 - shared.shared_pct / 100) + 64 * len(
        keys
    )


def test_the_files_are_what_the_manifest_says(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", *manifest["files"]}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert read_table(folder / "points.csv")["subnet"].tolist() == list(map(str, POINTS))
    board = (BOARD_DIR / "jetson-nano.toml").read_bytes()
    assert (folder / "board.toml").read_bytes() == board


def test_squeeze_and_excitation_survives_in_both_modes(tmp_path):
    """A family with depth-wise convolutions, transformed kernels and hard swish."""
    torch.manual_seed(0)
    space = mobilenet_space(resolution=(32,), depth=(2,), kernel=(3, 5), expand=(3, 4))
    net = Supernet(space, 10, family="MobileNetV3", transform=True)
    points = (space.smallest,)
    frames = torch.randn(8, 3, 32, 32)
    for config in points:
        calibrate(net, config, [frames])
    folder = export_bundle(net, table(points), tmp_path / "bundle")
    for mode in MODES:
        runner = Runner(folder, mode=mode)
        assert max(off(runner, net, config, frames) for config in points) < 1e-4


def test_a_bundle_of_one_mode_has_no_other(supernet, tmp_path):
    folder = export_bundle(
        supernet, table(POINTS[:1]), tmp_path / "deep" / "bundle", modes=["packed"]
    )
    assert Runner(folder).subnet == str(POINTS[0])
    with pytest.raises(BundleError, match=r"0\.shared\.onnx: missing; expected the mode 'shared'"):
        Runner(folder, mode="shared")


def test_a_bundle_is_whole_or_not_there(supernet, tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    with pytest.raises(ModelError, match="calibrate"):
        export_bundle(supernet, table([supernet.space.decode([0, 0, 1, 1, 1])]), folder)
    monkeypatch.setattr(bundle, "Runner", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_bundle(supernet, table(), folder)
    assert not list(tmp_path.iterdir())
    folder.mkdir()
    with pytest.raises(BundleError, match=r"exists; .*: give another name, or remove it"):
        export_bundle(supernet, table(), folder)


def test_images_that_do_not_fit_are_refused_at_export(supernet, tmp_path):
    def refused(message, **other):
        images = dataclasses.replace(photos(), **other)
        with pytest.raises(BundleError, match=message):
            export_bundle(supernet, table(POINTS[:1]), tmp_path / "bundle", images=images)

    refused(r"images\.std: \[1\.0, 1\.0, 0\.0\]; expected 3", std=torch.tensor([1.0, 1.0, 0.0]))
    refused(r"images\.classes: 1 names; expected one for each", classes=("one",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("backend", "source", "warned"), [
    ("torch", "measured", "backend torch, but"), (None, "measured", "backend none, but"),
    ("onnxruntime", "measured", ""), ("torch", "estimated", ""),
])  # fmt: skip
def test_times_of_another_engine_are_warned_of(
    backend, source, warned, supernet, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(bundle, "_write_points", lambda *_: {})  # nothing to serve
    points = table(POINTS[:1], backend=backend, source=source)
    export_bundle(supernet, points, tmp_path / "bundle", modes=[])
    assert [warned in record.getMessage() for record in caplog.records] == [True] * bool(warned)
    assert "`profile_points` over the Runner" in caplog.text or not warned


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 40), st.booleans()), min_size=1, max_size=12
    )
)
def test_what_begins_alike_is_kept_once(memory_file, wanted):
    """Prefixes of a few arrays, in any order: each is found again, and each array is kept once."""
    full = [np.arange(40, dtype=np.float32) + 100 * i for i in range(3)]
    arrays = [-full[i][:n] if other else full[i][:n] for i, n, other in wanted]
    store = bundle._Store()
    places = [store.add("name", values.reshape(1, -1)) for values in arrays]
    memory_file.write_bytes(store.content())
    with memory_file.open("rb") as file:
        read = running._Store(file)
        for values, (key, shape) in zip(arrays, places, strict=True):
            assert np.array_equal(read.view(key, shape), values[None])
            assert read.offset(read.view(key, shape)) % 64 == 0
    long = [pair for pair in wanted if pair[1] >= 16]
    assert len(
        {place[0] for place, want in zip(places, wanted, strict=True) if want in long}
    ) == len({(i, other) for i, _, other in long})


@pytest.fixture(scope="module")
def memory_file(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "weights.safetensors"
