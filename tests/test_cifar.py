"""cifar10 and cifar100 from genuine archives made small, through torchvision's own checks."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archives import assert_a_sound_dataset, everything, md5, photographs, serving

from engine.datasets import cifar, dataset_table, get_dataset, open_dataset
from engine.decode import decode
from engine.errors import ClipmillError

torchvision = pytest.importorskip("torchvision.datasets")
pytest.importorskip("pooch")
NAMES = ["apple", "aquarium_fish", "baby"]
COARSE_NAMES = ["fish", "people"]
ROWS = {"train": 7, "test": 5}


def batch(split: str, first: int, last: int) -> dict[str, Any]:
    pixels = photographs(split, ROWS[split])[first:last]
    return {"data": pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)}


def publish(reader: Any, contents: dict[str, Any], tests: set[str], folder: Path, monkeypatch: Any) -> None:
    """Make an archive of pickles that torchvision's `reader` takes for the published one; `folder` is served."""
    unpacked = folder.parent / reader.base_folder
    unpacked.mkdir()
    for name, content in contents.items():
        (unpacked / name).write_bytes(pickle.dumps(content))
    with tarfile.open(folder / reader.filename, "w:gz") as tar:
        tar.add(unpacked, reader.base_folder)
    listed = [[name, md5(unpacked / name)] for name in contents if name != reader.meta["filename"]]
    monkeypatch.setattr(reader, "tgz_md5", md5(folder / reader.filename))
    monkeypatch.setattr(reader, "train_list", [entry for entry in listed if entry[0] not in tests])
    monkeypatch.setattr(reader, "test_list", [entry for entry in listed if entry[0] in tests])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": md5(unpacked / reader.meta["filename"])})


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server with both archives, which hold 7 train and 5 test images."""
    folder = tmp_path / "published"
    folder.mkdir()
    cifar10 = {
        "data_batch_1": {**batch("train", 0, 4), "labels": [0, 1, 2, 0]},
        "data_batch_2": {**batch("train", 4, 7), "labels": [1, 2, 0]},
        "test_batch": {**batch("test", 0, 5), "labels": [0, 1, 2, 0, 1]},
        "batches.meta": {"label_names": NAMES},
    }
    cifar100 = {
        split: {
            **batch(split, 0, rows),
            "fine_labels": [row % 3 for row in range(rows)],
            "coarse_labels": [int(row % 3 == 2) for row in range(rows)],
        }
        for split, rows in ROWS.items()
    } | {"meta": {"fine_label_names": NAMES, "coarse_label_names": COARSE_NAMES}}
    publish(torchvision.CIFAR10, cifar10, {"test_batch"}, folder, monkeypatch)
    publish(torchvision.CIFAR100, cifar100, {"test"}, folder, monkeypatch)
    with serving(folder) as url:
        for reader in (torchvision.CIFAR10, torchvision.CIFAR100):
            monkeypatch.setattr(reader, "url", f"{url}/{reader.filename}")
        yield folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIPMILL_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.usefixtures("published", "data")
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_splits_have_the_images_labels_and_names_of_the_archive(name: str) -> None:
    dataset = open_dataset(name, "all")
    assert (dataset.rows, dataset.image_size, dataset.class_names) == (12, (32, 32), tuple(NAMES))
    samples = list(dataset.samples(0, 12))
    assert [sample.label for sample in samples] == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert samples[6].key == f"{name}/train/00006"
    assert samples[7].key == f"{name}/test/00000"
    expected = np.concatenate([photographs("train", 7), photographs("test", 5)])
    np.testing.assert_array_equal(np.stack([decode(sample.image) for sample in samples]), expected)
    assert [sample.row for sample in open_dataset(name).samples(2, 4)] == [2, 3]
    for split in ("train", "test", "all"):
        assert_a_sound_dataset(open_dataset(name, split), open_dataset(name, split))
    assert open_dataset(name, "all", 9).labels().tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1]


@pytest.mark.usefixtures("published", "data")
def test_superclasses_are_a_further_label_column() -> None:
    assert open_dataset("cifar10").label_columns == {}
    for split, rows in {**ROWS, "all": 12}.items():
        dataset = open_dataset("cifar100", split)
        assert dataset.label_columns == {"coarse_label": tuple(COARSE_NAMES)}
        for sample in dataset.samples(0, rows):
            assert sample.more_labels == {"coarse_label": int(sample.label == 2)}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_what_is_downloaded_is_not_downloaded_again(name: str, published: Path, data: Path) -> None:
    def cached() -> bool | None:
        return {row.name: row.cached for row in dataset_table()}[name]

    assert cached() is False
    first = open_dataset(name)
    for archive in (published / cifar.ARCHIVES[name], data / cifar.ARCHIVES[name]):
        archive.unlink()
    assert open_dataset(name, download=False).identity == first.identity
    assert get_dataset(name) == data / cifar.FOLDERS[name]
    assert cached() is True
    assert everything(data).isdisjoint(cifar.ARCHIVES.values())


def test_a_damaged_file_is_unpacked_again(published: Path, data: Path) -> None:
    get_dataset("cifar100")
    (published / "cifar-100-python.tar.gz").unlink()
    for damage in ("train", "meta"):
        (data / "cifar-100-python" / damage).write_bytes(b"half a fi")
        dataset = open_dataset("cifar100", "train", download=False)
        assert (dataset.rows, dataset.class_names) == (7, tuple(NAMES))


def test_no_download_says_which_file_to_put_where(published: Path, data: Path) -> None:
    put = rf"put cifar-100-python\.tar\.gz from http://.*/cifar-100-python\.tar\.gz into {data}"
    with pytest.raises(ClipmillError, match=rf"{put}.*--no-download"):
        open_dataset("cifar100", download=False)
    (published / "cifar-100-python.tar.gz").unlink()
    with pytest.raises(ClipmillError, match=rf"404.*{put}.*--data-dir"):
        open_dataset("cifar100")
    assert everything(data) == set()


def test_an_archive_put_there_by_hand_is_taken(published: Path, tmp_path: Path) -> None:
    (published / "cifar-100-python.tar.gz").rename(tmp_path / "cifar-100-python.tar.gz")
    (tmp_path / "cifar-100-python" / "test").unlink()  # half of what the archive holds is already there
    dataset = open_dataset("cifar100", data_dir=tmp_path, download=False)
    assert dataset.rows == 5


@pytest.mark.usefixtures("published")
def test_an_archive_that_is_not_the_published_one_is_not_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.CIFAR100, "tgz_md5", "0" * 32)
    for function in ("load", "loads"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("a pickle was opened"))
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("an archive was opened"))
    with pytest.raises(ClipmillError, match="checksum differs"):
        open_dataset("cifar100")
    assert everything(data) == set()


@pytest.mark.usefixtures("published")
def test_a_pickle_that_changes_after_its_check_is_not_opened(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get_dataset("cifar100")
    reader_init = torchvision.CIFAR100.__init__

    def changed(*arguments: Any, **options: Any) -> None:
        reader_init(*arguments, **options)
        (data / "cifar-100-python" / "test").write_bytes(pickle.dumps({"coarse_labels": [0]}))

    monkeypatch.setattr(torchvision.CIFAR100, "__init__", changed)
    with pytest.raises(ClipmillError, match="the checksum of test differs"):
        open_dataset("cifar100")


def test_names_of_files_are_those_of_torchvision() -> None:
    for name, reader in (("cifar10", torchvision.CIFAR10), ("cifar100", torchvision.CIFAR100)):
        assert cifar.ARCHIVES[name] == reader.filename
        assert cifar.FOLDERS[name] == reader.base_folder
