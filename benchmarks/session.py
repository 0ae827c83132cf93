"""The bare towers, images or prompts a second, by precision, batch and lanes: what ONNX Runtime alone gives.

And what the buffers that a tower binds cost or save against a plain `session.run`, which a GPU would not overlap.

A lane is a thread that calls `tower.run`; each operator runs on one thread. Batches are ready before the clock starts:
32x32 pixels of the embedded sample, and random tokens of the length of a usual prompt.

    python benchmarks/session.py --rounds 2
"""

from __future__ import annotations

import tempfile
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from bundles import bare_runs, bundles_option, get_bundle, model_option
from measure import ratio, report, speeds, table, take_turns
from numpy.typing import NDArray

from engine.bundle import Bundle, TowerName
from engine.datasets import open_dataset
from engine.decode import decode
from engine.machine import usable_cpus
from engine.preprocess import image_feeds
from engine.session import Tower

# the text tower of an int8 bundle is in fp32
TOWERS: tuple[tuple[TowerName, str], ...] = (("image", "fp32"), ("image", "int8"), ("text", "fp32"))
BATCH_SIZES = (1, 4, 8, 16, 32)
LEAST_ITEMS = 8  # that a lane gets in a turn: small batches come several times
PROMPT_TOKENS = 16
BOUND_BATCH = 8  # of the comparison of bound buffers with plain runs
BOUND_BATCHES = 1  # of it that a lane gets in a turn
BOUND_ROUNDS = 8  # turns of it, for each round of the rest: the difference is smaller than what turns differ by


class Cell(NamedTuple):
    """A combination that is measured."""

    tower: TowerName
    precision: str
    batch_size: int
    lanes: int

    @property
    def batches(self) -> int:
        return self.lanes * max(1, LEAST_ITEMS // self.batch_size)


@click.command()
@click.option("--rounds", default=2, show_default=True, help="Turns of each combination.")
@model_option
@bundles_option
def main(rounds: int, model: str, bundles: Path | None) -> None:
    """Images/s and prompts/s of the bare towers, by precision, batch and lanes."""
    lane_counts = sorted({1, usable_cpus()})
    contestants, comparisons = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, precision in TOWERS:
            bundle = get_bundle(model, precision, bundles or Path(temporary))
            tower = Tower(bundle, name, "cpu", threads=usable_cpus())
            for batch_size, lanes in product(BATCH_SIZES, lane_counts):
                cell = Cell(name, precision, batch_size, lanes)
                contestants[cell] = bare_runs(tower.run, [_feeds(bundle, cell)] * cell.batches, lanes)
            batches = [_feeds(bundle, Cell(name, precision, BOUND_BATCH, tower.lanes))] * (BOUND_BATCHES * tower.lanes)
            comparisons[f"{name} {precision}", "bound"] = bare_runs(tower.run, batches, tower.lanes)
            comparisons[f"{name} {precision}", "plain"] = bare_runs(
                partial(tower.session.run, None), batches, tower.lanes
            )
        seconds = take_turns(contestants, rounds)
        compared = take_turns(comparisons, BOUND_ROUNDS * rounds)
    speed = {cell: speeds(cell.batches * cell.batch_size, taken) for cell, taken in seconds.items()}
    rows = [
        [f"{name} {precision}", size, *(speed[Cell(name, precision, size, lanes)]["median"] for lanes in lane_counts)]
        for (name, precision), size in product(TOWERS, BATCH_SIZES)
    ]
    body = table(["items/s", "batch", *(f"lanes: {lanes}" for lanes in lane_counts)], rows)
    cells = [{**cell._asdict(), "items_per_second": found} for cell, found in speed.items()]
    over_plain = {what: round(ratio(compared[what, "plain"], compared[what, "bound"]), 3) for what, _ in compared}
    body += "\n\n" + table(["bound buffers over plain run", "ratio"], [[*item] for item in over_plain.items()])
    result = {"rounds": rounds, "model": model, "prompt_tokens": PROMPT_TOKENS, "cells": cells}
    report("session", body, {**result, "bound_over_plain": over_plain})


def _feeds(bundle: Bundle, cell: Cell) -> dict[str, NDArray[Any]]:
    if cell.tower == "image":
        samples = open_dataset("cifar10-sample", "test").samples(0, cell.batch_size)
        return image_feeds(np.stack([decode(sample.image) for sample in samples]), bundle.preprocessing)
    shape = (cell.batch_size, PROMPT_TOKENS)
    input_ids = np.random.default_rng(0).integers(0, bundle.architecture.vocabulary_size, shape)
    return {"input_ids": input_ids, "eos_position": np.full(cell.batch_size, PROMPT_TOKENS - 1)}


if __name__ == "__main__":
    main()
