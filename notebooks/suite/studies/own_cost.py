"""What a network itself costs on this machine, without the program around it or its neighbours."""

from collections.abc import Callable

import torch
from torch import nn

from dynlib.profile.timing import Latency

DISTURBED = 1.5  # a 95th percentile so many times the median is somebody else's doing


def own_memory_mb(net: nn.Module, frame: torch.Tensor) -> float:
    """Memory that `net` itself needs for `frame`, in MB (1e6 bytes): its weights, and the largest
    input and output of a module without children together.

    A peak of the process has Python and PyTorch in it, and what ran before: 1,283 MB for a network
    of 12 kB and 1,290 MB for the next one that is timed.
    """
    most = 0

    def look(module, inputs, output):
        nonlocal most
        tensors = [each for each in (*inputs, output) if isinstance(each, torch.Tensor)]
        most = max(most, _bytes(tensors))

    leaves = [module for module in net.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
    try:
        with torch.inference_mode():
            net(frame)
    finally:
        for hook in hooks:
            hook.remove()
    return (_bytes([*net.parameters(), *net.buffers()]) + most) / 1e6


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def quietest(time: Callable[[], Latency], attempts: int = 4) -> Latency:
    """The first timing that nobody disturbed (`DISTURBED`), or of so many the one least so."""
    found = []
    for _ in range(attempts):
        found.append(time())
        if _unrest(found[-1]) <= DISTURBED:
            break
    return min(found, key=_unrest)


def _unrest(took: Latency) -> float:
    return took.p95_ms / took.median_ms
