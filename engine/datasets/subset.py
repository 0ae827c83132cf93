"""Some rows of a dataset: chosen classes, a stratified sample, the first rows; in this order, each on what is left.

Rows keep their number, labels their meaning, and the class names stay whole, so that a subset's run can be laid beside
the whole dataset's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.datasets.types import Dataset, Sample
from engine.errors import ClipmillError

BRIDGED_GAP = 256  # rows not wanted that are read over; a source is asked anew only behind a larger gap


@dataclass(frozen=True)
class Subset:
    """What the command line asks for; None leaves the rows alone."""

    classes: str | None = None  # names, with commas between, or how many
    class_seed: int = 0  # chooses the classes where only their number is given
    sample: int | None = None
    seed: int = 0  # chooses the sample
    limit: int | None = None


def take(dataset: Dataset, subset: Subset) -> Dataset:
    """The subset as a dataset, which says how it was chosen.

    Raises ClipmillError for classes that the dataset does not have and for numbers that it cannot give.
    """
    for flag, number in (("--sample", subset.sample), ("--limit", subset.limit)):
        if number is not None and number <= 0:
            raise ClipmillError(f"{flag} {number}: the number of rows to take must be at least 1")
    rows = np.arange(dataset.rows)
    chosen: dict[str, Any] = {}
    classes: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    if subset.classes is not None:
        classes = _choose_classes(dataset, subset.classes, subset.class_seed)
        chosen["classes"] = list(classes)
        labels = dataset.labels()
        rows = rows[np.isin(labels, classes)]
        if unlabelled := int((labels < 0).sum()):
            notes = (f"passed over: {unlabelled} image(s) without a label, so in none of the --classes",)
    if subset.sample is not None:
        rows = _stratified(rows, dataset.labels()[rows], subset.sample, subset.seed)
        chosen |= {"sample": subset.sample, "seed": subset.seed}
    if subset.limit is not None:
        rows = rows[: subset.limit]
        chosen["limit"] = subset.limit
    if not chosen:
        return dataset
    if len(rows) == 0:
        raise ClipmillError(f"{dataset.name} has no image of the classes asked for; see --classes")
    return replace(
        dataset,
        rows=len(rows),
        samples=partial(_samples, dataset, rows),
        labels=lambda: dataset.labels()[rows],
        classes=classes,
        subset=chosen,
        notes=(*dataset.notes, *notes),
    )


def _choose_classes(dataset: Dataset, wanted: str, seed: int) -> tuple[int, ...]:
    """The labels of the classes, in their order."""
    names = dataset.class_names
    if not names:
        raise ClipmillError(f"{dataset.name} has no classes to choose from; leave out --classes")
    if wanted.strip().isdecimal() and wanted.strip() not in names:
        number = int(wanted)
        if not 0 < number <= len(names):
            raise ClipmillError(f"--classes {number}: {dataset.name} has {len(names)} classes")
        return draw_classes(len(names), number, seed)
    labels = set()
    for name in [wanted] if wanted in names else [part.strip() for part in wanted.split(",")]:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1) or names[:1]
            raise ClipmillError(
                f'--classes: {dataset.name} has no class "{name}"; it has {len(names)}, one is "{near[0]}"'
            )
        labels.add(names.index(name))
    return tuple(sorted(labels))


def draw_classes(count: int, number: int, seed: int) -> tuple[int, ...]:
    """The labels that `--classes NUMBER --class-seed SEED` chooses of `count` classes, in their order."""
    return tuple(sorted(np.random.default_rng(seed).choice(count, number, replace=False).tolist()))


def _stratified(rows: NDArray[np.int64], labels: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """`size` of the rows, in order, each label in its share (largest remainders get the rows that do not divide)."""
    if size > len(rows):
        raise ClipmillError(f"--sample {size}: there are {len(rows)} rows to choose from")
    found, counts = np.unique(labels, return_counts=True)
    share, remainder = np.divmod(counts * size, len(rows))
    largest = np.argsort(-remainder, kind="stable")
    share[largest[: size - share.sum()]] += 1
    random = np.random.default_rng(seed)
    kept = [random.choice(rows[labels == label], n, replace=False) for label, n in zip(found, share, strict=True)]
    return np.sort(np.concatenate(kept))


def _samples(dataset: Dataset, rows: NDArray[np.int64], start: int, stop: int) -> Iterator[Sample]:
    wanted = rows[start:stop]
    if len(wanted) == 0:
        return
    for span in np.split(wanted, np.flatnonzero(np.diff(wanted) > BRIDGED_GAP) + 1):
        first, last = int(span[0]), int(span[-1])
        keep = np.zeros(last - first + 1, dtype=bool)
        keep[span - first] = True
        for sample, kept in zip(dataset.samples(first, last + 1), keep, strict=True):
            if kept:
                yield sample
