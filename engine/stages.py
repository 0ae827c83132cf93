"""What lets the stages of a stream overlap, and tells which one the others waited for."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
R = TypeVar("R")


class StageClock:
    """Busy seconds of each stage, named with the number of threads that share its work: StageClock(read=1, run=2).

    The seconds of its threads are added and divided by their number, so a stage is never busier than time has passed,
    and one that all the others wait for is about as busy. `measure` may be called from many threads at once.
    """

    def __init__(self, **workers: int) -> None:
        self.started = time.perf_counter()
        self.busy = dict.fromkeys(workers, 0.0)
        self._workers = workers
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                self.busy[stage] += seconds / self._workers[stage]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


class Buffers:
    """uint8 arrays of one shape that stages hand round; no more are made than are in use at once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: deque[NDArray[np.uint8]] = deque()

    def take(self) -> NDArray[np.uint8]:
        """One that holds whatever it held before."""
        try:
            return self._free.pop()
        except IndexError:
            return np.empty(self._shape, dtype=np.uint8)

    def give_back(self, buffer: NDArray[np.uint8]) -> None:
        self._free.append(buffer)


def overlapped(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Generator[R, None, None]:
    """function(item) for each of `items`, in their order, computed in `workers` threads while the consumer is busy.

    One more thread takes the items: workers + ahead of them may be in work or wait for the consumer, and it holds the
    next. What `function` or `items` raises comes in the place of the result. Closing this generator drops what is not
    in work yet, lets the rest finish and ends every thread. `items` it leaves open: whoever chains several closes each,
    the last first.
    """
    slots = threading.Semaphore(workers + ahead)
    results: queue.SimpleQueue[Future[R] | None] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(workers)

    def feed() -> None:
        try:
            for item in items:
                slots.acquire()
                results.put(pool.submit(function, item))
        except BaseException as error:  # carried to the consumer, whatever it is
            failed: Future[R] = Future()
            failed.set_exception(error)
            results.put(failed)
        results.put(None)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        while (future := results.get()) is not None:
            result = future.result()
            slots.release()
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        slots.release()  # for a feeder that waits: the pool takes nothing any more, which ends it
        feeder.join()
