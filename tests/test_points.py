"""Operating-point tables, Pareto sets, hypervolumes and decision logs."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from runtime_cases import board, cases, periodic, run, summarise, unit

from dynlib.errors import TableError
from dynlib.log import DecisionLog
from dynlib.manager.manager import Manager
from dynlib.pareto import hypervolume, pareto_front, pareto_mask
from dynlib.points import (
    POINT_COLUMNS,
    PointTable,
    make_table,
    read_points,
    read_table,
    write_table,
)
from dynlib.runtime.case import Case
from dynlib.runtime.rivals import best_static, linux_default

ROW = {
    "model": "net", "subnet": "r32-d1-w8", "board": "b", "unit": "gpu", "batch": 1,
    "latency_ms": 2.5, "source": "measured", "accuracy_val_pct": 90.0,
}  # fmt: skip

points = arrays(float, st.tuples(st.integers(1, 25), st.just(2)), elements=st.integers(0, 6))


def test_a_table_survives_the_file(tmp_path):
    table = make_table([ROW, ROW | {"subnet": "other", "gpu_mhz": 510.0}])
    path = write_table(table, tmp_path / "t.csv")
    back = read_table(path)
    assert list(back.columns) == list(POINT_COLUMNS)
    pd.testing.assert_frame_equal(table, back)
    assert np.isnan(back["energy_mj"]).all()


def test_names_stay_text_whatever_they_look_like(tmp_path):
    names = ["1", "NA", "None", "1e3"]
    table = make_table([ROW | {"subnet": name, "unit": "0"} for name in names])
    back = read_table(write_table(table, tmp_path / "t.csv"))
    assert back["subnet"].tolist() == names
    assert set(back["unit"]) == {"0"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latency_ms": "fast"}, "latency_ms"),
        ({"latency_ms": 0}, "above zero"),
        ({"latency_ms": float("nan")}, "table, row 1, column 'latency_ms': got nan"),
        ({"latency_ms": float("inf")}, "latency_ms"),
        ({"energy_mj": -1}, "energy_mj"),
        ({"accuracy_val_pct": 101}, "accuracy_val_pct"),
        ({"exit_threshold": 1.5}, r"'exit_threshold': got 1\.5, expected at most 1$"),
        ({"source": "guessed"}, "source"),
        ({"subnet": None}, "subnet"),
        ({"latency_s": 1}, "latency_s"),
    ],
)
def test_a_bad_value_names_the_column(change, words):
    with pytest.raises(TableError, match=words):
        make_table([ROW | change])


def test_a_bad_row_is_named_with_its_file_and_the_old_file_survives(tmp_path):
    path = write_table(make_table([ROW]), tmp_path / "t.csv")
    before = path.read_text()
    with pytest.raises(TableError, match="row 2"):
        write_table(pd.concat([make_table([ROW])] * 2), path)
    assert path.read_text() == before
    path.write_text(before.replace("2.5", "oops"))
    with pytest.raises(TableError, match=r"t\.csv, row 1, column 'latency_ms'"):
        read_table(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(
        TableError, match=r"missing columns \['model', 'subnet', .*\], .*make_table"
    ):
        read_table(path)
    path.write_text("model,subnet,board,unit,latency_ms\nnet,small,tiny,gpu,2.5\n")
    with pytest.raises(TableError, match=r"missing columns \['batch', 'source'\], unknown"):
        read_table(path)
    with pytest.raises(TableError, match="cannot read"):
        read_table(tmp_path / "none.csv")


BOARD = board(unit(noise_cv=0.02))
TINY = ROW | {"board": "tiny"}


def test_duplicate_rows_are_named():
    rows = [TINY, TINY | {"subnet": "other"}, TINY]
    with pytest.raises(TableError, match=r"table, row 3, column 'subnet'.*one row per"):
        make_table(rows)
    clocks = [TINY | {"gpu_mhz": mhz} for mhz in (500.0, 1000.0, 1000.3)]
    with pytest.raises(TableError, match=r"row 3, column 'gpu_mhz': got 1000\.3, .*two rows"):
        PointTable(make_table(clocks), BOARD)


def test_a_higher_clock_that_was_slower_counts_as_fast_as_the_lower(caplog):
    times = {250.0: 40.0, 500.0: 20.0, 1000.0: 24.0}
    rows = [TINY | {"gpu_mhz": mhz, "latency_ms": ms} for mhz, ms in times.items()]
    table = PointTable(make_table(rows), BOARD)
    assert table.largest.latency_ms == (40.0, 20.0, 20.0)
    assert caplog.messages == ["net: slower at a higher clock: 'r32-d1-w8' on 'gpu'"]


def test_a_table_of_a_single_point_can_be_run():
    tables = {"net": PointTable(make_table([TINY]), BOARD)}
    only = tables["net"].largest
    assert tables["net"].smallest is only
    assert only.latency_ms == (10.0, 5.0, 2.5)
    workload = periodic(20.0, horizon_s=1.0, accuracy_floor_pct=90.0)
    make = cases(lambda seed: workload, BOARD, tables)
    for policy in (Manager(BOARD, tables), linux_default(make), best_static(make)):
        log = run(workload, BOARD, tables, policy)
        assert summarise(log, workload, tables, BOARD)["missed"] == 0


def test_a_case_takes_tables_of_points_alone():
    table = make_table([TINY])
    makes = r"got DataFrame, expected a PointTable.*PointTable\.of_models\(table, board\) makes"
    for tables in (table, {"net": table}):
        with pytest.raises(TableError, match=makes):
            Case(periodic(), BOARD, tables)


def test_ten_thousand_points_are_a_table():
    rows = [TINY | {"subnet": f"n{i}", "latency_ms": 1.0 + i} for i in range(10_000)]
    table = PointTable(make_table(rows), BOARD)
    assert len(table.points) == len(table.on("gpu")) == 10_000
    assert (table.smallest.subnet, table.largest.subnet) == ("n0", "n9999")
    assert table.point("n7", "gpu").latency_ms == (32.0, 16.0, 8.0)


def test_segments_reach_the_tables_of_a_file(tmp_path):
    rows = [TINY, TINY | {"model": "other"}]
    path = write_table(make_table(rows), tmp_path / "t.csv")
    tables = read_points(path, BOARD, {"other": {"r32-d1-w8": [1.0, 3.0]}})
    assert tables["other"].largest.segments == (0.25, 0.75)
    assert tables["net"].largest.segments == (1.0,)
    with pytest.raises(TableError, match=r"segments of model 'othr'.*did you mean other\?"):
        PointTable.of_models(read_table(path), BOARD, {"othr": {}})


@given(points)
def test_the_pareto_mask_equals_the_quadratic_oracle(values):
    mask = pareto_mask(values)
    for i, row in enumerate(values):
        dominated = ((values <= row).all(1) & (values < row).any(1)).any()
        twin = ((values[:i] == row).all(1)).any()
        assert mask[i] == (not dominated and not twin)


@given(points, st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_row_order_and_is_idempotent(values, random):
    table = pd.DataFrame(values, columns=["a", "b"])
    order = list(range(len(table)))
    random.shuffle(order)
    front = pareto_front(table, ["a"], ["b"])
    pd.testing.assert_frame_equal(front, pareto_front(table.iloc[order], ["a"], ["b"]))
    pd.testing.assert_frame_equal(front, pareto_front(front, ["a"], ["b"]))


@given(points)
def test_the_hypervolume_counts_the_dominated_unit_squares(values):
    squares = sum(bool((values <= (x, y)).all(1).any()) for x in range(7) for y in range(7))
    assert hypervolume(values, (7, 7)) == squares


def test_points_beyond_the_reference_add_nothing():
    assert hypervolume(np.array([[2.0, 2.0]]), (1, 1)) == 0
    assert hypervolume(np.array([[0.0, 0.0], [np.nan, 1.0]]), (1, 2)) == 2


def test_a_log_round_trips_and_a_cut_last_line_costs_only_that_line(tmp_path):
    log = DecisionLog(seed=3)
    log.add(0.0, "arrive", app="a", frame=0)
    log.add(0.5, "finish", app="a", frame=0, latency_ms=500.0)
    path = log.write(tmp_path / "log.jsonl")
    back = DecisionLog.read(path)
    assert back.header == log.header
    assert back.events == log.events
    whole = path.read_text()
    path.write_text(whole[:-9])
    assert DecisionLog.read(path).events == log.events[:1]
    path.write_text(whole.replace('{"app": "a", "event": "arrive"', "{", 1))
    with pytest.raises(TableError, match="line 2"):
        DecisionLog.read(path)
    for first in ({"seed": 1}, [1], 3):
        path.write_text(json.dumps(first) + "\n")
        with pytest.raises(TableError, match="no header"):
            DecisionLog.read(path)
    for event in ("3", '{"event": "arrive"}', '{"event": "jump", "t_s": 1}'):
        path.write_text(whole.splitlines()[0] + f"\n{event}\n")
        with pytest.raises(TableError, match="line 2"):
            DecisionLog.read(path)


def test_a_log_that_is_not_there_or_no_text_is_named(tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(TableError, match=r"log\.jsonl: cannot read a decision log"):
        DecisionLog.read(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match=r"log\.jsonl: cannot read a decision log"):
        DecisionLog.read(path)


def test_a_log_refuses_unknown_names_and_time_going_back():
    log = DecisionLog()
    log.add(1.0, "sample", power_mw=5.0)
    with pytest.raises(TableError, match="unknown log event"):
        log.add(1.0, "jump")
    with pytest.raises(TableError, match="powr"):
        log.add(1.0, "sample", powr=5.0)
    with pytest.raises(TableError, match="goes back"):
        log.add(0.5, "sample", power_mw=5.0)
