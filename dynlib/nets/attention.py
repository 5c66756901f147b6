"""Multi-head self-attention whose heads can be sliced: the first h heads are the first channels."""

from dataclasses import dataclass

from torch import nn
from torch.nn import functional as F

from dynlib.space import LayerSpec


class Attention(nn.Module):
    """(N, T, C) tokens -> (N, T, C): softmax(q k^T / sqrt(head_dim)) v per head, then projected.

    Queries, keys and values have a linear layer each: in a fused one the first rows would be
    queries alone. The number of heads is read off the weights, so fewer rows are fewer heads
    (DS-Net++, arXiv 2109.10060, slicing of attention).
    """

    def __init__(self, width: int, heads: int, head_dim: int, bias: bool = True):
        super().__init__()
        self.head_dim, self.dropout = head_dim, 0.0
        self.q, self.k, self.v = (nn.Linear(width, heads * head_dim, bias) for _ in range(3))
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()  # over the channels of one head
        self.proj, self.proj_drop = nn.Linear(heads * head_dim, width), nn.Identity()

    @classmethod
    def from_fused(cls, fused: nn.Module) -> "Attention":
        """timm's `Attention`, whose `qkv` is one linear layer, with the same weights."""
        width, bias = fused.qkv.in_features, fused.qkv.bias is not None
        attention = cls(width, fused.num_heads, fused.head_dim, bias).to(fused.qkv.weight)
        for name, values in fused.qkv.named_parameters():
            for part, rows in zip("qkv", values.detach().chunk(3), strict=True):
                setattr(attention.get_submodule(part), name, nn.Parameter(rows.clone()))
        attention.dropout = fused.attn_drop.p
        for name in ("q_norm", "k_norm", "proj", "proj_drop"):
            setattr(attention, name, getattr(fused, name))
        return attention

    def forward(self, x, **mask):
        """Shapes as in the class; `mask` goes to `scaled_dot_product_attention`."""
        q, k, v = (
            linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        dropout = self.dropout if self.training else 0.0
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **mask)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


@dataclass(frozen=True, slots=True)
class AttentionSpec(LayerSpec):
    """The two products of attention, q k^T and its product with v: work without weights.

    `in_channels` = `out_channels` = heads x head_dim, and `out_size` squared is the number of
    tokens T, as for the linear layers around it.
    """

    @property
    def params(self) -> int:
        """None: both factors are activations."""
        return 0

    @property
    def macs(self) -> float:
        """2 T^2 C."""
        return 2 * self.out_size**4 * self.in_channels * self.density
