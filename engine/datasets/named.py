"""The named datasets: what there is, and how a split of one, or all of it, is opened.

Each is a module with `INFO` and `load(split, store)`, or `load(split)` where the data come with the project. To add
one: write the module, add it to the table below.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from engine.datasets import cifar, cifar10_sample, digits, food101, mnist, tiny_imagenet
from engine.datasets.download import Store
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.errors import ClipmillError


@dataclass(frozen=True)
class Named:
    """One of them; `load` and `is_cached` take a split and the store, and the data folder."""

    info: DatasetInfo
    load: Callable[[str, Store], Dataset]
    is_cached: Callable[[Path], bool]  # whether it seems to be there; told by the names of files alone
    folder: str | None  # its place in the data folder; None where the data come with the project


def _embedded(info: DatasetInfo, load: Callable[[str], Dataset]) -> Named:
    return Named(info, lambda split, _: load(split), lambda _: True, None)


NAMED = {
    named.info.name: named
    for named in (
        _embedded(cifar10_sample.INFO, cifar10_sample.load),
        _embedded(digits.INFO, digits.load),
        *(
            Named(info, partial(cifar.load, name), partial(cifar.is_cached, name), cifar.FOLDERS[name])
            for name, info in cifar.INFOS.items()
        ),
        Named(mnist.INFO, mnist.load, mnist.is_cached, mnist.FOLDER),
        Named(food101.INFO, food101.load, food101.is_cached, food101.FOLDER),
        Named(tiny_imagenet.INFO, tiny_imagenet.load, tiny_imagenet.is_cached, tiny_imagenet.FOLDER),
    )
}


def open_named(name: str, split: str | None, store: Store) -> Dataset:
    """Open a split of one of NAMED, by default "test" where there is one; "all" joins them, train first.

    Raises ClipmillError for a split that it has not, and what its `load` raises.
    """
    named = NAMED[name]
    splits = named.info.splits
    if split is None:
        split = "test" if "test" in splits else next(iter(splits))
    if split == "all":
        return _join(tuple(named.load(part, store) for part in splits))
    if split not in splits:
        raise ClipmillError(f'{name} has no split "{split}"; --split takes {", ".join([*splits, "all"])}')
    return named.load(split, store)


def get_named(name: str, store: Store) -> Path:
    """Download what is missing of one of NAMED, check all of it, and return the folder that it lies in.

    Raises ClipmillError when it needs no download, and when the data cannot be had or are damaged.
    """
    folder = NAMED[name].folder
    if folder is None:
        raise ClipmillError(f"{name} comes with the project, so there is nothing to get: give it to --dataset")
    dataset = open_named(name, "all", store)
    images = (sample.image for sample in dataset.samples(0, dataset.rows))
    missing = [image for image in images if isinstance(image, Path) and not image.is_file()]
    if missing:
        raise ClipmillError(
            f"{name}: {len(missing)} of its {dataset.rows} images are missing, {missing[0]} is the first: remove "
            f"{store.folder / folder}, and it is unpacked again"
        )
    return store.folder / folder


def _join(parts: tuple[Dataset, ...]) -> Dataset:
    assert all(part.class_names == parts[0].class_names for part in parts)
    assert all(part.image_size == parts[0].image_size for part in parts)
    assert all(part.label_columns == parts[0].label_columns for part in parts)
    return replace(
        parts[0],
        split="all",
        rows=sum(part.rows for part in parts),
        identity={part.split: part.identity for part in parts},
        samples=partial(_chain, parts),
        labels=lambda: np.concatenate([part.labels() for part in parts]),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _chain(parts: tuple[Dataset, ...], start: int, stop: int) -> Iterator[Sample]:
    offset = 0
    for part in parts:
        for sample in part.samples(max(start - offset, 0), max(stop - offset, 0)):
            yield replace(sample, row=sample.row + offset)
        offset += part.rows
