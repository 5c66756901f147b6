"""The lease: what is written when, who may hold it, and what happens around fork and signals."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_tree
import psutil
import pytest
from fake_tree import POLICY, FakeKernel, FaultyKernel, make_machine, tree_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynlib.errors import MachineError
from dynlib.machine import lease as lease_module
from dynlib.machine.control import Undo
from dynlib.machine.knobs import CPU, find_knobs
from dynlib.machine.lease import (
    Lease,
    lease_file,
    parse_lease,
    process_key,
    recover,
    restore,
    state_dir,
)
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import write_tree

REPO = Path(__file__).parents[1]
HOLDER = REPO / "tests/faults/holder.py"


def start(root, folder):
    """A manager in a process of its own that has changed the tree; it and its guardian's pid."""
    child = subprocess.Popen(
        [sys.executable, str(HOLDER), str(root), str(folder), "sleep"],
        stdout=subprocess.PIPE, text=True, cwd=REPO,
    )  # fmt: skip
    return child, int(child.stdout.readline())


def test_lease_is_on_disk_before_the_first_write(root, memory):
    fs = FaultyKernel(root)
    machine = make_machine(fs, memory)
    before = tree_state(root)
    with machine:
        assert fs.written == []
        record = parse_lease(lease_file(fs, memory).read_bytes(), memory)
        saved = {step.target: step.value for step in record.undo}
        for policy in ("policy0", "policy2"):
            for name in ("scaling_governor", "scaling_min_freq", "scaling_max_freq"):
                file = f"{CPU}/cpufreq/{policy}/{name}"
                assert saved[file] == before[file]
        assert psutil.pid_exists(machine._lease.guardian_pid)
    assert not lease_file(fs, memory).exists()
    assert fs.written == []  # what was not touched is not written either


def test_no_guardian_is_left_behind(root, memory):
    machine = make_machine(SysFs(root), memory)
    with machine:
        guardian = psutil.Process(machine._lease.guardian_pid)
    _, alive = psutil.wait_procs([guardian], timeout=2)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)  # init is slow


def test_a_forked_child_changes_nothing(root, memory):
    machine = make_machine(SysFs(root), memory)
    with machine:
        machine.set("policy0", "governor", "performance")
        held = tree_state(root)
        child = os.fork()
        if child == 0:
            machine.restore()
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert tree_state(root) == held
        with pytest.raises(MachineError):
            make_machine(SysFs(root), memory).__enter__()


def test_signal_handlers_are_put_back(root, memory):
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        before = tree_state(root)
        with make_machine(FakeKernel(root), memory) as machine:
            machine.set("policy0", "governor", "performance")
            signal.raise_signal(signal.SIGTERM)
            assert tree_state(root) == before  # at once, not at the end of the block
            assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, old)


def test_works_in_a_thread_without_signals(root, memory):
    before, problems = tree_state(root), []

    def work():
        with make_machine(FakeKernel(root), memory) as machine:
            problems.append(machine.set("policy0", "governor", "performance").problem)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == [""]
    assert tree_state(root) == before


def test_process_key_tells_processes_apart():
    assert process_key(os.getpid()) == process_key(os.getpid())
    assert process_key(os.getpid()) != process_key(os.getppid())
    with pytest.raises(OSError, match="No such"):
        process_key(2**22 + 1)


def test_a_process_that_has_ended_has_no_key_even_if_nobody_has_waited_for_it():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError):
        process_key(child.pid)
    child.wait()


def test_persistent_steps_survive_a_reboot(root, memory):
    fs = SysFs(root)
    steps = [
        Undo("write", f"{POLICY}/scaling_governor", "powersave"),
        Undo("write", "sys/firmware/acpi/platform_profile", "low-power", persistent=True),
    ]
    lease = Lease(fs, lambda: steps, folder=memory)
    text = lease.file.read_text()
    lease.undo = []
    lease.release()
    lease.file.write_text(text)
    (root / "proc/sys/kernel/random/boot_id").write_text("next")
    assert recover(fs, lease.file) == []
    assert fs.read("sys/firmware/acpi/platform_profile") == "low-power"
    assert fs.read(f"{POLICY}/scaling_governor") == "schedutil"


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["policy0", "policy2"]), st.just("clock_mhz"),
                  st.sampled_from([khz / 1000 for khz in fake_tree.KHZ])),
        st.tuples(st.sampled_from(["policy0", "policy2"]), st.just("governor"),
                  st.sampled_from(["performance", "powersave", "userspace", "schedutil"])),
        st.tuples(st.just("policy2"), st.just("cores"), st.integers(0, 2)),
        st.tuples(st.just("gpu"), st.just("clock_mhz"), st.sampled_from(fake_tree.GPU_MHZ)),
    ),
    max_size=12,
)  # fmt: skip
FAULTS = st.lists(
    st.tuples(
        st.just("write"), st.sampled_from(["governor", "min_freq", "max_freq", "online"]),
        st.integers(1, 6), st.integers(1, 4), st.sampled_from([5, 13, 16, 22]),
    ),
    max_size=3,
)  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, faults=FAULTS)
def test_after_any_faults_every_file_is_as_it_was_or_named(memory, actions, faults):
    root = write_tree(memory / "root", fake_tree.jetson())
    before, fs = tree_state(root), FaultyKernel(root)
    knobs = find_knobs(fs)
    undo = [step for knob in knobs.knobs for step in knob.undo()]
    fs.plan = [list(fault) for fault in faults]
    table = {str(khz) for khz in fake_tree.KHZ} | {str(round(1e6 * m)) for m in fake_tree.GPU_MHZ}
    known = {(knob.unit, knob.kind): knob for knob in knobs.knobs}
    for unit, kind, value in actions:
        try:
            known[unit, kind].put(value)
        except OSError:
            continue
        finally:
            for policy in ("policy0", "policy2"):
                low, high = (
                    int(fs.plain.read(f"{CPU}/cpufreq/{policy}/scaling_{end}_freq"))
                    for end in ("min", "max")
                )
                assert low <= high
    assert all(text in table for path, text in fs.written if path.endswith("_freq"))
    left, problems = restore(fs, undo)
    changed = {path for path, text in tree_state(root).items() if before[path] != text}
    assert {p for p in changed if "setspeed" not in p} <= set(problems)
    assert {step.target for step in left} <= set(problems)


def test_damage_is_refused_and_said(root, memory):
    fs = SysFs(root)
    file = lease_file(fs, memory)
    for text in ("{}", "[]", "null", json.dumps({"sha256": "0", "body": "{}"}), "\0"):
        file.write_text(text)
        with pytest.raises(MachineError, match=r"lease-.*damaged.*delete this file"):
            make_machine(fs, memory).__enter__()
    file.unlink()
    with make_machine(fs, memory):
        pass


def test_a_guardian_loads_nothing_that_it_does_not_need():
    """It starts before the first write, on a slow board too; and in a guest without packages."""
    code = (
        "import sys, dynlib.machine.lease; "
        "print({'numpy', 'pandas', 'psutil', 'dynlib.boards'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# A holder in a process of its own that starts with these signals ignored, as under nohup.
IGNORING = """\
import runpy, signal, sys
for number in map(int, sys.argv.pop().split(",")):
    signal.signal(number, signal.SIG_IGN)
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_ignored(root, memory, number):
    before = tree_state(root)
    command = [sys.executable, "-c", IGNORING, str(HOLDER), str(root), str(memory), "sleep"]
    child = subprocess.Popen([*command, str(int(number))], stdout=subprocess.PIPE, cwd=REPO)
    child.stdout.readline()
    held = tree_state(root)
    assert held != before
    child.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    assert tree_state(root) == held  # not restored in the middle of the run either
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    assert tree_state(root) == before


def test_a_handler_that_is_not_python_s_is_left_alone(root, memory, monkeypatch):
    """`getsignal` gives None for one that C code installed: nobody could put that back."""
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda n: None if n == signal.SIGHUP else known(n))
    with make_machine(SysFs(root), memory) as machine:
        assert signal.SIGHUP not in machine._lease._old
        assert signal.SIGTERM in machine._lease._old


def planted(root, memory, command):
    """The lease of a killed manager, as somebody else could write it: its step runs a command."""
    fs = SysFs(root)
    step = Undo("command", f"{POLICY}/scaling_governor", f"nothing\n{command}")
    lease = Lease(fs, lambda: [step], folder=memory)
    text = lease.file.read_text()
    lease.undo = []
    lease.release()
    lease.file.write_text(text)
    return fs, lease.file


@pytest.mark.parametrize("how", ["owner", "group may write", "all may write", "link"])
def test_a_lease_of_somebody_else_is_not_believed(root, memory, how):
    ran = memory / "ran"
    fs, file = planted(root, memory, f"/usr/bin/touch {ran}")
    if how == "owner":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(file, 12345, -1)
    elif how == "link":
        file.rename(memory / "elsewhere")
        file.symlink_to(memory / "elsewhere")
    else:
        file.chmod({"group may write": 0o620, "all may write": 0o602}[how])
    with pytest.raises(MachineError, match=rf"{file.name}.*only user {os.geteuid()} "):
        recover(fs, file)
    with pytest.raises(MachineError, match=f"only user {os.geteuid()} "):
        make_machine(fs, memory).__enter__()
    assert not ran.exists()


def test_a_lease_of_our_own_is_believed(root, memory):
    ran = memory / "ran"
    fs, file = planted(root, memory, f"/usr/bin/touch {ran}")
    file.chmod(0o600)
    recover(fs, file)
    assert ran.exists()


@pytest.mark.parametrize("mode", [0o1777, 0o770, 0o757])
def test_no_lease_in_a_folder_that_others_may_write(root, memory, mode):
    shared = memory / "shared"
    shared.mkdir()
    shared.chmod(mode)
    before = list(shared.iterdir())
    with pytest.raises(MachineError, match=r"shared: .*only user"):
        make_machine(SysFs(root), shared).__enter__()
    assert list(shared.iterdir()) == before


def test_a_lease_is_for_its_owner_alone_whatever_the_umask(root, memory):
    folder, umask = memory / "state", os.umask(0)
    try:
        with make_machine(SysFs(root), folder):
            paths = [folder, *folder.iterdir()]
            assert len(paths) > 1
            assert all(path.stat().st_mode & 0o077 == 0 for path in paths)
    finally:
        os.umask(umask)


def test_a_lock_on_the_kernel_s_own_folder_blocks_nobody(root, memory):
    """Any user may open /sys and lock it."""
    (root / "sys").chmod(0o555)
    handle = os.open(root / "sys", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with make_machine(SysFs(root), memory) as machine:
            assert machine.set("policy0", "governor", "performance").problem == ""
    finally:
        os.close(handle)


def test_who_holds_the_machine_is_said_before_the_lease_is_written_too(root, memory):
    """While the steps back are found, only an older, dead holder may be named in a lease."""
    fs = SysFs(root)

    def capture():
        with pytest.raises(MachineError, match=f"held by process {os.getpid()};"):
            Lease(fs, list, folder=memory)
        return []

    Lease(fs, capture, folder=memory).release()


def test_a_guardian_at_work_is_called_one(root, memory):
    """Its lock outlives the manager; the words name the process it stands in for."""
    child, guardian = start(root, memory)
    os.kill(guardian, signal.SIGSTOP)
    child.kill()
    child.communicate(timeout=20)
    try:
        with pytest.raises(MachineError, match=f"the guardian of process {child.pid}"):
            make_machine(SysFs(root), memory).__enter__()
    finally:
        os.kill(guardian, signal.SIGCONT)
    with make_machine(SysFs(root), memory):  # it waits while a guardian works
        pass


@pytest.mark.parametrize("broken", ["write", "unlink", "restore"])
def test_release_lets_everything_go_whatever_fails(root, memory, monkeypatch, broken):
    before, fs = tree_state(root), FaultyKernel(root)
    handler = signal.getsignal(signal.SIGTERM)
    machine = make_machine(fs, memory)
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt), machine:
        machine.set("policy0", "governor", "performance")
        lease = machine._lease
        if broken == "write":  # a step fails, and the disk is full when the rest is to be kept
            fs.fail("write", "scaling_governor", errno.EIO)
            patch.setattr(os, "fsync", refuse(OSError(errno.ENOSPC, "No space left")))
        elif broken == "unlink":
            patch.setattr(Path, "unlink", refuse(OSError(errno.EROFS, "Read-only")))
        else:
            patch.setattr("dynlib.machine.lease.restore", refuse(KeyboardInterrupt()))
    fs.plan.clear()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert lease.closed
    with make_machine(SysFs(root), memory):  # the lock is free, and what was owed is done
        assert tree_state(root) == before
    assert broken != "write" or "No space left" in machine.problems[str(lease.file)]


def refuse(error):
    def act(*_, **__):
        raise error

    return act


def test_an_error_while_it_yields_does_not_keep_the_rest_from_being_restored(
    root, memory, monkeypatch
):
    fs = FakeKernel(root)
    before = tree_state(root)
    with make_machine(fs, memory) as machine:
        machine.set("policy2", "clock_mhz", 1200.0)
        fs.plain.write(f"{POLICY}/scaling_governor", "performance")  # another program
        monkeypatch.setattr(os, "fsync", refuse(OSError(errno.ENOSPC, "No space left")))
    changed = {path for path, text in tree_state(root).items() if before[path] != text}
    assert changed == {f"{POLICY}/scaling_governor"}


@pytest.mark.parametrize("environment", [
    {"HOME": "/"}, {}, {"HOME": "relative"}, {"HOME": ""}, {"HOME": "/", "XDG_STATE_HOME": "x"},
])  # fmt: skip
def test_without_a_home_it_says_what_to_set(monkeypatch, environment):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MachineError, match="XDG_STATE_HOME"):
        state_dir()
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert state_dir() == Path("/somewhere/dynlib")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert state_dir() == Path("/home/me/.local/state/dynlib")


def test_the_lease_of_this_machine_is_where_every_later_start_looks(tmp_path):
    with pytest.raises(MachineError, match="every later start"):
        lease_file(SysFs("/"), tmp_path)
    assert lease_file(SysFs("/")).parent == state_dir()


def test_a_stale_lease_says_how_old_it_is(root, memory, caplog):
    fs, file = planted(root, memory, "/usr/bin/true")
    outer = json.loads(file.read_text())
    body = json.loads(outer["body"])
    assert abs(time.mktime(time.strptime(body["made"], "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
    text = json.dumps(body | {"made": "2021-03-04 05:06:07"})
    file.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}))
    recover(fs, file)
    assert f"process {os.getpid()}" in caplog.text
    assert "2021-03-04 05:06:07" in caplog.text


def test_without_proc_it_says_linux(root, memory, monkeypatch):
    monkeypatch.setattr(lease_module, "_PROC", memory / "no-proc")
    with pytest.raises(MachineError, match="Linux"):
        make_machine(SysFs(root), memory).__enter__()
    with pytest.raises(MachineError, match="Linux"):
        process_key(os.getpid())
