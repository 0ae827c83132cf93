"""food101 from a genuine archive made small, through torchvision's own reader."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from archives import assert_a_sound_dataset, everything, jpeg, md5, photographs, serving

from engine.datasets import dataset_table, food101, get_dataset, open_dataset
from engine.datasets.download import Archive
from engine.decode import decode
from engine.errors import ClipmillError

torchvision = pytest.importorskip("torchvision.datasets")
pytest.importorskip("pooch")
META: dict[str, dict[str, list[str]]] = {  # as published: neither classes nor images are sorted
    "train": {"churros": ["churros/30", "churros/4"], "apple_pie": ["apple_pie/7", "apple_pie/11"]},
    "test": {"churros": ["churros/5"], "apple_pie": ["apple_pie/6", "apple_pie/100"]},
}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server with an archive of 4 train and 3 test images."""
    tree = tmp_path / "food-101"
    (tree / "meta").mkdir(parents=True)
    pixels = iter(photographs("train", 7))
    for split, classes in META.items():
        (tree / "meta" / f"{split}.json").write_text(json.dumps(classes))
        for size, name in enumerate((name for names in classes.values() for name in names), start=40):
            (tree / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / "images" / f"{name}.jpg").write_bytes(jpeg(next(pixels), size))
    path = tmp_path / "published" / "food-101.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tree, "food-101")
    with serving(path.parent) as url:
        monkeypatch.setattr(food101, "ARCHIVE", Archive(path.name, (f"{url}/{path.name}",), md5(path)))
        yield path


@pytest.mark.usefixtures("published")
def test_splits_have_the_images_labels_and_names_of_the_archive(tmp_path: Path) -> None:
    data = tmp_path / "data"
    dataset = open_dataset("food101", "all", data_dir=data)
    assert (dataset.rows, dataset.image_size, dataset.class_names) == (7, None, ("apple_pie", "churros"))
    samples = list(dataset.samples(0, 7))
    assert [sample.key for sample in samples] == [
        "food101/churros/30", "food101/churros/4", "food101/apple_pie/7", "food101/apple_pie/11",
        "food101/churros/5", "food101/apple_pie/6", "food101/apple_pie/100",
    ]  # fmt: skip
    assert [sample.label for sample in samples] == [1, 1, 0, 0, 1, 0, 0]
    assert [sample.image for sample in samples[:2]] == [
        data / "food-101" / "images" / "churros" / name for name in ("30.jpg", "4.jpg")
    ]
    assert [decode(sample.image).shape[0] for sample in samples] == [40, 41, 42, 43, 40, 41, 42]
    for split in ("train", "test", "all"):
        assert_a_sound_dataset(*(open_dataset("food101", split, data_dir=data) for _ in range(2)))


def test_opening_it_reads_no_image(published: Path, tmp_path: Path) -> None:
    get_dataset("food101", tmp_path)
    for image in (tmp_path / "food-101" / "images").rglob("*.jpg"):
        image.write_bytes(b"")
    assert len(list(open_dataset("food101", "train", data_dir=tmp_path).samples(0, 9))) == 4


def test_what_is_downloaded_is_not_downloaded_again(published: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"

    def cached() -> bool | None:
        return {row.name: row.cached for row in dataset_table(data)}["food101"]

    assert cached() is False
    assert get_dataset("food101", data) == data / "food-101"
    for archive in (published, data / "food-101.tar.gz"):
        archive.unlink()
    assert cached() is True
    assert open_dataset("food101", data_dir=data, download=False).rows == 3
    assert get_dataset("food101", data) == data / "food-101"


def test_an_image_that_is_gone_is_a_row_all_the_same_and_get_says_so(published: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    get_dataset("food101", data)
    (data / "food-101" / "images" / "churros" / "4.jpg").unlink()
    assert open_dataset("food101", "train", data_dir=data).rows == 4
    with pytest.raises(ClipmillError, match=rf"1 of its 7 images are missing, .*4\.jpg.*remove {data / 'food-101'}"):
        get_dataset("food101", data)


@pytest.mark.parametrize("damage", ["", "{"])
def test_a_damaged_folder_is_named(damage: str, published: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    meta = get_dataset("food101", data) / "meta"
    (meta / "test.json").write_text(damage)
    with pytest.raises(ClipmillError, match=rf"{data / 'food-101'} is not as published .* remove it"):
        open_dataset("food101", data_dir=data)
    (meta / "test.json").unlink()
    with pytest.raises(ClipmillError, match="is not as published"):
        open_dataset("food101", data_dir=data)


def test_what_cannot_be_had(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    put = rf"put food-101\.tar\.gz from http://.*/food-101\.tar\.gz into {data}"
    with pytest.raises(ClipmillError, match=rf"{put}.*--no-download"):
        open_dataset("food101", data_dir=data, download=False)
    published.write_bytes(b"something else")
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("an archive was opened"))
    with pytest.raises(ClipmillError, match=rf"checksum differs.*{put}.*--data-dir"):
        open_dataset("food101", data_dir=data)
    assert everything(data) == set()


def test_address_and_checksum_are_those_of_torchvision() -> None:
    reader: Any = torchvision.Food101
    assert (food101.ARCHIVE.urls, food101.ARCHIVE.md5) == ((reader._URL,), reader._MD5)
