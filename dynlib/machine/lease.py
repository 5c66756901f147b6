"""Whatever happens, the machine ends as it was found.

Before the first write the original state goes into a lease: a file, fsynced. It is undone when the
`with` block ends, by a signal handler, by a guardian process once this one is gone (kill -9), and
by the next manager that starts (both were killed). After a reboot the kernel has forgotten all but
the persistent steps, so only those are undone.

A lock beside the lease, shared with the guardian, keeps a second manager away until the machine is
back in order; the kernel drops it with the last of the two. A lease of knobs that touch only the
own process needs no lock: each process has one of its own.

A lease is believed as far as one would let its author run commands: file and folder must belong to
this user, and nobody else may write them.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dynlib.errors import MachineError
from dynlib.files import MALFORMED, atomic_write
from dynlib.machine.control import Undo
from dynlib.sysfs import SysFs, is_gone

_LOG = logging.getLogger(__name__)
_BOOT_ID = "proc/sys/kernel/random/boot_id"
_PROC = Path("/proc")
_PASSES = 6
_COMMAND_S = 30
_MOST_BYTES = 2**24  # of a lease
_GUARD = "import sys; from dynlib.machine.lease import guard; guard(*sys.argv[1:])"
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def state_dir() -> Path:
    """Where leases are kept: of the system for root, else of the user. Survives a reboot.

    Raises `MachineError` for a user without a home: a folder that all share will not do.
    """
    if os.geteuid() == 0:
        return Path("/var/lib/dynlib")
    state, home = (Path(os.environ.get(name, "")) for name in ("XDG_STATE_HOME", "HOME"))
    if not state.is_absolute():
        state = home / ".local/state"
        if not home.is_absolute() or home == Path("/"):
            raise MachineError(f"HOME is '{home}'; expected a folder of yours, or $XDG_STATE_HOME")
    return state / "dynlib"


def process_key(pid: int) -> str:
    """`pid:start time`, which no later process of the same number has; raises `OSError`."""
    if not _PROC.is_dir():
        raise MachineError(f"{_PROC} is not there; expected Linux: nothing else has leases")
    _, _, text = (_PROC / str(pid) / "stat").read_text().rpartition(")")
    state, *fields = text.split()
    if state == "Z":
        raise ProcessLookupError(errno.ESRCH, "it has ended, and nobody has looked")
    return f"{pid}:{fields[18]}"


@dataclass(frozen=True, slots=True)
class Record:
    """What a lease says: whose it is, of which boot, when it was made, and the steps back."""

    boot_id: str
    holder: str
    root: str
    undo: list[Undo]
    made: str = "an unknown day"


class Lease:
    """The right to change a machine, and the duty to put it back.

    Args:
        capture: the steps back, in order; called once the machine is ours and in order.
        own: nothing but this process is changed, so that others may hold the machine meanwhile.
        folder: see `lease_file`.
        on_signal: called when a signal ends the program, before it is passed on. One that is
            ignored (nohup) stays ignored.

    Raises `MachineError` when another manager holds the machine, or an old lease is damaged or
    somebody else's.
    """

    def __init__(
        self,
        fs: SysFs,
        capture: Callable[[], list[Undo]],
        *,
        own: bool = False,
        folder: Path | None = None,
        on_signal: Callable[[], object] | None = None,
    ):
        self.fs = fs
        self.closed = False
        self._pid = os.getpid()
        self._key = process_key(self._pid)
        self._made = time.strftime("%Y-%m-%d %H:%M:%S")
        self._on_signal = on_signal or self.release
        self._pending = None
        whole = lease_file(fs, folder)
        self.file = whole.with_stem(f"{whole.stem}-{self._pid}") if own else whole
        whole.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_owner(whole.parent, whole.parent.stat())
        self._lock = None if own else _lock(whole.with_suffix(".lock"), self._key)
        try:
            for file in whole.parent.glob(f"{whole.stem}-*.json"):  # of processes
                record = read_lease(file)
                if record and not _lives(record.holder):
                    recover(fs, file)
                elif file == self.file:
                    raise MachineError(f"{file}: held by process {self._pid}; expected it free")
            left = [] if own else recover(fs, whole)
            owed = {step.target for step in left}
            self.undo = left + [step for step in capture() if step.target not in owed]
            self._write()
            self._guardian, self.guardian_pid = _start_guardian(self.file, fs.root, self._lock)
        except BaseException:
            self._unlock()
            raise
        # A forked child must neither keep the lock nor hide our end from the guardian.
        os.register_at_fork(after_in_child=self._forget)
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                old = signal.getsignal(number)
                if callable(old) or old == signal.SIG_DFL:
                    self._old[number] = signal.signal(number, self._handle)

    def forget(self, targets: set[str]) -> None:
        """Leave these as they are from now on: somebody else has taken them over."""
        self.undo = [undo for undo in self.undo if undo.target not in targets]
        try:
            self._write()
        except OSError as error:  # only a guardian would still put them back
            _LOG.warning("%s: %s", self.file, error)

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
        with contextlib.ExitStack() as last:  # the last one first; each whatever was raised
            last.callback(lambda: self._pass_on(self._pending))
            last.callback(self._give_signals_back)
            last.callback(self._unlock)
            last.callback(self._dismiss_guardian)
            problems = self.restore()
            try:
                if self.undo_left:  # the next start tries again
                    self.undo = self.undo_left
                    self._write()
                else:
                    self.file.unlink(missing_ok=True)
            except OSError as error:  # the guardian finds the whole lease, and tries too
                problems[str(self.file)] = str(error)
        return problems

    def _dismiss_guardian(self) -> None:
        self._guardian.stdin.close()
        ended = select.poll()
        ended.register(self._guardian.stdout, select.POLLHUP)
        ended.poll(2000)
        self._guardian.stdout.close()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _give_signals_back(self) -> None:
        for number, handler in self._old.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number, frame):
        if os.getpid() != self._pid:
            self._pass_on(number)
            return
        self._pending = number
        if not self.closed:  # else a second signal, which waits until the machine is in order
            try:
                self._on_signal()
            finally:
                self.release()

    def _pass_on(self, number: int | None) -> None:
        if number is None:
            return
        self._pending = None
        old = self._old.get(number, signal.SIG_DFL)
        if callable(old):
            old(number, None)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _write(self) -> None:
        record = Record(_boot_id(self.fs), self._key, str(self.fs.root), self.undo, self._made)
        text = json.dumps(asdict(record))
        atomic_write(self.file, json.dumps({"sha256": _digest(text), "body": text}), mode=0o600)
        os.fsync(folder := os.open(self.file.parent, os.O_RDONLY))
        os.close(folder)

    def _forget(self) -> None:
        if not self.closed and os.getpid() != self._pid:
            self.closed = True
            self._unlock()
            os.close(self._guardian.stdin.fileno())


def lease_file(fs: SysFs, folder: Path | None = None) -> Path:
    """The lease of the machine below this root; that of the own process adds its number.

    Only a tree may have a `folder` of its own: the lease of this machine has to be where every
    later start looks. Raises `MachineError`.
    """
    if folder and fs.root == Path("/"):
        raise MachineError(f"{folder}: expected {state_dir()}, where every later start looks")
    return (folder or state_dir()) / f"lease-{_digest(str(fs.root))[:12]}.json"


def recover(fs: SysFs, file: Path) -> list[Undo]:
    """Undo what a killed manager left behind; returns the steps that failed and are still owed.

    Raises `MachineError` as `read_lease`.
    """
    record = read_lease(file)
    if record is None:
        return []
    undo = record.undo
    if record.boot_id != _boot_id(fs):
        undo = [step for step in undo if step.persistent]
    _LOG.warning(
        "%s: process %s ended without putting back what it changed since %s: %d steps",
        file, _pid(record.holder), record.made, len(undo),
    )  # fmt: skip
    left, problems = restore(fs, undo)
    for target, reason in problems.items():
        _LOG.warning("%s: not as it was found: %s", target, reason)
    if not left:
        file.unlink(missing_ok=True)
    return left


def read_lease(file: Path) -> Record | None:
    """The lease in a file, None without one.

    Raises `MachineError` for one that somebody else may have written, and as `parse_lease`.
    """
    try:
        # A link is not followed, and a pipe not waited for.
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"{file}: {error.strerror}; {_expected()}") from None
    try:
        status = os.fstat(handle)
        _check_owner(file, status)
        raw = os.read(handle, _MOST_BYTES) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(handle)
    return parse_lease(raw, file)


def parse_lease(raw: bytes, file: Path) -> Record:
    """What a lease says; raises `MachineError` unless every byte of it is there.

    Half a state is worse than none.
    """
    try:
        outer = json.loads(raw)
        if outer["sha256"] == _digest(outer["body"]):
            body = json.loads(outer["body"])
            steps = [Undo(**entry) for entry in body["undo"]]
            texts = [body[key] for key in body.keys() - {"undo"}]
            texts += [text for step in steps for text in (step.kind, step.target, step.value)]
            if all(isinstance(text, str) for text in texts):
                return Record(**body | {"undo": steps})
    except (*MALFORMED, KeyError):
        pass
    raise MachineError(
        f"{file}: the lease of an earlier run is damaged; expected the file as it was written. "
        f"Nothing was restored: check clocks and governors, then delete this file"
    )


def _check_owner(path: Path, status: os.stat_result) -> None:
    """Raise `MachineError` if another user may have written this: its commands would be run."""
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        what = f"{stat.filemode(status.st_mode)} of user {status.st_uid}"
        raise MachineError(f"{path}: {what}; {_expected()}")


def _expected() -> str:
    return f"expected what only user {os.geteuid()} may write. Nothing was restored or changed"


def restore(fs: SysFs, undo: list[Undo]) -> tuple[list[Undo], dict[str, str]]:
    """Take the steps back until every one holds: (steps still owed, problem of each target).

    Only what differs is written. Several passes, because limits must not cross on the way, a
    governor brings its own files, and a write may take some milliseconds to show.
    """
    left, problems, hung = list(undo), {}, []
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
                if error.errno == errno.ETIMEDOUT:
                    hung.append(step)
                    continue
            except Exception as error:  # one broken step must not stop the others
                problems[step.target] = f"{type(error).__name__}: {error}"
            owed.append(step)
        left = owed
        if not left:
            break
        time.sleep(0.002 * 2**attempt)
    return left + hung, problems


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


def run_command(command: str) -> bool:
    """Run nvpmodel or its like; whether it succeeded. Raises `OSError` if it does not answer."""
    try:
        # stdin is closed: it may ask whether to reboot, and must get no answer
        done = subprocess.run(
            command.split(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_COMMAND_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        program = Path(command.split()[0]).name
        raise OSError(errno.ETIMEDOUT, f"{program}: no answer in {_COMMAND_S} s") from None
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
    "command": _undo_command,
    "nvml": _undo_nvml,
}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _boot_id(fs: SysFs) -> str:
    return "".join(fs.words(_BOOT_ID)[:1])


def _lock(path: Path, key: str) -> int:
    """The lock, with our name in it; raises `MachineError` naming the process that has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    for _ in range(50):  # a guardian at work needs under a second
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, key.encode(), 0)
            return handle
        holder = os.pread(handle, 64, 0).decode()
        if _lives(holder):
            break
        time.sleep(0.02)
    os.close(handle)
    who = f"process {_pid(holder)}"
    if not _lives(holder):
        who = f"the guardian of {who}, which is gone"
    raise MachineError(f"{path}: held by {who}; expected a machine that nobody manages")


def _lives(key: str) -> bool:
    """Whether the process of a `process_key` is there; a later one of its number is not."""
    with contextlib.suppress(OSError, ValueError):
        return process_key(int(_pid(key))) == key
    return False


def _pid(key: str) -> str:
    return key.partition(":")[0]


def _start_guardian(file: Path, root: Path, lock: int | None) -> tuple[subprocess.Popen, int]:
    """The pipes to a guardian, and its pid."""
    starter = subprocess.Popen(
        [sys.executable, "-c", _GUARD, str(file), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        pass_fds=() if lock is None else (lock,),
        cwd=Path(__file__).parents[2],
    )
    line = starter.stdout.readline()
    starter.wait()
    if not line:
        raise MachineError(f"{file}: the guardian process did not start; nothing was written")
    return starter, int(line)


def guard(file: str, root: str) -> None:
    """Wait until standard input ends, so the manager is gone; then restore its lease."""
    if os.fork():  # nobody's child: who kills the manager with all that it started misses this
        os._exit(0)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.write(1, f"{os.getpid()}\n".encode())
    sys.stdin.buffer.read()
    with contextlib.suppress(MachineError):
        recover(SysFs(root), Path(file))
