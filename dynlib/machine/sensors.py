"""The sensors that Linux shows as files: clocks, power, energy, temperature, utilisation.

Every quantity is converted to the unit in its sensor's kind here. A rail that contains others
(VDD_IN, POM_5V_IN, psys) is the whole board's power; without one it is the sum of the rails.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from dynlib.machine.control import Knob, Parts, Sensor
from dynlib.machine.knobs import ClockKnob, EmcKnob
from dynlib.sysfs import SysFs

_INPUT = re.compile(r"VDD_IN|POM_5V_IN|VIN$", re.IGNORECASE)
_DECIMAL = re.compile(r"\d{1,9}(\.\d{1,9})?")
_GPU_LOAD = ("sys/devices/gpu.0/load", "sys/devices/*/load", "sys/devices/platform/*/load")
_POWER_STALE = 50  # a meter's last digit moves: so many equal readings mean that it is stuck


def find_sensors(fs: SysFs, knobs: Iterable[Knob] = ()) -> Parts:
    """Every sensor below the root, and which kinds are missing."""
    sensors = [
        Sensor(f"{knob.unit}.clock", "clock_mhz", knob.get, 0.001)
        for knob in knobs
        if isinstance(knob, ClockKnob | EmcKnob)
    ]
    rails = _ina3221(fs) + _ina3221_iio(fs) + _ina231(fs)
    whole = [rail for rail in rails if _INPUT.search(rail.name)]
    for rail in whole or rails:
        rail.total = True
    sensors += rails + _rapl(fs) + _zones(fs) + _utilisation(fs)
    if not any(sensor.total for sensor in sensors):
        sensors += _battery(fs)
    names: dict[str, int] = {}
    for sensor in sensors:  # two zones may share a name
        count = names[sensor.name] = names.get(sensor.name, 0) + 1
        sensor.name += f".{count}" if count > 1 else ""
    lacks = [
        f"{what}: no sensor"
        for what, kinds in (("power", ("power_mw", "energy_mj")), ("temperature", ("temp_c",)))
        if not any(sensor.kind in kinds for sensor in sensors)
    ]
    lacks += _unreadable(fs)
    return Parts(sensors=sensors, lacks=lacks)


def _scaled(fs: SysFs, path: str, per_unit: float) -> Callable[[], float]:
    return lambda: fs.number(path) / per_unit


def _product(fs: SysFs, volts: str, amps: str) -> Callable[[], float]:
    """MV times mA, in mW."""
    return lambda: fs.number(volts) * fs.number(amps) / 1000


def _ina3221(fs: SysFs) -> list[Sensor]:
    """JetPack 5 and later, mainline hwmon: mV and mA. Channel 7 and in4-6 are sums of shunts."""
    rails = []
    for hwmon in fs.glob("sys/class/hwmon/hwmon*"):
        if "ina3221" not in fs.words(f"{hwmon}/name"):
            continue
        for channel in (1, 2, 3):
            label = " ".join(fs.words(f"{hwmon}/in{channel}_label"))
            volts, amps = f"{hwmon}/in{channel}_input", f"{hwmon}/curr{channel}_input"
            if "NC" in label.split() or not fs.exists(amps):
                continue
            rails.append(_rail(label or f"{Path(hwmon).name}.{channel}", _product(fs, volts, amps)))
    return rails


def _ina3221_iio(fs: SysFs) -> list[Sensor]:
    """JetPack 4: mW."""
    rails = []
    for file in fs.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-2]"):
        folder, channel = str(Path(file).parent), file[-1]
        label = " ".join(fs.words(file))
        if "NC" not in label.split():
            rails.append(_rail(label, _scaled(fs, f"{folder}/in_power{channel}_input", 1.0)))
    return rails


def _ina231(fs: SysFs) -> list[Sensor]:
    """Odroid XU3: the vendor's driver in W, mainline (any ina2xx hwmon) in uW."""
    addresses = {"0040": "a15", "0041": "memory", "0044": "gpu", "0045": "a7"}
    rails = []
    for file in fs.glob("sys/bus/i2c/drivers/INA231/*/sensor_W"):
        address = Path(file).parent.name.rpartition("-")[2]

        def watts(path=file) -> float:
            text = fs.read(path)
            if not _DECIMAL.fullmatch(text):
                raise ValueError(f"{path}: {text[:40]!r}; expected watts")
            return 1000 * float(text)

        rails.append(_rail(addresses.get(address, address), watts))
    for file in fs.glob("sys/class/hwmon/hwmon*/power1_input"):
        folder = str(Path(file).parent)
        chip = "".join(fs.words(f"{folder}/name"))
        if chip.startswith("ina2"):
            address = Path(fs.path(f"{folder}/device")).resolve().name.rpartition("-")[2]
            name = addresses.get(address, f"{chip}.{Path(folder).name}")
            rails.append(_rail(name, _scaled(fs, file, 1000.0)))
    return rails


def _rail(label: str, fetch: Callable[[], float]) -> Sensor:
    return Sensor(f"{label}.power", "power_mw", fetch, 0.1, stale_after=_POWER_STALE)


def _rapl(fs: SysFs) -> list[Sensor]:
    """Intel and AMD energy counters, uJ. The whole is psys, else the packages and their DRAM."""
    sensors = []
    for zone in fs.glob("sys/class/powercap/intel-rapl:*"):
        try:
            span = fs.number(f"{zone}/max_energy_range_uj") / 1000
        except (OSError, ValueError):
            span = 0.0
        name = "".join(fs.words(f"{zone}/name")) or Path(zone).name
        if fs.exists(f"{zone}/energy_uj"):
            sensors.append(Sensor(
                f"{name}.energy", "energy_mj", _scaled(fs, f"{zone}/energy_uj", 1000.0), 0.001,
                total=name.startswith(("package", "dram")), span_mj=span if span > 0 else None,
            ))  # fmt: skip
    psys = [sensor for sensor in sensors if sensor.name == "psys.energy"]
    for sensor in sensors if psys else ():
        sensor.total = sensor in psys
    return sensors


def _zones(fs: SysFs) -> list[Sensor]:
    """Thermal zones, thousandths of a degree."""
    return [
        Sensor("".join(fs.words(f"{zone}/type")) or Path(zone).name, "temp_c",
               _scaled(fs, f"{zone}/temp", 1000.0), 0.5)
        for zone in fs.glob("sys/class/thermal/thermal_zone*")
        if fs.exists(f"{zone}/temp")
    ]  # fmt: skip


def _battery(fs: SysFs) -> list[Sensor]:
    """A phone's or laptop's battery: uA times uV. Vendors differ in the sign of the current.

    Only while it is discharged is that what the board draws.
    """

    def power(folder: str) -> Callable[[], float]:
        amps, volts = f"{folder}/current_now", f"{folder}/voltage_now"

        def draws() -> float:
            if (status := fs.words(f"{folder}/status")) not in ([], ["Discharging"]):
                raise ValueError(f"{folder}: {' '.join(status)}; expected Discharging")
            return abs(fs.number(amps)) * fs.number(volts) / 1e9

        return draws

    return [
        Sensor(f"{Path(file).parent.name}.power", "power_mw", power(str(Path(file).parent)), 1.0,
               total=True)
        for file in fs.glob("sys/class/power_supply/*/current_now")
        if fs.words(f"{Path(file).parent}/type") in ([], ["Battery"])
    ]  # fmt: skip


def _utilisation(fs: SysFs) -> list[Sensor]:
    """Busy share of all CPUs since the last reading, and the load that a Jetson's GPU shows."""
    sensors = []
    if fs.exists("proc/stat"):
        last: list[int] = []

        def busy_pct() -> float:
            ticks = [int(word) for word in fs.read("proc/stat").split("\n")[0].split()[1:9]]
            before, last[:] = last or [0] * 8, ticks
            total = sum(ticks) - sum(before)
            if total <= 0:
                raise ValueError("proc/stat: no tick since the last reading")
            idle = ticks[3] + ticks[4] - before[3] - before[4]
            return min(max(100 * (1 - idle / total), 0.0), 100.0)

        sensors.append(Sensor("cpu.util", "util_pct", busy_pct, 0.01))
    gpu = [file for pattern in _GPU_LOAD for file in fs.glob(pattern)]
    return sensors + [
        Sensor("gpu.util", "util_pct", _scaled(fs, file, 10.0), 0.02) for file in gpu[:1]
    ]


def _unreadable(fs: SysFs) -> list[str]:
    for file in fs.glob("sys/class/powercap/intel-rapl:*/energy_uj")[:1]:
        try:
            fs.read(file)
        except OSError as error:
            return [f"energy: {file}: {error.strerror} (root only since Linux 5.10)"]
    return []
