"""Multi-objective search over a space with Optuna: samplers, storage, workers, fronts."""

import contextlib
import fcntl
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

import optuna
import pandas as pd
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from dynlib.errors import InfeasibleError, SearchError
from dynlib.files import atomic_write, read_plain, shown
from dynlib.pareto import pareto_front
from dynlib.space import SearchSpace, SubnetConfig

# A sampler that has converged repeats itself; it may do so this often per sub-network asked for.
PATIENCE = 20

Objective = Callable[[SubnetConfig], Mapping[str, float]]
Directions = Mapping[str, str]  # of each objective, "minimize" or "maximize"
BETTER = {"minimize": -1.0, "maximize": 1.0}


class _KernelLock:
    """A lock on the journal that the kernel drops when its owner dies, so kill -9 blocks nobody."""

    def __init__(self, path: Path):
        self._path = path.with_name(path.name + ".lock")
        self._file = None

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
    lock = _KernelLock(path)
    _mend(path, lock)
    journal = JournalFileBackend(str(path), lock)
    return JournalStorage(journal)


def _mend(path: Path, lock: _KernelLock) -> None:
    """Take out of a journal what a killed or full machine left half written.

    Nobody has acted on half an entry, so that what was appended to it later stands without it.
    """
    lock.acquire()
    try:
        if not path.exists():
            return
        lines = read_plain(path).splitlines(keepends=True)
        whole = [_whole(line) for line in lines]
        if whole != lines:
            atomic_write(path, b"".join(whole))
    except OSError as error:
        raise SearchError(f"{path}: no journal of a study: {error}") from error
    finally:
        lock.release()


def _whole(line: bytes) -> bytes:
    """The entry at the end of a line of a journal; nothing if it is not whole."""
    at = 0
    while at >= 0 and line.endswith(b"\n"):
        try:
            if isinstance(json.loads(line[at:]), dict):
                return line[at:]
        except (ValueError, RecursionError):
            pass
        at = line.find(b'{"op_code"', at + 1)
    return b""


def _sampler(
    kind: str | optuna.samplers.BaseSampler, seed: int, population: int
) -> optuna.samplers.BaseSampler:
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
    space: SearchSpace,
    objective: Objective,
    directions: Directions,
    *,
    trials: int,
    seed: int,
    sampler: str | optuna.samplers.BaseSampler = "nsga2",
    population: int = 16,
    limits: Mapping[str, float] | None = None,
    storage: str | Path | None = None,
    name: str = "search",
    start: Iterable[SubnetConfig] = (),
    workers: int = 1,
) -> pd.DataFrame:
    """Evaluate `trials` different sub-networks, proposed by Optuna, and return one row for each.

    A proposal that was evaluated before costs nothing and is no trial.

    Args:
        objective: maps a sub-network to its measures; `StopHopeless` is one that saves images.
        directions: which measures are objectives, each "maximize" or "minimize".
        sampler: ``nsga2`` (Deb et al. 2002), ``nsga3``, ``tpe``, ``random``, or a sampler:
            `GuidedSampler` finds most in few trials where costs are known, Optuna's `GPSampler`
            where they are not.
        population: of NSGA-II and III; random trials before TPE.
        limits: the worst values allowed of some objectives; a sampler prefers what keeps them.
        storage: file of an Optuna journal, or URL of a database that several machines share, such
            as ``postgresql+psycopg://...`` with ``pip install ".[database]"``. A study of the
            same name in it is resumed: only the trials it lacks are run.
        start: sub-networks to try first, such as the ends of the space, which are known before
            any search; they count as trials.
        workers: processes on this one study. More than one needs a `storage`, and an `objective`
            that can be imported; trials then differ from run to run.

    Raises:
        SearchError: a direction is unknown, `trials` is below 1, a measure lacks an objective; or
            the stored study has other objectives or another space, or lost a worker.
        InfeasibleError: nothing that was tried keeps the limits.

    >>> space = SearchSpace(resolution=(32,), depth=((1, 2),), width=((8, 16, 32),))
    >>> def measure(config):
    ...     depth, width = config.depth[0], config.width[0]
    ...     return {"latency_ms": depth * width, "accuracy_pct": width}
    >>> goals = {"latency_ms": "minimize", "accuracy_pct": "maximize"}
    >>> table = search(space, measure, goals, trials=6, seed=0)
    >>> pareto_front(table, ["latency_ms"], ["accuracy_pct"])["subnet"].tolist()
    ['r32-d1-w8', 'r32-d1-w16', 'r32-d1-w32']
    """
    limits = dict(limits or {})
    if unknown := set(limits) - set(directions):
        raise SearchError(f"limits on {sorted(unknown)}, but the objectives are {list(directions)}")
    if trials < 1:
        raise SearchError(f"trials: got {trials}, expected at least 1")
    _sampler(sampler, seed, population)  # an unknown one fails before a study
    study = open_study(space, directions, storage, name)
    if not study.trials:
        for config in start:
            study.enqueue_trial(params(space, config))
    trials = min(trials, space.size)
    if workers > 1:
        job = {
            "space": space,
            "objective": objective,
            "directions": directions,
            "trials": trials,
            "sampler": sampler,
            "population": population,
            "limits": limits,
            "storage": storage,
            "name": name,
        }
        _share(job, workers, seed)
    else:
        # A resumed study must not draw again what it drew before.
        fresh = seed + 1000 * len(study.trials)
        study.sampler = _sampler(sampler, fresh, population)
        _run(study, space, objective, directions, limits, trials)
    rows = [{"subnet": subnet, **values} for subnet, values in measured(study).items()]
    table = pd.DataFrame(rows[:trials])
    label = sampler if isinstance(sampler, str) else type(sampler).__name__
    table = table.assign(trial=range(len(table)), sampler=label, seed=seed)
    if limits:  # says so if none can keep them
        first = next(iter(directions))
        best_within(table, first, directions, limits)
    return table


def open_study(
    space: SearchSpace, directions: Directions, storage: str | Path | None, name: str
) -> optuna.Study:
    """The study `name` in `storage`, made where there is none.

    Raises `SearchError` if a direction is unknown, the study is there with other objectives or of
    another space, or the storage cannot be used; what a URL keeps secret is in no message.
    """
    for objective, direction in directions.items():
        if direction not in list(BETTER):
            raise SearchError(f"{objective}: got {direction!r}, expected one of {list(BETTER)}")
    where = _hidden(str(storage), storage)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = _created(directions, storage, name)
        measured(study)
    except SearchError:
        raise
    except Exception as error:  # no study's; of a database also its driver's and its server's
        said = _hidden(f"{error!r:.300}", storage)
        cause = error if where == str(storage) else None  # a trace would show it
        raise SearchError(f"{where}: cannot open study {name!r}: {said}") from cause
    identity = {"objectives": dict(directions), "space": json.dumps(space.to_dict())}
    for key, value in identity.items():
        stored = study.user_attrs.get(key)
        if stored is None:
            study.set_user_attr(key, value)
        elif stored != value:
            raise SearchError(f"{where}: study {name!r} has the {key} {stored}, not {value}")
    return study


def _created(directions: Directions, storage, name: str, tries: int = 4) -> optuna.Study:
    try:
        return optuna.create_study(
            directions=list(directions.values()),
            storage=open_storage(storage),
            study_name=name,
            load_if_exists=True,
        )
    except Exception as error:
        # Processes that make the tables of a fresh database at once get in each other's way.
        if tries == 1 or "already exists" not in str(error):
            raise
        time.sleep(0.5)
        return _created(directions, storage, name, tries - 1)


_SECRETS = re.compile(r"(?<=://).*@|(?<=password=)[^&]*")


def _hidden(text: str, storage: str | Path | None) -> str:
    """`text` without the user and password of a storage's URL.

    >>> url = "postgresql://me:secret@server/studies"
    >>> _hidden(f"{url}: wrong password 'secret'", url)
    "postgresql://***server/studies: wrong password '***'"
    """
    for secret in _SECRETS.findall(str(storage)):
        _, _, password = secret.rstrip("@").partition(":")
        for word in (secret, password, unquote(password)):
            if word:
                text = text.replace(word, "***")
    return text


def params(space: SearchSpace, config: SubnetConfig) -> dict[str, int]:
    """What Optuna draws of a sub-network: choice indices by axis, where there is a choice."""
    indices = zip(space.axes(), space.encode(config).tolist(), strict=True)
    return {axis: index for (axis, choices), index in indices if len(choices) > 1}


def distributions(space: SearchSpace) -> dict[str, optuna.distributions.IntDistribution]:
    """What Optuna draws from: the index of a choice, for every axis that has one."""
    free = {axis: choices for axis, choices in space.axes() if len(choices) > 1}
    return {
        axis: optuna.distributions.IntDistribution(0, len(choices) - 1)
        for axis, choices in free.items()
    }


def measured(study: optuna.Study) -> dict[str, dict[str, float]]:
    """Measures of every sub-network that a finished trial evaluated, in the order of trials."""
    found: dict[str, dict[str, float]] = {}
    for trial in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
        attributes = trial.user_attrs
        measures = {key: float(value) for key, value in attributes["measures"].items()}
        found.setdefault(str(attributes["subnet"]), measures)
    return found


def _run(study: optuna.Study, space, objective, directions, limits, trials: int) -> None:
    """Trials of `study` until it has measured so many different sub-networks."""
    known: dict[str, Mapping[str, float]] = {}

    def propose(trial: optuna.Trial) -> SubnetConfig:
        indices = []
        for axis, choices in space.axes():
            last = len(choices) - 1
            index = trial.suggest_int(axis, 0, last) if last else 0
            indices.append(index)
        return space.decode(indices)

    def run(trial: optuna.Trial) -> tuple[float, ...]:
        config = propose(trial)
        subnet = str(config)
        if subnet not in known:
            values = objective(config)
            keys = values if isinstance(values, Mapping) else ()
            if missing := set(directions) - set(keys):
                wanted = f"the measures {sorted(missing)} too"
                raise SearchError(f"{subnet}: measured {shown(values)}, expected {wanted}")
            known[subnet] = {key: float(value) for key, value in values.items()}
        measures = known[subnet]
        trial.set_user_attr("subnet", subnet)
        trial.set_user_attr("measures", measures)
        for key, limit in limits.items():
            sign = BETTER[directions[key]]
            excess = sign * (limit - measures[key])
            trial.set_constraint(key, excess)
        return tuple(measures[key] for key in directions)

    for _ in range(PATIENCE * trials):
        known |= measured(study)  # other workers' too
        if len(known) >= trials:
            break
        study.optimize(run, n_trials=1)


def _share(job: dict, workers: int, seed: int) -> None:
    """Run `search` in so many processes on the study that exists already."""
    if job["storage"] is None:
        raise SearchError(f"{workers} workers need a storage that they share")
    context = multiprocessing.get_context("forkserver")  # forking a process with threads may hang
    context.set_forkserver_preload([__name__])
    crew = []
    for number in range(workers):
        own = {**job, "seed": seed + 10_000 * number}
        crew.append(context.Process(target=_join, kwargs=own))
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
    table: pd.DataFrame, objective: str, directions: Directions, limits: Mapping[str, float]
) -> pd.Series:
    """The row that is best in `objective` among those that keep all `limits`.

    Raises `InfeasibleError` naming the limit in the way, the best value reachable of that measure,
    and the point that misses the limits by the smallest share of the measures' ranges.
    """
    gain = {}  # the more the better
    for key in (objective, *limits):
        sign = BETTER[directions[key]]
        gain[key] = sign * table[key]
    shortfall = {}
    for key, limit in limits.items():
        sign = BETTER[directions[key]]
        shortfall[key] = sign * limit - gain[key]
    missed = pd.DataFrame(shortfall, index=table.index).clip(lower=0)
    kept = (missed == 0).all(axis=1)
    if kept.any():
        best = gain[objective][kept].idxmax()
        return table.loc[best]
    limit, rest, among = _in_the_way(missed)
    best = gain[limit][among].idxmax()
    reachable = float(table.loc[best, limit])
    limited = table[list(limits)]
    ranges = limited.max() - limited.min()
    worst_miss = (missed / ranges.replace(0, 1)).max(axis=1)
    nearest = table.loc[worst_miss.idxmin()]
    values = ", ".join(f"{key} {nearest[key]:.6g}" for key in limits)
    message = (
        f"no sub-network keeps {_words(limits, directions)}: the best {limit} reachable "
        f"{rest} is {reachable:.6g}; nearest is {nearest['subnet']} with {values}"
    )
    raise InfeasibleError(message, limit, reachable, nearest)


def _in_the_way(missed: pd.DataFrame) -> tuple[str, str, pd.Series]:
    """The first limit (a column of `missed`) without which the others can be kept.

    Also says so in words, and which rows (a mask) then count; where no single limit is in the way,
    the first one and all rows.
    """
    for limit in missed:
        others = missed.drop(columns=limit)
        kept = (others == 0).all(axis=1)
        if kept.any():
            return limit, "with the others kept", kept
    every_row = pd.Series(True, index=missed.index)
    return missed.columns[0], "alone", every_row


def _words(limits: Mapping[str, float], directions: Directions) -> str:
    sign = {"minimize": "<=", "maximize": ">="}
    parts = [f"{key} {sign[directions[key]]} {value:g}" for key, value in limits.items()]
    return " and ".join(parts)


def front(table: pd.DataFrame, directions: Directions) -> pd.DataFrame:
    """The non-dominated rows of a table of trials, each sub-network once."""
    minimise = [key for key, direction in directions.items() if direction == "minimize"]
    maximise = [key for key, direction in directions.items() if direction == "maximize"]
    distinct = table.drop_duplicates("subnet")
    return pareto_front(distinct, minimise, maximise)
