"""scikit-learn's handwritten digits: 1,797 grey 8x8 images that need no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from engine.datasets.types import Dataset, DatasetInfo, Sample

INFO = DatasetInfo(
    name="digits",
    what="handwritten digits, grey; embedded in scikit-learn",
    splits={"train": 1297, "test": 500},
    classes=10,
    image_size=(8, 8),
    source="Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998), UCI, CC BY 4.0",
)
# The embedded model was trained on the first of these; moving the border would test it on what it has seen.
ROWS = {"train": (0, 1297), "test": (1297, 1797)}


def load(split: str) -> Dataset:
    """Open "train" or "test"; images are grey levels 0-16 stretched to 0-255 and repeated to (8, 8, 3) uint8."""
    from sklearn.datasets import load_digits

    first, last = ROWS[split]
    bunch = load_digits()
    grey = np.rint(bunch.images[first:last] * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., np.newaxis], 3, axis=-1)
    labels = bunch.target[first:last].astype(np.int32)
    return Dataset(
        name=INFO.name,
        slug=INFO.name,
        split=split,
        # "a photo of a digit 3" is a caption that the embedded model learned; "a photo of a 3" says little to any CLIP.
        class_names=tuple(f"digit {digit}" for digit in range(10)),
        rows=last - first,
        image_size=INFO.image_size,
        identity={"sha256": hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()},
        samples=partial(_samples, pixels, labels, split),
        labels=lambda: labels.astype(np.int64),
    )


def _samples(
    pixels: NDArray[np.uint8], labels: NDArray[np.int32], split: str, start: int, stop: int
) -> Iterator[Sample]:
    first, _ = ROWS[split]
    for row in range(start, min(stop, len(pixels))):
        yield Sample(row=row, key=f"digits/{first + row:04d}", split=split, label=int(labels[row]), image=pixels[row])
