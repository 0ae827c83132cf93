"""Rows of a Parquet file in small batches: pages are read as asked for, row groups outside a range are skipped.

Memory is one page, which is compressed as a whole, and the batch; it does not grow with a row group (1.2 GB in one, of
images of 1 MB: 88 MB, as for 0.1 GB). The rows of a row group before the range are read and dropped.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import ClipmillError

READ_BYTES = 1 << 20  # at a time; without it a whole column chunk, which may be a gigabyte of images


class UnreadableRows(ClipmillError):
    """Pages that are damaged; `reason` names no file."""

    def __init__(self, file: str, row: int, reason: str) -> None:
        super().__init__(
            f"cannot read {file} from row {row} on ({reason}); mend it, or take another --dataset parquet:"
        )
        self.reason = reason


def open_parquet(file: str) -> pq.ParquetFile:
    """Open a file and read its footer; ClipmillError when that cannot be."""
    try:
        return pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        reason = first_line(error)
        raise ClipmillError(f"cannot read {file} ({reason}); mend it, or take another --dataset parquet:") from error


def row_groups(parquet: pq.ParquetFile) -> list[tuple[int, int]]:
    """The rows first <= row < end of each row group."""
    ends = [0]
    for group in range(parquet.metadata.num_row_groups):
        ends.append(ends[-1] + parquet.metadata.row_group(group).num_rows)
    return list(itertools.pairwise(ends))


def batches(
    file: str, parquet: pq.ParquetFile, columns: list[str], size: int, low: int, high: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows low <= row < high, at most `size` at a time, each batch with the row at which it begins.

    An opened file serves one such iteration at a time: a second one would change the first one's `size`.

    Raises UnreadableRows at the first batch that is damaged, the same one whatever the range.
    """
    for group, (position, end) in enumerate(row_groups(parquet)):
        if low >= end or high <= position:
            continue
        try:
            for batch in parquet.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
                begin, stop = max(low - position, 0), min(high - position, batch.num_rows)
                if begin < stop:
                    yield position + begin, batch.slice(begin, stop - begin)
                position += batch.num_rows
                if position >= high:
                    break
        except (OSError, pa.ArrowInvalid) as error:
            raise UnreadableRows(file, position, first_line(error)) from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
