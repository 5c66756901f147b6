"""Images and their labels, split for training, validation and test."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from dynlib.errors import DataError


@dataclass(frozen=True)
class Images:
    """Images (N, 3, H, W) uint8, labels (N,) int64, and where it is known their difficulty (N,)."""

    images: torch.Tensor
    labels: torch.Tensor
    difficulty: torch.Tensor | None = None

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, difficulty=None) -> "Images":
        """From arrays, whose memory they share."""
        hard = None if difficulty is None else torch.from_numpy(difficulty)
        pixels = torch.from_numpy(images)
        return cls(pixels, torch.from_numpy(labels), hard)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index) -> "Images":
        """The images at `index` (a slice or an index tensor)."""
        hard = None if self.difficulty is None else self.difficulty[index]
        return Images(self.images[index], self.labels[index], hard)


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test images; `mean`, `std` (3,) of the training pixels, 0 to 1."""

    name: str
    classes: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    mean: torch.Tensor
    std: torch.Tensor

    def __repr__(self):
        return (
            f"{self.name}: {len(self.train)} training, {len(self.val)} validation and "
            f"{len(self.test)} test images, {len(self.classes)} classes, "
            f"{self.train.images.shape[-1]} px"
        )

    def like(self, model: nn.Module) -> "Dataset":
        """With the mean and the standard deviation of the images that a timm model was trained on.

        Its weights expect them: with those of other images they lose accuracy.
        Raises `DataError` for a model that does not say (`pretrained_cfg`), or for none.
        """
        if not isinstance(model, nn.Module):
            raise DataError(f"like: {model!r:.60}; expected a model, not its name")
        about = getattr(model, "pretrained_cfg", None) or {}
        try:
            return replace(self, mean=torch.tensor(about["mean"]), std=torch.tensor(about["std"]))
        except KeyError as missing:
            name = type(model).__name__
            raise DataError(f"{name}: its pretrained_cfg has no {missing}") from missing

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8 -> float32, zero mean and unit variance per channel, channels_last."""

        def per_channel(values):
            return values.to(images.device).view(1, 3, 1, 1)

        # (pixel / 255 - mean) / std, with one product and one difference a pixel.
        scale = per_channel(1 / (255 * self.std))
        shift = per_channel(self.mean / self.std)
        normal = images * scale - shift
        return normal.contiguous(memory_format=torch.channels_last)
