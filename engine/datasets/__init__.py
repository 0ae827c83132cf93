"""Names to datasets: the table of what there is, and the one function that opens any of it.

A named dataset is a module with `INFO` and `load(split)`; a generic source, named "scheme:PATH", is a module with
`INFO` and `load(path)` and has no splits. To add either: write the module, add it to one of the two tables below.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.datasets import cifar, cifar10_sample, digits, folder
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.errors import ClipmillError

__all__ = ["Dataset", "DatasetInfo", "Sample", "dataset_table", "open_dataset"]

_NAMED: dict[str, tuple[DatasetInfo, Callable[[str], Dataset]]] = {
    **{module.INFO.name: (module.INFO, module.load) for module in (cifar10_sample, digits)},
    **{name: (info, partial(cifar.load, name)) for name, info in cifar.INFOS.items()},
}
_SOURCES: dict[str, tuple[DatasetInfo, Callable[[str], Dataset]]] = {
    "folder": (folder.INFO, folder.load),
}


def open_dataset(name: str, split: str | None = None, limit: int | None = None) -> Dataset:
    """Open a dataset by name ("cifar10-sample") or as a source ("folder:PATH").

    `split` defaults to "test" where there is one; "all" joins the splits, train first. `limit` keeps the first rows.
    Raises ClipmillError for a name, split or limit that cannot be, and for a source that cannot be used as a whole.
    """
    if limit is not None and limit <= 0:
        raise ClipmillError(f"--limit {limit}: a limit is the number of first rows to take, at least 1")
    scheme, colon, path = name.partition(":")
    if colon and scheme in _SOURCES:
        dataset = _open_source(name, scheme, path, split)
    elif name in _NAMED:
        dataset = _open_named(name, split)
    else:
        raise ClipmillError(_unknown(name))
    if limit is None:
        return dataset
    rows = min(limit, dataset.rows)
    return replace(dataset, rows=rows, samples=partial(_clip, dataset, rows))


def dataset_table() -> list[DatasetInfo]:
    """Everything that open_dataset opens: the named datasets, then the generic sources as "scheme:PATH"."""
    return [info for info, _ in (*_NAMED.values(), *_SOURCES.values())]


def _open_source(name: str, scheme: str, path: str, split: str | None) -> Dataset:
    if split not in (None, "all"):
        raise ClipmillError(
            f"{name} has no splits, so --split {split} cannot be: point --dataset {scheme}: at the part you want, "
            f'such as "{scheme}:{Path(path, str(split))}"'
        )
    _, load = _SOURCES[scheme]
    return load(path)


def _open_named(name: str, split: str | None) -> Dataset:
    info, load = _NAMED[name]
    if split is None:
        split = "test" if "test" in info.splits else next(iter(info.splits))
    if split == "all":
        return _join(tuple(load(part) for part in info.splits))
    if split not in info.splits:
        raise ClipmillError(f'{name} has no split "{split}"; --split takes {", ".join([*info.splits, "all"])}')
    return load(split)


def _join(parts: tuple[Dataset, ...]) -> Dataset:
    assert len({(part.class_names, part.image_size) for part in parts}) == 1
    return replace(
        parts[0],
        split="all",
        rows=sum(part.rows for part in parts),
        identity={part.split: part.identity for part in parts},
        samples=partial(_chain, parts),
        notes=tuple(note for part in parts for note in part.notes),
    )


def _chain(parts: tuple[Dataset, ...], start: int, stop: int) -> Iterator[Sample]:
    offset = 0
    for part in parts:
        for sample in part.samples(max(start - offset, 0), max(stop - offset, 0)):
            yield replace(sample, row=sample.row + offset)
        offset += part.rows


def _clip(dataset: Dataset, rows: int, start: int, stop: int) -> Iterator[Sample]:
    return dataset.samples(start, min(stop, rows))


def _unknown(name: str) -> str:
    infos = {key: info for key, (info, _) in (_NAMED | _SOURCES).items()}
    near = difflib.get_close_matches(name.partition(":")[0].lower(), infos, n=1)
    hint = ""
    if os.path.isdir(name):
        hint = f'; for that folder say "folder:{name}"'
    elif near:
        hint = f'; did you mean "{infos[near[0]].name}"?'
    return f'no dataset is called "{name}"; --dataset takes {", ".join(info.name for info in infos.values())}{hint}'
