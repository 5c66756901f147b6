"""The published latency tables: reading, sums, defects, resolutions that are not there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import TableError
from dynlib.profile.layertable import Affine, leave_one_out
from suite.papers.jetson_tables import (
    DEPTHS,
    EXPANSIONS,
    KERNELS,
    block_key,
    fixed_keys,
    grid,
    judge_unseen,
    levels_ms,
    network_keys,
    read_rows,
    read_tables,
)

UNITS = ("cpu", "gpu")


@dataclass(frozen=True, slots=True)
class Defect:
    """Something in a table that is not the time of its operator."""

    kind: str  # copied, warm-up or noisy
    unit: str
    resolutions: tuple[int, ...]
    what: str


def find_defects(rows: Mapping[str, pd.DataFrame]) -> list[Defect]:
    """The three defects of published tables (`read_rows` per unit), by what gives them away.

    copied: a row has the very same time on two units. warm-up: of most blocks the smallest kernel
    and expansion, measured first, take at least a tenth longer than the largest. noisy: the median
    coefficient of variation exceeds 0.1.
    """
    found = []
    for unit, table in rows.items():
        means = table.set_index(["resolution", "key"])["mean_ms"]
        for other, theirs in rows.items():
            twin = theirs.set_index(["resolution", "key"])["mean_ms"]
            same = means.index[means.eq(twin.reindex(means.index))] if other > unit else []
            if len(same):
                at = tuple(sorted({int(r) for r, _ in same}))
                keys = f"{len(same)} rows such as {same[0][1]} have equal times"
                found.append(Defect("copied", f"{unit}, {other}", at, keys))
        blocks = grid({r: dict(zip(t["key"], t["mean_ms"], strict=True))
                       for r, t in table.groupby("resolution")})  # fmt: skip
        small, large = blocks.block_ms[:, :, 0, 0], blocks.block_ms[:, :, -1, -1]
        cold = tuple(blocks.resolutions[(small > 1.1 * large).mean(axis=1) > 0.5].tolist())
        if cold:
            found.append(Defect("warm-up", unit, cold, "small blocks take longer than large ones"))
        spread = float((table["std_ms"] / table["mean_ms"]).median())
        if spread > 0.1:
            every = tuple(blocks.resolutions.tolist())
            found.append(Defect("noisy", unit, every, f"coefficient of variation {spread:.2f}"))
    return found


def digits(text):
    return [int(c) for c in text]


@pytest.fixture(scope="module")
def folder(data_root):
    folder = data_root / "jetson_xavier_nx"
    if not (folder / "latency_gpu.csv").is_file():
        pytest.skip("the data folder has no Jetson tables")
    return folder


@pytest.fixture(scope="module")
def grids(folder):
    return {unit: grid(read_tables(folder, unit)) for unit in UNITS}


def invented(resolutions=(160, 176, 192), ms=lambda resolution, number: 1.0 + number / 100):
    keys = {
        r: [*fixed_keys(r), *(block_key(r, p, k, e) for p in range(20)
                              for k in KERNELS for e in EXPANSIONS)]
        for r in resolutions
    }  # fmt: skip
    return {r: {key: ms(r, i) for i, key in enumerate(dict.fromkeys(keys[r]))} for r in resolutions}


# From the published tables: resolution, depth, kernels, expansions, GPU sum, CPU sum.
REFERENCE = [
    (160, "2" * 5, "3" * 20, "3" * 20, 21.0680, 810.4217),
    (176, "2" * 5, "3" * 20, "3" * 20, 16.1971, 731.3196),
    (208, "3" * 5, "5" * 20, "4" * 20, 24.0096, 1530.1332),
    (224, "4" * 5, "7" * 20, "6" * 20, 30.1870, 3551.4547),
    (176, "43324", "53775375757377555777", "34664636366466363434", 23.4005, 1736.0212),
    (208, "33433", "55553555573533373357", "46646346633443344663", 24.5666, 1643.2284),
    (224, "42433", "73737557557355557733", "43446446634663446344", 24.4883, 1872.3464),
    (160, "22433", "33735755377575355377", "46363346433643646634", 21.9348, 1468.6614),
]


@pytest.mark.parametrize("case", REFERENCE, ids=lambda c: f"{c[0]}-{c[1]}")
def test_sums_of_published_networks(grids, case):
    resolution, *network, gpu_ms, cpu_ms = case
    network = [[digits(part)] for part in network]
    for unit, expected in (("gpu", gpu_ms), ("cpu", cpu_ms)):
        assert grids[unit].network_ms(resolution, *network)[0] == pytest.approx(expected, abs=1e-4)


def test_rows_of_level_6_0_in_order(folder):
    keys = network_keys(176, digits("32322"), digits("57773557775353373377"),
                        digits("64464364644646464334"))  # fmt: skip
    expected = [0.6048, 1.0391, 0.7222, 0.7735, 0.7735, 1.3097, 1.3838, 0.9864, 1.0245, 1.0441,
                1.5595, 1.6170, 1.8172, 1.6257, 0.5324, 0.0115, 0.7543, 0.6621]  # fmt: skip
    table = read_tables(folder)[176]
    assert [table[key] for key in keys] == pytest.approx(expected, abs=5e-5)


def test_the_three_known_defects_are_found(folder):
    found = {d.kind: d for d in find_defects({unit: read_rows(folder, unit) for unit in UNITS})}
    assert set(found) == {"copied", "warm-up", "noisy"}
    assert len(found["copied"].resolutions) == 13
    assert "expand:24-kernel:3" in found["copied"].what
    assert (found["warm-up"].unit, found["warm-up"].resolutions) == ("gpu", (160,))
    assert found["noisy"].unit == "cpu"


@pytest.mark.parametrize(("unit", "bound"), [("gpu", 1.0), ("cpu", 3.0)])
def test_resolutions_that_are_left_out(grids, unit, bound):
    tables = grids["gpu"].without(160) if unit == "gpu" else grids["cpu"]
    judged = judge_unseen(tables, 200, np.random.default_rng(1)).set_index("resolution")
    assert judged.drop(index=160, errors="ignore")["mape_pct"].mean() <= bound


def test_the_sums_rank_the_published_levels(grids):
    sums, measured = levels_ms(grids["gpu"])
    affine = Affine.fit(sums, measured)
    assert (affine.slope, affine.intercept_ms) == pytest.approx((1.657, 11.16), abs=0.005)
    assert np.abs(affine.predict(sums) - measured).max() == pytest.approx(1.36, abs=0.01)
    assert np.abs(leave_one_out(sums, measured) - measured).max() < 2.5


@given(st.data())
def test_a_grid_sums_the_rows_that_a_network_uses(data):
    tables = invented()
    resolution = data.draw(st.sampled_from(sorted(tables)))
    depth = data.draw(st.lists(st.sampled_from(DEPTHS), min_size=5, max_size=5))
    kernel = data.draw(st.lists(st.sampled_from(KERNELS), min_size=20, max_size=20))
    expand = data.draw(st.lists(st.sampled_from(EXPANSIONS), min_size=20, max_size=20))
    keys = network_keys(resolution, depth, kernel, expand)
    assert len(keys) == 6 + sum(depth)
    total = grid(tables).network_ms(resolution, depth, kernel, expand)[0]
    assert total == pytest.approx(sum(tables[resolution][key] for key in keys))


def test_unseen_resolutions_follow_the_others():
    tables = grid(invented((160, 176, 208), lambda r, i: (1 + i / 100) * r**2 / 1e4))
    between = tables.at(192)
    low, high = (tables.at(r).block_ms for r in (176, 208))
    assert between.block_ms == pytest.approx((low + high) / 2)
    beyond = tables.at(320).block_ms
    assert beyond == pytest.approx(tables.at(160).block_ms * 4)  # twice the side, four times the px
    with pytest.raises(TableError, match="at least 2"):
        tables.without(160, 176).at(192)


def test_json_and_its_faults(tmp_path):
    tables = invented((160,))
    for resolution, rows in tables.items():
        text = json.dumps({k: {"count": 9, "mean": v, "std": 0.1} for k, v in rows.items()})
        (tmp_path / f"{resolution}_lookup_table.json").write_text(text)
    assert read_tables(tmp_path) == tables
    file = tmp_path / "160_lookup_table.json"
    for text, expected in (
        ('{"Conv-input:160": {"count": 1, "mean": 1, "std": 0}}', "malformed key"),
        ('{"Conv-input:8x8x3-output:4x4x24": {"count": 1, "std": 0}}', "count, mean, std"),
        ('{"Conv-input:8x8x3-output:4x4x24": {"count": 1, "mean": -1, "std": 0}}', "above 0"),
        ("[1]", "count, mean, std"),
        ("\0", "count, mean, std"),
    ):
        file.write_text(text)
        with pytest.raises(TableError, match=expected):
            read_tables(tmp_path)
    with pytest.raises(TableError, match="no latency table"):
        read_tables(tmp_path / "nothing")


def test_csv_faults(tmp_path):
    path = tmp_path / "latency_gpu.csv"
    path.write_text("resolution,op\n160,Conv\n")
    with pytest.raises(TableError, match=r"latency_gpu.csv: lacks.*mean_ms"):
        read_tables(tmp_path)


def test_missing_rows_and_resolutions_are_named():
    tables = invented()
    del tables[176][block_key(176, 7, 5, 4)]
    with pytest.raises(TableError, match=r"table of 176: no row 'expanded_conv.*kernel:5"):
        grid(tables)
    with pytest.raises(TableError, match=r"resolutions \[175\]"):
        grid(invented()).network_ms(175, [2] * 5, [3] * 20, [3] * 20)
