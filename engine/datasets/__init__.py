"""Names to datasets: the table of what there is, and the one function that opens any of it.

Named datasets are those of named.py; a generic source, named "scheme:PATH", is a module with `INFO` and `load(path)`
and has no splits. To add a source: write the module, add it to the table below.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.datasets import folder, image_list, npy, parquet, webdataset
from engine.datasets.download import open_store
from engine.datasets.named import NAMED, get_named, open_named
from engine.datasets.subset import Subset, take
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.errors import ClipmillError

__all__ = ["Dataset", "DatasetInfo", "DatasetRow", "Sample", "dataset_table", "get_dataset", "open_dataset"]


@dataclass(frozen=True)
class DatasetRow(DatasetInfo):
    """A line of the table, with what a glance at the data folder adds."""

    cached: bool | None  # whether it seems to be there without a download; None for a source, which is the user's own


_SOURCES: dict[str, tuple[DatasetInfo, Callable[[str], Dataset]]] = {
    scheme: (module.INFO, module.load)
    for scheme, module in {
        "folder": folder,
        "wds": webdataset,
        "parquet": parquet,
        "npy": npy,
        "list": image_list,
    }.items()
}


def open_dataset(
    name: str,
    split: str | None = None,
    limit: int | None = None,
    *,
    classes: str | None = None,
    class_seed: int = 0,
    sample: int | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    download: bool = True,
) -> Dataset:
    """Open a dataset by name ("cifar10-sample") or as a source ("folder:PATH").

    `split` defaults to "test" where there is one; "all" joins the splits, train first. `classes`, `sample` and `limit`
    keep some of its rows, see subset.py.
    What is downloaded lies under `data_dir`, else under $CLIPMILL_DATA_DIR, else in datasets_cache/; what is not there
    is downloaded first, unless `download` is False.
    Raises ClipmillError for a name, split or limit that cannot be, for a source that cannot be used as a whole, and for
    data that are neither there nor to be had.
    """
    scheme, colon, path = name.partition(":")
    if colon and scheme in _SOURCES:
        dataset = _open_source(name, scheme, path, split)
    elif name in NAMED:
        dataset = open_named(name, split, open_store(data_dir, download))
    else:
        raise ClipmillError(_unknown(name))
    return take(dataset, Subset(classes, class_seed, sample, seed, limit))


def dataset_table(data_dir: Path | None = None) -> list[DatasetRow]:
    """Everything that open_dataset opens: the named datasets, then the generic sources as "scheme:PATH".

    Whether one is cached is told by a glance at the names of files; only opening it compares checksums.
    """
    store = open_store(data_dir, download=False)
    return [
        *(DatasetRow(**vars(named.info), cached=named.is_cached(store.folder)) for named in NAMED.values()),
        *(DatasetRow(**vars(info), cached=None) for info, _ in _SOURCES.values()),
    ]


def get_dataset(name: str, data_dir: Path | None = None) -> Path:
    """Download what is missing of a named dataset, check all of it, and return the folder that it lies in.

    Raises ClipmillError for a name that needs no download or does not exist, and when the data cannot be had or are
    damaged.
    """
    if name.partition(":")[0] in _SOURCES:
        raise ClipmillError(f"{name} would be your own data, so there is nothing to get: give it to --dataset")
    if name not in NAMED:
        raise ClipmillError(_unknown(name))
    return get_named(name, open_store(data_dir, download=True))


def _open_source(name: str, scheme: str, path: str, split: str | None) -> Dataset:
    if split not in (None, "all"):
        part = f', such as "{scheme}:{Path(path, str(split))}"' if os.path.isdir(os.path.expanduser(path)) else ""
        raise ClipmillError(
            f"{name} has no splits, so --split {split} cannot be: point --dataset {scheme}: at the part you want{part}"
        )
    _, load = _SOURCES[scheme]
    return load(path)


def _unknown(name: str) -> str:
    names = {key: key for key in NAMED} | {key: info.name for key, (info, _) in _SOURCES.items()}
    near = difflib.get_close_matches(name.partition(":")[0].lower(), names, n=1)
    hint = ""
    if os.path.isdir(name):
        hint = f'; for that folder say "folder:{name}"'
    elif near:
        hint = f'; did you mean "{names[near[0]]}"?'
    return f'no dataset is called "{name}"; --dataset takes {", ".join(names.values())}{hint}'
