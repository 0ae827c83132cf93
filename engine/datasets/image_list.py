"""list:FILE: the images that a CSV, TSV or JSONL file lists, in its order.

Columns (of a header line, or the names in each JSON object): `path`, absolute or relative to the file's folder; `label`
if there are any, an integer or a class name, empty or null for unknown; `key` if the path shall not be the key. Where
every label is an integer it is the class number; else all are names, and the classes are the sorted names. A path that
leads nowhere is still a row: it becomes a reject.
"""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from engine.datasets.folder import key_of
from engine.datasets.sources import (
    UNKNOWN,
    files_digest,
    first_duplicate,
    known_labels,
    label_or_problem,
    names_to_labels,
    one_file,
    source_name,
    source_slug,
)
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.decode import BadImage
from engine.errors import ClipmillError

INFO = DatasetInfo(
    name="list:FILE",
    what="images that a CSV, TSV or JSONL file lists: path, and optionally label and key",
    splits={"all": None},
    classes=None,
    image_size=None,
    source="your own files",
)

COLUMNS = ("path", "label", "key")


@dataclass
class Listing:
    """What the file says, a row in about 100 bytes: its path, its own key if there are keys, its label's number."""

    paths: list[str] = field(default_factory=list)
    own_keys: list[str] = field(default_factory=list)
    codes: array[int] = field(default_factory=lambda: array("q"))  # index into names, or UNKNOWN
    names: dict[str, int] = field(default_factory=dict)

    def keys(self) -> Iterator[str]:
        return map(key_of, self.own_keys or self.paths)


def load(path: str) -> Dataset:
    """Open the list `path` as the one split "all".

    Raises ClipmillError, naming the line, when it cannot be read as what its suffix says (.csv, .tsv, .jsonl), has no
    rows, a row has no path, or two rows have the same key.
    """
    file = one_file("list", path)
    listing = _read(file)
    if not listing.paths:
        raise ClipmillError(f"{file} lists no images; --dataset list:FILE takes one a line")
    if (twice := first_duplicate(listing.keys)) is not None:
        mend = "make the keys unique" if listing.own_keys else 'give each row a "key"'
        raise ClipmillError(f'{file} lists "{twice}" twice; {mend}: --dataset list:FILE needs a name for each row')
    class_names, labels = names_to_labels(list(listing.names), np.frombuffer(listing.codes, dtype=np.int64))
    folder = os.path.dirname(file)
    images = ((name, os.path.join(folder, name)) for name in listing.paths)
    return Dataset(
        name=source_name("list", path),
        slug=source_slug("list", file),
        split="all",
        class_names=tuple(key_of(name) for name in class_names),
        rows=len(listing.paths),
        image_size=None,
        identity={
            "images": len(listing.paths),
            "list": files_digest([(os.path.basename(file), file)]),
            "sha256": files_digest(images),
        },
        samples=partial(_samples, folder, listing, labels, len(class_names)),
        labels=lambda: known_labels(labels, len(class_names)),
    )


def _samples(
    folder: str, listing: Listing, labels: NDArray[np.int64], classes: int, start: int, stop: int
) -> Iterator[Sample]:
    labelled = bool(listing.names)
    for row in range(start, min(stop, len(listing.paths))):
        key = key_of(listing.own_keys[row] if listing.own_keys else listing.paths[row])
        label = label_or_problem(int(labels[row]), classes, labelled)
        if isinstance(label, BadImage):
            yield Sample(row, key, "all", None, label)
        else:
            yield Sample(row, key, "all", label, Path(folder, listing.paths[row]))


def _read(file: str) -> Listing:
    readers: dict[str, Callable[[TextIO], Iterator[tuple[int, dict[str, Any]]]]] = {
        ".csv": partial(_table, delimiter=","),
        ".tsv": partial(_table, delimiter="\t"),
        ".jsonl": _objects,
    }
    suffix = os.path.splitext(file)[1].lower()
    if suffix not in readers:
        raise ClipmillError(f"{file} ends in none of {' '.join(readers)}; --dataset list:FILE tells the format by that")
    listing = Listing()
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front
        with open(file, encoding="utf-8-sig", newline="") as text:
            for line, row in readers[suffix](text):
                _add(listing, line, row)
    except UnicodeDecodeError as error:
        raise ClipmillError(f"{file} is not UTF-8 ({error.reason}): convert it for --dataset list:FILE") from error
    except OSError as error:
        raise ClipmillError(f"cannot read {file} ({error.strerror}); see --dataset list:FILE") from error
    except _WrongLine as error:
        raise ClipmillError(f"{file}, line {error.line}: {error}; --dataset list:FILE cannot use it") from error
    return listing


class _WrongLine(Exception):
    """What is wrong with a line, and which it is."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def _table(text: TextIO, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if "path" not in header:
            raise _WrongLine(1, f'no column "path" in the header ({", ".join(header) or "empty"})')
        if len(set(header)) < len(header):
            raise _WrongLine(1, "a column name comes twice in the header")
        for row in rows:
            if row and len(row) != len(header):
                raise _WrongLine(rows.line_num, f"{len(row)} cells, where the header has {len(header)}")
            if row:
                yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise _WrongLine(rows.line_num, str(error)) from error


def _objects(text: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _WrongLine(number, f"no JSON ({error})") from error
            if not isinstance(row, dict):
                raise _WrongLine(number, "no JSON object")
            yield number, row


def _add(listing: Listing, line: int, row: dict[str, Any]) -> None:
    path, label, key = (row.get(name) for name in COLUMNS)
    if not isinstance(path, str) or not path or "\0" in path:
        raise _WrongLine(line, "no path in it")
    for name, value in (("label", label), ("key", key)):
        if isinstance(value, bool) or not isinstance(value, int | str | None):
            raise _WrongLine(line, f"the {name} {value!r} is neither an integer nor a name")
    has_key = key is not None and key != ""
    if listing.paths and has_key != bool(listing.own_keys):
        raise _WrongLine(line, "either every row has a key or none")
    listing.paths.append(path)
    if has_key:
        listing.own_keys.append(str(key))
    name = "" if label is None else str(label).strip()
    unknown = name in ("", str(UNKNOWN))
    listing.codes.append(UNKNOWN if unknown else listing.names.setdefault(name, len(listing.names)))
