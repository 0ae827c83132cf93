"""The whole engine in one sentence: read -> decode -> run -> write, each stage in its own thread, a few batches apart.

Rows stay in order throughout. Memory is bounded by the batches in flight and one shard of embeddings.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Bundle, Preprocessing
from engine.datasets import Dataset, Sample
from engine.decode import MAX_PIXELS, BadImage, decode
from engine.errors import ClipmillError
from engine.machine import peak_rss, usable_cpus
from engine.manifest import Run, ShardRange, read_manifest
from engine.preprocess import image_feeds
from engine.session import Tower
from engine.shards import Reject, bundle_metadata, shard_schema, shard_table
from engine.stages import StageClock, prefetch

SHARD_SIZE = 10_000  # rows: 20 MB of 512 float32 each
BATCH_SIZE = {"cpu": 32, "cuda": 256}
QUEUE_DEPTH = 2  # batches between two stages
NO_PIXELS = np.empty((0, 0, 0, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Settings:
    """How to extract; None lets the machine decide."""

    provider: str = "auto"
    batch_size: int | None = None
    workers: int | None = None  # decode threads
    threads: int | None = None  # ONNX Runtime's threads for one operator
    shard_size: int = SHARD_SIZE
    format: str = "parquet"
    dtype: str = "float32"
    max_pixels: int = MAX_PIXELS  # of an image as stored, and as resized before the crop
    fail_on_error: bool = False
    overwrite: bool = False


@dataclass
class Batch:
    """Some rows of one shard on their way through the stages."""

    shard: ShardRange
    samples: tuple[Sample, ...]
    pixels: NDArray[np.uint8]  # (batch size, H, W, 3); rows past the samples, and of bad images, are padding
    bad: dict[int, BadImage] = field(default_factory=dict)  # by position in the batch
    decode_seconds: float = 0.0
    embeddings: NDArray[np.float32] | None = None


def extract(
    bundle: Bundle,
    dataset: Dataset,
    output: Path,
    settings: Settings,
    *,
    started: Callable[[str], None] = lambda _: None,
    advanced: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Embed every image of a dataset into a run at `output`; its manifest (see engine/manifest.py).

    A run that was interrupted goes on where it stopped; a complete one is left as it is. `started` hears one line about
    what runs where, `advanced` the number of rows just finished. Raises ClipmillError before anything is written when
    the provider cannot run or `output` holds something else.
    """
    image_size, resize = _where_to_resize(dataset.image_size, bundle.preprocessing)
    batch_size = settings.batch_size or BATCH_SIZE["cuda" if settings.provider == "cuda" else "cpu"]
    fixed = {"batch": batch_size, "height": image_size[0], "width": image_size[1]}
    tower = Tower(bundle, "image", settings.provider, threads=settings.threads, fixed=fixed)
    workers = settings.workers or usable_cpus()
    run = _run(bundle, dataset, output, settings, tower.provider, batch_size)
    pending = run.open(overwrite=settings.overwrite)
    if run.complete:
        started(f"{output} is complete already, nothing to do; as it was made:")
        return read_manifest(output)
    planned = sum(shard.stop - shard.start for shard in pending)
    started(f"{tower.provider} ({tower.why}), batches of {batch_size}, {workers} decode workers")
    advanced(dataset.rows - planned)

    clock = StageClock("read", "decode", "run", "write")
    with (  # left from the last stage to the first: none may lose its source while it runs
        ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool,
        closing(_read(dataset, pending, batch_size, image_size, clock)) as batches,
        closing(prefetch(_decode(batches, pool, workers, resize, settings.max_pixels, clock), QUEUE_DEPTH)) as decoded,
        closing(prefetch(_embed(decoded, tower, bundle.preprocessing, clock), QUEUE_DEPTH)) as embedded,
    ):
        _write(embedded, run, settings.fail_on_error, _schema(bundle, dataset, settings), clock, advanced)
    return run.finish(_summary(clock, tower, batch_size, workers, planned))


def _where_to_resize(
    image_size: tuple[int, int] | None, preprocessing: Preprocessing
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """(H, W) of the pixels that the graph gets, and what decode() resizes to: nothing where the graph does it.

    Images of one size go to the graph as they are; mixed sizes would not batch, so they are resized before. So are
    images more than twice as high as wide: the graph resizes horizontally first, as Pillow did until version 13, which
    takes the other order for some of these.
    """
    if image_size is not None and image_size[0] <= 2 * image_size[1]:
        return image_size, None
    return (preprocessing.crop, preprocessing.crop), (preprocessing.resize, preprocessing.crop)


def _run(bundle: Bundle, dataset: Dataset, output: Path, settings: Settings, provider: str, batch_size: int) -> Run:
    fingerprint = {
        "bundle": bundle.fingerprint,
        "provider": provider,
        "dataset": dataset.name,
        "split": dataset.split,
        "data": dict(dataset.identity),
        **{choice: dataset.subset.get(choice) for choice in ("classes", "sample", "seed", "limit")},
        "rows": dataset.rows,
        "dtype": settings.dtype,
        "format": settings.format,
        "max_pixels": settings.max_pixels,
        "shard_size": settings.shard_size,
        "batch_size": batch_size,
    }
    names = {"name": bundle.name, "model": bundle.source.model}
    return Run(output, dataset.rows, settings.shard_size, settings.format, fingerprint, names)


def _schema(bundle: Bundle, dataset: Dataset, settings: Settings) -> Any:
    metadata = {
        "dataset": dataset.name,
        "split": dataset.split,
        "class_names": json.dumps(dataset.class_names, ensure_ascii=False),
        **{f"{name}_names": json.dumps(names, ensure_ascii=False) for name, names in dataset.label_columns.items()},
        **({"classes": json.dumps(dataset.classes)} if dataset.classes else {}),
        **bundle_metadata(bundle),
    }
    return shard_schema(bundle.architecture.embedding_dim, settings.dtype, metadata, tuple(dataset.label_columns))


def _read(
    dataset: Dataset, shards: Iterable[ShardRange], batch_size: int, image_size: tuple[int, int], clock: StageClock
) -> Generator[Batch, None, None]:
    """Samples of each shard in batches; a batch never crosses into the next shard."""
    last_row = -1
    for shard in shards:
        rows = dataset.samples(shard.start, shard.stop)
        for start in range(shard.start, shard.stop, batch_size):
            with clock.measure("read"):
                samples = tuple(islice(rows, batch_size))
            assert len(samples) == min(batch_size, shard.stop - start), f"{dataset.name} broke off after {start} rows"
            for sample in samples:
                assert last_row < sample.row, f"{dataset.name}: row {sample.row} comes after row {last_row}"
                last_row = sample.row
            yield Batch(shard, samples, np.zeros((batch_size, *image_size, 3), dtype=np.uint8))


def _decode(
    batches: Iterable[Batch],
    pool: ThreadPoolExecutor,
    workers: int,
    resize: tuple[int, int] | None,
    max_pixels: int,
    clock: StageClock,
) -> Iterator[Batch]:
    """Batches with their pixels, in order; one batch a worker at a time, and one ready beside them."""
    ahead: deque[Future[Batch]] = deque()
    for batch in batches:
        ahead.append(pool.submit(_decode_batch, batch, resize, max_pixels))
        if len(ahead) > workers:
            yield _decoded(ahead.popleft(), workers, clock)
    while ahead:
        yield _decoded(ahead.popleft(), workers, clock)


def _decoded(future: Future[Batch], workers: int, clock: StageClock) -> Batch:
    batch = future.result()
    clock.busy["decode"] += batch.decode_seconds / workers
    return batch


def _decode_batch(batch: Batch, resize: tuple[int, int] | None, max_pixels: int) -> Batch:
    start = time.perf_counter()
    for position, sample in enumerate(batch.samples):
        try:
            pixels = decode(sample.image, resize, max_pixels)
            if pixels.shape != batch.pixels.shape[1:]:
                raise BadImage("bad-size", f"is {pixels.shape[1]}x{pixels.shape[0]}, unlike the rest of its dataset")
            batch.pixels[position] = pixels
        except BadImage as error:
            batch.bad[position] = error
    # their bytes are done with; a shard of them may be gigabytes
    batch.samples = tuple(replace(sample, image=b"") for sample in batch.samples)
    batch.decode_seconds = time.perf_counter() - start
    return batch


def _embed(batches: Iterable[Batch], tower: Tower, preprocessing: Preprocessing, clock: StageClock) -> Iterator[Batch]:
    for batch in batches:
        with clock.measure("run"):
            batch.embeddings = tower.run(image_feeds(batch.pixels, preprocessing))
        batch.pixels = NO_PIXELS
        yield batch


def _write(
    batches: Iterable[Batch],
    run: Run,
    fail_on_error: bool,
    schema: Any,
    clock: StageClock,
    advanced: Callable[[int], None],
) -> None:
    """Collect the batches of a shard, then write and commit it."""
    good: list[Sample] = []
    rejects: list[Reject] = []
    embeddings: list[NDArray[np.float32]] = []
    rows = 0
    shard_started = time.perf_counter()
    for batch in batches:
        assert batch.embeddings is not None
        for position, error in sorted(batch.bad.items()):
            sample = batch.samples[position]
            if fail_on_error:
                raise ClipmillError(f"row {sample.row}, {sample.key}, is {error}; --on-error reject goes on without it")
            rejects.append(Reject(sample.row, sample.key, error.error_class, error.message))
        kept = [position for position in range(len(batch.samples)) if position not in batch.bad]
        good.extend(batch.samples[position] for position in kept)
        embeddings.append(batch.embeddings[kept])
        rows += len(batch.samples)
        advanced(len(batch.samples))
        if rows == batch.shard.stop - batch.shard.start:
            with clock.measure("write"):
                table = shard_table(schema, good, np.concatenate(embeddings))
                run.commit(batch.shard, table, rejects, time.perf_counter() - shard_started)
            good, rejects, embeddings, rows, shard_started = [], [], [], 0, time.perf_counter()


def _summary(clock: StageClock, tower: Tower, batch_size: int, workers: int, images: int) -> dict[str, Any]:
    seconds = clock.seconds
    return {
        "provider": tower.provider,
        "batch_size": batch_size,
        "workers": workers,
        "threads": tower.threads,
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "stages": {
            stage: {"busy": round(busy, 3), "waiting": round(seconds - busy, 3)} for stage, busy in clock.busy.items()
        },
        "bound_by": max(clock.busy, key=clock.busy.__getitem__),
        "peak_rss_bytes": peak_rss(),
    }
