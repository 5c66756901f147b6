from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runtime_cases import board, cases, periodic, run, summarise, tables, unit

from dynlib.boards.board import Opp
from dynlib.errors import DynlibError
from dynlib.manager.policy import Waiting
from dynlib.runtime.case import Case
from dynlib.runtime.rivals import linux_default
from dynlib.runtime.simulation import Simulation
from dynlib.workload import Requirement
from suite.papers.ztt import QAgent, _mhz, is_flat, matches, q_update, train_agent
from suite.record.figures import save
from suite.studies.manage import simulate_many

BOARD = board(unit(noise_cv=0.03))
TABLES = tables(BOARD)
SEEDS = range(300, 304)


def make(seed):
    return periodic(60.0, horizon_s=10.0)


@pytest.fixture(scope="module")
def trained():
    return train_agent(cases(make, BOARD, TABLES))


@pytest.fixture(scope="module")
def runs(trained):
    fixed = {name: (lambda make, name=name: linux_default(make, SEEDS, name, name))
             for name in ("performance", "schedutil")}  # fmt: skip
    policies = fixed | {"q-learning": lambda make: trained[0]}
    return simulate_many({"toy": cases(make, BOARD, TABLES)}, BOARD, TABLES, policies, SEEDS)


def test_q_learning_finds_the_optimal_values_of_two_states():
    # Staying in state 1 pays 2, leaving state 0 costs 1, all else is free and worth nothing.
    reward, then = np.array([[0.0, -1.0], [0.0, 2.0]]), np.array([[0, 1], [0, 1]])
    discount, rng = 0.5, np.random.default_rng(0)
    values, visits, at = np.full((2, 2), -5.0), np.zeros((2, 2)), 0
    steps = []
    for action in rng.integers(2, size=20_000):
        noise = rng.normal(0, 0.1)
        steps.append(((at, action), reward[at, action] + noise, (then[at, action],)))
        at = then[at, action]
    q_update(values, visits, steps, discount)
    # Q*(1, stay) = 2 / (1 - 1/2); the others follow from Bellman's equation.
    assert values == pytest.approx(np.array([[0.5, 1.0], [0.5, 4.0]]), abs=0.05)
    assert visits.sum() == len(steps)


def test_the_last_step_is_worth_its_reward_alone():
    values, visits = np.full((1, 2), 9.0), np.zeros((1, 2))
    q_update(values, visits, [((0, 1), -3.0, None)], 0.9)
    assert values.tolist() == [[9.0, -3.0]]


@pytest.mark.parametrize("training", [False, True])
def test_deciding_is_pure(trained, training):
    agent, _ = trained
    if training:
        visits = {u: np.zeros_like(v) for u, v in agent.values.items()}
        agent = replace(agent, visits=visits, draws=(3, 1))
    seen, workload = [], make(300)

    class Twice:
        name, static, governors = agent.name, agent.static, agent.governors
        choose = staticmethod(agent.choose)

        def decide(self, state, limits):
            seen.append((agent.decide(state, limits), agent.decide(state, limits)))
            return seen[-1][0]

    run(workload, BOARD, TABLES, Twice(), 300)
    assert len(seen) > 300
    assert all(one == two for one, two in seen)
    if training:
        assert len({action.clocks["gpu"] for action, _ in seen}) == len(BOARD.gpu.freqs)


def test_same_seed_same_agent_and_another_seed_another(trained):
    (one, curve), (again, same), (other, _) = (
        train_agent(cases(make, BOARD, TABLES), episodes=5, seed=seed) for seed in (0, 0, 1)
    )
    assert (one.values["gpu"] == again.values["gpu"]).all()
    assert (one.values["gpu"] != other.values["gpu"]).any()
    pd.testing.assert_frame_equal(curve, same)
    pd.testing.assert_frame_equal(curve, trained[1][:5])


def test_training_ends_with_its_learning_curve(trained):
    _, curve = trained
    rewards = curve["reward"].tolist()
    assert is_flat(rewards)
    assert not any(is_flat(rewards[:i]) for i in range(len(rewards)))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.5
    assert curve["miss_pct"][-5:].mean() < curve["miss_pct"][:5].mean()


@given(st.lists(st.floats(-9, -0.1), max_size=29))
def test_a_curve_is_not_flat_before_two_spans(rewards):
    assert not is_flat(rewards)
    assert is_flat([-1.0] * 30)
    assert not is_flat([-2.0] * 15 + [-1.0] * 15)


def test_the_trained_agent_saves_energy_and_keeps_the_deadline(runs):
    means = runs.groupby("policy")[["energy_per_frame_mj", "deadline_miss_pct"]].mean()
    energy_mj = means["energy_per_frame_mj"]
    assert energy_mj["q-learning"] < 0.9 * energy_mj["performance"]
    assert means["deadline_miss_pct"]["q-learning"] <= 1


def test_kept_only_with_less_energy_as_few_misses_and_equal_work(runs):
    row = matches(runs).iloc[0]
    means = runs.groupby("policy")["energy_per_frame_mj"].mean()
    assert row["energy_ratio"] == pytest.approx(means["q-learning"] / means["schedutil"])
    mine = runs["policy"] == "q-learning"
    for column, change, kept in (("energy_per_frame_mj", 0.0, True),
                                 ("energy_per_frame_mj", 1e6, False),
                                 ("deadline_miss_pct", 99.0, False),
                                 ("accuracy_mean_pct", -1.0, False)):  # fmt: skip
        cheap = runs.assign(energy_per_frame_mj=runs["energy_per_frame_mj"].where(~mine, 1.0))
        cheap.loc[mine, column] += change
        assert bool(matches(cheap).iloc[0]["kept"]) == kept, column


def test_a_longer_frame_and_less_time_ask_for_more_clock():
    """The load that the agent sees: a frame of 20 ms at 1000 MHz, due in 40, 20 or 80 ms."""

    def mhz(deadline_ms, cycles=20_000, now_ms=0.0, late=0):
        need = Requirement(deadline_ms, 60.0, 0.0)
        waiting = [Waiting(0.0, deadline_ms, 0.0)] + [Waiting(-60.0, -20.0, 0.0)] * late
        app = SimpleNamespace(name="app", need=need, waiting=waiting, running=[])
        return _mhz([app], {"app": cycles}, now_ms)

    assert mhz(40.0) == 500
    assert mhz(20.0) == mhz(40.0, cycles=40_000) == mhz(40.0, now_ms=20.0) == 1000
    assert mhz(80.0) == 250
    assert mhz(40.0, late=1) == 1000  # what is overdue goes first


def test_the_agent_learns_how_many_cycles_a_frame_takes(trained):
    agent, _ = trained
    engine = Simulation(Case(make(300), BOARD, TABLES), agent, 300)
    engine.run()
    cycles, trail = engine.memory
    assert trail == ()
    # 20 ms at 1000 MHz, give or take the noise of the last frame.
    assert cycles["app"] == pytest.approx(20_000, rel=0.15)


def test_refuses_what_it_cannot_learn_from():
    single = board(unit(opps=(Opp(1000.0, 1000.0),)))
    with pytest.raises(DynlibError, match=r"'tiny'.*'gpu' has one clock, expected more"):
        train_agent(cases(make, single, tables(single)))
    with pytest.raises(DynlibError, match=r"table of 'net'.*board tiny, expected 'other'"):
        train_agent(cases(make, replace(BOARD, name="other"), TABLES))


def test_a_learnt_table_is_for_its_board_alone(trained):
    other = board(unit(opps=(Opp(300.0, 500.0), Opp(600.0, 800.0))))
    with pytest.raises(DynlibError, match=r"trained on a unit 'gpu' with the clocks \(250"):
        run(make(300), other, tables(other), trained[0], 300)


def test_it_stays_within_the_highest_clock_allowed(trained):
    agent, seen = trained[0], []

    class Capped(QAgent):
        def decide(self, state, limits):
            action = super().decide(state, {"gpu": 500.0})
            seen.append(action.clocks["gpu"])
            return action

    run(make(300), BOARD, TABLES, Capped(agent.base, agent.freqs, agent.values), 300)
    assert max(seen) <= 500


def test_the_learning_curve_is_drawn(trained, runs, tmp_path):
    curve = trained[1].assign(policy="q-learning", scenario="toy")
    columns = {"deadline_miss_pct": "miss_pct"}
    means = runs.groupby(["policy", "scenario"], as_index=False)[
        ["energy_per_frame_mj", "deadline_miss_pct"]
    ].mean()
    table = pd.concat([curve, means[means["policy"] == "schedutil"].rename(columns=columns)])
    picture = save("manage_one_qlearning", table.assign(source="simulated"), tmp_path,
                   profile="quick")  # fmt: skip
    assert picture.path.stat().st_size > 10_000


def test_summaries_and_curves_count_alike(trained):
    """The curve's energy and misses are those of `summarise` for the same run."""
    agent, curve = train_agent(cases(make, BOARD, TABLES), episodes=1)
    visits = {u: np.zeros_like(v) for u, v in agent.values.items()}
    first = {u: np.full_like(v, -50.0) for u, v in agent.values.items()}
    for value in first.values():
        value[..., -1] = -5.0
    learner = QAgent(agent.base, agent.freqs, first, visits, (0, 0))
    workload = make(1_000_000)
    log = run(workload, BOARD, TABLES, learner, 1_000_000)
    summary = summarise(log, workload, TABLES, BOARD)
    assert curve["energy_per_frame_mj"].item() == pytest.approx(summary["energy_per_frame_mj"])
    assert curve["miss_pct"].item() == pytest.approx(summary["deadline_miss_pct"])
