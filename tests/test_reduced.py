"""Datasets at a smaller size: the pixels that PIL makes, the rows as they were, and a run of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.bundle import Bundle
from engine.datasets import Dataset, Sample, open_dataset
from engine.datasets.reduced import reduce, reduced_name
from engine.decode import BadImage
from engine.errors import ClipmillError
from engine.stream import Settings, extract
from probes.embeddings import load_run


def dataset_of(*images: bytes | BadImage) -> Dataset:
    def samples(start: int, stop: int) -> Iterator[Sample]:
        for row in range(start, stop):
            yield Sample(row=row, key=f"image-{row}", split="test", label=row % 2, image=images[row])

    labels = np.arange(len(images)) % 2
    return Dataset("made", "made", "test", ("even", "odd"), len(images), None, {"made": 1}, samples, lambda: labels)


def png(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("pixels", [8, 16, 32])
def test_the_pixels_are_those_of_pil_bicubic(pixels: int) -> None:
    whole = open_dataset("cifar10-sample", "test", 30)
    smaller = reduce(whole, pixels)
    for original, sample in zip(whole.samples(0, 30), smaller.samples(0, 30), strict=True):
        assert isinstance(original.image, bytes)
        expected = (
            Image.open(io.BytesIO(original.image)).convert("RGB").resize((pixels, pixels), Image.Resampling.BICUBIC)
        )
        assert isinstance(sample.image, np.ndarray)
        assert sample.image.dtype == np.uint8
        np.testing.assert_array_equal(sample.image, np.asarray(expected))


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (48, 48)])
def test_the_shortest_edge_is_resized_and_the_centre_cropped(height: int, width: int) -> None:
    image = png(height, width)
    (sample,) = reduce(dataset_of(image), 16).samples(0, 1)
    shortest = min(height, width)
    size = (width * 16 // shortest, height * 16 // shortest)
    resized = np.asarray(Image.open(io.BytesIO(image)).resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - 16) // 2, (size[0] - 16) // 2
    np.testing.assert_array_equal(sample.image, resized[top : top + 16, left : left + 16])


def test_rows_keys_labels_and_splits_stay() -> None:
    whole = open_dataset("cifar10-sample", "train", sample=50)
    smaller = reduce(whole, 8)
    kept = ("row", "key", "split", "label", "more_labels")
    for start, stop in ((0, 50), (10, 12), (49, 50)):
        originals, samples = list(whole.samples(start, stop)), list(smaller.samples(start, stop))
        assert len(samples) == stop - start
        for name in kept:
            assert [getattr(sample, name) for sample in samples] == [getattr(sample, name) for sample in originals]
    np.testing.assert_array_equal(smaller.labels(), whole.labels())
    assert (smaller.rows, smaller.class_names, smaller.subset) == (whole.rows, whole.class_names, whole.subset)


def test_a_reduced_dataset_says_that_it_is_one() -> None:
    whole = open_dataset("cifar10-sample", "test")
    smaller = reduce(whole, 8)
    assert smaller.name == reduced_name("cifar10-sample", 8) == "cifar10-sample at 8 pixels"
    assert (smaller.slug, smaller.image_size) == ("cifar10-sample-8px", (8, 8))
    assert smaller.identity == {**whole.identity, "reduced_to": 8}


def test_a_broken_image_keeps_the_reason_in_its_place() -> None:
    found = BadImage("corrupt-member", "the member ends early")
    good = png(32, 32)
    samples = list(reduce(dataset_of(good, b"not an image", found, good), 8).samples(0, 4))
    assert [sample.key for sample in samples] == ["image-0", "image-1", "image-2", "image-3"]
    assert isinstance(samples[1].image, BadImage)
    assert samples[1].image.error_class == "not-an-image"
    assert isinstance(samples[2].image, BadImage)
    assert (samples[2].image.error_class, samples[2].image.message) == (found.error_class, found.message)
    np.testing.assert_array_equal(np.asarray(samples[0].image), np.asarray(samples[3].image))


def test_its_embeddings_are_those_of_the_smaller_images(mini: Bundle, tmp_path: Path) -> None:
    whole = open_dataset("cifar10-sample", "test", 12)
    smaller = []
    for sample in whole.samples(0, 12):
        assert isinstance(sample.image, bytes)
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        smaller.append(np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC)))
    np.save(tmp_path / "smaller.npy", np.stack(smaller))
    extract(mini, open_dataset(f"npy:{tmp_path}/smaller.npy"), tmp_path / "by-hand", Settings())
    extract(mini, reduce(whole, 8), tmp_path / "reduced", Settings())
    extract(mini, whole, tmp_path / "whole", Settings())
    by_hand, reduced, full = (load_run(tmp_path / name) for name in ("by-hand", "reduced", "whole"))
    np.testing.assert_allclose(reduced.X, by_hand.X, atol=1e-6)
    assert (reduced.keys, reduced.y.tolist()) == (full.keys, full.y.tolist())
    assert np.abs(reduced.X - full.X).max() > 1e-3


def test_a_broken_image_is_a_reject_of_the_run(mini: Bundle, tmp_path: Path) -> None:
    manifest = extract(mini, reduce(dataset_of(png(32, 32), b"not an image"), 8), tmp_path / "run", Settings())
    assert (manifest["written"], manifest["rejected"]) == (1, 1)
    assert load_run(tmp_path / "run").keys == ["image-0"]


def test_a_run_at_another_size_is_another_run(mini: Bundle, tmp_path: Path) -> None:
    whole = replace(dataset_of(png(32, 32)), image_size=(32, 32))
    extract(mini, reduce(whole, 8), tmp_path / "run", Settings())
    with pytest.raises(ClipmillError, match="holds a run with another dataset"):
        extract(mini, reduce(whole, 16), tmp_path / "run", Settings())
