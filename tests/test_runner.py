"""What serves a bundle: without torch, and nothing but what the manifest vouches for."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_cases import POINTS, bundled, photos, table
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.deploy import runner as running
from dynlib.deploy.bundle import export_bundle
from dynlib.deploy.runner import MODES, Runner
from dynlib.errors import BundleError, ConfigError, DataError

ROOT = Path(__file__).parents[1]
FRAMES = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
PHOTOS = photos().test.images.numpy()
FOREIGN = (
    "torch",
    "torchvision",
    "timm",
    "optuna",
    "matplotlib",
    "pandas",
    "scipy",
    "safetensors",
    "onnx",
)


@pytest.fixture(scope="module")
def supernet():
    return bundled()


@pytest.fixture(scope="module")
def whole(supernet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    return export_bundle(supernet, table(), folder, images=photos())


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage, next to a file that is none of its business."""
    (tmp_path / "secret").write_bytes((whole / "points.csv").read_bytes())
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def change(folder, edit):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def rehash(folder, name):
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    change(folder, lambda manifest: manifest["files"].update({name: digest}))


@pytest.mark.parametrize("mode", MODES)
def test_switching_is_that_of_a_server(whole, mode):
    runner = Runner(whole, mode=mode, threads=2)
    first, *_, last = runner.subnets
    assert runner.subnet == first
    answers = {}
    for subnet in (first, last, first):
        runner.switch(subnet)
        answers.setdefault(subnet, []).append(runner(FRAMES))
    assert np.array_equal(*answers[first])
    assert not np.allclose(answers[first][0], answers[last][0])
    with pytest.raises(ConfigError, match="r99 is not in this bundle, which holds r12-"):
        runner.switch("r99")
    assert runner.subnet == first
    for images in (FRAMES.astype(float), FRAMES[..., :12], FRAMES[0]):
        with pytest.raises(DataError, match=r"expected float32 \(N, 3, 16, 16\)"):
            runner(images)
    assert np.array_equal(runner(FRAMES), answers[first][0])


def test_photos_are_normalised_as_the_data_set_does(whole):
    runner = Runner(whole)
    want = photos().normalise(torch.from_numpy(PHOTOS)).numpy()
    height_width_channel = np.ascontiguousarray(PHOTOS.transpose(0, 2, 3, 1))
    for pixels in (PHOTOS, height_width_channel.transpose(0, 3, 1, 2)):
        got = runner.normalise(pixels)
        assert got.dtype == np.float32
        assert np.allclose(got, want, rtol=0, atol=1e-6)
        assert np.allclose(runner(got), runner(want), atol=1e-4)
    assert runner.classes == photos().classes
    for other in (PHOTOS.astype(np.float32), PHOTOS[0], height_width_channel):
        with pytest.raises(DataError, match=r"photos .*; expected uint8 \(N, 3, H, W\)"):
            runner.normalise(other)


def test_an_older_bundle_serves_and_says_what_it_lacks(folder):
    change(folder, lambda manifest: manifest.pop("images"))
    runner = Runner(folder)
    assert runner.classes is None
    assert runner(FRAMES).shape == (3, 10)
    with pytest.raises(BundleError, match=r"bundle: does not say how .* export_bundle\(.*images="):
        runner.normalise(PHOTOS)


def test_a_switch_in_flight_never_mixes_two_points(whole):
    runner = Runner(whole, mode="shared")
    ends = runner.subnets[0], runner.subnets[-1]
    wanted = []
    for subnet in ends:
        runner.switch(subnet)
        wanted.append(runner(FRAMES))
    outputs, done = [], threading.Event()

    def serve():
        outputs.extend(runner(FRAMES) for _ in range(300))
        done.set()

    thread = threading.Thread(target=serve)
    thread.start()
    switches = 0
    while not done.wait(1e-4):
        runner.switch(ends[switches % 2])
        switches += 1
    thread.join()
    assert switches > 2
    for output in outputs:
        assert any(np.array_equal(output, want) for want in wanted)


def test_it_serves_where_there_is_no_torch(whole, supernet):
    """Nor what else is not part of `dynlib[runtime]`; what it answers is what torch answers."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {FOREIGN}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import numpy as np
from dynlib.deploy.runner import Runner
for mode in {MODES}:
    runner = Runner({str(whole)!r}, mode=mode)
    runner.switch(runner.subnets[-1])
    runner.normalise(np.ones((1, 3, 16, 16), np.uint8))
    print(runner(np.ones((1, 3, 16, 16), np.float32)).tolist())
"""
    run = [sys.executable, "-c", code]
    printed = subprocess.check_output(run, text=True, cwd=ROOT).splitlines()
    with torch.inference_mode():
        want = supernet.extract(POINTS[-1])(torch.ones(1, 3, 16, 16))
    assert len(printed) == len(MODES)
    for line in printed:
        assert np.allclose(json.loads(line), want, rtol=1e-4, atol=1e-5)


def leave(folder):
    change(folder, lambda m: m["files"].update({"../secret": m["files"]["points.csv"]}))


def point_to_root(folder):
    change(folder, lambda m: m["files"].update({"/etc/passwd": "0" * 64}))


def link(folder):
    (folder / "points.csv").unlink()
    (folder / "points.csv").symlink_to(folder.parent / "secret")


def link_the_store(folder):
    (folder / "weights.safetensors").rename(folder.parent / "store")
    (folder / "weights.safetensors").symlink_to(folder.parent / "store")


def pipe(folder):
    (folder / "points.csv").unlink()
    os.mkfifo(folder / "points.csv")


def nest(folder):
    (folder / "points.csv").unlink()
    (folder / "points.csv").mkdir()


def truncate(folder):
    raw = (folder / "1.packed.onnx").read_bytes()
    (folder / "1.packed.onnx").write_bytes(raw[: len(raw) // 2])


def of_another(folder):
    raw = bytearray((folder / "weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(raw)


def a_million(folder):
    entry = '"%d.onnx": "' + "0" * 64 + '"'
    files = ",".join(entry % i for i in range(10**6))
    (folder / "manifest.json").write_text(f'{{"files": {{{files}}}}}')


def many_short(folder):
    change(folder, lambda m: m["files"].update((f"x{i}", 0) for i in range(10**5)))


def million_points(folder):
    change(folder, lambda m: m.update(points=[1] * 10**6))


def images_are(**values):
    return lambda folder: change(folder, lambda m: m["images"].update(values))


def manifest_is(text):
    return lambda folder: (folder / "manifest.json").write_text(text)


def without(name):
    return lambda folder: (folder / name).unlink()


REFUSED = {
    "a path out of it": (leave, r"bundle: '\.\./secret'; expected the name of a file in this fol"),
    "an absolute path": (point_to_root, "'/etc/passwd'; expected the name of a file in this fol"),
    "a link": (link, r"bundle/points\.csv: expected a plain file"),
    "a linked store": (link_the_store, r"bundle/weights\.safetensors: expected a plain file"),
    "a pipe": (pipe, r"bundle/points\.csv: expected a plain file"),
    "a folder": (nest, r"bundle/points\.csv: expected a plain file"),
    "a truncated graph": (truncate, r"1\.packed\.onnx: its SHA-256 is not that in manifest"),
    "another store": (of_another, r"weights\.safetensors: its SHA-256 is not that in manifest"),
    "no store": (
        without("weights.safetensors"),
        r"weights\.safetensors: expected a plain file: No",
    ),
    "no manifest": (without("manifest.json"), r"manifest\.json: expected a plain file: No such"),
    "10^6 files": (a_million, r"manifest\.json: more than 16777216 bytes; expected a manifest"),
    "10^5 short ones": (many_short, r"bundle/x0: expected a plain file: No such"),
    "no text": (manifest_is("\0"), r"manifest\.json: expected a dynlib-bundle-1 manifest"),
    "a list": (manifest_is("[]"), r"manifest\.json: expected a dynlib-bundle-1 manifest"),
    "deep": (manifest_is("[" * 10**6), r"manifest\.json: expected a dynlib-bundle-1 manifest"),
    "another format": (manifest_is('{"format": "x"}'), r"format 'x'; expected dynlib-bundle-1"),
    "no points": (lambda f: change(f, lambda m: m.update(points=[])), "expected points, weights"),
    "files in a list": (lambda f: change(f, lambda m: m.update(files=[1])), "expected a dynlib-b"),
    "images in a list": (
        lambda f: change(f, lambda m: m.update(images=[1])),
        r"manifest\.json: images: \[1\]; expected mean, std and classes",
    ),
    "no mean": (images_are(mean=None), r"images\.mean: None; expected 3 numbers from -1e\+06"),
    "a mean of a channel": (images_are(mean=[0.5]), r"manifest\.json: images\.mean: \[0\.5\]; exp"),
    "a mean of texts": (images_are(mean=["0"] * 3), r"images\.mean: .*; expected 3 numbers"),
    "an infinite mean": (images_are(mean=[0, 0, np.inf]), r"images\.mean: .*; expected 3 numbers"),
    "a deviation of zero": (images_are(std=[1, 1, 0]), r"images\.std: .* 3 numbers from 1e-06 to"),
    "a deviation of nan": (images_are(std=[1, 1, np.nan]), r"images\.std: .*; expected 3 numbers"),
    "a text of classes": (images_are(classes="ten"), r"images\.classes: 'ten'; expected a list of"),
    "classes by number": (images_are(classes=[1] * 10), r"images\.classes: .*; expected a list of"),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", REFUSED)
def test_bad_bundles_are_refused_by_name_before_anything_is_loaded(folder, case, monkeypatch):
    damage, message = REFUSED[case]
    damage(folder)
    monkeypatch.setattr(running, "_Store", lambda *_: pytest.fail("the store was read"))
    monkeypatch.setattr(running, "_session", lambda *_: pytest.fail("a graph was loaded"))
    with pytest.raises(BundleError, match=message):
        Runner(folder)


def place(*where):
    def edit(manifest):
        name = next(iter(manifest["points"][0]["packed"]))
        manifest["points"][0]["packed"][name] = list(where)

    return lambda folder: change(folder, edit)


def foreign_header(folder):
    (folder / "weights.safetensors").write_bytes(b"\xff" * 100)
    rehash(folder, "weights.safetensors")


def outside_tensor(folder):
    """A weight of the graph is a part of another file."""
    weight = np.zeros((2, 2), np.float32)
    store = type("Store", (), {"offset": lambda *_: 0})
    more = running._initialisers({"stolen": weight}, store)
    more = more.replace(b"weights.safetensors", b"../../../etc/passwd")
    with (folder / "0.packed.onnx").open("ab") as file:
        file.write(more)
    rehash(folder, "0.packed.onnx")


def junk_graph(folder):
    (folder / "0.packed.onnx").write_bytes(b"\x08junk" * 99)
    rehash(folder, "0.packed.onnx")


def other_graph(folder):
    shutil.copy(folder / "2.packed.onnx", folder / "0.packed.onnx")
    rehash(folder, "0.packed.onnx")


def other_weights(folder):
    def edit(manifest):
        (name, (key, shape)), *_ = manifest["points"][0]["packed"].items()
        other = next(k for k, s in manifest["points"][2]["packed"].values() if k != key)
        manifest["points"][0]["packed"][name] = [other, shape]

    change(folder, edit)


VOUCHED = {
    "a shape too large": (place("0.logits", [10**9]), r"malformed: .*has no \[1000000000\]"),
    "a negative shape": (place("0.logits", [-1, -4]), "malformed: .*has no"),
    "a shape of text": (place("0.logits", ["4"]), "malformed"),
    "no such array": (place("unknown", [4]), "malformed: KeyError.*unknown"),
    "a point that is a number": (million_points, "malformed: TypeError"),
    "a header of 2^64 bytes": (
        foreign_header,
        "a header of 18446744073709551615 bytes; expected a",
    ),
    "a tensor in another file": (outside_tensor, r"0\.packed\.onnx: has a tensor outside"),
    "a graph that is none": (junk_graph, r"0\.packed\.onnx: cannot be run \(made for .*ONNX Runt"),
    "10^5 classes": (
        images_are(classes=["a"] * 10**5),
        r"manifest\.json: images\.classes: 100000 names; expected one for each of .*\(1, 10\)",
    ),
    "the graph of another point": (other_graph, r"0\.packed\.onnx: cannot be run"),
    "the weights of another": (other_weights, r"0\.packed\.onnx: is .* off what torch says"),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", VOUCHED)
def test_what_a_wrong_manifest_vouches_for_is_refused_too(folder, case):
    damage, message = VOUCHED[case]
    damage(folder)
    with pytest.raises(BundleError, match=message):
        Runner(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
)


@pytest.mark.faults
@given(st.fixed_dictionaries({}, optional={"mean": JSON, "std": JSON, "classes": JSON}) | JSON)
def test_whatever_is_said_of_images_is_refused_or_normalises(entry):
    read = json.loads(json.dumps({"images": entry}))
    try:
        images = running._images(read, Path("manifest.json"))
    except BundleError:
        return
    assert np.isfinite(PHOTOS * images.scale - images.shift).all()
    assert all(isinstance(name, str) for name in images.classes)


@pytest.mark.faults
@settings(max_examples=60)
@given(st.data())
def test_no_damaged_byte_is_served(whole, tmp_path_factory, data):
    """Any byte of any file changed or cut off: refused, or (in the manifest) of no consequence."""
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    raw = bytearray((whole / name).read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[at] ^= data.draw(st.integers(1, 255))
    else:
        del raw[at:]
    folder = tmp_path_factory.mktemp("damaged")
    for path in whole.iterdir():
        os.link(path, folder / path.name)
    (folder / name).unlink()
    (folder / name).write_bytes(raw)
    try:
        runner = Runner(folder)
    except BundleError:
        return
    assert name == "manifest.json"
    assert np.array_equal(runner(FRAMES), Runner(whole)(FRAMES))
    if runner.classes:  # else it no longer says anything of images
        assert np.isfinite(runner.normalise(PHOTOS)).all()


def test_modes_are_named(whole):
    with pytest.raises(BundleError, match="no mode 'fast'; there are packed, shared"):
        Runner(whole, mode="fast")


def test_the_runtime_extra_brings_no_training_package(tmp_path):
    """Resolved by pip itself from the package index, nothing installed."""
    report = tmp_path / "report.json"
    options = ["--dry-run", "--ignore-installed", "--no-build-isolation", "--quiet", "--report"]
    run = [sys.executable, "-m", "pip", "install", *options, str(report), f"{ROOT}[runtime]"]
    result = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=False)
    if "No matching distribution" in result.stderr or "Connection" in result.stderr:
        pytest.skip("the package index cannot be reached: what [runtime] brings is not known")
    assert result.returncode == 0, result.stderr
    found = {item["metadata"]["name"] for item in json.loads(report.read_text())["install"]}
    assert {"dynlib", "numpy", "onnxruntime"} <= found
    assert not found & {"torch", "torchvision", "timm", "optuna", "matplotlib", "seaborn"}
