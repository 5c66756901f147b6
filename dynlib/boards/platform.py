"""A GPU under three clocks: its own, the memory's, and that of the CPU that launches layers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dynlib.boards.board import Board
from dynlib.boards.latency import layer_us
from dynlib.errors import BoardError
from dynlib.source import Source, weakest
from dynlib.space import LayerSpec

MEMORY_POWER_SHARE = 0.25  # a guess: of a board's static power, what follows the memory clock


class Platform:
    """A board that runs networks on its GPU, launched by one CPU cluster: F settings of 3 clocks.

    A layer takes as long as its launch, which the CPU clock stretches, or its work, of which the
    memory clock stretches the unit's `memory_share` and the GPU clock the rest:

    ``t = max(o * C/c, w * ((1 - m) * G/g + m * M/e))``, capitals the highest clocks,

    so at the highest CPU and memory clocks it is what `dynlib.boards.latency` says, launches
    apart. One CPU core waits for the GPU, and `memory_power_share` of the static power follows the
    memory clock. No board publishes that share or splits the two clocks: what is computed from them
    is `estimated`.

    Attributes:
        settings: MHz of CPU, GPU and memory, (F, 3).
    """

    def __init__(
        self, board: Board, cluster: str = "", memory_power_share: float = MEMORY_POWER_SHARE
    ):
        """Raises `BoardError` for a board without GPU, memory clocks or a cost model."""
        cpu, gpu = board.unit(cluster) if cluster else board.cpus[0], board.gpu
        if gpu is None or gpu.cost is None or board.memory is None or board.static_mw is None:
            raise BoardError(f"board {board.name!r} needs GPU, memory clocks and models of both")
        self.board, self.gpu = board, gpu
        self.source: Source = weakest(board.source([cpu.name, gpu.name]), "estimated")
        lists = cpu.freqs, gpu.freqs, tuple(opp.freq_mhz for opp in board.memory.opps)
        self.shape = tuple(map(len, lists))
        self.settings = np.stack([m.ravel() for m in np.meshgrid(*lists, indexing="ij")], 1)
        slower = self.settings.max(axis=0) / self.settings
        m = gpu.memory_share
        self._launch, self._work = slower[:, 0], (1 - m) * slower[:, 1] + m * slower[:, 2]
        saved_mw = board.static_mw * memory_power_share * (1 - 1 / slower[:, 2])
        self._waiting_mw = np.array([
            board.power_mw({cpu.name: c, gpu.name: g}, {cpu.name: 1.0}) for c, g, _ in self.settings
        ]) - saved_mw  # fmt: skip
        self._working_mw = np.array(
            [gpu.power_mw(g, 1.0) - gpu.power_mw(g, 0.0) for g in self.settings[:, 1]]
        )

    def cost(self, layers: Sequence[LayerSpec], batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Time (ms) and energy (mJ) of a batch through `layers` at every setting; both (F,)."""
        quiet = replace(self.gpu.cost, overhead_us=0.0)
        ms, busy_ms = np.zeros(len(self.settings)), np.zeros(len(self.settings))
        for layer in layers:
            work = layer_us(layer, quiet, batch) / 1e3 * self._work
            launched = layer.op in ("conv", "linear")
            ms += np.maximum(work, launched * self.gpu.cost.overhead_us / 1e3 * self._launch)
            busy_ms += work
        return ms, (ms * self._waiting_mw + busy_ms * self._working_mw) / 1e3
