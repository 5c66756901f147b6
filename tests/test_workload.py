import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import WorkloadError
from dynlib.machine.bind import load_board
from dynlib.workload import App, Change, Workload, dump_workload, load_workload
from suite.papers.dynamic_ofa import published_tables
from suite.studies.scenarios import SCENARIOS, scenario

GOOD = """
name = "two"
horizon_s = 10

[[app]]
name = "camera"
model = "net"
deadline_ms = 50
period_ms = 40.0
accuracy_floor_pct = 75

[[app]]
name = "burst"
model = "net"
deadline_ms = 90
arrival = "trace"
trace_ms = [0, 5.5, 100]

[[change]]
t_s = 5
app = "camera"
deadline_ms = 30

[[change]]
t_s = 2
unit = "gpu"
stretch = 1.33
announced = false
"""
BROKEN = [
    ("deadline_ms = 50", "deadline_ms = 0", r"deadline_ms.*above 0"),
    ("deadline_ms = 50", "deadline_ms = nan", r"app\[0\]\.deadline_ms.*finite number"),
    ("deadline_ms = 50", "deadline_ms = '50'", r"app\[0\]\.deadline_ms.*finite number"),
    ("deadline_ms = 50", "deadline_ms = true", r"app\[0\]\.deadline_ms.*finite number"),
    ("deadline_ms = 50", "", r"app\[0\]\.deadline_ms: missing"),
    ("deadline_ms = 50", "dead_line_ms = 50", r"app\[0\]\.dead_line_ms.*did you mean deadline_ms"),
    ("period_ms = 40.0", "", r"period_ms.*above 0"),
    ("accuracy_floor_pct = 75", "accuracy_floor_pct = 101", r"accuracy_floor_pct.*0 to 100"),
    ('arrival = "trace"', 'arrival = "tracer"', r"arrival.*did you mean trace"),
    ("[0, 5.5, 100]", "[0, 100, 5.5]", r"trace_ms.*ascending"),
    ("[0, 5.5, 100]", "[0, 'x']", r"app\[1\]\.trace_ms.*finite"),
    ('name = "burst"', 'name = "camera"', r"apps.*'camera' is there twice"),
    ("horizon_s = 10", "horizon_s = -1", r"horizon_s.*above 0"),
    ("horizon_s = 10", "", r"horizon_s: missing"),
    ("horizon_s = 10", "horizont = 10", r"horizont.*did you mean horizon_s"),
    ('app = "camera"', 'app = "camer"', r"changes.*camer"),
    ('app = "camera"', "", r"change\[0\].*of the board"),
    ("stretch = 1.33", "stretch = 0.5", r"stretch.*from 1"),
    ("stretch = 1.33", "deadline_ms = 5", r"change\[1\].*unit"),
    ("stretch = 1.33", "", r"change\[1\].*cap_mhz, stretch or lost"),
    ("stretch = 1.33", "ambient_c = 40", r"change\[1\].*power_mw, memory_mb or ambient_c"),
    ('unit = "gpu"\nstretch = 1.33', "ambient_c = 400", r"ambient_c.*-60 to 100"),
    ("announced = false", "announced = 0", r"change\[1\]\.announced.*true or false"),
    ("t_s = 5", "t_s = -5", r"t_s.*from 0"),
    ("horizon_s = 10", "horizon_s = ", r"line 3"),
]


@pytest.fixture(scope="module")
def xavier():
    board = load_board("jetson-xavier-nx")
    return board, published_tables(board)


def test_a_file_reads_and_writes_back(tmp_path):
    path = tmp_path / "w.toml"
    path.write_text(GOOD)
    workload = load_workload(path)
    assert workload.app("camera").deadline_ms == 50.0
    assert [c.t_s for c in workload.changes] == [2.0, 5.0]
    assert load_workload(dump_workload(workload, tmp_path / "again.toml")) == workload


@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_broken_files_never_load_and_name_the_key(tmp_path, old, new, message):
    path = tmp_path / "broken.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(WorkloadError, match=message) as error:
        load_workload(path)
    assert "broken.toml" in str(error.value)


def test_all_that_is_wrong_is_one_error_of_a_line_each(tmp_path):
    changes = {
        "deadline_ms = 50": "deadline_ms = 0",
        "accuracy_floor_pct = 75": "accuracy_floor_pct = 101",
        "[0, 5.5, 100]": "[0, 'x']",
        "stretch = 1.33": "stretch = 0.5",
        "t_s = 5": "t_s = '5'",
        "horizon_s = 10": "horizont = 10",
    }
    text = GOOD
    for old, new in changes.items():
        text = text.replace(old, new, 1)
    path = tmp_path / "broken.toml"
    path.write_text(text)
    with pytest.raises(WorkloadError) as error:
        load_workload(path)
    assert str(error.value).splitlines() == [
        f"{path}: app[0]: camera, deadline_ms: got 0.0, expected a number above 0",
        f"{path}: app[0]: camera, accuracy_floor_pct: got 101.0, expected a number from 0 to 100",
        f"{path}: app[1].trace_ms: [0, 'x']; expected a list, each a finite number",
        f"{path}: change[0].t_s: '5'; expected a finite number",
        f"{path}: change[1]: Change, stretch: got 0.5, expected a number from 1 to inf",
        f"{path}: horizon_s: missing (there is horizont: did you mean horizon_s?); "
        "expected a finite number",
    ]


def test_a_workload_names_all_its_unknown_apps():
    app = App("a", "net", 10.0, period_ms=10.0)
    with pytest.raises(WorkloadError) as error:
        Workload("w", -1.0, (app, app), (Change(0, "b", period_ms=1), Change(0, "c", period_ms=1)))
    assert [line[:20] for line in str(error.value).splitlines()] == [
        "w, horizon_s: got -1", "w, apps: 'a' is ther", "w, changes: got app ",
        "w, changes: got app "]  # fmt: skip


@pytest.mark.parametrize("table", ["app = 3", "app = [3]", "[app]", "[change]\nt_s = 3"])
def test_what_is_no_list_of_tables_is_refused(tmp_path, table):
    path = tmp_path / "broken.toml"
    path.write_text(f"name = 'x'\nhorizon_s = 1\n{table}\n")
    with pytest.raises(WorkloadError, match=r"broken\.toml: (app|change): expected tables"):
        load_workload(path)


@given(st.binary(max_size=200))
def test_any_bytes_load_or_raise_our_error(tmp_path_factory, junk):
    path = tmp_path_factory.mktemp("junk") / "w.toml"
    path.write_bytes(GOOD.encode()[: len(junk)] + junk)
    with pytest.raises(WorkloadError, match=r"w\.toml"):
        load_workload(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(WorkloadError, match=r"nowhere\.toml"):
        load_workload(tmp_path / "nowhere.toml")


@given(
    text=st.text(min_size=1, max_size=20),
    deadline=st.floats(1e-3, 1e6),
    trace=st.lists(st.floats(0, 1e5), max_size=5).map(sorted).map(tuple),
)
def test_any_workload_survives_the_round_trip(tmp_path_factory, text, deadline, trace):
    workload = Workload(text, 7.0, (App(text, text, deadline, "trace", trace_ms=trace),),
                        (Change(1.5, text, accuracy_floor_pct=3.0, announced=False),))  # fmt: skip
    path = tmp_path_factory.mktemp("w") / "w.toml"
    assert load_workload(dump_workload(workload, path)) == workload


def test_a_new_period_counts_from_the_last_frame_but_not_from_before_the_change():
    app = App("a", "net", 10.0, period_ms=400.0)
    faster = Workload("w", 2.0, (app,), (Change(1.0, "a", period_ms=100.0),))
    times = [t for t, _ in faster.arrivals(app, 0)]
    assert times[:5] == [0.0, 400.0, 800.0, 1000.0, 1100.0]
    slower = Workload("w", 3.0, (app,), (Change(1.0, "a", period_ms=700.0),))
    assert [t for t, _ in slower.arrivals(app, 0)] == [0.0, 400.0, 800.0, 1500.0, 2200.0, 2900.0]


def test_a_frame_is_offered_only_if_its_deadline_lies_within_the_horizon():
    app = App("a", "net", 150.0, period_ms=100.0)
    assert [t for t, _ in Workload("w", 0.5, (app,)).arrivals(app, 0)] == [0.0, 100, 200, 300]


def test_poisson_arrivals_have_their_rate_and_are_nobody_elses():
    app, other = App("a", "net", 10.0, "server", 50.0), App("b", "net", 10.0, "server", 50.0)
    alone = list(Workload("w", 600.0, (app,)).arrivals(app, 3))
    assert len(alone) == pytest.approx(12000, rel=0.05)
    assert alone == list(Workload("w", 600.0, (other, app)).arrivals(app, 3))
    assert alone != list(Workload("w", 600.0, (other,)).arrivals(other, 3))


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_is_a_valid_workload(name, xavier, tmp_path):
    board = load_board("hikey960") if name == "S6" else xavier[0]  # who publishes its heat
    tables = published_tables(board)
    workload = scenario(name, board, tables, seed=1).workload
    assert workload.horizon_s == 60
    assert load_workload(dump_workload(workload, tmp_path / "w.toml")) == workload
    for app in workload.apps:
        assert len(list(workload.arrivals(app, 0))) > 0
        assert tables[app.model].on(app.start_unit)


def test_scenarios_are_relative_to_the_table(xavier):
    board, tables = xavier
    s2 = scenario("S2", board, tables).workload
    assert s2.apps[0].period_ms == pytest.approx(2.5 * 61.735)
    assert s2.apps[0].accuracy_floor_pct == pytest.approx(74.202)
    assert [(c.t_s, round(c.deadline_ms / 61.735, 9)) for c in s2.changes] == [(20, 1.25), (40, 4)]
    s3 = scenario("S3", board, tables).workload
    assert [c.accuracy_floor_pct for c in s3.changes] == pytest.approx([74.202, 76.616])
    hikey = load_board("hikey960")
    s6 = scenario("S6", hikey, published_tables(hikey)).workload
    assert s6.apps[0].deadline_ms == pytest.approx(1.5 * 1858)
    assert [(c.t_s, c.ambient_c, c.announced) for c in s6.changes] == [(10, 40, False)]
    t2 = scenario("T2", board, tables).workload
    assert [a.start_unit for a in t2.apps] == ["gpu", "carmel0"]


def test_s4_draws_its_later_visits_from_the_seed(xavier):
    board, tables = xavier
    times = {seed: [c.t_s for c in scenario("S4", board, tables, seed).workload.changes]
             for seed in (1, 1, 2)}  # fmt: skip
    assert times[1][:2] == times[2][:2] == [2.5, 10.0]
    assert times[1] != times[2]
    for steps in times.values():
        assert len(steps) == 6
        assert steps == sorted(steps)
        assert steps[-1] <= 60


def test_an_unknown_scenario_lists_the_known(xavier):
    board, tables = xavier
    with pytest.raises(WorkloadError, match=r"'S99'.*S1"):
        scenario("S99", board, tables)
