"""One store of weights that holds every sub-network of a search space.

A sub-network is a static network of the same class with smaller sizes, and each of its parameters
is a slice of the super-network's parameter of the same name: leading channels, central pixels.
That single rule gives training (gradients flow through the slices), prepared sub-networks (views,
no copy) and extraction (copies). Only BatchNorm statistics belong to a sub-network alone: they are
stored per configuration, computed offline, and never touched at run time. By choice, central
pixels are mixed by a matrix learned with the weights, as in Once-for-All.
"""

import functools
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from dynlib.errors import CheckpointError, ConfigError, DynlibError, ModelError
from dynlib.files import MALFORMED
from dynlib.nets.checkpoint import IDENTITY, Checkpoint, Tensors, read_checkpoint, write_checkpoint
from dynlib.nets.families import BlockLayers, Builder, Family, find_family
from dynlib.nets.trace import NORMS
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

MOMENTS = ("running_mean", "running_var")
SKELETONS_KEPT = 256
CALIBRATION_IMAGES = 2000  # from which on statistics are safe to rely on
_EXPECTED = f"expected batches (N, 3, H, W), {CALIBRATION_IMAGES} images in all"
_LOG = logging.getLogger(__name__)


class Supernet(nn.Module):
    """All sub-networks of `space` in the weights of its largest one.

    Args:
        space: the configurations it serves.
        classes: number of outputs.
        family: name of the kind of network, a registered one; a checkpoint carries it.
        options: of a family that is made of options, such as an elastified model's.
        build: of a kind that is not registered: `build(config, classes)` makes the static network.
        transform: compute a depth-wise kernel from the centre of the next larger one by a learned
            matrix, at first the identity (Once-for-All, arXiv 1908.09791, section 3.3).

    Raises:
        ConfigError: there is no such family.

    >>> import torch
    >>> space = SearchSpace(resolution=(32,), depth=((1, 2),), width=((8, 16),))
    >>> supernet = Supernet(space, classes=10)
    >>> supernet(torch.zeros(2, 3, 32, 32), space.smallest).shape
    torch.Size([2, 10])
    >>> {str(config): sum(layer.macs for layer in supernet.layers(config)) for config in space}
    {'r32-d1-w8': ..., 'r32-d1-w16': ..., 'r32-d2-w8': ..., 'r32-d2-w16': ...}
    """

    def __init__(
        self,
        space: SearchSpace,
        classes: int = 10,
        *,
        family: str = "ResNet",
        options: Mapping[str, Any] | None = None,
        build: Builder | None = None,
        transform: bool = False,
    ):
        super().__init__()
        self.space = space
        self.classes = classes
        self.transform = transform
        if build is None:
            self.family = family
            self.options = dict(options or {})
            self.kind = find_family(family, self.options)
        else:
            self.family = getattr(build, "__qualname__", type(build).__qualname__)
            self.options = getattr(build, "options", {})
            self.kind = Family(build, getattr(build, "describe", None))
        largest = self.kind.build(space.largest, classes)
        largest.to(memory_format=torch.channels_last)
        self.net = _without_statistics(largest)
        kernels = set().union(*space.kernel)
        self._kernels = sorted(kernels)
        if transform:
            self._add_matrices()
        self.statistics: dict[SubnetConfig, Tensors] = {}
        self.report: pd.DataFrame | None = None  # of `elastify`: what is elastic, and what not
        self._skeletons: dict[SubnetConfig, nn.Module] = {}

    def _add_matrices(self) -> None:
        for conv in list(self.net.modules()):
            if not isinstance(conv, nn.Conv2d) or conv.groups != conv.in_channels:
                continue
            for small, large in itertools.pairwise(self._kernels):
                if large <= conv.kernel_size[0]:
                    matrix = nn.Parameter(torch.eye(small**2))
                    conv.register_parameter(f"{large}to{small}_matrix", matrix)

    def blocks(self, config: SubnetConfig) -> BlockLayers:
        """The layers of each block of a sub-network, by the names that `chain` gives the blocks."""
        config = self.space.check(config)
        return self.kind.layers(config, self.classes)

    def layers(self, config: SubnetConfig) -> list[LayerSpec]:
        """The layers of a sub-network, for MACs, parameters and board models."""
        blocks = self.blocks(config)
        return [layer for layers in blocks.values() for layer in layers]

    def canonical(self, config: SubnetConfig) -> SubnetConfig:
        """The same for all configurations that are one network; raises `ConfigError`."""
        config = self.space.check(config)
        return self.kind.canonical(config, self.space)

    def slices(self, config: SubnetConfig) -> Tensors:
        """For each parameter of the sub-network the view of the shared weights it consists of.

        Only transformed kernels are new tensors, computed from the weights.
        """
        store = dict(self.net.named_parameters())
        views = {}
        skeleton = self._skeleton(config)
        for name, small in skeleton.named_parameters():
            views[name] = self._slice(store, name, small.shape)
        return views

    def _slice(self, store: Tensors, name: str, shape: Sequence[int]):
        weight = store[name]
        prefix = name.removesuffix("weight")
        while self.transform and weight.ndim == 4 and weight.shape[2] > shape[2]:
            large = weight.shape[2]
            small = max(size for size in self._kernels if size < large)
            matrix = store.get(f"{prefix}{large}to{small}_matrix")
            if matrix is None:  # not depth-wise
                break
            centre = crop(weight, (*shape[:2], small, small))
            mixed = centre.flatten(1) @ matrix.T
            weight = mixed.view(centre.shape)
        return crop(weight, shape)

    def forward(self, images: torch.Tensor, config: SubnetConfig) -> torch.Tensor:
        """Run one sub-network on (N, 3, H, W) with the BatchNorm statistics of the batch itself.

        This is the training path: gradients reach the shared weights.
        """
        net = self._skeleton(config)
        weights = self.slices(config)
        return functional_call(net, weights, (images,))

    def prepare(self, config: SubnetConfig | str) -> nn.Module:
        """A static network in eval mode whose parameters are views of the shared weights.

        Args:
            config: the sub-network, or its canonical string.

        Raises:
            ConfigError: `config` is outside the space.
            ModelError: `calibrate` has not been run for it.
        """
        config = self.space.check(config)
        if self.lacks_statistics(config):
            stored = [str(config) for config in self.statistics]
            raise ModelError(
                f"no BatchNorm statistics for {config}; run calibrate(supernet, config, images) "
                f"(stored: {stored})"
            )
        parameters = self.slices(config)
        return self._materialise(config, parameters)

    def lacks_statistics(self, config: SubnetConfig) -> bool:
        """Whether the sub-network has BatchNorm and `calibrate` has not been run for it."""
        known = self.canonical(config) in self.statistics
        return not known and bool(_norms(self._skeleton(config)))

    def extract(self, config: SubnetConfig | str) -> nn.Module:
        """The same network with its own copies of the weights: what one would deploy alone."""
        net = self.prepare(config)
        copies = {}
        for name, value in net.state_dict().items():
            layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            copies[name] = value.clone(memory_format=layout)
        net.load_state_dict(copies, assign=True)
        return net.requires_grad_(False)

    def _skeleton(self, config: SubnetConfig) -> nn.Module:
        """A weightless network of the shapes of `config`, in training mode."""
        if config not in self._skeletons:
            self.space.check(config)
            with torch.device("meta"):
                net = self.kind.build(config, self.classes)
            _keep_safe(net)
            if len(self._skeletons) == SKELETONS_KEPT:  # training draws ever new ones
                self._skeletons.clear()
            self._skeletons[config] = _without_statistics(net)
        return self._skeletons[config]

    def _materialise(self, config: SubnetConfig, parameters: Tensors):
        with torch.device("meta"):
            net = self.kind.build(config, self.classes)
        state = {name: value.detach() for name, value in parameters.items()}
        device = next(iter(state.values())).device
        key = self.canonical(config)
        statistics = self.statistics.get(key, {})  # none without BatchNorm
        for name, value in statistics.items():
            state[name] = value.to(device)
        for name, buffer in net.named_buffers():
            if name.endswith("num_batches_tracked"):
                state[name] = torch.zeros((), dtype=buffer.dtype, device=device)
        net.load_state_dict(state, assign=True)
        return net.eval().requires_grad_(False)

    # -- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False, **provenance) -> Path:
        """Write weights and statistics as safetensors, atomically, with `provenance` (JSON-ready).

        `half` stores the weights as float16, which halves the file; statistics stay float32.
        """
        weights = {}
        for name, parameter in self.net.named_parameters():
            dtype = torch.float16 if half else parameter.dtype
            weights[name] = parameter.detach().to("cpu", dtype)
        statistics = {str(config): values for config, values in self.statistics.items()}
        identity = self._identity()
        checkpoint = Checkpoint(identity, provenance, weights, statistics)
        return write_checkpoint(path, checkpoint)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        license: str,
        table: pd.DataFrame | None = None,
        half: bool = False,
        upload_to: str = "",
        **provenance,
    ) -> Path:
        """Write a folder to share: the checkpoint that `save` writes, and a model card.

        Args:
            license: of the weights, by the Hub's name for it, such as ``mit``.
            table: what the card says of the sub-networks, such as an `accuracy_table`; by default
                MACs and parameters of those that have statistics.
            upload_to: repository of the Hugging Face Hub, ``owner/name``, made as a private one if
                it is not there; without it nothing is sent.
            provenance: as for `save`; the card says it too. ``dataset`` and ``recipe`` belong here.
        """
        from dynlib.nets.hub import WEIGHTS, upload, write_card  # its package is rarely needed

        folder = Path(folder)
        provenance = {"license": license, **provenance}
        self.save(folder / WEIGHTS, half=half, **provenance)
        if table is None:
            work = [(str(c), macs_m(self, c), params_m(self, c)) for c in self.statistics]
            table = pd.DataFrame(work, columns=["subnet", "macs_m", "params_m"])
        write_card(folder, upload_to or folder.resolve().name, provenance, table)
        if upload_to:
            upload(folder, upload_to)
        return folder

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, download: bool = False
    ) -> tuple["Supernet", dict]:
        """The super-network that `save_pretrained` wrote and its provenance, or `CheckpointError`.

        Args:
            source: the folder, or a repository of the Hugging Face Hub, ``owner/name``.
            revision: branch, tag or commit of the repository.
            download: fetch what the local cache lacks; without it no network is used.

        >>> import tempfile
        >>> space = SearchSpace(resolution=(32,), depth=((1,),), width=((8, 16),))
        >>> folder = Supernet(space).save_pretrained(tempfile.mkdtemp(), license="mit", note="new")
        >>> Supernet.from_pretrained(folder)[1]
        {'license': 'mit', 'note': 'new'}
        """
        from dynlib.nets.hub import find_weights

        path = find_weights(source, revision, download)
        return cls.from_checkpoint(path)

    def load(self, path: str | Path) -> dict:
        """Replace weights and statistics by those of a checkpoint; returns its provenance.

        The statistics are ordered by the work of their sub-networks, smallest first.
        Nothing is changed unless the whole file fits. Raises `CheckpointError`.
        """
        checkpoint = read_checkpoint(path)
        return self._take(checkpoint, path)

    def _take(self, checkpoint: Checkpoint, path: str | Path) -> dict:
        for key, own in self._identity().items():
            stored = checkpoint.identity[key]
            if stored != own:
                raise CheckpointError(f"{path}: holds another {key}: {stored}, not {own}")
        self.assign(checkpoint.weights, checkpoint.statistics, path)
        return checkpoint.provenance

    def assign(self, weights: Tensors, statistics: Mapping[str, Tensors], source) -> None:
        """Replace the weights, and the statistics of the sub-networks of these canonical names.

        Raises `CheckpointError`, naming `source` and the tensor, before anything is changed.
        """
        own = dict(self.net.named_parameters())
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        _same_shapes(source, weights, shapes)
        found = {}
        for text, values in statistics.items():
            try:
                config = self.space.check(SubnetConfig.parse(text))
            except ConfigError as error:
                raise CheckpointError(f"{source}: {error}") from error
            sizes = {}
            norms = _norms(self._skeleton(config))
            for name, norm in norms.items():
                for moment in MOMENTS:
                    sizes[f"{name}.{moment}"] = (norm.num_features,)
            _same_shapes(f"{source}, {text}", values, sizes)
            found[self.canonical(config)] = values
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        smallest_first = sorted(found, key=functools.partial(macs_m, self))
        self.statistics = {config: found[config] for config in smallest_first}

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, build: Builder | None = None
    ) -> tuple["Supernet", dict]:
        """The super-network a checkpoint describes and its provenance, or `CheckpointError`.

        `build` is the one it was made with, if its family is not registered.
        """
        checkpoint = read_checkpoint(path)
        try:
            with torch.device("meta"):
                shell = cls(**checkpoint.identity, build=build)
            # Memory is taken only for what the file holds.
            shapes = {name: tuple(p.shape) for name, p in shell.net.named_parameters()}
            _same_shapes(path, checkpoint.weights, shapes)
            supernet = cls(**checkpoint.identity, build=build)
        except ConfigError as error:
            raise CheckpointError(
                f"{path}: {error}; pass its build, or load it into a super-network made as it was"
            ) from error
        except (*MALFORMED, LookupError, RuntimeError, AssertionError) as error:
            raise CheckpointError(f"{path}: describes no network: {error!r:.300}") from error
        return supernet, supernet._take(checkpoint, path)

    def grown(self, space: SearchSpace) -> "Supernet":
        """A super-network of a wider `space` that starts where this one stands.

        This one's weights are its leading slices, and what they receive from the new channels
        starts at zero: every old sub-network is in it, and its largest answers as this one's (the
        function-preserving growth of Net2Net, arXiv 1511.05641, for prefix slices). That needs
        channels that are normalised one by one, as BatchNorm does. Statistics are not taken over.

        Raises `ConfigError` where the other is less wide, or has more or fewer layers.
        """
        large = Supernet(
            space, self.classes, family=self.family, options=self.options, transform=self.transform
        )
        new = dict(large.net.named_parameters())
        old = dict(self.net.named_parameters())
        if unshared := new.keys() ^ old.keys():
            raise ConfigError(f"grown: layers {sorted(unshared)} are in one only")
        for name, weight in old.items():
            room = tuple(new[name].shape)
            if any(map(int.__gt__, weight.shape, room)):
                raise ConfigError(f"{name}: {tuple(weight.shape)} has no place in {room}")
        with torch.no_grad():
            for name, weight in old.items():
                if weight.ndim > 1:
                    new[name][: len(weight)] = 0
                place = crop(new[name], weight.shape)
                place.copy_(weight)
        return large

    def _identity(self) -> dict:
        return {key: getattr(self, key) for key in IDENTITY}


def macs_m(supernet: Supernet, config: SubnetConfig) -> float:
    """Millions of multiply-accumulates of a sub-network for one image."""
    layers = supernet.layers(config)
    return sum(layer.macs for layer in layers) / 1e6


def params_m(supernet: Supernet, config: SubnetConfig) -> float:
    """Millions of parameters of a sub-network, including normalisation and biases."""
    weights = supernet.slices(config)
    return sum(weight.numel() for weight in weights.values()) / 1e6


def crop(weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The view of `weight` that a smaller network of the same kind uses.

    The leading entries of each dimension, but of a convolution (O, I, H, W) the central pixels of
    the kernel (Once-for-All, arXiv 1908.09791, section 3.3).
    """
    window = [slice(size) for size in shape]
    if weight.ndim == 4:
        for axis in (2, 3):
            size = shape[axis]
            start = (weight.shape[axis] - size) // 2
            window[axis] = slice(start, start + size)
    return weight[tuple(window)]


def _without_statistics(net: nn.Module) -> nn.Module:
    for norm in _norms(net).values():
        norm.track_running_stats = False
        norm.running_mean = None
        norm.running_var = None
        norm.num_batches_tracked = None
    return net


def _keep_safe(net: nn.Module) -> None:
    """Train around two faults in oneDNN's weight gradients of strided convolutions, channels_last.

    That of a 1 x 1 convolution of fewer than 16 channels is written past its buffer (issue 6035;
    RepVGG, MobileOne, FastViT). The same without stride, on the pixels that it would have looked
    at, is right. In bfloat16 on a map of one column, what belongs to places of the kernel that see
    no pixel is never written (NaN by chance, where images are small for a network). With a column
    of zeros beside it, as the padding has them anyway, it is right.
    """
    for conv in net.modules():
        if not isinstance(conv, nn.Conv2d) or conv.stride == (1, 1):
            continue
        if conv.in_channels < 16 and (conv.kernel_size, conv.padding) == ((1, 1), (0, 0)):
            conv.register_forward_pre_hook(functools.partial(_every, conv.stride))
            conv.stride = (1, 1)
        elif type(conv) is nn.Conv2d:  # others pad on their own
            conv.register_forward_pre_hook(_widened)


def _every(stride: tuple[int, int], conv: nn.Conv2d, args: tuple[torch.Tensor]) -> torch.Tensor:
    (images,) = args
    rows, columns = stride
    return images[..., ::rows, ::columns]


def _widened(conv: nn.Conv2d, args: tuple[torch.Tensor]) -> torch.Tensor | None:
    (images,) = args
    if images.shape[-1] > 1:
        return None
    padding = 0 if conv.padding == "valid" else conv.padding[1]
    reach = conv.dilation[1] * (conv.kernel_size[1] - 1)
    spare = 2 * padding - reach  # columns to stride over
    if spare % conv.stride[1] == conv.stride[1] - 1:
        return None  # another column would make the answer wider
    return F.pad(images, (0, 1))


def _norms(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if isinstance(module, NORMS)}


def _same_shapes(where, tensors: Tensors, shapes: Mapping[str, tuple]) -> None:
    for name in sorted(tensors.keys() | shapes.keys()):
        got = tuple(tensors[name].shape) if name in tensors else None
        want = shapes.get(name)
        if got != want:
            raise CheckpointError(f"{where}: {name} has shape {got}, expected {want}")


def calibrate(
    supernet: Supernet, config: SubnetConfig | str, batches: Iterable, *, bf16: bool = False
) -> Tensors:
    """Compute and store the BatchNorm statistics of one sub-network.

    Args:
        batches: normalised training images (N, 3, H, W), or tuples that begin with them, as a
            `DataLoader` yields (images, labels). In all at least 2,000 images, as Dynamic-OFA uses,
            for statistics that a manager may rely on; fewer are taken, and the log says so.
        bf16: run under bfloat16 autocast.

    Returns:
        Mean and unbiased variance of each BatchNorm layer, averaged over equal batches.

    Raises:
        ConfigError: `config` is outside the space.
        DynlibError: there is no image, or a batch is none of images.

    >>> import torch
    >>> supernet = Supernet(SearchSpace(resolution=(32,), depth=((1,),), width=((8, 16),)))
    >>> _ = calibrate(supernet, supernet.space.smallest, [torch.randn(64, 3, 32, 32)])
    >>> supernet.prepare(supernet.space.smallest)(torch.randn(1, 3, 32, 32)).shape
    torch.Size([1, 10])
    """
    config = supernet.space.check(config)
    key = supernet.canonical(config)
    device = next(supernet.parameters()).device
    net = supernet.kind.build(config, supernet.classes).train()
    net.to(device, memory_format=torch.channels_last)
    norms = _norms(net)
    for norm in norms.values():
        norm.momentum = None  # cumulative average
    views = supernet.slices(config)
    parameters = {name: view.detach() for name, view in views.items()}
    seen = 0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in batches:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(images, torch.Tensor) or images.ndim != 4:
                raise DynlibError(f"calibrate {config}: {_EXPECTED}, got {type(images).__name__}")
            there = images.to(device)
            functional_call(net, parameters, (there,))
            seen += len(images)
    if not seen:
        raise DynlibError(f"calibrate {config}: no images given; {_EXPECTED}")
    if seen < CALIBRATION_IMAGES:
        _LOG.info("calibrate %s: %d images; %d are safe", config, seen, CALIBRATION_IMAGES)
    statistics = {}
    for name, norm in norms.items():
        for moment in MOMENTS:
            values = getattr(norm, moment).float().cpu()
            statistics[f"{name}.{moment}"] = values.clone()
    supernet.statistics[key] = statistics
    return statistics
