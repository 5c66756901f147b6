"""A live run that is looked at: what goes wrong is said, once and where, and nothing else is."""

from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
from live_cases import (
    Clock,
    FakeKnob,
    Net,
    camera,
    knobbed,
    machine,
    managed,
    measured,
    turned,
)

from dynlib.runtime.case import Case
from dynlib.runtime.live import Served
from suite.studies import live_soak as soaking
from suite.studies.live_soak import soak_live, trouble_free_minutes

LOOKS = 10
SECONDS = 6.0


@pytest.fixture
def clock(monkeypatch):
    return turned(monkeypatch, Clock())


def looks(clock, tmp_path, answer=None) -> pd.DataFrame:
    """Some seconds of a camera, whose frames `answer(net, k)` answers."""
    on, net = machine(), Net(clock)
    case = Case(camera(horizon_s=SECONDS), on, measured(Net(clock), on))
    served = Served(net.switch, (lambda k: answer(net, k)) if answer else net.answer)
    rows = soaking.watch(
        case, managed(on, case.tables), {"cam": served}, tmp_path / "live.jsonl", LOOKS
    )
    return pd.DataFrame(rows)


def test_a_run_without_a_problem_says_none(clock, tmp_path):
    found = looks(clock, tmp_path)
    assert len(found) == LOOKS
    assert set(found["problems"]) == {""}
    assert found["frames"].sum() == 1000 * SECONDS / camera().apps[0].period_ms
    assert found["answered"].iloc[-1] + found["given_up"].iloc[-1] == found["frames"].sum()
    assert trouble_free_minutes(found) == pytest.approx(SECONDS / 60)


def test_a_network_that_fails_is_a_problem_from_the_look_after_it(clock, tmp_path):
    def answer(net, k):
        if k == 110:  # of 250
            raise RuntimeError("out of memory")
        return net.answer(k)

    found = looks(clock, tmp_path, answer)
    (bad,) = found.index[found["problems"] != ""]
    assert "out of memory" in found["problems"][bad]
    assert found["seconds"][:bad].sum() < 110 * 0.024 < found["seconds"][: bad + 1].sum()
    assert trouble_free_minutes(found) == pytest.approx(found["seconds"][:bad].sum() / 60)


def test_memory_that_grows_is_a_problem(clock, tmp_path, monkeypatch):
    # What this process really has may shrink meanwhile, by what earlier tests left behind.
    rss = {"mb": 500.0}
    monkeypatch.setattr(
        psutil.Process, "memory_info", lambda process: SimpleNamespace(rss=rss["mb"] * 1e6)
    )

    def answer(net, k):
        if k % 25 == 0:
            rss["mb"] += 10.0
        return net.answer(k)

    found = looks(clock, tmp_path, answer)
    assert "memory grew" in found["problems"].iloc[-1]
    assert found["problems"].iloc[0] == ""


def test_a_frame_that_nobody_answers_or_gives_up_is_a_problem(clock, tmp_path, monkeypatch):
    record = soaking._Watched.record

    def forget(run, event, job, **values):
        if job.frame != 100 or event == "arrive":
            record(run, event, job, **values)

    monkeypatch.setattr(soaking._Watched, "record", forget)
    monkeypatch.setattr(soaking, "STALE_MS", 1000.0)
    found = looks(clock, tmp_path)
    assert "('cam', 100)" in found["problems"].str.cat()
    assert "1 neither answered nor given up" in found["problems"].iloc[-1]


def test_a_run_that_breaks_off_is_a_problem(clock, tmp_path, monkeypatch):
    def fail(run):
        raise OSError("the CPU is gone")

    monkeypatch.setattr(soaking._Watched, "observe_units", fail)
    found = looks(clock, tmp_path)
    assert "the CPU is gone" in found["problems"].iloc[-1]
    assert trouble_free_minutes(found) == 0


def test_a_knob_that_stays_turned_is_a_problem():
    threads = FakeKnob("threads", choices=(1, 2))
    fake = knobbed(threads)
    found = soaking.kept_to(fake)
    assert soaking.not_as_found(fake, found) == []
    threads.value = 1
    fake.problems = {"cpu.governor": "no permission"}
    left = soaking.not_as_found(fake, found)
    assert left == [
        "cpu.governor was not put back: no permission",
        "process.threads was 2 and is 1",
    ]


def test_the_shipped_network_is_served_here_for_a_second(tmp_path):
    before = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else None
    found = soak_live(tmp_path, 1.0, 2, "generated")
    assert found["frames"].sum() > 10
    assert len(found) == 2
    assert found["log_mb"].iloc[-1] > 0
    if before is not None:
        assert psutil.Process().cpu_affinity() == before
