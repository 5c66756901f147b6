"""What the manager makes of what it sees others use."""

from live_cases import machine
from runtime_cases import board, tables, unit

from dynlib.manager.manager import Manager
from dynlib.manager.policy import AppState, Finished, State
from dynlib.profile.points import at_full_clock
from dynlib.workload import Requirement

ON = at_full_clock(board(unit("cpu", "cpu", cores=2)))
TABLES = tables(ON, units=("cpu",), nets=(("small", 70.0, 0.4), ("large", 80.0, 1.0)))
NEED = Requirement(18.0, 50.0, 0.0)  # 10 ms and 4 ms: nine tenths of what the large one needs twice


def frames(manager, spans):
    """Frames 50 ms apart, of ([share others use, how much longer frames take], ...); what ran."""
    memory, finished, ran = None, (), []
    for k, (others_pct, stretch) in enumerate(spans):
        t_ms = 50.0 * k
        app = AppState("app", "net", NEED, "periodic", 0, "", 0.0, t_ms, (), (), ())
        state = State(t_ms, (app,), {"cpu": 1000.0}, {"cpu": 1000.0}, 0.0, finished, memory,
                      others_pct=others_pct)  # fmt: skip
        action = manager.decide(state, {"cpu": 1000.0})
        memory = action.memory
        where = action.placements["app"]
        ms = TABLES["net"].point(*where).latency_ms[-1] * stretch
        finished = (Finished("app", where.subnet, "cpu", ((1000.0, ms),)),)
        ran.append(where.subnet)
    return ran


def manager():
    return Manager(ON, TABLES, objective="accuracy", target_miss_pct=2.0)


CALM, BUSY = ({"cpu": 0.0}, 1.0), ({"cpu": 100.0}, 2.0)


def test_a_load_is_given_way_to_before_a_frame_was_hurt_and_not_a_frame_longer():
    ran = frames(manager(), [CALM] * 20 + [BUSY] * 20 + [CALM] * 20)
    assert ran == ["large"] * 20 + ["small"] * 20 + ["large"] * 20


def test_a_load_that_does_no_harm_is_found_out():
    ran = frames(manager(), [CALM] * 20 + [({"cpu": 100.0}, 1.0)] * 40)
    assert ran[20] == "small"
    assert set(ran[35:]) == {"large"}


def test_what_was_learnt_of_a_load_is_kept_for_the_next():
    harmless = ({"cpu": 100.0}, 1.0)
    ran = frames(manager(), [CALM] * 20 + [harmless] * 40 + [CALM] * 20 + [harmless] * 5)
    assert set(ran[-5:]) == {"large"}


def test_one_odd_frame_among_calm_ones_is_noise():
    spans = [CALM] * 30 + [({"cpu": 0.0}, 1.6)] + [CALM] * 30
    assert set(frames(manager(), spans)) == {"large"}


def test_where_others_cannot_be_seen_nothing_is_different():
    blind, seeing = ({}, 1.0), ({"cpu": 0.0}, 1.0)
    assert frames(manager(), [blind] * 30) == frames(manager(), [seeing] * 30)


def test_the_board_of_the_tests_is_that_of_live_runs():
    assert machine().units[0].freqs == ON.units[0].freqs


def test_a_network_that_is_late_too_often_is_left_and_the_other_one_is_not():
    odd = ({"cpu": 0.0}, 1.9)  # 19 ms of 18
    ran = frames(manager(), [CALM] * 10 + ([odd] + [CALM] * 4) * 6)
    assert ran[:10] == ["large"] * 10
    assert set(ran[-10:]) == {"small"}, "the small one takes 7.6 ms at worst"


def test_it_is_tried_again_after_a_while():
    odd = ({"cpu": 0.0}, 1.9)
    ran = frames(manager(), [CALM] * 10 + ([odd] + [CALM] * 4) * 4 + [CALM] * 700)
    assert ran[40] == "small"
    assert set(ran[-20:]) == {"large"}


def test_a_plan_that_became_hopeless_is_not_kept_for_a_while():
    ran = frames(manager(), [CALM] * 20 + [({"cpu": 50.0}, 2.2)] * 8)
    assert ran[20:23] == ["large"] * 3  # which agree that it is one
    assert set(ran[23:]) == {"small"}
