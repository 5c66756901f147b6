"""Serve frames with one of several prepared sub-networks, switched between two frames."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from dynlib.errors import ConfigError, ModelError
from dynlib.nets.chain import resized
from dynlib.nets.engines import Answer, find_engine
from dynlib.nets.supernet import Supernet
from dynlib.space import SubnetConfig


class Prepared(NamedTuple):
    """A sub-network ready to run; one value, so that a frame sees all of it or nothing."""

    subnet: str
    resolution: int
    run: Answer


class SubnetServer:
    """A callable that runs the sub-network last switched to.

    A switch only re-binds a reference: no weight is copied and no statistic computed. A frame reads
    it once, so a switch during an inference in another thread takes effect with the next frame.
    With the engine `torch` the prepared sub-networks are views of the one weight store, the other
    engines hold folded or compiled copies.

    Args:
        supernet: the weight store.
        configs: the sub-networks to prepare, or their canonical strings; the first one serves until
            the first switch.
        backend: name of the engine that runs them, as in the column of an operating-point table.
        precision: one that the engine has.
        example: images (N, 3, H, W) like those that will be served; int8 is calibrated on them.

    Raises:
        ConfigError, ModelError: a configuration cannot be prepared.
        ModelError: no such engine or precision, or a package is missing.

    >>> images = load_dataset("generated", generated=(400, 100))
    >>> supernet, _ = pretrained(images)
    >>> server = SubnetServer(supernet, supernet.statistics)
    >>> server.switch(server.subnets[-1])  # microseconds, between two frames
    >>> server(images.normalise(images.test.images[:4])).shape
    torch.Size([4, 10])
    """

    def __init__(
        self,
        supernet: Supernet,
        configs: Iterable[SubnetConfig | str],
        *,
        backend: str = "torch",
        precision: str = "fp32",
        example: torch.Tensor | None = None,
    ):
        self._supernet = supernet
        self._example = example
        self.backend = backend
        self.precision = precision
        self._prepared: dict[str, Prepared] = {}
        for config in configs:
            self.prepare(config)
        if not self._prepared:
            raise ConfigError("a server needs at least one sub-network to prepare")
        self._current = next(iter(self._prepared.values()))

    @property
    def subnets(self) -> tuple[str, ...]:
        """Canonical names of the prepared sub-networks."""
        return tuple(self._prepared)

    @property
    def subnet(self) -> str:
        """Canonical name of the sub-network that serves the next frame."""
        return self._current.subnet

    def prepare(self, config: SubnetConfig | str) -> None:
        """Make one more sub-network ready to be switched to; the one that serves goes on.

        Raises as the class does.
        """
        engine = find_engine(self.backend)
        config = self._supernet.space.check(config)
        size = config.resolution
        if self._example is None and self.precision == "int8":
            raise ModelError("int8 is calibrated on images; give the server an `example`")
        example = self._example
        if example is None:
            example = torch.zeros(1, 3, size, size)
        net = self._supernet.prepare(config)
        run = engine.prepare(net, resized(example, size), self.precision)
        subnet = str(config)
        self._prepared[subnet] = Prepared(subnet, size, run)

    def switch(self, subnet: str | SubnetConfig) -> None:
        """Serve from the next frame on with `subnet`.

        Raises `ConfigError` if it was not prepared; the one before then still serves.
        """
        try:
            self._current = self._prepared[str(subnet)]
        except KeyError:
            known = ", ".join(self._prepared)
            raise ConfigError(f"{subnet} is not prepared; this server holds {known}") from None

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised float32 images -> (N, classes) logits.

        Raises `ModelError` for anything else, such as uint8 images or a numpy array.
        """
        dtype = getattr(images, "dtype", None)
        # That of a numpy array is another object.
        if dtype is not torch.float32 or images.ndim != 4 or images.shape[1] != 3:
            shape = tuple(getattr(images, "shape", ()))
            raise ModelError(
                f"images {type(images).__name__} {dtype} {shape}; "
                "expected a torch tensor of normalised float32 (N, 3, H, W)"
            )
        current = self._current
        return current.run(resized(images, current.resolution))


def storage_bytes(*nets: nn.Module) -> int:
    """Bytes of all tensors of these networks, what several share counted once."""
    sizes = {}
    for net in nets:
        for tensor in (*net.parameters(), *net.buffers()):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
