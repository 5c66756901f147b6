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
        self.head_dim = head_dim
        self.dropout = 0.0
        rows = heads * head_dim
        self.q = nn.Linear(width, rows, bias)
        self.k = nn.Linear(width, rows, bias)
        self.v = nn.Linear(width, rows, bias)
        self.q_norm = nn.Identity()  # over the channels of one head
        self.k_norm = nn.Identity()
        self.proj = nn.Linear(rows, width)
        self.proj_drop = nn.Identity()

    @classmethod
    def from_fused(cls, fused: nn.Module) -> "Attention":
        """timm's `Attention`, whose `qkv` is one linear layer, with the same weights."""
        qkv = fused.qkv
        has_bias = qkv.bias is not None
        attention = cls(qkv.in_features, fused.num_heads, fused.head_dim, has_bias)
        attention.to(qkv.weight)
        for name, values in qkv.named_parameters():
            thirds = values.detach().chunk(3)
            layers = (attention.q, attention.k, attention.v)
            for layer, rows in zip(layers, thirds, strict=True):
                own = nn.Parameter(rows.clone())
                setattr(layer, name, own)
        attention.dropout = fused.attn_drop.p
        attention.q_norm = fused.q_norm
        attention.k_norm = fused.k_norm
        attention.proj = fused.proj
        attention.proj_drop = fused.proj_drop
        return attention

    def forward(self, x, **mask):
        """Shapes as in the class; `mask` goes to `scaled_dot_product_attention`."""
        q = self._heads(self.q(x))
        k = self._heads(self.k(x))
        v = self._heads(self.v(x))
        q = self.q_norm(q)
        k = self.k_norm(k)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **mask)
        x = x.transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))

    def _heads(self, rows):
        """(N, T, heads x head_dim) -> (N, heads, T, head_dim)."""
        heads = rows.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)


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
