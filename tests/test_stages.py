"""overlapped(): order, a bounded lead, errors in their place, and nothing left running. The clock and the buffers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from threads import no_thread_left, within

from engine import stages
from engine.stages import Buffers, StageClock, overlapped


def same(item: Any) -> Any:
    return item


def double(item: int) -> int:
    return 2 * item


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


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 500])
def test_everything_arrives_in_order(workers: int, ahead: int, length: int) -> None:
    source = Source(length)
    with no_thread_left():
        results = within(20, lambda: list(overlapped(double, source.items(), workers, ahead)))
    assert results == [2 * item for item in range(length)]
    assert source.closed  # it came to its end


def test_a_slow_item_is_waited_for_while_others_go_on() -> None:
    finished: list[int] = []

    def work(item: int) -> int:
        if item == 0:
            wait_until(lambda: len(finished) == 4)
        finished.append(item)
        return item

    with no_thread_left():
        assert within(30, lambda: list(overlapped(work, range(5), workers=2, ahead=3))) == [0, 1, 2, 3, 4]
    assert finished == [1, 2, 3, 4, 0]


def test_any_iterable_and_any_result_will_do() -> None:
    assert within(20, lambda: list(overlapped(same, [None, False, 0], 2, 1))) == [None, False, 0]


def test_all_the_workers_work_at_once_and_no_more() -> None:
    together, working, most = threading.Barrier(3, timeout=20), 0, 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        together.wait()
        with lock:
            working -= 1
        together.wait()
        return item

    with no_thread_left():
        assert within(30, lambda: list(overlapped(work, range(12), workers=3, ahead=9))) == list(range(12))
    assert most == 3


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (1, 3), (4, 2)])
def test_the_source_is_read_ahead_in_another_thread_and_only_so_far(workers: int, ahead: int) -> None:
    source = Source()
    with closing(overlapped(same, source.items(), workers, ahead)) as results:
        for taken in range(1, 4):
            assert next(results) == taken - 1
            # as many as may be in work or done, and one that waits to be
            wait_until(lambda taken=taken: source.pulled == taken + workers + ahead + 1)
            time.sleep(0.1)
            assert source.pulled == taken + workers + ahead + 1
    assert source.thread is not None
    assert source.thread is not threading.current_thread()


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3), MemoryError()])
@pytest.mark.parametrize("in_function", [False, True])
def test_an_error_comes_after_the_results_before_it(in_function: bool, error: BaseException) -> None:
    source, results = Source(1_000_000 if in_function else 5, error), []
    held = source.items()  # so that closing it is not left to the garbage collector

    def work(item: int) -> int:
        if item == 5:
            raise error
        return item

    def consume() -> None:
        for result in overlapped(work, held, 2, 2):
            results.append(result)

    with no_thread_left(), pytest.raises(type(error)) as raised:
        within(20, consume)
    assert raised.value is error
    assert results == [0, 1, 2, 3, 4]
    assert source.closed != in_function
    assert source.pulled <= 5 + 6


def test_an_iterable_that_cannot_even_start_is_an_error_and_no_hang() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise OSError("gone")

    with no_thread_left(), pytest.raises(OSError, match="gone"):
        within(20, lambda: list(overlapped(same, Broken(), 2, 2)))


def test_closing_early_ends_the_threads_and_leaves_the_source_to_its_owner() -> None:
    source = Source()
    held = source.items()
    with no_thread_left():
        results = overlapped(same, held, 1, 2)
        assert [next(results), next(results)] == [0, 1]
        wait_until(lambda: source.pulled == 6)  # no room for this one
        within(20, results.close)
    assert source.pulled == 6
    assert not source.closed
    assert next(held) == 6


def test_closing_lets_the_item_in_work_finish_and_drops_the_rest() -> None:
    source, begun, finished, go = Source(), [], [], threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            assert go.wait(20)
        finished.append(item)
        return item

    with no_thread_left():
        results = overlapped(work, source.items(), 1, 3)
        assert next(results) == 0
        wait_until(lambda: source.pulled == 6 and begun == [0, 1])
        later = threading.Timer(0.1, go.set)
        later.start()
        within(20, results.close)
        later.join()
    assert begun == finished == [0, 1]


def test_closing_while_the_source_is_slow_waits_for_its_item_and_no_more() -> None:
    asked, go = threading.Event(), threading.Event()
    taken, worked = [], []

    def slow() -> Iterator[int]:
        for item in range(10):
            taken.append(item)
            if item == 1:
                asked.set()
                assert go.wait(20)
            yield item

    with no_thread_left():
        results = overlapped(worked.append, slow(), 2, 2)
        next(results)
        assert asked.wait(20)
        later = threading.Timer(0.1, go.set)
        later.start()
        within(20, results.close)
        later.join()
    assert taken == [0, 1]
    assert worked == [0]


def test_a_consumer_that_fails_leaves_nothing_running() -> None:
    def consume() -> list[float]:
        with closing(overlapped(same, Source().items(), 2, 2)) as results:
            return [1 / (3 - item) for item in results]

    with no_thread_left(), pytest.raises(ZeroDivisionError):
        within(20, consume)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Sends what Ctrl-C does to the main thread, also where the tests themselves run with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_a_consumer_that_waits_leaves_nothing_running(ctrl_c: Callable[[], None]) -> None:
    go = threading.Event()

    def interrupt() -> None:
        ctrl_c()
        go.set()

    with no_thread_left():
        later = threading.Timer(0.2, interrupt)
        later.start()
        results = overlapped(lambda _: go.wait(20), range(1000), 2, 2)
        with pytest.raises(KeyboardInterrupt), closing(results):
            list(results)
        later.join()


def test_a_chain_is_closed_the_last_first() -> None:
    source = Source()
    held = source.items()
    with no_thread_left():
        with closing(overlapped(double, held, 2, 1)) as first, closing(overlapped(double, first, 1, 2)) as second:
            assert [next(second) for _ in range(4)] == [0, 4, 8, 12]
            # each stage holds what may be in work or done, and the next
            wait_until(lambda: source.pulled == 4 + 2 * (3 + 1))
        held.close()
    assert source.closed
    assert source.pulled == 12


def test_one_that_is_never_read_starts_no_thread() -> None:
    source = Source()
    with no_thread_left():
        overlapped(same, source.items(), 2, 2).close()
    assert source.pulled == 0


# The clock and the buffers ------------------------------------------------------------------------------------------


def test_the_clock_adds_what_each_stage_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 101.0, 101.5, 103.0, 105.0, 106.0, 106.25, 110.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(ticks))
    clock = StageClock(read=1, run=4, write=1)
    with clock.measure("read"):
        pass
    with clock.measure("run"):
        pass
    with pytest.raises(OSError, match="full"), clock.measure("read"):
        raise OSError("full")
    assert clock.busy == {"read": 0.75, "run": 0.5, "write": 0.0}  # the run: 2 s of one of four threads
    assert clock.seconds == 10.0


def test_no_measure_is_lost_when_many_threads_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(dict[str, float]):
        """So slow to be read that another thread would write in between."""

        def __getitem__(self, stage: str) -> float:
            busy = super().__getitem__(stage)
            time.sleep(0.001)
            return busy

    own = threading.local()

    def tick() -> float:
        own.now = getattr(own, "now", 0.0) + 1
        return float(own.now)

    clock = StageClock(run=4)
    clock.busy = Slow(run=0.0)
    monkeypatch.setattr(stages.time, "perf_counter", tick)

    def measure(item: int) -> None:
        with clock.measure("run"):
            pass

    within(20, lambda: list(overlapped(measure, range(80), 8, 8)))
    assert clock.busy == {"run": 20.0}  # 80 of a second each, by four threads as far as the clock knows


def test_a_buffer_is_made_only_when_all_are_in_use() -> None:
    buffers = Buffers((2, 3))
    one, two = buffers.take(), buffers.take()
    assert one is not two
    assert (one.shape, one.dtype) == ((2, 3), "uint8")
    buffers.give_back(one)
    assert buffers.take() is one
    assert buffers.take() is not one
