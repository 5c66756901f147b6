"""The live loop on a clock that the test turns, shared by its tests and those of its faults."""

import math
from threading import Event

from runtime_cases import board, unit

from dynlib.machine.control import Knob, MachineUnit, Parts
from dynlib.machine.machine import Machine
from dynlib.manager.manager import Manager
from dynlib.manager.policy import Placement
from dynlib.points import PointTable
from dynlib.profile import points as points_module
from dynlib.profile.points import at_full_clock, profile_points
from dynlib.runtime import live as live_module
from dynlib.runtime import loop as loop_module
from dynlib.runtime.case import Case
from dynlib.runtime.live import Live, Served
from dynlib.runtime.rivals import Static
from dynlib.workload import App, Workload

MS = {"small": 2.0, "large": 10.0}
ROWS = {"small": {"accuracy_val_pct": 70.0}, "large": {"accuracy_val_pct": 80.0}}
QUOTA = {"small": 20.0, "large": 83.0}  # that the networks were measured with, where there is one


class Clock:
    """Time that only the test moves; looking at it takes a microsecond."""

    t_s = 100.0

    def __init__(self):
        self.script = []

    def perf_counter(self):
        self.t_s += 1e-6
        return self.t_s

    monotonic = process_time = perf_counter

    def sleep(self, seconds):
        self.t_s += seconds


class Net:
    """Answers with its own name after the time it takes; `stretch(s since the start)` slows it."""

    def __init__(self, clock, stretch=lambda t_s: 1.0):
        self.clock, self.stretch, self.subnet, self.begin_s = clock, stretch, None, clock.t_s

    def switch(self, subnet):
        self.subnet = subnet

    def answer(self, k):
        self.clock.sleep(MS[self.subnet] * self.stretch(self.clock.t_s - self.begin_s) / 1000)
        return self.subnet


class Bell(Event):
    """Waits on a clock of the test; what its script has for that time is done meanwhile."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.begin_s = clock, clock.t_s

    def wait(self, timeout=None):
        end_s = self.clock.t_s + timeout
        while not self.is_set() and self.clock.script:
            at_s, do = self.clock.script[0]
            if self.begin_s + at_s > end_s:
                break
            self.clock.t_s = max(self.clock.t_s, self.begin_s + at_s)
            self.clock.script.pop(0)
            do()
        if not self.is_set():
            self.clock.t_s = end_s


def turned(monkeypatch, clock):
    """`clock` in place of the machine's."""
    for module in (live_module, points_module):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(loop_module, "Event", lambda: Bell(clock))
    return clock


def machine():
    """The board of this machine: one CPU of two cores, whose clock is the kernel's business."""
    return at_full_clock(board(unit("cpu", "cpu", cores=2)))


def measured(net, on, **options):
    table = profile_points(on, ROWS, net.switch, net.answer, model="net", **options)
    return {"net": PointTable(table, on)}


def camera(deadline_ms=12.0, period_ms=24.0, horizon_s=6.0, **values):
    return Workload("live", horizon_s, (App("cam", "net", deadline_ms, period_ms=period_ms,
                                            **values),))  # fmt: skip


def go(clock, policy, workload=None, stretch=lambda t_s: 1.0, knobs=None, on=None, make=Net,
       **options):  # fmt: skip
    """Serve with `make(clock, stretch)` an app; the run and its frames."""
    on = on or machine()
    tables = measured(Net(clock), on)
    if knobs and ("process", "quota_pct") in knobs.knobs:
        rows = tables["net"].frame
        tables = {"net": PointTable(rows.assign(quota=rows["subnet"].map(QUOTA)), on)}
    workload = workload or camera()
    nets = {app.name: make(clock, stretch) for app in workload.apps}
    served = {name: Served(net.switch, net.answer) for name, net in nets.items()}
    policy = policy(on, tables) if callable(policy) else policy
    run = Case(workload, on, tables).serve(policy, served, machine=knobs, **options)
    return run, run.frames()


def steered(clock, script, apps=None, horizon_s=math.inf, policy=None, make=Net, **options):
    """A live run steered by `script(live)`: [(s, what to do then), ...]; the run and its frames."""
    on = machine()
    tables = measured(Net(clock), on)
    apps = (App("cam", "net", 30.0, "pushed"),) if apps is None else apps
    nets = {app.name: make(clock) for app in apps}
    served = {name: Served(net.switch, net.answer) for name, net in nets.items()}
    policy = (policy or managed)(on, tables)
    live = Live(Case(Workload("live", horizon_s, apps), on, tables), policy, served, **options)
    clock.script = sorted(script(live), key=lambda item: item[0])
    run = live.serve()
    return run, run.frames()


def fixed(subnet):
    return Static("fixed", {"cam": Placement(subnet, "cpu")}, {})


def managed(on, tables):
    return Manager(on, tables, objective="accuracy")


class FakeKnob(Knob):
    """A knob of this process; `error` is what the nth write and later ones raise, 0 the first."""

    unit, targets = "process", ("group/file",)

    def __init__(self, kind, choices=(), bounds=None, error=None, after=0, times=10**6):
        self.kind, self.choices, self.bounds, self.error = kind, choices, bounds, error
        self.broken, self.local = range(after, after + times), error is None
        self.value, self.history, self.writes = (choices or bounds)[-1], [], 0

    def get(self):
        return self.value

    def put(self, value):
        self.writes += 1
        if self.error and self.writes - 1 in self.broken:
            raise self.error
        self.value = value
        self.history.append(value)


def quota(**faults):
    return FakeKnob("quota_pct", bounds=(1.0, 200.0), **faults)


def knobbed(*knobs, sensors=()):
    parts = Parts([MachineUnit("process", "process")], list(knobs), list(sensors))
    return Machine("fake", parts, None)
