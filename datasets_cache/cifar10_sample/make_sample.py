"""Make the embedded sample: the first 4,000 training and 1,000 test images of CIFAR-10 as JPEG bytes in Parquet.

    python datasets_cache/cifar10_sample/make_sample.py SOURCE_DIR

SOURCE_DIR holds train.parquet and test.parquet, the whole of CIFAR-10 with the columns key (string), image (encoded
bytes) and label, its classes interleaved so that every prefix is balanced. The files are written beside this script.
The same source and the same pyarrow (README.md names it) give the same bytes.
"""

import json
from collections import Counter
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ROWS = {"train": 4000, "test": 1000}

_ROW_GROUP = 1000
_SCHEMA = pa.schema(
    [("key", pa.string()), ("image", pa.binary()), ("label", pa.int32())],
    metadata={"class_names": json.dumps(CLASS_NAMES)},
)


@click.command(help="Write train.parquet and test.parquet of the sample from the whole of CIFAR-10 in SOURCE_DIR.")
@click.argument("source_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(source_dir: Path) -> None:
    try:
        write_sample(source_dir, Path(__file__).parent)
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise click.ClickException(f"no sample could be made from {source_dir}: {error}") from error


def write_sample(source: Path, target: Path) -> None:
    """Write both splits of the sample to `target`. Raises ValueError where the source does not give a balanced one."""
    splits = {split: read_split(source / f"{split}.parquet", rows) for split, rows in ROWS.items()}
    keys = [key for table in splits.values() for key in table["key"].to_pylist()]
    if len(set(keys)) < len(keys):
        raise ValueError("a key occurs more than once")
    for split, table in splits.items():
        pq.write_table(
            table,
            target / f"{split}.parquet",
            row_group_size=_ROW_GROUP,
            # Every JPEG opens with the same 600 bytes of tables: zstd brings the sample from 4.8 to 1.5 MB.
            compression="zstd",
            # Keys and images occur once each, and the smallest JPEG of a row group tells nobody anything.
            use_dictionary=False,
            write_statistics=["key", "label"],
        )


def read_split(path: Path, rows: int) -> pa.Table:
    """The first rows of one file, in the sample's schema."""
    table = pq.ParquetFile(path).read(columns=_SCHEMA.names).slice(0, rows).select(_SCHEMA.names).cast(_SCHEMA)
    counts = Counter(table["label"].to_pylist())
    if counts != dict.fromkeys(range(len(CLASS_NAMES)), rows // len(CLASS_NAMES)):
        raise ValueError(f"the first {rows} rows of {path.name} are not balanced over labels 0-9")
    return table


if __name__ == "__main__":
    main()
