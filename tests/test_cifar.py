"""cifar10 and cifar100 from genuine archives made small, through torchvision's own download and checks."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.datasets import cifar, cifar10_sample, open_dataset
from engine.decode import decode
from engine.errors import ClipmillError

torchvision = pytest.importorskip("torchvision.datasets")
NAMES = ["apple", "aquarium_fish", "baby"]


def photographs(split: str, rows: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([decode(sample.image) for sample in cifar10_sample.load(split).samples(0, rows)])


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def published(tmp_path: Path) -> Iterator[str]:
    """A server on loopback of the folder published/: torchvision reads nothing but HTTP."""
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def archive(tmp_path: Path, published: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cifar-100-python.tar.gz of 7 train and 5 test images that torchvision takes for the published one."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    contents: dict[str, dict[str, Any]] = {
        split: {
            "data": photographs(split, rows).transpose(0, 3, 1, 2).reshape(rows, -1),
            "fine_labels": [row % 3 for row in range(rows)],
            "coarse_labels": [0] * rows,
        }
        for split, rows in (("train", 7), ("test", 5))
    }
    contents["meta"] = {"fine_label_names": NAMES, "coarse_label_names": ["everything"]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    path = tmp_path / "published" / "cifar-100-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, "cifar-100-python")

    def md5(file: Path) -> str:
        return hashlib.md5(file.read_bytes()).hexdigest()

    reader = torchvision.CIFAR100
    monkeypatch.setattr(reader, "url", f"{published}/{path.name}")
    monkeypatch.setattr(reader, "tgz_md5", md5(path))
    monkeypatch.setattr(reader, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(reader, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": md5(folder / "meta")})
    monkeypatch.setattr(cifar, "DOWNLOADS", tmp_path / "cache")
    return path


def test_splits_have_the_images_labels_and_names_of_the_archive(archive: Path) -> None:
    dataset = open_dataset("cifar100", "all")
    assert (dataset.rows, dataset.image_size, dataset.class_names) == (12, (32, 32), tuple(NAMES))
    samples = list(dataset.samples(0, 12))
    assert [sample.row for sample in samples] == list(range(12))
    assert [sample.label for sample in samples] == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert samples[6].key == "cifar100/train/00006"
    assert samples[7].key == "cifar100/test/00000"
    expected = np.concatenate([photographs("train", 7), photographs("test", 5)])
    np.testing.assert_array_equal(np.stack([decode(sample.image) for sample in samples]), expected)
    assert [sample.row for sample in open_dataset("cifar100").samples(2, 4)] == [2, 3]


def test_what_is_downloaded_is_not_downloaded_again(archive: Path) -> None:
    first = open_dataset("cifar100", "test")
    archive.unlink()
    assert open_dataset("cifar100", "test").identity == first.identity


def test_no_download_says_which_file_to_put_where(archive: Path) -> None:
    archive.unlink()
    with pytest.raises(ClipmillError, match=r"put cifar-100-python\.tar\.gz from .* into .*cache by hand"):
        open_dataset("cifar100")


def test_an_archive_that_is_not_the_published_one_is_not_opened(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.CIFAR100, "tgz_md5", "0" * 32)
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(ClipmillError, match="could not be downloaded or read"):
        open_dataset("cifar100")
