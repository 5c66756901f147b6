"""A tree of files that answers as the kernel does: to try a board's knobs where there is none.

What a write leads to follows Linux 6.1 and 6.12 as seen in a virtual machine (tests/kernel runs the
same table of cases against a real one).
"""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from dynlib.hardware.control import SysFs
from dynlib.hardware.sysfs import CPU, CPUFREQ, DEVFREQ, Names

GOVERNORS = ("conservative", "ondemand", "userspace", "powersave", "performance", "schedutil")


def write_tree(root: Path, files: dict[str, object]) -> Path:
    """Make the files (path below the root: text) of a tree; returns its root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def cpu_files(policies: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, object]:
    """The cpufreq and hotplug files of some policies, each (CPUs, clocks in kHz)."""
    files: dict[str, object] = {"proc/sys/kernel/random/boot_id": "fake-boot"}
    for cpus, khz in policies:
        folder, names = f"{CPU}/cpufreq/policy{cpus[0]}", " ".join(map(str, cpus))
        values = {
            "related_cpus": names, "affected_cpus": names,
            "scaling_available_frequencies": " ".join(map(str, sorted(khz, reverse=True))),
            "scaling_available_governors": " ".join(GOVERNORS), "scaling_governor": "schedutil",
            "scaling_min_freq": min(khz), "scaling_max_freq": max(khz),
            "cpuinfo_min_freq": min(khz), "cpuinfo_max_freq": max(khz),
            "scaling_cur_freq": min(khz), "scaling_setspeed": "<unsupported>",
            "cpuinfo_transition_latency": 10000,
        }  # fmt: skip
        files |= {f"{folder}/{name}": value for name, value in values.items()}
        files |= {f"{CPU}/cpu{cpu}/online": 1 for cpu in cpus if cpu}
    return files


def devfreq_files(folder: str, mhz: Sequence[float]) -> dict[str, object]:
    """The devfreq files of one device, clocks in MHz."""
    hz = [round(1e6 * value) for value in sorted(mhz)]
    values = {
        "available_frequencies": " ".join(map(str, hz)), "cur_freq": hz[0], "min_freq": hz[0],
        "max_freq": hz[-1], "available_governors": "performance userspace simple_ondemand",
        "governor": "simple_ondemand",
    }  # fmt: skip
    return {f"{folder}/{name}": value for name, value in values.items()}


class FakeKernel(SysFs):
    """A tree whose frequency domains and CPUs react; every other file just keeps what it is told.

    `asked` remembers each user's request as the kernel does: a limit that was cut comes back when
    the other one moves. `cap` (folder: kHz or Hz) is a thermal or firmware limit.
    """

    def __init__(self, root: str | Path):
        super().__init__(root)
        self.plain = SysFs(root)
        self.asked: dict[str, int] = {}
        self.cap: dict[str, int] = {}

    def read(self, path: str) -> str:
        """As the kernel would answer."""
        self._refuse_offline(path)
        return self.plain.read(path)

    def write(self, path: str, text: str) -> None:
        """As the kernel would take it; raises `OSError` where it would refuse."""
        folder, _, name = path.rpartition("/")
        if not text:
            return
        self._refuse_offline(path)
        for names in (CPUFREQ, DEVFREQ):
            domain = folder.removesuffix("/userspace")
            if (self.root / domain / names.governor).exists():
                known = (names.low, names.high, names.governor, Path(names.setspeed).name)
                if name not in known:
                    raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
                self._domain(domain, names, name, text)
                return
        if name == "online":
            _integer(text, choices=(0, 1))
            text = text.strip()
        self.plain.write(path, text)

    def _domain(self, folder: str, names: Names, name: str, text: str) -> None:
        governor = self.plain.read(f"{folder}/{names.governor}")
        if name == names.governor:
            words = text.split()
            chosen = words[0].lower() if words and len(text) <= 16 else ""
            if chosen not in self.plain.read(f"{folder}/{names.governors}").split():
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
            self.plain.write(f"{folder}/{name}", chosen)
            governor = chosen
            self.asked.pop(f"{folder}/speed", None)
        elif name == Path(names.setspeed).name:
            if governor != "userspace":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
            self.asked[f"{folder}/speed"] = _integer(text, leading=True)
        else:
            self.asked[f"{folder}/{name}"] = _integer(text)
        self._apply(folder, names, governor)

    def _apply(self, folder: str, names: Names, governor: str) -> None:
        """Recompute limits and clock: the lower limit gives way, then the table rounds."""
        table = sorted(int(w) for w in self.plain.read(f"{folder}/{names.table}").split())
        high = self.asked.get(f"{folder}/{names.high}", table[-1])
        high = min(high, self.cap.get(folder, table[-1]))
        high = max([t for t in table if t <= high] or table[:1])
        low = min(max(self.asked.get(f"{folder}/{names.low}", table[0]), table[0]), high)
        cur = int(self.plain.read(f"{folder}/{names.cur}"))
        speed = self.asked.setdefault(f"{folder}/speed", cur)
        wanted = {"performance": high, "powersave": low, "userspace": speed}.get(governor, low)
        wanted = min(max(wanted, low), high)
        cur = min([t for t in table if t >= wanted] or table[-1:])
        for name, value in ((names.low, low), (names.high, high), (names.cur, cur)):
            self.plain.write(f"{folder}/{name}", f"{value}\n")
        setspeed = f"{folder}/{names.setspeed}"
        if names is CPUFREQ:
            held = f"{cur}\n" if governor == "userspace" else "<unsupported>\n"
            self.plain.write(setspeed, held)

    def _refuse_offline(self, path: str) -> None:
        if "/cpufreq/policy" in path:
            cpus = self.plain.words(str(Path(path).parent / "related_cpus"))
            states = [self.root / CPU / f"cpu{cpu}/online" for cpu in cpus]
            if states and all(s.exists() and s.read_text().strip() == "0" for s in states):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)


def _integer(text: str, choices: Sequence[int] = (), leading: bool = False) -> int:
    digits = text.strip()
    if leading:  # setspeed is read with sscanf: what follows the number is not looked at
        digits = digits[: len(digits) - len(digits.lstrip("0123456789"))]
    if not digits.isdigit() or (choices and int(digits) not in choices):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), text)
    return min(int(digits), 2**32 - 1)
