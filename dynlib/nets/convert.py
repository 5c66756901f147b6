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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dynlib.errors import ModelError
from dynlib.nets.coupling import Group, Structure
from dynlib.nets.elastic import ElasticModel, arguments_of, makes, with_elastic_parts
from dynlib.nets.mobilenet import make_divisible
from dynlib.nets.supernet import MOMENTS, Supernet
from dynlib.space import SearchSpace


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
    arguments = arguments_of(model) if created is None else dict(created)
    model = with_elastic_parts(copy.deepcopy(model))
    if not makes(arguments, model):
        if created is not None:
            raise ModelError(f"created: timm makes another model of {arguments}")
        arguments = {}
    pixels = sorted(resolution or [_own_resolution(model)])
    largest = pixels[-1]
    structure = Structure(model, largest)

    shares = {"width": width, "expand": expand, "heads": heads}
    choices: dict[Group, tuple[int, ...]] = {}
    places = {kind: [] for kind in shares}
    for group in structure.groups(modules):
        sizes = _choices(group, shares[group.kind], divisor)
        if len(sizes) > 1:
            choices[group] = sizes
            places[group.kind].append(sizes)
        elif modules:
            names = ", ".join(modules)
            raise ModelError(f"{names}: no share of {group.size} channels is smaller")
    stages = {} if depth is None else structure.stages(depth)
    space = SearchSpace(tuple(pixels), tuple(stages.values()), **places)

    build = ElasticModel(model, list(choices), list(stages), arguments)
    supernet = Supernet(space, structure.outputs, build=build)
    weights = _sorted_weights(model, choices)
    with torch.no_grad():
        for name, parameter in supernet.net.named_parameters():
            parameter.copy_(weights[name])
    # The model's own statistics belong to the full size; every other one is calibrated.
    statistics = {name: value for name, value in weights.items() if name.endswith(MOMENTS)}
    for size in pixels:
        smallest = replace(space.smallest, resolution=size)
        try:
            supernet.layers(smallest)
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"the model cannot run at {size} px: {error}") from error
        full = replace(space.largest, resolution=size)
        supernet.statistics[full] = statistics
    return supernet


def _choices(group: Group, shares: Sequence[float], divisor: int) -> tuple[int, ...]:
    """Sizes (of heads: their number) for these shares, ascending, the full size included."""
    full = group.size // group.unit
    sizes = {full}
    for share in shares:
        if not 0 < share <= 1:
            raise ModelError(f"{group.kind}: {shares}; expected shares above 0 and up to 1")
        if group.kind == "heads":
            size = max(1, round(share * full))
        else:
            size = make_divisible(share * full, divisor)
        sizes.add(min(size, full))
    return tuple(sorted(sizes))


def _sorted_weights(model: nn.Module, groups: Iterable[Group]) -> dict[str, torch.Tensor]:
    """The state of `model`, the most important channels of each group first."""
    state = model.state_dict()
    weights = {name: value.detach() for name, value in state.items()}
    for group in groups:
        order = _by_importance(group, weights)
        for name, axis in group.axes:
            weight = weights[name]
            weights[name] = weight.index_select(axis, order.to(weight.device))
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
            channels = weight.double().movedim(axis, 0)
            norms = channels.flatten(1).norm(dim=1).cpu()
            usual = norms.mean().clamp_min(1e-30)
            score += norms / usual
    heads = score.unflatten(0, (-1, group.unit)).sum(1)
    order = heads.argsort(descending=True, stable=True)
    starts = order[:, None] * group.unit
    within = torch.arange(group.unit)
    return (starts + within).flatten()


def _own_resolution(model: nn.Module) -> int:
    for module in model.modules():
        if size := getattr(module, "img_size", None):
            return size if isinstance(size, int) else size[0]
    try:
        return model.pretrained_cfg["input_size"][-1]
    except (AttributeError, KeyError) as error:
        name = type(model).__name__
        raise ModelError(f"{name} does not say its image size; give resolution") from error
