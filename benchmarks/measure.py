"""How every benchmark measures, contestants in turns, and how it tells: machine card, tables, one line of JSON.

No machine is the same for two minutes, so contestants that are compared run in one process, in turns, each once a turn.
The first turn warms up and does not count. A ratio of two is the median over the turns of what they took side by side.

    seconds = take_turns({"loop": timed(loop), "clipmill": timed(clipmill)}, rounds=5)
    ratio(seconds["loop"], seconds["clipmill"])  # how many times faster clipmill is
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import click
import numpy as np
from machine_card import machine_card
from numpy.typing import NDArray

Name = TypeVar("Name", bound=Hashable)
Contestant = Callable[[], float]  # does its work once, and says how many seconds of it count


def take_turns(contestants: Mapping[Name, Contestant], rounds: int) -> dict[Name, list[float]]:
    """Seconds of each contestant in each of `rounds` turns."""
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        click.echo(f"turn {turn} of {rounds}" if turn else "warming up", err=True)
        for name, contestant in contestants.items():
            taken = contestant()
            if turn:
                seconds[name].append(taken)
    return seconds


def timed(work: Callable[[], object]) -> Contestant:
    """A contestant of which every second counts."""

    def contestant() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return contestant


def ratio(baseline: Sequence[float], seconds: Sequence[float]) -> float:
    """How many times faster than the baseline: the median over the turns."""
    return statistics.median(theirs / ours for theirs, ours in zip(baseline, seconds, strict=True))


def speeds(items: int, seconds: Sequence[float]) -> dict[str, float]:
    """Items a second: in the median, the slowest and the fastest turn."""
    chosen = {"median": statistics.median(seconds), "slowest": max(seconds), "fastest": min(seconds)}
    return {name: round(items / taken, 1) for name, taken in chosen.items()}


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows divided by their L2 norm."""
    norms: NDArray[np.float32] = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / norms


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Text columns: the first to the left, the others, which hold figures, to the right."""
    lines = [[*header], *([str(cell) for cell in row] for row in rows)]
    first, *others = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(width) for cell, width in zip(line[1:], others, strict=True))])
        for line in lines
    )


def report(benchmark: str, body: str, result: Mapping[str, Any]) -> None:
    """Print the machine card, a blank line, the body (tables, and what they amount to), and the JSON line."""
    card = machine_card()
    width = max(map(len, card))
    click.echo("\n".join(f"{name:<{width}}  {value}" for name, value in card.items()))
    click.echo(f"\n{body}\n")
    click.echo(json.dumps({"benchmark": benchmark, "machine": card, **result}))
