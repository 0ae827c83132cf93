"""Tiny ImageNet: 200 classes of ImageNet at 64x64, some of them grey, from the archive of its course.

Labels count the sorted WordNet ids. The labelled validation images are the split "test": the archive's own test images
have no published labels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.datasets.download import Archive, Store, damaged, unpacked
from engine.datasets.types import Dataset, DatasetInfo, Sample

INFO = DatasetInfo(
    name="tiny-imagenet",
    what="110,000 photographs in 200 classes; downloaded (248 MB), needs the `datasets` extra",
    splits={"train": 100_000, "test": 10_000},
    classes=200,
    image_size=(64, 64),
    source="Tiny ImageNet (Stanford CS231n, 2015), from ImageNet: non-commercial research and education",
)
FOLDER = "tiny-imagenet-200"
ARCHIVE = Archive(
    "tiny-imagenet-200.zip",
    ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    "90528d7ca1a48142e341f4ef8d21d0de",
)


def load(split: str, store: Store) -> Dataset:
    """Open "train" (by class, then by number) or "test" (in the order of its annotations), downloading it if need be.

    Raises ClipmillError when the archive is neither there nor to be had, or its unpacked folder is damaged.
    """
    folder = unpacked(INFO.name, ARCHIVE, FOLDER, store)
    try:
        wnids = sorted((folder / "wnids.txt").read_text(encoding="utf-8").split())
        numbers = {wnid: label for label, wnid in enumerate(wnids)}
        class_names = _class_names(wnids, _synonyms(folder / "words.txt"))
        images, labels = (_train if split == "train" else _val)(folder, numbers)
    except (OSError, ValueError, KeyError) as error:
        raise damaged(INFO.name, folder, error) from error
    return Dataset(
        name=INFO.name,
        slug=INFO.name,
        split=split,
        class_names=class_names,
        rows=len(images),
        image_size=INFO.image_size,
        identity={"archive_md5": ARCHIVE.md5},
        samples=partial(_samples, split, folder, images, labels),
        labels=lambda: labels,
    )


def is_cached(folder: Path) -> bool:
    """Whether a data folder seems to hold it, unpacked or as its archive."""
    return (folder / FOLDER).is_dir() or (folder / ARCHIVE.path).is_file()


def _train(folder: Path, numbers: Mapping[str, int]) -> tuple[list[str], NDArray[np.int64]]:
    images: list[str] = []
    labels: list[int] = []
    for wnid, label in numbers.items():
        files = [name for name in os.listdir(folder / "train" / wnid / "images") if name.endswith(".JPEG")]
        files.sort(key=lambda name: (len(name), name))  # n01443537_9 before n01443537_10
        images += [f"train/{wnid}/images/{name}" for name in files]
        labels += [label] * len(files)
    return images, np.array(labels, dtype=np.int64)


def _val(folder: Path, numbers: Mapping[str, int]) -> tuple[list[str], NDArray[np.int64]]:
    lines = (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t")[:2] for line in lines if line]
    images = [f"val/images/{name}" for name, _ in rows]
    return images, np.array([numbers[wnid] for _, wnid in rows], dtype=np.int64)


def _synonyms(path: Path) -> dict[str, list[str]]:
    """What WordNet calls each id: "n01443537<tab>goldfish, Carassius auratus"."""
    lines = (line.partition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return {wnid: [word.strip() for word in words.split(",")] for wnid, _, words in lines}


def _class_names(wnids: Sequence[str], synonyms: Mapping[str, list[str]]) -> tuple[str, ...]:
    """The first synonym; where two classes share it, the second in brackets, and failing that the id.

    In brackets, because a comma separates the names that `--classes` takes.
    """
    names = [synonyms[wnid][0] for wnid in wnids]
    shared = _repeated(names)
    names = [
        f"{name} ({synonyms[wnid][1]})" if name in shared and len(synonyms[wnid]) > 1 else name
        for wnid, name in zip(wnids, names, strict=True)
    ]
    shared = _repeated(names)
    return tuple(f"{name} ({wnid})" if name in shared else name for wnid, name in zip(wnids, names, strict=True))


def _repeated(names: Sequence[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}


def _samples(
    split: str, folder: Path, images: Sequence[str], labels: NDArray[np.int64], start: int, stop: int
) -> Iterator[Sample]:
    for row in range(start, min(stop, len(images))):
        path = folder / images[row]
        part = images[row].partition("/")[0]  # "train" or "val": the archive's own name for it
        yield Sample(row, f"tiny-imagenet/{part}/{path.stem}", split, int(labels[row]), path)
