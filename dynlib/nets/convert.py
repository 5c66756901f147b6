"""Make a super-network of a timm model, starting from the weights it has.

    from dynlib._vision import timm
    from dynlib.nets.convert import elastify

    supernet = elastify(timm.create_model("resnet18", pretrained=True), fold=True)
    train(supernet, images, Recipe.finetune())   # what makes the smaller ones worth serving
    small = supernet.space.at(0.5)
    net = supernet.prepare(small)         # views of the one weight store

What is not folded (`fold`) has BatchNorm statistics of its own for each sub-network: `calibrate`.

Which channels belong together is read off the model (`coupling`); within each group they are sorted
by importance, as in Once-for-All (arXiv 1908.09791, section 3.3), so that a prefix holds the best.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.func import functional_call

from dynlib.errors import ModelError
from dynlib.nets.coupling import Group, Structure
from dynlib.nets.elastic import ElasticModel, arguments_of, makes, with_elastic_parts
from dynlib.nets.mobilenet import make_divisible
from dynlib.nets.supernet import MOMENTS, Supernet
from dynlib.nets.trace import NORMS
from dynlib.space import SearchSpace

SAME = 1e-6  # relative difference of answers; in double precision rounding makes 1e-12


def elastify(
    model: nn.Module,
    *,
    resolution: Sequence[int] = (),
    width: Sequence[float] = (0.5, 0.75, 1.0),
    expand: Sequence[float] = (0.5, 0.75, 1.0),
    heads: Sequence[float] = (0.5, 0.75, 1.0),
    depth: int | None = 1,
    divisor: int = 8,
    fold: bool = False,
    modules: Sequence[str] = (),
    created: Mapping[str, Any] | None = None,
) -> Supernet:
    """A super-network of the smaller versions of `model`, which itself stays as it is.

    At full size it computes what `model` computes, which is tried before it is returned. Within
    each group the channels are sorted by importance, so that a prefix holds the best ones; what
    gives another answer in another order stays as it is. `report` of the result is a table of what
    became elastic and why the rest did not. Smaller sub-networks lose accuracy with every channel
    until they are trained (`Recipe.finetune`). Residual blocks go from the end of a stage
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
        fold: for pretrained weights: fold each BatchNorm into the convolution before it, with the
            statistics that it has (`fold_norms`). Where that leaves none, nothing is calibrated.
            Statistics of other images, of fewer classes, undo much of what the weights know, as
            `20_bring_your_model` shows.
        modules: names or patterns (`layer1.*`) of the layers whose outputs shall be elastic; by
            default all that can be. What is not elastic stays fixed.
        created: the arguments of `timm.create_model`, ``{"model_name": ..., ...}``, where there
            were more than the model's name, its number of classes and its image size.

    Raises:
        ModelError: the model cannot be read or does not run on (N, 3, H, W), a layer of `modules`
            cannot be elastic, `created` makes another model, or an argument is malformed.

    >>> from dynlib._vision import timm
    >>> supernet = elastify(timm.create_model("resnet18", num_classes=10))
    >>> supernet.space.size, str(supernet.space.largest)
    (8503056, 'r224-...')
    """
    shares = {"width": width, "expand": expand, "heads": heads}
    _check_arguments(model, resolution=resolution, modules=modules, **shares)
    arguments = arguments_of(model) if created is None else dict(created)
    pixels = sorted(resolution or [_own_resolution(model)])
    largest = pixels[-1]
    probe = _Probe(model, largest, fold)
    model = with_elastic_parts(copy.deepcopy(model), fold)
    if not makes(arguments, model, fold):
        if created is not None:
            raise ModelError(f"created: timm makes another model of {arguments}")
        arguments = {}
    structure = Structure(model, largest)
    for group in probe.ordered(structure.groups()):
        structure.hold(group.axes, "its channels cannot change places")

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

    build = ElasticModel(model, list(choices), list(stages), arguments, fold)
    supernet = Supernet(space, structure.outputs, build=build)
    weights = _sorted_weights(model, choices)
    with torch.no_grad():
        for name, parameter in supernet.net.named_parameters():
            parameter.copy_(weights[name])
    if probe.difference(build(space.largest, structure.outputs), choices) > SAME:
        raise ModelError(f"{type(model).__name__} would give other answers at its full size")
    supernet.report = _report(structure, choices, stages)
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


def _check_arguments(model: nn.Module, **several: Sequence) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model: {model!r}, expected a network, such as timm.create_model('resnet18')"
        )
    for name, values in several.items():
        if isinstance(values, str | int | float):
            raise ModelError(f"{name}: {values!r}, expected several, such as ({values!r},)")


class _Probe:
    """A model's answer to an image, to be given by what is made of it too.

    Its copy is in double precision and has noise on all weights: fresh ones hide much, such as a
    branch behind a scale of zero, or places with equal biases.
    """

    def __init__(self, model: nn.Module, resolution: int, fold: bool):
        draws = torch.Generator().manual_seed(0)

        def noise(tensor: torch.Tensor) -> torch.Tensor:
            drawn = torch.randn(tensor.shape, generator=draws, dtype=torch.double)
            return drawn.to(tensor.device) * (0.1 if tensor.ndim < 2 else 0.02)

        model = copy.deepcopy(model).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += noise(parameter)
            for module in model.modules():
                if isinstance(module, NORMS) and module.running_mean is not None:
                    module.running_mean += noise(module.running_mean)
                    module.running_var += noise(module.running_var).abs()
            image = torch.randn(1, 3, resolution, resolution, generator=draws, dtype=torch.double)
            self.image = image.to(next(model.parameters(), image).device)
            try:
                self.answer = model(self.image)
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                name, shape = type(model).__name__, tuple(image.shape)
                raise ModelError(f"{name} does not run on images {shape}: {error}") from error
        self.model = with_elastic_parts(model, fold)

    def ordered(self, groups: Sequence[Group]) -> list[Group]:
        """Those of `groups` whose channels cannot change places, found by halving.

        Rows of a table of position biases are coupled like channels, but each belongs to a place.
        """
        if not groups or self.difference(self.model, groups) <= SAME:
            return []
        if len(groups) == 1:
            return list(groups)
        half = len(groups) // 2
        return self.ordered(groups[:half]) + self.ordered(groups[half:])

    @torch.no_grad()
    def difference(self, net: nn.Module, groups: Iterable[Group]) -> float:
        """Largest relative difference of the answer of `net` with these groups sorted."""
        weights = _sorted_weights(self.model, groups)
        answer = functional_call(net.double().eval(), weights, (self.image,))
        return float((answer - self.answer).abs().max() / self.answer.abs().max())


def _report(
    structure: Structure, choices: Mapping[Group, tuple[int, ...]], stages: Mapping
) -> pd.DataFrame:
    """One row per stage and per layer: what of it is elastic, its choices, or why it is fixed."""
    rows = []
    for name, blocks in stages.items():
        rows.append({"part": name, "elastic": "depth", "choices": blocks, "why_not": ""})
    kinds = {axis: group for group in choices for axis in group.axes}
    for name, shape in structure.shapes.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) < 2:
            continue
        axis = name, 0
        if group := kinds.get(axis):
            row = {"elastic": group.kind, "choices": choices[group], "why_not": ""}
        else:
            why = structure.reason(axis) or "not asked for, or no share of its channels is smaller"
            row = {"elastic": "", "choices": (shape[0],), "why_not": why}
        rows.append({"part": layer, **row})
    return pd.DataFrame(rows)


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
