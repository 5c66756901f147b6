"""A static network through the trainer of the super-network, and through its checkpoint."""

import pytest
import torch

from dynlib.data import load_dataset
from dynlib.errors import CheckpointError
from dynlib.nets.supernet import Supernet, macs_m
from suite.studies import static


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    images = load_dataset("generated", generated=(300, 100))
    path = tmp_path_factory.mktemp("static") / "resnet20.safetensors"
    net = static.train_resnet20(images, path, rates=(0.1, 0.2), trial_epochs=1, epochs=2)
    return images, path, net


def test_it_is_the_published_network(trained):
    """He et al. 2015, section 4.2: 0.27 million parameters."""
    _, path, _ = trained
    net, provenance = Supernet.from_checkpoint(path, build=static.fixed_resnet20)
    assert macs_m(net, static.ONE.largest) == pytest.approx(40.6, abs=0.1)
    assert sum(p.numel() for p in net.net.parameters()) == pytest.approx(0.27e6, rel=0.01)
    assert provenance["recipe"]["epochs"] == 2
    assert provenance["minutes"] > 0


def test_what_is_loaded_answers_as_what_was_trained_and_a_broken_file_is_refused(
    trained, monkeypatch
):
    images, path, net = trained
    monkeypatch.setattr(static, "static_path", lambda name: path)
    loaded = static.load_resnet20(images)
    pixels = images.normalise(images.test.images)
    answers = [one.prepare(static.ONE.largest)(pixels) for one in (net, loaded)]
    torch.testing.assert_close(*answers)
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(CheckpointError):
        static.load_resnet20(images)


def test_where_none_is_shipped_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(static, "static_path", lambda name: tmp_path / "none.safetensors")
    assert static.load_resnet20(load_dataset("generated", generated=(100, 20))) is None
