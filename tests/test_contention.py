import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import DynlibError
from suite.studies.contention import CASES, Coupling, PublishedCase, Queue, judged_cases


@given(st.floats(1, 100), st.floats(0, 1), st.integers(3, 20), st.integers(1, 20))
def test_a_queue_is_found_from_two_points(alone_ms, share, at, n):
    truth = Queue(alone_ms, share)
    assert truth.latency_ms(1) == pytest.approx(alone_ms)
    assert truth.latency_ms(2) == pytest.approx(2 * alone_ms)
    found = Queue.fit(alone_ms, at, truth.latency_ms(at))
    assert found.latency_ms(n) == pytest.approx(truth.latency_ms(n), rel=1e-6)
    assert truth.latency_ms(n) <= n * alone_ms * (1 + 1e-9)


def test_two_clients_tell_nothing():
    for arguments in ((10.0, 2, 20.0), (10.0, 8, 5.0), (0.0, 8, 5.0)):
        with pytest.raises(DynlibError, match="at least 3 clients"):
            Queue.fit(*arguments)


def test_queues_of_the_measured_jetsons(data_root):
    from suite.studies.fit_boards import read_samples

    for board in ("jetson-nano", "jetson-xavier-nx"):
        table = read_samples(data_root / "boards" / "measured_power_jetson.csv", board)
        errors = []
        for _, rows in table.groupby("freq_mhz"):
            known = rows.set_index("concurrency")["latency_ms"]
            if 1 in known:
                queue = Queue.fit(known[1], 8, known[8])
                errors += [abs(queue.latency_ms(n) / known[n] - 1) for n in range(2, 8)]
        assert 100 * sum(errors) / len(errors) <= 10


def test_published_cases():
    gpu = Coupling.fit([c for c in CASES if c.unit == "gpu"])
    cpu = Coupling.fit([c for c in CASES if c.unit == "cpu"])
    assert 0.1 < gpu.kappa < 0.4  # kernels of two applications overlap
    assert 0.7 < cpu.kappa < 1.0  # nearly time-sharing
    assert cpu.slowdown(0) == 1
    rows = judged_cases()
    assert len(rows) == 5
    assert all(abs(row["predicted_ms"] / row["measured_ms"] - 1) < 0.2 for row in rows)


def test_a_judged_case_is_not_seen():
    cases = [PublishedCase("a", "gpu", 1, 10, 15), PublishedCase("b", "gpu", 1, 10, 99)]
    assert [row["predicted_ms"] for row in judged_cases(cases)] == [99, 15]
    with pytest.raises(DynlibError, match="at least one"):
        Coupling.fit([])
