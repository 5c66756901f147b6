"""BatchNorm folded into the convolutions before it."""

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dynlib.nets.trace import CONVOLUTIONS, NORMS, graph_of, without_root


def fold_norms(model: nn.Module) -> nn.Module:
    """Fold each BatchNorm into the convolution before it, in place; its activation stays.

    With the statistics that it has, a BatchNorm scales and shifts each channel, which the weights
    and the bias of the convolution can do as well: in eval mode the answers stay what they were. A
    convolution that others read too, or that is used twice, keeps its BatchNorm. Raises
    `ModelError` where torch.fx cannot record the model.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    >>> fold_norms(net)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )
    """
    for node in graph_of(model).graph.nodes:
        norm = _used_once(model, node)
        if not isinstance(norm, NORMS) or norm.running_mean is None:
            continue
        (before,) = node.all_input_nodes
        conv = _used_once(model, before)
        if not isinstance(conv, CONVOLUTIONS) or len(before.users) > 1:
            continue
        moments = norm.running_mean, norm.running_var
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, *moments, norm.eps, norm.weight, norm.bias
        )
        rest = getattr(norm, "act", nn.Identity())  # timm's BatchNorm has the activation in it
        model.set_submodule(without_root(node.target), rest)
    return model


def _used_once(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that this operation alone calls; None if it calls none, or one of others too."""
    if node.op != "call_module":
        return None
    calls = [other for other in node.graph.nodes if other.target == node.target]
    return model.get_submodule(without_root(node.target)) if len(calls) == 1 else None
