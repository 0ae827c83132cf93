"""parquet:PATH: a Parquet file, a folder of them or a glob, with an image column as Hugging Face writes it, or binary.

The image column is the one that the Hugging Face metadata in the schema calls an Image, else one called image, img, jpg
or bytes, else the only one of a fitting type: struct {bytes, path}, or binary. The bytes are what counts: a row without
them is the reject `empty`, because a path in there is one of the machine that wrote the file. The label column is a
ClassLabel, else one called label, labels, cls or fine_label. Rows come in the order of the files' names.

Pages are read as rows are asked for, a few rows at a time, so memory does not grow with a row group. Row groups outside
a range are skipped; the rows of a row group before the range are read and dropped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.datasets.folder import key_of
from engine.datasets.parquet_read import UnreadableRows, batches, first_line, open_parquet, row_groups
from engine.datasets.parquet_schema import Columns, find_columns, is_text
from engine.datasets.sources import (
    UNKNOWN,
    files_digest,
    first_duplicate,
    known_labels,
    label_or_problem,
    matching_files,
    names_to_labels,
    source_name,
    source_slug,
)
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.decode import BadImage
from engine.errors import ClipmillError

INFO = DatasetInfo(
    name="parquet:PATH",
    what="Parquet files with an image column, as Hugging Face has them or plain binary: a file, a folder or a glob",
    splits={"all": None},
    classes=None,
    image_size=None,
    source="your own files",
)

IMAGES_AT_ONCE = 8  # rows held as Python objects
ROWS_AT_ONCE = 4096  # of columns without images


@dataclass(frozen=True)
class Shard:
    """One of the Parquet files."""

    path: str
    name: str  # relative to the folder, a valid key
    first: int  # the source's row at which it begins
    rows: int


@dataclass(frozen=True)
class Source:
    """What `load` found out."""

    shards: tuple[Shard, ...]
    columns: Columns
    labels: NDArray[np.int64]  # as they are in the column, UNKNOWN for null
    class_names: tuple[str, ...]
    labelled: bool


def load(path: str) -> Dataset:
    """Open `path` as the one split "all".

    The keys are a column key or __key__, which must be unique, else one called id or file_name if it is, else
    "FILE#ROW". Raises ClipmillError when there is no such file, no image column or no row, when the files' columns
    differ, or when a key comes twice.
    """
    files, root = _files(path)
    shards: list[Shard] = []
    columns: Columns | None = None
    for file in files:
        with open_parquet(file) as parquet:
            found = find_columns(file, parquet)
            rows = parquet.metadata.num_rows
        if columns is not None and found != columns:
            differs = found.difference(columns)
            raise ClipmillError(
                f"{file} and {files[0]} differ ({differs}): --dataset parquet: takes files of one schema"
            )
        columns = found
        name = key_of(os.path.relpath(file, root))
        shards.append(Shard(file, name, shards[-1].first + shards[-1].rows if shards else 0, rows))
    assert columns is not None
    rows = shards[-1].first + shards[-1].rows
    if not rows:
        raise ClipmillError(f"no rows in {files[0]}{' and the others' * (len(files) > 1)}; see --dataset parquet:")
    columns = _unique_keys(shards, columns)
    class_names, labels = _labels(shards, columns, rows)
    source = Source(tuple(shards), columns, labels, class_names, bool((labels != UNKNOWN).any()))
    return Dataset(
        name=source_name("parquet", path),
        slug=source_slug("parquet", files[0] if len(files) == 1 else path),
        split="all",
        class_names=class_names,
        rows=rows,
        image_size=None,
        identity={"images": rows, "sha256": files_digest((os.path.relpath(file, root), file) for file in files)},
        samples=partial(_samples, source),
        labels=lambda: known_labels(labels, len(class_names)),
        notes=columns.notes,
    )


def _samples(source: Source, start: int, stop: int) -> Iterator[Sample]:
    for shard in source.shards:
        low, high = max(start - shard.first, 0), min(stop - shard.first, shard.rows)
        if low < high:
            with open_parquet(shard.path) as parquet:
                if parquet.metadata.num_rows != shard.rows:
                    raise ClipmillError(f"{shard.path} changed while it was read; run again")
                yield from _shard_samples(source, shard, parquet, low, high)


def _shard_samples(source: Source, shard: Shard, parquet: pq.ParquetFile, low: int, high: int) -> Iterator[Sample]:
    columns = source.columns
    for first, end in row_groups(parquet):
        row, stop = max(first, low), min(end, high)
        try:
            keys = _keys(shard, columns, row, stop)
            for _, batch in batches(shard.path, parquet, [columns.image], IMAGES_AT_ONCE, row, stop):
                values = batch.column(0)
                images = pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values
                for image in images:
                    # An absent value is what no bytes are to the decoder: the reject `empty`.
                    yield _sample(source, shard.first + row, next(keys), image.as_py() or b"")
                    row += 1
        except UnreadableRows as error:
            # Damage ends what can be read of the row group, but not of the file, and no row vanishes.
            for key in keys:
                yield _sample(source, shard.first + row, key, BadImage("unreadable", error.reason))
                row += 1
            if row < stop:  # it was the keys
                raise


def _keys(shard: Shard, columns: Columns, low: int, high: int) -> Iterator[str]:
    if columns.key is None:
        yield from (f"{shard.name}#{row}" for row in range(low, high))
        return
    # Read apart from the images: where those are damaged, the keys may not be. And from the file opened once more: two
    # readers of one opened file share a batch size, the last one's, and 4,096 images are not to be in memory at once.
    with open_parquet(shard.path) as parquet:
        for _, batch in batches(shard.path, parquet, [columns.key], ROWS_AT_ONCE, low, high):
            yield from (key_of(str(value)) for value in batch.column(0))


def _sample(source: Source, row: int, key: str, image: bytes | BadImage) -> Sample:
    label = label_or_problem(int(source.labels[row]), len(source.class_names), source.labelled)
    if isinstance(image, BadImage):
        label = None
    elif isinstance(label, BadImage):
        image, label = label, None
    return Sample(row, key, "all", label, image)


def _files(path: str) -> tuple[list[str], str]:
    """The Parquet files that `path` names, sorted, and the folder that their names are relative to."""
    pattern = os.path.abspath(os.path.expanduser(path))
    if path and os.path.isdir(pattern):
        files = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(pattern)
            for name in names
            if name.endswith(".parquet") and "/." not in f"/{os.path.relpath(os.path.join(folder, name), pattern)}"
        )
        if not files:
            raise ClipmillError(
                f"no *.parquet in the folder {pattern}; --dataset parquet: takes a file, folder or glob"
            )
        return files, pattern
    files = matching_files(pattern) if path else []
    if not files:
        raise ClipmillError(f'there is no file "{path}"; --dataset parquet: takes a file, a folder or a glob')
    return files, os.path.commonpath([os.path.dirname(file) for file in files])


def _unique_keys(shards: list[Shard], columns: Columns) -> Columns:
    if columns.key is None:
        return columns
    twice = first_duplicate(partial(_values, shards, columns.key))
    if twice is None:
        return columns
    if columns.key_must_be_unique:
        others = " and the others" if len(shards) > 1 else ""
        raise ClipmillError(
            f'the column "{columns.key}" in {shards[0].path}{others} holds "{twice}" twice; '
            "keys must be unique for --dataset parquet:"
        )
    return columns.without_key()


def _values(shards: list[Shard], column: str) -> Iterator[str]:
    for _, values in _column(shards, column):
        yield from map(str, values)


def _column(shards: list[Shard], column: str) -> Iterator[tuple[int, pa.Array]]:
    for shard in shards:
        with open_parquet(shard.path) as parquet:
            for position, batch in batches(shard.path, parquet, [column], ROWS_AT_ONCE, 0, shard.rows):
                yield shard.first + position, batch.column(0)


def _labels(shards: list[Shard], columns: Columns, rows: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    labels = np.full(rows, UNKNOWN, dtype=np.int64)
    if columns.label is None:
        return columns.class_names, labels
    names: dict[str, int] = {}
    for first, values in _column(shards, columns.label):
        if is_text(values.type):
            words = (value.as_py() for value in values)
            numbers = [UNKNOWN if not word else names.setdefault(word, len(names)) for word in words]
        else:
            try:  # pandas makes floats of integers as soon as one is missing, and NaN of that one
                integers = pc.cast(pa.array(values.to_numpy(zero_copy_only=False), from_pandas=True), pa.int64())
            except pa.ArrowInvalid as error:
                raise ClipmillError(
                    f'the column "{columns.label}" in {shards[0].path} holds no labels ({first_line(error)}): '
                    "integers or names are for --dataset parquet:"
                ) from error
            numbers = pc.fill_null(integers, UNKNOWN).to_numpy(zero_copy_only=False)
        labels[first : first + len(values)] = numbers
    if not names:
        return columns.class_names, labels
    return names_to_labels(list(names), labels)
