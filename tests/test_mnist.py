"""mnist from genuine IDX files made small, through torchvision's own reader."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from archives import assert_a_sound_dataset, everything, md5, photographs, serving
from numpy.typing import NDArray

from engine.datasets import dataset_table, get_dataset, mnist, open_dataset
from engine.decode import decode
from engine.errors import ClipmillError

torchvision = pytest.importorskip("torchvision.datasets.mnist")
pytest.importorskip("pooch")
ROWS = {"train": 7, "test": 5}


def grey(split: str) -> NDArray[np.uint8]:
    return photographs(split, ROWS[split])[:, 2:30, 2:30, 1]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a server with the four files; the first mirror has none of them."""
    folder = tmp_path / "published"
    folder.mkdir()
    for split, (images, labels) in mnist.FILES.items():
        rows = ROWS[split]
        header = struct.pack(">IIII", 0x803, rows, 28, 28)
        (folder / images).write_bytes(gzip.compress(header + grey(split).tobytes(), mtime=0))
        values = bytes((3 * row + 1) % 10 for row in range(rows))
        (folder / labels).write_bytes(gzip.compress(struct.pack(">II", 0x801, rows) + values, mtime=0))
    monkeypatch.setattr(torchvision.MNIST, "resources", [(file.name, md5(file)) for file in folder.iterdir()])
    with serving(folder) as url:
        monkeypatch.setattr(torchvision.MNIST, "mirrors", [f"{url}/gone/", f"{url}/"])
        yield folder


@pytest.mark.usefixtures("published")
def test_splits_have_the_images_and_labels_of_the_files(tmp_path: Path) -> None:
    dataset = open_dataset("mnist", "all", data_dir=tmp_path)
    assert (dataset.rows, dataset.image_size, len(dataset.class_names)) == (12, (28, 28), 10)
    assert dataset.class_names[3] == "digit 3"
    samples = list(dataset.samples(0, 12))
    assert [sample.label for sample in samples] == [1, 4, 7, 0, 3, 6, 9, 1, 4, 7, 0, 3]
    assert (samples[6].key, samples[7].key) == ("mnist/train/00006", "mnist/test/00000")
    pixels = np.stack([decode(sample.image) for sample in samples])
    expected = np.concatenate([grey("train"), grey("test")])
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], expected)
    for split in ("train", "test", "all"):
        assert_a_sound_dataset(*(open_dataset("mnist", split, data_dir=tmp_path) for _ in range(2)))


def test_what_is_downloaded_is_not_downloaded_again(published: Path, tmp_path: Path) -> None:
    def cached() -> bool | None:
        return {row.name: row.cached for row in dataset_table(tmp_path)}["mnist"]

    open_dataset("mnist", "test", data_dir=tmp_path)
    assert cached() is False  # half of it
    assert get_dataset("mnist", tmp_path) == tmp_path / "MNIST" / "raw"
    assert cached() is True
    for file in published.iterdir():
        file.unlink()
    assert open_dataset("mnist", "train", data_dir=tmp_path, download=False).rows == 7
    assert len(everything(tmp_path / "MNIST" / "raw")) == 4


def test_only_checked_bytes_are_read(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    get_dataset("mnist", data)
    for file in published.iterdir():
        file.unlink()
    # files that torchvision's own class would trust: unpacked, and its old format, a pickle
    (data / "MNIST/raw/t10k-images-idx3-ubyte").write_bytes(b"not what was published")
    (data / "MNIST/processed").mkdir()
    for file_name in ("training.pt", "test.pt"):
        (data / "MNIST/processed" / file_name).write_bytes(b"not to be opened")
    assert open_dataset("mnist", data_dir=data).rows == 5
    (data / "MNIST/raw/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not what was published"))
    monkeypatch.setattr(gzip, "open", lambda *_, **__: pytest.fail("an archive was opened"))
    put = rf"put t10k-images-idx3-ubyte\.gz from http://.* into {data / 'MNIST/raw'}"
    with pytest.raises(ClipmillError, match=rf"its checksum differs.*{put}.*--no-download"):
        open_dataset("mnist", data_dir=data, download=False)
    with pytest.raises(ClipmillError, match=rf"404.*404.*{put}.*--data-dir"):
        open_dataset("mnist", data_dir=data)


@pytest.mark.usefixtures("published")
def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for names in mnist.FILES.values() for name in names]
    monkeypatch.setattr(torchvision.MNIST, "resources", [(name, "0" * 32) for name in names])
    with pytest.raises(ClipmillError, match="checksum differs"):
        open_dataset("mnist", data_dir=tmp_path / "data")
    assert everything(tmp_path / "data") == {"MNIST", "MNIST/raw"}
