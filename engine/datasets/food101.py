"""Food-101 as published: JPEG files under a folder, listed by its meta files, through torchvision's reader.

Only paths and labels are kept in memory; an image is read when it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from engine.datasets.download import Archive, Store, damaged, missing_extra, unpacked
from engine.datasets.types import Dataset, DatasetInfo, Sample

INFO = DatasetInfo(
    name="food101",
    what="101,000 photographs of 101 dishes; downloaded (5.0 GB, as much again unpacked), needs the `datasets` extra",
    splits={"train": 75_750, "test": 25_250},
    classes=101,
    image_size=None,  # up to 512 on the long edge
    source="Food-101 (Bossard et al., 2014), photographs of foodspotting.com, scientific fair use",
)
FOLDER = "food-101"
# torchvision has the same two, though under private names.
ARCHIVE = Archive(
    "food-101.tar.gz",
    ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
    "85eeb15f3717b99a5da872d97d918f87",
)


def load(split: str, store: Store) -> Dataset:
    """Open "train" or "test", downloading and unpacking it first if need be; rows are in the order of its meta file.

    Raises ClipmillError without torchvision, and when the archive is neither there nor to be had.
    """
    try:
        from torchvision.datasets import Food101
    except ImportError as error:
        raise missing_extra(INFO.name, error) from error
    folder = unpacked(INFO.name, ARCHIVE, FOLDER, store)
    try:
        # Its public side would decode every image to tell a label.
        reader = Food101(store.folder, split=split, download=False)
        paths, labels = reader._image_files, reader._labels
    except (OSError, RuntimeError, ValueError) as error:
        raise damaged(INFO.name, folder, error) from error
    return Dataset(
        name=INFO.name,
        slug=INFO.name,
        split=split,
        class_names=tuple(reader.classes),
        rows=len(paths),
        image_size=INFO.image_size,
        identity={"archive_md5": ARCHIVE.md5},
        samples=partial(_samples, split, paths, labels),
        labels=lambda: np.array(labels, dtype=np.int64),
    )


def is_cached(folder: Path) -> bool:
    """Whether a data folder seems to hold it, unpacked or as its archive."""
    return (folder / FOLDER).is_dir() or (folder / ARCHIVE.path).is_file()


def _samples(split: str, paths: Sequence[Path], labels: Sequence[int], start: int, stop: int) -> Iterator[Sample]:
    for row in range(start, min(stop, len(paths))):
        path = paths[row]
        yield Sample(row, f"food101/{path.parent.name}/{path.stem}", split, labels[row], path)
