"""Serve frames with one of several prepared sub-networks, switched between two frames."""

from collections.abc import Iterable

import torch
from torch import nn

from dynlib.nets.supernet import Supernet
from dynlib.space import ConfigError, SubnetConfig


class SubnetServer:
    """A callable that runs the sub-network last switched to.

    All sub-networks are prepared up front as views of the one weight store, so a switch only
    re-binds a reference: no weight is copied and no statistic computed. A frame reads the reference
    once, so a switch during an inference in another thread takes effect with the next frame.

    Args:
        supernet: the weight store.
        configs: the sub-networks to prepare; the first one serves until the first switch.

    Raises:
        ConfigError, MissingStatisticsError: a configuration cannot be prepared.
    """

    def __init__(self, supernet: Supernet, configs: Iterable[SubnetConfig]):
        self._prepared = {str(config): supernet.prepare(config) for config in configs}
        if not self._prepared:
            raise ConfigError("a server needs at least one sub-network to prepare")
        self._current: nn.Module = next(iter(self._prepared.values()))

    @property
    def subnets(self) -> tuple[str, ...]:
        """Canonical names of the prepared sub-networks."""
        return tuple(self._prepared)

    @property
    def subnet(self) -> str:
        """Canonical name of the sub-network that serves the next frame."""
        return str(self._current.config)

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
        """(N, 3, H, W) normalised images -> (N, classes) logits."""
        return self._current(images)
