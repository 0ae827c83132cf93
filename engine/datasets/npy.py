"""npy:PATH: a NumPy file of pixels, uint8 (N, H, W, 3), or (N, H, W) for grey; no pickle is ever loaded.

Integer labels (N,) are taken from a file beside it: "train-labels.npy" for "train.npy"; -1 says unknown. The file is
mapped a few megabytes at a time, because pages once read count as the process' memory for as long as they are mapped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.datasets.folder import key_of
from engine.datasets.sources import (
    UNKNOWN,
    files_digest,
    known_labels,
    label_or_problem,
    one_file,
    source_name,
    source_slug,
)
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.decode import BadImage
from engine.errors import ClipmillError

INFO = DatasetInfo(
    name="npy:PATH",
    what="pixels in a NumPy file, uint8 (N, H, W, 3); labels from NAME-labels.npy beside NAME.npy, if there",
    splits={"all": None},
    classes=None,
    image_size=None,
    source="your own files",
)

MAPPED_BYTES = 16 << 20


def load(path: str) -> Dataset:
    """Open the file `path` as the one split "all"; keys are "NAME.npy#ROW".

    Raises ClipmillError when it holds no such array, or labels beside it do not fit.
    """
    file = one_file("npy", path)
    pixels = _map(file)
    if problem := _problem(pixels):
        raise ClipmillError(
            f"{file} holds {pixels.dtype} of shape {pixels.shape}: {problem}; --dataset npy: takes uint8 (N, H, W, 3)"
        )
    rows, height, width = pixels.shape[:3]
    name = key_of(os.path.basename(file))
    labels_file = f"{os.path.splitext(file)[0]}-labels.npy"
    has_labels = os.path.exists(labels_file)
    labels = _labels(labels_file, rows) if has_labels else np.full(rows, UNKNOWN, dtype=np.int64)
    files = [file, labels_file] if has_labels else [file]
    return Dataset(
        name=source_name("npy", path),
        slug=source_slug("npy", file),
        split="all",
        class_names=(),
        rows=rows,
        image_size=(height, width),
        identity={"images": rows, "sha256": files_digest((os.path.basename(each), each) for each in files)},
        samples=partial(_samples, file, name, labels),
        labels=lambda: known_labels(labels, 0),
    )


def _samples(file: str, name: str, labels: NDArray[np.int64], start: int, stop: int) -> Iterator[Sample]:
    labelled = bool((labels != UNKNOWN).any())
    stop = min(stop, len(labels))
    row = start
    while row < stop:
        pixels = _map(file)
        if problem := _problem(pixels):
            raise ClipmillError(f"{file} changed while it was read: {problem}; run again")
        end = min(stop, row + max(1, MAPPED_BYTES // pixels[0].nbytes))
        for image in pixels[row:end]:
            label = label_or_problem(int(labels[row]), 0, labelled)
            if isinstance(label, BadImage):
                yield Sample(row, f"{name}#{row}", "all", None, label)
            else:
                yield Sample(row, f"{name}#{row}", "all", label, _rgb(image))
            row += 1


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # A copy in either case: a view would keep the file mapped.
    return np.array(image, order="C") if image.ndim == 3 else np.repeat(image[:, :, np.newaxis], 3, axis=2)


def _map(file: str) -> NDArray[Any]:
    try:
        # Not np.load, which takes anything else for a pickle and says so.
        return np.asarray(np.lib.format.open_memmap(file, mode="r"))
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise ClipmillError(f"cannot read {file} ({reason}); --dataset npy: takes a .npy file of uint8") from error


def _problem(pixels: NDArray[Any]) -> str | None:
    shape = pixels.shape
    if pixels.dtype != np.uint8:
        return "not bytes from 0 to 255"
    if len(shape) == 3 and shape[2] in (3, 4):
        return "one image, or very narrow grey ones; one image is (1, H, W, 3)"
    if len(shape) == 4 and shape[3] != 3:
        return "channels come first; move them last" if shape[1] == 3 else "not three channels"
    if len(shape) not in (3, 4):
        return "not a stack of images"
    if not pixels.size:
        return "no pixels"
    return None


def _labels(file: str, rows: int) -> NDArray[np.int64]:
    labels = _map(file)
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise ClipmillError(
            f"{file} holds {labels.dtype} of shape {labels.shape}, the images beside it need integers of shape "
            f"({rows},); mend it or take it away, --dataset npy: reads images without labels too"
        )
    return np.array(labels, dtype=np.int64)
