"""A per-layer latency table of the machine this runs on, and networks predicted from it.

Each distinct layer is timed alone; a network's time is an affine function of the sum of its
layers, ``slope * sum + intercept``, learnt from a handful of whole-network timings: the sum misses
what runs between layers, and counts waiting that a whole network hides.
"""

import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from dynlib.errors import TableError
from dynlib.files import MALFORMED, atomic_write, read_plain
from dynlib.points import LARGEST, as_numbers
from dynlib.space import LayerSpec

_LAYER = [field.name for field in fields(LayerSpec)]
_COLUMNS = [*_LAYER, "mean_ms", "std_ms", "count"]
_OUTLIER = 3.0  # in robust standard deviations above the median


@dataclass(frozen=True)
class LayerTable:
    """Times of layers: one row a `LayerSpec`, with mean_ms, std_ms and count of what was kept."""

    rows: pd.DataFrame

    def layers_ms(self, layers: Iterable[LayerSpec]) -> float:
        """Sum of the means of `layers`; raises `TableError` naming one that is not there."""
        times = self._times
        total_ms = 0.0
        for layer in layers:
            if layer not in times:
                raise TableError(f"no row for {layer}; the table has {len(times)} layers")
            total_ms += times[layer]
        return total_ms

    def write(self, path: str | Path) -> Path:
        """Write as CSV."""
        text = self.rows.to_csv(index=False, lineterminator="\n")
        return atomic_write(path, text)

    @classmethod
    def read(cls, path: str | Path) -> "LayerTable":
        """Read what `write` wrote; raises `TableError` for anything else."""
        try:
            rows = pd.read_csv(io.BytesIO(read_plain(path)))
        except (OSError, *MALFORMED) as error:
            raise TableError(f"{path}: cannot read the table: {error}") from error
        if list(rows) != _COLUMNS or rows.isna().any(axis=None):
            raise TableError(f"{path}: expected the full columns {_COLUMNS}")
        numbers = rows.drop(columns="op").apply(as_numbers)
        if not ((numbers >= 0) & (numbers <= LARGEST)).all(axis=None):
            raise TableError(f"{path}: expected numbers from 0 to {LARGEST:g} but for op")
        return cls(rows)

    @property
    def _times(self) -> dict[LayerSpec, float]:
        specs = (LayerSpec(*row) for row in self.rows[_LAYER].itertuples(index=False))
        return dict(zip(specs, self.rows["mean_ms"], strict=True))


def build_table(
    layers: Iterable[LayerSpec],
    make: Callable[[LayerSpec], Callable[[], object]],
    rng: np.random.Generator,
    *,
    repeats: int = 30,
    warmup: int = 3,
    synchronise: Callable[[], object] = lambda: None,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> LayerTable:
    """Time every distinct layer of `layers`.

    All layers are warmed up before the first sample, and each round of samples runs through them in
    a new random order: a machine that is still getting faster then favours no row. Samples more
    than three robust standard deviations above the median are dropped.

    Args:
        make: `make(layer)` is a callable that runs the layer once, such as `torch_layer`.
        repeats: samples a layer, one a round.
        synchronise: waits until the device is done; called before the clock is read.
        clock: nanoseconds, monotonic.

    Raises `TableError` for no layers, and for fewer than 3 repeats.
    """
    if repeats < 3 or warmup < 0:
        raise TableError(f"repeats = {repeats}, warmup = {warmup}; expected >= 3 and >= 0")
    specs = list(dict.fromkeys(layers))
    if not specs:
        raise TableError("no layers to time")
    runs = [make(layer) for layer in specs]
    for run in runs * warmup:
        run()
    samples = np.zeros((len(specs), repeats))
    for column in range(repeats):
        for row in rng.permutation(len(specs)):
            synchronise()
            start = clock()
            runs[row]()
            synchronise()
            samples[row, column] = (clock() - start) / 1e6
    rows = [asdict(layer) | _summary(times) for layer, times in zip(specs, samples, strict=True)]
    return LayerTable(pd.DataFrame(rows))


def torch_layer(layer: LayerSpec, batch: int = 1, device: str = "cpu") -> Callable[[], object]:
    """A callable that runs `layer` once in PyTorch, in float32, without gradients.

    Raises `TableError` for an op it does not know.
    """
    import torch  # only whoever measures needs it

    size, channels = layer.in_size, layer.in_channels
    shape = (batch, channels) if layer.op == "linear" else (batch, channels, size, size)
    if layer.op == "conv":
        reached = (layer.out_size - 1) * layer.stride + layer.kernel  # pixels, padding included
        module = torch.nn.Conv2d(
            channels,
            layer.out_channels,
            layer.kernel,
            layer.stride,
            padding=max(math.ceil((reached - size) / 2), 0),
            groups=layer.groups,
            bias=False,
        )
    elif layer.op == "linear":
        module = torch.nn.Linear(channels, layer.out_channels)
    elif layer.op == "pool":
        module = torch.nn.AdaptiveAvgPool2d(layer.out_size)
    else:
        raise TableError(f"op {layer.op!r}; expected conv, linear or pool")
    module, image = module.to(device).eval(), torch.randn(shape, device=device)

    def run():
        with torch.inference_mode():
            return module(image)

    return run


@dataclass(frozen=True, slots=True)
class Affine:
    """``slope * table_ms + intercept_ms``: from a sum of rows to the time of a whole network."""

    slope: float
    intercept_ms: float

    @classmethod
    def fit(cls, table_ms: Sequence[float], measured_ms: Sequence[float]) -> "Affine":
        """Least squares; raises `TableError` for fewer than two different sums."""
        if len(set(table_ms)) < 2:
            raise TableError(f"{len(table_ms)} networks; expected 2 different sums or more")
        slope, intercept = np.polyfit(table_ms, measured_ms, 1)
        return cls(float(slope), float(intercept))

    def predict(self, table_ms):
        """Time of networks with such sums, in ms."""
        return self.slope * np.asarray(table_ms, float) + self.intercept_ms


def leave_one_out(table_ms: Sequence[float], measured_ms: Sequence[float]) -> np.ndarray:
    """Predicted time of each network by the correction that the others give."""
    x, y = np.asarray(table_ms, float), np.asarray(measured_ms, float)
    predicted = []
    for i, table in enumerate(x):
        others = np.arange(len(x)) != i
        predicted.append(Affine.fit(x[others], y[others]).predict(table))
    return np.array(predicted)


def _summary(times: np.ndarray) -> dict[str, float]:
    median = np.median(times)
    spread = 1.4826 * np.median(np.abs(times - median))
    kept = times[times <= median + _OUTLIER * spread]
    return {"mean_ms": kept.mean(), "std_ms": kept.std(), "count": len(kept)}
