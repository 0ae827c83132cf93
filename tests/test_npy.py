"""npy:PATH on files that NumPy wrote: pixels as they are, labels beside them, and no pickle."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.datasets import Dataset, Sample, cifar10_sample, npy
from engine.decode import BadImage, decode
from engine.errors import ClipmillError

ROOT = Path(__file__).resolve().parents[1]


def photographs(count: int) -> NDArray[np.uint8]:
    return np.stack([decode(sample.image) for sample in cifar10_sample.load("test").samples(0, count)])


def rows(dataset: Dataset) -> list[Sample]:
    return list(dataset.samples(0, dataset.rows))


def test_pixels_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = photographs(20)
    np.save(tmp_path / "birds.npy", pixels)
    np.save(tmp_path / "birds-labels.npy", np.arange(20, dtype=np.uint8))
    dataset = npy.load(f"{tmp_path}/birds.npy")
    assert (dataset.rows, dataset.image_size, dataset.split) == (20, (32, 32), "all")
    assert (dataset.name, dataset.slug, dataset.class_names) == (f"npy:{tmp_path}/birds.npy", "npy-birds", ())
    assert dataset.labels().tolist() == list(range(20))
    assert dataset.labels().dtype == np.int64
    monkeypatch.setattr(npy, "MAPPED_BYTES", 3 * pixels[0].nbytes)
    for sample, image in zip(rows(dataset), pixels, strict=True):
        assert isinstance(sample.image, np.ndarray)
        np.testing.assert_array_equal(decode(sample.image), image)
        assert sample.image.base is None  # holds no part of the file
        assert (sample.key, sample.label) == (f"birds.npy#{sample.row}", sample.row)
    for start in range(21):
        for stop in range(start, 23):
            found = list(dataset.samples(start, stop))
            assert [sample.row for sample in found] == list(range(20))[start:stop]
            assert all(np.array_equal(sample.image, pixels[sample.row]) for sample in found)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert npy.load("~/birds.npy").identity == dataset.identity
    np.save(tmp_path / "birds-labels.npy", np.zeros(20, dtype=np.int32))
    assert npy.load("~/birds.npy").identity != dataset.identity


def test_grey_images_and_no_labels(tmp_path: Path) -> None:
    pixels = np.asfortranarray(photographs(5)[..., 1])
    np.save(tmp_path / "grey.npy", pixels)
    dataset = npy.load(f"{tmp_path}/grey.npy")
    assert dataset.labels().tolist() == [-1] * 5
    for sample, image in zip(rows(dataset), pixels, strict=True):
        assert sample.label is None
        assert isinstance(sample.image, np.ndarray)
        np.testing.assert_array_equal(sample.image, np.stack([image] * 3, axis=-1))


def test_missing_and_bad_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", photographs(4))
    np.save(tmp_path / "x-labels.npy", np.array([7, -1, -3, 2**40]))
    dataset = npy.load(f"{tmp_path}/x.npy")
    good, *wrong = rows(dataset)
    assert good.label == 7
    assert [sample.image.error_class for sample in wrong if isinstance(sample.image, BadImage)] == [
        "missing-label", "bad-label", "bad-label",
    ]  # fmt: skip
    assert dataset.labels().tolist() == [7, -1, -1, -1]
    np.save(tmp_path / "x-labels.npy", np.full(4, -1))
    assert [sample.label for sample in rows(npy.load(f"{tmp_path}/x.npy"))] == [None] * 4


def test_unusable_files(tmp_path: Path) -> None:
    good = photographs(2)
    arrays = {
        "float.npy": good / 255,
        "signed.npy": good.astype(np.int8),
        "one.npy": good[0],
        "planes.npy": good.transpose(0, 3, 1, 2),
        "alpha.npy": np.zeros((2, 4, 4, 4), np.uint8),
        "flat.npy": good.reshape(2, -1),
        "none.npy": good[:0],
        "objects.npy": np.array([good, None], dtype=object),
    }
    for name, array in arrays.items():
        np.save(tmp_path / name, array, allow_pickle=True)
    np.savez(tmp_path / "zip.npy.npz", good)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(good))
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "cut.npy", good)
    os.truncate(tmp_path / "cut.npy", 3000)
    (tmp_path / "folder.npy").mkdir()
    for name, labels in (("a", np.zeros(3, int)), ("b", np.zeros(2)), ("c", np.zeros((2, 1), int))):
        np.save(tmp_path / f"{name}.npy", good)
        np.save(tmp_path / f"{name}-labels.npy", labels)
    wrong = {
        "float.npy": r"float64 of shape \(2, 32, 32, 3\): not bytes",
        "signed.npy": "int8 of shape",
        "one.npy": r"one image is \(1, H, W, 3\)",
        "planes.npy": "channels come first",
        "alpha.npy": "not three channels",
        "flat.npy": "not a stack",
        "none.npy": "no pixels",
        "objects.npy": "cannot read .*objects.npy",
        "zip.npy.npz": "cannot read",
        "pickle.npy": "cannot read",
        "empty.npy": "cannot read",
        "cut.npy": "cannot read",
        "folder.npy": "is not a file",
        "missing.npy": "there is no file",
        "a.npy": r"a-labels\.npy holds int64 of shape \(3,\)",
        "b.npy": r"b-labels\.npy holds float64",
        "c.npy": r"c-labels\.npy holds int64 of shape \(2, 1\)",
    }
    for name, words in wrong.items():
        with pytest.raises(ClipmillError, match=words) as caught:
            npy.load(f"{tmp_path}/{name}")
        assert "--dataset" in str(caught.value)
        assert "\n" not in str(caught.value)


READ_ALL = """
import sys
from engine.datasets.npy import load
def peak():
    # of this program alone: getrusage() would count what the process that started it held
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
dataset = load(sys.argv[1])
before = peak()
print(sum(int(sample.image[0, 0, 0]) for sample in dataset.samples(0, dataset.rows)), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    pixels = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint8, shape=(1500, 256, 256, 3))
    pixels[:, 0, 0, 0] = 1
    pixels.flush()
    del pixels
    command = [sys.executable, "-c", READ_ALL, f"{tmp_path}/x.npy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    images, growth = map(int, done.stdout.split())
    assert images == 1500
    assert growth < 64 << 20  # of 295 MB
