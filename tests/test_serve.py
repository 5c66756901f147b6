"""The contract of every engine, and a server that never mixes two configurations."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import SPACE, calibrated
from torch import nn

from dynlib.errors import ConfigError, ModelError
from dynlib.nets.chain import resized
from dynlib.nets.engines import ENGINES, NetEngine, find_engine
from dynlib.nets.mobilenet import MobileNetV3, mobilenet_space
from dynlib.nets.serve import SubnetServer, storage_bytes
from dynlib.nets.supernet import Supernet, calibrate

POINTS = (SPACE.smallest, SPACE.largest)
TOLERANCE = {"fp32": 1e-5, "bf16": 5e-2, "int8": 0.15}  # of the largest logit
PAIRS = [(name, precision) for name, b in ENGINES.items() for precision in b.precisions]


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def supernet():
    return calibrated(POINTS)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def server(request, supernet, images):
    name, precision = request.param
    if not ENGINES[name].installed:
        pytest.skip(f"{ENGINES[name].package} is not installed")
    return SubnetServer(supernet, POINTS, backend=name, precision=precision, example=images)


def reference(supernet, config, images):
    with torch.inference_mode():
        return supernet.extract(config)(images)


def off(got, want):
    return float((got - want).abs().max() / want.abs().max())


def test_every_engine_computes_what_plain_torch_does(server, supernet, images):
    for config in (*POINTS, *POINTS):
        server.switch(config)
        assert server.subnet == str(config)
        for batch in (images[:1], images[:3], images.to(memory_format=torch.channels_last)):
            got = server(batch)
            assert got.dtype == torch.float32
            assert off(got, reference(supernet, config, batch)) <= TOLERANCE[server.precision]


def test_a_refused_switch_leaves_the_old_network_serving(server, images):
    server.switch(POINTS[1])
    before = server(images)
    with pytest.raises(ConfigError, match="not prepared"):
        server.switch(SPACE.ladder(3)[1])
    with pytest.raises(ModelError, match="calibrate"):
        server.prepare(SPACE.ladder(3)[1])
    assert server.subnet == str(POINTS[1])
    assert torch.equal(server(images), before)


def test_what_is_no_batch_of_normalised_images_is_refused(server, images):
    for wrong, told in (
        (images.byte(), r"Tensor torch\.uint8 \(8, 3, 16, 16\)"),
        (images.double(), r"Tensor torch\.float64"),
        (images.numpy(), r"ndarray float32 \(8, 3, 16, 16\)"),
        (images[0], r"Tensor torch\.float32 \(3, 16, 16\)"),
        (images.movedim(1, 3), r"Tensor torch\.float32 \(8, 16, 16, 3\)"),
        (images.tolist(), "list None"),
    ):
        with pytest.raises(ModelError, match=rf"{told}.*; expected .* float32 \(N, 3, H, W\)"):
            server(wrong)


def test_a_switch_in_flight_never_mixes_two_configurations(server, images):
    frame, outputs, enough = images[:1], [], threading.Event()
    wanted = []
    for config in POINTS:
        server.switch(config)
        wanted.append(server(frame))
    assert off(*wanted) > 1e-3

    def serve():
        while len(outputs) < 150 or {which(o) for o in outputs[-150:]} != {0, 1}:
            outputs.append(server(frame))
            if len(outputs) > 20_000:
                break
        enough.set()

    def which(output):
        return next((i for i, want in enumerate(wanted) if torch.equal(output, want)), None)

    thread = threading.Thread(target=serve)
    thread.start()
    switches = 0
    while not enough.wait(1e-4):
        server.switch(POINTS[switches % 2])
        switches += 1
    thread.join()
    assert switches > 2
    assert {which(output) for output in outputs} == {0, 1}


def test_two_threads_may_serve_at_once(server, images):
    server.switch(POINTS[0])
    want, wrong = server(images[:1]), []

    def serve():
        wrong.extend(i for i in range(50) if not torch.equal(server(images[:1]), want))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@settings(max_examples=10)
@given(st.sampled_from(list(SPACE)))
def test_a_prepared_network_leaves_the_weight_store_alone(supernet, images, config):
    """No engine changes a weight, nor the statistics, of the network it was given."""
    calibrate(supernet, config, [images])
    before = {k: v.clone() for k, v in supernet.net.state_dict().items()}
    stored = {k: v.clone() for k, v in supernet.statistics[config].items()}
    for name in ("torch", "torch-folded"):
        SubnetServer(supernet, [config], backend=name)(images)
    assert all(torch.equal(v, before[k]) for k, v in supernet.net.state_dict().items())
    assert all(torch.equal(v, stored[k]) for k, v in supernet.statistics[config].items())


def test_unknown_engines_precisions_and_missing_packages_are_refused_by_name(supernet):
    with pytest.raises(ModelError, match=r"no engine 'tensorrt'; there are torch, torch-fold"):
        SubnetServer(supernet, POINTS, backend="tensorrt")
    with pytest.raises(ModelError, match=r"onnxruntime has no precision 'fp8'; it has fp32, int"):
        SubnetServer(supernet, POINTS, backend="onnxruntime", precision="fp8")
    with pytest.raises(ModelError, match="calibrated on images"):
        SubnetServer(supernet, POINTS, backend="onnxruntime", precision="int8")
    gone = NetEngine("gone", ("fp32",), "no_such_package", find_engine("torch").build)
    with pytest.raises(ModelError, match="needs the package no_such_package"):
        gone.prepare(nn.Identity(), torch.zeros(1, 3, 4, 4))


def test_views_share_storage_and_folded_copies_do_not(supernet):
    prepared = [supernet.prepare(config) for config in POINTS]
    alone = storage_bytes(supernet.net)
    assert alone == 4 * sum(p.numel() for p in supernet.net.parameters())
    extra = storage_bytes(supernet.net, *prepared) - alone
    statistics = sum(v.nbytes for c in POINTS for v in supernet.statistics[c].values())
    assert statistics <= extra <= 1.2 * statistics  # counters of batches are the rest
    copies = [supernet.extract(config) for config in POINTS]
    assert storage_bytes(supernet.net, *copies) > 1.3 * alone


@pytest.mark.parametrize("name", [n for n in ENGINES if n != "torch"])
def test_squeeze_and_excitation_survives_the_engines(name, images):
    """The mean over pixels becomes a pooling operator in the exported graph."""
    if not ENGINES[name].installed:
        pytest.skip(f"{ENGINES[name].package} is not installed")
    torch.manual_seed(0)
    space = mobilenet_space(resolution=(32,), depth=(2,), kernel=(3,), expand=(3,))
    net = MobileNetV3(space.largest, 10).eval()
    pixels = resized(images, 32)
    run = ENGINES[name].prepare(net, pixels)
    with torch.inference_mode():
        assert off(run(pixels), net(pixels)) <= 1e-4


def test_once_for_all_and_we_agree():
    """Its own dynamic network and ours, with its weights: the same logits."""
    pytest.importorskip("ofa", reason="the peer is not installed (requirements-peers.txt)")
    peers = pytest.importorskip("suite.papers.once_for_all")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 64, 64, generator=generator)
    peer = peers.OnceForAll(pixels, generator)
    ours = Supernet(mobilenet_space(resolution=(64,)), 1000, family="MobileNetV3", transform=True)
    points = (ours.space.smallest, ours.space.sample(np.random.default_rng(0)))
    peers.adopt(ours, peer, points)
    with torch.inference_mode():
        for config in points:
            got = ours.prepare(config)(pixels)
            assert off(got, peer.switch(config)(pixels)) <= 1e-5
            assert off(got, peer.extract(config)(pixels)) <= 1e-5
