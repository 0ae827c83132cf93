"""Published archives made small: images of the embedded sample, a server on loopback, and what two readings share."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.datasets import Dataset, Sample, cifar10_sample
from engine.decode import decode


def photographs(split: str, rows: int) -> NDArray[np.uint8]:
    return np.stack([decode(sample.image) for sample in cifar10_sample.load(split).samples(0, rows)])


def jpeg(pixels: NDArray[np.uint8], size: int, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).convert(mode).save(file, "JPEG")
    return file.getvalue()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


class Whole(SimpleHTTPRequestHandler):
    """Serves the files of a folder."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class CutOff(Whole):
    """Promises a whole file, sends half of it, and hangs up."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])


@contextmanager
def serving(folder: Path, handler: type[Whole] = Whole) -> Iterator[str]:
    """The address of a server of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def everything(folder: Path) -> set[str]:
    """Every path under a folder, hidden and temporary ones too."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def plain(sample: Sample) -> tuple[Any, ...]:
    """A sample in values that compare: pixels as bytes."""
    image = sample.image.tobytes() if isinstance(sample.image, np.ndarray) else sample.image
    return sample.row, sample.key, sample.split, sample.label, dict(sample.more_labels), image


def assert_a_sound_dataset(dataset: Dataset, again: Dataset) -> None:
    """What holds of every source: two openings are the same, a range is a slice, keys differ, labels agree."""
    whole = [plain(sample) for sample in dataset.samples(0, dataset.rows + 3)]
    assert [sample[0] for sample in whole] == list(range(dataset.rows))
    assert [plain(sample) for sample in again.samples(0, again.rows)] == whole
    assert again.identity == dataset.identity
    for start in range(dataset.rows + 2):
        for stop in range(dataset.rows + 2):
            assert [plain(sample) for sample in dataset.samples(start, stop)] == whole[start:stop]
    assert len({key for _, key, *_ in whole}) == dataset.rows
    labels = dataset.labels()
    assert labels.dtype == np.int64
    assert labels.tolist() == [sample[3] for sample in whole]
    for sample in dataset.samples(0, dataset.rows):
        assert set(sample.more_labels) == set(dataset.label_columns)
