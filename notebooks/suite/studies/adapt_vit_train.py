"""The small transformer that the study of adaptive networks ships, and how it was trained."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from dynlib.files import repo_root
from dynlib.images import Dataset
from dynlib.nets.supernet import Supernet
from dynlib.training import Recipe, train
from suite.studies.adapt_vit import SPACE

# The largest learns from labels, and the smallest and a random one in turn from the largest.
RECIPE = Recipe(
    students=1, epochs=10, batch_size=250, solver="muon+adamw", lr=4e-3, decay=4e-4, warmup=0.05
)  # fmt: skip


def vit_path(dataset: str) -> Path:
    """Where the transformer lies, if one is shipped for the data set."""
    return repo_root() / "data" / "checkpoints" / f"{dataset}.vit.safetensors"


def train_vit(
    images: Dataset, recipe: Recipe = RECIPE, *, seed: int = 0, **options
) -> tuple[Supernet, pd.DataFrame]:
    """A transformer from scratch, and a row of each epoch; `options` are those of `train`."""
    torch.manual_seed(seed)
    supernet = Supernet(SPACE, len(images.classes), family="ConvViT")
    history = train(supernet, images, recipe, seed=seed, **options)
    return supernet, history


def load_vit(path: Path) -> Supernet:
    """The transformer that `ship_vit` wrote; raises `CheckpointError` where the file is none.

    It can be read once its family is registered, as by the import of this module.
    """
    supernet, _ = Supernet.from_checkpoint(path)
    return supernet


def ship_vit(
    supernet: Supernet, history: pd.DataFrame, images: Dataset, path: Path, *, seed: int
) -> None:
    """Write the transformer, and its history as a table beside it."""
    minutes = history["seconds"].sum() / 60
    trained = (
        f"{len(history)} epochs (schedule of {RECIPE.epochs}) on labels, smaller sub-networks on "
        f"the largest, {minutes:.0f} min, seed {seed}"
    )
    supernet.save(path, half=True, dataset=images.name, trained=trained, recipe=asdict(RECIPE))
    history.to_csv(path.with_suffix(".history.csv"), index=False, float_format="%.5g")
