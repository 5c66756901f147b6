"""BatchNorm folded into convolutions: the same answers, and nothing folded that others need."""

import copy

import pytest
import torch
from torch import nn

from dynlib._vision import timm
from dynlib.data import load_dataset
from dynlib.nets.convert import elastify
from dynlib.nets.fold import fold_norms
from dynlib.nets.supernet import Supernet
from dynlib.training import Recipe, evaluate, train


def noisy(model):
    """`model`, in double precision, with statistics and scales that are far from the identity."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias, module.weight, module.running_var):
                values.data = torch.rand_like(values) + 0.5
    return model.double().eval()


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "options", "left"),
    [
        ("tf_efficientnet_lite0", {}, 0),
        ("resnet18", {"layers": (1, 1, 1, 1)}, 0),
        ("mobilenetv3_small_050", {}, 0),
        ("densenet121", {"block_config": (2, 2), "growth_rate": 8}, 6),  # behind concatenations
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 1}, 0),
    ],
)
def test_answers_stay_what_they_were(name, options, left):
    model = noisy(timm.create_model(name, num_classes=7, **options))
    images = torch.rand(2, 3, 32, 32).double()
    want = copy.deepcopy(model)(images)
    found = fold_norms(model)
    assert found is model
    assert len(norms(model)) == left
    assert torch.allclose(model(images), want, rtol=1e-9, atol=1e-12)


class Shared(nn.Module):
    """One convolution is read by two, one is used twice, one norm has no statistics."""

    def __init__(self):
        super().__init__()
        self.read = nn.Conv2d(3, 3, 1)
        self.twice = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 3, 1)
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.c = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        x = self.read(x)
        x = x + self.a(x)
        x = self.twice(self.b(self.twice(x)))
        return self.c(self.last(x))


def test_what_others_need_is_left():
    model = Shared().eval()
    before = copy.deepcopy(model.state_dict())
    assert norms(fold_norms(model)) == ["a", "b", "c"]
    after = model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_folded_super_network_needs_no_statistics(tmp_path):
    images = load_dataset("generated", generated=(100, 40))
    model = timm.create_model("tf_efficientnet_lite0", num_classes=len(images.classes)).eval()
    supernet = elastify(model, resolution=(32,), expand=(0.5, 1), fold=True)
    shown = images.normalise(images.test.images[:4])
    largest, smallest = supernet.space.largest, supernet.space.smallest
    assert torch.allclose(supernet.prepare(largest)(shown), model(shown), rtol=1e-3, atol=1e-4)
    train(supernet, images, Recipe.finetune(epochs=1, batch_size=40))
    assert not supernet.lacks_statistics(smallest)
    assert 0 <= evaluate(supernet, smallest, images, images.test) <= 100
    assert not supernet.statistics

    path = supernet.save(tmp_path / "net.safetensors")
    again, _ = Supernet.from_checkpoint(path)
    for config in (largest, smallest):
        assert torch.equal(again.prepare(config)(shown), supernet.prepare(config)(shown))
