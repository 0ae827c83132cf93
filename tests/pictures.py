"""A dataset of noise for tests of the stream, and what they compare its runs by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle
from engine.datasets import Dataset, Sample
from engine.preprocess import image_feeds
from engine.session import Tower
from engine.stream import Settings

NOT_AN_IMAGE = b"this is no picture"


def settings(**changes: Any) -> Settings:
    return Settings(**{"provider": "cpu", "batch_size": 7, "workers": 2, "threads": 1, **changes})


def pictures(rows: int, images: dict[int, Any] | None = None, size: tuple[int, int] = (32, 32)) -> Dataset:
    """Noise, a different one in each row; `images` replaces some of it."""

    def samples(start: int, stop: int) -> Iterator[Sample]:
        for row in range(start, stop):
            noise = np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8)
            yield Sample(row, f"noise/{row:03d}", "test", row % 3 or None, (images or {}).get(row, noise))

    return Dataset(
        name="pictures",
        slug="pictures",
        split="test",
        class_names=("none", "one", "zwei ✓"),
        rows=rows,
        image_size=size,
        identity={"noise": 1},
        samples=samples,
        labels=lambda: np.array([row % 3 or -1 for row in range(rows)]),
    )


def watched(dataset: Dataset, pulled: Callable[[int], None]) -> Dataset:
    """The same dataset; `pulled` hears each row as it is read."""

    def samples(start: int, stop: int) -> Iterator[Sample]:
        for sample in dataset.samples(start, stop):
            pulled(sample.row)
            yield sample

    return dataclasses.replace(dataset, samples=samples)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder; a manifest without what may differ between two runs: times and memory."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    manifest = json.loads(found["manifest.json"])
    del manifest["summary"]
    for shard in manifest["shards"]:
        del shard["seconds"]
    return {**found, "manifest.json": json.dumps(manifest).encode()}


def one_by_one(bundle: Bundle, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    tower = Tower(bundle, "image", "cpu", threads=1)
    return np.concatenate([tower.run(image_feeds(image[np.newaxis], bundle.preprocessing)) for image in images])
