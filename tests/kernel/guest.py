"""A Linux guest in software emulation, made of Debian packages without root; needs no KVM.

`run_guest(kernel)` builds what is missing below the cache folder, boots, and returns the outcome of
every test of guest_cases.py.
"""

import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from dynlib.files import atomic_write

HERE = Path(__file__).parent
REPO = HERE.parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynlib-kernel"
KERNELS = {
    "6.1": "linux-image-6.1.0-56-cloud-amd64",
    "6.12": "linux-image-6.12.117+deb12-cloud-amd64",
}
PYTHON = ("libc6", "libexpat1", "zlib1g", "libffi8", "python3.11-minimal", "libpython3.11-minimal",
          "libpython3.11-stdlib", "busybox-static")  # fmt: skip
PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "iasl": "acpica-tools", "cpio": "cpio",
            "dpkg-deb": "dpkg", "apt-get": "apt"}  # fmt: skip
MODULES = ("userspace", "powersave", "ondemand", "conservative")
COPIED = ("psutil", "_pytest", "pytest", "pluggy", "iniconfig", "packaging", "pygments")
KERNEL_LINE = "console=ttyS0 panic=-1 quiet no_timer_check intel_pstate=disable"
PASS = 33  # the guest writes 16 to the exit port: qemu's own failures are 0 and 1
INIT = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev; $b mount -t tmpfs tmp /tmp
for m in /mod/cpufreq_*.ko /mod/acpi-cpufreq.ko; do $b insmod $m || echo "insmod $m failed"; done
cd /t; export HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/t/site:/t PATH=/bin:/usr/bin
/usr/bin/python3.11 -m pytest -v -rA --color=no --tb=short -p no:cacheprovider \\
  -o faulthandler_timeout=600 guest_cases.py
/usr/bin/python3.11 /t/leave.py $?
"""
# Port 0xf4 through ioperm and six bytes of code: this kernel has no /dev/port.
LEAVE = """import ctypes, mmap, sys
ctypes.CDLL(None).ioperm(0xF4, 4, 1)
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("89fa89f0eec3"))
code = ctypes.addressof(ctypes.c_char.from_buffer(page))
ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)(code)(0xF4, 16 + int(sys.argv[1]))
"""


def missing() -> str:
    """Debian packages that have to be installed first, or ""."""
    return " ".join(package for program, package in PROGRAMS.items() if not shutil.which(program))


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
    """Python, busybox and the kernel's modules; kept."""
    image = CACHE / f"base-{kernel}.gz"
    if not image.exists():
        tree = CACHE / f"tree-{kernel}"
        shutil.rmtree(tree, ignore_errors=True)
        for package in PYTHON:
            shutil.copytree(fetch(package), tree, symlinks=True, dirs_exist_ok=True)
        for junk in ("usr/share", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/python3.11/lib2to3"):
            shutil.rmtree(tree / junk, ignore_errors=True)
        for folder in ("proc", "sys", "dev", "tmp", "mod", "t"):
            (tree / folder).mkdir(exist_ok=True)
        drivers = next(fetch(KERNELS[kernel]).glob("lib/modules/*/kernel/drivers/cpufreq"))
        for name in [f"cpufreq_{m}" for m in MODULES] + ["acpi-cpufreq"]:
            (file,) = drivers.glob(f"{name}.ko*")
            data = file.read_bytes()
            data = lzma.decompress(data) if file.suffix == ".xz" else data
            (tree / f"mod/{name}.ko").write_bytes(data)
        _pack(tree, image)
    return image


def overlay(folder: Path) -> Path:
    """This project, its tests for the guest, and pytest."""
    tree = folder / "overlay"
    clean = shutil.ignore_patterns("__pycache__", "*.pyc", "boards")
    shutil.copytree(REPO / "dynlib", tree / "t/dynlib", ignore=clean)
    for file in ("machine_contract.py", "kernel/cases.py", "kernel/guest_cases.py",
                 "faults/holder.py"):  # fmt: skip
        shutil.copy(REPO / "tests" / file, tree / "t")
    import pytest

    site = Path(pytest.__file__).parents[1]
    for package in COPIED:
        shutil.copytree(site / package, tree / "t/site" / package, ignore=clean)
    shutil.copy(site / "py.py", tree / "t/site")
    for info in (*site.glob("pytest-*.dist-info"), *site.glob("pluggy-*.dist-info")):
        shutil.copytree(info, tree / "t/site" / info.name)
    (tree / "t/leave.py").write_text(LEAVE)
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    return _pack(tree, folder / "overlay.gz")


def run_guest(kernel: str, folder: Path, limit_s: float = 1200) -> tuple[dict[str, str], str]:
    """Boot and run: (outcome of each test by name, everything the guest printed)."""
    CACHE.mkdir(parents=True, exist_ok=True)
    table = folder / "cpufreq"
    _run(["iasl", "-p", str(table), str(HERE / "cpufreq.asl")], folder)
    initrd = folder / "initrd.gz"
    initrd.write_bytes(base_image(kernel).read_bytes() + overlay(folder).read_bytes())
    (vmlinuz,) = fetch(KERNELS[kernel]).glob("boot/vmlinuz-*")
    serial = folder / "serial.log"
    command = [
        "qemu-system-x86_64", "-M", "q35,accel=tcg", "-cpu", "Haswell", "-smp", "2", "-m", "512",
        "-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{serial}",
        "-monitor", "none", "-no-reboot", "-acpitable", f"file={table}.aml", "-device",
        "pc-testdev", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x4", "-kernel", str(vmlinuz),
        "-initrd", str(initrd), "-append", KERNEL_LINE,
    ]  # fmt: skip
    try:
        status = str(subprocess.run(command, timeout=limit_s, check=False).returncode)
    except subprocess.TimeoutExpired:
        status = f"still running after {limit_s} s"
    text = serial.read_text(errors="replace").replace("\r", "")
    # From the summary: while a test runs, the kernel may print into its line.
    found = re.findall(r"^(PASSED|FAILED|ERROR) guest_cases\.py::(\S+)", text, re.MULTILINE)
    outcome = {name: result for result, name in found}
    if status != str(PASS):
        outcome["exit status"] = f"{status}; expected {PASS}"
    return outcome, text


def report(outcomes: dict[str, str], kernel: str, folder: Path) -> Path:
    """Write the outcomes as a table, such as ``data/boards`` keeps for notebook 02."""
    rows = "".join(f'{kernel},"{case}",{outcome}\n' for case, outcome in outcomes.items())
    return atomic_write(folder / f"real_kernel-{kernel}.csv", f"kernel,case,outcome\n{rows}")


def _pack(tree: Path, image: Path) -> Path:
    names = "\0".join(p.relative_to(tree).as_posix() for p in sorted(tree.rglob("*")))
    cpio = subprocess.run(["cpio", "--null", "-o", "-H", "newc", "--quiet"], input=names.encode(),
                          cwd=tree, capture_output=True, check=True)  # fmt: skip
    import gzip

    image.write_bytes(gzip.compress(cpio.stdout, 1))
    return image


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-500:]}{done.stderr[-500:]}")


if __name__ == "__main__":
    outcomes, said = run_guest(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write(said)
    sys.stdout.write(f"{sum(v == 'PASSED' for v in outcomes.values())} of {len(outcomes)} passed\n")
