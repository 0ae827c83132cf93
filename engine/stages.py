"""What lets the stages of a stream overlap, and tells which one the others waited for."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1  # how long a stage that nobody reads from any more may take to notice


class StageClock:
    """Busy seconds of each stage. Each stage is measured by one thread."""

    def __init__(self, *stages: str) -> None:
        self.started = time.perf_counter()
        self.busy = dict.fromkeys(stages, 0.0)

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.busy[stage] += time.perf_counter() - start

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Iterate over `items` in a thread of its own; `depth` of them may wait for the consumer, and one is in the making.

    What the thread raises is raised at the consumer. Closing this generator stops the thread and closes `items`, though
    not what `items` itself reads from: whoever chains several closes each, the last first.
    """
    ahead: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put((item, error), timeout=POLL_SECONDS)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None):
                    break
            put(None, StopIteration())
        except BaseException as error:  # carried to the consumer, whatever it is
            put(None, error)
        finally:
            if hasattr(items, "close"):
                items.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()
