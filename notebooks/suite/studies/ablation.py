"""What a recipe is worth: recipes side by side, and sub-networks against their twins alone."""

import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from dynlib.images import Dataset, Images
from dynlib.nets.supernet import Supernet
from dynlib.space import DIMENSIONS, SearchSpace, SubnetConfig
from dynlib.training.recipes import Recipe
from dynlib.training.step import bf16_pays
from dynlib.training.trainer import evaluate, train
from suite.studies.parallel import in_parallel

MakeSupernet = Callable[[SearchSpace], Supernet]


def single(config: SubnetConfig) -> SearchSpace:
    """The space that holds `config` alone."""
    places = {name: tuple((value,) for value in getattr(config, name)) for name in DIMENSIONS}
    return SearchSpace((config.resolution,), **places)


def compare_recipes(
    recipes: Mapping[str, Recipe],
    configs: Sequence[SubnetConfig],
    space: SearchSpace,
    dataset: Dataset,
    *,
    seeds: Sequence[int] = (0,),
    state: Path | None = None,
    processes: int | None = None,
) -> pd.DataFrame:
    """Train a super-network by each recipe from the same starts and evaluate the same sub-networks.

    Args:
        recipes: by the name that the table shows.
        configs: sub-networks to evaluate on all validation images.
        seeds: of the weights to start from and of the order of the images.
        state: a folder for the states of the trainings, so that a killed comparison goes on.
        processes: trainings at a time; small networks train faster so than with a thread a core.

    Returns:
        One row per seed, recipe and sub-network: ``recipe, subnet, seed, accuracy_val_pct,
        seconds``.
    """
    shared = pickle.dumps(dataset)  # plain bytes: a container may have little shared memory
    jobs = [
        (name, recipe, configs, space, shared, seed, state)
        for seed in seeds
        for name, recipe in recipes.items()
    ]
    return in_parallel(_by_recipe, jobs, processes, desc="recipes")


def _by_recipe(name, recipe, configs, space, shared, seed, state) -> list[dict]:
    if multiprocessing.parent_process():  # one of as many as there are cores
        torch.set_num_threads(1)
    dataset = pickle.loads(shared)
    file = None if state is None else state / f"{name}-{seed}.pt"
    torch.manual_seed(seed)
    supernet = Supernet(space, len(dataset.classes))
    history = train(supernet, dataset, recipe, seed=seed, watch=0, state_file=file)
    return [
        {
            "recipe": name,
            "subnet": str(config),
            "seed": seed,
            "accuracy_val_pct": _accuracy(supernet, config, dataset, dataset.val),
            "seconds": float(history["seconds"].sum()),
        }
        for config in configs
    ]


def compare_alone(
    recipes: Mapping[str, Recipe],
    rates: Sequence[float],
    configs: Sequence[SubnetConfig],
    build: MakeSupernet,
    space: SearchSpace,
    dataset: Dataset,
    *,
    seeds: Sequence[int] = (0,),
) -> pd.DataFrame:
    """Each sub-network inside the super-network, trained alone, and trained alone by a teacher.

    All see the same images for the same epochs with the same augmentation, those of the first
    recipe. With the first seed each network alone, and the super-network of the first recipe as a
    whole, looks for the learning rate that is best on validation images: it begins with `rates` and
    goes on by halves and doubles until the best one lies between two that are worse. Other recipes
    and other seeds take that rate. The teacher of the third kind is the largest network trained
    alone. Seeds after the first repeat the networks alone and the first recipe.

    Returns:
        One row per recipe, sub-network and seed: ``recipe, subnet, seed, accuracy_val_pct``
        (validation, in the super-network), and on the test images ``supernet_pct, alone_pct,
        distilled_alone_pct`` (first seed); ``supernet_lr, alone_lr``.
    """
    recipe = next(iter(recipes.values()))
    best: dict[object, float] = {}  # what the first seed found, by network

    def fit(name, recipe, space, configs, seed) -> Supernet:
        if name in best:
            recipe = replace(recipe, lr=best[name])
            return _trained(build, space, dataset, recipe, seed)[0]
        net, best[name] = best_rate(recipe, rates, space, configs, build, dataset, seed)
        return net

    rows = []
    for seed in tqdm(seeds, desc="seeds", disable=None):
        first = seed == seeds[0]
        alone, apart = {}, {}
        for config in tqdm(dict.fromkeys([*configs, space.largest]), desc="alone", disable=None):
            alone[config] = fit(config, recipe, single(config), [config], seed)
            accuracy = _accuracy(alone[config], config, dataset, dataset.test)
            apart[config] = {"alone_pct": accuracy, "alone_lr": best[config]}
        guide = alone[space.largest].prepare(space.largest)
        for config in tqdm(configs if first else (), desc="taught", disable=None):
            taught = replace(recipe, lr=best[config])
            pupil, _ = _trained(build, single(config), dataset, taught, seed, guide)
            accuracy = _accuracy(pupil, config, dataset, dataset.test)
            apart[config]["distilled_alone_pct"] = accuracy
        tried = recipes if first else dict(list(recipes.items())[:1])
        for name, way in tqdm(tried.items(), desc="together", disable=None):
            supernet = fit("together", way, space, configs, seed)
            for config in configs:
                row = {
                    "recipe": name,
                    "subnet": str(config),
                    "seed": seed,
                    "accuracy_val_pct": _accuracy(supernet, config, dataset, dataset.val),
                    "supernet_pct": _accuracy(supernet, config, dataset, dataset.test),
                    **apart[config],
                    "supernet_lr": best["together"],
                }
                rows.append(row)
    return pd.DataFrame(rows)


def best_rate(recipe, rates, space, configs, build, dataset, seed) -> tuple[Supernet, float]:
    """The (super-)network whose `configs` do best on validation images on average, and its rate."""
    tried: dict[float, tuple[float, Supernet]] = {}
    ahead = list(rates)
    while ahead:
        for lr in ahead:
            net, _ = _trained(build, space, dataset, replace(recipe, lr=lr), seed)
            accuracies = [_accuracy(net, config, dataset, dataset.val) for config in configs]
            tried[lr] = sum(accuracies), net
        best = max(tried, key=lambda lr: tried[lr][0])
        # Inside the grid, not on its edge: its neighbours are tried too.
        ahead = [lr for lr in (best / 2, best * 2) if lr not in tried]
    return tried[best][1], best


def _trained(build, space, dataset, recipe, seed, guide=None):
    torch.manual_seed(seed)
    supernet = build(space)
    if guide is not None:
        guide = torch.no_grad()(guide)
    return supernet, train(supernet, dataset, recipe, seed=seed, watch=0, guide=guide)


def _accuracy(supernet: Supernet, config: SubnetConfig, dataset: Dataset, images: Images) -> float:
    return evaluate(supernet, config, dataset, images, bf16=bf16_pays())
