"""Subsets of a dataset: which rows, in which order, and what stays of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.datasets.subset import BRIDGED_GAP, Subset, take
from engine.datasets.types import Dataset, Sample
from engine.errors import ClipmillError

NAMES = ("ant", "bee", "cat", "7")


def numbered(labels: list[int], asked: list[tuple[int, int]] | None = None) -> Dataset:
    """A dataset of these labels, -1 for none, that notes in `asked` which ranges it was asked for."""

    def samples(start: int, stop: int) -> Iterator[Sample]:
        if asked is not None:
            asked.append((start, stop))
        for row in range(start, stop):
            label = None if labels[row] < 0 else labels[row]
            yield Sample(row, f"key{row}", "all", label, np.zeros((1, 1, 3), np.uint8))

    return Dataset(
        name="numbered",
        slug="numbered",
        split="all",
        class_names=NAMES,
        rows=len(labels),
        image_size=(1, 1),
        identity={"sha256": "x"},
        samples=samples,
        labels=lambda: np.array(labels, dtype=np.int64),
    )


def rows_of(dataset: Dataset) -> list[int]:
    return [sample.row for sample in dataset.samples(0, dataset.rows)]


def test_named_classes_keep_rows_labels_and_names() -> None:
    chosen = take(numbered([0, 1, 2, 1, -1, 3]), Subset(classes="cat, bee"))
    assert rows_of(chosen) == [1, 2, 3]
    assert [sample.label for sample in chosen.samples(0, 3)] == chosen.labels().tolist() == [1, 2, 1]
    assert chosen.class_names == NAMES
    assert chosen.classes == (1, 2)
    assert chosen.subset == {"classes": [1, 2]}


def test_a_number_of_classes_is_drawn_by_its_seed() -> None:
    whole = numbered([0, 1, 2, 3] * 5)
    drawn = {seed: take(whole, Subset(classes="2", class_seed=seed)).classes for seed in range(60)}
    assert drawn == {seed: take(whole, Subset(classes="2", class_seed=seed)).classes for seed in range(60)}
    assert all(classes is not None and len(classes) == 2 for classes in drawn.values())
    assert len(set(drawn.values())) == 6  # of 4 classes there are 6 pairs


def test_a_class_that_is_called_a_number_is_a_name() -> None:
    assert take(numbered([0, 3, 3]), Subset(classes="7")).classes == (3,)


def test_rows_that_no_class_has_are_not_dropped_in_silence() -> None:
    assert take(numbered([0, 1, -1, -1]), Subset(classes="bee")).notes == (
        "passed over: 2 image(s) without a label, so in none of the --classes",
    )


def test_a_name_with_a_comma_is_asked_for_alone() -> None:
    whole = replace(numbered([0, 1, 2]), class_names=("ant", "bee, honey", "bee"))
    assert take(whole, Subset(classes="bee, honey")).classes == (1,)
    assert take(whole, Subset(classes="bee, ant")).classes == (0, 2)


def test_a_sample_is_stratified() -> None:
    sampled = take(numbered([0] * 60 + [1] * 30 + [-1] * 10), Subset(sample=20, seed=3))
    assert np.unique(sampled.labels(), return_counts=True)[1].tolist() == [2, 12, 6]
    assert rows_of(sampled) == sorted(set(rows_of(sampled)))
    assert rows_of(take(numbered([0] * 100), Subset(sample=20, seed=1))) != rows_of(
        take(numbered([0] * 100), Subset(sample=20, seed=2))
    )


def test_classes_then_sample_then_limit() -> None:
    chosen = take(numbered([0, 1] * 50), Subset(classes="bee", sample=10, limit=4))
    assert chosen.rows == 4
    assert set(chosen.labels().tolist()) == {1}
    assert set(chosen.subset) == {"classes", "sample", "seed", "limit"}


def test_nothing_asked_changes_nothing() -> None:
    whole = numbered([0, 1])
    assert take(whole, Subset()) is whole


def test_large_gaps_are_not_read() -> None:
    asked: list[tuple[int, int]] = []
    labels = [1] + [0] * 10 + [1] + [0] * (BRIDGED_GAP + 1) + [1]
    assert rows_of(take(numbered(labels, asked), Subset(classes="bee"))) == [0, 11, len(labels) - 1]
    assert asked == [(0, 12), (len(labels) - 1, len(labels))]


@given(st.data())
def test_any_range_is_the_slice(data: Any) -> None:
    labels = data.draw(st.lists(st.integers(-1, 3), min_size=1, max_size=40).filter(lambda found: 1 in found))
    subset = take(numbered(labels), Subset(classes="bee,ant"))
    start = data.draw(st.integers(0, subset.rows))
    stop = data.draw(st.integers(start, subset.rows))
    assert [sample.row for sample in subset.samples(start, stop)] == rows_of(subset)[start:stop]


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        (Subset(classes="bea"), ["--classes", '"bea"', '"bee"']),
        (Subset(classes="5"), ["--classes 5", "4 classes"]),
        (Subset(classes="0"), ["--classes 0"]),
        (Subset(classes="cat"), ["no image of the classes", "--classes"]),
        (Subset(sample=4), ["--sample 4", "3 rows"]),
        (Subset(sample=0), ["--sample 0"]),
        (Subset(limit=-1), ["--limit -1"]),
    ],
)
def test_what_cannot_be_chosen(subset: Subset, words: list[str]) -> None:
    with pytest.raises(ClipmillError) as caught:
        take(numbered([0, 1, 1]), subset)
    for word in words:
        assert word in str(caught.value)
