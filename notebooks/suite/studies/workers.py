"""How much faster many workers on one study are: what the shared storage and its lock cost."""

import time
from dataclasses import dataclass
from pathlib import Path

import optuna

from dynlib.searching.study import open_storage, search
from dynlib.space import SearchSpace, SubnetConfig

_GOALS = {"size": "maximize", "resolution": "minimize"}


@dataclass(frozen=True)
class Pause:
    """An objective that only takes time, as one does that waits for a board."""

    seconds: float

    def __call__(self, config: SubnetConfig) -> dict[str, float]:
        """Sleep, then measure something that costs nothing."""
        time.sleep(self.seconds)
        return {"size": sum(config.depth) + sum(config.width), "resolution": config.resolution}


def trials_per_s(
    space: SearchSpace,
    storage: str | Path,
    *,
    workers: int,
    trials: int,
    pause_s: float,
    seed: int = 0,
) -> float:
    """Rate of a random search from the start of its first trial to the end of its last.

    `storage` must hold no study of that many workers yet. Raises as `study.search` does.
    """
    name = f"pause-{workers}"
    table = search(
        space,
        Pause(pause_s),
        _GOALS,
        trials=trials,
        seed=seed,
        sampler="random",
        storage=storage,
        name=name,
        workers=workers,
    )
    study = optuna.load_study(study_name=name, storage=open_storage(storage))
    done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    first = min(trial.datetime_start for trial in done)
    last = max(trial.datetime_complete for trial in done)
    return len(table) / (last - first).total_seconds()
