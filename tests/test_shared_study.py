"""A study in a database: workers die, nothing that was finished is lost."""

import multiprocessing

import pytest

from dynlib.errors import SearchError
from dynlib.searching import search
from dynlib.searching.study import open_study
from suite.errors import SuiteError
from suite.studies import shared_study
from suite.studies.shared_study import GOALS, SPACE, kill_searchers, measure, no_postgres, postgres


@pytest.fixture(scope="module")
def url():
    if why := no_postgres():
        pytest.skip(why)
    with postgres() as url:
        yield url


@pytest.mark.skipif(bool(no_postgres()), reason=no_postgres() or "")
def test_processes_may_meet_in_a_fresh_database():
    """Each finds tables that the other is just making."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dynlib.searching.study"])
    with postgres() as url:
        crew = [
            context.Process(target=open_study, args=(SPACE, GOALS, url, "mine")) for _ in range(4)
        ]
        for process in crew:
            process.start()
        for process in crew:
            process.join()
    assert [process.exitcode for process in crew] == [0] * 4


@pytest.mark.faults
def test_a_killed_worker_loses_nothing_that_was_finished(url):
    table = kill_searchers(url, 1, seed=0, trials=16)
    assert table["killed"].all()
    assert (table["lost"] == 0).all()
    assert (table["written"] >= 8).all()
    assert (table["done"] >= 16).all()


def test_what_the_database_does_not_have_is_counted(url, monkeypatch, tmp_path):
    monkeypatch.setattr(shared_study, "_written", lambda folder: ["r1-d1.1-w8.16"])
    assert shared_study._compare(tmp_path, url, "empty")["lost"] == 1


def test_the_password_is_in_no_message(url):
    other = {"work": "minimize"}
    search(SPACE, measure, GOALS, trials=1, seed=0, storage=url, name="mine")
    password = url.split(":")[2].split("@")[0]
    wrong = url.replace(password, "guessed")
    for storage, goals in ((url, other), (wrong, GOALS)):
        with pytest.raises(SearchError) as caught:
            search(SPACE, measure, goals, trials=1, seed=0, storage=storage, name="mine")
        assert password not in str(caught.value)
        assert "guessed" not in str(caught.value)
        assert "***" in str(caught.value)


def test_a_machine_without_a_server_is_told(monkeypatch):
    monkeypatch.setattr(shared_study, "_program", lambda name: None)
    with pytest.raises(SuiteError, match="apt install postgresql"), postgres():
        pass
