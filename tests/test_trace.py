"""The layers recorded from a run are those of the network, in order, with whole sizes."""

import torch
from torch import nn

from dynlib.nets.attention import Attention
from dynlib.nets.trace import layers_of
from dynlib.space import LayerSpec


class Tokens(nn.Module):
    """A patch embedding, a class token, an attention and a classifier of that token."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention, self.head = Attention(8, 2, 4), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.cat([self.token, self.patches(x).flatten(2).transpose(1, 2)], 1)
        return self.head(self.attention(x)[:, 0])


def test_a_class_token_is_work_but_no_pixel():
    with torch.device("meta"):
        conv, *qkv, proj, attention, head = layers_of(Tokens(), 16)[""]
    assert conv == LayerSpec("conv", 3, 8, 4, 4, 1, 16, 4)
    assert head == LayerSpec("linear", 8, 5)
    for linear in (*qkv, proj):  # 16 patches and the token
        assert (linear.in_size, linear.out_size, linear.macs) == (4, 4, 17 * 64)
        assert type(linear.in_size) is int
    assert (attention.op, attention.params, attention.macs) == ("attention", 0, 2 * 17**2 * 8)
