"""What a run without data shows of a network: its operations and its layers."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import fx, nn

from dynlib.errors import ModelError
from dynlib.nets.attention import Attention, AttentionSpec
from dynlib.space import LayerSpec

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (*CONVOLUTIONS, *NORMS, nn.Linear, nn.LayerNorm, Attention)  # recorded as one operation
SEQUENCES = (nn.Sequential, nn.ModuleList)

Block = Callable[[torch.Tensor], torch.Tensor]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, LAYERS) or _timm().is_notrace_module(type(module)):
            return True
        return super().is_leaf_module(module, name)


def graph_of(net: nn.Module) -> fx.GraphModule:
    """The operations of `net` from images to answer, in order; layers and attentions are one each.

    Raises `ModelError` where torch.fx cannot record it, because its course depends on the images.
    """
    opaque = _timm().get_notrace_functions()
    tracer = _Tracer(autowrap_functions=tuple(opaque))
    # Wrapped, so that further arguments of its forward keep their defaults, and its hooks run.
    root = nn.Sequential(net)
    try:
        return fx.GraphModule(root, tracer.trace(root))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ModelError(f"{type(net).__name__} cannot be read: {error}") from error


def _timm():
    from dynlib._vision import timm  # takes seconds, and only foreign networks need it

    return timm.layers


def module_paths(node: fx.Node) -> list[str]:
    """Paths in the network of the modules that a node of its graph lies in, outermost first."""
    stack = node.meta.get("nn_module_stack", {})
    paths = [without_root(path) for path, _ in stack.values()]
    return paths or [""]


def without_root(path: str) -> str:
    """`path` without the wrapper that `graph_of` puts around a network."""
    return path.partition(".")[2]


def layers_of(
    net: nn.Module, resolution: int, blocks: Mapping[str, Block] | None = None
) -> dict[str, list[LayerSpec]]:
    """Convolutions, linear layers and attentions of each block of `net`, in order of execution.

    Tokens count as the pixels of a square map; where they fill none (a class token comes on top of
    the patches) it is the nearest square, and `density` says how much more or less than it the work
    is.

    Args:
        net: lies on the meta device, is used up and takes (1, 3, resolution, resolution).
        blocks: run one after the other, they are `net`; by default it is one of no name.
    """
    specs: list[LayerSpec] = []
    for module in net.eval().modules():
        if isinstance(module, nn.Conv2d | nn.Linear | Attention):
            module.register_forward_hook(lambda *run: specs.append(_spec(*run)))
    found = {}
    x = torch.empty(1, 3, resolution, resolution, device="meta")
    with torch.no_grad():
        for name, block in (blocks or {"": net}).items():
            known = len(specs)
            x = block(x)
            found[name] = specs[known:]
    return found


def _spec(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> LayerSpec:
    if isinstance(module, nn.Conv2d):
        return LayerSpec(
            op="conv",
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel=module.kernel_size[0],
            stride=module.stride[0],
            groups=module.groups,
            in_size=inputs[0].shape[-1],
            out_size=output.shape[-1],
        )
    tokens = output.shape[:-1].numel()
    side = round(math.sqrt(tokens))
    if isinstance(module, Attention):
        rows = module.q.out_features
        return AttentionSpec(
            op="attention",
            in_channels=rows,
            out_channels=rows,
            groups=rows // module.head_dim,
            in_size=side,
            out_size=side,
            density=tokens**2 / side**4,  # its work grows with the tokens squared
        )
    return LayerSpec(
        op="linear",
        in_channels=module.in_features,
        out_channels=module.out_features,
        in_size=side,
        out_size=side,
        density=tokens / side**2,
    )
