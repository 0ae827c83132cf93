"""What a stream may hold in memory, what it leaves running when a stage fails, and what it says of itself."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import contents, pictures, settings, watched
from threads import no_thread_left, within

from engine import shards, stream
from engine.bundle import Bundle
from engine.datasets import Dataset, Sample
from engine.decode import decode
from engine.errors import ClipmillError
from engine.manifest import read_manifest
from engine.session import Tower
from engine.stream import QUEUE_DEPTH, extract


def test_memory_holds_a_few_batches_and_not_a_shard(mini: Bundle, tmp_path: Path) -> None:
    """One shard of 60 batches, and a writer slow enough for every stage before it to run as far ahead as it can."""
    workers, batch_size, rows = 2, 4, 240
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
    extract(mini, dataset, tmp_path / "run", settings(workers=workers, batch_size=batch_size), advanced=advanced)
    # one batch a worker and one being read; two queues, and between them each stage has one in hand
    in_flight = (workers + 1) + 2 * QUEUE_DEPTH + 3
    assert 3 * batch_size < lead <= in_flight * batch_size
    assert most_alive <= (in_flight + 3) * batch_size  # and each stage may still hold the one it handed on
    assert pulled == finished == rows


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
def test_an_error_in_any_stage_surfaces_as_itself(
    fail_in: Callable[..., Dataset], error: BaseException, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
            within(60, lambda: extract(mini, broken, run, settings(shard_size=10)))
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
    assert said == ["cpu (asked for), batches of 7, 2 decode workers"]
    assert finished == [0, 7, 2, 7, 2, 2]  # batches do not cross shards


@pytest.mark.parametrize("stage", ["read", "decode", "run", "write"])
def test_the_summary_names_the_stage_that_bound_the_run(
    stage: str, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def slowed(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.05)
            return function(*arguments, **options)

        return slowed

    dataset = pictures(12, size=(8, 8))
    if stage == "read":
        dataset = watched(dataset, slow(lambda row: None))
    elif stage == "decode":
        monkeypatch.setattr(stream, "decode", slow(decode))
    elif stage == "run":
        monkeypatch.setattr(Tower, "run", slow(Tower.run))
    else:
        monkeypatch.setattr(stream.Run, "commit", slow(stream.Run.commit))
    summary = extract(mini, dataset, tmp_path / "run", settings(batch_size=1, workers=1, shard_size=1))["summary"]
    assert summary["bound_by"] == stage
    assert list(summary["stages"]) == ["read", "decode", "run", "write"]
    assert 12 * 0.05 <= summary["stages"][stage]["busy"] <= summary["seconds"]
    for times in summary["stages"].values():
        assert times["busy"] + times["waiting"] == pytest.approx(summary["seconds"], abs=0.002)
    assert summary["images_per_second"] == pytest.approx(12 / summary["seconds"], rel=0.01)
    assert (summary["images"], summary["provider"]) == (12, "cpu")
    assert (summary["batch_size"], summary["workers"], summary["threads"]) == (1, 1, 1)
