"""What every source of images looks like from outside: a fixed number of rows, in a fixed order, with stable keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """One row of a dataset; what `image` holds, engine.decode.decode turns into pixels."""

    row: int  # position in the opened split, from 0
    key: str  # stable, unique in the source, valid UTF-8
    split: str
    label: int | None  # index into class_names; None when unknown
    image: bytes | Path | NDArray[np.uint8]  # an encoded file's bytes, a file still to read, or pixels (H, W, 3)


@dataclass(frozen=True)
class Dataset:
    """An opened split. `samples(start, stop)` streams the rows start <= row < stop in order, as a slice would."""

    name: str  # as the user gave it: "cifar10-sample", "folder:birds"
    slug: str  # safe in a file name: "cifar10-sample", "folder-birds"
    split: str  # "train", "test" or "all"
    class_names: tuple[str, ...]  # empty when the source has no classes
    rows: int
    image_size: tuple[int, int] | None  # (H, W) when every image has it, else None
    identity: Mapping[str, Any]  # JSON-able: what a run's fingerprint says of the data
    samples: Callable[[int, int], Iterator[Sample]]
    notes: tuple[str, ...] = ()  # one line each: what the source holds but the rows do not


@dataclass(frozen=True)
class DatasetInfo:
    """A line of the table of datasets, known without opening anything; None where only opening would tell."""

    name: str
    what: str
    splits: Mapping[str, int | None]  # rows of each split, in the order in which "all" joins them
    classes: int | None
    image_size: tuple[int, int] | None  # (H, W)
    source: str  # where it comes from, and its licence
