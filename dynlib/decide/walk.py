"""A dynamic network: every image walks over pieces of prepared static networks, until it stops.

    nets = [supernet.prepare(config) for config in (small, large)]
    walk = cascade(nets, [Sure(0.8)], example=images[:1])
    logits = walk(images)

Behind each piece a pure decision names, image by image, the next piece or stops: exits, cascades,
width gates (DS-Net, arXiv 2103.13258) and layer skips differ in their pieces alone. No weight is
copied, and a batch is sorted by decision, so that what is skipped takes no time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from dynlib.errors import ModelError
from dynlib.nets.chain import Chain, chain
from dynlib.nets.engines import NetEngine, find_engine

STOP = -1
_FIRST = torch.arange(1)  # the numbers of a batch of one


class Seen(NamedTuple):
    """What a decision looks at, of the n images that a piece has put out.

    `rows` (n,) are their numbers in the batch, `said` (n, K) what the step's head says of them.
    """

    rows: torch.Tensor
    features: torch.Tensor
    said: torch.Tensor


Decide = Callable[[Seen], torch.Tensor]  # (n,) integers: which of the step's routes


@dataclass(frozen=True)
class Step:
    """A piece of a static network, and who decides what comes after it.

    Args:
        piece: a chain, or what runs as one: takes what the step before put out, or the images.
        routes: numbers of later steps, or `STOP`: the image is answered by what the head says. The
            last one leads to the largest network.
        decide: which of the routes each image takes; none: the first.
        head: what the piece puts out -> (n, K), logits of an exit or scores of a gate; none where
            the piece ends with its network's own classifier.
        from_images: the piece begins with the first block.
        recall: weight of what was said before the image came here, which is added in logarithms of
            probabilities: two networks know more than one.
    """

    piece: Callable
    routes: Sequence[int] = (STOP,)
    decide: Decide | None = None
    head: nn.Module | None = None
    from_images: bool = False
    recall: float = 0.0

    def run(
        self, rows: torch.Tensor, x: torch.Tensor, before: torch.Tensor | None
    ) -> tuple[Seen, torch.Tensor]:
        """What the piece and its head put out, and the route of each image."""
        features = self.piece(x)
        said = features if self.head is None else self.head(features)
        if self.recall:
            said = said.log_softmax(1) + self.recall * before.log_softmax(1)
        seen = Seen(rows, features, said)
        if self.decide is None:
            return seen, torch.zeros_like(rows)
        return seen, self.decide(seen)


class Walk:
    """Images (N, 3, H, W) -> logits (N, classes), each image along its own way.

    Args:
        steps: images start at the first one, and routes lead forwards only.
        example: an image (1, 3, H, W): all steps run on it once, to see whether they fit.

    Raises:
        ModelError: a route leads backwards or nowhere, or what one step puts out is not what the
            next one takes, such as a gate's of another chain; names the step.
    """

    def __init__(self, steps: Sequence[Step], example: torch.Tensor):
        self.steps = list(steps)
        for number, step in enumerate(self.steps):
            later = {STOP, *range(number + 1, len(self.steps))}
            if not step.routes or not set(step.routes) <= later:
                raise ModelError(
                    f"step {number} leads to {list(step.routes)}; expected some of {sorted(later)}"
                )
        self.masked(example)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Run on each image only what it needs."""
        if len(images) == 1:
            return self._follow_one(images)
        logits, _ = self._follow(images)
        return logits

    @torch.inference_mode()
    def _follow_one(self, image: torch.Tensor) -> torch.Tensor:
        """Logits (1, classes): as `_follow`, without the book-keeping that one image needs not."""
        number, x, before = 0, image, None
        while number != STOP:
            step = self.steps[number]
            seen, choice = step.run(_FIRST, x, before)
            route = int(choice)
            self._check(number, {route})
            number = step.routes[route]
            if number != STOP:
                after = self.steps[number]
                x = image if after.from_images else seen.features
                before = seen.said if after.recall else None
        return seen.said

    def visits(self, images: torch.Tensor) -> torch.Tensor:
        """By which steps each image comes, (N, steps) bool."""
        _, rows = self._follow(images)
        visited = torch.zeros(len(images), len(self.steps), dtype=torch.bool)
        for number, those in enumerate(rows):
            visited[those, number] = True
        return visited

    @torch.inference_mode()
    def _follow(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (N, classes), and the numbers of the images that come to each step.

        Two of five images stop behind step 0, the others go on to step 1::

            choice of step 0: 0 1 1 0 1  ->  answers: rows 0 3   waiting[1]: rows 1 2 4
        """
        waiting: list[list] = [[] for _ in self.steps]
        waiting[0].append((torch.arange(len(images)), images, None))
        trail = []
        answers = []
        for number, step in enumerate(self.steps):
            if not waiting[number]:
                trail.append(torch.arange(0))
                continue
            rows, x, before = _joined(waiting[number])
            trail.append(rows)
            seen, choice = step.run(rows, x, before)
            for route, part in self._parted(number, choice).items():
                target = step.routes[route]
                mine = rows[part]
                if target == STOP:
                    answers.append((mine, seen.said[part]))
                    continue
                after = self.steps[target]
                goes_on = images[mine] if after.from_images else seen.features[part]
                said = seen.said[part] if after.recall else None
                waiting[target].append((mine, goes_on, said))
        rows, said = _joined(answers)
        logits = torch.empty_like(said)
        logits[rows] = said
        return logits, trail

    def _parted(self, number: int, choice: torch.Tensor) -> dict:
        """The routes that are taken, and which of the images take each of them."""
        taken = set(choice.tolist()) or {0}  # an empty batch goes the first way
        self._check(number, taken)
        if len(taken) == 1:  # nothing to look for
            return dict.fromkeys(taken, slice(None))
        return {route: (choice == route).nonzero()[:, 0] for route in sorted(taken)}

    def _check(self, number: int, taken: set[int]) -> None:
        routes = range(len(self.steps[number].routes))
        if not taken <= set(routes):
            raise ModelError(f"step {number} has {len(routes)} routes; decided {sorted(taken)}")

    @torch.inference_mode()
    def masked(self, images: torch.Tensor) -> torch.Tensor:
        """The same logits by definition: all steps on all images, mixed by who comes where."""
        rows = torch.arange(len(images))
        nobody = torch.zeros_like(rows, dtype=torch.bool)
        here = [nobody] * len(self.steps)
        here[0] = ~nobody
        entering = [images] + [None] * (len(self.steps) - 1)
        before = [None] * len(self.steps)
        logits = None
        for number, step in enumerate(self.steps):
            x = images if step.from_images else entering[number]
            if x is None:
                raise ModelError(f"no route leads to step {number}")
            try:
                seen, choice = step.run(rows, x, before[number])
                for route, target in enumerate(step.routes):
                    mine = here[number] & (choice == route)
                    if target == STOP:
                        logits = _mixed(mine, seen.said, logits)
                        continue
                    here[target] = here[target] | mine
                    if not self.steps[target].from_images:
                        entering[target] = _mixed(mine, seen.features, entering[target])
                    if self.steps[target].recall:
                        before[target] = _mixed(mine, seen.said, before[target])
            except (RuntimeError, IndexError, AttributeError) as error:
                raise ModelError(f"step {number} does not fit those before it: {error}") from error
        return logits


def _joined(parts: Sequence[tuple]) -> Sequence:
    if len(parts) == 1:
        return parts[0]
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else torch.cat(column) for column in columns]


def _mixed(mine: torch.Tensor, new: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
    """`new` of the images that are `mine` (N,), `old` or zeros of the others."""
    where = mine.view(-1, *[1] * (new.ndim - 1))
    return torch.where(where, new, torch.zeros_like(new) if old is None else old)


def cascade(
    nets: Sequence[nn.Module],
    rules: Sequence[Decide],
    example: torch.Tensor,
    recall: float = 0.0,
) -> Walk:
    """Prepared networks, smallest first; behind each but the last a rule: 0 stop, 1 go on.

    An image that goes on starts again with the next network, which recalls what the one before said
    with that weight.
    """
    *early, last = map(chain, nets)
    steps = []
    for number, (net, rule) in enumerate(zip(early, rules, strict=True)):
        remembers = recall if number else 0.0
        steps.append(Step(net, (STOP, number + 1), rule, None, True, remembers))
    return Walk([*steps, Step(last, from_images=True, recall=recall)], example)


def with_exits(
    net: nn.Module,
    behind: Sequence[str],
    heads: Sequence[nn.Module],
    rules: Sequence[Decide],
    example: torch.Tensor,
    recall: float = 0.0,
    engine: str = "torch",
) -> Walk:
    """A prepared network with exits behind the named blocks, each with its rule: 0 leave, 1 go on.

    Each exit, and the network's end, recalls with that weight what was said before it.

    Args:
        engine: what runs pieces and exits, by name as in `dynlib.nets.engines`; all but ``torch``
            make copies of the weights.

    Raises `ModelError` as `cut`, `Walk` and the engine do.
    """
    pieces = chain(net).cut(behind)
    if engine != "torch":
        pieces, heads = _on_engine(find_engine(engine), net, pieces, heads, example)
    *pieces, rest = pieces
    steps = []
    exits = zip(pieces, heads, rules, strict=True)
    for number, (piece, head, rule) in enumerate(exits, start=1):
        remembers = recall if steps else 0.0
        steps.append(Step(piece, (STOP, number), rule, head, recall=remembers))
    return Walk([*steps, Step(rest, recall=recall)], example)


class _Piece(nn.Module):
    """A piece that owns the parameters of its network, as an engine wants them."""

    def __init__(self, net: nn.Module, piece: Chain):
        super().__init__()
        self.net = net
        self.piece = piece

    def forward(self, x):
        return self.piece(x)


def _on_engine(engine: NetEngine, net: nn.Module, pieces, heads, example: torch.Tensor):
    """The pieces of a network and the exits behind them, as callables of an engine."""
    ran, said = [], []
    with torch.no_grad():
        for piece, head in zip(pieces, [*heads, None], strict=True):
            ran.append(engine.prepare(_Piece(net, piece).eval(), example))
            example = piece(example)
            if head is not None:
                said.append(engine.prepare(head, example))
    return ran, said


def gated(
    nets: Sequence[nn.Module],
    behind: str,
    gate: nn.Module,
    decide: Decide,
    example: torch.Tensor,
) -> Walk:
    """Prepared networks, smallest first, that are the same up to a block: behind it a gate chooses.

    Args:
        gate: what that block puts out -> scores (n, len(nets)).

    Raises `ModelError` as `cut` and `Walk` do.
    """
    ends = [chain(net).cut([behind]) for net in nets]
    trunk, _ = ends[-1]
    routes = range(1, len(nets) + 1)
    rests = [Step(rest) for _, rest in ends]
    return Walk([Step(trunk, tuple(routes), decide, gate), *rests], example)


def one_of(
    blocks: Sequence[Callable], gate: nn.Module, decide: Decide, example: torch.Tensor
) -> Walk:
    """A block of a chain that is one of several, the least first: images choose before it.

    A block's shortcut and itself are layer skipping (LAUDNet, arXiv 2308.15949), itself at several
    widths are nested channels.

    Args:
        gate: what comes to the block -> scores (n, len(blocks)), or a layer masker's logits.
        example: what comes to the block, of one image.

    Raises `ModelError` as `Walk` does.
    """
    routes = range(1, len(blocks) + 1)
    ways = [Step(block) for block in blocks]
    return Walk([Step(Chain({}), tuple(routes), decide, gate), *ways], example)
