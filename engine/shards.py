"""Shards: the rows of a run as Parquet or Arrow IPC files, written whole, read as one table.

Columns: row int64, key string, split string, label int32 (null if unknown), the dataset's further labels, and
embedding FixedSizeList<float>[dim].
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.errors import ClipmillError
from engine.files import atomic_file

FORMATS = ("parquet", "arrow")
DTYPES = {"float32": pa.float32(), "float16": pa.float16()}


@dataclass(frozen=True)
class Reject:
    """An image that could not be embedded, and why."""

    row: int
    key: str
    error: str  # stable class, see engine/decode.py
    message: str


REJECT_SCHEMA = pa.schema(
    {"row": pa.int64(), "key": pa.string(), "error": pa.string(), "message": pa.string()},
)


def shard_schema(dim: int, dtype: str, metadata: Mapping[str, str], more_labels: Sequence[str] = ()) -> pa.Schema:
    """The columns of a run; a dataset's further labels stand between its label and the embedding."""
    columns = {
        "row": pa.int64(),
        "key": pa.string(),
        "split": pa.string(),
        "label": pa.int32(),
        **dict.fromkeys(more_labels, pa.int32()),
        "embedding": embedding_type(dim, dtype),
    }
    return pa.schema(columns, metadata=dict(metadata))


def embedding_type(dim: int, dtype: str) -> pa.FixedSizeListType:
    return pa.list_(pa.field("element", DTYPES[dtype], nullable=False), dim)


def bundle_metadata(bundle: Bundle) -> dict[str, str]:
    """What the schema of every table of embeddings says of where they come from."""
    return {
        "bundle": bundle.fingerprint,
        "model": bundle.source.model,
        "precision": bundle.target.precision,
        "normalised": "true",
        "engine_version": importlib.metadata.version("clipmill"),
    }


def shard_table(schema: pa.Schema, columns: Mapping[str, Sequence[Any]], embeddings: NDArray[np.float32]) -> pa.Table:
    """One shard in memory; embeddings (N, dim) float32, one a row of the other columns, are cast to the schema's type.

    float32 are not copied: the table is for use before the array is written to again.
    """
    arrays = [
        embedding_column(embeddings, field.type)
        if field.name == "embedding"
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def embedding_column(embeddings: NDArray[np.float32], kind: pa.FixedSizeListType) -> pa.Array:
    values = pa.array(embeddings.astype(kind.value_type.to_pandas_dtype(), copy=False).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(values, type=kind)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table atomically, as Arrow IPC for *.arrow, else as Parquet; the same table gives the same bytes."""
    with atomic_file(path) as temporary:
        if path.suffix == ".arrow":
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        else:
            # The writer takes memory for a chunk at a time: 40 MB for one of 10,000 rows of 128, 18 MB in slices of
            # 1,024. It works through that many at once (its write_batch_size), so the bytes are the same.
            slices = pa.Table.from_batches(table.to_batches(max_chunksize=1024), table.schema)
            # no compression: unit vectors have none to give, and a shard is written faster than it is read back
            pq.write_table(slices, temporary, compression="none", use_dictionary=["split"])


def read_table(path: Path) -> pa.Table:
    """A table of `write_table`; Arrow IPC is memory-mapped. ClipmillError names a file that cannot be read."""
    try:
        if path.suffix == ".arrow":
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipmillError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def embedding_blocks(path: Path) -> Iterator[NDArray[Any]]:
    """The embeddings of a shard in blocks (n, dim): batches of a memory-mapped Arrow file, or 4,096 rows of Parquet.

    ClipmillError names a file that cannot be read.
    """
    try:
        if path.suffix == ".arrow":
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = pq.ParquetFile(path).iter_batches(batch_size=4096, columns=["embedding"])
        for batch in batches:
            yield embeddings_of(pa.Table.from_batches([batch]))
    except (OSError, pa.ArrowInvalid) as error:
        raise ClipmillError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def embeddings_of(table: pa.Table) -> NDArray[Any]:
    """The embedding column as (N, dim), without a copy where it lies in one piece."""
    column = table.column("embedding")
    dim = column.type.list_size
    chunks: list[NDArray[Any]] = [
        chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, dim) for chunk in column.chunks
    ]
    if len(chunks) == 1:
        return chunks[0]
    return np.concatenate(chunks) if chunks else np.empty((0, dim), column.type.value_type.to_pandas_dtype())


def reject_table(rejects: Iterable[Reject]) -> pa.Table:
    return pa.Table.from_pylist([vars(reject) for reject in rejects], schema=REJECT_SCHEMA)
