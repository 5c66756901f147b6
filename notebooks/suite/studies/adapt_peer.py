"""The peer `earlyon` with the same network, exits and thresholds as ours."""

import importlib.util
import warnings
from collections.abc import Callable, Mapping

from torch import nn

from dynlib import _vision  # noqa: F401  the peer imports torchvision

ABSENT = "earlyon is not installed; pip install -r requirements-peers.txt"


def earlyon_installed() -> bool:
    """Whether the peer can be imported."""
    return importlib.util.find_spec("earlyon") is not None


def earlyon_of(
    net: nn.Module, row: Mapping, heads: Mapping[str, nn.Module], classes: int, pixels: int
) -> tuple[Callable, Callable]:
    """The peer's way through `net` for one image and for a batch, images -> logits.

    The network keeps the peer's hooks: give it one of its own. One image leaves at the first exit
    that is sure; of a batch either all do or none.

    Args:
        row: places, which must be modules, and threshold, of `Exits.table`.
        heads: by place, maps -> logits.
    """
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    places = row["places"].split()
    names = [f"exit{number}" for number in range(len(places))]
    chosen = {name: heads[place] for name, place in zip(names, places, strict=True)}
    points = [ExitPoint(name, place, 1) for name, place in zip(names, places, strict=True)]
    thresholds = [float(row["threshold"])] * len(places)
    config = EarlyExitConfig("custom", classes, points, confidence_thresholds=thresholds)
    shape = (1, 3, pixels, pixels)
    peer = EarlyExitWrapper(net, chosen, nn.Identity(), config, shape).eval()
    with warnings.catch_warnings():  # it counts operations once, with a library we do not need
        warnings.simplefilter("ignore")
        _ = peer.flops_estimate
    return (
        lambda images: peer(images).prediction,
        lambda images: peer.forward_inference_batched(images).predictions,
    )
