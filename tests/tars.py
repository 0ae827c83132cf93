"""Genuine webdataset tars for tests, and what they are compared by."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.datasets import Dataset, Sample, cifar10_sample
from engine.decode import BadImage

Members = Sequence[tuple[str, bytes]]


def photographs(count: int) -> list[Sample]:
    return list(cifar10_sample.load("test").samples(0, count))


def members(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """As webdataset's own writer orders them: the .cls of a sample, then its .jpg."""
    found: list[tuple[str, bytes]] = []
    for number, photograph in enumerate(photographs(first + count)[first:], start=first):
        assert isinstance(photograph.image, bytes)
        found += [(f"{number:06d}.cls", b"%d" % photograph.label), (f"{number:06d}.jpg", photograph.image)]
    return found


def write_tar(path: Path, content: Members, kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def offsets(path: Path) -> dict[str, int]:
    """Of each member's header."""
    with tarfile.open(path) as tar:
        return {member.name: member.offset for member in tar}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def rows(dataset: Dataset, start: int = 0, stop: int | None = None) -> list[Sample]:
    return list(dataset.samples(start, dataset.rows if stop is None else stop))


def summary(samples: Iterable[Sample]) -> list[tuple[str, int | None, object]]:
    return [
        (sample.key, sample.label, str(sample.image) if isinstance(sample.image, BadImage) else sample.image)
        for sample in samples
    ]


def bad(sample: Sample) -> str:
    assert isinstance(sample.image, BadImage)
    assert sample.label is None
    return sample.image.error_class
