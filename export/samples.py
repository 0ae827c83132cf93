"""Real images for calibration and certificate, which come with the project: colour photographs and grey digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.datasets import open_dataset
from engine.decode import decode


def sample_images(split: str, *, photos: int, digits: int) -> tuple[list[NDArray[np.uint8]], tuple[str, ...]]:
    """The first images of a split, "train" or "test", (H, W, 3) uint8, 32x32 then 8x8; and all their class names."""
    datasets = [open_dataset("cifar10-sample", split, photos), open_dataset("digits", split, digits)]
    images = [decode(sample.image, None) for dataset in datasets for sample in dataset.samples(0, dataset.rows)]
    return images, tuple(name for dataset in datasets for name in dataset.class_names)
