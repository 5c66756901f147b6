import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynlib.errors import TableError
from dynlib.profile.layertable import Affine, LayerTable, build_table, leave_one_out, torch_layer
from dynlib.space import LayerSpec

CONV = LayerSpec("conv", 3, 8, 3, 1, 1, 16, 16)
STRIDED = LayerSpec("conv", 8, 8, 5, 2, 8, 16, 8)
POOL = LayerSpec("pool", 8, 8, 8, 1, 8, 8, 1)
HEAD = LayerSpec("linear", 8, 10)
COST_NS = {CONV: 4_000_000, STRIDED: 2_000_000, HEAD: 1_000_000}


class FakeDevice:
    """A clock that moves when a layer runs; `slow` is how much slower each run is."""

    def __init__(self, slow=lambda run: 1.0):
        self.now_ns, self.runs, self.slow = 0, [], slow

    def make(self, layer):
        def run():
            self.now_ns += int(COST_NS[layer] * self.slow(len(self.runs)))
            self.runs.append(layer)

        return run

    def build(self, **options):
        rng = np.random.default_rng(0)
        return build_table([*COST_NS, CONV], self.make, rng, clock=lambda: self.now_ns, **options)


def test_each_distinct_layer_is_timed_in_a_new_order_each_round():
    device = FakeDevice()
    table = device.build(repeats=5, warmup=2)
    assert table.layers_ms([CONV, CONV, HEAD]) == pytest.approx(9.0)
    rounds = [tuple(device.runs[i : i + 3]) for i in range(6, 21, 3)]
    assert len(device.runs) == 3 * (2 + 5)
    assert all(set(order) == set(COST_NS) for order in rounds)
    assert len(set(rounds)) > 1


def test_a_machine_that_warms_up_favours_no_row():
    """A third faster from the start of the sampling to its end, over all rounds."""
    table = FakeDevice(lambda run: 1.5 - 0.5 * min(run / 300, 1)).build(repeats=100, warmup=0)
    ratios = [table.layers_ms([a]) / ns * 1e6 for a, ns in COST_NS.items()]
    assert max(ratios) / min(ratios) < 1.02


def test_outliers_are_dropped():
    table = FakeDevice(lambda run: 20.0 if run % 31 == 0 else 1 + run % 3 / 100).build(repeats=50)
    assert table.layers_ms([CONV]) == pytest.approx(4.04, rel=0.01)
    assert table.rows["count"].min() < 50


def test_tables_come_back_from_disk(tmp_path):
    table = FakeDevice().build(repeats=3)
    again = LayerTable.read(table.write(tmp_path / "layers.csv"))
    assert again.layers_ms([CONV, STRIDED, HEAD]) == table.layers_ms([CONV, STRIDED, HEAD])
    (tmp_path / "layers.csv").write_text("op,mean_ms\nconv,1\n")
    with pytest.raises(TableError, match=r"layers\.csv: expected the full columns"):
        LayerTable.read(tmp_path / "layers.csv")
    with pytest.raises(TableError, match="cannot read"):
        LayerTable.read(tmp_path / "nothing.csv")


def test_what_is_missing_is_named():
    with pytest.raises(TableError, match=r"no row for LayerSpec.*pool"):
        FakeDevice().build(repeats=3).layers_ms([POOL])
    with pytest.raises(TableError, match="no layers"):
        build_table([], FakeDevice().make, np.random.default_rng(0))
    with pytest.raises(TableError, match="expected >= 3"):
        FakeDevice().build(repeats=2)
    with pytest.raises(TableError, match="'softmax'; expected conv"):
        torch_layer(LayerSpec("softmax", 1, 1))


@pytest.mark.parametrize("layer", [CONV, STRIDED, POOL, LayerSpec("conv", 3, 8, 2, 2, 1, 32, 16)])
def test_torch_layers_have_the_shape_they_claim(layer):
    assert tuple(torch_layer(layer, batch=2)().shape) == (
        2, layer.out_channels, layer.out_size, layer.out_size,
    )  # fmt: skip
    assert tuple(torch_layer(HEAD)().shape) == (1, 10)


@given(st.floats(0.1, 5), st.floats(-5, 50), st.lists(st.floats(1, 100), min_size=3, unique=True))
def test_an_affine_machine_is_predicted(slope, intercept, sums):
    if np.ptp(sums) < 1:
        return
    measured = [slope * s + intercept for s in sums]
    affine = Affine.fit(sums, measured)
    assert affine.predict(sums) == pytest.approx(measured, rel=1e-6, abs=1e-6)


def test_left_out_networks_are_not_seen():
    sums, measured = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 8.0]
    assert leave_one_out(sums, measured)[-1] == pytest.approx(4.0)
    with pytest.raises(TableError, match="2 different"):
        Affine.fit([1.0, 1.0], [2.0, 3.0])
