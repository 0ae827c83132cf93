"""The whole engine in one sentence: read -> decode -> run -> write, each stage in its own threads, a few batches apart.

Rows stay in order throughout. Memory is bounded by the batches in flight and one shard of embeddings.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
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
from engine.stages import Buffers, StageClock, overlapped

SHARD_SIZE = 5_000  # rows: 10 MB of 512 float32 each; the rows of one shard are what memory grows by
BATCH_SIZE = {
    "cpu": 8,  # equally fast from 4 to 16 a lane; 8 keeps the activations near the cache
    "cuda": 256,  # at most: less where the free memory of the GPU is not enough
    "tensorrt": 256,  # not tried for less: an engine is built for every shape, in minutes
}
WARM_UP_BATCH = 32  # images of the run that CUDA's memory is measured by
QUEUE_DEPTH = 2  # batches that may wait between two stages


@dataclass(frozen=True)
class Settings:
    """How to extract; None lets the machine decide."""

    provider: str = "auto"
    device_id: int = 0  # of CUDA
    batch_size: int | None = None
    workers: int | None = None  # decode threads
    threads: int | None = None  # batches run at once on the CPU, one thread each
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
    samples: Sequence[Sample]  # without their images once they are decoded
    pixels: NDArray[np.uint8] | None = None  # (batch size, H, W, 3) from decode to run
    rejects: dict[int, Reject] = field(default_factory=dict)  # by position in the batch
    embeddings: NDArray[np.float32] | None = None  # (batch size, dim) from run on


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
    # Arrow's own allocator keeps what a shard took: 13 MiB more after 20,000 images than after 2,000, this one 5
    pa.set_memory_pool(pa.system_memory_pool())
    (height, width), resize = _where_to_resize(dataset.image_size, bundle.preprocessing)
    resumed = None if settings.overwrite else _batch_size_of(output)
    tower, batch_size = _open_tower(bundle, settings, height, width, settings.batch_size or resumed)
    workers = settings.workers or usable_cpus()
    run = _run(bundle, dataset, output, settings, tower.provider, batch_size)
    pending = run.open(overwrite=settings.overwrite)
    if run.complete:
        started(f"{output} is complete already, nothing to do; as it was made:")
        return read_manifest(output)
    planned = sum(shard.stop - shard.start for shard in pending)
    started(f"{tower.provider} ({tower.why}), batches of {batch_size}, {tower.lanes} at once, {workers} decode workers")
    advanced(dataset.rows - planned)

    clock = StageClock(read=1, decode=workers, run=tower.lanes, write=1)
    buffers = Buffers((batch_size, height, width, 3))
    decode_batch = partial(_decode, buffers, resize, settings.max_pixels, clock)
    run_batch = partial(_run_tower, buffers, tower, bundle.preprocessing, clock)
    ahead = max(QUEUE_DEPTH, tower.lanes)  # a batch a lane: they leave in order, and none may wait for the slowest
    with (  # left from the last stage to the first: none may lose its source while it runs
        closing(_read(dataset, pending, batch_size, clock)) as batches,
        closing(overlapped(decode_batch, batches, workers, QUEUE_DEPTH)) as decoded,
        closing(overlapped(run_batch, decoded, tower.lanes, ahead)) as embedded,
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


def _batch_size_of(output: Path) -> int | None:
    """The batch size of a run that is there: memory is not as free every time, and a run keeps to one."""
    try:
        return int(read_manifest(output)["fingerprint"]["batch_size"])
    except ClipmillError:  # no run: what there is instead, Run.open says
        return None


def _open_tower(
    bundle: Bundle, settings: Settings, height: int, width: int, batch_size: int | None
) -> tuple[Tower, int]:
    """The image tower and its batch size: the one given, else the provider's; on CUDA what fits into free memory."""

    def open_tower(provider: str, batch_size: int) -> Tower:
        shape = {"batch": batch_size, "height": height, "width": width}
        return Tower(bundle, "image", provider, device_id=settings.device_id, threads=settings.threads, shape=shape)

    if batch_size is not None:
        return open_tower(settings.provider, batch_size), batch_size
    if settings.provider == "tensorrt":
        return open_tower("tensorrt", BATCH_SIZE["tensorrt"]), BATCH_SIZE["tensorrt"]
    tower = open_tower(settings.provider, WARM_UP_BATCH)
    if tower.provider == "cpu":
        return tower, BATCH_SIZE["cpu"]
    black, why = np.zeros((WARM_UP_BATCH, height, width, 3), dtype=np.uint8), tower.why
    batch_size = tower.batch_that_fits(image_feeds(black, bundle.preprocessing), BATCH_SIZE["cuda"])
    del tower  # its weights leave the GPU before they come again
    tower = open_tower("cuda", batch_size)
    tower.why = why
    return tower, batch_size


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
    dataset: Dataset, shards: Iterable[ShardRange], batch_size: int, clock: StageClock
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
            yield Batch(shard, samples)


def _decode(
    buffers: Buffers, resize: tuple[int, int] | None, max_pixels: int, clock: StageClock, batch: Batch
) -> Batch:
    """The batch with its pixels; rows past its samples, and those of bad images, are zeros."""
    with clock.measure("decode"):
        pixels = buffers.take()
        for position, sample in enumerate(batch.samples):
            try:
                image = decode(sample.image, resize, max_pixels)
                if image.shape != pixels.shape[1:]:
                    raise BadImage("bad-size", f"is {image.shape[1]}x{image.shape[0]}, unlike the rest of its dataset")
                pixels[position] = image
            except BadImage as error:
                pixels[position] = 0
                batch.rejects[position] = Reject(sample.row, sample.key, error.error_class, error.message)
        pixels[len(batch.samples) :] = 0
        batch.pixels = pixels
        # their bytes are done with; a shard of them may be gigabytes
        batch.samples = [replace(sample, image=b"") for sample in batch.samples]
    return batch


def _run_tower(buffers: Buffers, tower: Tower, preprocessing: Preprocessing, clock: StageClock, batch: Batch) -> Batch:
    """The batch with its embeddings in place of its pixels."""
    assert batch.pixels is not None
    with clock.measure("run"):
        batch.embeddings = tower.run(image_feeds(batch.pixels, preprocessing))
    buffers.give_back(batch.pixels)
    batch.pixels = None
    return batch


def _write(
    batches: Iterable[Batch],
    run: Run,
    fail_on_error: bool,
    schema: Any,
    clock: StageClock,
    advanced: Callable[[int], None],
) -> None:
    """Collect the batches of a shard, then write and commit it."""
    dim = schema.field("embedding").type.list_size
    embeddings = np.empty((min(run.shard_size, run.rows), dim), dtype=np.float32)  # of a shard after the other
    columns: defaultdict[str, list[Any]] = defaultdict(list)  # its other columns, by name
    good = 0  # rows of it so far
    rejects: list[Reject] = []
    shard_started = time.perf_counter()
    for batch in batches:
        assert batch.embeddings is not None
        for reject in batch.rejects.values():
            if fail_on_error:
                raise ClipmillError(
                    f"row {reject.row}, {reject.key}, is {reject.error}: {reject.message}; "
                    "--on-error reject goes on without it"
                )
            rejects.append(reject)
        kept = [position for position in range(len(batch.samples)) if position not in batch.rejects]
        first, good = good, good + len(kept)
        embeddings[first:good] = batch.embeddings[kept]
        for position in kept:
            sample = batch.samples[position]
            row = {"row": sample.row, "key": sample.key, "split": sample.split, "label": sample.label}
            for name, value in {**row, **sample.more_labels}.items():
                columns[name].append(value)
        advanced(len(batch.samples))
        if good + len(rejects) == batch.shard.stop - batch.shard.start:
            with clock.measure("write"):
                table = shard_table(schema, columns, embeddings[:good])
                run.commit(batch.shard, table, rejects, time.perf_counter() - shard_started)
            columns, good, rejects, shard_started = defaultdict(list), 0, [], time.perf_counter()


def _summary(clock: StageClock, tower: Tower, batch_size: int, workers: int, images: int) -> dict[str, Any]:
    """What the manifest says of how it went; where several threads share a stage, its seconds are their mean."""
    seconds = clock.seconds
    return {
        "provider": tower.provider,
        "batch_size": batch_size,
        "workers": workers,
        "threads": tower.lanes,
        "images": images,
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 1),
        "stages": {
            stage: {"busy": round(busy, 3), "waiting": round(seconds - busy, 3)} for stage, busy in clock.busy.items()
        },
        "bound_by": max(clock.busy, key=clock.busy.__getitem__),
        "peak_rss_bytes": peak_rss(),
    }
