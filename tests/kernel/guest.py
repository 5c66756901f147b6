"""A Linux guest in software emulation, made of Debian packages without root; needs no KVM.

`run_guest(kernel)` builds what is missing below the cache folder, boots, and returns the outcome of
every test of guest_cases.py.
"""

import compileall
import gzip
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from py_compile import PycInvalidationMode

from dynlib.files import atomic_write, sha256

HERE = Path(__file__).parent
REPO = HERE.parents[1]
REPORTS = REPO / "data/boards"
COMMAND = "DYNLIB_REAL_KERNEL=1 DYNLIB_KERNEL_REPORTS=data/boards ./run_all.sh test tests/kernel"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynlib-kernel"
KERNELS = {  # the newest of each line that apt knows
    "6.1": r"linux-image-6\.1\.0-\d+-cloud-amd64",
    "6.12": r"linux-image-6\.12\.\d+\+deb12-cloud-amd64",
}
PYTHON = ("libc6", "libexpat1", "zlib1g", "libffi8", "libstdc++6", "libgcc-s1", "busybox-static",
          "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib")  # fmt: skip
PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "iasl": "acpica-tools", "cpio": "cpio",
            "dpkg-deb": "dpkg", "apt-get": "apt"}  # fmt: skip
MODULES = ("userspace", "powersave", "ondemand", "conservative")
SITE = ("_pytest", "pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments", "psutil",
        "numpy", "numpy.libs", "pandas", "dateutil", "six.py")  # fmt: skip
KERNEL_LINE = "console=ttyS0 panic=-1 quiet no_timer_check intel_pstate=disable"
PASS = 33  # the guest writes 16 to the exit port: qemu's own failures are 0 and 1
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev; $b mount -t tmpfs tmp /tmp
for m in /mod/cpufreq_*.ko /mod/acpi-cpufreq.ko; do $b insmod $m || echo "insmod $m failed"; done
only=$($b sed -n 's/.*only=//p' /proc/cmdline); only=${only:-guest_*.py}
cd /t; export HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/t/site:/t PATH=/bin:/usr/bin
/usr/bin/python3.11 -m pytest -v -rA --color=no --tb=short -p no:cacheprovider \\
  -o faulthandler_timeout=600 $only
/usr/bin/python3.11 -c "import ports; ports.allow(0xf4); ports.write(0xf4, 16 + $?)"
"""


def missing() -> str:
    """What has to be installed first, or ""."""
    packages = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if sys.version_info[:2] != (3, 11):  # our numpy runs in the guest, on Debian's Python
        packages.append("python3.11")
    return " ".join(packages)


def package(kernel: str) -> str:
    """Name of the Debian package of a kernel; raises `RuntimeError` where apt knows none."""
    names = _run(["apt-cache", "pkgnames", "linux-image-"], HERE).split()
    found = [name for name in names if re.fullmatch(KERNELS[kernel], name)]
    if not found:
        raise RuntimeError(f"apt knows no package {KERNELS[kernel]}")
    return max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


def fetch(package: str) -> Path:
    """Unpack a Debian package, not install it; its folder."""
    folder = CACHE / package
    if not folder.exists():
        downloads = CACHE / "debs" / package
        downloads.mkdir(parents=True, exist_ok=True)
        _run(["apt-get", "download", package], downloads)
        (deb,) = downloads.glob("*.deb")
        _run(["dpkg-deb", "-x", str(deb), f"{folder}.part"], CACHE)
        Path(f"{folder}.part").rename(folder)
    return folder


def base_image(kernel: str) -> Path:
    """Python, busybox and the modules of a kernel's package; kept."""
    image = CACHE / f"base-{kernel}.gz"
    if not image.exists():
        tree = CACHE / f"tree-{kernel}"
        shutil.rmtree(tree, ignore_errors=True)
        for package in PYTHON:
            shutil.copytree(fetch(package), tree, symlinks=True, dirs_exist_ok=True)
        for junk in ("usr/share", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/python3.11/lib2to3",
                     "usr/lib/python3.11/idlelib"):  # fmt: skip
            shutil.rmtree(tree / junk, ignore_errors=True)
        for folder in ("proc", "sys", "dev", "tmp", "mod", "t"):
            (tree / folder).mkdir(exist_ok=True)
        drivers = next(fetch(kernel).glob("lib/modules/*/kernel/drivers/cpufreq"))
        for name in [f"cpufreq_{m}" for m in MODULES] + ["acpi-cpufreq"]:
            (file,) = drivers.glob(f"{name}.ko*")
            data = file.read_bytes()
            data = lzma.decompress(data) if file.suffix == ".xz" else data
            (tree / f"mod/{name}.ko").write_bytes(data)
        _pack(tree, image)
        shutil.rmtree(tree)
    return image


def site_image() -> Path:
    """pytest, numpy and pandas as they are installed here; kept."""
    site = sysconfig.get_paths()["platlib"]
    infos = sorted(path.name for name in ("pytest", "pluggy", "numpy", "pandas")
                   for path in Path(site).glob(f"{name}-*.dist-info"))  # fmt: skip
    image = CACHE / f"site-{hashlib.sha256(repr(infos).encode()).hexdigest()[:12]}.gz"
    if not image.exists():
        tree = CACHE / "tree-site"
        shutil.rmtree(tree, ignore_errors=True)
        for name in (*SITE, *infos):
            _copy(Path(site) / name, tree / "t/site" / name)
        _pack(tree, image)
        shutil.rmtree(tree)
    return image


def overlay(folder: Path) -> Path:
    """This project and its tests for the guest."""
    tree = folder / "overlay"
    _copy(REPO / "dynlib", tree / "t/dynlib")
    for file in ("machine_contract.py", "faults/holder.py",
                 *(f"kernel/{file.name}" for file in HERE.iterdir())):  # fmt: skip
        if file.endswith((".py", ".toml")):
            shutil.copy(REPO / "tests" / file, tree / "t")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    return _pack(tree, folder / "overlay.gz")


def run_guest(
    kernel: str, folder: Path, limit_s: float = 1800, only: str = ""
) -> tuple[dict[str, str], str]:
    """Boot and run: (outcome of each test by name, everything the guest printed).

    Raises `RuntimeError` where a package cannot be had.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    kernel = package(kernel)
    table = folder / "cpufreq"
    _run(["iasl", "-p", str(table), str(HERE / "cpufreq.asl")], folder)
    initrd = folder / "initrd.gz"
    images = base_image(kernel), site_image(), overlay(folder)
    initrd.write_bytes(b"".join(image.read_bytes() for image in images))
    (vmlinuz,) = fetch(kernel).glob("boot/vmlinuz-*")
    serial = folder / "serial.log"
    command = [
        "qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "Haswell", "-smp", "2", "-m", "1024",
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{serial}",
        "-monitor", "none", "-no-reboot", "-acpitable", f"file={table}.aml", "-device",
        "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel", str(vmlinuz),
        "-initrd", str(initrd), "-append", f"{KERNEL_LINE} only={only}",
    ]  # fmt: skip
    try:
        status = str(subprocess.run(command, timeout=limit_s, check=False).returncode)
    except subprocess.TimeoutExpired:
        status = f"still running after {limit_s} s"
    text = serial.read_text(errors="replace").replace("\r", "")
    # From the summary: while a test runs, the kernel may print into its line.
    found = re.findall(r"^(PASSED|FAILED|ERROR) guest_\w+\.py::(\S+)", text, re.MULTILINE)
    outcome = {name: result for result, name in found}
    if status != str(PASS):
        outcome["exit status"] = f"{status}; expected {PASS}"
    return outcome, text


def measured_on() -> str:
    """Digest of what the guest tries: `dynlib.machine`, and the module that it writes with."""
    files = [*sorted((REPO / "dynlib/machine").glob("*.py")), REPO / "dynlib/sysfs.py"]
    listing = "".join(f"{file.name} {sha256(file)}\n" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def provenance(kernel: str) -> str:
    """Package, commit and digest, as columns of a report; to be asked before the run."""
    commit = _run(["git", "rev-parse", "--short=12", "HEAD"], REPO).strip()
    if _run(["git", "status", "--porcelain", "dynlib", "tests"], REPO):
        commit += "-dirty"
    return f"{package(kernel)},{commit},{measured_on()}"


def report(outcomes: dict[str, str], said: str, kernel: str, beside: str, folder: Path) -> Path:
    """Write what ``data/boards`` keeps for notebook 17: the outcomes, each with the `provenance`
    `beside` it, and the clocks that the guest printed."""
    rows = "".join(f'{kernel},"{case}",{what},{beside}\n' for case, what in outcomes.items())
    clocks = re.findall(r"^CLOCK (.*)$", said, re.MULTILINE)
    if clocks:
        head = "kernel,change,unit,decided_mhz,register_mhz\n"
        lines = "".join(f"{kernel},{line}\n" for line in clocks)
        atomic_write(folder / f"kernel_clocks-{kernel}.csv", head + lines)
    head = "kernel,case,outcome,package,commit,machine\n"
    return atomic_write(folder / f"real_kernel-{kernel}.csv", head + rows)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        clean = shutil.ignore_patterns("__pycache__", "*.pyc", "tests")
        shutil.copytree(source, target, ignore=clean)
    else:
        shutil.copy(source, target)


def _pack(tree: Path, image: Path) -> Path:
    # Compiled here: in emulation that takes longer than all the rest of an import.
    compileall.compile_dir(tree, quiet=2, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH)
    names = "\0".join(p.relative_to(tree).as_posix() for p in sorted(tree.rglob("*")))
    cpio = subprocess.run(["cpio", "--null", "-o", "-H", "newc", "--quiet"], input=names.encode(),
                          cwd=tree, capture_output=True, check=True)  # fmt: skip
    image.write_bytes(gzip.compress(cpio.stdout, 1))
    return image


def _run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")
    return done.stdout


if __name__ == "__main__":  # python tests/kernel/guest.py 6.1 FOLDER [guest_service.py::test_x]
    outcomes, said = run_guest(sys.argv[1], Path(sys.argv[2]), only="".join(sys.argv[3:]))
    sys.stdout.write(said)
    sys.stdout.write(f"{sum(v == 'PASSED' for v in outcomes.values())} of {len(outcomes)} passed\n")
