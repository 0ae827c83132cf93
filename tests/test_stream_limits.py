"""What a stream may hold in memory, what it leaves running when a stage fails, and what it says of itself."""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import NOT_AN_IMAGE, contents, pictures, settings, watched
from threads import no_thread_left, within

from engine import shards, stream
from engine.bundle import Bundle
from engine.datasets import Dataset, Sample
from engine.decode import decode
from engine.errors import ClipmillError
from engine.manifest import read_manifest
from engine.session import Tower
from engine.stream import QUEUE_DEPTH, extract


@pytest.mark.parametrize(("workers", "lanes"), [(2, 1), (1, 5)])
def test_memory_holds_a_few_batches_and_not_a_shard(workers: int, lanes: int, mini: Bundle, tmp_path: Path) -> None:
    """One shard of 60 batches, and a writer slow enough for every stage before it to run as far ahead as it can."""
    batch_size, rows = 4, 240
    pulled, finished, lead, alive, most_alive = 0, 0, 0, 0, 0

    def forgotten() -> None:
        nonlocal alive
        alive -= 1

    def samples(start: int, stop: int) -> Iterator[Sample]:
        nonlocal pulled, alive, lead, most_alive
        for row in range(start, stop):
            image = np.full((8, 8, 3), row, dtype=np.uint8)
            weakref.finalize(image, forgotten)
            pulled, alive = pulled + 1, alive + 1
            lead, most_alive = max(lead, pulled - finished), max(most_alive, alive)
            yield Sample(row, str(row), "test", None, image)

    def advanced(rows: int) -> None:
        nonlocal finished
        time.sleep(0.01)
        finished += rows

    dataset = dataclasses.replace(pictures(rows, size=(8, 8)), samples=samples)
    choice = settings(workers=workers, threads=lanes, batch_size=batch_size)
    extract(mini, dataset, tmp_path / "run", choice, advanced=advanced)
    # one a thread and those that may wait; before each of the two stages one that is next, and the writer's
    in_flight = (workers + QUEUE_DEPTH) + (lanes + max(QUEUE_DEPTH, lanes)) + 2 + 1
    assert (in_flight - 3) * batch_size < lead <= in_flight * batch_size
    # an image goes when it is decoded; those who handed its batch on may hold the last they had
    assert most_alive <= (workers + 4) * batch_size
    assert pulled == finished == rows


@pytest.mark.parametrize("lanes", [1, 3])
def test_pixels_are_decoded_into_a_few_buffers_again_and_again(
    lanes: int, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was in one before is gone: rows of bad images, and rows past the end of a shard, are zeros."""
    rows, shard_size, batch_size, workers = 300, 37, 5, 2
    dataset = pictures(rows, dict.fromkeys(range(3, rows, 7), NOT_AN_IMAGE), size=(8, 8))
    seen: list[NDArray[np.uint8]] = []
    buffers: dict[int, NDArray[np.uint8]] = {}
    run = Tower.run

    def watch(tower: Tower, feeds: Any) -> Any:
        seen.append(feeds["pixels"].copy())
        buffers[id(feeds["pixels"])] = feeds["pixels"]
        return run(tower, feeds)

    monkeypatch.setattr(Tower, "run", watch)
    choice = settings(threads=lanes, workers=workers, batch_size=batch_size, shard_size=shard_size)
    extract(mini, dataset, tmp_path / "run", choice)

    expected = []
    for first in range(0, rows, shard_size):
        for start in range(first, min(first + shard_size, rows), batch_size):
            batch = np.zeros((batch_size, 8, 8, 3), dtype=np.uint8)
            for sample in dataset.samples(start, min(start + batch_size, first + shard_size, rows)):
                if sample.row % 7 != 3:
                    batch[sample.row - start] = sample.image
            expected.append(batch)
    # several lanes may begin in another order
    assert sorted(batch.tobytes() for batch in seen) == sorted(batch.tobytes() for batch in expected)
    assert len(buffers) <= (workers + QUEUE_DEPTH) + (lanes + max(QUEUE_DEPTH, lanes)) + 2 < len(expected) / 3


def test_the_embeddings_of_all_shards_are_collected_in_one_array(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[NDArray[np.float32]] = []

    def watch(schema: Any, columns: Any, embeddings: NDArray[np.float32]) -> Any:
        collected.append(embeddings)
        return shards.shard_table(schema, columns, embeddings)

    monkeypatch.setattr(stream, "shard_table", watch)
    extract(mini, pictures(25, {3: b""}), tmp_path / "run", settings(shard_size=10))
    assert [embeddings.shape for embeddings in collected] == [(9, 128), (10, 128), (5, 128)]
    starts = {embeddings.__array_interface__["data"][0] for embeddings in collected}
    assert len(starts) == 1


def test_the_lanes_run_at_once(mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, run = threading.Barrier(3, timeout=20), Tower.run

    def meet(tower: Tower, feeds: Any) -> Any:
        together.wait()
        return run(tower, feeds)

    monkeypatch.setattr(Tower, "run", meet)
    manifest = extract(mini, pictures(18), tmp_path / "run", settings(batch_size=3, threads=3, shard_size=9))
    assert manifest["summary"]["threads"] == 3


def fail_in_dataset(patch: pytest.MonkeyPatch, dataset: Dataset, error: BaseException) -> Dataset:
    def fail(row: int) -> None:
        if row == 25:
            raise error

    return watched(dataset, fail)


def fail_in_decode(patch: pytest.MonkeyPatch, dataset: Dataset, error: BaseException) -> Dataset:
    (target,) = list(dataset.samples(25, 26))

    def fail(image: NDArray[np.uint8], *limits: Any) -> NDArray[np.uint8]:
        if np.array_equal(image, target.image):
            raise error
        return decode(image, *limits)

    patch.setattr(stream, "decode", fail)
    return dataset


def fail_in_tower(patch: pytest.MonkeyPatch, dataset: Dataset, error: BaseException) -> Dataset:
    run, batches = Tower.run, []

    def fail(tower: Tower, feeds: Any) -> Any:
        batches.append(1)
        if len(batches) == 5:
            raise error
        return run(tower, feeds)

    patch.setattr(Tower, "run", fail)
    return dataset


def fail_in_writer(patch: pytest.MonkeyPatch, dataset: Dataset, error: BaseException) -> Dataset:
    write, written = shards.pq.write_table, []

    def fail(*arguments: Any, **options: Any) -> None:
        written.append(1)
        write(*arguments, **options)
        if len(written) == 2:
            raise error

    patch.setattr(shards.pq, "write_table", fail)
    return dataset


@pytest.mark.parametrize("fail_in", [fail_in_dataset, fail_in_decode, fail_in_tower, fail_in_writer])
@pytest.mark.parametrize("error", [RuntimeError("the end"), KeyboardInterrupt()])
@pytest.mark.parametrize("lanes", [1, 3])
def test_an_error_in_any_stage_surfaces_as_itself(
    lanes: int,
    fail_in: Callable[..., Dataset],
    error: BaseException,
    mini: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, opened, closed = tmp_path / "run", [], []

    def samples(start: int, stop: int) -> Iterator[Sample]:
        opened.append(stop)
        try:
            yield from pictures(400).samples(start, stop)
        finally:
            closed.append(stop)

    dataset = dataclasses.replace(pictures(400), samples=samples)
    with monkeypatch.context() as patch:
        broken = fail_in(patch, dataset, error)
        with no_thread_left(), pytest.raises(type(error)) as raised:
            within(60, lambda: extract(mini, broken, run, settings(shard_size=10, threads=lanes)))
    assert raised.value is error
    assert closed == opened  # no source stays open,
    assert max(opened) < 400  # and far fewer rows were read than planned
    assert not list(run.rglob("*.tmp"))
    committed = sorted(file.name for file in run.glob("part-*"))
    assert committed[:1] == ["part-00000.parquet"]
    assert len(committed) <= 2

    small = dataclasses.replace(dataset, rows=30)
    with pytest.raises(ClipmillError, match="another rows"):
        extract(mini, small, run, settings(shard_size=10))


def test_a_full_disk_is_one_line_and_the_run_can_go_on(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_in_writer(patch, pictures(30), OSError(28, "No space left on device"))
        with no_thread_left(), pytest.raises(ClipmillError) as raised:
            within(60, lambda: extract(mini, pictures(30), run, settings(shard_size=10)))
    assert str(raised.value) == f"cannot write {run / 'part-00001.parquet'}: No space left on device; see --output"
    assert sorted(file.name for file in run.iterdir()) == ["commits", "manifest.json", "part-00000.parquet"]
    extract(mini, pictures(30), run, settings(shard_size=10))
    extract(mini, pictures(30), tmp_path / "straight", settings(shard_size=10))
    assert contents(run) == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("yielded", "message"),
    [
        ([*range(15)], "pictures broke off after 14 rows"),
        ([*range(7), *range(6, 20)], "pictures: row 6 comes after row 6"),  # the first of a batch
        ([0, 2, 1, *range(3, 20)], "pictures: row 1 comes after row 2"),
    ],
)
def test_a_dataset_that_breaks_its_promise_is_a_bug_that_shows(
    yielded: list[int], message: str, mini: Bundle, tmp_path: Path
) -> None:
    def samples(start: int, stop: int) -> Iterator[Sample]:
        for row in yielded:
            yield Sample(row, str(row), "test", None, np.zeros((32, 32, 3), dtype=np.uint8))

    dataset = dataclasses.replace(pictures(20), samples=samples)
    with no_thread_left(), pytest.raises(AssertionError, match=message):
        within(60, lambda: extract(mini, dataset, tmp_path / "run", settings()))
    assert read_manifest(tmp_path / "run")["status"] == "running"


def test_nothing_is_written_when_the_provider_cannot_run(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.session.ort.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ClipmillError, match="no CUDA provider"):
        extract(mini, pictures(3), tmp_path / "run", settings(provider="cuda"))
    assert not (tmp_path / "run").exists()


# What is said ---------------------------------------------------------------------------------------------------------


def test_progress_adds_up_and_the_start_says_what_runs(mini: Bundle, tmp_path: Path) -> None:
    said: list[str] = []
    finished: list[int] = []
    dataset = pictures(20, {3: b""})
    extract(mini, dataset, tmp_path / "run", settings(shard_size=9), started=said.append, advanced=finished.append)
    assert said == ["cpu (asked for), batches of 7, 1 at once, 2 decode workers"]
    assert finished == [0, 7, 2, 7, 2, 2]  # batches do not cross shards


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def slowed(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return function(*arguments, **options)

    return slowed


@pytest.mark.parametrize("stage", ["read", "decode", "run", "write"])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_summary_names_the_stage_that_bound_the_run(
    threads: int, stage: str, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pictures(12, size=(8, 8))
    if stage == "read":
        dataset = watched(dataset, slow(lambda row: None))
    elif stage == "decode":
        monkeypatch.setattr(stream, "decode", slow(decode))
    elif stage == "run":
        monkeypatch.setattr(Tower, "run", slow(Tower.run))
    else:
        monkeypatch.setattr(stream.Run, "commit", slow(stream.Run.commit))
    choice = settings(batch_size=1, workers=threads, threads=threads, shard_size=1)
    summary = extract(mini, dataset, tmp_path / "run", choice)["summary"]
    assert summary["bound_by"] == stage
    assert list(summary["stages"]) == ["read", "decode", "run", "write"]
    sharing = threads if stage in ("decode", "run") else 1
    assert 12 * 0.05 / sharing <= summary["stages"][stage]["busy"] <= summary["seconds"]
    for times in summary["stages"].values():
        assert times["busy"] + times["waiting"] == pytest.approx(summary["seconds"], abs=0.002)
    assert summary["images_per_second"] == pytest.approx(12 / summary["seconds"], rel=0.01)
    assert (summary["images"], summary["provider"]) == (12, "cpu")
    assert (summary["batch_size"], summary["workers"], summary["threads"]) == (1, threads, threads)


def test_many_threads_that_are_idle_half_the_time_bind_nothing(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading takes 0.05 s an image; decoding and running take as long each, but four threads share either."""
    monkeypatch.setattr(stream, "decode", slow(decode))
    monkeypatch.setattr(Tower, "run", slow(Tower.run))
    dataset = watched(pictures(12, size=(8, 8)), slow(lambda row: None))
    summary = extract(mini, dataset, tmp_path / "run", settings(batch_size=1, workers=4, threads=4))["summary"]
    assert summary["bound_by"] == "read"
