"""An elastified timm model as a family: how its static networks are made, and read from a file.

A checkpoint holds the arguments of `timm.create_model`, the groups of channels that can shrink and
the stages that can be shorter. That is all it takes to make its networks again: neither the model's
own weights nor the search for the groups.
"""

import copy
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dynlib.errors import ConfigError, ModelError
from dynlib.nets.attention import Attention
from dynlib.nets.chain import chain, resized
from dynlib.nets.coupling import Axis, Group, copy_structure, set_shapes
from dynlib.nets.families import BlockLayers, Family, register
from dynlib.nets.fold import fold_norms
from dynlib.nets.trace import NORMS, SEQUENCES, layers_of
from dynlib.space import SubnetConfig

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
# Of a model that a file asks for, so that opening it takes bounded time and memory.
LARGEST_ARGUMENT = 4096
LARGEST_MODEL = 2**30  # parameters

fx.wrap("resized")  # one operation of a recorded network


class ElasticModel:
    """Builds and describes the static networks of one model.

    Args:
        model: has elastic parts (`with_elastic_parts`); its weights are not used.
        groups: the channels that can shrink, in the order of the space's dimensions.
        stages: names of the sequences that can lose their last blocks.
        created: what `timm.create_model` makes the model of; empty if nobody knows.
        fold: whether its BatchNorms were folded (`with_elastic_parts`).
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        stages: Sequence[str],
        created: Mapping[str, Any],
        fold: bool = False,
    ):
        self.groups = groups
        self.stages = stages
        # What a checkpoint says of it: the registered family and its options, or a mere name.
        self.__qualname__ = FAMILY if created else f"elastic {type(model).__name__}"
        self.options = _options(created, groups, stages, fold) if created else {}
        self.shapes = _shapes(model)
        template = copy.deepcopy(model)
        self.template = template.train()
        with torch.device("meta"):
            set_shapes(self.template, self.shapes)
        self.describe = functools.cache(self._describe)

    def __call__(self, config: SubnetConfig, classes: int) -> nn.Module:
        """The static network of `config`, its weights not initialised."""
        sizes = self._sizes(config)
        net = copy_structure(self.template)
        # From the last one on, as a stage may lie in another.
        depths = list(zip(self.stages, config.depth, strict=True))
        for stage, blocks in reversed(depths):
            sequence = net.get_submodule(stage)
            # By name: a slice that is deleted gives the rest other names.
            for name, _ in list(sequence.named_children())[blocks:]:
                delattr(sequence, name)
        shapes = {}
        for name in net.state_dict():
            full = enumerate(self.shapes[name])
            shapes[name] = tuple(sizes.get((name, axis), count) for axis, count in full)
        set_shapes(net, shapes)
        for module in net.modules():
            if isinstance(module, NORMS):
                module.reset_running_stats()
        net.config = config
        resize = functools.partial(_resize_images, config.resolution)
        net.register_forward_pre_hook(resize)
        return net

    def _sizes(self, config: SubnetConfig) -> dict[Axis, int]:
        """The channels on each elastic axis; raises `ConfigError` for a configuration of others."""
        kinds = Counter(group.kind for group in self.groups)
        kinds["depth"] = len(self.stages)
        for kind in ("depth", *CHANNEL_KINDS):
            entries = getattr(config, kind)
            count = kinds[kind]
            if len(entries) != count:
                raise ConfigError(f"{config}: expected {count} entries of {kind}")
        places = {kind: iter(getattr(config, kind)) for kind in CHANNEL_KINDS}
        sizes: dict[Axis, int] = {}
        for group in self.groups:
            entry = next(places[group.kind])
            size = entry * group.unit
            sizes |= dict.fromkeys(group.axes, size)
        return sizes

    def _describe(self, config: SubnetConfig, classes: int) -> BlockLayers:
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


def with_elastic_parts(model: nn.Module, fold: bool = False) -> nn.Module:
    """Separate the heads of fused attention, and `fold` BatchNorms (`fold_norms`); constants are
    no part of the state, in place."""
    from dynlib._vision import timm  # takes seconds to import

    if fold:
        fold_norms(model)
    for name, module in list(model.named_modules()):
        fused = isinstance(module, timm.layers.Attention)
        if fused and module.gate is None and isinstance(module.norm, nn.Identity):
            model.set_submodule(name, Attention.from_fused(module))
        elif not isinstance(module, NORMS):
            constants = dict(module.named_buffers(recurse=False))
            module._non_persistent_buffers_set |= constants.keys()
    return model


def _options(
    created: Mapping[str, Any], groups: Sequence[Group], stages: Sequence[str], fold: bool
) -> dict[str, Any]:
    """What a checkpoint says of an elastified model, as JSON gives it back."""
    elastic = [[group.kind, group.unit, group.axes] for group in groups]
    options = {"created": dict(created), "groups": elastic, "stages": list(stages)}
    if fold:
        options["fold"] = True
    return json.loads(json.dumps(options))


@register(FAMILY)
def _family(
    created: Mapping[str, Any], groups: list, stages: list[str], fold: bool = False
) -> Family:
    """The family of the options in a checkpoint; raises `ConfigError` if they are malformed."""
    try:
        model = with_elastic_parts(_created(created), fold)
        shapes = _shapes(model)
        found = [_group(shapes, *group) for group in groups]
        modules = map(model.get_submodule, stages)
        if not all(isinstance(module, SEQUENCES) for module in modules):
            raise ConfigError(f"{stages}: not all are sequences of blocks")
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ModelError) as error:
        raise ConfigError(f"no elastic model of {created}: {error!r}") from error
    build = ElasticModel(model, found, stages, created, fold)
    return Family(build, build.describe)


def _group(shapes: Mapping[str, Sequence[int]], kind: str, unit: int, axes: list) -> Group:
    pairs = tuple((name, axis) for name, axis in axes)
    sizes = {shapes[name][axis] for name, axis in pairs}
    size, *others = sizes
    if kind not in CHANNEL_KINDS or others or unit < 1 or size % unit:
        raise ConfigError(f"{kind} of {pairs}: no group of channels in heads of {unit}")
    return Group(kind, pairs, size, unit)


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
    if not _is_plain(arguments | {"num_classes": 0}):
        raise ModelError(f"{name}: arguments are texts, lists and numbers up to {LARGEST_ARGUMENT}")
    try:
        with torch.device("meta"):
            model = timm.create_model(**arguments)
        size = sum(parameter.numel() for parameter in model.parameters())
        if size > LARGEST_MODEL:
            raise ModelError(f"{name} would have more than {LARGEST_MODEL} parameters")
        others = [module for module in model.modules() if not isinstance(module, NORMS)]
        if any(module._buffers for module in others):
            # It has constants, which need their values.
            with torch.random.fork_rng(devices=[]):
                model = timm.create_model(**arguments)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"timm cannot make {arguments}: {error}") from error
    return model.eval()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_plain(list(value.values()))
    if isinstance(value, list | tuple):
        return len(value) < LARGEST_ARGUMENT and all(map(_is_plain, value))
    if isinstance(value, int | float):
        return abs(value) <= LARGEST_ARGUMENT
    return value is None or isinstance(value, str)


def arguments_of(model: nn.Module) -> dict[str, Any]:
    """What `timm.create_model` was given, as far as the model tells; empty for any other model."""
    about = getattr(model, "pretrained_cfg", None) or {}
    if not about.get("architecture"):
        return {}
    arguments = {"model_name": about["architecture"], "num_classes": model.num_classes}
    patches = getattr(model, "patch_embed", None)
    if size := getattr(patches, "img_size", None):
        arguments["img_size"] = size
    return arguments


def makes(arguments: Mapping[str, Any], model: nn.Module, fold: bool = False) -> bool:
    """Whether timm makes a model of these arguments that, with its parts made elastic, computes as
    `model` does."""
    try:
        other = with_elastic_parts(_created(arguments), fold)
    except (ModelError, TypeError, ValueError):
        return False
    return _shapes(other) == _shapes(model) and repr(other) == repr(model)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}
