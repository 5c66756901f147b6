"""Multi-objective search over a space with Optuna: NSGA-II, its random rival, fronts, volumes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from scipy import stats

from dynlib import DynlibError
from dynlib.points import hypervolume, pareto_front
from dynlib.space import SearchSpace, SubnetConfig

# A sampler that has converged repeats itself; it may do so this often per sub-network asked for.
PATIENCE = 20

Objective = Callable[[SubnetConfig], Mapping[str, float]]


class SearchError(DynlibError):
    """A search cannot be run or resumed; says which study and why."""


def search(
    space: SearchSpace, objective: Objective, directions: Mapping[str, str], *, trials: int,
    seed: int, sampler: str = "nsga2", population: int = 16, storage: str | Path | None = None,
    name: str = "search",
    start: Iterable[SubnetConfig] = (),
) -> pd.DataFrame:  # fmt: skip
    """Evaluate `trials` different sub-networks, proposed by Optuna, and return one row for each.

    A proposal that was evaluated before costs nothing and is no trial.

    Args:
        objective: maps a sub-network to its measures.
        directions: which measures are objectives, each "maximize" or "minimize".
        sampler: ``nsga2`` (Deb et al. 2002), or ``random``.
        population: of NSGA-II.
        storage: file of an Optuna journal. A study of the same name in it is resumed: only the
            trials it lacks are run.
        start: sub-networks to try first, such as the ends of the space, which are known before
            any search; they count as trials.

    Raises:
        SearchError: the stored study has other objectives, or cannot be read.
    """
    samplers = {
        "nsga2": lambda s: optuna.samplers.NSGAIISampler(population_size=population, seed=s),
        "random": lambda s: optuna.samplers.RandomSampler(seed=s),
    }
    if sampler not in samplers:
        raise SearchError(f"unknown sampler {sampler!r}; expected one of {sorted(samplers)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = None
    if storage is not None:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        journal = JournalStorage(JournalFileBackend(str(storage)))
    study = optuna.create_study(
        directions=list(directions.values()), storage=journal, study_name=name, load_if_exists=True,
    )  # fmt: skip
    if study.user_attrs.get("objectives", dict(directions)) != dict(directions):
        raise SearchError(
            f"{storage}: study {name!r} has the objectives {study.user_attrs['objectives']}, "
            f"not {dict(directions)}"
        )
    study.set_user_attr("objectives", dict(directions))
    complete = [optuna.trial.TrialState.COMPLETE]
    measured = {
        t.user_attrs["subnet"]: t.user_attrs["measures"] for t in study.get_trials(states=complete)
    }
    study.sampler = samplers[sampler](seed + 1000 * len(study.trials))
    for config in start if not study.trials else ():
        indices = space.encode(config).tolist()
        study.enqueue_trial(dict(zip((axis for axis, _ in space.axes()), indices, strict=True)))

    def run(trial: optuna.Trial) -> tuple[float, ...]:
        indices = [trial.suggest_int(axis, 0, len(c) - 1) for axis, c in space.axes()]
        config = space.decode(indices)
        name = str(config)
        if name not in measured:
            measured[name] = {k: float(v) for k, v in objective(config).items()}
        trial.set_user_attr("subnet", name)
        trial.set_user_attr("measures", measured[name])
        return tuple(measured[name][key] for key in directions)

    trials = min(trials, space.size)
    for _ in range(PATIENCE * trials):
        if len(measured) >= trials:
            break
        study.optimize(run, n_trials=1)
    rows = [{"subnet": name, **values} for name, values in list(measured.items())[:trials]]
    return pd.DataFrame(rows).assign(trial=range(len(rows)), sampler=sampler, seed=seed)


def front(table: pd.DataFrame, directions: Mapping[str, str]) -> pd.DataFrame:
    """The non-dominated rows of a table of trials, each sub-network once."""
    minimise = [k for k, d in directions.items() if d == "minimize"]
    maximise = [k for k, d in directions.items() if d == "maximize"]
    return pareto_front(table.drop_duplicates("subnet"), minimise, maximise)


def growth(tables: Sequence[pd.DataFrame], directions: Mapping[str, str]) -> list[np.ndarray]:
    """Hypervolume of each table after each of its trials.

    The reference point of all is the worst corner of their union.
    """
    signs = np.array([1.0 if d == "minimize" else -1.0 for d in directions.values()])
    points = [t[list(directions)].to_numpy(float) * signs for t in tables]
    reference = np.concatenate(points).max(axis=0)
    return [np.array([hypervolume(p[: i + 1], reference) for i in range(len(p))]) for p in points]


def volumes(tables: Sequence[pd.DataFrame], directions: Mapping[str, str]) -> np.ndarray:
    """Hypervolume of each table of trials at its end; see `growth`."""
    return np.array([curve[-1] for curve in growth(tables, directions)])


def paired_ratio(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95):
    """Geometric mean of ours / theirs over paired runs, with a t interval on the logarithms.

    Returns (mean, low, high). Raises `SearchError` for fewer than 5 pairs.
    """
    if len(ours) < 5 or len(ours) != len(theirs):
        raise SearchError(f"comparing needs at least 5 paired runs, got {len(ours)}")
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    half = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * stats.sem(logs)
    return tuple(float(v) for v in np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]))
