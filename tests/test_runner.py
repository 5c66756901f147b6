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
from bundle_cases import POINTS, bundled, table
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.deploy import runner as running
from dynlib.deploy.bundle import export_bundle
from dynlib.deploy.runner import MODES, Runner
from dynlib.errors import BundleError, ConfigError, DataError

ROOT = Path(__file__).parents[1]
FRAMES = np.random.default_rng(0).normal(size=(3, 3, 16, 16)).astype(np.float32)
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
    return export_bundle(supernet, table(), tmp_path_factory.mktemp("bundles") / "bundle")


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
