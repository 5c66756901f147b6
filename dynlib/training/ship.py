"""From trained weights to a checkpoint worth shipping: chosen points, statistics, accuracies.

`python -m dynlib.training.ship --out data/checkpoints/cifar10.safetensors` trains (resuming from
its state file) and ships; the suite's full profile calls the same functions.
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from dynlib.data import load_dataset
from dynlib.errors import DynlibError
from dynlib.files import atomic_write, repo_root, sha256
from dynlib.images import Dataset
from dynlib.nets.supernet import Supernet, macs_m, params_m
from dynlib.space import SearchSpace, SubnetConfig
from dynlib.training.recipes import Recipe
from dynlib.training.step import bf16_pays
from dynlib.training.trainer import evaluate, train

# The space of the shipped CIFAR-10 network: 112 to 11 MMACs. More work an image hardly helps on the
# JPEG copy (quality 75, halved chroma): 180 and 311 MMACs, and 240 with residuals before the first
# pooling, ended within half a point of it. The images may be the limit: compressed once more, on a
# shifted grid, and trained on for five epochs, they cost the largest sub-network 1.4 points.
CIFAR_SPACE = SearchSpace(
    resolution=(28, 30, 32),
    depth=((1,), (1, 2), (1, 2)),
    width=((24, 32, 40, 48, 64), (64, 80, 96, 128, 160, 192), (96, 128, 160, 192, 224, 256)),
)
# A smaller one for the generated set and for short training runs: 20 to 2 MMACs.
SMALL_SPACE = SearchSpace(
    resolution=(28, 30, 32),
    depth=((1,), (1, 2), (1, 2)),
    width=((8, 16, 24, 32), (24, 32, 48, 64), (32, 48, 64, 96)),
)


def checkpoint_path(dataset: str) -> Path:
    """Where the shipped checkpoint for a data set lies."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.safetensors"


def shipped(dataset: Dataset) -> tuple[Supernet, dict]:
    """The shipped super-network for `dataset`, and its provenance.

    Raises `DynlibError` when none is shipped for it.
    """
    path = checkpoint_path(dataset.name)
    if not path.is_file():
        ready = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        raise DynlibError(
            f"no checkpoint {path.name} in data/checkpoints, which holds {ready}; train one with "
            f"python -m dynlib.training.ship --dataset {dataset.name} --out {path}"
        )
    return Supernet.from_checkpoint(path)


def choose_points(
    supernet: Supernet, dataset: Dataset, *, count: int = 8, candidates: int = 120, seed: int = 0,
) -> list[SubnetConfig]:  # fmt: skip
    """Pick sub-networks spread evenly in log MACs, each the best on validation images near it.

    Both ends of the space are always among them. Between them, MACs are cut into ``count - 2``
    equal ratios, and each takes the most accurate of its random candidates, if it has any.
    """
    rng = np.random.default_rng([seed, 5])
    ends = [supernet.space.smallest, supernet.space.largest]
    drawn = dict.fromkeys(supernet.space.sample(rng) for _ in range(candidates))
    held = dataset.val.take(slice(0, 2000))
    low, high = (np.log(macs_m(supernet, config)) for config in ends)
    best: dict[int, tuple[float, SubnetConfig]] = {}
    for config in tqdm([c for c in drawn if c not in ends], desc="choose points", disable=None):
        accuracy = evaluate(supernet, config, dataset, held, bf16=bf16_pays())
        del supernet.statistics[config]
        share = (np.log(macs_m(supernet, config)) - low) / (high - low)
        part = int(share * (count - 2))
        if part not in best or accuracy > best[part][0]:
            best[part] = accuracy, config
    return [ends[0], *(config for _, (_, config) in sorted(best.items())), ends[1]]


def accuracy_table(
    supernet: Supernet, configs: list[SubnetConfig], dataset: Dataset, *, bf16: bool = False
) -> pd.DataFrame:
    """MACs, parameters, validation and test accuracy of each configuration, on all images."""
    rows = [
        {
            "subnet": str(config), "macs_m": macs_m(supernet, config),
            "params_m": params_m(supernet, config),
            "accuracy_val_pct": evaluate(supernet, config, dataset, dataset.val, bf16=bf16),
            "accuracy_test_pct": evaluate(supernet, config, dataset, dataset.test, bf16=bf16),
            "source": "measured",
        }
        for config in tqdm(configs, desc="evaluate", disable=None)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def ship(
    supernet: Supernet, dataset: Dataset, path: str | Path, *, half: bool = True,
    candidates: int = 120, **provenance,
) -> pd.DataFrame:  # fmt: skip
    """Choose the operating points, store their statistics, and write checkpoint and accuracies.

    Writes `path` and beside it ``<name>.accuracy.csv``, which is also returned.
    """
    path = Path(path)
    if half:  # statistics and accuracies must belong to the weights as they are stored
        with torch.no_grad():
            for parameter in supernet.net.parameters():
                parameter.copy_(parameter.half())
    configs = choose_points(supernet, dataset, candidates=candidates)
    table = accuracy_table(supernet, configs, dataset)
    supernet.save(
        path, half=half, dataset=dataset.name, mean=dataset.mean.tolist(),
        std=dataset.std.tolist(), class_names=list(dataset.classes), **provenance,
    )  # fmt: skip
    atomic_write(path.with_suffix(".accuracy.csv"), table.to_csv(index=False, float_format="%.4f"))
    return table


def guide_of(paths: Sequence[str | Path]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A teacher for `train`: images (N, 3, H, W) -> the logarithm of the mean probabilities (N,
    classes) of the largest sub-network in each checkpoint; every second one sees mirrored images,
    which is worth about as much as another network."""
    nets = []
    for path in paths:
        supernet, _ = Supernet.from_checkpoint(path)
        nets.append(supernet.prepare(supernet.canonical(supernet.space.largest)).eval())

    @torch.no_grad()
    def guide(images: torch.Tensor) -> torch.Tensor:
        views = images, images.flip(-1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16_pays()):
            answers = [net(views[i % 2]).float().softmax(1) for i, net in enumerate(nets)]
        return (sum(answers) / len(answers)).log()

    return guide


def main(argv: list[str] | None = None) -> None:
    """Train a super-network and ship its checkpoint."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--epochs", type=int, default=36)
    fields = ("lr", "pad", "cutout", "cutmix", "students", "distill", "label_smoothing")
    for name in fields:  # see Recipe
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="the small space")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--state", type=Path, help="training state, resumed if it exists")
    parser.add_argument("--start", type=Path, help="checkpoint to start from, grown if need be")
    parser.add_argument("--guide", type=Path, nargs="+", help="checkpoints that teach together")
    parser.add_argument("--finish-in", type=int, help="cut the rest short to so many epochs")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dataset = load_dataset(args.dataset, args.data_dir, seed=args.seed)
    recipe = Recipe(epochs=args.epochs, **{name: getattr(args, name) for name in fields})
    torch.manual_seed(args.seed)
    earlier, space = None, SMALL_SPACE if args.small else CIFAR_SPACE
    if args.start:
        supernet, earlier = Supernet.from_checkpoint(args.start)
        earlier = {
            key: earlier.get(key) for key in ("recipe", "epochs_run", "finish_in", "start", "guide")
        }
        supernet = supernet.grown(space)
    else:
        supernet = Supernet(space, len(dataset.classes))
    guides = [sha256(path)[:16] for path in args.guide or ()]
    state = args.state or repo_root() / "runs" / "training" / f"{args.out.stem}.pt"
    history = train(
        supernet, dataset, recipe, seed=args.seed, state_file=state, finish_in=args.finish_in,
        guide=guide_of(args.guide) if args.guide else None,
        about={"start": args.start and sha256(args.start), "guide": guides},
    )  # fmt: skip
    seconds = float(history["seconds"].sum())
    table = ship(
        supernet, dataset, args.out, recipe=asdict(recipe), seed=args.seed,
        train_images=len(dataset.train), seconds=seconds, torch=torch.__version__,
        threads=torch.get_num_threads(), epochs_run=len(history), finish_in=args.finish_in,
        start=earlier, guide=guides,
    )  # fmt: skip
    atomic_write(
        args.out.with_suffix(".history.csv"), history.to_csv(index=False, float_format="%.5g")
    )
    logging.getLogger(__name__).info("%s", table.to_string())


if __name__ == "__main__":
    main()
