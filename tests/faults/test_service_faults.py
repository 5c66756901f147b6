"""Faults of the service: whoever is killed, the machine is put back and the programs serve on."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import psutil
import pytest
from fake_tree import tree_state
from service_cases import wait_for
from service_programs import start

from dynlib.deploy.client import control
from dynlib.machine.lease import lease_file
from dynlib.sysfs import SysFs

pytestmark = pytest.mark.faults


class Machine:
    """A service in a process of its own on a tree of files, and one program on each CPU unit."""

    def __init__(self, root, folder, stack):
        self.root, self.folder, self.path = root, folder, folder / "manager.sock"
        self.stack, self.found = stack, tree_state(root)
        self.serve()
        self.programs = [self.program(name, unit) for name, unit in
                         (("one", "policy0"), ("two", "policy2"))]  # fmt: skip

    def serve(self):
        command = [sys.executable, "-m", "dynlib.deploy.service", "--root", self.root]
        command += ["--lease", self.folder, "--socket", self.path, "--log", self.folder / "logs"]
        self.service = self.stack.enter_context(subprocess.Popen(list(map(str, command))))
        self.stack.callback(self.service.kill)
        wait_for(self.answers)

    def program(self, *arguments):
        made = self.stack.enter_context(start(self.path, "serve", *arguments))
        self.stack.callback(made.kill)
        assert made.stdout.readline().startswith("managed")
        return made

    def answers(self):
        try:
            return control("status", path=self.path)["apps"] is not None
        except OSError:
            return False

    def names(self):
        return sorted(control("status", path=self.path)["apps"])

    def changed(self):
        return tree_state(self.root) != self.found

    def restored(self):
        return not self.changed() and not lease_file(SysFs(self.root), self.folder).exists()

    def guardian(self):
        """The process that puts the machine back: nobody's child."""
        for process in psutil.process_iter(["cmdline"]):
            if str(lease_file(SysFs(self.root), self.folder)) in (process.info["cmdline"] or ()):
                return process.pid
        raise AssertionError("no guardian")


@pytest.fixture
def machine(root, memory):
    with ExitStack() as stack:
        folder = memory / "state"
        folder.mkdir(0o700)
        machine = Machine(root, folder, stack)
        wait_for(machine.changed)  # a clock of the manager's is in force
        yield machine


def test_fault_11_the_service_is_killed(machine):
    machine.service.kill()
    for program in machine.programs:
        assert program.stdout.readline().split() in (["alone", "small"], ["alone", "large"])
    wait_for(machine.restored)
    machine.serve()
    for program in machine.programs:
        assert program.stdout.readline().startswith("managed")
    assert machine.names() == ["one", "two"]


def test_fault_12_the_service_and_its_guardian_are_killed(machine):
    os.kill(machine.guardian(), signal.SIGKILL)
    machine.service.kill()
    machine.service.wait()
    assert machine.changed()
    for program in machine.programs:
        assert program.stdout.readline().startswith("alone")
    machine.serve()  # which begins with what is owed
    for program in machine.programs:
        assert program.stdout.readline().startswith("managed")
    control("stop", path=machine.path)
    machine.service.wait()
    assert machine.restored()


def test_fault_11_a_program_is_killed(machine):
    one, two = machine.programs
    one.kill()
    wait_for(lambda: machine.names() == ["two"])
    assert two.poll() is None
    machine.program("one", "policy0")
    assert machine.names() == ["one", "two"]


def test_fault_10_the_service_is_ended_by_a_signal(machine):
    machine.service.terminate()
    assert machine.service.wait(20) == -signal.SIGTERM
    assert machine.restored()
    for program in machine.programs:
        assert program.stdout.readline().startswith("alone")


def test_fault_14_a_second_service_is_refused(machine):
    command = [sys.executable, "-m", "dynlib.deploy.service", "--root", str(machine.root)]
    command += ["--lease", str(machine.folder), "--socket", str(machine.folder / "other.sock")]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert f"held by process {machine.service.pid}" in second.stderr
    assert machine.names() == ["one", "two"]


def test_a_service_that_hangs_is_served_without(machine):
    os.kill(machine.service.pid, signal.SIGSTOP)
    for program in machine.programs:
        assert program.stdout.readline().startswith("alone")
    os.kill(machine.service.pid, signal.SIGCONT)
    for program in machine.programs:
        assert program.stdout.readline().startswith("managed")
