"""A tiny board and table with round numbers, shared by the tests of dynlib.runtime."""

from hypothesis import strategies as st

from dynlib.boards.board import Board, Opp, Unit
from dynlib.manager.policy import Placement
from dynlib.points import PointTable, make_table
from dynlib.runtime import oracle
from dynlib.runtime.case import Case
from dynlib.runtime.rivals import Static
from dynlib.runtime.summary import Run
from dynlib.workload import App, Workload

MHZ = (250.0, 500.0, 1000.0)


def unit(name="gpu", kind="gpu", **values):
    values = {
        "cores": 1, "c_uw_mhz_v2": 4000.0, "idle_fraction": 0.25, "stall_ms": 0.0,
        "settle_ms": 5.0 if kind == "gpu" else 1.0, "noise_cv": 0.0,
        "governor": "nvhost_podgov" if kind == "gpu" else "schedutil",
        "opps": (Opp(250.0, 500.0), Opp(500.0, 500.0), Opp(1000.0, 1000.0)),
    } | values  # fmt: skip
    return Unit(name, kind, **values)


def board(*units, static_mw=1000.0):
    units = units or (unit(), unit("cpu", "cpu", cores=2))
    return Board("tiny", "", units, None, static_mw, "fitted", (), None, (), (), "0" * 64)


def tables(on, nets=(("small", 70.0, 10.0), ("large", 80.0, 20.0)), units=("gpu",), model="net"):
    """Latency is inversely proportional to the clock; the CPU is ten times slower."""
    rows = []
    for name in units:
        kind = on.unit(name).kind
        for net, accuracy_pct, ms in nets:
            for mhz in on.unit(name).freqs:
                slow = 1 if kind == "gpu" else 10
                rows.append({
                    "model": model, "subnet": net, "board": on.name, "unit": name, "batch": 1,
                    f"{kind}_mhz": mhz, "accuracy_val_pct": accuracy_pct,
                    "latency_ms": slow * ms * on.unit(name).max_mhz / mhz, "source": "simulated",
                })  # fmt: skip
    return {model: PointTable(make_table(rows), on)}


# A GPU and a CPU that scatter, with both networks on either.
NOISY = board(unit(noise_cv=0.03, stall_ms=0.1), unit("cpu", "cpu", cores=2, noise_cv=0.1))
NOISY_TABLES = tables(NOISY, units=("gpu", "cpu"))


def periodic(period_ms=100.0, name="app", horizon_s=10.0, changes=(), **values):
    values = {"deadline_ms": period_ms, "period_ms": period_ms} | values
    return Workload("case", horizon_s, (App(name, "net", **values),), tuple(changes))


def fixed(subnet="large", mhz=1000.0, where="gpu", app="app", **values):
    clocks = {} if mhz is None else {where: mhz}
    return Static("fixed", {app: Placement(subnet, where)}, clocks, **values)


def run(workload, on, points, policy, seed=0, **options):
    """The log of a simulated run."""
    return Case(workload, on, points).simulate(policy, seed, **options).log


def cases(make, on, points):
    """Seed -> case, of seed -> workload."""
    return lambda seed: Case(make(seed), on, points)


def optimum(workload, on, points, seed=0, only=None, **options):
    return oracle.optimum(Case(workload, on, points), seed, only, **options)


def energy_mj(log):
    return Run(None, log).energy_mj


def timeline(log, workload, points, bin_s=0.25):
    return Run(Case(workload, board(), points), log).timeline(bin_s)


def summarise(log, workload, points, on):
    return Run(Case(workload, on, points), log).summary()


def frames_of(log, workload, points):
    return Run(Case(workload, board(), points), log).frames()


def events(log, kind):
    return [e for e in log if e["event"] == kind]


def queue_lengths(log):
    """Frames that wait after each event."""
    step, waiting, lengths, started = {"arrive": 1, "start": -1, "drop": -1}, 0, [], set()
    for event in log:
        frame = event.get("app"), event.get("frame")
        if event["event"] == "drop" and frame in started:
            continue
        started |= {frame} if event["event"] == "start" else set()
        waiting += step.get(event["event"], 0)
        lengths.append(waiting)
    return lengths


def net_table(nets):
    """(accuracy, ms at the highest clock, MB) of each network -> a table for the tiny GPU."""
    rows = [
        {"model": "net", "subnet": f"n{i}", "board": "tiny", "unit": "gpu", "batch": 1,
         "gpu_mhz": mhz, "accuracy_val_pct": accuracy_pct, "memory_mb": mb,
         "latency_ms": ms * MHZ[-1] / mhz, "source": "simulated"}
        for i, (accuracy_pct, ms, mb) in enumerate(nets) for mhz in MHZ
    ]  # fmt: skip
    return PointTable(make_table(rows), board(unit(noise_cv=0.05)))


NETS = st.lists(
    st.tuples(st.integers(50, 90), st.integers(2, 40), st.integers(1, 4)), min_size=1, max_size=12
)
