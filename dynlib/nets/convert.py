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
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from dynlib.errors import ConfigError, ModelError
from dynlib.nets.attention import Attention
from dynlib.nets.chain import chain, resized
from dynlib.nets.coupling import Axis, Group, Structure, copy_structure, set_shapes
from dynlib.nets.families import BlockLayers, Family, register
from dynlib.nets.mobilenet import make_divisible
from dynlib.nets.supernet import MOMENTS, Supernet
from dynlib.nets.trace import NORMS, SEQUENCES, layers_of
from dynlib.space import SearchSpace, SubnetConfig

FAMILY = "timm"
CHANNEL_KINDS = ("width", "expand", "heads")
READING = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
    "scriptable",
    "exportable",
}
# Of a model that a file asks for: a number among its arguments, and that of its parameters.
LARGEST_NUMBER, LARGEST_MODEL = 4096, 2**31

fx.wrap("resized")  # one operation of a recorded network


def elastify(
    model: nn.Module,
    *,
    resolution: Sequence[int] = (),
    width: Sequence[float] = (0.5, 0.75, 1.0),
    expand: Sequence[float] = (0.5, 0.75, 1.0),
    heads: Sequence[float] = (0.5, 0.75, 1.0),
    depth: int | None = 1,
    divisor: int = 8,
    modules: Sequence[str] = (),
    created: Mapping[str, Any] | None = None,
) -> Supernet:
    """A super-network of the smaller versions of `model`, which itself stays as it is.

    At full size it computes what `model` computes. Within each group the channels are sorted by
    importance, so that a prefix holds the best ones. Residual blocks go from the end of a stage
    (a sequence of modules); heads go with their slices of separate query, key and value layers.

    Where timm makes such a model from its name, a checkpoint names it and what is elastic, so that
    `Supernet.from_checkpoint` needs nothing else.

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
        created: the arguments of `timm.create_model`, ``{"model_name": ..., ...}``, where there
            were more than the model's name, its number of classes and its image size.

    Raises:
        ModelError: the model cannot be read, a layer of `modules` cannot be elastic, or `created`
            makes another model.

    >>> from dynlib._vision import timm
    >>> supernet = elastify(timm.create_model("resnet18", num_classes=10))
    >>> supernet.space.size, str(supernet.space.largest)
    (8503056, 'r224-...')
    """
    arguments = _arguments_of(model) if created is None else dict(created)
    model = _with_elastic_parts(copy.deepcopy(model))
    if not _makes(arguments, model):
        if created is not None:
            raise ModelError(f"created: timm makes another model of {arguments}")
        arguments = {}
    sizes = sorted(resolution or [_own_resolution(model)])
    structure = Structure(model, sizes[-1])
    shares = {"width": width, "expand": expand, "heads": heads}
    choices = {}
    for group in structure.groups(modules):
        allowed = _choices(group, shares[group.kind], divisor)
        if len(allowed) > 1:
            choices[group] = allowed
        elif modules:
            names = ", ".join(modules)
            raise ModelError(f"{names}: no share of {group.size} channels is smaller")
    stages = {} if depth is None else structure.stages(depth)
    dimensions = {k: tuple(v for group, v in choices.items() if group.kind == k) for k in shares}
    space = SearchSpace(tuple(sizes), tuple(stages.values()), **dimensions)

    build = _ElasticModel(model, list(choices), list(stages), arguments)
    supernet = Supernet(space, structure.outputs, build=build)
    weights = _sorted_weights(model, choices)
    with torch.no_grad():
        for name, parameter in supernet.net.named_parameters():
            parameter.copy_(weights[name])
    statistics = {name: v for name, v in weights.items() if name.endswith(MOMENTS)}
    for size in sizes:
        try:
            supernet.layers(replace(space.smallest, resolution=size))
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


def _sorted_weights(model: nn.Module, groups: Iterable[Group]) -> dict[str, torch.Tensor]:
    """The state of `model`, the most important channels of each group first."""
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    for group in groups:
        order = _by_importance(group, weights)
        for name, axis in group.axes:
            weights[name] = weights[name].index_select(axis, order.to(weights[name].device))
    return weights


def _by_importance(group: Group, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Indices that put the most important channels of `group` first, shape (size,).

    The importance of a channel is the L2 norm of its slice of a weight relative to the mean norm in
    that weight, summed over the weights of the group; that of a head is the sum of its channels'.
    """
    score = torch.zeros(group.size, dtype=torch.float64)
    for name, axis in group.axes:
        weight = weights[name]
        if weight.ndim > 1:
            norms = weight.double().movedim(axis, 0).flatten(1).norm(dim=1).cpu()
            score += norms / norms.mean().clamp_min(1e-30)
    heads = score.unflatten(0, (-1, group.unit)).sum(1)
    order = heads.argsort(descending=True, stable=True)
    within = torch.arange(group.unit)
    return (order[:, None] * group.unit + within).flatten()


class _ElasticModel:
    """Builds and describes the static networks of one model.

    Args:
        model: has elastic parts (`_with_elastic_parts`); its weights are not used.
        groups: the channels that can shrink, in the order of the space's dimensions.
        stages: names of the sequences that can lose their last blocks.
        created: what `timm.create_model` makes the model of; empty if nobody knows.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        stages: Sequence[str],
        created: Mapping[str, Any],
    ):
        self.groups, self.stages = groups, stages
        # What a checkpoint says of it: the registered family and its options, or a mere name.
        self.__qualname__ = FAMILY if created else f"elastic {type(model).__name__}"
        self.options = _options(created, groups, stages) if created else {}
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.template = copy.deepcopy(model).train()
        with torch.device("meta"):
            set_shapes(self.template, self.shapes)
        self.describe = functools.cache(self._describe)

    def __call__(self, config: SubnetConfig, classes: int) -> nn.Module:
        """The static network of `config`, its weights not initialised."""
        sizes = self._sizes(config)
        net = copy_structure(self.template)
        # From the last one on, as a stage may lie in another.
        for stage, blocks in reversed(list(zip(self.stages, config.depth, strict=True))):
            del net.get_submodule(stage)[blocks:]
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

    def _sizes(self, config: SubnetConfig) -> dict[Axis, int]:
        """The channels on each elastic axis; raises `ConfigError` for a configuration of others."""
        kinds = Counter(group.kind for group in self.groups)
        places = {"depth": len(self.stages)} | {kind: kinds[kind] for kind in CHANNEL_KINDS}
        if any(len(getattr(config, kind)) != count for kind, count in places.items()):
            raise ConfigError(f"{config}: expected as many entries as {places}")
        entries = {kind: iter(getattr(config, kind)) for kind in CHANNEL_KINDS}
        sizes: dict[Axis, int] = {}
        for group in self.groups:
            sizes |= dict.fromkeys(group.axes, next(entries[group.kind]) * group.unit)
        return sizes

    def _describe(self, config: SubnetConfig, classes: int) -> BlockLayers:
        net = self(config, classes).to("meta", torch.float32)
        try:
            blocks = chain(net).blocks
        except ModelError:  # one that cannot be cut is one block
            blocks = {self.__qualname__: net}
        return layers_of(net, config.resolution, blocks)


# -- from a checkpoint ----------------------------------------------------------------------------


def _options(
    created: Mapping[str, Any], groups: Sequence[Group], stages: Sequence[str]
) -> dict[str, Any]:
    """What a checkpoint says of an elastified model, as JSON gives it back."""
    elastic = [[group.kind, group.unit, group.axes] for group in groups]
    options = {"created": dict(created), "groups": elastic, "stages": list(stages)}
    return json.loads(json.dumps(options))


@register(FAMILY)
def _family(created: Mapping[str, Any], groups: list, stages: list[str]) -> Family:
    """The family of the options in a checkpoint; raises `ConfigError` if they are malformed."""
    try:
        model = _with_elastic_parts(_created(created))
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        found = [_group(shapes, *group) for group in groups]
        if not all(isinstance(model.get_submodule(stage), SEQUENCES) for stage in stages):
            raise ConfigError(f"{stages}: not all are sequences of blocks")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ModelError) as error:
        raise ConfigError(f"no elastic model of {created}: {error!r}") from error
    build = _ElasticModel(model, found, stages, created)
    return Family(build, build.describe)


def _group(shapes: Mapping[str, Sequence[int]], kind: str, unit: int, axes: list) -> Group:
    axes = tuple((name, axis) for name, axis in axes)
    sizes = {shapes[name][axis] for name, axis in axes}
    if kind not in CHANNEL_KINDS or len(sizes) != 1 or unit < 1 or sizes.pop() % unit:
        raise ConfigError(f"{kind} of {axes}: no group of channels in heads of {unit}")
    return Group(kind, axes, shapes[axes[0][0]][axes[0][1]], unit)


def _created(arguments: Mapping[str, Any]) -> nn.Module:
    """timm's model of these arguments; its weights hold no values, its constants do.

    Raises:
        ModelError: it is none of timm's own, would read files or the network, or is too large.
    """
    from dynlib._vision import timm  # takes seconds to import

    name = str(arguments.get("model_name"))
    if not timm.is_model(name):  # which may be on a hub, or in a folder
        raise ModelError(f"timm has no model {name!r}")
    if forbidden := READING & set(arguments):
        raise ModelError(f"{name} is made without {sorted(forbidden)}")
    if not _is_plain(arguments):
        raise ModelError(f"{name}: arguments are texts, lists and numbers up to {LARGEST_NUMBER}")
    try:
        with torch.device("meta"):
            model = timm.create_model(**arguments)
        if sum(p.numel() for p in model.parameters()) > LARGEST_MODEL:
            raise ModelError(f"{name} would have more than {LARGEST_MODEL} parameters")
        norms = [module for module in model.modules() if isinstance(module, NORMS)]
        if len(list(model.buffers())) > sum(len(list(norm.buffers())) for norm in norms):
            model = timm.create_model(**arguments)  # it has constants, which need their values
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"timm cannot make {arguments}: {error}") from error
    return model.eval()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_plain(list(value.values()))
    if isinstance(value, list | tuple):
        return len(value) < LARGEST_NUMBER and all(map(_is_plain, value))
    if isinstance(value, int | float):
        return abs(value) <= LARGEST_NUMBER
    return value is None or isinstance(value, str)


def _arguments_of(model: nn.Module) -> dict[str, Any]:
    """What `timm.create_model` was given, as far as the model tells; empty for any other model."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        return {}
    arguments = {"model_name": name, "num_classes": model.num_classes}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return arguments | ({"img_size": size} if size else {})


def _makes(arguments: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether timm makes a model of these arguments that computes as `model` does."""
    try:
        other = _with_elastic_parts(_created(arguments))
    except (ModelError, TypeError, ValueError):
        return False
    shapes, own = ({k: v.shape for k, v in m.state_dict().items()} for m in (other, model))
    return shapes == own and repr(other) == repr(model)


# -- the model ------------------------------------------------------------------------------------


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
