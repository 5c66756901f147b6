"""Exits: positions and layers in any family, training that repeats, answers."""

import numpy as np
import pytest
import torch

from dynlib._vision import timm
from dynlib.decide.exits import block_features, exit_answers, exit_layers, train_exits
from dynlib.errors import ModelError
from dynlib.nets.convert import elastify
from dynlib.nets.mobilenet import mobilenet_space
from dynlib.nets.supernet import Supernet, calibrate
from dynlib.space import SearchSpace


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    supernet = Supernet(SearchSpace((32,), ((1,), (1, 2), (2,)), ((8,), (8, 16), (16,))), 10)
    config = supernet.space.largest
    calibrate(supernet, config, [torch.randn(64, 3, 32, 32)])
    return supernet, config, supernet.prepare(config)


def test_positions_lie_behind_every_block_and_cover_all_layers(backbone):
    supernet, config, net = backbone
    images = torch.randn(5, 3, 32, 32)
    features, logits = block_features(net, images)
    segments, heads = exit_layers(supernet, config)
    assert len(features) + 1 == len(segments) == len(heads) == 8
    assert torch.equal(logits, net(images))
    assert [layer for part in segments for layer in part] + heads[-1] == supernet.layers(config)
    assert [f.shape[1] for f in features] == [head[0].in_channels for head in heads[:-1]]


def test_exits_learn_repeat_and_leave_backbone_and_generator_alone(backbone):
    _, _, net = backbone
    labels = torch.arange(200) % 10
    images = torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.3
    images += labels[:, None, None, None] / 5
    before = {k: v.clone() for k, v in net.state_dict().items()}
    features, _ = block_features(net, images)
    logits = 5 * torch.nn.functional.one_hot(labels, 10).float()
    state = torch.get_rng_state()
    one, two = (
        train_exits(features, logits, labels, seed=3, epochs=25, batch_size=50) for _ in range(2)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    right, sure = exit_answers(one, features, logits, labels)
    assert np.array_equal(sure, exit_answers(two, features, logits, labels)[1])
    assert right.shape == sure.shape == (200, len(features) + 1)
    assert right[:, -1].all()
    assert right[:, :-1].mean() > 0.3  # chance is 0.1


def test_a_network_without_blocks_has_no_exits():
    with pytest.raises(ModelError, match="Linear cannot be cut"):
        block_features(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    supernet = Supernet(SearchSpace((12,), ((0,),), ((8,),)), 10)  # a reduction and the head
    for asked in (None, [], ["stages.0"], ["nowhere"]):
        with pytest.raises(ModelError, match=r"expected some of \['stem'\]"):
            exit_layers(supernet, supernet.space.largest, asked)
        with pytest.raises(ModelError, match=r"expected some of \['stem'\]"):
            block_features(supernet.net, torch.zeros(1, 3, 12, 12), asked)


def vit():
    space = SearchSpace((32,), ((3,),), ((32, 48),), (), ((64,),) * 3, ((1, 2),) * 3)
    return Supernet(space, 10, family="ViT")


def mobilenet():
    return Supernet(mobilenet_space((25,), (32,), (1, 2)), 10, family="MobileNetV3")


def timm_resnet():
    return elastify(timm.create_model("resnet18", num_classes=10), resolution=(32,))


def timm_vit():
    options = {"img_size": 32, "patch_size": 8, "depth": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **options)
    return elastify(model, resolution=(32,))


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "behind"),
    [
        (vit, None),
        (vit, ["stem", "blocks.0"]),
        (mobilenet, None),
        (mobilenet, ["stages.2.0", "stages.4.0"]),
        (timm_resnet, None),
        (timm_resnet, ["layer1.0", "layer3.0"]),
        (timm_vit, ["blocks.0"]),
    ],
)
def test_any_family_has_exits_behind_chosen_blocks(make, behind):
    supernet = make()
    images = torch.randn(4, 3, 32, 32)
    for config in (supernet.space.smallest, supernet.space.largest):
        calibrate(supernet, config, [images])
        net = supernet.prepare(config)
        names = list(supernet.blocks(config))
        if behind is not None and not set(behind) <= set(names[:-2]):
            continue  # the last block of the shallowest
        features, logits = block_features(net, images, behind)
        segments, heads = exit_layers(supernet, config, behind)
        assert torch.equal(logits, net(images))
        count = len(names) - 3 if behind is None else len(behind)
        assert len(features) + 1 == len(segments) == len(heads) == count + 1
        assert [layer for part in segments for layer in part] + heads[-1] == supernet.layers(config)
        assert [f.shape[1] for f in features] == [head[0].in_channels for head in heads[:-1]]


def test_features_are_means_over_quarters_of_the_image():
    torch.manual_seed(0)
    supernet = Supernet(SearchSpace((33,), ((1,),), ((8,),)), 10)
    calibrate(supernet, supernet.space.largest, [torch.randn(8, 3, 33, 33)])
    net, images = supernet.prepare(supernet.space.largest), torch.randn(3, 3, 33, 33)
    (features,), _ = block_features(net, images)
    maps = net.stages[0].reduce(torch.relu(net.stem(images)))
    first, second = slice(0, 8), slice(8, 16)
    quarters = [(first, first), (first, second), (second, first), (second, second)]
    means = [maps[:, :, rows, columns].mean((2, 3)) for rows, columns in quarters]
    torch.testing.assert_close(features, torch.stack(means, 2).flatten(1))
