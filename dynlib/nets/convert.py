"""Make a super-network of a timm model, starting from the weights it has.

    from dynlib._vision import timm
    from dynlib.nets.convert import elastify
    from dynlib.nets.supernet import calibrate

    supernet = elastify(timm.create_model("resnet18", pretrained=True))
    small = supernet.space.smallest
    calibrate(supernet, small, batches)   # BatchNorm statistics; the full size keeps the model's
    net = supernet.prepare(small)         # views of the one weight store

Which channels belong together is read off the model (`coupling`); within each group they are sorted
by importance, as in Once-for-All (arXiv 1908.09791, section 3.3), so that a prefix holds the best.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import fx, nn

from dynlib.errors import ModelError
from dynlib.nets.attention import Attention
from dynlib.nets.chain import chain, resized
from dynlib.nets.coupling import Axis, Group, Structure, copy_structure, set_shapes
from dynlib.nets.families import BlockLayers
from dynlib.nets.mobilenet import make_divisible
from dynlib.nets.supernet import Supernet
from dynlib.nets.trace import NORMS, layers_of
from dynlib.space import SearchSpace, SubnetConfig

fx.wrap("resized")  # one operation of a recorded network


def elastify(
    model: nn.Module, *,
    resolution: Sequence[int] = (),
    width: Sequence[float] = (0.5, 0.75, 1.0),
    expand: Sequence[float] = (0.5, 0.75, 1.0),
    heads: Sequence[float] = (0.5, 0.75, 1.0),
    depth: int | None = 1,
    divisor: int = 8,
    modules: Sequence[str] = (),
) -> Supernet:  # fmt: skip
    """A super-network of the smaller versions of `model`, which itself stays as it is.

    At full size it computes what `model` computes. Within each group the channels are sorted by
    importance, so that a prefix holds the best ones. Residual blocks go from the end of a stage
    (a sequence of modules); heads go with their slices of separate query, key and value layers.

    Args:
        model: a timm model for RGB images; its weights are copied.
        resolution: image sizes in pixels; by default the one the model was made for.
        width: shares of the channels that pass between blocks; the full size is always there.
        expand: shares of the channels inside a block (bottleneck, MLP, squeeze).
        heads: shares of the heads of each attention.
        depth: blocks that a stage keeps at least; None keeps all.
        divisor: numbers of channels are rounded to its multiples.
        modules: names or patterns (`layer1.*`) of the layers whose outputs shall be elastic; by
            default all that can be. What is not elastic stays fixed.

    Raises:
        ModelError: the model cannot be read, or a layer of `modules` cannot be elastic.
    """
    model = _with_elastic_parts(copy.deepcopy(model))
    sizes = sorted(resolution or [_own_resolution(model)])
    structure = Structure(model, sizes[-1])
    shares = {"width": width, "expand": expand, "heads": heads}
    choices = {}
    for group in structure.groups(modules):
        choices[group] = _choices(group, shares[group.kind], divisor)
        if modules and len(choices[group]) == 1:
            names = ", ".join(modules)
            raise ModelError(f"{names}: no share of {group.size} channels is smaller")
    groups = [group for group, sizes_ in choices.items() if len(sizes_) > 1]
    stages = {} if depth is None else structure.stages(depth)
    dimensions = {k: tuple(choices[g] for g in groups if g.kind == k) for k in shares}
    space = SearchSpace(tuple(sizes), tuple(stages.values()), **dimensions)

    weights = {name: value.detach() for name, value in model.state_dict().items()}
    for group in groups:
        order = _by_importance(group, weights)
        for name, axis in group.axes:
            weights[name] = weights[name].index_select(axis, order.to(weights[name].device))
    family = _Family(model, groups, list(stages))
    classes = structure.outputs
    supernet = Supernet(space, classes, build=family)
    with torch.no_grad():
        for name, parameter in supernet.net.named_parameters():
            parameter.copy_(weights[name])
    statistics = {k: v for k, v in weights.items() if k.endswith(("running_mean", "running_var"))}
    for size in sizes:
        try:
            family.describe(replace(space.smallest, resolution=size), classes)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"the model cannot run at {size} px: {error}") from error
        supernet.statistics[replace(space.largest, resolution=size)] = statistics
    return supernet


def _choices(group: Group, shares: Sequence[float], divisor: int) -> tuple[int, ...]:
    """Sizes (of heads: their number) for these shares, ascending, the full size included."""
    if not all(0 < share <= 1 for share in shares):
        raise ModelError(f"{group.kind}: {shares}; expected shares above 0 and up to 1")
    full = group.size // group.unit
    if group.kind == "heads":
        sizes = {max(1, round(share * full)) for share in shares}
    else:
        sizes = {make_divisible(share * full, divisor) for share in shares}
    return (*sorted(size for size in sizes if size < full), full)


def _by_importance(group: Group, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Indices that put the most important channels of `group` first, shape (size,).

    The importance of a channel is the L2 norm of its slice of a weight relative to the mean norm in
    that weight, summed over the weights of the group.
    """
    score = torch.zeros(group.size, dtype=torch.float64)
    for name, axis in group.axes:
        if weights[name].ndim > 1:
            norms = weights[name].double().movedim(axis, 0).flatten(1).norm(dim=1).cpu()
            score += norms / norms.mean().clamp_min(1e-30)
    units = score.unflatten(0, (-1, group.unit)).sum(1).argsort(descending=True, stable=True)
    return (units[:, None] * group.unit + torch.arange(group.unit)).flatten()


class _Family:
    """Builds and describes the static networks of one model."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], stages: Sequence[str]):
        self.groups, self.stages = groups, stages
        self.__qualname__ = f"elastic {type(model).__name__}"  # what a checkpoint calls it
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.template = copy.deepcopy(model).train()
        with torch.device("meta"):
            set_shapes(self.template, self.shapes)
        self.describe = functools.cache(self._describe)

    def __call__(self, config: SubnetConfig, classes: int) -> nn.Module:
        """The static network of `config`, its weights not initialised."""
        net = copy_structure(self.template)
        for stage, blocks in reversed(list(zip(self.stages, config.depth, strict=True))):
            del net.get_submodule(stage)[blocks:]
        places = {kind: iter(getattr(config, kind)) for kind in ("width", "expand", "heads")}
        sizes: dict[Axis, int] = {}
        for group in self.groups:
            sizes |= dict.fromkeys(group.axes, next(places[group.kind]) * group.unit)
        shapes = {
            name: tuple(sizes.get((name, axis), n) for axis, n in enumerate(self.shapes[name]))
            for name in net.state_dict()
        }
        set_shapes(net, shapes)
        for module in net.modules():
            if isinstance(module, NORMS):
                module.reset_running_stats()
        net.config = config
        net.register_forward_pre_hook(functools.partial(_resize_images, config.resolution))
        return net

    def _describe(self, config: SubnetConfig, classes: int) -> BlockLayers:
        """Layers in order of execution, from the shapes of a run without weights."""
        net = self(config, classes).to("meta", torch.float32)
        try:
            blocks = chain(net).blocks
        except ModelError:  # one that cannot be cut is one block
            blocks = {self.__qualname__: net}
        return layers_of(net, config.resolution, blocks)


def _resize_images(size: int, module: nn.Module, args: tuple[torch.Tensor, ...]):
    """A forward hook: images of another size are resized first."""
    images, *rest = args
    return resized(images, size), *rest


def _with_elastic_parts(model: nn.Module) -> nn.Module:
    """Separate the heads of fused attention; constants are no part of the state, in place."""
    from dynlib._vision import timm  # takes seconds to import

    for name, module in list(model.named_modules()):
        plain = isinstance(module, timm.layers.Attention) and module.gate is None
        if plain and isinstance(module.norm, nn.Identity):
            model.set_submodule(name, Attention.from_fused(module))
        elif not isinstance(module, NORMS):
            module._non_persistent_buffers_set |= dict(module.named_buffers(recurse=False)).keys()
    return model


def _own_resolution(model: nn.Module) -> int:
    for module in model.modules():
        if size := getattr(module, "img_size", None):
            return size[0]
    try:
        return model.pretrained_cfg["input_size"][-1]
    except (AttributeError, KeyError) as error:
        name = type(model).__name__
        raise ModelError(f"{name} does not say its image size; give resolution") from error
