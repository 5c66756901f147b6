"""A board's units on machines that fit, and on those that do not."""

import errno
from dataclasses import replace

import pytest
from fake_tree import (
    EMC,
    GPU_MHZ,
    GPU_PATHS,
    KHZ,
    POLICY,
    FakeKernel,
    FaultyKernel,
    devfreq_files,
    ina3221,
    jetson,
    make_machine,
    tree_state,
)

from dynlib.boards.board import Opp
from dynlib.boards.file import list_boards
from dynlib.errors import BoardError, MachineError
from dynlib.machine.bind import bind, host_board, load_board, open_machine
from dynlib.machine.control import Missing
from suite.studies.judge_machine import cpu_files, write_tree

NX = "jetson-xavier-nx"


def small_board():
    """A Xavier NX with as much of it as the fake tree has."""
    board = load_board(NX)
    cpus = [Opp(khz / 1e3, 800) for khz in KHZ]
    gpu = [Opp(mhz, 800) for mhz in GPU_MHZ]
    carmel0, carmel1, _, unit = board.units
    units = (
        replace(carmel0, opps=tuple(cpus)),
        replace(carmel1, opps=tuple(cpus)),
        replace(unit, opps=tuple(gpu)),
    )
    return replace(board, units=units, modes=())


@pytest.fixture
def tree(tmp_path):
    write_tree(tmp_path / "root", jetson())
    return tmp_path / "root"


@pytest.fixture
def machine(tree, tmp_path):
    return make_machine(FakeKernel(tree), tmp_path / "lease")


@pytest.mark.parametrize("name", list_boards())
def test_every_board_fits_its_twin(name):
    board = load_board(name)
    with open_machine(name) as machine:
        bound = bind(board, machine)
        power = board.static_mw is not None
        assert bound.lacks == ([] if power else ["power of the whole board: no sensor"])
        # The TX2's MAXN does not go quite as far as its tables.
        caps = {"a57": 2000, "denver": 2000, "gpu": 1300} if name == "jetson-tx2" else {}
        assert (bound.caps(), bound.caps("cores")) == (caps, {})
        for unit in board.units:
            applied = bound.set(unit.name, "clock_mhz", unit.min_mhz)
            assert (applied.unit, applied.in_force, applied.problem) == (
                unit.name, unit.min_mhz, "")  # fmt: skip
        if board.memory:
            lowest_mhz = board.memory.opps[0].freq_mhz
            assert bound.set("memory", "clock_mhz", lowest_mhz).in_force == lowest_mhz
        assert bound.modes.keys() == {mode.name for mode in board.modes}


def test_a_power_mode_of_the_twin_caps_clocks_and_cores():
    with open_machine(NX) as machine:
        bound = bind(load_board(NX), machine)
        machine.set("board", "mode", "MODE_10W_4CORE")
        assert bound.get("carmel0", "clock_mhz") == 1190.4
        assert bound.caps() == {
            "carmel0": 1190.4, "carmel1": 1190.4, "carmel2": 1190.4, "gpu": 803.25,
            "memory": 1600.0}  # fmt: skip
        assert bound.caps("cores") == {"carmel2": 0}
        machine.set("board", "mode", "MAXN")
        assert bound.caps() == bound.caps("cores") == {}
    assert machine.get("carmel0", "clock_mhz") == 1907.2


def test_knobs_of_a_jetson_turn_by_the_names_of_its_board(machine, tree):
    before = tree_state(tree)
    with machine:
        bound = bind(small_board(), machine)
        assert bound.units == {
            "carmel0": ("policy0",), "carmel1": ("policy2",), "gpu": ("gpu",),
            "memory": ("memory",)}  # fmt: skip
        assert bound.lacks == []
        assert bound.set("carmel1", "clock_mhz", 1200).problem == ""
        assert machine.get("policy2", "clock_mhz") == 1200
        assert bound.set("gpu", "clock_mhz", 510).in_force == 510
        assert bound.set("carmel0", "governor", "userspace").in_force == "userspace"
        assert bound.set("carmel1", "cores", 1).in_force == 1
        # The kernel lists 204 and 1866 MHz only; the point between them is the board's.
        assert bound.set("memory", "clock_mhz", 1331.2).in_force == 1331.2
        assert (tree / EMC / "rate").read_text() == "1331200000"
    assert tree_state(tree) == before


def test_a_thor_is_bound_by_the_names_that_jetpack_7_gives(tmp_path):
    board = load_board("jetson-agx-thor")
    khz = [round(1000 * mhz) for mhz in board.cpus[0].freqs]
    emc = {"rate": 4_266_000_000, "min_rate": 665_600_000, "max_rate": 4_266_000_000}
    modes = "".join(f"< POWER_MODEL ID={i} NAME={m.name} >\n" for i, m in enumerate(board.modes))
    write_tree(tmp_path, {
        **cpu_files([(cluster.cpus, khz) for cluster in board.cpus]),
        **devfreq_files(GPU_PATHS["thor-jp7"], range(54, 1576, 9)),
        **devfreq_files("sys/class/devfreq/gpu-nvd-0", range(54, 1693, 9)),  # video
        **{f"{EMC}/{name}": hz for name, hz in emc.items()},
        **ina3221("sys/class/hwmon/hwmon5", {
            "VDD_GPU": (12040, 640), "VDD_CPU_SOC_MSS": (12040, 960), "VIN_SYS_5V0": (5088, 1740)}),
        "sys/class/hwmon/hwmon6/name": "ina238",
        "sys/class/hwmon/hwmon6/power1_input": 40_000_000,
        "etc/nvpmodel.conf": modes, "var/lib/nvpmodel/status": "pmode:0001",
    })  # fmt: skip
    with make_machine(FakeKernel(tmp_path), tmp_path / "lease") as machine:
        bound = bind(board, machine)
        assert bound.lacks == []
        assert bound.units["v3ae-6"] == ("policy12",)
        assert bound.sensors == tuple(f"{rail}.power" for rail in board.sensors[0].total)
        assert bound.caps() == {"gpu": 1386}  # of the mode 120W
        assert bound.set("gpu", "clock_mhz", 1386).problem == ""
        assert (tmp_path / GPU_PATHS["thor-jp7"] / "cur_freq").read_text().strip() == "1386000000"


def test_the_whole_board_is_the_rails_that_its_file_names(tmp_path):
    rails = {"VDD_IN": (5000, 1200), "SYS": (5000, 400), "NC": (0, 0)}
    write_tree(tmp_path, jetson() | ina3221("sys/class/hwmon/hwmon3", rails))
    board = small_board()
    (meter,) = board.sensors
    for total, expected, lacks in (
        (("VDD_IN",), ("VDD_IN.power",), []),
        (("SYS",), ("SYS.power",), []),
        ((), ("VDD_IN.power",), []),
        (
            ("VDD_OUT", "SYS"),
            ("VDD_IN.power",),
            ["power of the whole board: no sensors VDD_OUT.power"],
        ),
    ):
        machine = make_machine(FakeKernel(tmp_path), tmp_path / "lease")
        meters = (replace(meter, total=total),)
        bound = bind(replace(board, sensors=meters), machine)
        assert (bound.sensors, bound.lacks) == (expected, lacks)
        whole = [s.name for s in machine.sensors.values() if s.total]
        assert tuple(whole) == expected


def test_what_does_not_fit_is_named(machine):
    bound = bind(load_board("jetson-agx-xavier"), machine)
    assert bound.units["carmel0"] == ("policy0",)
    assert bound.units["carmel3"] == ()
    words = "\n".join(bound.lacks)
    assert "carmel3: the machine has no CPUs [6, 7]" in words
    assert "carmel0: policy0 has no clocks of 115.2, 192" in words
    assert "power modes: the machine has no MAXN, MODE_10W" in words
    assert "no sensors GPU.power, CPU.power" in words
    assert "memory: memory has no clocks of 2133 MHz" in words


def test_a_knob_that_is_not_there_is_said_once_and_left_alone(machine, caplog):
    with machine:
        bound = bind(load_board("jetson-agx-xavier"), machine)
        told = len(bound.lacks)
        for _ in range(3):
            applied = bound.set("carmel3", "clock_mhz", 1190.4)
            assert isinstance(applied.in_force, Missing)
            assert "no such knob" in applied.problem
            refused = bound.set("carmel0", "clock_mhz", 115.2)
            assert "expected one of" in refused.problem
            assert refused.in_force == machine.get("policy0", "clock_mhz")
        assert len(bound.lacks) == told + 2
        assert len(caplog.records) == 2
        assert not bound.has("carmel3", "clock_mhz")
        assert bound.has("carmel0", "clock_mhz")
        with pytest.raises(BoardError, match="no unit 'carmel9'"):
            bound.set("carmel9", "clock_mhz", 1000)
    with pytest.raises(MachineError, match="outside of 'with"):
        bound.set("carmel0", "clock_mhz", 1000)


def test_a_cluster_of_several_policies_turns_as_one(tmp_path):
    """On many x86 machines each CPU is a policy of its own; cpu0 cannot go offline."""
    files = cpu_files([((cpu,), KHZ) for cpu in range(4)])
    write_tree(tmp_path, files)
    cluster = small_board().units[0]
    board = replace(small_board(), units=(replace(cluster, cpus=(0, 1, 2, 3), cores=4),))
    with make_machine(FakeKernel(tmp_path), tmp_path / "lease") as machine:
        bound = bind(board, machine)
        name = cluster.name
        assert bound.units[name] == ("policy0", "policy1", "policy2", "policy3")
        bound.set(name, "clock_mhz", 1600)
        assert [machine.get(unit, "clock_mhz") for unit in bound.units[name]] == [1600] * 4
        machine.set("policy2", "clock_mhz", 800)
        assert bound.get(name, "clock_mhz") == 800
        assert bound.set(name, "cores", 3).in_force == 3
        assert [machine.get(unit, "cores") for unit in ("policy1", "policy2", "policy3")] == [
            1, 1, 0]  # fmt: skip
        for count in (0, 5):
            assert "expected one of" in bound.set(name, "cores", count).problem
            assert bound.get(name, "cores") == 3


def test_a_policy_wider_than_the_cluster_is_not_turned(tmp_path):
    write_tree(tmp_path, cpu_files([((0, 1, 2, 3), KHZ)]))
    with make_machine(FakeKernel(tmp_path), tmp_path / "lease") as machine:
        bound = bind(small_board(), machine)
        assert bound.units["carmel0"] == ()
        assert "carmel0: policy0 also has the CPUs [2, 3]" in bound.lacks
        bound.set("carmel0", "clock_mhz", 800)
        assert machine.get("policy0", "clock_mhz") == 800 == KHZ[0] / 1e3  # as it was found
        assert (tmp_path / POLICY / "scaling_max_freq").read_text().strip() == str(KHZ[-1])


def test_a_thermal_limit_is_a_cap_until_a_second_after_it_was_seen(tree, tmp_path):
    class Waits:
        """A clock of its own."""

        t_ns = 0

        def now_ns(self):
            return self.t_ns

        boot_ns = now_ns

        def sleep(self, seconds):
            self.t_ns += round(1e9 * seconds)

    kernel, clock = FakeKernel(tree), Waits()
    with make_machine(kernel, tmp_path / "lease", clock=clock) as machine:
        bound = bind(small_board(), machine)
        assert bound.caps() == {}
        kernel.cap[POLICY] = 1_200_000
        applied = bound.set("carmel0", "clock_mhz", 2000)
        assert (applied.in_force, bool(applied.problem)) == (1200, True)
        assert bound.caps() == {"carmel0": 1200}
        bound.set("carmel0", "clock_mhz", 1200)
        assert bound.caps() == {"carmel0": 1200}
        clock.sleep(1.1)
        assert bound.caps() == {}
        kernel.cap.clear()
        assert bound.set("carmel0", "clock_mhz", 2000).problem == ""
        assert bound.caps() == {}
    machine = make_machine(kernel, tmp_path / "lease")
    kernel.write(f"{POLICY}/scaling_max_freq", "1000000")  # somebody else's limit, at the start
    assert bind(small_board(), machine).caps() == {"carmel0": 1000}


def test_a_unit_that_vanishes_or_is_denied_keeps_nobody_waiting(tree, tmp_path):
    kernel = FaultyKernel(tree)
    with make_machine(kernel, tmp_path / "lease") as machine:
        bound = bind(small_board(), machine)
        kernel.fail("write", "scaling_max_freq", errno.EACCES)
        assert "Permission denied" in bound.set("carmel0", "clock_mhz", 1000).problem
        assert not bound.has("carmel0", "clock_mhz")
        assert bound.has("gpu", "clock_mhz")
        kernel.fail("read", "policy2/*", errno.ENODEV)
        assert isinstance(bound.get("carmel1", "clock_mhz"), Missing)
        assert "carmel1" not in bound.caps()


def test_two_gpus_of_other_names_are_not_guessed(tmp_path):
    files = jetson()
    write_tree(tmp_path, files)
    machine = make_machine(FakeKernel(tmp_path), tmp_path / "lease")
    gpu = machine.units.pop("gpu")
    machine.units |= {name: replace(gpu, name=name) for name in ("nvidia0", "nvidia1")}
    bound = bind(small_board(), machine)
    assert bound.units["gpu"] == ()
    assert any("['nvidia0', 'nvidia1'], none called 'gpu'" in lack for lack in bound.lacks)
    assert GPU_PATHS["xavier-jp5"] in "\n".join(files)


def test_this_computer_fits_the_board_made_of_it():
    machine = open_machine("auto")
    bound = bind(host_board(), machine)
    assert all(bound.units.values())
    assert not [lack for lack in bound.lacks if "CPUs" in lack or "no clocks of" in lack]
