"""The lease: what is written when, who may hold it, and what happens around fork and signals."""

import json
import os
import signal
import subprocess
import sys
import threading

import fake_tree
import pytest
from fake_tree import POLICY, FakeKernel, FaultyKernel, make_machine, tree_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynlib.errors import MachineError
from dynlib.machine.control import Undo
from dynlib.machine.knobs import CPU, find_knobs
from dynlib.machine.lease import Lease, lease_file, parse_lease, process_key, recover, restore
from dynlib.sysfs import SysFs
from suite.studies.judge_machine import write_tree


def test_lease_is_on_disk_before_the_first_write(root, memory):
    fs = FaultyKernel(root)
    machine = make_machine(fs, memory)
    before = tree_state(root)
    with machine:
        assert fs.written == []
        _, undo = parse_lease(lease_file(fs, memory).read_bytes(), memory)
        saved = {step.target: step.value for step in undo}
        for policy in ("policy0", "policy2"):
            for name in ("scaling_governor", "scaling_min_freq", "scaling_max_freq"):
                file = f"{CPU}/cpufreq/{policy}/{name}"
                assert saved[file] == before[file]
        assert machine._lease._guardian.poll() is None  # it lives
    assert not lease_file(fs, memory).exists()
    assert fs.written == []  # what was not touched is not written either


def test_no_guardian_is_left_behind(root, memory):
    machine = make_machine(SysFs(root), memory)
    with machine:
        guardian = machine._lease._guardian
    assert guardian.poll() == 0


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
