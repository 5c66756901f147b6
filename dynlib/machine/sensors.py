"""The sensors that Linux shows as files: clocks, power, energy, temperature, utilisation.

Every quantity is converted to the unit in its sensor's kind here. A rail that contains others
(VDD_IN, POM_5V_IN, psys) is the whole board's power; without one it is the sum of the rails.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from dynlib.machine.control import Knob, Parts, Sensor
from dynlib.machine.knobs import ClockKnob, EmcKnob
from dynlib.sysfs import SysFs

_INPUT = re.compile(r"VDD_IN|POM_5V_IN|VIN$", re.IGNORECASE)
_DECIMAL = re.compile(r"\d{1,9}(\.\d{1,9})?")
_UNUSED = "NC"  # the label of a channel that is not connected
_XU3_RAILS = {"0040": "a15", "0041": "memory", "0044": "gpu", "0045": "a7"}  # by I2C address
_GPU_LOAD = ("sys/devices/gpu.0/load", "sys/devices/*/load", "sys/devices/platform/*/load")
_POWER_STALE = 50  # a meter's last digit moves: so many equal readings mean that it is stuck


def find_sensors(fs: SysFs, knobs: Iterable[Knob] = ()) -> Parts:
    """Every sensor below the root, and which kinds are missing."""
    clocks = [knob for knob in knobs if isinstance(knob, ClockKnob | EmcKnob)]
    sensors = [Sensor(f"{knob.unit}.clock", "clock_mhz", knob.get, 0.001) for knob in clocks]
    rails = _ina3221(fs) + _ina3221_iio(fs) + _ina231(fs)
    whole = [rail for rail in rails if _INPUT.search(rail.name)]
    for rail in whole or rails:
        rail.total = True
    sensors += rails + _rapl(fs) + _zones(fs) + _utilisation(fs)
    if not any(sensor.total for sensor in sensors):
        sensors += _battery(fs)
    names: Counter[str] = Counter()
    for sensor in sensors:  # two zones may share a name
        names[sensor.name] += 1
        count = names[sensor.name]
        if count > 1:
            sensor.name += f".{count}"
    kinds = {sensor.kind for sensor in sensors}
    lacks = []
    if not kinds & {"power_mw", "energy_mj"}:
        lacks.append("power: no sensor")
    if "temp_c" not in kinds:
        lacks.append("temperature: no sensor")
    return Parts(sensors=sensors, lacks=lacks + _unreadable(fs))


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
            label = fs.words(f"{hwmon}/in{channel}_label")
            volts, amps = f"{hwmon}/in{channel}_input", f"{hwmon}/curr{channel}_input"
            if _UNUSED in label or not fs.exists(amps):
                continue
            name = " ".join(label) or f"{Path(hwmon).name}.{channel}"
            rails.append(_rail(name, _product(fs, volts, amps)))
    return rails


def _ina3221_iio(fs: SysFs) -> list[Sensor]:
    """JetPack 4: mW."""
    rails = []
    for file in fs.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-2]"):
        folder, _, channel = file.rpartition("/rail_name_")
        label = fs.words(file)
        if _UNUSED not in label:
            fetch = _scaled(fs, f"{folder}/in_power{channel}_input", 1.0)
            rails.append(_rail(" ".join(label), fetch))
    return rails


def _ina231(fs: SysFs) -> list[Sensor]:
    """Odroid XU3: the vendor's driver in W, mainline (any ina2xx hwmon) in uW."""
    rails = []
    for file in fs.glob("sys/bus/i2c/drivers/INA231/*/sensor_W"):
        address = _address(Path(file).parent)
        rails.append(_rail(_XU3_RAILS.get(address, address), _watts(fs, file)))
    for file in fs.glob("sys/class/hwmon/hwmon*/power1_input"):
        folder = Path(file).parent
        chip = "".join(fs.words(f"{folder}/name"))
        if chip.startswith("ina2"):
            device = Path(fs.path(f"{folder}/device")).resolve()
            name = _XU3_RAILS.get(_address(device), f"{chip}.{folder.name}")
            rails.append(_rail(name, _scaled(fs, file, 1000.0)))
    return rails


def _address(device: Path) -> str:
    """Of a device on an I2C bus, such as 0040 of 4-0040."""
    return device.name.rpartition("-")[2]


def _watts(fs: SysFs, path: str) -> Callable[[], float]:
    def fetch() -> float:
        text = fs.read(path)
        if not _DECIMAL.fullmatch(text):
            raise ValueError(f"{path}: {text[:40]!r}; expected watts")
        return 1000 * float(text)

    return fetch


def _rail(label: str, fetch: Callable[[], float]) -> Sensor:
    return Sensor(f"{label}.power", "power_mw", fetch, 0.1, stale_after=_POWER_STALE)


def _rapl(fs: SysFs) -> list[Sensor]:
    """Intel and AMD energy counters, uJ. The whole is psys, else the packages and their DRAM."""
    sensors = []
    for zone in fs.glob("sys/class/powercap/intel-rapl:*"):
        counter = f"{zone}/energy_uj"
        if not fs.exists(counter):
            continue
        name = "".join(fs.words(f"{zone}/name")) or Path(zone).name
        sensor = Sensor(f"{name}.energy", "energy_mj", _scaled(fs, counter, 1000.0), 0.001)
        sensor.total = name.startswith(("package", "dram"))
        with contextlib.suppress(OSError, ValueError):
            span_uj = fs.number(f"{zone}/max_energy_range_uj")
            sensor.span_mj = span_uj / 1000 if span_uj > 0 else None
        sensors.append(sensor)
    psys = [sensor for sensor in sensors if sensor.name == "psys.energy"]
    if psys:
        for sensor in sensors:
            sensor.total = sensor in psys
    return sensors


def _zones(fs: SysFs) -> list[Sensor]:
    """Thermal zones, thousandths of a degree."""
    sensors = []
    for file in fs.glob("sys/class/thermal/thermal_zone*/temp"):
        zone = Path(file).parent
        name = "".join(fs.words(f"{zone}/type")) or zone.name
        sensors.append(Sensor(name, "temp_c", _scaled(fs, file, 1000.0), 0.5))
    return sensors


def _battery(fs: SysFs) -> list[Sensor]:
    """A phone's or laptop's battery: uA times uV. Vendors differ in the sign of the current.

    Only while it is discharged is that what the board draws.
    """

    sensors = []
    for file in fs.glob("sys/class/power_supply/*/current_now"):
        supply = Path(file).parent
        if fs.words(f"{supply}/type") in ([], ["Battery"]):
            fetch = _discharge(fs, supply)
            sensors.append(Sensor(f"{supply.name}.power", "power_mw", fetch, 1.0, total=True))
    return sensors


def _discharge(fs: SysFs, supply: Path) -> Callable[[], float]:
    def fetch() -> float:
        status = fs.words(f"{supply}/status")
        if status not in ([], ["Discharging"]):
            raise ValueError(f"{supply}: {' '.join(status)}; expected Discharging")
        current_ua = abs(fs.number(f"{supply}/current_now"))
        return current_ua * fs.number(f"{supply}/voltage_now") / 1e9

    return fetch


def _utilisation(fs: SysFs) -> list[Sensor]:
    """Busy share of all CPUs since the last reading, and the load that a Jetson's GPU shows."""
    sensors = []
    if fs.exists("proc/stat"):
        sensors.append(Sensor("cpu.util", "util_pct", _busy_pct(fs), 0.01))
    loads = [file for pattern in _GPU_LOAD for file in fs.glob(pattern)]
    if loads:
        sensors.append(Sensor("gpu.util", "util_pct", _scaled(fs, loads[0], 10.0), 0.02))
    return sensors


def _busy_pct(fs: SysFs) -> Callable[[], float]:
    before_total = before_idle = 0

    def fetch() -> float:
        nonlocal before_total, before_idle
        first, *_ = fs.read("proc/stat").split("\n")
        ticks = [int(word) for word in first.split()[1:9]]
        _user, _nice, _system, idle, waiting, *_ = ticks
        total, idle = sum(ticks), idle + waiting
        passed, idled = total - before_total, idle - before_idle
        before_total, before_idle = total, idle
        if passed <= 0:
            raise ValueError("proc/stat: no tick since the last reading")
        return min(max(100 * (1 - idled / passed), 0.0), 100.0)

    return fetch


def _unreadable(fs: SysFs) -> list[str]:
    for file in fs.glob("sys/class/powercap/intel-rapl:*/energy_uj")[:1]:
        try:
            fs.read(file)
        except OSError as error:
            return [f"energy: {file}: {error.strerror} (root only since Linux 5.10)"]
    return []
