"""open_dataset() of named datasets: fixed order, stable keys, honest counts, errors that say which flag mends what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources import SOURCES

from engine.datasets import Dataset, Sample, cifar10_sample, dataset_table, get_dataset, open_dataset
from engine.decode import decode
from engine.errors import ClipmillError


def rows_of(dataset: Dataset) -> list[Sample]:
    return list(dataset.samples(0, dataset.rows))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files laid out as the embedded sample's: 25 and 12 rows, row groups of 7."""
    for split, rows in (("train", 25), ("test", 12)):
        table = pa.table(
            {
                "label": pa.array([row % 3 for row in range(rows)], pa.int32()),
                "key": [f"{split}/{row:03d}" for row in range(rows)],
                "image": pa.array([bytes([row]) * 9 for row in range(rows)], pa.binary()),
            }
        ).replace_schema_metadata({"class_names": json.dumps(["cat", "dog", "ox, or cow"])})
        pq.write_table(table, tmp_path / f"{split}.parquet", row_group_size=7)
    monkeypatch.setattr(cifar10_sample, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("limit", [None, 30])
def test_any_range_is_a_slice_of_the_whole(limit: int | None) -> None:
    dataset = open_dataset("cifar10-sample", "all", limit)
    whole = rows_of(dataset)
    assert len(whole) == dataset.rows == (limit or 37)
    for start in range(0, 41, 3):
        for stop in range(0, 41, 4):
            assert list(dataset.samples(start, stop)) == whole[start:stop]


@pytest.mark.usefixtures("stand_in")
def test_all_joins_train_and_test() -> None:
    train, test, both = (open_dataset("cifar10-sample", split) for split in ("train", "test", "all"))
    assert [sample.row for sample in rows_of(both)] == list(range(37))
    assert [sample.split for sample in rows_of(both)] == ["train"] * 25 + ["test"] * 12
    assert [sample.key for sample in rows_of(both)] == [sample.key for sample in rows_of(train) + rows_of(test)]
    assert (train.split, test.split, both.split) == ("train", "test", "all")
    assert both.class_names == train.class_names == ("cat", "dog", "ox, or cow")
    assert both.identity == {"train": train.identity, "test": test.identity}
    assert train.identity != test.identity
    assert rows_of(test)[11] == Sample(row=11, key="test/011", split="test", label=2, image=b"\x0b" * 9)


def test_only_the_row_groups_of_the_range_are_read(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Watched(pq.ParquetFile):  # type: ignore[misc]
        def read_row_group(self, index: int, **options: object) -> pa.Table:
            read.append(index)
            return super().read_row_group(index, **options)

    dataset = open_dataset("cifar10-sample", "train")
    monkeypatch.setattr(pq, "ParquetFile", Watched)
    assert [sample.row for sample in dataset.samples(8, 15)] == list(range(8, 15))
    assert read == [1, 2]


def test_identity_follows_the_bytes(stand_in: Path) -> None:
    before = open_dataset("cifar10-sample").identity
    assert open_dataset("cifar10-sample").identity == before
    table = pq.read_table(stand_in / "test.parquet")
    pq.write_table(table.slice(1), stand_in / "test.parquet")
    assert open_dataset("cifar10-sample").identity != before


def test_missing_and_broken_sample(stand_in: Path) -> None:
    (stand_in / "train.parquet").unlink()
    (stand_in / "test.parquet").write_bytes(b"PAR1 and no more")
    for split in ("train", "test"):
        with pytest.raises(
            ClipmillError, match=rf"cifar10-sample: cannot read .*{split}\.parquet.*--dataset"
        ) as caught:
            open_dataset("cifar10-sample", split)
        assert "\n" not in str(caught.value)


def test_embedded_sample() -> None:
    keys = set()
    for split, rows in (("train", 4000), ("test", 1000)):
        dataset = open_dataset("cifar10-sample", split)
        samples = rows_of(dataset)
        assert dataset.rows == len(samples) == rows
        assert Counter(sample.label for sample in samples) == dict.fromkeys(range(10), rows // 10)
        assert dataset.class_names[3] == "cat"
        for sample in samples[::97]:
            assert decode(sample.image).shape == (32, 32, 3)
        assert dataset.image_size == (32, 32)
        keys |= {sample.key for sample in samples}
    assert len(keys) == 5000


def test_digits() -> None:
    from sklearn.datasets import load_digits

    reference = load_digits()
    dataset = open_dataset("digits", "all")
    samples = rows_of(dataset)
    pixels = np.stack([decode(sample.image) for sample in samples])
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1797, 8, 8, 3)
    assert np.abs(pixels - reference.images[..., None] * 255 / 16).max() <= 0.5
    assert pixels.max() == 255
    assert [sample.label for sample in samples] == reference.target.tolist()
    assert [sample.split for sample in samples] == ["train"] * 1297 + ["test"] * 500
    assert [sample.key for sample in samples] == [f"digits/{row:04d}" for row in range(1797)]
    assert dataset.class_names[9] == "digit 9"
    test = open_dataset("digits")
    assert (test.split, test.rows, test.image_size, test.slug) == ("test", 500, (8, 8), "digits")
    assert [(sample.row, sample.key) for sample in test.samples(3, 5)] == [(3, "digits/1300"), (4, "digits/1301")]
    assert test.identity == open_dataset("digits", "test").identity
    json.dumps(dataset.identity)


def test_limit_takes_the_first_rows() -> None:
    dataset = open_dataset("digits", "all", limit=1300)
    assert dataset.rows == len(list(dataset.samples(0, 10_000))) == 1300
    assert [sample.split for sample in dataset.samples(1295, 1299)] == ["train", "train", "test", "test"]
    assert dataset.labels().tolist() == [sample.label for sample in rows_of(dataset)]
    assert open_dataset("digits", limit=10_000).rows == 500


@pytest.mark.parametrize(
    ("name", "split", "limit", "words"),
    [
        ("imagenet", None, None, ["imagenet", "--dataset", "cifar10-sample", "digits", "folder:PATH"]),
        ("Digit", None, None, ["--dataset", 'did you mean "digits"?']),
        ("cifar10-smaple", None, None, ['did you mean "cifar10-sample"?']),
        ("foldr:birds", None, None, ['did you mean "folder:PATH"?']),
        ("", None, None, ["--dataset"]),
        ("digits", "validation", None, ["validation", "--split", "train", "test", "all"]),
        ("digits", None, 0, ["--limit"]),
        ("digits", None, -3, ["--limit -3"]),
    ],
)
def test_wrong_usage(name: str, split: str | None, limit: int | None, words: list[str]) -> None:
    with pytest.raises(ClipmillError) as caught:
        open_dataset(name, split, limit)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_table_says_what_opening_finds() -> None:
    table = {info.name: info for info in dataset_table()}
    assert [name for name in table if ":" not in name] == [
        "cifar10-sample", "digits", "cifar10", "cifar100", "mnist", "food101", "tiny-imagenet",
    ]  # fmt: skip
    assert table["digits"].cached is True
    assert table["folder:PATH"].cached is None
    digits = table["digits"]
    for split, rows in digits.splits.items():
        dataset = open_dataset("digits", split)
        assert (dataset.rows, len(dataset.class_names)) == (rows, digits.classes)
        assert dataset.image_size == digits.image_size


def test_table_tells_what_is_cached_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached() -> set[str]:
        return {info.name for info in dataset_table(tmp_path) if info.cached} - {"cifar10-sample", "digits"}

    assert cached() == set()
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "food-101.tar.gz").touch()
    assert cached() == {"cifar100", "food101"}
    monkeypatch.setenv("CLIPMILL_DATA_DIR", str(tmp_path))
    assert {info.name for info in dataset_table() if info.cached} >= {"cifar100", "food101"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits", "digits comes with the project"),
        ("folder:birds", "your own data"),
        ("cifar1", 'did you mean "cifar10"?'),
    ],
)
def test_what_there_is_nothing_to_get_of(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ClipmillError) as caught:
        get_dataset(name, tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_generic_path_loads_no_training_framework(tmp_path: Path) -> None:
    sources = []
    for scheme, (make, *_) in SOURCES.items():
        (tmp_path / scheme).mkdir()
        sources.append(make(tmp_path / scheme))
    code = """
import sys
from engine.datasets import open_dataset
from engine.decode import decode
for name in ("digits", "cifar10-sample", *sys.argv[1:]):
    for sample in open_dataset(name).samples(0, 3):
        decode(sample.image, (32, 32))
print(*sorted({"torch", "torchvision", "transformers", "onnxruntime", "webdataset"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *sources],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert done.stdout.strip() == ""
