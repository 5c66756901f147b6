"""Which channels of a model can only come and go together, and which of its blocks can go.

Found by trying, not by a list of layers or models: torch.fx records the model, then each recorded
operation is run alone, without weights, with one axis of one parameter made smaller. Where that
fails, the smallest set of axes that can shrink together is searched: they are one group (a residual
stream, a depth-wise chain, a squeezed gate). Channels that no set frees, of a bounded number, stay
fixed, and it is said which operation holds them. Groups of
coupled channels are the idea of DepGraph (arXiv 2301.12900).
"""

import copy
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx, nn

from dynlib.errors import ModelError
from dynlib.nets.attention import Attention
from dynlib.nets.trace import (
    CONVOLUTIONS,
    LAYERS,
    NORMS,
    SEQUENCES,
    graph_of,
    module_paths,
    without_root,
)

TRIALS = 64  # sets of axes tried in one operation; those of our tests need 28 at most
FEWEST = 4  # a shorter axis is no axis of channels (colours, say), and one of 1 would broadcast

Axis = tuple[str, int]  # name of a parameter or statistic, and which of its axes


@dataclass(frozen=True)
class Group:
    """Channels of several tensors that can only come and go together."""

    kind: str  # the dimension of `SubnetConfig`: width, expand or heads
    axes: tuple[Axis, ...]
    size: int
    unit: int = 1  # channels that stay together: those of one attention head


class Structure:
    """Groups of coupled channels and stages of residual blocks of `model`.

    Args:
        model: takes (N, 3, H, W); its state holds parameters and BatchNorm statistics only.
        resolution: H = W in pixels.

    Raises:
        ModelError: torch.fx cannot record it, or it does not run at this resolution.
    """

    def __init__(self, model: nn.Module, resolution: int):
        from scipy.cluster.hierarchy import DisjointSet  # takes a second to import

        weightless = copy.deepcopy(model).to("meta", torch.float32)
        self.model = weightless.eval()
        state = self.model.state_dict()
        self.shapes = {name: value.shape for name, value in state.items()}
        self.tied = DisjointSet()
        self.units: dict[Axis, int] = {}
        self.held: dict[Axis, str] = {}  # why the channels of an axis are fixed
        # What the channels on each axis are, for the output of a node and for a named parameter.
        self.labels: dict[fx.Node | str, dict[int, Axis]] = {}
        self.values: dict[fx.Node, object] = {}
        self.own: dict[fx.Node, list[str]] = {}  # the parameters that a node brings in
        recorded = graph_of(self.model)
        nodes = list(recorded.graph.nodes)
        self.paths = {node: module_paths(node) for node in nodes}
        try:
            with torch.device("meta"), torch.no_grad():
                images = torch.empty(2, 3, resolution, resolution)
                for node in nodes:
                    self._read(node, images)
        except (
            RuntimeError, TypeError, ValueError, AssertionError, AttributeError, LookupError
        ) as error:  # fmt: skip
            raise ModelError(f"{type(model).__name__} cannot be read: {error!r}") from error
        logits = self.values[nodes[-1]]
        self.outputs = logits.shape[-1]

    def groups(self, patterns: Sequence[str] = ()) -> list[Group]:
        """The groups that can shrink, in order of execution.

        `patterns` of module names restrict them to those of the outputs of these layers; a layer
        that cannot shrink, or that is not there, raises `ModelError`.
        """
        asked = {axis for pattern in patterns for axis in self._asked(pattern)}
        found = []
        for axes in self.tied.subsets():
            free = self.reason(min(axes)) is None
            if free and (not patterns or axes & asked):
                found.append(self._group(axes))
        return found

    def _group(self, axes: set[Axis]) -> Group:
        first, *_ = ordered = sorted(axes)
        unit = self._unit(first)
        if unit > 1:
            kind = "heads"
        elif self._inside_block(axes):
            kind = "expand"
        else:
            kind = "width"
        return Group(kind, tuple(ordered), self._size(first), unit)

    def stages(self, keep: int) -> dict[str, tuple[int, ...]]:
        """For each sequence that ends in residual blocks the numbers of blocks it can have."""
        found = {}
        for name, sequence in self.model.named_modules():
            if not isinstance(sequence, SEQUENCES):
                continue
            blocks = [f"{name}.{child}" for child, _ in sequence.named_children()]
            count = len(blocks)
            loose = itertools.takewhile(self._is_residual, reversed(blocks))
            fixed = count - len(list(loose))
            lowest = max(1, min(keep, count), fixed)
            if lowest < count:
                found[name] = tuple(range(lowest, count + 1))
        return found

    def _asked(self, pattern: str) -> Iterator[Axis]:
        matching = []
        for name in self.shapes:
            layer, dot, leaf = name.rpartition(".")
            if leaf == "weight" and dot and fnmatchcase(layer, pattern):
                matching.append(layer)
        if not matching:
            raise ModelError(f"{pattern}: the model has no such layer")
        for layer in matching:
            axis = f"{layer}.weight", 0
            if reason := self.reason(axis):
                raise ModelError(f"{layer} cannot be elastic: {reason}")
            yield axis

    def reason(self, axis: Axis) -> str | None:
        """Why the channels on an axis are fixed; None where they are free."""
        if axis not in self.tied:
            return "it is never run, or has too few channels"
        for held, why in self.held.items():
            if self.tied.connected(held, axis):
                return why
        return None

    def hold(self, axes: Iterable[Axis], reason: str) -> None:
        """Fix the channels on these axes, for a reason that is told."""
        for axis in axes:
            self.held.setdefault(axis, reason)  # the first reason is the cause

    def _size(self, axis: Axis) -> int:
        name, place = axis
        return self.shapes[name][place]

    def _unit(self, axis: Axis) -> int:
        tied = self.tied.subset(axis)
        return max(self.units.get(a, 1) for a in tied)

    def _inside_block(self, axes: set[Axis]) -> bool:
        """Whether all belong to one element of a sequence of modules."""
        first, *others = [name.split(".")[:-1] for name, _ in axes]
        module = self.model
        inside = False
        # Down the common path: of layer1.0.conv1 and layer1.0.bn1 it is layer1, then layer1.0.
        for depth, name in enumerate(first):
            if any(path[depth : depth + 1] != [name] for path in others):
                break
            inside = inside or isinstance(module, SEQUENCES)
            module = module.get_submodule(name)
        return inside and not isinstance(module, SEQUENCES)

    def _is_residual(self, block: str) -> bool:
        """Whether the block adds to its input, so that without it the shapes still fit."""
        inside = {node for node, paths in self.paths.items() if block in paths}
        read = {source for node in inside for source in node.all_input_nodes}
        sources = read - inside
        reached = {node for node in inside if set(node.users) - inside}
        has_parameters = any(self.own[node] for node in inside)
        if len(sources) != 1 or len(reached) != 1 or not has_parameters:
            return False
        (source,) = sources
        while reached:  # back from the output, through nothing with parameters
            node = reached.pop()
            if node is source:
                return True
            if not self.own[node] and self._shape(node) == self._shape(source):
                reached |= set(node.all_input_nodes)
        return False

    def _shape(self, node: fx.Node) -> torch.Size | None:
        return getattr(self.values[node], "shape", None)

    # -- reading ----------------------------------------------------------------------------------

    def _read(self, node: fx.Node, images: torch.Tensor) -> None:
        """Run one operation, tie the channels it couples, and label those of its output."""
        self._meet_parameters(node)
        self.labels[node] = {}
        value = images if node.op == "placeholder" else self._run(node, {})
        self.values[node] = value
        roots = (self.tied[axis] for axis in self._axes(node))
        axes = list(dict.fromkeys(roots))
        if node.op == "output":
            self.hold(axes, "its channels are the outputs of the model")
        elif reason := self._inseparable(node):
            self.hold(axes, reason)
        elif isinstance(value, torch.Tensor):
            self._tie(node, axes)

    def _meet_parameters(self, node: fx.Node) -> None:
        """Label the parameters of a node. The rows of all tensors of one layer are its outputs."""
        self.own[node] = []
        if node.op not in ("call_module", "get_attr"):
            return
        target = without_root(node.target)
        for name, shape in self.shapes.items():
            if target and f"{name}.".startswith(f"{target}."):
                self.own[node].append(name)
                self._label(name, shape)
        module = self._module(node)
        if isinstance(module, Attention) and module.q.out_features > module.head_dim:
            columns = f"{target}.proj.weight", 1
            for part in "qkv":
                rows = f"{target}.{part}.weight", 0
                self.tied.merge(columns, rows)
            self.units[columns] = module.head_dim

    def _label(self, name: str, shape: Sequence[int]) -> None:
        without_pixels = shape[:2] if len(shape) > 3 else shape  # those of a kernel are no channels
        labels = {}
        for place, size in enumerate(without_pixels):
            if size >= FEWEST:
                axis = name, place
                labels[place] = axis
                self.tied.add(axis)
        self.labels[name] = labels
        path, _, _ = name.rpartition(".")
        weight = f"{path}.weight", 0
        is_layer = isinstance(self.model.get_submodule(path), LAYERS)
        if is_layer and 0 in labels and weight in self.tied:
            self.tied.merge(weight, (name, 0))

    def _module(self, node: fx.Node) -> nn.Module | None:
        if node.op == "call_module":
            return self.model.get_submodule(without_root(node.target))
        return None

    def _axes(self, node: fx.Node) -> Iterator[Axis]:
        """The channels a node can touch: of its inputs and of its parameters."""
        for source in node.all_input_nodes:
            if isinstance(self.values[source], torch.Tensor):
                yield from self.labels[source].values()
            else:  # a shape, or a tuple of tensors: what it was computed from
                yield from self._axes(source)
        for name in self.own[node]:
            yield from self.labels[name].values()

    def _inseparable(self, node: fx.Node) -> str | None:
        """Why an operation cannot lose channels although the shapes would allow it."""
        path = self.paths[node][-1]
        if node.target is operator.getitem:
            indices = set(node.all_input_nodes) - {node.args[0]}
            picks = (self.values[index] for index in indices)
            if any(isinstance(pick, torch.Tensor) for pick in picks):
                return f"{node.name} in {path} picks by number"  # rows are places, not channels
        if node.op != "call_module":
            return None
        module = self._module(node)
        for name, layer in module.named_modules(prefix=path):
            grouped = isinstance(layer, CONVOLUTIONS) and layer.groups > 1
            if grouped and not _is_depthwise(layer):
                channels = layer.weight.shape[1]
                return f"{name} has {layer.groups} groups of {channels} channels"
        if isinstance(module, CONVOLUTIONS):
            labelled = set(self.labels[node.args[0]])
            if labelled - {1}:
                return f"{path} runs over channels"
        return None

    def _tie(self, node: fx.Node, axes: list[Axis]) -> None:
        """Tie those of `axes` that can only shrink together, label the output, hold the others.

        What can shrink together is a union of groups, so the smallest set that can is a group. In
        ``x + y`` neither x nor y can have fewer channels alone, but both can: one group, whose name
        the channels of the sum get. In ``cat([x, y], 1)`` none can: fewer channels of x are not as
        many fewer channels of the result in proportion, and x and y are held.
        """
        trials = 0
        while axes:
            first = axes[0]
            group = (first,)
            shrunk = None
            for candidate in self._candidates(axes):
                if trials == TRIALS:
                    break
                trials += 1
                shrunk = self._shrink(node, candidate)
                if shrunk is not None:
                    group = candidate
                    break
            if shrunk is None:
                reason = self._need(node, first, searched=trials < TRIALS)
                self.hold(group, reason)
            else:
                self.labels[node] |= dict.fromkeys(shrunk, first)
            for axis in group:
                self.tied.merge(first, axis)
                axes.remove(axis)

    def _candidates(self, axes: Sequence[Axis]) -> Iterator[tuple[Axis, ...]]:
        """The sets of axes of one size that hold the first of `axes`, small ones first."""
        first, *others = axes
        size = self._size(first)
        alike = [axis for axis in others if self._size(axis) == size]
        for count in range(len(alike) + 1):
            for more in itertools.combinations(alike, count):
                yield first, *more

    def _need(self, node: fx.Node, axis: Axis, *, searched: bool) -> str:
        """Why the operation holds an axis."""
        place = self.paths[node][-1] or "the model"
        what = place if node.op == "call_module" else f"{node.name} in {place}"
        if searched:
            return f"{what} needs all {self._size(axis)} channels"
        return f"{what} couples too much: none of {TRIALS} sets of channels can shrink together"

    def _shrink(self, node: fx.Node, axes: tuple[Axis, ...]) -> tuple[int, ...] | None:
        """Axes of the output that shrink just as `axes` do; None if the operation fails.

        A convolution of 16 to 32 channels that loses inputs, of its images and its weight, still
        returns (2, 32, H, W): no axis shrinks, (). With 31 and then 16 of its filters, it returns
        (2, 31, H, W) and (2, 16, H, W): axis 1 shrinks, (1,). A reshape of the 32 channels into 4
        groups of 8 fails with 31.
        """
        full = self._size(axes[0])
        unit = self._unit(axes[0])
        before = self.values[node].shape
        half = full // unit // 2 * unit
        found = set()
        for size in (full - unit, half):
            sizes = dict.fromkeys(axes, size)
            try:
                after = self._run(node, sizes).shape
            except Exception:  # whatever it raises means no
                return None
            if len(after) != len(before):
                return None
            changed = []
            for axis, pair in enumerate(zip(before, after, strict=True)):
                if pair == (full, size):
                    changed.append(axis)
                elif pair[0] != pair[1]:
                    return None
            found.add(tuple(changed))
        return found.pop() if len(found) == 1 else None

    # -- running ----------------------------------------------------------------------------------

    def _run(self, node: fx.Node, sizes: Mapping[Axis, int]) -> object:
        """Execute a node on tensors without data, the channels in `sizes` (by root) resized."""

        def value(source: fx.Node) -> object:
            known = self.values[source]
            if isinstance(known, torch.Tensor):
                shape = self._resized(source, known.shape, sizes)
                return known.new_empty(shape)
            return self._run(source, sizes) if sizes else known

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        if node.op == "call_function":
            return node.target(*args, **kwargs)
        if node.op == "call_method":
            owner, *args = args
            method = getattr(owner, node.target)
            return method(*args, **kwargs)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            get = operator.attrgetter(node.target)
            tensor = get(node.graph.owning_module)
            if not self.own[node]:
                return tensor
            (name,) = self.own[node]
            shape = self._resized(name, tensor.shape, sizes)
            return tensor.new_empty(shape)
        module = self._resized_module(node, sizes)
        return module(*args, **kwargs)

    def _resized(
        self, key: fx.Node | str, full: Sequence[int], sizes: Mapping[Axis, int]
    ) -> tuple[int, ...]:
        """The shape of an output or a named parameter with other numbers of channels."""
        shape = list(full)
        for axis, label in self.labels[key].items():
            shape[axis] = sizes.get(self.tied[label], shape[axis])
        return tuple(shape)

    def _resized_module(self, node: fx.Node, sizes: Mapping[Axis, int]) -> nn.Module:
        module = self._module(node)
        if not sizes or not self.own[node]:
            return module
        module = copy_structure(module)
        prefix = f"{without_root(node.target)}."
        shapes = {}
        for name in self.own[node]:
            leaf = name.removeprefix(prefix)
            shapes[leaf] = self._resized(name, self.shapes[name], sizes)
        set_shapes(module, shapes)
        return module


def copy_structure(module: nn.Module) -> nn.Module:
    """A copy that shares the tensors, for `set_shapes` to replace."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    shared = {id(tensor): tensor for tensor in tensors}
    return copy.deepcopy(module, shared)


def set_shapes(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Replace the named tensors by empty ones of these shapes, and what layers note of them."""
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        old = getattr(layer, leaf)
        new = torch.empty(shape, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        setattr(layer, leaf, new)
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, CONVOLUTIONS):
            outputs, inputs, *_ = weight.shape
            if _is_depthwise(layer):
                layer.groups = outputs
            layer.out_channels = outputs
            layer.in_channels = inputs * layer.groups
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = weight.shape
        elif isinstance(layer, NORMS):
            layer.num_features = layer.running_mean.shape[0]
        elif hasattr(layer, "normalized_shape") and weight is not None:
            layer.normalized_shape = tuple(weight.shape)


def _is_depthwise(layer: nn.Conv1d | nn.Conv2d) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels > 1
