"""What a machine has and lacks, in a table and as a board file: of a fake Jetson, and here."""

import subprocess
import sys

import pytest
from fake_tree import FakeKernel, jetson, make_machine, tree_state
from live_cases import quota

from dynlib.boards.file import read_board
from dynlib.errors import BoardError
from dynlib.machine.bind import bind, load_board, open_machine
from dynlib.machine.control import MachineUnit, Parts
from dynlib.machine.duty import duty_parts
from dynlib.machine.machine import Machine
from dynlib.profile.describing import describe, write_template
from suite.studies.judge_machine import write_tree


def fake(tmp_path, **more):
    files = jetson() | {"sys/devices/system/cpu/cpu2/cpu_capacity": 512} | more
    return make_machine(FakeKernel(write_tree(tmp_path / "root", files)), tmp_path / "lease")


def test_the_file_of_a_machine_has_what_it_shows_and_says_what_is_left_to_do(tmp_path):
    machine = fake(tmp_path)
    before = tree_state(tmp_path / "root")
    board = read_board(write_template(machine, tmp_path / "mine.toml"))
    assert [(unit.name, unit.kind, unit.cpus) for unit in board.units] == [
        ("policy0", "cpu", (0, 1)), ("policy2", "cpu", (2, 3)), ("gpu", "gpu", ()),
    ]  # fmt: skip
    assert [unit.capacity for unit in board.cpus] == [1024, 512]
    assert board.units[0].freqs == (800.0, 1000.0, 1200.0, 1600.0, 2000.0, 2400.0)
    assert board.gpu.freqs == (114.75, 510.0, 1109.25)
    assert [opp.freq_mhz for opp in board.memory.opps] == [204.0, 1866.0]
    assert board.sensors[0].total == ("VDD_IN",)
    assert board.static_mw is None
    assert "power is unknown" in board.notes[0]
    assert set(machine.lacks) <= set(board.notes)
    assert tree_state(tmp_path / "root") == before
    lacks = bind(board, machine).lacks
    assert not [lack for lack in lacks if "no clocks of" in lack or "no sensors" in lack]


def test_a_governor_that_no_file_may_name_is_not_written(tmp_path):
    other = {"sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "interactive"}
    board = read_board(write_template(fake(tmp_path, **other), tmp_path / "mine.toml"))
    assert [unit.governor for unit in board.cpus] == ["performance", "schedutil"]


def test_the_table_has_every_knob_sensor_and_lack_once(tmp_path):
    machine = fake(tmp_path)
    table = describe(machine)
    by = table.groupby("is")["part"].apply(list)
    assert by["knob"] == [".".join(key) for key in machine.knobs]
    assert by["sensor"] == list(machine.sensors)
    assert len(by.get("lacks", [])) == len(machine.lacks)
    rows = table.set_index("part")
    assert rows.loc["gpu.clock_mhz", "possible"] == "3 from 114.75 to 1109.25"
    assert rows.loc["VDD_IN.power", "now"] == "6000"
    assert rows.loc["policy0.governor", "now"] == "schedutil"


def test_a_duty_clock_is_said_to_be_one():
    parts = Parts([MachineUnit("cpu", "cpu", (0, 1))], [quota()])
    machine = Machine("host", parts + duty_parts(parts, 1000.0), None)
    possible = describe(machine).set_index("part")["possible"]
    assert possible["cpu.clock_mhz"] == "5 from 200 to 1000, a duty clock by CPU quota"
    assert "duty" not in possible["process.quota_pct"]


def test_what_the_process_lacks_is_in_the_table_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    files = write_tree(tmp_path / "root", jetson())
    machine = open_machine("auto", root=files, folder=tmp_path / "lease")
    why = describe(machine).set_index("part")["possible"]
    assert why["process.threads"] == "torch is not loaded"
    notes = read_board(write_template(machine, tmp_path / "mine.toml")).notes
    assert not [note for note in notes if note.startswith("process.")]


def test_this_machine_too_and_a_twin_has_a_file_already(tmp_path):
    machine = open_machine("auto")
    board = load_board(write_template(machine, tmp_path / "mine.toml"))
    assert [unit.freqs for unit in board.cpus] == [unit.freqs for unit in load_board("auto").cpus]
    assert not describe(machine)["part"].eq("").any()
    with pytest.raises(BoardError, match="virtual twin"):
        write_template(open_machine("jetson-nano"), tmp_path / "twin.toml")
    assert not (tmp_path / "twin.toml").exists()


def test_the_command_writes_a_file_once(tmp_path):
    path = tmp_path / "mine.toml"
    command = [sys.executable, "-m", "dynlib.profile", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{path} written" in done.stdout
    assert "lacks" in done.stdout
    before = load_board(path)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert load_board(path) == before
