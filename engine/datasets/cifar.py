"""CIFAR-10 and CIFAR-100 as published, through torchvision's downloader, checksums and reader.

The archives hold pickles; torchvision opens them only after their checksums have matched.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.errors import ClipmillError

DOWNLOADS = Path(__file__).resolve().parents[2] / "datasets_cache"
INFOS = {
    name: DatasetInfo(
        name=name,
        what=f"60,000 photographs in {classes} classes; downloaded ({size}), needs the `datasets` extra",
        splits={"train": 50_000, "test": 10_000},
        classes=classes,
        image_size=(32, 32),
        source=f"{title} (Krizhevsky, 2009), no licence stated",
    )
    for name, title, classes, size in (
        ("cifar10", "CIFAR-10", 10, "170 MB"),
        ("cifar100", "CIFAR-100", 100, "169 MB"),
    )
}


def load(name: str, split: str) -> Dataset:
    """Open "train" or "test" of cifar10 or cifar100, downloading it first if need be.

    Raises ClipmillError without torchvision, and when the archive is neither there nor to be had.
    """
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError as error:
        raise ClipmillError(f"{name} is read by torchvision ({error}): pip install -e '.[datasets]'") from error
    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        archive = reader(DOWNLOADS, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:  # no network, no space, a checksum that does not match
        raise ClipmillError(
            f"{name} could not be downloaded or read ({error}): put {reader.filename} from {reader.url} into "
            f"{DOWNLOADS} by hand, or take another --dataset"
        ) from error
    return Dataset(
        name=name,
        slug=name,
        split=split,
        class_names=tuple(archive.classes),
        rows=len(archive.data),
        image_size=INFOS[name].image_size,
        identity={"archive_md5": reader.tgz_md5},
        samples=partial(_samples, name, split, archive.data, archive.targets),
    )


def _samples(
    name: str, split: str, pixels: NDArray[np.uint8], labels: list[int], start: int, stop: int
) -> Iterator[Sample]:
    for row in range(start, min(stop, len(pixels))):
        yield Sample(row=row, key=f"{name}/{split}/{row:05d}", split=split, label=labels[row], image=pixels[row])
