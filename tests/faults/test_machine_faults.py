"""Faults of a machine, one test id per row: what breaks, and what must hold all the same."""

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_tree
import pytest
import runtime_cases
from fake_tree import POLICY, FaultyKernel, make_machine, tree_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_cases import run

from dynlib.boards.file import BOARD_DIR
from dynlib.errors import BoardError, MachineError
from dynlib.files import atomic_write
from dynlib.log import DecisionLog
from dynlib.machine.bind import load_board
from dynlib.machine.control import Missing, Reading, Sensor
from dynlib.machine.knobs import CPU
from dynlib.machine.lease import lease_file, parse_lease, recover
from dynlib.machine.virtual import VirtualClock
from dynlib.machine.window import EnergyCounter, Window
from dynlib.manager.manager import Manager
from dynlib.sysfs import SysFs
from suite.run.child import kill_tree
from suite.studies.judge_machine import write_tree

pytestmark = pytest.mark.faults
HOLDER = Path(__file__).with_name("holder.py")


@pytest.fixture
def fs(root):
    return FaultyKernel(root)


@pytest.fixture
def machine(fs, memory):
    return make_machine(fs, memory)


def start(root, folder, how="sleep"):
    """A holder that has changed the machine; the process and its guardian's pid."""
    child = subprocess.Popen(
        [sys.executable, str(HOLDER), str(root), str(folder), how],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    line = child.stdout.readline()
    return child, int(line) if line.strip() else None


def wait_for(condition, seconds=20.0):
    """Seconds until the condition held; fails if it never did."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.005)
    return time.monotonic() - began


def readings(values, period_ms=100, kind=Reading):
    return [kind(float(v), i * period_ms * 1_000_000) for i, v in enumerate(values)]


def test_fault_01_sensor_disappears(machine, root):
    assert machine.read("CPU-therm").value == 41.5
    (root / "sys/class/thermal/thermal_zone0/temp").unlink()
    assert machine.read("CPU-therm") == Missing("No such file or directory")
    assert machine.snapshot()["GPU-therm"].value == 39.0
    machine.refused = dict.fromkeys(machine.knobs, "for this test")
    assert machine.level == "watch"
    for name in list(machine.sensors):
        machine.sensors[name].fetch = lambda: SysFs(root).number("gone")
    assert machine.level == "blind"


SENSORS = ("CPU-therm", "VDD_IN.power", "policy0.clock", "package-0.energy")


@pytest.mark.parametrize(
    "raw", [b"", b"-1", b"abc", b"\0", b"12\0", b"9" * 40, b"1e3", b"nan", b"\x1c1"]
)
@pytest.mark.parametrize("name", SENSORS)
def test_fault_02_sensor_returns_nonsense(memory, name, raw):
    machine, file = one_sensor(memory, name)
    file.write_bytes(raw)
    assert isinstance(machine.read(name), Missing)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60))
def test_fault_02_sensor_returns_any_bytes(memory, raw):
    (memory / "temp").write_bytes(raw)
    fs = SysFs(memory)
    value = Sensor("t", "temp_c", lambda: fs.number("temp") / 1000).read(VirtualClock())
    if isinstance(value, Reading):
        assert value.value == int(raw) / 1000


def one_sensor(memory, name):
    files = fake_tree.jetson() | fake_tree.rapl("package-0", "intel-rapl:0", 5, 10**9)
    root = write_tree(memory / "root", files)
    file = {"CPU-therm": "sys/class/thermal/thermal_zone0/temp",
            "VDD_IN.power": "sys/class/hwmon/hwmon3/in1_input",
            "policy0.clock": f"{POLICY}/scaling_cur_freq",
            "package-0.energy": "sys/class/powercap/intel-rapl:0/energy_uj"}[name]  # fmt: skip
    return make_machine(SysFs(root), memory), root / file


def test_fault_03_sensor_hangs(machine, root):
    file = root / "sys/class/thermal/thermal_zone0/temp"
    file.unlink()
    os.mkfifo(file)
    assert isinstance(machine.read("CPU-therm"), Missing)  # nobody writes: empty, at once
    forever = threading.Event()
    machine.sensors["VDD_IN.power"].fetch = forever.wait
    first, second = machine.snapshot(), machine.snapshot()
    assert first["VDD_IN.power"] == Missing("not read in time")
    assert second["VDD_IN.power"] == Missing("hangs")
    assert isinstance(second["GPU-therm"], Reading)
    forever.set()


def test_fault_04_sensor_is_stale(machine):
    sensor = machine.sensors["VDD_IN.power"]
    values = [machine.read("VDD_IN.power") for _ in range(sensor.stale_after + 1)]
    assert [v.stale for v in values] == [False] * sensor.stale_after + [True]


def test_fault_05_permission_lost(machine, fs, root, caplog):
    before = tree_state(root)
    with machine, caplog.at_level(logging.WARNING):
        assert machine.set("policy0", "clock_mhz", 1200.0).problem == ""
        assert machine.set("policy2", "clock_mhz", 1200.0).problem == ""
        fs.fail("write", "policy0/*", errno.EACCES)
        written = len(fs.written)
        for _ in range(3):
            applied = machine.set("policy0", "clock_mhz", 1600.0)
            assert applied.problem == "Permission denied"
            assert applied.in_force == 1200.0
        assert len(fs.written) == written
        assert machine.set("policy2", "clock_mhz", 800.0).problem == ""
        os.kill(machine._lease.guardian_pid, signal.SIGKILL)  # it would try again, and may
    assert caplog.text.count("given up") == 1
    assert set(machine.problems) == {f"{POLICY}/scaling_min_freq", f"{POLICY}/scaling_max_freq"}
    changed = {k for k, v in tree_state(root).items() if before[k] != v}
    assert changed == set(machine.problems)  # whatever is not as it was has a reason
    fs.plan.clear()
    with machine:  # the next start owes it still, and can now
        pass
    assert tree_state(root) == before


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL, errno.EIO])
@pytest.mark.parametrize("times", [2, 1_000_000])
def test_fault_06_write_fails(machine, fs, root, number, times):
    before = tree_state(root)
    with machine:
        fs.fail("write", "policy0/scaling_max_freq", number, times=times)
        results = [machine.set("policy0", "clock_mhz", 1200.0) for _ in range(4)]
        if times == 2:
            assert results[0].problem == ""
            assert results[0].in_force == 1200.0
        else:
            assert {r.problem for r in results} == {os.strerror(number)}
            assert ("policy0", "clock_mhz") in machine.refused
            assert fs.counts[0] <= 3 * 4  # retries are bounded, and end
        fs.plan.clear()
    assert tree_state(root) == before


def test_fault_07_write_is_clamped(machine, fs):
    fs.cap[POLICY] = 1_200_000
    with machine:
        applied = machine.set("policy0", "clock_mhz", 2400.0)
        assert applied.in_force == 1200.0
        assert "asked for 2400.0, in force is 1200.0" in applied.problem
        fs.cap.clear()


@pytest.mark.parametrize("mhz", [1200.001, 1199.999, 1.2e6, 0, -1, math.nan, "1200", None])
def test_fault_08_value_is_not_listed(machine, fs, mhz):
    with machine:
        with pytest.raises(MachineError, match=r"policy0\.clock_mhz.*expected one of"):
            machine.set("policy0", "clock_mhz", mhz)
        assert fs.written == []


def test_fault_09_exception_in_the_loop(machine, root):
    before = tree_state(root)

    def loop():
        with machine:
            machine.set("policy0", "governor", "userspace")
            machine.set("policy0", "clock_mhz", 1600.0)
            machine.set("policy2", "cores", 0)
            machine.set("memory", "clock_mhz", 204.0)
            machine.set("board", "mode", "performance")
            machine.set("gpu", "clock_mhz", 1109.25)
            assert tree_state(root) != before
            raise RuntimeError

    with pytest.raises(RuntimeError):
        loop()
    assert tree_state(root) == before
    assert machine.problems == {}


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGINT,) * 2])
def test_fault_10_signals(root, memory, signals):
    before = tree_state(root)
    child, _ = start(root, memory)
    for number in signals:
        child.send_signal(number)
    child.communicate(timeout=20)
    assert child.returncode in (-signals[0], 128 + signals[0])
    assert tree_state(root) == before
    assert not lease_file(SysFs(root), memory).exists()


def test_fault_11_kill_9(root, memory):
    before = tree_state(root)
    child, _ = start(root, memory)
    assert tree_state(root) != before
    lease = lease_file(SysFs(root), memory)
    assert lease.exists()
    child.kill()
    wait_for(lambda: not lease.exists())  # by the guardian alone: nobody opens the machine again
    child.communicate(timeout=20)
    assert tree_state(root) == before


def test_fault_12_guardian_killed_first(root, memory, fs):
    before = tree_state(root)
    child, guardian = start(root, memory)
    os.kill(guardian, signal.SIGKILL)
    child.kill()
    child.communicate(timeout=20)
    assert tree_state(root) != before
    with make_machine(SysFs(root), memory):
        assert tree_state(root) == before
    assert tree_state(root) == before


@pytest.mark.parametrize("run", range(8))
def test_fault_12_whoever_kills_a_whole_process_tree_leaves_the_guardian(root, memory, run):
    """As the suite's runner does with a notebook that ran past its limit."""
    before = tree_state(root)
    child, _ = start(root, memory)
    kill_tree(child.pid)
    child.communicate(timeout=20)
    wait_for(lambda: not lease_file(SysFs(root), memory).exists())
    assert tree_state(root) == before


def abandoned_lease(root, memory):
    child, guardian = start(root, memory)
    os.kill(guardian, signal.SIGKILL)
    child.kill()
    child.communicate(timeout=20)
    return lease_file(SysFs(root), memory)


def test_fault_13_lease_half_written(root, memory):
    before = tree_state(root)
    lease = abandoned_lease(root, memory)
    whole, changed = lease.read_bytes(), tree_state(root)
    for cut in range(len(whole)):
        with pytest.raises(MachineError, match="damaged"):
            parse_lease(whole[:cut], lease)
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        lease.write_bytes(whole[:cut])
        with pytest.raises(MachineError, match="damaged"):
            recover(SysFs(root), lease)
        assert lease.exists()
    flipped = whole.replace(b"schedutil", b"powersave", 1)
    lease.write_bytes(flipped)
    with pytest.raises(MachineError, match="damaged"):
        recover(SysFs(root), lease)
    assert tree_state(root) == changed
    lease.write_bytes(whole)
    assert recover(SysFs(root), lease) == []
    assert tree_state(root) == before


def test_fault_13_power_loss(root, memory):
    lease = abandoned_lease(root, memory)
    changed = tree_state(root)
    (root / "proc/sys/kernel/random/boot_id").write_text("another boot")
    assert recover(SysFs(root), lease) == []
    (root / "proc/sys/kernel/random/boot_id").write_text("fake-boot")
    assert tree_state(root) == changed  # the kernel has forgotten it all: nothing is written
    assert not lease.exists()


def test_fault_14_two_managers(root, memory):
    before = tree_state(root)
    child, _ = start(root, memory)
    held = tree_state(root)
    second = make_machine(SysFs(root), memory)
    with pytest.raises(MachineError, match=f"process {child.pid};"), second:
        pytest.fail("two managers on one machine")
    other, _ = start(root, memory)
    assert f"process {child.pid}" in other.communicate(timeout=20)[1]
    assert other.returncode == 1
    assert tree_state(root) == held
    child.terminate()
    child.communicate(timeout=20)
    assert tree_state(root) == before


def test_fault_14_pid_was_used_again(root, memory):
    before = tree_state(root)
    lease = abandoned_lease(root, memory)
    outer = json.loads(lease.read_text())
    body = json.loads(outer["body"])
    body["holder"] = f"{os.getpid()}:1"  # a living process, but not the one that held it
    from dynlib.machine.lease import _digest

    text = json.dumps(body)
    lease.write_text(json.dumps({"sha256": _digest(text), "body": text}))
    with make_machine(SysFs(root), memory):
        assert tree_state(root) == before


def test_fault_15_another_tool_sets_the_governor(machine, fs, root):
    before = tree_state(root)
    with machine:
        assert machine.set("policy0", "clock_mhz", 1200.0).problem == ""
        fs.plain.write(f"{POLICY}/scaling_governor", "performance")
        applied = machine.set("policy0", "clock_mhz", 1600.0)
        assert "another program set policy0.governor to performance" in applied.problem
        assert machine.set("policy2", "clock_mhz", 1600.0).problem == ""
    after = tree_state(root)
    assert after[f"{POLICY}/scaling_governor"] == "performance"
    assert {k: v for k, v in after.items() if before[k] != v} == {
        f"{POLICY}/scaling_governor": "performance"
    }


def test_fault_16_cpu_is_unplugged(machine, root, memory):
    before = tree_state(root)
    hidden = memory / "policy2"
    with machine:
        assert machine.set("policy0", "clock_mhz", 1200.0).problem == ""
        assert machine.set("policy2", "clock_mhz", 1200.0).problem == ""
        (root / f"{CPU}/cpufreq/policy2").rename(hidden)
        gone = machine.set("policy2", "clock_mhz", 1600.0)
        assert gone.in_force == Missing("No such file or directory")
        assert machine.set("policy0", "clock_mhz", 1600.0).problem == ""
    assert {Path(target).parent.name for target in machine.problems} == {"policy2"}
    assert tree_state(root) == {k: v for k, v in before.items() if "policy2/" not in k}


def test_fault_17_wall_clock_jumps(monkeypatch):
    clock = VirtualClock()
    power = Sensor("board.power", "power_mw", lambda: 2000.0, 0.001, total=True)
    with Window([power], clock) as window:
        for step in range(20):
            monkeypatch.setattr(time, "time", lambda s=step: 3600.0 * (-1) ** s)
            clock.sleep(0.1)
            window.sample()
    assert window.latency_ms == pytest.approx(2000)
    assert window.energy_mj == pytest.approx(4000)


def test_fault_18_suspend(monkeypatch):
    clock, suspended_ns = VirtualClock(), [0]
    monkeypatch.setattr(clock, "boot_ns", lambda: clock.now_ns() + suspended_ns[0])
    energy = Sensor("e", "energy_mj", lambda: clock.boot_ns() / 1e9 * 500 + 1, 1e-6, total=True)
    with Window([energy], clock) as window:
        clock.sleep(1.0)
        suspended_ns[0] = 3600 * 10**9
    assert window.latency_ms == pytest.approx(1000)
    assert window.energy_mj == Missing("the machine was suspended in the window")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -3.0])
def test_fault_19_impossible_latency(value, monkeypatch):
    on = runtime_cases.board()
    manager, calls = Manager(on, runtime_cases.tables(on)), []
    decide = manager.decide
    monkeypatch.setattr(manager, "decide", lambda *seen: calls.append(seen) or decide(*seen))
    run(runtime_cases.periodic(50.0, horizon_s=1.0), on, runtime_cases.tables(on), manager)
    state, limits = next(seen for seen in calls if seen[0].finished)
    spoilt = state.finished[0]._replace(ran=((1000.0, value),))
    # As if nothing had finished.
    without = decide(state._replace(finished=()), limits)
    assert decide(state._replace(finished=(spoilt,)), limits) == without
    sensor = Sensor("p", "power_mw", lambda: value or math.nan)
    assert isinstance(sensor.read(VirtualClock()), Missing)


@settings(max_examples=100)
@given(steps=st.lists(st.integers(0, 400), min_size=1, max_size=30), span=st.integers(401, 2000))
def test_fault_20_counter_wraps(steps, span):
    counter, total = EnergyCounter(float(span), max_mw=4001.0), 0
    counter.add(Reading(0.0, 0))
    for i, step in enumerate(steps, 1):
        total += step
        counter.add(Reading(float(total % span), i * 100_000_000))
    assert counter.dropped == 0
    assert counter.energy_mj == pytest.approx(total)


@pytest.mark.parametrize("span", [None, 0.0])
def test_fault_20_wrap_of_unknown_range_or_reset(span):
    counter = EnergyCounter(span)
    for reading in readings([900, 950, 10, 60]):
        counter.add(reading)
    assert (counter.energy_mj, counter.dropped) == (100.0, 1)
    reset = EnergyCounter(1e9)  # a reset to 0 would be a wrap of impossible power
    for reading in readings([5000, 5100, 0, 100]):
        reset.add(reading)
    assert (reset.energy_mj, reset.dropped) == (200.0, 1)


def test_fault_20_first_sample_is_only_a_baseline():
    counter = EnergyCounter(1e6)
    counter.add(Missing("Permission denied"))
    counter.add(Reading(5e5, 0))
    assert counter.energy_mj == 0.0


def test_fault_21_two_wraps():
    counter = EnergyCounter(1000.0, max_mw=200.0)
    counter.add(Reading(100.0, 0))
    counter.add(Reading(200.0, 20_000_000_000))  # 20 s at up to 200 mW: up to four times round
    assert (counter.energy_mj, counter.dropped) == (0.0, 1)


@pytest.mark.parametrize("millidegrees", [127_000, -40_000, 10**7])
def test_fault_22_implausible_temperature(machine, root, millidegrees):
    (root / "sys/class/thermal/thermal_zone0/temp").write_text(str(millidegrees))
    assert "implausible" in machine.read("CPU-therm").reason


def test_fault_22_throttling_ramp(machine, fs):
    seen = []
    with machine:
        for cap in sorted(fake_tree.KHZ, reverse=True):
            fs.cap[POLICY] = cap  # what the thermal framework does at each passive poll
            seen.append(machine.set("policy0", "clock_mhz", 2400.0).in_force)
        fs.cap.clear()
    listed = sorted((khz / 1000 for khz in fake_tree.KHZ), reverse=True)
    assert seen == listed  # one step each, and the clock in force is the one reported


NX = (BOARD_DIR / "jetson-xavier-nx.toml").read_text()
BAD_BOARDS = {
    "syntax": (NX.replace("[[cluster]]", "[[cluster", 1), "not valid TOML"),
    "key": (NX.replace("capacity", "capacitance", 1), "capacit"),
    "khz": (NX.replace("[115.2, 650]", "[115200, 650]", 1), "opps"),
    "order": (NX.replace("[115.2, 650]", "[300.0, 650]", 1), "opps"),
    "nul": (NX.replace("Jetson", "Jet\0son", 1), "not valid TOML"),
    "text": (NX.replace("c_uw_mhz_v2 = 700", 'c_uw_mhz_v2 = "700"', 1), "c_uw_mhz_v2"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_BOARDS)
def test_fault_29_board_file(memory, fault):
    text, key = BAD_BOARDS[fault]
    file = memory / "mine.toml"
    file.write_text(text)
    with pytest.raises(BoardError, match=rf"mine\.toml.*{key}"):
        load_board(file)
    assert [p.name for p in memory.iterdir()] == ["mine.toml"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80))
def test_fault_29_board_file_of_any_bytes(memory, raw):
    file = memory / "mine.toml"
    file.write_bytes(raw)
    with pytest.raises(BoardError, match=r"mine\.toml"):
        load_board(file)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "sys/../../secret", "sys/link"])
def test_fault_29_path_outside_the_root(memory, path):
    secret = memory / "secret"
    secret.write_text("1")
    root = write_tree(memory / "root", {"sys/file": 1})
    (root / "sys/link").symlink_to(secret)
    for act in (SysFs(root).read, lambda p: SysFs(root).write(p, "2")):
        with pytest.raises(MachineError, match="outside"):
            act(path)
    assert secret.read_text() == "1"


def test_fault_30_disk_full(memory, monkeypatch, root):
    file = memory / "table.csv"
    atomic_write(file, "good")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            atomic_write(file, "half")
        before = tree_state(root)
        fs = FaultyKernel(root)
        with pytest.raises(OSError, match="No space left"), make_machine(fs, memory):
            pytest.fail("no lease, no machine")
        assert fs.written == []
        assert tree_state(root) == before
    assert file.read_text() == "good"
    assert sorted(p.name for p in memory.iterdir() if p.suffix != ".lock") == ["root", "table.csv"]
    with make_machine(fs, memory):  # and the lock is free again
        pass


def test_fault_30_two_writers(memory):
    file, texts = memory / "file", [str(i) * 50_000 for i in range(2)]
    threads = [
        threading.Thread(target=lambda t=t: [atomic_write(file, t) for _ in range(30)])
        for t in texts
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not file.exists() or file.read_text() in texts
    assert file.read_text() in texts


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 10_000))
def test_fault_31_journal_cut(memory, cut):
    log = DecisionLog(seed=1)
    for i in range(20):
        log.add(float(i), "arrive", app="a", frame=i)
    file = log.write(memory / "log.jsonl")
    whole = file.read_bytes()
    header = whole.index(b"\n") + 1
    kept = whole[: header + cut % (len(whole) - header)]
    file.write_bytes(kept)
    complete = kept[header:].count(b"\n")
    events = list(DecisionLog.read(file))
    assert len(events) in (complete, complete + 1)  # a cut of the newline alone loses nothing
    assert events == log.events[: len(events)]
