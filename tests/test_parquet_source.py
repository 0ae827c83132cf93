"""parquet:PATH on files as Hugging Face writes them, and on plain binary columns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.datasets import Dataset, Sample, cifar10_sample
from engine.datasets.parquet import load
from engine.decode import BadImage
from engine.errors import ClipmillError

ROOT = Path(__file__).resolve().parents[1]
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def photographs(count: int) -> list[Sample]:
    return list(cifar10_sample.load("test").samples(0, count))


def hugging_face(columns: dict[str, Any], features: dict[str, Any]) -> pa.Table:
    table = pa.table(columns)
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def cifar(samples: list[Sample]) -> pa.Table:
    """As uoft-cs/cifar10 has it: img and label, the classes in the metadata."""
    images = pa.array([{"bytes": sample.image, "path": f"{sample.row}.png"} for sample in samples], IMAGE)
    features = {"img": {"_type": "Image"}, "label": {"names": list(NAMES), "_type": "ClassLabel"}}
    return hugging_face({"img": images, "label": pa.array([sample.label for sample in samples], pa.int64())}, features)


def rows(dataset: Dataset) -> list[Sample]:
    return list(dataset.samples(0, dataset.rows))


def outcome(sample: Sample) -> Any:
    return sample.image.error_class if isinstance(sample.image, BadImage) else sample.label


def write(path: Path, columns: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def test_hugging_face_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = photographs(30)
    pq.write_table(cifar(expected), tmp_path / "test 0.parquet", row_group_size=10)
    dataset = load(f"{tmp_path}/test 0.parquet")
    assert (dataset.name, dataset.slug) == (f"parquet:{tmp_path}/test 0.parquet", "parquet-test-0")
    assert (dataset.rows, dataset.split, dataset.class_names) == (30, "all", NAMES)
    assert (dataset.image_size, dataset.notes) == (None, ())
    found = rows(dataset)
    assert [(sample.image, sample.label) for sample in found] == [(sample.image, sample.label) for sample in expected]
    assert [sample.key for sample in found] == [f"test 0.parquet#{row}" for row in range(30)]
    assert dataset.labels().tolist() == [sample.label for sample in expected]
    assert dataset.labels().dtype == np.int64
    for start in range(31):
        for stop in range(start, 33):
            assert list(dataset.samples(start, stop)) == found[start:stop]
    monkeypatch.setenv("HOME", str(tmp_path))
    again = load("~/test 0.parquet")
    assert (rows(again), again.identity) == (found, dataset.identity)


def test_folder_and_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = photographs(12)
    for name, first in (("b/1.parquet", 4), ("a-0.parquet", 0), ("c.parquet", 8)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(cifar(expected[first : first + 4]), tmp_path / name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.parquet").touch()
    (tmp_path / "readme.txt").touch()
    dataset = load(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    relative, recursive, starred = load("."), load("**/*.parquet"), load("*.parquet")
    monkeypatch.chdir("/")
    assert [sample.image for sample in rows(dataset)] == [sample.image for sample in expected]
    assert [sample.key for sample in rows(dataset)][3:6] == ["a-0.parquet#3", "b/1.parquet#0", "b/1.parquet#1"]
    assert rows(dataset) == rows(relative) == rows(recursive)
    assert dataset.identity == relative.identity
    assert [sample.key for sample in rows(starred)][3:5] == ["a-0.parquet#3", "c.parquet#0"]
    for start in range(13):
        assert list(dataset.samples(start, start + 5)) == rows(dataset)[start : start + 5]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["image", "img", "jpg", "bytes", "whatever"])
def test_plain_binary(tmp_path: Path, kind: pa.DataType, name: str) -> None:
    dataset = load(write(tmp_path / "x.parquet", {"n": [1.5, 2.5], name: pa.array([b"a", b"b"], kind)}))
    assert [(sample.image, sample.label) for sample in rows(dataset)] == [(b"a", None), (b"b", None)]
    assert dataset.class_names == ()


def test_our_own_sample_is_read(tmp_path: Path) -> None:
    genuine = cifar10_sample.load("test")
    dataset = load(str(cifar10_sample.FOLDER / "test.parquet"))
    assert dataset.class_names == genuine.class_names
    assert [(sample.key, sample.label, sample.image) for sample in dataset.samples(300, 320)] == [
        (sample.key, sample.label, sample.image) for sample in genuine.samples(300, 320)
    ]
    np.testing.assert_array_equal(dataset.labels(), genuine.labels())


def test_the_column_is_chosen_by_metadata_then_name(tmp_path: Path) -> None:
    columns = {
        "thumb": pa.array([{"bytes": b"t", "path": ""}], IMAGE), "image": [b"i"], "photo": [b"p"],
        "coarse_label": [1], "fine_label": [0], "kind": [2],
    }  # fmt: skip
    names = {"_type": "ClassLabel", "names": ["a", "b", "c"]}
    path = tmp_path / "x.parquet"
    for features, image, label in (
        ({}, b"i", 0),
        ({"photo": {"_type": "Image"}, "kind": names}, b"p", 2),
        (
            {"thumb": {"_type": "Image"}, "image": {"_type": "Image"}, "coarse_label": names, "fine_label": names},
            b"i",
            0,
        ),
        ({"thumb": {"_type": "Image"}, "photo": {"_type": "Image"}, "coarse_label": names, "kind": names}, b"t", 1),
    ):
        pq.write_table(hugging_face(columns, features), path)
        dataset = load(str(path))
        assert [(sample.image, sample.label) for sample in rows(dataset)] == [(image, label)]
        assert dataset.class_names == (("a", "b", "c") if features else ())


def test_absent_bytes_are_an_empty_image(tmp_path: Path) -> None:
    values = [{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}, None, {"bytes": b"", "path": None}]
    dataset = load(write(tmp_path / "x.parquet", {"image": pa.array(values, IMAGE)}))
    assert [sample.image for sample in rows(dataset)] == [b"x", b"", b"", b""]


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (pa.array([1, None, 0], pa.int8()), [1, "missing-label", 0], ()),
        (pa.array([1, -1, -9], pa.int64()), [1, "missing-label", "bad-label"], ()),
        (pa.array([1, 2**40, 2**31 - 1], pa.int64()), [1, "bad-label", 2**31 - 1], ()),
        (pa.array([-1, None, -1], pa.int32()), [None, None, None], ()),
        (pa.array([2.0, float("nan"), None], pa.float64()), [2, "missing-label", "missing-label"], ()),
        (pa.array(["owl", "auk", None]), [1, 0, "missing-label"], ("auk", "owl")),
        (pa.array(["owl", "auk", "owl"]).dictionary_encode(), [1, 0, 1], ("auk", "owl")),
        (pa.array(["7", "3", ""], pa.large_string()), [7, 3, "missing-label"], ()),
    ],
)
def test_labels(tmp_path: Path, labels: pa.Array, expected: list[Any], names: tuple[str, ...]) -> None:
    dataset = load(write(tmp_path / "x.parquet", {"image": [b"a", b"b", b"c"], "label": labels}))
    assert [outcome(sample) for sample in rows(dataset)] == expected
    assert dataset.labels().tolist() == [label if isinstance(label, int) else -1 for label in expected]
    assert dataset.class_names == names


def test_label_outside_the_class_list(tmp_path: Path) -> None:
    table = cifar(photographs(3)).set_column(1, "label", pa.array([9, 10, -1]))
    table = table.replace_schema_metadata(cifar(photographs(1)).schema.metadata)
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = load(f"{tmp_path}/x.parquet")
    assert [outcome(sample) for sample in rows(dataset)] == [9, "bad-label", "missing-label"]
    assert dataset.labels().tolist() == [9, -1, -1]


def test_labels_of_no_use_are_told(tmp_path: Path) -> None:
    dataset = load(write(tmp_path / "x.parquet", {"image": [b"a"], "labels": [[1, 2]]}))
    assert dataset.labels().tolist() == [-1]
    assert dataset.notes == (
        'no labels: the column "labels" is list<element: int64>, neither numbers nor names',
    )  # fmt: skip


def test_keys(tmp_path: Path) -> None:
    path, images = tmp_path / "x.parquet", [b"a", b"b"]
    for columns, keys in (
        ({"key": ["x", "y"], "id": [1, 2]}, ["x", "y"]),
        ({"__key__": ["x", "ü"]}, ["x", "ü"]),
        ({"id": [7, 3]}, ["7", "3"]),
        ({"file_name": pa.array(["x", "y"], pa.large_string())}, ["x", "y"]),
        ({"id": [7, 7]}, ["x.parquet#0", "x.parquet#1"]),
        ({"key": [[1], [2]]}, ["x.parquet#0", "x.parquet#1"]),
    ):
        dataset = load(write(path, {"image": images, **columns}))
        assert [sample.key for sample in rows(dataset)] == keys
        assert dataset.notes == (('the column "id" is not unique, so keys are FILE#ROW',) * (columns == {"id": [7, 7]}))


def test_unusable_files(tmp_path: Path) -> None:
    good = cifar(photographs(4))
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    pq.write_table(good, tmp_path / "cut.parquet")
    os.truncate(tmp_path / "cut.parquet", 3000)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "text.parquet", {"image": ["a.jpg"], "label": [1]})
    write(tmp_path / "two.parquet", {"a": [b"a"], "b": [b"b"]})
    write(tmp_path / "none.parquet", {"image": pa.array([], pa.binary())})
    write(tmp_path / "paths.parquet", {"image": pa.array([{"bytes": None, "path": "a"}], IMAGE)})
    write(tmp_path / "twice.parquet", {"image": [b"a", b"b"], "key": ["k", "k"]})
    write(tmp_path / "half.parquet", {"image": [b"a"], "label": [1.5]})
    pq.write_table(
        hugging_face({"image": [b"a"]}, {}).replace_schema_metadata({"class_names": "3"}), tmp_path / "n.parquet"
    )
    for number, table in enumerate((good, good.rename_columns(["img", "labels"]))):
        pq.write_table(table, tmp_path / f"differ-{number}.parquet")
    for number in range(2):
        write(tmp_path / f"same-{number}.parquet", {"image": [b"a"], "key": ["k"]})
    wrong = {
        "": "there is no file",
        "/missing.parquet": "there is no file",
        "/none-*.parquet": "there is no file",
        "/folder": r"no \*\.parquet in the folder",
        "/junk.parquet": "cannot read",
        "/cut.parquet": "cannot read",
        "/text.parquet": r"no image column in .*\(image: string, label: int64\).*list:FILE",
        "/two.parquet": "no image column",
        "/none.parquet": "no rows in",
        "/paths.parquet": 'column "image" of .* holds no bytes',
        "/twice.parquet": 'column "key" in .* holds "k" twice',
        "/same-*.parquet": 'column "key" in .* holds "k" twice',
        "/half.parquet": 'column "label"',
        "/n.parquet": "no list of names",
        "/differ-*.parquet": r"differ-1\.parquet and .*differ-0\.parquet differ \(label",
    }
    for path, words in wrong.items():
        with pytest.raises(ClipmillError, match=words) as caught:
            load(f"{tmp_path}{path}" if path else "")
        assert "--dataset" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [None, [f"k{row}" for row in range(200)]])
def test_damage_costs_the_rest_of_its_row_group(tmp_path: Path, keys: list[str] | None) -> None:
    images = [os.urandom(1000) for _ in range(200)]
    path = tmp_path / "x.parquet"
    columns = {"image": images, "label": [row % 5 for row in range(200)], **({"key": keys} if keys else {})}
    options = {"row_group_size": 50, "use_dictionary": False, "compression": "snappy", "data_page_size": 10_000}
    write(path, columns, write_batch_size=5, write_page_checksum=True, **options)
    clean = rows(load(str(path)))
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset + column.total_compressed_size // 2)
        file.write(b"\xff" * 1200)
    dataset = load(str(path))
    found = rows(dataset)
    assert [sample.key for sample in found] == [sample.key for sample in clean]
    lost = [sample.row for sample in found if isinstance(sample.image, BadImage)]
    assert lost == list(range(lost[0], 150))
    assert 100 < lost[0] < 135
    assert {outcome(found[row]) for row in lost} == {"unreadable"}
    assert [sample for sample in found if sample.row not in lost] == [
        sample for sample in clean if sample.row not in lost
    ]
    for start, stop in ((0, 101), (99, 130), (lost[0] - 1, lost[0] + 1), (140, 145), (149, 151), (120, 200)):
        part = list(dataset.samples(start, stop))
        assert [(each.row, each.key, str(each.image)) for each in part] == [
            (each.row, each.key, str(each.image)) for each in found[start:stop]
        ]


READ_ALL = """
import sys
from engine.datasets.parquet import load
def peak():
    # of this program alone: getrusage() would count what the process that started it held
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
dataset = load(sys.argv[1])
before = peak()
print(sum(len(sample.image) for sample in dataset.samples(0, dataset.rows)), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    """400 MB in one row group; a pandas user has all the rows in one."""
    noise = os.urandom(1 << 20)
    image = pa.array([{"bytes": noise, "path": "x"}] * 20, IMAGE)  # a page: the writer cuts where a chunk ends
    path = tmp_path / "x.parquet"
    table = pa.table({"image": pa.chunked_array([image] * 20), "key": [str(row) for row in range(400)]})
    pq.write_table(table, path, row_group_size=400, use_dictionary=False, compression="snappy")
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    command = [sys.executable, "-c", READ_ALL, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    read, growth = map(int, done.stdout.split())
    assert read == 400 << 20
    assert growth < 128 << 20
