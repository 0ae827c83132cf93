"""A dataset with its images made smaller, to ask what resolution is worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from engine.datasets.types import Dataset, Sample
from engine.decode import BadImage, decode


def reduce(dataset: Dataset, pixels: int) -> Dataset:
    """The dataset with every image at (pixels, pixels): the shortest edge resized by PIL's bicubic, the centre cropped.

    An image that cannot be decoded keeps the reason in its place.
    """
    return replace(
        dataset,
        name=reduced_name(dataset.name, pixels),
        slug=f"{dataset.slug}-{pixels}px",
        image_size=(pixels, pixels),
        identity={**dataset.identity, "reduced_to": pixels},
        samples=partial(_samples, dataset, pixels),
    )


def reduced_name(name: str, pixels: int) -> str:
    return f"{name} at {pixels} pixels"


def _samples(dataset: Dataset, pixels: int, start: int, stop: int) -> Iterator[Sample]:
    for sample in dataset.samples(start, stop):
        try:
            yield replace(sample, image=decode(sample.image, (pixels, pixels)))
        except BadImage as problem:
            yield replace(sample, image=problem)
