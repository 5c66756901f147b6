"""Show a sub-network no more images than it takes to see that it is not worth keeping.

Optuna prunes trials of one objective only: with several, `Trial.report` and `should_prune` raise.
Here it is the evaluation that ends early, and its trial is told what it was worth until then:
samplers learn from that as from any other, and from a pruned trial they would not.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from scipy.stats import hypergeom

from dynlib.errors import SearchError
from dynlib.space import SubnetConfig

Costs = Mapping[str, float]


class StopHopeless:
    """An objective for `search` that shows images to a sub-network while it may be on the front.

    Costs are known before any image is shown. The rivals of a sub-network are those that were shown
    all N images and cost no more in anything; the best of them is right about K. Were this one as
    good, at most k of its first n images, drawn without putting back, would be right with

    ``P(X <= k),  X ~ hypergeometric(N, K, n)``.

    Where that is below `risk`, it is stopped: a race (Maron and Moore 1994) against the front.

    Args:
        answers: of a sub-network, which images it is right about (bool), part after part, in one
            random order for all. A part that is not asked for need not be computed.
        costs: of a sub-network, each the better the lower.
        images: N, of all parts together.
        risk: at each look, of stopping one that is as good as its best rival; 0 stops none that
            could still be. Several times that over all parts.

    Each process of a search knows the rivals that it measured itself.

    The first of two equally fast networks is right about 90 of 100 images, the second about 4 of
    its first 10. Of 10 drawn from 90 right and 10 wrong, so few are right less than once in a
    thousand times, so that the other 90 are not shown:

    >>> right = {8: (9, 81), 16: (4, 60)}
    >>> def answers(config):
    ...     for shown, good in zip((10, 90), right[config.width[0]]):
    ...         yield np.arange(shown) < good
    >>> measure = StopHopeless(answers, lambda config: {"latency_ms": 1.0}, images=100)
    >>> measure(SubnetConfig(32, width=(8,)))
    {'latency_ms': 1.0, 'accuracy_val_pct': 90.0, 'images': 100}
    >>> measure(SubnetConfig(32, width=(16,)))
    {'latency_ms': 1.0, 'accuracy_val_pct': 40.0, 'images': 10}
    """

    def __init__(
        self,
        answers: Callable[[SubnetConfig], Iterable[np.ndarray]],
        costs: Callable[[SubnetConfig], Costs],
        *,
        images: int,
        risk: float = 0.05,
    ):
        self.answers = answers
        self.costs = costs
        self.images = images
        self.risk = risk
        self._measured: list[tuple[Costs, int]] = []  # costs, and how many of all are right

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        """Its costs, ``accuracy_val_pct`` of the images shown, and their number, ``images``.

        What is stopped is less accurate than a rival, so on no front. Raises `SearchError` where
        `answers` has another number of images.
        """
        costs = self.costs(config)
        best = self._best_rival(costs)
        shown = right = 0
        for part in self.answers(config):
            shown += len(part)
            right += int(np.count_nonzero(part))
            chance = hypergeom.cdf(right, self.images, best, shown)
            if chance < self.risk:
                break
        else:
            if shown != self.images:
                raise SearchError(f"{config}: answers to {shown} images, expected {self.images}")
            self._measured.append((costs, right))
        return {**costs, "accuracy_val_pct": 100 * right / shown, "images": shown}

    def _best_rival(self, costs: Costs) -> int:
        """How many images the best network that costs no more is right about; 0 without one."""
        rivals = []
        for theirs, right in self._measured:
            if all(theirs[key] <= cost for key, cost in costs.items()):
                rivals.append(right)
        return max(rivals, default=0)
