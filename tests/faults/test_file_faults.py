"""Faults of tables, checkpoints and logs: refused by name, or at the cost of one record."""

import json
import logging
import math
import os
import pickle

import pytest
import runtime_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_cases import NOISY, periodic, run, summarise

from dynlib.errors import TableError
from dynlib.log import DecisionLog
from dynlib.manager.manager import Manager
from dynlib.points import PointTable, make_table, read_table

pytestmark = pytest.mark.faults


def reported(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


GPU = [{"model": "net", "subnet": net, "board": "tiny", "unit": "gpu", "batch": 1, "gpu_mhz": mhz,
        "accuracy_val_pct": 70.0, "latency_ms": ms * 1000 / mhz, "source": "measured"}
       for net, ms in (("small", 10.0), ("large", 20.0)) for mhz in runtime_cases.MHZ]  # fmt: skip
BAD_TABLES = {
    "empty": (lambda t: t[:0], "the table has no rows"),
    "nan": (lambda t: t.assign(latency_ms=t["latency_ms"].where(t.index != 3)),
            "row 4, column 'latency_ms': got nan, expected a value"),
    "inf": (lambda t: t.replace({"latency_ms": 40.0}, math.inf), "row 1, column 'latency_ms'.*inf"),
    "twice": (lambda t: t.replace({"gpu_mhz": 500.0}, 250.0), "row 2, column 'subnet'.*one row"),
    "settings": (lambda t: t.replace({"gpu_mhz": 500.0}, 250.0).assign(cores=1, threads=range(6)),
                 "row 2, column 'threads'.*as many as cores"),
    "khz": (lambda t: t.replace({"gpu_mhz": 500.0}, 500_000.0),
            "row 2, column 'gpu_mhz'.*a clock of the unit"),
    "seconds": (lambda t: t.rename(columns={"latency_ms": "latency_s"}),
                r"missing columns \['latency_ms'\], unknown columns \['latency_s'\]"),
    "fraction": (lambda t: t.assign(accuracy_val_pct=7000.0),
                 "row 1, column 'accuracy_val_pct'.*at most 100"),
    "board": (lambda t: t.assign(board=["tiny", "nano"] * 3),
              "row 2, column 'board': got 'nano', expected 'tiny'"),
    "unit": (lambda t: t.assign(unit="dla"), "row 1, column 'unit': got 'dla', expected one of"),
    "models": (lambda t: t.assign(model=["net"] * 5 + ["other"]), "row 6, column 'model'"),
    "accuracy": (lambda t: t.assign(accuracy_val_pct=math.nan), "row 1, column 'accuracy_val_pct'"),
    "schema": (lambda t: t.drop(columns=["emc_mhz", "quota"]),
               r"missing columns \['quota', 'emc_mhz'\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_TABLES)
@pytest.mark.parametrize("file", [True, False], ids=["file", "frame"])
def test_fault_26_bad_table(memory, fault, file):
    change, message = BAD_TABLES[fault]
    table = change(make_table(GPU))
    if file:
        table.to_csv(memory / "t.csv", index=False)
    with pytest.raises(TableError, match=message):
        PointTable(read_table(memory / "t.csv") if file else table, NOISY)
    assert PointTable(make_table(GPU), NOISY).units == ("gpu",)


@pytest.mark.parametrize("text", ["", "\n\n", "{}", "\0" * 100, "model,subnet\n1"])
def test_fault_26_no_table(memory, text):
    (memory / "t.csv").write_text(text)
    with pytest.raises(TableError, match=r"t\.csv"):
        read_table(memory / "t.csv")


def test_fault_27_slower_at_a_higher_clock(caplog):
    noisy = make_table(GPU).replace({"latency_ms": 20.0}, 90.0)  # small at 500, large at 1000 MHz
    points = {"net": PointTable(noisy, NOISY)}
    assert points["net"].point("small", "gpu").latency_ms == (40, 40, 10)
    assert points["net"].point("large", "gpu").latency_ms == (80, 40, 40)
    expected = "net: slower at a higher clock: 'small' on 'gpu', 'large' on 'gpu'"
    assert reported(caplog) == [expected]  # once for all
    workload = periodic(50.0, horizon_s=5.0)
    log = run(workload, NOISY, points, Manager(NOISY, points))
    assert summarise(log, workload, points, NOISY)["deadline_miss_pct"] <= 1.0


@settings(max_examples=25)
@given(st.lists(st.floats(0.1, 1e4), min_size=3, max_size=3))
def test_fault_27_a_table_of_any_noise_is_cleaned(times):
    rows = [row | {"latency_ms": ms} for row, ms in zip(GPU, times, strict=False)]
    found = PointTable(make_table(rows), NOISY).point("small", "gpu").latency_ms
    assert all(found[i] == pytest.approx(min(times[: i + 1])) for i in range(3))


def saved(memory):
    pytest.importorskip("torch")
    from small_nets import SPACE, calibrated

    net = calibrated((SPACE.smallest, SPACE.largest))
    return net, net.save(memory / "net.safetensors")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_fault_28_a_checkpoint_is_a_pickle_bomb(memory, monkeypatch):
    net, file = saved(memory)
    from dynlib.errors import CheckpointError

    monkeypatch.setenv("BOMB", str(memory / "exploded"))
    file.write_bytes(pickle.dumps(Bomb()))
    for load in (net.load, type(net).from_checkpoint):
        with pytest.raises(CheckpointError, match=r"net\.safetensors"):
            load(file)
    assert not (memory / "exploded").exists()


def test_fault_28_a_bit_flips_in_the_header_of_a_checkpoint(memory):
    net, file = saved(memory)
    from dynlib.errors import CheckpointError

    whole, refused = bytearray(file.read_bytes()), 0
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    for at in range(0, 8 + int.from_bytes(whole[:8], "little"), 97):
        flipped = bytearray(whole)
        flipped[at] ^= 4
        file.write_bytes(flipped)
        try:
            type(net).from_checkpoint(file)
            continue
        except CheckpointError:
            refused += 1
        with pytest.raises(CheckpointError):
            net.load(file)
        assert all(v.equal(before[k]) for k, v in net.net.state_dict().items())
    assert refused > 10


def test_fault_28_a_bit_flips_in_the_tensors_of_a_checkpoint(memory):
    net, file = saved(memory)
    from dynlib.errors import CheckpointError

    whole = bytearray(file.read_bytes())
    for at in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 499):
        flipped = bytearray(whole)
        flipped[at] ^= 1
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"net\.safetensors: damaged"):
            net.load(file)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 10_000))
def test_fault_31_a_journal_is_cut_and_continued(memory, cut):
    log = DecisionLog(seed=1)
    file = log.journal(memory / "log.jsonl")
    header = file.stat().st_size
    for i in range(20):
        log.add(float(i), "arrive", app="a", frame=i)
    assert list(DecisionLog.read(file)) == log.events  # as they came
    kept = file.read_bytes()[: header + cut % (file.stat().st_size - header)]
    file.write_bytes(kept)
    again = DecisionLog.read(file)
    assert again.events == log.events[: len(again.events)]
    assert len(again.events) - kept[header:].count(b"\n") in (0, 1)
    again.journal(file)
    again.add(99.0, "drop", app="a", frame=99)
    assert [json.loads(line) for line in file.read_text().splitlines()[1:]] == again.events


def events(count):
    return [{"t_s": float(i), "event": "arrive", "app": "a", "frame": i} for i in range(count)]


def rotated(memory, count, **options):
    """A log of so many events in parts of 400 bytes, a handful of events each."""
    log = DecisionLog(seed=1)
    file = log.journal(memory / "log.jsonl", part_mb=400e-6, **options)
    for event in events(count):
        log.add(**event)
    return log, file


def test_fault_31_a_rotated_journal_is_read_as_one(memory):
    log, file = rotated(memory, 50)
    parts = sorted(memory.glob("log.*.jsonl"))
    assert len(parts) > 5
    assert all(part.stat().st_size < 500 for part in (*parts, file))
    again = DecisionLog.read(file)
    assert again.events == log.events == events(50)
    assert again.header == log.header
    # What was read can be written and continued as one.
    again.journal(memory / "again.jsonl")
    again.add(99.0, "drop", app="a", frame=99)
    assert DecisionLog.read(memory / "again.jsonl").events == again.events


def test_fault_31_only_the_last_parts_are_kept(memory):
    log, file = rotated(memory, 50, parts=2)
    assert len(list(memory.iterdir())) == 3
    again = DecisionLog.read(file)
    assert 0 < len(again.events) < 50
    assert again.events == log.events[-len(again.events) :]
    assert again.header["first_part"] > 1


@pytest.mark.parametrize("step", ["link", "replace"])
def test_fault_31_killed_while_a_journal_is_rotated(memory, monkeypatch, step):
    """Nothing is lost, and nothing there twice."""
    calls = {"link": "os.link", "replace": "dynlib.log.atomic_write"}

    def killed(*_, **__):
        raise KeyboardInterrupt

    log, file = rotated(memory, 4)
    with monkeypatch.context() as patch:
        patch.setattr(calls[step], killed)
        for event in events(50)[4:]:
            try:
                log.add(**event)
            except KeyboardInterrupt:
                break
    assert 4 < len(log.events) < 50
    assert DecisionLog.read(file).events == log.events


@pytest.mark.parametrize("part", [True, -1, 1.5, "1", None])
def test_fault_31_a_log_of_no_number_of_parts(memory, part):
    log = DecisionLog(part=part)
    with pytest.raises(TableError, match=r"log\.jsonl: part is"):
        DecisionLog.read(log.write(memory / "log.jsonl"))


def test_fault_31_the_disk_is_full(memory, caplog):
    log = DecisionLog(seed=1)
    log.journal(memory / "log.jsonl")
    log._journal = open("/dev/full", "w", buffering=1)  # noqa: PTH123, SIM115
    for i in range(3):
        log.add(float(i), "arrive", app="a", frame=i)
    assert len(log.events) == 3
    assert len(reported(caplog)) == 1
    assert "No space left" in reported(caplog)[0]


def test_fault_32_preparing_a_network_runs_out_of_memory(memory, monkeypatch):
    net, _ = saved(memory)
    import torch

    from dynlib.nets.serve import SubnetServer

    small, large = list(net.statistics)
    server, images = SubnetServer(net, [small]), torch.randn(2, 3, 16, 16)
    before = server(images)

    def full(config):
        raise MemoryError("no room")

    monkeypatch.setattr(net, "prepare", full)
    with pytest.raises(MemoryError):
        server.prepare(large)
    assert server.subnets == (str(small),)
    assert server(images).equal(before)
