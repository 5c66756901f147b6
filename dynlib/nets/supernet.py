"""One store of weights that holds every sub-network of a search space.

A sub-network is a static network of the same class with smaller sizes, and each of its parameters
is a slice of the super-network's parameter of the same name: leading channels, central pixels.
That single rule gives training (gradients flow through the slices), prepared sub-networks (views,
no copy) and extraction (copies). Only BatchNorm statistics belong to a sub-network alone: they are
stored per configuration, computed offline, and never touched at run time.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save
from torch import nn
from torch.func import functional_call

from dynlib import DynlibError
from dynlib.nets.resnet import ResNet, layers
from dynlib.report.files import atomic_write
from dynlib.space import LayerSpec, SearchSpace, SubnetConfig

FORMAT = "dynlib-supernet-1"
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)

Statistics = dict[str, torch.Tensor]


class CheckpointError(DynlibError):
    """A checkpoint is truncated, of another space, or has wrong tensors; names file and tensor."""


class MissingStatisticsError(DynlibError):
    """A sub-network was asked for whose BatchNorm statistics nobody has computed."""


class Supernet(nn.Module):
    """All sub-networks of `space` in the weights of its largest one.

    Args:
        space: the configurations it serves.
        classes: number of outputs.
        build: `build(config, classes)` makes the static network of a configuration.
        describe: `describe(config, classes)` lists its layers.
    """

    def __init__(
        self, space: SearchSpace, classes: int = 10, *,
        build: Callable[[SubnetConfig, int], nn.Module] = ResNet,
        describe: Callable[[SubnetConfig, int], list[LayerSpec]] = layers,
    ):  # fmt: skip
        super().__init__()
        self.space, self.classes = space, classes
        self._build, self._describe = build, describe
        self.net = build(space.largest, classes).to(memory_format=torch.channels_last)
        for module in self.net.modules():
            if isinstance(module, NORMS):  # statistics are kept per configuration, not here
                module.track_running_stats = False
                for name in ("running_mean", "running_var", "num_batches_tracked"):
                    setattr(module, name, None)
        self.statistics: dict[SubnetConfig, Statistics] = {}
        self._skeletons: dict[SubnetConfig, nn.Module] = {}

    def layers(self, config: SubnetConfig) -> list[LayerSpec]:
        """The layers of a sub-network, for MACs, parameters and board models."""
        return self._describe(self.space.check(config), self.classes)

    def _work(self, config: SubnetConfig) -> float:
        return sum(layer.macs for layer in self.layers(config))

    def slices(self, config: SubnetConfig) -> dict[str, torch.Tensor]:
        """For each parameter of the sub-network the view of the shared weights it consists of."""
        store = dict(self.net.named_parameters())
        named = self._skeleton(config).named_parameters()
        return {name: crop(store[name], small.shape) for name, small in named}

    def forward(self, images: torch.Tensor, config: SubnetConfig) -> torch.Tensor:
        """Run one sub-network on (N, 3, H, W) with the BatchNorm statistics of the batch itself.

        This is the training path: gradients reach the shared weights.
        """
        return functional_call(self._skeleton(config), self.slices(config), (images,))

    def prepare(self, config: SubnetConfig) -> nn.Module:
        """A static network in eval mode whose parameters are views of the shared weights.

        Raises:
            ConfigError: `config` is outside the space.
            MissingStatisticsError: `calibrate` has not been run for it.
        """
        self.space.check(config)
        if config not in self.statistics:
            raise MissingStatisticsError(
                f"no BatchNorm statistics for {config}; run calibrate(supernet, config, images) "
                f"(stored: {[str(c) for c in self.statistics]})"
            )
        return self._materialise(config, self.slices(config))

    def extract(self, config: SubnetConfig) -> nn.Module:
        """The same network with its own copies of the weights: what one would deploy alone."""
        net = self.prepare(config)
        copies = {k: v.clone(memory_format=_layout(v)) for k, v in net.state_dict().items()}
        net.load_state_dict(copies, assign=True)
        return net.requires_grad_(False)

    def _skeleton(self, config: SubnetConfig) -> nn.Module:
        """A weightless network of the shapes of `config`, in training mode."""
        if config not in self._skeletons:
            with torch.device("meta"):
                net = self._build(self.space.check(config), self.classes)
            for module in net.modules():
                if isinstance(module, NORMS):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = module.num_batches_tracked = None
            self._skeletons[config] = net
        return self._skeletons[config]

    def _materialise(self, config: SubnetConfig, parameters: Mapping[str, torch.Tensor]):
        with torch.device("meta"):
            net = self._build(config, self.classes)
        state = {k: v.detach() for k, v in parameters.items()} | self.statistics[config]
        for name, buffer in net.named_buffers():
            if name.endswith("num_batches_tracked"):
                state[name] = torch.zeros((), dtype=buffer.dtype)
        net.load_state_dict(state, assign=True)
        return net.eval().requires_grad_(False)

    # -- files ----------------------------------------------------------------------------------

    def save(self, path: str | Path, *, half: bool = False, **provenance) -> Path:
        """Write weights and statistics as safetensors, atomically, with `provenance` (JSON-ready).

        `half` stores the weights as float16, which halves the file; statistics stay float32.
        """
        tensors = {
            f"net.{k}": v.detach().to("cpu", torch.float16 if half else v.dtype).contiguous()
            for k, v in self.net.named_parameters()
        }
        for config, statistics in self.statistics.items():
            tensors |= {f"{config}/{k}": v.contiguous() for k, v in statistics.items()}
        about = {"space": self.space.to_dict(), "classes": self.classes, "provenance": provenance}
        return atomic_write(path, save(tensors, {"format": FORMAT, "about": json.dumps(about)}))

    def load(self, path: str | Path) -> dict:
        """Replace weights and statistics by those of a checkpoint; returns its provenance.

        The statistics are ordered by the work of their sub-networks, smallest first.
        Nothing is changed unless the whole file fits. Raises `CheckpointError`.
        """
        about, tensors = _read(path)
        space = SearchSpace.from_dict(about["space"])
        if space != self.space or about["classes"] != self.classes:
            raise CheckpointError(f"{path}: holds another space: {space}, not {self.space}")
        own = dict(self.net.named_parameters())
        stored = {k.removeprefix("net."): v for k, v in tensors.items() if k.startswith("net.")}
        for name in sorted(own.keys() | stored.keys()):
            got, want = (tuple(d[name].shape) if name in d else None for d in (stored, own))
            if got != want:
                raise CheckpointError(f"{path}: {name} has shape {got}, expected {want}")
        statistics: dict[SubnetConfig, Statistics] = {}
        for name, value in tensors.items():
            if "/" in name:
                config, _, key = name.partition("/")
                statistics.setdefault(SubnetConfig.parse(config), {})[key] = value
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(stored[name])
        self.statistics = dict(sorted(statistics.items(), key=lambda item: self._work(item[0])))
        return about["provenance"]

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> tuple["Supernet", dict]:
        """The super-network a checkpoint describes and its provenance, or `CheckpointError`."""
        about, _ = _read(path)
        supernet = cls(SearchSpace.from_dict(about["space"]), about["classes"])
        return supernet, supernet.load(path)


def crop(weight: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The view of `weight` that a smaller network of the same kind uses.

    Leading channels of the first two dimensions and, of a convolution (O, I, H, W), the central
    pixels of the kernel (Once-for-All, arXiv 1908.09791, section 3.3).
    """
    window = [slice(n) for n in shape]
    for axis in range(2, weight.ndim):
        start = (weight.shape[axis] - shape[axis]) // 2
        window[axis] = slice(start, start + shape[axis])
    return weight[tuple(window)]


def _layout(tensor: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


def _read(path: str | Path) -> tuple[dict, Statistics]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a super-network checkpoint ({FORMAT})")
            return json.loads(metadata["about"]), {k: file.get_tensor(k) for k in list(file.keys())}
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def calibrate(
    supernet: Supernet, config: SubnetConfig, batches: Iterable[torch.Tensor], *, bf16: bool = False
) -> Statistics:
    """Compute and store the BatchNorm statistics of one sub-network.

    Args:
        batches: normalised training images (N, 3, H, W), in all at least 2,000 for statistics that
            a manager may rely on (specs of Dynamic-OFA use 2,000).
        bf16: run under bfloat16 autocast.

    Returns:
        Mean and unbiased variance of each BatchNorm layer, averaged over equal batches.
    """
    supernet.space.check(config)
    net = supernet._build(config, supernet.classes).to(memory_format=torch.channels_last)
    norms = {n: m for n, m in net.named_modules() if isinstance(m, NORMS)}
    for norm in norms.values():
        norm.momentum = None  # cumulative average
    net.train()
    parameters = {k: v.detach() for k, v in supernet.slices(config).items()}
    seen = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for images in batches:
            functional_call(net, parameters, (images,))
            seen += len(images)
    if not seen:
        raise DynlibError(f"calibrate {config}: no images given")
    supernet.statistics[config] = {
        f"{name}.{key}": getattr(norm, key).float().clone()
        for name, norm in norms.items()
        for key in ("running_mean", "running_var")
    }
    return supernet.statistics[config]
