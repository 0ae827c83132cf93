"""Contingency tables and purity against scikit-learn, whatever the labels are called."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import confusion_matrix
from sklearn.metrics.cluster import contingency_matrix

from engine.counting import contingency, purity

Integers = npt.NDArray[np.integer]

# The first example may compile for seconds, which is no property of the example.
unhurried = settings(deadline=None, max_examples=60)
integers = st.integers(-(2**63), 2**63 - 1)


def pairs(low: int, high: int, most: int = 60) -> st.SearchStrategy[tuple[Integers, Integers]]:
    """Two labellings of 1 to `most` rows."""
    dtypes = st.sampled_from([np.int8, np.int32, np.int64])
    return st.tuples(st.integers(1, most), dtypes).flatmap(
        lambda drawn: st.tuples(*[hnp.arrays(drawn[1], drawn[0], elements=st.integers(low, high))] * 2)
    )


def reference_purity(labels: Integers, clusters: Integers) -> float:
    return float(contingency_matrix(labels, clusters).max(axis=0).sum() / len(labels))


@unhurried
@given(pairs(0, 5))
def test_contingency_equals_the_confusion_matrix(pair: tuple[Integers, Integers]) -> None:
    true, predicted = pair
    counts = contingency(true, predicted, (6, 6))
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, confusion_matrix(true, predicted, labels=range(6)))


@unhurried
@given(pairs(0, 8))
def test_contingency_equals_the_contingency_matrix(pair: tuple[Integers, Integers]) -> None:
    labels, others = (np.unique(each, return_inverse=True)[1] for each in pair)  # the reference has no empty rows
    shape = (int(labels.max()) + 1, int(others.max()) + 1)
    np.testing.assert_array_equal(contingency(labels, others, shape), contingency_matrix(labels, others))


def test_contingency_takes_any_memory_layout() -> None:
    labels = np.arange(12) % 3
    labels.setflags(write=False)
    np.testing.assert_array_equal(contingency(labels[::3], labels[::-3], (3, 3)), [[0, 0, 4], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("labels", "others", "message"),
    [
        ([], [], "labels must be 1-D and not empty"),
        ([0, 1], [0], "2 labels but 1 others"),
        ([0, 1], [[0, 1]], "other labels must be 1-D"),
        ([0.0, 1.0], [0, 1], "labels must be integers, not float64"),
        ([True, False], [0, 1], "labels must be integers, not bool"),
        ([0, 2], [0, 1], "^labels must lie from 0 to 1, they go from 0 to 2"),
        ([0, 1], [-1, 2], "other labels must lie from 0 to 2, they go from -1 to 2"),
        ([0, 1], [0, 3], "other labels must lie from 0 to 2, they go from 0 to 3"),
    ],
)
def test_contingency_refuses_what_has_no_place_in_the_table(labels: list[int], others: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contingency(labels, others, (2, 3))


@unhurried
@given(st.one_of(pairs(-3, 5), pairs(-2, 1), pairs(-128, 127)))
def test_purity_equals_the_contingency_matrix(pair: tuple[Integers, Integers]) -> None:
    assert purity(*pair) == pytest.approx(reference_purity(*pair), abs=1e-12)


@pytest.mark.parametrize("labels", [2, 100, 30_000])
@pytest.mark.parametrize("clusters", [2, 100, 30_000])
@pytest.mark.parametrize("sparse", [1, 10**12])
def test_purity_of_few_labels_and_of_many(labels: int, clusters: int, sparse: int) -> None:
    random = np.random.default_rng(labels + clusters)
    of_label, of_cluster = random.integers(0, labels, 20_000), random.integers(0, clusters, 20_000)
    expected = reference_purity(of_label, of_cluster)
    assert purity(of_label * sparse, of_cluster * -sparse) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("classes", [1, 3, 5000])
def test_perfect_clusters_have_purity_one(classes: int) -> None:
    labels = np.random.default_rng(classes).integers(0, classes, 10_000)
    assert purity(labels, labels) == 1.0
    assert purity(labels, np.random.default_rng(0).permutation(classes)[labels]) == 1.0
    assert purity(labels, np.arange(10_000)) == 1.0  # a cluster of its own for each row


@unhurried
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
    st.lists(integers, min_size=4, max_size=4, unique=True),
    st.lists(integers, min_size=4, max_size=4, unique=True),
)
def test_purity_depends_on_no_label_value(
    rows: list[tuple[int, int]], label_names: list[int], cluster_names: list[int]
) -> None:
    labels, clusters = np.array(rows).T
    renamed = purity(np.array(label_names)[labels], np.array(cluster_names)[clusters])
    assert renamed == purity(labels, clusters)


def test_purity_of_the_textbook_example() -> None:
    # Manning et al., figure 16.4: 17 points, majorities of 5, 4 and 3.
    clusters = np.repeat([1, 2, 3], [6, 6, 5])
    labels = np.array(list("xxxxxoxoooodxxddd")).view(np.uint32)
    assert purity(labels, clusters) == pytest.approx(12 / 17)
    assert purity(labels, labels) == 1.0


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_purity_takes_every_integer_dtype_to_its_ends(dtype: type[np.integer]) -> None:
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    assert purity(ends[[0, 0, 1, 1]], ends[[1, 1, 0, 1]]) == 0.75


@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        ([], [], "not empty"),
        ([1, 2], [1], "2 labels but 1 clusters"),
        ([[1, 2]], [1, 2], "1-D"),
        ([0.5, 1.0], [1, 2], "labels must be integers"),
        ([1, 2], ["a", "b"], "clusters must be integers"),
    ],
)
def test_purity_refuses_what_is_no_labelling(labels: list[int], clusters: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        purity(labels, clusters)
