"""prefetch(): order, a bounded lead, errors that arrive, and nothing left running. StageClock: what it adds up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from threads import no_thread_left, within

from engine import stages
from engine.stages import POLL_SECONDS, StageClock, prefetch


class Source:
    """Counts 0, 1, 2...; knows how far it was read, in which thread, and that it was closed."""

    def __init__(self, length: int = 1_000_000, error: BaseException | None = None) -> None:
        self.length, self.error = length, error
        self.pulled = 0
        self.thread: threading.Thread | None = None
        self.closed = False

    def items(self) -> Iterator[int]:
        try:
            for item in range(self.length):
                self.thread = threading.current_thread()
                self.pulled += 1
                yield item
            if self.error:
                raise self.error
        finally:
            self.closed = True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 500])
def test_everything_arrives_in_order(depth: int, length: int) -> None:
    source = Source(length)
    with no_thread_left():
        assert within(20, lambda: list(prefetch(source.items(), depth))) == list(range(length))
    assert source.closed


def test_any_iterable_will_do() -> None:
    assert within(20, lambda: list(prefetch([None, False, 0], 2))) == [None, False, 0]


@pytest.mark.parametrize("depth", [1, 3])
def test_the_producer_runs_ahead_in_its_own_thread_and_only_so_far(depth: int) -> None:
    source = Source()
    with closing(prefetch(source.items(), depth)) as ahead:
        for taken in range(1, 4):
            assert next(ahead) == taken - 1
            # `depth` wait in the queue, and the producer holds one for which there is no room
            wait_until(lambda taken=taken: source.pulled == taken + depth + 1)
            time.sleep(2 * POLL_SECONDS)
            assert source.pulled == taken + depth + 1
    assert source.thread is not None
    assert source.thread is not threading.current_thread()


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_an_error_comes_after_the_items_before_it(error: BaseException) -> None:
    source, items = Source(5, error), []
    held = source.items()  # so that closing it is not left to the garbage collector

    def consume() -> None:
        for item in prefetch(held, 2):
            items.append(item)

    with no_thread_left(), pytest.raises(type(error)) as raised:
        within(20, consume)
    assert raised.value is error
    assert items == [0, 1, 2, 3, 4]
    assert source.closed


def test_an_iterable_that_cannot_even_start_is_an_error_and_no_hang() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("gone")

    with no_thread_left(), pytest.raises(OSError, match="gone"):
        within(20, lambda: list(prefetch(Broken(), 2)))


def test_closing_early_stops_the_producer_and_closes_its_source() -> None:
    source = Source()
    held = source.items()
    with no_thread_left():
        ahead = prefetch(held, 2)
        assert [next(ahead), next(ahead)] == [0, 1]
        wait_until(lambda: source.pulled == 5)  # it stands at a full queue
        within(20, ahead.close)
        assert source.closed
        assert source.pulled == 5
        assert source.thread is not None
        assert not source.thread.is_alive()


def test_closing_while_the_source_is_slow_waits_for_its_item_and_no_more() -> None:
    asked, go = threading.Event(), threading.Event()
    taken = []

    def slow() -> Iterator[int]:
        for item in range(10):
            taken.append(item)
            if item == 1:
                asked.set()
                assert go.wait(20)
            yield item

    with no_thread_left():
        ahead = prefetch(slow(), 2)
        assert next(ahead) == 0
        assert asked.wait(20)
        later = threading.Timer(0.1, go.set)
        later.start()
        within(20, ahead.close)
        later.join()
    assert go.is_set()
    assert len(taken) <= 4  # 1, and should the stop have come late, what fits into the queue and one hand


def test_a_consumer_that_fails_leaves_nothing_running() -> None:
    source = Source()

    def consume() -> list[float]:
        with closing(prefetch(source.items(), 2)) as ahead:
            return [1 / (3 - item) for item in ahead]

    with no_thread_left(), pytest.raises(ZeroDivisionError):
        within(20, consume)
    assert source.closed


def test_a_chain_is_closed_the_last_first() -> None:
    source = Source()
    with no_thread_left():
        with closing(prefetch(source.items(), 2)) as first:
            doubled = (2 * item for item in first)
            with closing(prefetch(doubled, 2)) as second:
                assert [next(second) for _ in range(4)] == [0, 2, 4, 6]
                # in flight at most: a queue of two and one in hand for each of the two stages
                wait_until(lambda: source.pulled == 4 + 6)
        assert source.closed


def test_one_that_is_never_read_starts_no_thread() -> None:
    source = Source()
    with no_thread_left():
        ahead = prefetch(source.items(), 2)
        ahead.close()
    assert source.pulled == 0


def test_the_clock_adds_what_each_stage_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 101.0, 101.5, 103.0, 105.0, 106.0, 106.25, 110.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(ticks))
    clock = StageClock("read", "run", "write")
    with clock.measure("read"):
        pass
    with clock.measure("run"):
        pass
    with pytest.raises(OSError, match="full"), clock.measure("read"):
        raise OSError("full")
    assert clock.busy == {"read": 0.75, "run": 2.0, "write": 0.0}
    assert clock.seconds == 10.0
