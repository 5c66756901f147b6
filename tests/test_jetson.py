"""The replayed Jetson problem: encoding, sums and predictions to the published digits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynlib.errors import CheckpointError
from dynlib.space import SubnetConfig
from suite.papers.jetson_search import (
    CHOICES,
    PLACE_OF_GENE,
    SPACE,
    Evaluator,
    canonical_genes,
    features,
    find_published,
    genes,
    read_predictor,
)
from suite.papers.jetson_tables import grid, network_keys, read_tables


def net(resolution, kernel, expand, depth) -> SubnetConfig:
    return SubnetConfig(resolution, depth=depth, kernel=kernel, expand=expand)


# kernel/expand/depth, resolution, predicted %, GPU sum ms, CPU sum ms (thesis, reference values).
UNIFORM = """
3/3/2 160 75.3119 21.0680 810.4217   3/3/2 176 76.2484 16.1971 731.3196
3/3/2 192 77.0442 16.7390 757.5025   3/3/2 208 77.4882 16.9207 784.6286
3/3/2 224 77.7386 17.3733 842.6958   5/4/3 160 78.5767 23.5056 1440.2159
5/4/3 176 79.8907 23.4289 1388.6235  5/4/3 192 80.5928 23.4924 1410.8505
5/4/3 208 81.3235 24.0096 1530.1332  5/4/3 224 81.7291 24.5391 1627.8965
7/6/4 160 80.7503 29.0140 3198.6860  7/6/4 176 81.9454 29.0520 2992.9150
7/6/4 192 82.7122 29.1032 3114.5498  7/6/4 208 83.3177 29.8231 3300.8142
7/6/4 224 83.5928 30.1870 3551.4547
"""
RANDOM = """
53775375757377555777 34664636366466363434 43324 176 79.1450 23.4005 1736.0212
55553555573533373357 46646346633443344663 33433 208 81.5705 24.5666 1643.2284
37735377333335735333 43646446464334443666 34232 176 78.9771 21.7417 1413.9807
53735573777577733337 33663633466333363666 42424 176 79.2422 23.0491 1727.0475
77533533337777737373 43444646463464466333 33223 208 80.3287 20.8833 1501.6675
73357337573375757355 36464663363433334444 23333 224 81.2507 23.2690 1556.1205
53333557377337535335 66336634366644633363 23443 208 81.4175 25.4189 1846.8302
73737557557355557733 43446446634663446344 42433 224 81.3190 24.4883 1872.3464
33735755377575355377 46363346433643646634 22433 160 78.0696 21.9348 1468.6614
53375375773373357375 63344466463364436436 32424 208 80.6820 23.2108 1685.5038
"""
# The published GPU family (nets_6): resolution, depth, kernel, expand, predicted, GPU, CPU.
FAMILY = """
176 32322 57773557775353373377 64464364644646464334 78.689 18.241 1208.529
176 32332 73577357575353353337 64444666334646634333 79.896 19.865 1295.118
192 33333 55737773777577737777 34344443443344444444 81.410 23.701 1580.789
208 23334 73535733555777553337 66334433644464464633 82.243 24.786 1766.518
224 24443 53377333753575737757 66434663463466664446 83.386 27.286 2128.756
224 44444 55555773577777557555 66666646646666666663 84.793 30.171 2902.401
"""
TRACE_GPU = """0.6048 1.0391 0.7222 0.7735 0.7735 1.3097 1.3838 0.9864 1.0245 1.0441 1.5595 1.6170
1.8172 1.6257 0.5324 0.0115 0.7543 0.6621"""
ONES = [1, 5, 8, 12, 16, 26, 29, 31, 37, 39, 48, 51, 62, 64, 67, 73, 75, 86, 88, 91, 97, 101, 109,
        111, 124]  # fmt: skip


def references():
    fields = UNIFORM.split()
    for shape, r, *values in zip(*(fields[i::5] for i in range(5)), strict=True):
        k, e, d = shape.split("/")
        yield net(int(r), k * 20, e * 20, d * 5), [float(v) for v in values]
    for line in RANDOM.strip().splitlines():
        k, e, d, r, *values = line.split()
        yield net(int(r), k, e, d), [float(v) for v in values]


def family():
    for line in FAMILY.strip().splitlines():
        r, d, k, e, *values = line.split()
        yield net(int(r), k, e, d), [float(v) for v in values]


@pytest.fixture(scope="module")
def published(data_root):
    folder = find_published(data_root)
    if folder is None:
        pytest.skip(f"no published Jetson tables in {data_root}: nothing to replay")
    return folder


@pytest.fixture(scope="module")
def units(published):
    return {unit: Evaluator.load(published, unit) for unit in ("gpu", "cpu")}


def test_the_encoding_of_the_first_published_level():
    assert np.flatnonzero(features(next(family())[0])).tolist() == ONES


@pytest.mark.parametrize("cases", [references, family])
def test_predictions_and_sums_have_the_published_digits(units, cases):
    configs, values = zip(*cases(), strict=True)
    accuracy, gpu = units["gpu"](genes(configs))
    _, cpu = units["cpu"](genes(configs))
    digits = (1e-4, 6e-5, 6e-5) if cases is references else (6e-4, 6e-4, 6e-4)
    for got, want, error in zip((accuracy, gpu, cpu), np.transpose(values), digits, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=error)


def test_the_rows_of_the_first_published_level(published):
    level = next(family())[0]
    rows = read_tables(published, "gpu")[level.resolution]
    keys = network_keys(level.resolution, level.depth, level.kernel, level.expand)
    got = [rows[key] for key in keys]
    np.testing.assert_allclose(got, [float(v) for v in TRACE_GPU.split()], atol=6e-5)


@pytest.fixture(scope="module")
def invented():
    """An evaluator over random tables and weights, so that the sums are tested without data."""
    rng = np.random.default_rng(0)
    tables = {}
    for r in SPACE.resolution:
        keys = {
            key for k in (3, 5, 7) for e in (3, 4, 6)
            for key in network_keys(r, (4,) * 5, (k,) * 20, (e,) * 20)
        }  # fmt: skip
        tables[r] = dict(zip(sorted(keys), rng.uniform(0.1, 2, len(keys)), strict=True))
    sizes = (128, 400, 400, 400, 1)
    weights = {}
    for layer, n, out in zip("0246", sizes, sizes[1:], strict=False):
        weights[f"{layer}.weight"] = rng.normal(0, n**-0.5, (out, n)).astype(np.float32)
        weights[f"{layer}.bias"] = rng.normal(0, 0.1, out).astype(np.float32)
    return Evaluator(tables, weights)


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_many_at_once_are_what_one_by_one_are(invented, seed):
    rng = np.random.default_rng(seed)
    population = rng.integers(0, CHOICES, (600, len(CHOICES)), np.int8)  # more than one block
    accuracy, latency = invented(population)
    for i in (0, 511, 512, 599):
        one = invented.one(SPACE.decode(population[i]))
        assert (accuracy[i], latency[i]) == (
            pytest.approx(one[0], abs=2e-3),
            pytest.approx(one[1], abs=1e-9),
        )


def test_unused_places_do_not_count(invented):
    rng = np.random.default_rng(1)
    population = rng.integers(0, CHOICES, (50, len(CHOICES)), np.int8)
    same = canonical_genes(population)
    assert (same != population).any()
    np.testing.assert_array_equal(invented(same), invented(population))
    np.testing.assert_array_equal(canonical_genes(same), same)


def test_genes_of_a_place_are_named_together():
    names = [name for name, _ in SPACE.axes()]
    for place in set(PLACE_OF_GENE.tolist()):
        together = {names[i] for i in np.flatnonzero(place == PLACE_OF_GENE)}
        block = place - 6
        expected = {f"kernel{block}", f"expand{block}"} if block >= 0 else {names[place]}
        assert together == expected


def test_a_wrong_predictor_and_missing_tables_are_named(tmp_path, invented, monkeypatch):
    from safetensors.numpy import save_file

    broken = dict(invented.weights)
    broken["4.weight"] = broken["4.weight"][:, :300].copy()
    save_file(broken, tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match=r"4\.weight has shape \(400, 300\)"):
        read_predictor(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_predictor(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"lack resolutions \[224\]"):
        Evaluator({r: t for r, t in invented.tables.items() if r != 224}, invented.weights)
    monkeypatch.setenv("DYNLIB_DATA", str(tmp_path))
    monkeypatch.setenv("DYNLIB_ROOT", str(tmp_path))
    assert find_published() is None


def test_the_grid_agrees_with_the_evaluator(invented):
    """Two ways to the same sum: by value through the table's own arrays, by index through pairs."""
    rng = np.random.default_rng(2)
    population = rng.integers(0, CHOICES, (40, len(CHOICES)), np.int8)
    configs = [SPACE.decode(row) for row in population]
    columns = (
        [getattr(c, n) for c in configs] for n in ("resolution", "depth", "kernel", "expand")
    )
    np.testing.assert_allclose(
        invented(population)[1], grid(invented.tables).network_ms(*map(np.array, columns))
    )
