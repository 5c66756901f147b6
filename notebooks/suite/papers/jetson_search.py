"""The published Jetson search problem, replayed: encoding, accuracy predictor, latency tables.

OFA-MobileNetV3 (width 1.2) has 20 blocks in five stages; Dynamic-OFA (arXiv 2105.03596) searches
their kernels, expansions and depths and the input resolution, with once-for-all's accuracy
predictor (arXiv 1908.09791) and the sums of a measured latency table.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch.nn import functional as F

from dynlib.errors import CheckpointError
from dynlib.files import data_places
from dynlib.space import SearchSpace, SubnetConfig
from suite.papers.jetson_tables import (
    DEPTHS,
    EXPANSIONS,
    KERNELS,
    PLACES,
    STAGES,
    OperatorTables,
    TableGrid,
    grid,
    network_keys,
    read_tables,
)

SPACE = SearchSpace(
    resolution=(160, 176, 192, 208, 224),
    depth=(DEPTHS,) * len(STAGES),
    kernel=(KERNELS,) * PLACES,
    expand=(EXPANSIONS,) * PLACES,
)
CHOICES = np.array([len(choices) for _, choices in SPACE.axes()])
# Genes that one place of the network shares, for crossover: kernel and expansion of a block.
PLACE_OF_GENE = np.r_[: 1 + len(STAGES), [1 + len(STAGES) + i % PLACES for i in range(2 * PLACES)]]
KIND_OF_GENE = np.repeat(range(4), (1, len(STAGES), PLACES, PLACES))
FEATURES = 128
_FOLDER, _PREDICTOR = "jetson_xavier_nx", "ofa_mbv3_w12_accuracy_predictor.safetensors"
_LAYERS, _HIDDEN = ("0", "2", "4", "6"), 400
_PAIRS, _CODES = PLACES // 2, 10  # a block is absent or has one of 9 shapes
_BLOCK = 512  # networks at a time; their activations stay in the second-level cache


def find_published(data_dir: str | Path = "") -> Path | None:
    """The folder of the published tables and predictor, or None where there is none.

    Looked for in `data_dir`, in ``$DYNLIB_DATA`` and in the repository's ``data/``.
    """
    folders = (place / _FOLDER for place in data_places(data_dir))
    return next((f for f in folders if (f / _PREDICTOR).is_file()), None)


def read_predictor(path: str | Path) -> dict[str, np.ndarray]:
    """Weights of the published MLP, 128 -> 400 -> 400 -> 400 -> 1; raises `CheckpointError`."""
    try:
        weights = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot read the accuracy predictor: {error}") from error
    sizes = (FEATURES, _HIDDEN, _HIDDEN, _HIDDEN, 1)
    shapes = {}
    for layer, size, out in zip(_LAYERS, sizes[:-1], sizes[1:], strict=True):
        shapes[f"{layer}.weight"] = (out, size)
        shapes[f"{layer}.bias"] = (out,)
    for name, shape in shapes.items():
        got = weights[name].shape if name in weights else None
        if got != shape:
            raise CheckpointError(f"{path}: {name} has shape {got}, expected {shape}")
    return weights


def features(config: SubnetConfig) -> np.ndarray:
    """What the predictor sees of a sub-network: 128 zeros and ones (float32).

    Positions 0-59 one-hot kernels of the 20 places, 60-119 expansions, both zero where a place is
    deeper than its stage; 120-127 the resolution, 112 to 224 in steps of 16.
    """
    ones = [_resolution_one(config.resolution)]
    for place in range(PLACES):
        stage, number = divmod(place, 4)
        if number < config.depth[stage]:
            kernel = KERNELS.index(config.kernel[place])
            expand = EXPANSIONS.index(config.expand[place])
            ones += [3 * place + kernel, 60 + 3 * place + expand]
    vector = np.zeros(FEATURES, np.float32)
    vector[ones] = 1
    return vector


def _resolution_one(resolution: int) -> int:
    """Position of the one that stands for a resolution among the `features`."""
    return 120 + (resolution - 112) // 16


def genes(configs: Iterable[SubnetConfig]) -> np.ndarray:
    """Sub-networks as a matrix (N, 46) of choice indices, in the order of ``SPACE.axes()``."""
    return np.array([SPACE.encode(config) for config in configs], np.int8)


def canonical_genes(population: np.ndarray) -> np.ndarray:
    """The same networks with index 0 at places that are not used: equal rows, equal networks."""
    sizes, blocks = population[:, :6], population[:, 6:]
    active = np.tile(_active(population), 2)
    return np.concatenate([sizes, blocks * active], axis=1)


def _active(population: np.ndarray) -> np.ndarray:
    """Which of the 20 places each network uses, (N, 20)."""
    depth = population[:, 1:6] + DEPTHS[0]
    return np.arange(PLACES) % 4 < np.repeat(depth, 4, axis=1)


class Evaluator:
    """Predicted accuracy and table latency on one unit, for many networks at once.

    The first layer of the predictor and the table are sums over blocks, so both are looked up for
    two blocks at a time (100 shapes a pair); only the two 400 x 400 layers are multiplied out.
    """

    def __init__(self, tables: OperatorTables, weights: Mapping[str, np.ndarray]):
        self.tables, self.weights = tables, weights
        self._first, self._block_ms, self._fixed_ms = _by_pair(grid(tables), weights)
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
        self._hidden = []
        for layer in _LAYERS[1:3]:
            self._hidden.append((tensors[f"{layer}.bias"], tensors[f"{layer}.weight"].T))
        self._out = tensors["6.weight"][0], tensors["6.bias"]

    @classmethod
    def load(cls, folder: str | Path, unit: str = "gpu") -> "Evaluator":
        """Read ``latency_<unit>.csv`` and the predictor of a folder (`find_published`)."""
        return cls(read_tables(folder, unit), read_predictor(Path(folder) / _PREDICTOR))

    def __call__(self, population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted accuracy in percent and latency in ms, each (N,), of choice indices (N, 46)."""
        parts = range(0, len(population), _BLOCK)
        results = [self._evaluate(population[i : i + _BLOCK]) for i in parts]
        accuracy, latency = zip(*results, strict=True)
        return np.concatenate(accuracy), np.concatenate(latency)

    def _evaluate(self, population: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        r = population[:, :1].astype(np.int64)
        kernel, expand = population[:, 6:26], population[:, 26:]
        code = (1 + 3 * kernel + expand) * _active(population)
        first, second = code[:, ::2].astype(np.int64), code[:, 1::2]
        pair = _CODES * first + second + _CODES**2 * np.arange(_PAIRS)
        latency = self._fixed_ms[r[:, 0]] + self._block_ms[r, pair].sum(axis=1)
        # The rows of the first layer: one for each pair of blocks, then one for the resolution.
        rows = np.concatenate([pair, _CODES**2 * _PAIRS + r], axis=1)
        with torch.inference_mode():
            x = F.embedding_bag(torch.from_numpy(rows), self._first, mode="sum").relu_()
            for bias, weight in self._hidden:
                x = torch.addmm(bias, x, weight).relu_()
            weight, bias = self._out
            return 100 * (x @ weight + bias).numpy(), latency

    def one(self, config: SubnetConfig) -> tuple[float, float]:
        """The same for one network, row by row as the tables and the predictor define it."""
        rows = self.tables[config.resolution]
        keys = network_keys(config.resolution, config.depth, config.kernel, config.expand)
        x = features(config)
        for layer in _LAYERS[:-1]:
            weight, bias = self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"]
            x = np.maximum(weight @ x + bias, 0)
        accuracy = self.weights["6.weight"][0] @ x + self.weights["6.bias"][0]
        return 100 * float(accuracy), sum(rows[key] for key in keys)


def _by_pair(table: TableGrid, weights: Mapping[str, np.ndarray]):
    """First layer (1005, 400), times of pairs (5, 1000) and fixed times (5,), all by index."""
    r = np.searchsorted(table.resolutions, SPACE.resolution)
    missing = set(SPACE.resolution) - set(table.resolutions.tolist())
    if missing:
        raise CheckpointError(f"the latency tables lack resolutions {sorted(missing)}")
    columns, bias = weights["0.weight"].T, weights["0.bias"]
    first = np.zeros((_PAIRS, _CODES**2, _HIDDEN), np.float32)
    times = np.zeros((len(r), _PAIRS, _CODES**2))
    for place, k, e in np.ndindex(PLACES, len(KERNELS), len(EXPANSIONS)):
        pair, second = divmod(place, 2)
        code = 1 + 3 * k + e
        # All shapes of the pair in which this place has this code.
        among = np.s_[code::_CODES] if second else np.s_[_CODES * code : _CODES * (code + 1)]
        first[pair, among] += columns[3 * place + k] + columns[60 + 3 * place + e]
        times[:, pair, among] += table.block_ms[r, place, k, e][:, None]
    ones = [_resolution_one(resolution) for resolution in SPACE.resolution]
    first = np.concatenate([first.reshape(-1, _HIDDEN), columns[ones] + bias])
    return torch.from_numpy(first), times.reshape(len(r), -1), table.fixed_ms[r]
