"""Extraction end to end on the embedded model: what is written, and that how it was computed leaves no trace in it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import NOT_AN_IMAGE, contents, one_by_one, pictures, settings, watched
from PIL import Image
from threads import no_thread_left

from engine.bundle import Bundle
from engine.datasets import Sample, open_dataset
from engine.decode import BadImage, decode
from engine.errors import ClipmillError
from engine.manifest import read_manifest, read_run
from engine.shards import Reject, embeddings_of, read_table
from engine.stream import extract


def test_the_embedded_sample_row_by_row(mini: Bundle, tmp_path: Path) -> None:
    dataset = open_dataset("cifar10-sample", "test", limit=100)
    manifest = extract(mini, dataset, tmp_path / "run", settings(batch_size=16, shard_size=30))
    stored, table = read_run(tmp_path / "run")
    samples = list(dataset.samples(0, 100))
    decoded = [np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB")) for sample in samples]
    np.testing.assert_array_equal(embeddings_of(table), one_by_one(mini, decoded))
    assert table["row"].to_pylist() == list(range(100))
    assert table["key"].to_pylist() == [sample.key for sample in samples]
    assert table["label"].to_pylist() == [sample.label for sample in samples]
    assert set(table["split"].to_pylist()) == {"test"}
    assert len(set(table["label"].to_pylist())) == 10  # a shuffled or shifted label column could not hide
    np.testing.assert_allclose(np.linalg.norm(embeddings_of(table), axis=1), 1, atol=1e-6)
    assert manifest == stored == read_manifest(tmp_path / "run")
    assert (manifest["status"], manifest["written"], manifest["rejected"]) == ("complete", 100, 0)
    ranges = [(shard["file"], shard["start"], shard["stop"], shard["rows"]) for shard in manifest["shards"]]
    assert ranges == [
        ("part-00000.parquet", 0, 30, 30),
        ("part-00001.parquet", 30, 60, 30),
        ("part-00002.parquet", 60, 90, 30),
        ("part-00003.parquet", 90, 100, 10),
    ]
    assert read_table(tmp_path / "run" / "part-00003.parquet")["row"].to_pylist() == list(range(90, 100))
    listed = {file.name for file in (tmp_path / "run").iterdir()}
    assert listed == {"manifest.json", *(name for name, *_ in ranges)}


def test_digits_keep_their_size_until_the_graph(mini: Bundle, tmp_path: Path) -> None:
    dataset = open_dataset("digits", "test", limit=50)
    extract(mini, dataset, tmp_path / "run", settings())
    _, table = read_run(tmp_path / "run")
    samples = list(dataset.samples(0, 50))
    assert {sample.image.shape for sample in samples} == {(8, 8, 3)}
    np.testing.assert_array_equal(embeddings_of(table), one_by_one(mini, [sample.image for sample in samples]))
    assert table["label"].to_pylist() == [sample.label for sample in samples]
    assert table["key"].to_pylist()[:2] == ["digits/1297", "digits/1298"]


def test_the_schema_says_what_the_rows_are(mini: Bundle, tmp_path: Path) -> None:
    extract(mini, pictures(5), tmp_path / "run", settings())
    _, table = read_run(tmp_path / "run")
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert json.loads(metadata.pop("class_names")) == ["none", "one", "zwei ✓"]
    assert metadata == {
        "dataset": "pictures",
        "split": "test",
        "bundle": mini.fingerprint,
        "model": "mini",
        "precision": "fp32",
        "normalised": "true",
        "engine_version": read_manifest(tmp_path / "run")["engine_version"],
    }
    assert table["label"].to_pylist() == [None, 1, 2, None, 1]


def test_a_run_knows_its_bundle_and_what_its_bytes_depend_on(mini: Bundle, tmp_path: Path) -> None:
    manifest = extract(mini, pictures(5), tmp_path / "run", settings(shard_size=3))
    assert manifest["bundle"] == {"name": "mini", "model": "mini"}
    assert manifest["plan"] == {"rows": 5, "shard_size": 3}
    assert manifest["fingerprint"] == {
        "bundle": mini.fingerprint,
        "provider": "cpu",
        "dataset": "pictures",
        "split": "test",
        "rows": 5,
        "data": {"noise": 1},
        "classes": None,
        "sample": None,
        "seed": None,
        "limit": None,
        "dtype": "float32",
        "format": "parquet",
        "max_pixels": 89_478_485,
        "shard_size": 3,
        "batch_size": 7,
    }


def test_the_rows_of_a_subset_keep_their_positions_in_the_source(mini: Bundle, tmp_path: Path) -> None:
    whole, rows = pictures(30), [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]

    def samples(start: int, stop: int) -> Iterator[Sample]:
        for row in rows[start:stop]:
            yield from whole.samples(row, row + 1)

    subset = dataclasses.replace(whole, rows=len(rows), samples=samples)
    extract(mini, whole, tmp_path / "whole", settings())
    manifest = extract(mini, subset, tmp_path / "subset", settings(batch_size=3, shard_size=4))
    _, table = read_run(tmp_path / "subset")
    assert table["row"].to_pylist() == rows
    np.testing.assert_array_equal(embeddings_of(table), embeddings_of(read_run(tmp_path / "whole")[1])[rows])
    assert [shard["rows"] for shard in manifest["shards"]] == [4, 4, 2]


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_lanes_workers_and_batch_size_leave_no_trace(form: str, mini: Bundle, tmp_path: Path) -> None:
    dataset = pictures(64, {5: NOT_AN_IMAGE, 27: b"", 28: b"", 63: NOT_AN_IMAGE})
    written = {}
    for lanes, workers in ((1, 4), (2, 1), (4, 2)):
        for batch_size in (1, 7, 8, 32):
            choice = {"threads": lanes, "workers": workers, "batch_size": batch_size}
            run = tmp_path / "-".join(map(str, choice.values()))
            extract(mini, dataset, run, settings(**choice, format=form, shard_size=27))
            files = contents(run)
            del files["manifest.json"]  # it says which batch size it was
            written[run.name] = files
    expected = written["1-4-1"]
    assert sorted(expected) == [f"part-0000{shard}.{form}" for shard in range(3)] + ["rejects.parquet"]
    for name, files in written.items():
        assert files == expected, name

    _, table = read_run(tmp_path / "4-2-8")
    good = [row for row in range(64) if row not in (5, 27, 28, 63)]
    assert table["row"].to_pylist() == good
    images = [sample.image for sample in dataset.samples(0, 64)]
    np.testing.assert_array_equal(embeddings_of(table), one_by_one(mini, [images[row] for row in good]))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_the_same_run_twice_is_the_same_bytes(form: str, mini: Bundle, tmp_path: Path) -> None:
    dataset = pictures(40, {3: NOT_AN_IMAGE, 38: b""})
    for name in ("one", "two"):
        extract(mini, dataset, tmp_path / name, settings(format=form, shard_size=16))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert len(one) == 3 + 2


def test_float16_is_the_float32_rounded(mini: Bundle, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        extract(mini, pictures(10), tmp_path / dtype, settings(dtype=dtype))
    single, half = (embeddings_of(read_run(tmp_path / dtype)[1]) for dtype in ("float32", "float16"))
    assert (single.dtype, half.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(half, single.astype(np.float16))


# Bad images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """Sound images of four sizes, and three kinds of bad ones between them; sorted as they are written here."""
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    (folder / "dog").mkdir()
    rng = np.random.default_rng(5)

    def save(name: str, height: int, width: int) -> bytes:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
        return (folder / name).read_bytes()

    save("cat/0.png", 40, 60)
    whole = save("cat/1.jpg", 80, 50)
    (folder / "cat/1.jpg").write_bytes(whole[: len(whole) // 2])
    save("cat/2.jpg", 33, 32)
    (folder / "cat/3.jpg").write_text("this is no picture\n")
    (folder / "dog/4.jpg").touch()
    save("dog/5.png", 10, 12)
    save("dog/6.png", 32, 32)
    save("top.png", 64, 20)
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 3])  # with 3, a bad image lies between two good ones of its batch
def test_bad_images_are_rejected_one_by_one(batch_size: int, mini: Bundle, mixed_folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(f"folder:{mixed_folder}")
    manifest = extract(mini, dataset, tmp_path / "run", settings(batch_size=batch_size, shard_size=3))
    _, table = read_run(tmp_path / "run")
    good = ["cat/0.png", "cat/2.jpg", "dog/5.png", "dog/6.png"]
    assert table["key"].to_pylist() == good
    assert table["row"].to_pylist() == [0, 2, 5, 6]
    assert table["label"].to_pylist() == [0, 0, 1, 1]
    decoded = [decode(mixed_folder / key, (32, 32)) for key in good]
    np.testing.assert_array_equal(embeddings_of(table), one_by_one(mini, decoded))

    with pytest.raises(BadImage) as truncated:
        decode(mixed_folder / "cat/1.jpg")
    assert read_table(tmp_path / "run" / "rejects.parquet").to_pylist() == [
        {"row": 1, "key": "cat/1.jpg", "error": "truncated", "message": truncated.value.message},
        {
            "row": 3,
            "key": "cat/3.jpg",
            "error": "not-an-image",
            "message": "no known image format, or its header is damaged",
        },
        {"row": 4, "key": "dog/4.jpg", "error": "empty", "message": "zero bytes"},
        {"row": 7, "key": "top.png", "error": "missing-label", "message": "has no label, though others have one"},
    ]
    assert (manifest["written"], manifest["rejected"], manifest["plan"]["rows"]) == (4, 4, 8)
    assert [(shard["rows"], shard["rejects"]) for shard in manifest["shards"]] == [(2, 1), (1, 2), (1, 1)]


def test_an_image_unlike_the_rest_of_its_dataset_is_rejected(mini: Bundle, tmp_path: Path) -> None:
    odd = np.zeros((24, 16, 3), dtype=np.uint8)
    extract(mini, pictures(4, {2: odd}), tmp_path / "run", settings())
    (reject,) = read_table(tmp_path / "run" / "rejects.parquet").to_pylist()
    assert reject == vars(Reject(2, "noise/002", "bad-size", "is 16x24, unlike the rest of its dataset"))


def test_nothing_but_bad_images_is_a_complete_run_of_no_rows(mini: Bundle, tmp_path: Path) -> None:
    manifest = extract(mini, pictures(10, dict.fromkeys(range(10), b"")), tmp_path / "run", settings(shard_size=4))
    _, table = read_run(tmp_path / "run")
    assert (manifest["status"], manifest["written"], manifest["rejected"]) == ("complete", 0, 10)
    assert table.num_rows == 0
    assert table.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32(), nullable=False), 128)
    assert embeddings_of(table).shape == (0, 128)
    assert read_table(tmp_path / "run" / "rejects.parquet")["row"].to_pylist() == list(range(10))


def test_a_shard_of_nothing_but_bad_images(mini: Bundle, tmp_path: Path) -> None:
    bad = dict.fromkeys(range(10, 20), NOT_AN_IMAGE)
    manifest = extract(mini, pictures(25, bad), tmp_path / "run", settings(shard_size=10))
    extract(mini, pictures(25), tmp_path / "whole", settings(shard_size=10))
    assert [(shard["rows"], shard["rejects"]) for shard in manifest["shards"]] == [(10, 0), (0, 10), (5, 0)]
    _, table = read_run(tmp_path / "run")
    assert table["row"].to_pylist() == [*range(10), *range(20, 25)]
    everything = embeddings_of(read_run(tmp_path / "whole")[1])
    np.testing.assert_array_equal(embeddings_of(table), everything[table["row"].to_numpy()])


def test_on_error_fail_names_the_image_and_leaves_a_run_to_resume(mini: Bundle, tmp_path: Path) -> None:
    dataset = pictures(30, {17: NOT_AN_IMAGE, 18: b""})
    with no_thread_left(), pytest.raises(ClipmillError) as raised:
        extract(mini, dataset, tmp_path / "run", settings(shard_size=8, fail_on_error=True))
    assert str(raised.value) == (
        "row 17, noise/017, is not-an-image: no known image format, or its header is damaged; "
        "--on-error reject goes on without it"
    )
    assert read_manifest(tmp_path / "run")["status"] == "running"
    assert not (tmp_path / "run" / "rejects.parquet").exists()
    read: list[int] = []
    extract(mini, watched(dataset, read.append), tmp_path / "run", settings(shard_size=8))
    assert read == list(range(16, 30))
    extract(mini, dataset, tmp_path / "straight", settings(shard_size=8))
    assert contents(tmp_path / "run") == contents(tmp_path / "straight")


def test_tall_images_of_one_size_are_resized_as_pillow_resizes_them(mini: Bundle, tmp_path: Path) -> None:
    """From version 13 on Pillow takes the vertical pass first for some of these, which the graph never does."""
    dataset = pictures(4, size=(100, 40))
    extract(mini, dataset, tmp_path / "run", settings())
    decoded = [decode(sample.image, (32, 32)) for sample in dataset.samples(0, 4)]
    _, table = read_run(tmp_path / "run")
    np.testing.assert_array_equal(embeddings_of(table), one_by_one(mini, decoded))
