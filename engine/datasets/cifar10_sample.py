"""The embedded sample of CIFAR-10: two small Parquet files that come with the project.

Columns: key, image (JPEG bytes) and label; the class names are a JSON list in the schema metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.errors import ClipmillError

FOLDER = Path(__file__).resolve().parents[2] / "datasets_cache" / "cifar10_sample"
INFO = DatasetInfo(
    name="cifar10-sample",
    what="5,000 photographs of CIFAR-10, balanced over its classes, re-encoded as JPEG; embedded",
    splits={"train": 4000, "test": 1000},
    classes=10,
    image_size=(32, 32),
    source="CIFAR-10 (Krizhevsky, 2009), no licence stated",
)


def load(split: str) -> Dataset:
    """Open "train" or "test"; ClipmillError if the file is missing or broken."""
    path = FOLDER / f"{split}.parquet"
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with pq.ParquetFile(path) as parquet:
            rows = parquet.metadata.num_rows
            class_names = tuple(json.loads(parquet.schema_arrow.metadata[b"class_names"]))
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipmillError(
            f"{INFO.name}: cannot read {path} ({error}); restore it from the repository, or take another --dataset"
        ) from error
    return Dataset(
        name=INFO.name,
        slug=INFO.name,
        split=split,
        class_names=class_names,
        rows=rows,
        image_size=INFO.image_size,
        identity={"sha256": sha256},
        samples=partial(_samples, path, split),
        labels=lambda: pq.read_table(path, columns=["label"]).column("label").to_numpy().astype(np.int64),
    )


def _samples(path: Path, split: str, start: int, stop: int) -> Iterator[Sample]:
    with pq.ParquetFile(path) as parquet:
        first = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                table = parquet.read_row_group(group).slice(low, high - low)
                columns = (table.column(name).to_pylist() for name in ("key", "image", "label"))
                for row, (key, image, label) in enumerate(zip(*columns, strict=True), start=first + low):
                    yield Sample(row=row, key=key, split=split, label=label, image=image)
            first += rows
