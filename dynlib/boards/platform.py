"""A GPU under three clocks: its own, the memory's, and that of the CPU that launches layers."""

import itertools
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
        cpu = board.unit(cluster) if cluster else board.cpus[0]
        gpu, memory = board.gpu, board.memory
        if gpu is None or gpu.cost is None or memory is None or board.static_mw is None:
            raise BoardError(f"board {board.name!r} needs GPU, memory clocks and models of both")
        self.board, self.gpu = board, gpu
        self.memory_power_share = memory_power_share
        self.source: Source = weakest(board.source([cpu.name, gpu.name]), "estimated")
        clocks = [cpu.freqs, gpu.freqs, [opp.freq_mhz for opp in memory.opps]]
        self.shape = tuple(map(len, clocks))
        self.settings = np.array(list(itertools.product(*clocks)))
        slower = self.settings.max(axis=0) / self.settings
        slower_cpu, slower_gpu, slower_memory = slower.T
        m = gpu.memory_share
        self._launch = slower_cpu
        self._work = (1 - m) * slower_gpu + m * slower_memory
        saved_mw = board.static_mw * memory_power_share * (1 - 1 / slower_memory)
        waiting_mw, working_mw = [], []
        for cpu_mhz, gpu_mhz, _ in self.settings:
            held = {cpu.name: cpu_mhz, gpu.name: gpu_mhz}
            waiting_mw.append(board.power_mw(held, {cpu.name: 1.0}))
            working_mw.append(gpu.power_mw(gpu_mhz, 1.0) - gpu.power_mw(gpu_mhz, 0.0))
        self._waiting_mw = np.array(waiting_mw) - saved_mw
        self._working_mw = np.array(working_mw)

    def cost(self, layers: Sequence[LayerSpec], batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Time (ms) and energy (mJ) of a batch through `layers` at every setting; both (F,)."""
        launch_us = self.gpu.cost.overhead_us
        quiet = replace(self.gpu.cost, overhead_us=0.0)
        ms = np.zeros(len(self.settings))
        busy_ms = np.zeros(len(self.settings))
        for layer in layers:
            work_ms = layer_us(layer, quiet, batch) / 1e3 * self._work
            launched = layer.op in ("conv", "linear")
            launch_ms = launched * launch_us / 1e3 * self._launch
            ms += np.maximum(work_ms, launch_ms)
            busy_ms += work_ms
        energy_mj = (ms * self._waiting_mw + busy_ms * self._working_mw) / 1e3
        return ms, energy_mj
