"""A run on disk, without any model: shards, the manifest, and reading as a user would."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from engine.errors import ClipmillError
from engine.files import read_json, write_json
from engine.manifest import Run, ShardRange, read_manifest, read_run, run_embeddings
from engine.shards import Reject, embeddings_of, read_table, shard_schema, shard_table, write_table

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

DIM = 6
METADATA = {"dataset": "birds", "class_names": '["owl", "Zeisig ✓"]', "normalised": "true"}


def vectors(rows: int, dim: int = DIM) -> NDArray[np.float32]:
    return np.random.default_rng(rows).standard_normal((rows, dim)).astype(np.float32)


def table_of(rows: range, embeddings: NDArray[np.float32], dtype: str = "float32") -> pa.Table:
    """Every third row has no label."""
    columns = {
        "row": rows,
        "key": [f"birds/{row}.jpg" for row in rows],
        "split": ["test"] * len(rows),
        "label": [row % 3 or None for row in rows],
    }
    return shard_table(shard_schema(embeddings.shape[1], dtype, METADATA), columns, embeddings)


def make_run(
    path: Path, rows: int = 10, shard_size: int = 4, suffix: str = "parquet", dtype: str = "float32", dim: int = DIM
) -> NDArray[np.float32]:
    """A complete run, written the way engine/stream.py does; its embeddings."""
    embeddings = vectors(rows, dim)
    run = Run(path, rows, shard_size, suffix, {"dataset": "birds"}, {"name": "mini", "model": "mini"})
    for shard in run.open(overwrite=False):
        part = table_of(range(shard.start, shard.stop), embeddings[shard.start : shard.stop], dtype)
        run.commit(shard, part, [], 1.5)
    run.finish({"images": rows})
    return embeddings


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# Shards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_shard_comes_back_as_it_went(suffix: str, dtype: str, tmp_path: Path) -> None:
    embeddings, path = vectors(7), tmp_path / f"part.{suffix}"
    write_table(path, table_of(range(3, 10), embeddings, dtype))
    table = read_table(path)
    element = pa.field("element", {"float32": pa.float32(), "float16": pa.float16()}[dtype], nullable=False)
    assert table.schema.names == ["row", "key", "split", "label", "embedding"]
    assert table.schema.types == [pa.int64(), pa.string(), pa.string(), pa.int32(), pa.list_(element, DIM)]
    assert {key.decode(): value.decode() for key, value in table.schema.metadata.items()} == METADATA
    assert json.loads(table.schema.metadata[b"class_names"]) == ["owl", "Zeisig ✓"]
    assert table["row"].to_pylist() == [3, 4, 5, 6, 7, 8, 9]
    assert table["key"].to_pylist()[0] == "birds/3.jpg"
    assert table["label"].to_pylist() == [None, 1, 2, None, 1, 2, None]
    assert embeddings_of(table).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(embeddings_of(table), embeddings.astype(dtype))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_the_same_table_is_the_same_bytes(suffix: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_table(tmp_path / f"{name}.{suffix}", table_of(range(50), vectors(50)))
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_shard_without_rows(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"part.{suffix}", table_of(range(0), np.empty((0, DIM), np.float32), "float16"))
    table = read_table(tmp_path / f"part.{suffix}")
    assert (table.num_rows, embeddings_of(table).shape) == (0, (0, DIM))
    assert embeddings_of(table).dtype == np.float16


@pytest.mark.parametrize("dim", [6, 129, 512])
def test_parquet_is_written_in_slices_that_leave_no_trace(
    dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(range(2500), vectors(2500, dim))
    pq.write_table(table, tmp_path / "whole.parquet", compression="none", use_dictionary=["split"])
    write, chunks = pq.write_table, []

    def watch(table: pa.Table, *arguments: Any, **options: Any) -> None:
        chunks.extend(len(chunk) for chunk in table["embedding"].chunks)
        write(table, *arguments, **options)

    monkeypatch.setattr(pq, "write_table", watch)
    write_table(tmp_path / "slices.parquet", table)
    assert chunks == [1024, 1024, 452]
    assert (tmp_path / "slices.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_embeddings_of_a_slice_and_of_many_pieces() -> None:
    embeddings = vectors(9)
    table = table_of(range(9), embeddings)
    np.testing.assert_array_equal(embeddings_of(table.slice(2, 4)), embeddings[2:6])
    pieces = pa.concat_tables([table.slice(5, 4), table.slice(0, 0), table.slice(0, 2)])
    np.testing.assert_array_equal(embeddings_of(pieces), embeddings[[5, 6, 7, 8, 0, 1]])


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [None, b"", b"no shard at all, but longer than a magic number"])
def test_what_is_no_shard_is_one_line(content: bytes | None, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"part.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipmillError) as raised:
        read_table(path)
    assert str(raised.value).startswith(f"cannot read {path}: ")
    assert "\n" not in str(raised.value)


@needs_proc
def test_an_arrow_run_is_mapped_and_not_copied(tmp_path: Path) -> None:
    embeddings = make_run(tmp_path / "run", rows=2000, shard_size=2000, suffix="arrow", dim=256)
    before = pa.total_allocated_bytes()
    _, table = read_run(tmp_path / "run")
    mapped = embeddings_of(table)
    assert pa.total_allocated_bytes() - before < mapped.nbytes / 100
    address = mapped.__array_interface__["data"][0]
    with open("/proc/self/maps") as maps:
        ranges = [line.split(maxsplit=5) for line in maps if "part-00000.arrow" in line]
    assert any(int(start, 16) <= address < int(stop, 16) for start, stop in (line[0].split("-") for line in ranges))
    np.testing.assert_array_equal(mapped, embeddings)
    assert not mapped.flags.writeable


def test_users_read_a_run_with_pandas_polars_and_duckdb(tmp_path: Path) -> None:
    embeddings = make_run(tmp_path)
    shards = f"{tmp_path}/part-*.parquet"

    frame = pd.concat(map(pd.read_parquet, sorted(tmp_path.glob("part-*.parquet"))), ignore_index=True)
    polars = pl.read_parquet(shards)
    rows = duckdb.sql(f"SELECT row, key, label, embedding FROM '{shards}' ORDER BY row").fetchall()

    keys = [f"birds/{row}.jpg" for row in range(10)]
    labels = [None, 1, 2, None, 1, 2, None, 1, 2, None]
    assert frame["key"].tolist() == keys
    assert frame["label"].astype(object).where(frame["label"].notna(), None).tolist() == labels
    np.testing.assert_array_equal(np.stack(frame["embedding"]), embeddings)
    assert polars["key"].to_list() == keys
    assert polars["label"].to_list() == labels
    np.testing.assert_array_equal(polars["embedding"].to_numpy(), embeddings)
    assert [row[:3] for row in rows] == list(zip(range(10), keys, labels, strict=True))
    np.testing.assert_array_equal(np.array([row[3] for row in rows], dtype=np.float32), embeddings)


def test_users_read_float16_shards(tmp_path: Path) -> None:
    expected = make_run(tmp_path, dtype="float16", shard_size=10).astype(np.float16)
    path = tmp_path / "part-00000.parquet"
    np.testing.assert_array_equal(np.stack(pd.read_parquet(path)["embedding"]), expected)
    np.testing.assert_array_equal(pl.read_parquet(path)["embedding"].to_numpy(), expected)
    values = duckdb.sql(f"SELECT embedding FROM '{path}' ORDER BY row").fetchall()
    np.testing.assert_array_equal(np.array([row[0] for row in values], dtype=np.float16), expected)


# The manifest ---------------------------------------------------------------------------------------------------------


def test_the_plan_covers_every_row_once() -> None:
    run = Run(Path("runs/x"), 25, 10, "arrow", {}, {})
    assert run.plan() == [
        ShardRange("part-00000.arrow", 0, 10),
        ShardRange("part-00001.arrow", 10, 20),
        ShardRange("part-00002.arrow", 20, 25),
    ]
    assert [shard.stop for shard in Run(Path("x"), 20, 10, "arrow", {}, {}).plan()] == [10, 20]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_complete_run_reads_as_one_table(suffix: str, tmp_path: Path) -> None:
    embeddings = make_run(tmp_path, suffix=suffix)
    manifest, table = read_run(tmp_path)
    assert table["row"].to_pylist() == list(range(10))
    np.testing.assert_array_equal(embeddings_of(table), embeddings)
    for shard in manifest["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert (shard["sha256"], shard["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert shard["seconds"] == 1.5
    assert (manifest["status"], manifest["written"], manifest["rejected"]) == ("complete", 10, 0)
    assert names_in(tmp_path) == ["manifest.json", *(f"part-0000{index}.{suffix}" for index in range(3))]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_the_embeddings_of_a_run_in_blocks(suffix: str, dtype: str, tmp_path: Path) -> None:
    # shards larger than a block of Parquet
    make_run(tmp_path, rows=12_000, shard_size=5000, suffix=suffix, dtype=dtype)
    _, table = read_run(tmp_path)
    blocks = list(run_embeddings(tmp_path))
    assert len(blocks) >= 3
    assert max(map(len, blocks)) <= 5000
    assert {block.dtype for block in blocks} == {np.dtype(dtype)}
    np.testing.assert_array_equal(np.concatenate(blocks), embeddings_of(table))


def test_rejects_are_gathered_in_row_order(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 6, 2, "parquet", {"dataset": "birds"}, {})
    first, second, third = run.open(overwrite=False)
    embeddings = vectors(6)
    run.commit(third, table_of(range(4, 5), embeddings[4:5]), [Reject(5, "e", "empty", "zero bytes")], 0)
    run.commit(
        first, table_of(range(0), embeddings[:0]), [Reject(row, "ab"[row], "truncated", "ü") for row in (0, 1)], 0
    )
    run.commit(second, table_of(range(2, 4), embeddings[2:4]), [], 0)
    manifest = run.finish({})
    assert (manifest["written"], manifest["rejected"]) == (3, 3)
    assert [(shard["rows"], shard["rejects"]) for shard in manifest["shards"]] == [(0, 2), (2, 0), (1, 1)]
    rejects = read_table(tmp_path / "run" / "rejects.parquet")
    assert rejects.schema.types == [pa.int64(), pa.string(), pa.string(), pa.string()]
    assert rejects.to_pylist() == [
        {"row": 0, "key": "a", "error": "truncated", "message": "ü"},
        {"row": 1, "key": "b", "error": "truncated", "message": "ü"},
        {"row": 5, "key": "e", "error": "empty", "message": "zero bytes"},
    ]


def test_a_run_that_lost_a_row_cannot_be_finished(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", 4, 4, "parquet", {}, {})
    (shard,) = run.open(overwrite=False)
    run.commit(shard, table_of(range(2), vectors(2)), [Reject(2, "c", "empty", "zero bytes")], 0)
    with pytest.raises(AssertionError, match="4 planned"):
        run.finish({})
    assert read_manifest(tmp_path / "run")["status"] == "running"


def test_a_run_that_is_not_complete_is_not_read(tmp_path: Path) -> None:
    run = Run(tmp_path, 4, 2, "parquet", {}, {})
    first, _ = run.open(overwrite=False)
    run.commit(first, table_of(range(2), vectors(2)), [], 0)
    with pytest.raises(ClipmillError) as raised:
        read_run(tmp_path)
    assert str(raised.value) == f"the run at {tmp_path} is not complete: run its extract command again to finish it"


@pytest.mark.parametrize("position", [0, 100, -1])
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_one_flipped_bit_is_seen(suffix: str, position: int, tmp_path: Path) -> None:
    make_run(tmp_path, suffix=suffix)
    shard = tmp_path / f"part-00001.{suffix}"
    content = bytearray(shard.read_bytes())
    content[position] ^= 1
    shard.write_bytes(content)
    _damaged(tmp_path, shard)


def test_a_missing_shard_is_seen(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "part-00002.parquet").unlink()
    _damaged(tmp_path, tmp_path / "part-00002.parquet")


def test_a_shard_in_the_place_of_another_is_seen(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "part-00001.parquet").write_bytes((tmp_path / "part-00000.parquet").read_bytes())
    _damaged(tmp_path, tmp_path / "part-00001.parquet")


def _damaged(run: Path, shard: Path) -> None:
    with pytest.raises(ClipmillError) as raised:
        read_run(run)
    assert str(raised.value) == (
        f"{shard} is missing or not the shard that was written: extract again with --overwrite"
    )


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused(version: Any, tmp_path: Path) -> None:
    make_run(tmp_path)
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json") | {"format_version": version})
    with pytest.raises(ClipmillError) as raised:
        read_run(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path / 'manifest.json'} has format version {version}, this clipmill reads 1: "
        "extract again with --overwrite"
    )


def test_overwrite_takes_a_run_of_another_format_version(tmp_path: Path) -> None:
    make_run(tmp_path)
    write_json(tmp_path / "manifest.json", read_json(tmp_path / "manifest.json") | {"format_version": 2})
    run = Run(tmp_path, 10, 4, "parquet", {"dataset": "birds"}, {})
    assert run.open(overwrite=True) == run.plan()
    assert names_in(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("manifest", [None, '{"name": "a web extension"}'])
def test_what_is_no_run_is_one_line(manifest: str | None, tmp_path: Path) -> None:
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ClipmillError) as raised:
        read_run(tmp_path)
    assert str(raised.value).startswith(f"no run at {tmp_path}: ")
    assert "python cli.py extract" in str(raised.value)


def test_a_damaged_manifest_is_one_line(tmp_path: Path) -> None:
    make_run(tmp_path)
    whole = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ClipmillError, match=r"cannot read .*manifest\.json: "):
        read_run(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(ClipmillError) as raised:
            make_run(tmp_path / "run")
    finally:
        tmp_path.chmod(0o755)
    assert str(raised.value).startswith(f"cannot write {tmp_path / 'run'}")
    assert str(raised.value).endswith(f": {os.strerror(errno.EACCES)}; see --output")
    assert names_in(tmp_path) == []
