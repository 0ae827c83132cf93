"""What every source of images looks like from outside: a fixed number of rows, in a fixed order, with stable keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.decode import BadImage


@dataclass(frozen=True)
class Sample:
    """One row of a dataset; what `image` holds, engine.decode.decode turns into pixels."""

    row: int  # position in the split as the source has it, from 0; a subset leaves gaps
    key: str  # stable, unique in the source, valid UTF-8
    split: str
    label: int | None  # index into class_names; None when unknown
    # an encoded file's bytes, a file still to read, pixels (H, W, 3), or what the source itself found wrong
    image: bytes | Path | NDArray[np.uint8] | BadImage
    more_labels: Mapping[str, int | None] = field(default_factory=dict)  # one for each of Dataset.label_columns


@dataclass(frozen=True)
class Dataset:
    """An opened split, or a subset of one.

    `samples(start, stop)` streams the samples start, ..., stop - 1 in order, as a slice would; `labels()` gives the
    label of every one, (rows,) int64 with -1 for unknown, without decoding an image.
    """

    name: str  # as the user gave it: "cifar10-sample", "folder:birds"
    slug: str  # safe in a file name: "cifar10-sample", "folder-birds"
    split: str  # "train", "test" or "all"
    class_names: tuple[str, ...]  # empty when the source has no classes
    rows: int
    image_size: tuple[int, int] | None  # (H, W) when every image has it, else None
    identity: Mapping[str, Any]  # JSON-able: what a run's fingerprint says of the data
    samples: Callable[[int, int], Iterator[Sample]]
    labels: Callable[[], NDArray[np.int64]]
    label_columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # further labels and their class names
    classes: tuple[int, ...] | None = None  # the labels that a subset was cut down to
    subset: Mapping[str, Any] = field(default_factory=dict)  # how it was chosen, by flag; JSON-able
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
