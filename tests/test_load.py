"""The load beside a live experiment."""

import psutil
import pytest

from suite.studies.load import Burst, background


def children():
    return psutil.Process().children()


def test_the_load_is_gone_at_the_end_whatever_happens():
    before = set(children())
    workers = set()

    def fail():
        with background([Burst(0.0, 60.0, 3)]) as start:
            start()
            workers.update(set(children()) - before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(workers) == 3
    assert set(children()) == before
    assert not any(worker.is_running() for worker in workers)


def test_no_load_no_process():
    before = set(children())
    with background([]) as start:
        start()
        assert set(children()) == before
