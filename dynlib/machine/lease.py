"""Whatever happens, the machine ends as it was found.

Before the first write the original state goes into a lease: a file, fsynced. It is undone when the
`with` block ends, by a signal handler, by a guardian process once this one is gone (kill -9), and
by the next manager that starts (both were killed). After a reboot the kernel has forgotten all but
the persistent steps, so only those are undone.

A lock on the root folder itself, shared with the guardian, keeps a second manager away until the
machine is back in order; the kernel drops it with the last of the two.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from dynlib.errors import MachineError
from dynlib.machine.control import Undo
from dynlib.sysfs import SysFs, is_gone

_LOG = logging.getLogger(__name__)
_BOOT_ID = "proc/sys/kernel/random/boot_id"
_PASSES = 6
_GUARD = "import sys; from dynlib.machine.lease import guard; guard(*sys.argv[1:])"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def state_dir() -> Path:
    """Where leases are kept: of the system for root, else of the user. Survives a reboot."""
    if os.geteuid() == 0:
        return Path("/var/lib/dynlib")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "dynlib"


def process_key(pid: int) -> str:
    """`pid:start time`, which no later process of the same number has; raises `OSError`."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return f"{pid}:{stat.rpartition(')')[2].split()[19]}"


class Lease:
    """The right to change a machine, and the duty to put it back.

    Args:
        capture: the steps back, in order; called once the machine is ours and in order.
        on_signal: called when a signal ends the program, before it is passed on.

    Raises `MachineError` when another manager holds the machine or an old lease is damaged.
    """

    def __init__(
        self,
        fs: SysFs,
        capture: Callable[[], list[Undo]],
        *,
        folder: Path | None = None,
        on_signal: Callable[[], object] | None = None,
    ):
        self.fs = fs
        self.closed = False
        self.file = lease_file(fs, folder)
        self._pid = os.getpid()
        self._on_signal = on_signal or self.release
        self._pending = None
        self._lock = _lock(fs, self.file)
        try:
            left = recover(fs, self.file)
            owed = {step.target for step in left}
            self.undo = left + [step for step in capture() if step.target not in owed]
            self._write()
            self._guardian = _start_guardian(self.file, fs.root, self._lock)
        except BaseException:
            os.close(self._lock)
            raise
        # A forked child must neither keep the lock nor hide our end from the guardian.
        os.register_at_fork(after_in_child=self._forget)
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._old[number] = signal.signal(number, self._handle)

    def forget(self, targets: set[str]) -> None:
        """Leave these as they are from now on: somebody else has taken them over."""
        self.undo = [undo for undo in self.undo if undo.target not in targets]
        self._write()

    def restore(self) -> dict[str, str]:
        """Undo everything; again if called again. Returns what could not be undone, and why."""
        left, problems = restore(self.fs, self.undo)
        self.undo_left = left
        return problems

    def release(self) -> dict[str, str]:
        """Restore, drop lease and lock; returns what could not be undone, and why."""
        if self.closed or os.getpid() != self._pid:
            return {}
        self.closed = True
        problems = self.restore()
        if self.undo_left:  # the next start tries again
            self.undo = self.undo_left
            self._write()
        else:
            self.file.unlink(missing_ok=True)
        self._guardian.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(2)
        os.close(self._lock)
        for number, handler in self._old.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        if self._pending is not None:
            self._pass_on(self._pending)
        return problems

    def _handle(self, number, frame):
        if os.getpid() != self._pid:
            self._pass_on(number)
            return
        self._pending = number
        if not self.closed:  # else a second signal, which waits until the machine is in order
            self._on_signal()
            self.release()

    def _pass_on(self, number: int) -> None:
        self._pending = None
        old = self._old.get(number, signal.SIG_DFL)
        if callable(old):
            old(number, None)
        elif old == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _write(self) -> None:
        from dynlib.files import atomic_write

        body = {
            "boot_id": _boot_id(self.fs),
            "holder": process_key(self._pid),
            "root": str(self.fs.root),
            "undo": [asdict(undo) for undo in self.undo],
        }
        text = json.dumps(body)
        atomic_write(self.file, json.dumps({"sha256": _digest(text), "body": text}))
        os.fsync(folder := os.open(self.file.parent, os.O_RDONLY))
        os.close(folder)

    def _forget(self) -> None:
        if not self.closed and os.getpid() != self._pid:
            self.closed = True
            os.close(self._lock)
            os.close(self._guardian.stdin.fileno())


def lease_file(fs: SysFs, folder: Path | None = None) -> Path:
    """The lease of the machine below this root."""
    return (folder or state_dir()) / f"lease-{_digest(str(fs.root))[:12]}.json"


def recover(fs: SysFs, file: Path) -> list[Undo]:
    """Undo what a killed manager left behind; returns the steps that failed and are still owed.

    Raises `MachineError` for a damaged lease: half a state is worse than none.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return []
    boot_id, undo = parse_lease(raw, file)
    if boot_id != _boot_id(fs):
        undo = [step for step in undo if step.persistent]
    left, problems = restore(fs, undo)
    for target, reason in problems.items():
        _LOG.warning("%s: not as it was found: %s", target, reason)
    if not left:
        file.unlink(missing_ok=True)
    return left


def parse_lease(raw: bytes, file: Path) -> tuple[str, list[Undo]]:
    """Boot id and steps of a lease; raises `MachineError` unless every byte of it is there."""
    try:
        outer = json.loads(raw)
        if outer["sha256"] == _digest(outer["body"]):
            body = json.loads(outer["body"])
            return body["boot_id"], [Undo(**entry) for entry in body["undo"]]
    except (ValueError, KeyError, TypeError):
        pass
    raise MachineError(
        f"{file}: the lease of an earlier run is damaged; expected the file as it was written. "
        f"Nothing was restored: check clocks and governors, then delete this file"
    )


def restore(fs: SysFs, undo: list[Undo]) -> tuple[list[Undo], dict[str, str]]:
    """Take the steps back until every one holds: (steps still owed, problem of each target).

    Only what differs is written. Several passes, because limits must not cross on the way, a
    governor brings its own files, and a write may take some milliseconds to show.
    """
    left, problems = list(undo), {}
    for attempt in range(_PASSES):
        owed = []
        for step in left:
            try:
                if UNDOERS[step.kind](fs, step):
                    problems.pop(step.target, None)
                    continue
                problems[step.target] = f"does not return to {step.value!r}"
            except OSError as error:
                problems[step.target] = error.strerror or str(error)
                if is_gone(error):  # nothing is left that could be wrong
                    continue
            except Exception as error:  # one broken step must not stop the others
                problems[step.target] = f"{type(error).__name__}: {error}"
            owed.append(step)
        left = owed
        if not left:
            break
        time.sleep(0.002 * 2**attempt)
    return left, problems


def _undo_write(fs: SysFs, step: Undo) -> bool:
    if fs.read(step.target) == step.value:
        return True
    fs.write(step.target, step.value)
    return fs.read(step.target) == step.value


def _undo_cgroup(fs: SysFs, step: Undo) -> bool:
    if fs.exists(step.target):
        for pid in fs.words(f"{step.target}/cgroup.procs"):
            with contextlib.suppress(ProcessLookupError):
                fs.write(f"{step.value}/cgroup.procs", pid)
        fs.rmdir(step.target)
    return True


def _undo_affinity(fs: SysFs, step: Undo) -> bool:
    pid = int(step.target.partition(":")[0])
    if process_key(pid) == step.target:
        cpus = {int(cpu) for cpu in step.value.split(",")}
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cpus)
    return True


def run_command(command: str) -> bool:
    """Run nvpmodel or its like; whether it succeeded."""
    # stdin is closed: it may ask whether to reboot, and must get no answer
    done = subprocess.run(
        command.split(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
    )
    return done.returncode == 0 and "NVPM ERROR" not in done.stdout + done.stderr


def _undo_command(fs: SysFs, step: Undo) -> bool:
    held, _, command = step.value.partition("\n")
    return fs.read(step.target) == held or run_command(command)


def _undo_nvml(fs: SysFs, step: Undo) -> bool:
    from dynlib.machine.nvml import undo

    return undo(step)


UNDOERS: dict[str, Callable[[SysFs, Undo], bool]] = {
    "write": _undo_write,
    "cgroup": _undo_cgroup,
    "affinity": _undo_affinity,
    "command": _undo_command,
    "nvml": _undo_nvml,
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _boot_id(fs: SysFs) -> str:
    return "".join(fs.words(_BOOT_ID)[:1])


def _lock(fs: SysFs, file: Path) -> int:
    folder = fs.root / "sys" if (fs.root / "sys").is_dir() else fs.root
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    for _ in range(50):  # a guardian at work needs under a second
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        holder = _holder(file)
        if holder:
            break
        time.sleep(0.02)
    os.close(handle)
    who = f"process {holder}" if holder else "the guardian of a process that is gone"
    raise MachineError(f"{folder}: held by {who}; expected a machine that nobody manages ({file})")


def _holder(file: Path) -> str | None:
    """Pid of the living process that a lease names; a later one of the same number is none."""
    try:
        key = json.loads(json.loads(file.read_text())["body"])["holder"]
        pid = key.partition(":")[0]
        return pid if process_key(int(pid)) == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_guardian(file: Path, root: Path, lock: int) -> subprocess.Popen:
    guardian = subprocess.Popen(
        [sys.executable, "-c", _GUARD, str(file), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        pass_fds=(lock,),
        cwd=Path(__file__).parents[2],
    )
    if guardian.stdout.read(1) != b"r":
        raise MachineError(f"{file}: the guardian process did not start; nothing was written")
    return guardian


def guard(file: str, root: str) -> None:
    """Wait until standard input ends, so the manager is gone; then restore its lease."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.write(1, b"r")
    sys.stdin.buffer.read()
    with contextlib.suppress(MachineError):
        recover(SysFs(root), Path(file))
