"""A static network as a row of named blocks: where exits, gates, skips and pipelines cut.

    row = chain(net)
    front, back = row.cut(["stages.1.blocks.0"])
    assert torch.equal(back(front(images)), net(images))

Networks of our own families list their blocks, and their `forward` runs them. Any other is recorded
by torch.fx and cut before and behind the blocks of its stages, wherever one tensor is all that goes
on.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from dynlib.errors import ModelError
from dynlib.nets.trace import LAYERS, SEQUENCES, Block, graph_of, module_paths

T = TypeVar("T")


class Chain:
    """Named blocks, each of which takes what the one before returned.

    The first one is the stem, which takes images (N, 3, H, W), and the last the head, which returns
    logits (N, classes).
    """

    def __init__(self, blocks: Mapping[str, Block]):
        self.blocks = dict(blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks in order; those of a shallower network are among a deeper one's."""
        return tuple(self.blocks)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks one after the other."""
        for block in self.blocks.values():
            x = block(x)
        return x

    def cut(self, behind: Sequence[str]) -> list["Chain"]:
        """The pieces that end with these blocks, and the rest; raises as the function `cut`."""
        return [Chain(piece) for piece in cut(self.blocks, behind)]


def cut(blocks: Mapping[str, T], behind: Sequence[str]) -> list[dict[str, T]]:
    """What belongs to the blocks of a chain, cut behind the named ones; the last piece is the rest.

    Raises `ModelError` for a block that is not there, not before the one named next, or the last.
    """
    pieces = []
    rest = list(blocks.items())
    for name in behind:
        known = [block for block, _ in rest[:-1]]
        if name not in known:
            raise ModelError(f"cannot cut behind {name!r}; expected one of {', '.join(known)}")
        end = known.index(name) + 1
        pieces.append(dict(rest[:end]))
        rest = rest[end:]
    return [*pieces, dict(rest)]


class Row(nn.Module):
    """A network that is a row of blocks: a family lists them in `row`, `forward` runs them."""

    def row(self) -> Iterator[tuple[str, Block]]:
        """Names and blocks, from the stem to the head."""
        raise NotImplementedError

    def forward(self, x):
        """(N, 3, H, W) images -> (N, classes) logits."""
        for _, block in self.row():
            x = block(x)
        return x


def chain(net: nn.Module) -> Chain:
    """The blocks of a static network; they share its parameters and compute just what it computes.

    A network that is no `Row` is recorded as it is now, in training or evaluation.

    Raises:
        ModelError: torch.fx cannot record it, or it has no stages of blocks to cut at.
    """
    if isinstance(net, Row):
        return Chain(dict(net.row()))
    root, pieces = _cut(net)
    blocks = {}
    entry = next(iter(root.graph.nodes))  # the images
    for name, nodes, leaving in pieces:
        blocks[name] = _module_of(root, nodes, entry, leaving)
        entry = leaving
    return Chain(blocks)


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    """Square images (N, 3, H, W) at `size` pixels: what a network does to those of another size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


Piece = tuple[str, list[fx.Node], fx.Node]  # name, operations, and the one whose value leaves it


def _cut(net: nn.Module) -> tuple[fx.GraphModule, list[Piece]]:
    """The recorded network and the pieces it falls into.

    A ResNet of timm falls into ``stem`` (up to the first pooling), ``layer1.0``, ``layer1.1`` and
    so on, and ``head``. What lies between two blocks, such as the reduction before a stage of
    ConvNeXt, has the name of the block around it (``stages.1``), or of its own first layer.
    """
    root = graph_of(net)
    nodes = [node for node in root.graph.nodes if node.op.startswith("call_")]
    leaving = _lone_values(root.graph, nodes)
    blocks = _blocks_in_sequences(net)
    inside = {}
    for node in nodes:
        inside[node] = [path for path in module_paths(node) if path in blocks]

    edges = {len(nodes)}
    for path in blocks:
        places = [place for place, node in enumerate(nodes) if path in inside[node]]
        if places:
            edges |= {places[0], places[-1] + 1}

    pieces: dict[str, Piece] = {}
    start = 0
    for stop in sorted(edges - {0}):
        part = nodes[start:stop]
        rest = nodes[stop:]
        if stop - 1 not in leaving or not _has_layers(part):
            continue
        if rest and not _has_layers(rest):
            continue
        name = _name_of(part, inside, pieces, last=not rest)
        pieces[name] = name, part, leaving[stop - 1]
        start = stop
    if start < len(nodes) or len(pieces) < 2:
        raise ModelError(f"{type(net).__name__} cannot be cut: it has no sequence of blocks")
    return root, list(pieces.values())


def _lone_values(graph: fx.Graph, nodes: list[fx.Node]) -> dict[int, fx.Node]:
    """By place in `nodes`: the value that is needed behind it, where that is one only.

    In ``a = conv(x); b = norm(a); c = a + b`` a is needed behind place 0, a and b behind place 1,
    c behind place 2: a network can be cut behind 0 and 2, not inside the shortcut.
    """
    images, *_, output = graph.nodes
    last_use: dict[fx.Node, int] = {}
    for place, node in enumerate([*nodes, output]):
        last_use |= dict.fromkeys(node.all_input_nodes, place)
    found = {}
    needed = {images}
    for place, node in enumerate(nodes):
        needed.add(node)
        needed = {value for value in needed if last_use.get(value, place) > place}
        if len(needed) == 1 and images not in needed:
            (found[place],) = needed
    return found


def _blocks_in_sequences(net: nn.Module) -> set[str]:
    """Paths of the elements of sequences that hold several layers, and so are blocks."""
    found = set()
    for path, element in net.named_modules():
        around, _, _ = path.rpartition(".")
        if not isinstance(net.get_submodule(around), SEQUENCES):
            continue
        if isinstance(element, (*LAYERS, *SEQUENCES)):
            continue
        layers = [module for module in element.modules() if isinstance(module, LAYERS)]
        if len(layers) > 1:
            found.add(path)
    return found


def _has_layers(nodes: Iterable[fx.Node]) -> bool:
    for node in nodes:
        if node.op == "call_module":
            module = node.graph.owning_module.get_submodule(node.target)
            if next(module.parameters(), None) is not None:
                return True
    return False


def _name_of(
    nodes: list[fx.Node], inside: Mapping[fx.Node, list[str]], taken: Container[str], *, last: bool
) -> str:
    """The innermost block that all layers of a piece lie in; else stem, head or its first layer."""
    first, *others = [node for node in nodes if _has_layers([node])]
    for path in reversed(inside[first]):
        around_all = all(path in inside[node] for node in others)
        if around_all and path not in taken:
            return path
    if not taken:
        return "stem"
    if last:
        return "head"
    return module_paths(first)[-1]


def _module_of(
    root: fx.GraphModule, nodes: Iterable[fx.Node], entry: fx.Node, leaving: fx.Node
) -> fx.GraphModule:
    """The operations `nodes` as a module that takes the value of `entry`; it shares parameters."""
    graph = fx.Graph()
    copies = {entry: graph.placeholder("x")}
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[leaving])
    return fx.GraphModule(root, graph)
