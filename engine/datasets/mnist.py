"""MNIST as published: four gzip files of grey 28x28 digits, through torchvision's checksums and IDX reader.

The small archives (12 MB) are the only copy that is kept. Each opening compares their checksums and unpacks them to a
temporary file for the reader: nothing unchecked is ever read, and nothing unpacked can be half.
"""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.datasets.download import Archive, Store, fetch, missing_extra
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.errors import ClipmillError

INFO = DatasetInfo(
    name="mnist",
    what="70,000 handwritten digits, grey; downloaded (12 MB), needs the `datasets` extra",
    splits={"train": 60_000, "test": 10_000},
    classes=10,
    image_size=(28, 28),
    source="MNIST (LeCun, Cortes and Burges, 1998), CC BY-SA 3.0",
)
FOLDER = "MNIST/raw"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def load(split: str, store: Store) -> Dataset:
    """Open "train" or "test", downloading its two files first if need be; the grey levels fill all three channels.

    Raises ClipmillError without torchvision, and when a file is neither there nor to be had.
    """
    try:
        from torchvision.datasets import mnist
    except ImportError as error:
        raise missing_extra(INFO.name, error) from error
    checksums = dict(mnist.MNIST.resources)
    images, labels = (
        Archive(f"{FOLDER}/{file}", tuple(mirror + file for mirror in mnist.MNIST.mirrors), checksums[file])
        for file in FILES[split]
    )
    grey = _read(mnist.read_image_file, images, store)
    targets = _read(mnist.read_label_file, labels, store)
    return Dataset(
        name=INFO.name,
        slug=INFO.name,
        split=split,
        # As `digits` has them, so that one set of prompts serves both. A prompt about "3 - three", torchvision's name,
        # is like no caption, and one about a "3" says little.
        class_names=tuple(f"digit {digit}" for digit in range(10)),
        rows=len(grey),
        image_size=INFO.image_size,
        identity={"images_md5": images.md5, "labels_md5": labels.md5},
        samples=partial(_samples, grey, targets, split),
        labels=lambda: targets.astype(np.int64),
    )


def is_cached(folder: Path) -> bool:
    """Whether a data folder seems to hold all four files."""
    return all((folder / FOLDER / file).is_file() for files in FILES.values() for file in files)


def _read(read: Callable[[str], Any], archive: Archive, store: Store) -> NDArray[Any]:
    path = fetch(INFO.name, archive, store)
    try:
        with tempfile.NamedTemporaryFile() as unpacked, gzip.open(path) as packed:
            shutil.copyfileobj(packed, unpacked)
            unpacked.flush()
            array: NDArray[Any] = read(unpacked.name).numpy()
            return array
    except OSError as error:  # no room for the temporary file: the bytes themselves have passed
        raise ClipmillError(
            f"{INFO.name}: cannot unpack {path} to a temporary file ({error.strerror or error}): make room, or set "
            "TMPDIR to another folder"
        ) from error


def _samples(grey: NDArray[np.uint8], labels: NDArray[np.int64], split: str, start: int, stop: int) -> Iterator[Sample]:
    for row in range(start, min(stop, len(grey))):
        pixels = np.repeat(grey[row, ..., np.newaxis], 3, axis=-1)
        yield Sample(row, f"mnist/{split}/{row:05d}", split, int(labels[row]), pixels)
