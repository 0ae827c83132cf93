"""For tests of threads: a call that may not hang, and a block that may leave no thread behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; a failure, and not a test run that stands still, when it takes longer."""
    values: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            values.append(call())
        except BaseException as error:  # handed on, KeyboardInterrupt too
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still at work after {seconds} s"
    for error in errors:
        raise error
    return values[0]


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    """Fails when a thread that was not there before the block is there after it, whether the block raised or not."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        assert set(threading.enumerate()) <= before
