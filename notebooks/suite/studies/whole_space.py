"""The accuracies of a whole space, with what its sub-networks have in common computed once."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from dynlib.images import Dataset, Images
from dynlib.nets.chain import chain
from dynlib.nets.supernet import Supernet
from dynlib.nets.trace import NORMS
from dynlib.space import SubnetConfig
from dynlib.training import calibration_batches

Features = list[torch.Tensor]  # of every batch, what the blocks so far made of it


@torch.no_grad()
def measure_space(
    supernet: Supernet,
    configs: Sequence[SubnetConfig],
    images: Dataset,
    parts: Sequence[Images],
    *,
    calibration: int = 2000,
    bf16: bool = False,
) -> dict[SubnetConfig, tuple[float, ...]]:
    """Accuracy in percent of each sub-network on each of `parts`, as `dynlib.evaluate` has it.

    Sub-networks whose first blocks are the same share what these blocks make of the images, and
    their BatchNorm statistics. So the space is walked as a tree: three widths of two stages are
    three runs of the first stage and nine of the second, not nine of each.
    """
    learned = list(calibration_batches(images, calibration))
    held, owners = [], []
    for place, part in enumerate(parts):
        for start in range(0, len(part), 500):
            batch = part.take(slice(start, start + 500))
            held.append(images.normalise(batch.images))
            owners.append((place, batch.labels))
    blocks = {config: list(supernet.blocks(config).items()) for config in configs}
    found = {}
    bar = tqdm(total=len(blocks), desc="whole space", disable=None)

    def key(config: SubnetConfig, depth: int) -> str:
        return str(blocks[config][depth])  # name and layers, with their sizes

    def walk(group: list[SubnetConfig], depth: int, learned: Features, held: Features) -> None:
        """`group` shares the first `depth` blocks, which made `learned` and `held`."""
        group = sorted(group, key=lambda config: key(config, depth))
        for _, some in itertools.groupby(group, key=lambda config: key(config, depth)):
            same = list(some)
            first = same[0]
            deeper = _run(_trainable(supernet, first), blocks[first][depth][0], learned, held, bf16)
            if depth + 1 < len(blocks[first]):
                walk(same, depth + 1, *deeper)
                continue
            hits, totals = [0] * len(parts), [len(part) for part in parts]
            for logits, (place, labels) in zip(deeper[1], owners, strict=True):
                hits[place] += int((logits.argmax(1) == labels).sum())
            for config in same:
                found[config] = tuple(100 * h / n for h, n in zip(hits, totals, strict=True))
            bar.update(len(same))

    walk(list(blocks), 0, learned, held)
    bar.close()
    return found


def _trainable(supernet: Supernet, config: SubnetConfig) -> nn.Module:
    """The static network on views of the shared weights, with statistics of its own to be made."""
    net = supernet.kind.build(config, supernet.classes)
    net.to(memory_format=torch.channels_last)
    views = {name: view.detach() for name, view in supernet.slices(config).items()}
    net.load_state_dict(views, strict=False, assign=True)
    for module in net.modules():
        if isinstance(module, NORMS):
            module.momentum = None  # cumulative average, as `calibrate` has it
    return net


def _run(
    net: nn.Module, name: str, learned: Features, held: Features, bf16: bool
) -> tuple[Features, Features]:
    """What a block makes of both; its statistics come from `learned`."""
    block = chain(net).blocks[name]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        net.train()
        learned = [block(x) for x in learned]
        net.eval()
        held = [block(x) for x in held]
    return learned, held
