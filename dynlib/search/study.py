"""Multi-objective search over a space with Optuna: samplers, storage, workers, fronts, volumes."""

import contextlib
import fcntl
import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from scipy import stats

from dynlib.errors import InfeasibleError, SearchError
from dynlib.pareto import hypervolume, pareto_front
from dynlib.space import SearchSpace, SubnetConfig

# A sampler that has converged repeats itself; it may do so this often per sub-network asked for.
PATIENCE = 20

Objective = Callable[[SubnetConfig], Mapping[str, float]]
BETTER = {"minimize": -1.0, "maximize": 1.0}


class _KernelLock:
    """A lock on the journal that the kernel drops when its owner dies, so kill -9 blocks nobody."""

    def __init__(self, path: Path):
        self._path, self._file = path.with_name(path.name + ".lock"), None

    def acquire(self) -> bool:
        self._file = self._path.open("a")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        self._file.close()


def open_storage(storage: str | Path | None):
    """The Optuna storage behind a journal file or a database URL such as ``postgresql://...``."""
    if storage is None or "://" in str(storage):
        return storage
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path), _KernelLock(path)))


def _sampler(kind, seed: int, population: int) -> optuna.samplers.BaseSampler:
    samplers = {
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=population, seed=seed),
        "nsga3": lambda: optuna.samplers.NSGAIIISampler(population_size=population, seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(n_startup_trials=population, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    if isinstance(kind, optuna.samplers.BaseSampler):
        return kind
    if kind not in samplers:
        raise SearchError(f"unknown sampler {kind!r}; expected one of {sorted(samplers)}")
    return samplers[kind]()


def search(
    space: SearchSpace, objective: Objective, directions: Mapping[str, str], *, trials: int,
    seed: int, sampler: str | optuna.samplers.BaseSampler = "nsga2", population: int = 16,
    limits: Mapping[str, float] | None = None, storage: str | Path | None = None,
    name: str = "search", start: Iterable[SubnetConfig] = (), workers: int = 1,
) -> pd.DataFrame:  # fmt: skip
    """Evaluate `trials` different sub-networks, proposed by Optuna, and return one row for each.

    A proposal that was evaluated before costs nothing and is no trial.

    Args:
        objective: maps a sub-network to its measures.
        directions: which measures are objectives, each "maximize" or "minimize".
        sampler: ``nsga2`` (Deb et al. 2002), ``nsga3``, ``tpe``, ``random``, or Optuna's own.
        population: of NSGA-II and III; random trials before TPE.
        limits: the worst values allowed of some objectives; a sampler prefers what keeps them.
        storage: file of an Optuna journal, or URL of a database that several machines share. A
            study of the same name in it is resumed: only the trials it lacks are run.
        start: sub-networks to try first, such as the ends of the space, which are known before
            any search; they count as trials.
        workers: processes on this one study. More than one needs a `storage`, and an `objective`
            that can be imported; trials then differ from run to run.

    Raises:
        SearchError: the stored study has other objectives or another space, or lost a worker.
        InfeasibleError: nothing that was tried keeps the limits.
    """
    limits = dict(limits or {})
    if unknown := set(limits) - set(directions):
        raise SearchError(f"limits on {sorted(unknown)}, but the objectives are {list(directions)}")
    _sampler(sampler, seed, population)  # an unknown one fails before a study
    study = _open(space, directions, storage, name)
    if not study.trials:
        for config in start:
            study.enqueue_trial(params(space, config))
    trials = min(trials, space.size)
    if workers > 1:
        _work(workers, {
            "space": space, "objective": objective, "directions": directions, "trials": trials,
            "sampler": sampler, "population": population, "limits": limits, "storage": storage,
            "name": name,
        }, seed)  # fmt: skip
    else:
        # A resumed study must not draw again what it drew before.
        fresh = seed + 1000 * len(study.trials)
        study.sampler = _sampler(sampler, fresh, population)
        _run(study, space, objective, directions, limits, trials)
    measured = list(_measured(study).items())[:trials]
    rows = [{"subnet": subnet, **values} for subnet, values in measured]
    label = sampler if isinstance(sampler, str) else type(sampler).__name__
    table = pd.DataFrame(rows).assign(trial=range(len(rows)), sampler=label, seed=seed)
    if limits:
        best_within(table, next(iter(directions)), directions, limits)
    return table


def _open(space, directions, storage, name) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        directions=list(directions.values()), storage=open_storage(storage), study_name=name,
        load_if_exists=True,
    )  # fmt: skip
    for key, value in (("objectives", dict(directions)), ("space", json.dumps(space.to_dict()))):
        stored = study.user_attrs.get(key)
        if stored is None:
            study.set_user_attr(key, value)
        elif stored != value:
            raise SearchError(f"{storage}: study {name!r} has the {key} {stored}, not {value}")
    return study


def distributions(space: SearchSpace) -> dict[str, optuna.distributions.IntDistribution]:
    """What Optuna draws from: the index of a choice, for every axis that has one."""
    return {
        axis: optuna.distributions.IntDistribution(0, len(choices) - 1)
        for axis, choices in space.axes() if len(choices) > 1
    }  # fmt: skip


def params(space: SearchSpace, config: SubnetConfig) -> dict[str, int]:
    """Choice indices by axis; an axis with one choice is no parameter."""
    indices = zip(space.axes(), space.encode(config).tolist(), strict=True)
    return {axis: index for (axis, choices), index in indices if len(choices) > 1}


def _measured(study: optuna.Study) -> dict[str, dict[str, float]]:
    """Measures of every sub-network that a finished trial evaluated, in the order of trials."""
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    found: dict[str, dict[str, float]] = {}
    for trial in done:
        found.setdefault(trial.user_attrs["subnet"], trial.user_attrs["measures"])
    return found


def _run(study: optuna.Study, space, objective, directions, limits, trials: int) -> None:
    measured: dict[str, Mapping[str, float]] = {}

    def run(trial: optuna.Trial) -> tuple[float, ...]:
        indices = [
            trial.suggest_int(axis, 0, len(c) - 1) if len(c) > 1 else 0 for axis, c in space.axes()
        ]
        config = space.decode(indices)
        subnet = str(config)
        if subnet not in measured:
            measured[subnet] = {k: float(v) for k, v in objective(config).items()}
        trial.set_user_attr("subnet", subnet)
        trial.set_user_attr("measures", measured[subnet])
        for key, limit in limits.items():
            trial.set_constraint(key, BETTER[directions[key]] * (limit - measured[subnet][key]))
        return tuple(measured[subnet][key] for key in directions)

    for _ in range(PATIENCE * trials):
        measured |= _measured(study)  # other workers' too
        if len(measured) >= trials:
            break
        study.optimize(run, n_trials=1)


def _work(workers: int, job: dict, seed: int) -> None:
    """Run `search` in so many processes on the study that exists already."""
    if job["storage"] is None:
        raise SearchError(f"{workers} workers need a storage that they share")
    context = multiprocessing.get_context("forkserver")  # forking a process with threads may hang
    context.set_forkserver_preload([__name__])
    crew = [
        context.Process(target=_join, kwargs={**job, "seed": seed + 10_000 * i})
        for i in range(workers)
    ]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
    if failed := [process.exitcode for process in crew if process.exitcode]:
        raise SearchError(
            f"study {job['name']!r}: {len(failed)} of {workers} workers failed, exit {failed}; its "
            "finished trials are kept, run it again to go on"
        )


def _join(**job) -> None:
    with contextlib.suppress(InfeasibleError):  # for the one who asked to say, once all are done
        search(**job)


def best_within(
    table: pd.DataFrame, objective: str, directions: Mapping[str, str], limits: Mapping[str, float]
) -> pd.Series:
    """The row that is best in `objective` among those that keep all `limits`.

    Raises `InfeasibleError` naming the limit in the way, the best value reachable of that measure,
    and the point that misses the limits by the smallest share of the measures' ranges.
    """
    gain = {key: BETTER[directions[key]] * table[key] for key in (objective, *limits)}
    miss = {key: BETTER[directions[key]] * limit - gain[key] for key, limit in limits.items()}
    missed = pd.DataFrame(miss, index=table.index).clip(lower=0)
    kept = (missed == 0).all(axis=1)
    if kept.any():
        return table.loc[gain[objective][kept].idxmax()]
    span = (table[list(limits)].max() - table[list(limits)].min()).replace(0, 1)
    nearest = table.loc[(missed / span).max(axis=1).idxmin()]
    for limit in limits:
        others = (missed.drop(columns=limit) == 0).all(axis=1)
        if others.any():
            rest = "with the others kept"
            break
    else:
        limit, others, rest = next(iter(limits)), kept | True, "alone"
    reachable = float(table.loc[gain[limit][others].idxmax(), limit])
    values = ", ".join(f"{key} {nearest[key]:.6g}" for key in limits)
    raise InfeasibleError(
        f"no sub-network keeps {_words(limits, directions)}: the best {limit} reachable "
        f"{rest} is {reachable:.6g}; nearest is {nearest['subnet']} with {values}",
        limit, reachable, nearest,
    )  # fmt: skip


def _words(limits: Mapping[str, float], directions: Mapping[str, str]) -> str:
    sign = {"minimize": "<=", "maximize": ">="}
    return " and ".join(f"{key} {sign[directions[key]]} {v:g}" for key, v in limits.items())


def record(
    space: SearchSpace, table: pd.DataFrame, directions: Mapping[str, str], *,
    storage: str | Path, name: str,
) -> optuna.Study:  # fmt: skip
    """Write rows found by another search (`subnet` and measures) into a study, as finished trials.

    So a vectorised search's front lies where every other study does. Rows already there are kept
    once. Returns the study.
    """
    study = _open(space, directions, storage, name)
    known = _measured(study)
    measures = table.select_dtypes("number").columns
    study.add_trials([
        optuna.trial.create_trial(
            params=params(space, SubnetConfig.parse(row["subnet"])),
            distributions=distributions(space),
            values=[row[key] for key in directions],
            user_attrs={"subnet": row["subnet"], "measures": {m: float(row[m]) for m in measures}},
        )
        for _, row in table.iterrows() if row["subnet"] not in known
    ])  # fmt: skip
    return study


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


def geometric_ratio(ours: np.ndarray, theirs: np.ndarray, confidence: float = 0.95):
    """Geometric mean of ours / theirs over paired runs, with a t interval on the logarithms.

    Returns (mean, low, high). Raises `SearchError` for fewer than 5 pairs.
    """
    if len(ours) < 5 or len(ours) != len(theirs):
        raise SearchError(f"comparing needs at least 5 paired runs, got {len(ours)}")
    logs = np.log(np.asarray(ours) / np.asarray(theirs))
    half = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * stats.sem(logs)
    return tuple(float(v) for v in np.exp([logs.mean(), logs.mean() - half, logs.mean() + half]))
