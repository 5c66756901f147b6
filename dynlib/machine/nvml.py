"""NVIDIA's desktop and server GPUs, through nvidia-ml-py where it is installed.

NVML knows no read-back of locked clocks and no way to ask whether any are locked, so the way back
is its own reset; an application-clock or power limit is put back to the value it had.
"""

import errno

from dynlib.machine.control import Knob, MachineUnit, Missing, Parts, Sensor, Undo

_READ_ONLY = "this driver or GPU does not offer it"


def nvml_parts() -> Parts:
    """Units, knobs and sensors of every GPU."""
    library = _library()
    if isinstance(library, Missing):
        return Parts(lacks=[f"NVIDIA GPU: {library.reason}"])
    parts = Parts()
    try:
        library.nvmlInit()
        count = library.nvmlDeviceGetCount()
    except library.NVMLError as error:
        return Parts(lacks=[f"NVIDIA GPU: {error}"])
    for index in range(count):
        try:
            parts += _gpu(library, index)
        except library.NVMLError as error:
            parts.lacks.append(f"nvidia{index}: {error}")
    return parts


def _gpu(library, index: int) -> Parts:
    name = f"nvidia{index}"
    handle = library.nvmlDeviceGetHandleByIndex(index)
    parts = Parts([MachineUnit(name, "gpu")])
    for knob in (_LockedClock, _PowerLimit):
        try:
            parts.knobs.append(knob(library, handle, name, index))
        except (library.NVMLError, ValueError) as error:  # ValueError: lists no clocks
            parts.lacks.append(f"{name}.{knob.kind}: {error} ({_READ_ONLY})")
    for sensor in _sensors(library, handle, name):
        try:
            sensor.fetch()
        except (OSError, ValueError) as error:
            parts.lacks.append(f"{sensor.name}: {error}")
        else:
            parts.sensors.append(sensor)
    return parts


def _library():
    try:
        import pynvml
    except ImportError:
        return Missing("nvidia-ml-py is not installed")
    return pynvml


class _NvmlKnob(Knob):
    def __init__(self, library, handle, unit: str, index: int):
        self.library, self.handle, self.unit, self.index = library, handle, unit, index
        self.find()

    def call(self, name: str, *arguments):
        try:
            return getattr(self.library, name)(self.handle, *arguments)
        except self.library.NVMLError as error:
            # denied is final, as EPERM is; whatever else may pass
            denied = isinstance(error, getattr(self.library, "NVMLError_NoPermission", ()))
            raise OSError(errno.EACCES if denied else errno.EIO, str(error)) from error


class _LockedClock(_NvmlKnob):
    kind = "clock_mhz"

    def find(self) -> None:
        memory = self.library.nvmlDeviceGetSupportedMemoryClocks(self.handle)
        clocks = self.library.nvmlDeviceGetSupportedGraphicsClocks(self.handle, max(memory))
        self.choices = tuple(sorted(float(mhz) for mhz in clocks))

    def get(self) -> float:
        return float(self.call("nvmlDeviceGetClockInfo", self.library.NVML_CLOCK_GRAPHICS))

    def put(self, value: float) -> None:
        self.call("nvmlDeviceSetGpuLockedClocks", round(value), round(value))

    def undo(self) -> list[Undo]:
        return [Undo("nvml", f"{self.index}.clock", "reset")]


class _PowerLimit(_NvmlKnob):
    kind = "power_limit_mw"

    def find(self) -> None:
        low, high = self.library.nvmlDeviceGetPowerManagementLimitConstraints(self.handle)
        self.bounds = float(low), float(high)

    def get(self) -> float:
        return float(self.call("nvmlDeviceGetPowerManagementLimit"))

    def put(self, value: float) -> None:
        self.call("nvmlDeviceSetPowerManagementLimit", round(value))

    def undo(self) -> list[Undo]:
        return [Undo("nvml", f"{self.index}.power_limit", str(round(self.get())))]


def _sensors(library, handle, name: str) -> list[Sensor]:
    def reader(function: str, *arguments, item=None):
        def read() -> float:
            try:
                value = getattr(library, function)(handle, *arguments)
            except library.NVMLError as error:
                raise ValueError(str(error)) from error
            return float(getattr(value, item) if item else value)

        return read

    clock = reader("nvmlDeviceGetClockInfo", library.NVML_CLOCK_GRAPHICS)
    power = reader("nvmlDeviceGetPowerUsage")
    # mJ since the driver was loaded, renewed every 20-100 ms (Volta and later)
    energy = reader("nvmlDeviceGetTotalEnergyConsumption")
    temp = reader("nvmlDeviceGetTemperature", library.NVML_TEMPERATURE_GPU)
    util = reader("nvmlDeviceGetUtilizationRates", item="gpu")
    return [
        Sensor(f"{name}.clock", "clock_mhz", clock, 0.02),
        Sensor(f"{name}.power", "power_mw", power, 0.1),
        Sensor(f"{name}.energy", "energy_mj", energy, 0.1),
        Sensor(f"{name}.temp", "temp_c", temp, 0.5),
        Sensor(f"{name}.util", "util_pct", util, 0.2),
    ]


def undo(step: Undo) -> bool:
    """Take back a step of these knobs, in whatever process; false where NVML is not there."""
    library = _library()
    if isinstance(library, Missing):
        return False
    index, _, what = step.target.partition(".")
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByIndex(int(index))
        if what == "clock":
            library.nvmlDeviceResetGpuLockedClocks(handle)
            return True
        limit_mw = int(step.value)
        if library.nvmlDeviceGetPowerManagementLimit(handle) != limit_mw:
            library.nvmlDeviceSetPowerManagementLimit(handle, limit_mw)
    except library.NVMLError as error:
        raise PermissionError(1, str(error)) from error
    return True
