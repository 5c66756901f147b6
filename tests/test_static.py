"""A static network through the trainer of the super-network, and through its checkpoint."""

from dataclasses import replace

import pytest
import torch

from dynlib.data import load_dataset
from dynlib.errors import CheckpointError
from dynlib.nets.supernet import Supernet, macs_m
from suite.studies import static


def narrow_airbench(config, classes):
    return static.Airbench(classes, widths=(24, 32, 32))


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as context:
        yield context


@pytest.fixture(scope="module", params=["resnet20", "airbench"])
def trained(request, tmp_path_factory, patch):
    kind = request.param
    if kind == "airbench":  # narrow, or a test takes a minute
        patch.setitem(static.BUILDERS, kind, narrow_airbench)
    images = load_dataset("generated", generated=(300, 100))
    path = tmp_path_factory.mktemp("static") / f"{kind}.safetensors"
    net = static.train_static(images, path, kind, rates=(0.1, 0.2), trial_epochs=1, epochs=2)
    yield images, path, net, kind
    patch.undo()  # the next tests look at the whole network


@pytest.mark.parametrize(("kind", "macs", "parameters"), [
    ("resnet20", 40.6, 0.27e6),  # He et al. 2015, section 4.2
    ("airbench", 118, 1.97e6),  # arXiv 2404.00498, section 3: widths 64, 256, 256
])  # fmt: skip
def test_it_is_the_published_network(kind, macs, parameters):
    net = Supernet(static.ONE, build=static.BUILDERS[kind])
    assert macs_m(net, static.ONE.largest) == pytest.approx(macs, rel=0.01)
    assert sum(p.numel() for p in net.net.parameters()) == pytest.approx(parameters, rel=0.01)


def test_what_is_loaded_answers_as_what_was_trained_and_a_broken_file_is_refused(
    trained, monkeypatch
):
    images, path, net, kind = trained
    monkeypatch.setattr(static, "static_path", lambda *names: path)
    loaded = static.load_static(images, kind)
    pixels = images.normalise(images.test.images)
    _, provenance = Supernet.from_checkpoint(path, build=static.BUILDERS[kind])
    assert provenance["recipe"]["epochs"] == 2
    assert provenance["minutes"] > 0
    answers = [one.prepare(static.ONE.largest)(pixels) for one in (net, loaded)]
    torch.testing.assert_close(*answers)
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(CheckpointError):
        static.load_static(images, kind)


def test_where_none_is_shipped_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(static, "static_path", lambda *names: tmp_path / "none.safetensors")
    assert static.load_static(load_dataset("generated", generated=(100, 20)), "resnet20") is None


def test_the_shipped_network_is_opened():
    """Its file holds the name of what builds it."""
    images = load_dataset("generated", generated=(100, 20))
    shipped = static.load_static(replace(images, name="cifar10"), "resnet20")
    assert macs_m(shipped, static.ONE.largest) == pytest.approx(40.6, rel=0.01)
