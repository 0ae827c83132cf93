"""CIFAR-10 and CIFAR-100 as published, through torchvision's checksums and reader.

The archives hold pickles; each is opened only after its own checksum has matched, every time.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.datasets.download import Archive, Store, damaged, missing_extra, unpacked
from engine.datasets.types import Dataset, DatasetInfo, Sample

INFOS = {
    name: DatasetInfo(
        name=name,
        what=f"60,000 photographs in {classes} classes{more}; downloaded ({size}), needs the `datasets` extra",
        splits={"train": 50_000, "test": 10_000},
        classes=classes,
        image_size=(32, 32),
        source=f"{title} (Krizhevsky, 2009), no licence stated",
    )
    for name, title, classes, more, size in (
        ("cifar10", "CIFAR-10", 10, "", "170 MB"),
        ("cifar100", "CIFAR-100", 100, " and 20 superclasses", "169 MB"),
    )
}
# torchvision knows both too, but listing what there is must not load it.
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


def load(name: str, split: str, store: Store) -> Dataset:
    """Open "train" or "test" of cifar10 or cifar100, downloading it first if need be.

    The labels of cifar100 are the fine ones; its superclasses are the further label column `coarse_label`.
    Raises ClipmillError without torchvision, and when the archive is neither there nor to be had.
    """
    try:
        from torchvision.datasets import CIFAR10, CIFAR100
    except ImportError as error:
        raise missing_extra(name, error) from error
    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    data = _read(name, reader, split, store)
    names, coarse = _coarse_labels(reader, split, store) if name == "cifar100" else ((), None)
    return Dataset(
        name=name,
        slug=name,
        split=split,
        class_names=tuple(data.classes),
        rows=len(data.data),
        image_size=INFOS[name].image_size,
        identity={"archive_md5": reader.tgz_md5},
        samples=partial(_samples, name, split, data.data, data.targets, coarse),
        labels=lambda: np.array(data.targets, dtype=np.int64),
        label_columns={} if coarse is None else {"coarse_label": names},
    )


def is_cached(name: str, folder: Path) -> bool:
    """Whether a data folder seems to hold it, unpacked or as its archive."""
    return (folder / FOLDERS[name]).is_dir() or (folder / ARCHIVES[name]).is_file()


def _read(name: str, reader: Any, split: str, store: Store) -> Any:
    """torchvision's dataset, `data` (N, 32, 32, 3) uint8 and `targets`; it compares checksums before it unpickles."""
    read = partial(reader, store.folder, train=split == "train", download=False)
    try:
        return read()
    except (OSError, RuntimeError):  # not there, or not what the checksums say
        archive = Archive(ARCHIVES[name], (reader.url,), reader.tgz_md5)
        folder = unpacked(name, archive, FOLDERS[name], store, anew=True)
    try:
        return read()
    except (OSError, RuntimeError) as error:
        raise damaged(name, folder, error) from error


def _coarse_labels(reader: Any, split: str, store: Store) -> tuple[tuple[str, ...], list[int]]:
    """Names and labels of the superclasses, which torchvision's reader passes over in the files that it has read."""
    folder = store.folder / FOLDERS["cifar100"]
    ((file, md5),) = reader.train_list if split == "train" else reader.test_list
    try:
        names = _unpickle(folder / reader.meta["filename"], reader.meta["md5"])["coarse_label_names"]
        return tuple(names), _unpickle(folder / file, md5)["coarse_labels"]
    except (OSError, RuntimeError) as error:
        raise damaged("cifar100", folder, error) from error


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    content = path.read_bytes()  # the same bytes for the checksum and for pickle, whatever becomes of the file
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise RuntimeError(f"the checksum of {path.name} differs")
    loaded: dict[str, Any] = pickle.loads(content, encoding="latin1")
    return loaded


def _samples(
    name: str,
    split: str,
    pixels: NDArray[np.uint8],
    labels: Sequence[int],
    coarse: Sequence[int] | None,
    start: int,
    stop: int,
) -> Iterator[Sample]:
    for row in range(start, min(stop, len(pixels))):
        more_labels = {} if coarse is None else {"coarse_label": coarse[row]}
        yield Sample(row, f"{name}/{split}/{row:05d}", split, labels[row], pixels[row], more_labels)
