"""Redundancy: ranks from the singular values, the greedy order by brute force, the curve by scikit-learn's SVC."""

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy, ortho_group
from sklearn.preprocessing import normalize
from sklearn.svm import SVC

from engine.kernels import cosine_logits
from probes.linear import class_agnostic
from probes.redundancy import effective_rank, greedy_order, redundancy


def prompts(count: int) -> npt.NDArray[Any]:
    return np.random.default_rng(2).normal(size=(count, 12))


def embeddings(rows: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, rows)
    return np.random.default_rng(1).normal(size=(4, 12))[y] + rng.normal(0, 1, (rows, 12)), y


@given(st.integers(1, 20), st.integers(1, 20), st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_effective_rank_is_the_entropy_of_the_singular_values(rows: int, columns: int, scale: float, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    for same in (matrix, scale * matrix.T):
        assert effective_rank(same) == pytest.approx(np.exp(entropy(np.linalg.svd(matrix)[1])))


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(ortho_group.rvs(9, random_state=0)[:5]) == pytest.approx(5)
    assert effective_rank(np.tile(prompts(1), (6, 1))) == pytest.approx(1)
    assert effective_rank([[3, 0], [0, 1]]) == pytest.approx(4 / 3**0.75)  # exp(H(3/4, 1/4))
    assert effective_rank(np.zeros((2, 3))) == 0


def brute_force_order(logits: npt.NDArray[Any]) -> list[int]:
    """Each next column is that with the largest residual of a least-squares fit on the columns taken so far."""
    columns = logits - logits.mean(axis=0)
    taken: list[int] = []
    while len(taken) < columns.shape[1]:
        fitted = columns[:, taken] @ np.linalg.lstsq(columns[:, taken], columns)[0]
        lengths = np.linalg.norm(columns - fitted, axis=0)
        lengths[taken] = -1
        taken.append(int(lengths.argmax()))
    return taken


@given(st.integers(2, 60), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_greedy_order_takes_the_largest_residual(rows: int, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # A mean that dwarfs the spread: were the columns not centred, the first choice would be the largest mean.
    logits = rng.normal(size=(rows, count)) * rng.uniform(0.5, 2, count) + rng.uniform(-50, 50, count)
    order = greedy_order(logits)
    assert (order.dtype, sorted(order)) == (np.int64, list(range(count)))
    assert order[: rows - 1].tolist() == brute_force_order(logits)[: rows - 1]


def test_duplicated_prompts_come_last() -> None:
    logits = normalize(embeddings(100, 0)[0]) @ normalize(np.vstack([prompts(6), 2 * prompts(6)])).T
    assert sorted(greedy_order(logits)[:6] % 6) == list(range(6))
    blend = np.column_stack([logits[:, :5], logits[:, :2].mean(axis=1), np.full(100, 0.3)])
    # Of two prompts and their mean any two explain the third; a prompt that is the same for all rows is no prompt.
    assert set(greedy_order(blend)[-2:]) - {0, 1, 5} == {6}


def test_redundancy_result() -> None:
    (X, y), (test_X, test_y) = embeddings(150, 0), embeddings(100, 3)
    text, unit = prompts(11), normalize(prompts(11))
    result = redundancy(X, y, test_X, test_y, text)
    assert json.loads(json.dumps(result, allow_nan=False)) == result == redundancy(X, y, test_X, test_y, text)
    # The kernel's cosines, for an SVM may send a row on its boundary either way when the last bit differs.
    z, test_z = cosine_logits(X, text), cosine_logits(test_X, text)
    order, at_random = brute_force_order(z.astype(np.float64)), np.random.default_rng(42).permutation(11).tolist()

    def accuracy(columns: list[int]) -> float:
        svm = SVC(kernel="linear", C=1.0, random_state=42)
        return float(svm.fit(z[:, columns], y).score(test_z[:, columns], test_y))

    assert result == {
        "probe": "redundancy",
        "accuracy": class_agnostic(X, y, test_X, test_y, text)["accuracy"],
        "chance": 0.25,
        "prompts": 11,
        "effective_rank": pytest.approx(effective_rank(unit), rel=1e-5),
        "centred_effective_rank": pytest.approx(effective_rank(unit - unit.mean(axis=0)), rel=1e-5),
        "effective_rank_of_logits": pytest.approx(effective_rank(z - z.mean(axis=0)), rel=1e-5),
        "first": order[:10],
        "curve": [
            {"prompts": k, "accuracy": accuracy(order[:k]), "random_accuracy": accuracy(at_random[:k])}
            for k in (1, 2, 4, 8, 11)
        ],
    }
    for sizes in ([1], [1, 2], [1, 2, 3], [1, 2, 4, 8]):
        few = redundancy(X, y, test_X, test_y, prompts(sizes[-1]))
        assert ([point["prompts"] for point in few["curve"]], len(few["first"])) == (sizes, sizes[-1])


def test_arrays_that_cannot_be_used_are_refused() -> None:
    X, y = embeddings(20, 0)
    spoiled = np.where(np.arange(20)[:, None] == 3, np.nan, X)
    for bad_X, bad_y, text, message in [
        (X, np.where(y == 1, -1, y), prompts(5), "rows without a label"),
        (X, np.zeros(20, int), prompts(5), "number of classes has to be greater than one"),
        (X, y, prompts(5)[:, 1:], "12 dimensions, text embeddings 11"),
        (spoiled, y, prompts(5), "row 3 of the embeddings holds a NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            redundancy(bad_X, bad_y, X, y, text)
    for function in (effective_rank, greedy_order):
        with pytest.raises(ValueError, match="contains NaN"):
            function(spoiled)
