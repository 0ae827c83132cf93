"""tiny-imagenet from a genuine zip file made small."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from archives import assert_a_sound_dataset, everything, jpeg, md5, photographs, serving

from engine.datasets import dataset_table, get_dataset, open_dataset, tiny_imagenet
from engine.datasets.download import Archive
from engine.decode import decode
from engine.errors import ClipmillError

pytest.importorskip("pooch")
TOP = "tiny-imagenet-200"
WORDS = {  # sorted by id; the archive lists them otherwise, and knows words for ids that it has no images of
    "n01443537": "goldfish, Carassius auratus",
    "n02012849": "crane",
    "n03126707": "crane",
    "n03710637": "maillot",
    "n03710721": "maillot, tank suit",
}
VAL = ["n03710721", "n01443537", "n03126707"]
TRAIN = {"n03710637": [0], "n01443537": [10, 9, 100], "n02012849": [3], "n03126707": [2], "n03710721": [1]}


def members() -> dict[str, bytes]:
    """What the archive holds: 7 train images, 3 labelled ones, one without a label."""
    pixels = iter(photographs("train", 11))
    words = ["n00001740\tentity", *(f"{wnid}\t{words}" for wnid, words in reversed(WORDS.items()))]
    notes = [f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62" for number, wnid in enumerate(VAL)]
    found = {
        f"{TOP}/": b"",
        f"{TOP}/wnids.txt": "\n".join(reversed(WORDS)).encode(),
        f"{TOP}/words.txt": "\n".join(words).encode(),
        f"{TOP}/val/val_annotations.txt": ("\n".join(notes) + "\n").encode(),
        f"{TOP}/test/images/test_0.JPEG": jpeg(next(pixels), 64),
    }
    for wnid, numbers in TRAIN.items():
        found[f"{TOP}/train/{wnid}/{wnid}_boxes.txt"] = b"\n"
        for number in numbers:
            found[f"{TOP}/train/{wnid}/images/{wnid}_{number}.JPEG"] = jpeg(next(pixels), 64)
    for number in range(3):
        found[f"{TOP}/val/images/val_{number}.JPEG"] = jpeg(next(pixels), 64, "L" if number == 1 else "RGB")
    return found


def publish(path: Path, monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes], url: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in contents.items():
            file.writestr(name, content)
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE", Archive(path.name, (f"{url}/{path.name}",), md5(path)))


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "published").mkdir()
    with serving(tmp_path / "published") as address:
        yield address


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> Path:
    path = tmp_path / "published" / f"{TOP}.zip"
    publish(path, monkeypatch, members(), url)
    return path


@pytest.mark.usefixtures("published")
def test_splits_have_the_images_labels_and_names_of_the_archive(tmp_path: Path) -> None:
    dataset = open_dataset("tiny-imagenet", "all", data_dir=tmp_path)
    assert (dataset.rows, dataset.image_size) == (10, (64, 64))
    assert dataset.class_names == (
        "goldfish", "crane (n02012849)", "crane (n03126707)", "maillot", "maillot (tank suit)",
    )  # fmt: skip
    samples = list(dataset.samples(0, 10))
    assert [(sample.key, sample.split, sample.label) for sample in samples] == [
        ("tiny-imagenet/train/n01443537_9", "train", 0),
        ("tiny-imagenet/train/n01443537_10", "train", 0),
        ("tiny-imagenet/train/n01443537_100", "train", 0),
        ("tiny-imagenet/train/n02012849_3", "train", 1),
        ("tiny-imagenet/train/n03126707_2", "train", 2),
        ("tiny-imagenet/train/n03710637_0", "train", 3),
        ("tiny-imagenet/train/n03710721_1", "train", 4),
        ("tiny-imagenet/val/val_0", "test", 4),
        ("tiny-imagenet/val/val_1", "test", 0),
        ("tiny-imagenet/val/val_2", "test", 2),
    ]
    for split in ("train", "test", "all"):
        assert_a_sound_dataset(*(open_dataset("tiny-imagenet", split, data_dir=tmp_path) for _ in range(2)))


@pytest.mark.usefixtures("published")
def test_grey_images_become_rgb(tmp_path: Path) -> None:
    grey = [decode(sample.image) for sample in open_dataset("tiny-imagenet", data_dir=tmp_path).samples(0, 3)]
    assert [pixels.shape for pixels in grey] == [(64, 64, 3)] * 3
    assert [bool(np.all(pixels == pixels[..., :1])) for pixels in grey] == [False, True, False]


def test_what_is_downloaded_is_not_downloaded_again(published: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"

    def cached() -> bool | None:
        return {row.name: row.cached for row in dataset_table(data)}["tiny-imagenet"]

    assert cached() is False
    assert get_dataset("tiny-imagenet", data) == data / TOP
    published.unlink()
    assert open_dataset("tiny-imagenet", data_dir=data, download=False).rows == 3
    (data / f"{TOP}.zip").unlink()
    assert cached() is True
    assert get_dataset("tiny-imagenet", data) == data / TOP


@pytest.mark.parametrize("name", ["../evil", f"{TOP}/../../evil", "{outside}/evil"])
def test_a_hostile_archive_writes_nothing(name: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = members() | {name.format(outside=tmp_path): b"evil"}
    publish(tmp_path / "published" / f"{TOP}.zip", monkeypatch, contents, url)
    before = everything(tmp_path)
    with pytest.raises(ClipmillError, match=r"is not unpacked: its member .*evil"):
        open_dataset("tiny-imagenet", data_dir=tmp_path / "data")
    assert everything(tmp_path) - before == {"data", f"data/{TOP}.zip"}


@pytest.mark.parametrize("file", ["wnids.txt", "words.txt", "val/val_annotations.txt", "val"])
def test_a_damaged_folder_is_named(file: str, published: Path, tmp_path: Path) -> None:
    folder = get_dataset("tiny-imagenet", tmp_path / "data")
    (folder / file).rename(folder / "elsewhere")
    with pytest.raises(ClipmillError, match=rf"{folder} is not as published .* remove it"):
        open_dataset("tiny-imagenet", data_dir=tmp_path / "data")


def test_words_and_annotations_must_know_every_id(published: Path, tmp_path: Path) -> None:
    folder = get_dataset("tiny-imagenet", tmp_path / "data")
    for file, content in (("val/val_annotations.txt", "val_0.JPEG\tn99999999\n"), ("words.txt", "n00001740\tentity")):
        (folder / file).write_text(content)
        with pytest.raises(ClipmillError, match="is not as published"):
            open_dataset("tiny-imagenet", data_dir=tmp_path / "data")


def test_what_cannot_be_had(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    put = rf"put {TOP}\.zip from http://.*/{TOP}\.zip into {data}"
    with pytest.raises(ClipmillError, match=rf"{put}.*--no-download"):
        open_dataset("tiny-imagenet", data_dir=data, download=False)
    published.write_bytes(b"something else")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("an archive was opened"))
    with pytest.raises(ClipmillError, match=rf"checksum differs.*{put}.*--data-dir"):
        open_dataset("tiny-imagenet", data_dir=data)
    assert everything(data) == set()
