"""The classifiers: each against the same thing written out by hand in scikit-learn, its chosen parameter included."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC

from probes import classifiers
from probes.classifiers import CLASSIFIERS, classify, linear_svm, svm_seconds
from probes.linear import class_agnostic

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Predict = Callable[[Array, Labels, Array], Labels]

CLASSES, DIMENSIONS = 4, 8


def rows_and_labels(rows: int, seed: int) -> tuple[Array, Labels]:
    """Overlapping classes of unequal sizes, in features of unequal scale."""
    rng = np.random.default_rng(seed)
    y = rng.choice(CLASSES, rows, p=[0.4, 0.3, 0.2, 0.1])
    directions = np.random.default_rng(1).normal(size=(CLASSES, DIMENSIONS))
    X = (directions[y] + rng.normal(0, 1, (rows, DIMENSIONS))) * np.geomspace(0.01, 1, DIMENSIONS)
    return X, y


def svm(C: float) -> Predict:
    return lambda X, y, test: SVC(kernel="linear", C=C, random_state=42).fit(X, y).predict(test)


def neighbours(n_neighbors: float) -> Predict:
    return lambda X, y, test: KNeighborsClassifier(n_neighbors=int(n_neighbors)).fit(X, y).predict(test)


def scaled(estimator: Callable[[], Any]) -> Predict:
    def predict(X: Array, y: Labels, test: Array) -> Labels:
        mean, spread = X.mean(axis=0), X.std(axis=0)
        predicted: Labels = estimator().fit((X - mean) / spread, y).predict((test - mean) / spread)
        return predicted

    return predict


def logistic(C: float) -> Predict:
    return scaled(lambda: LogisticRegression(C=C, max_iter=2_000))


CANDIDATES: dict[str, tuple[str, list[float], Callable[[float], Predict]]] = {
    "chosen-svm": ("C", [1, 10, 100, 1_000, 10_000], svm),
    "logistic": ("C", [0.0001, 0.001, 0.01, 0.1], logistic),
    "knn": ("n_neighbors", [1, 5, 10, 20, 50], neighbours),
}
FIXED: dict[str, Predict] = {
    "svm": svm(1.0),
    "scaled-svm": scaled(lambda: SVC(kernel="linear", C=1.0, random_state=42)),
    "mlp": scaled(lambda: MLPClassifier(hidden_layer_sizes=(256,), early_stopping=True, max_iter=200, random_state=42)),
}


def held_out_accuracies(name: str, X: Array, y: Labels) -> list[float]:
    """Of each candidate, fitted on four fifths of the rows, on the stratified fifth that is left."""
    _, values, candidate = CANDIDATES[name]
    split = StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=42)
    ((fitted, held_out),) = split.split(X, y)
    assert len(held_out) == round(len(y) / 5)
    return [float((candidate(value)(X[fitted], y[fitted], X[held_out]) == y[held_out]).mean()) for value in values]


def test_every_classifier_is_written_out_here() -> None:
    assert set(CLASSIFIERS) == set(CANDIDATES) | set(FIXED)


@pytest.mark.parametrize("name", FIXED)
def test_a_classifier_without_a_choice(name: str) -> None:
    (X, y), (test_X, test_y) = rows_and_labels(300, 0), rows_and_labels(100, 3)
    predicted = FIXED[name](X, y, test_X)
    result = classify("tried", CLASSIFIERS[name](), X, y, test_X, test_y)
    assert (result["probe"], result["train_rows"], result["test_rows"]) == ("tried", 300, 100)
    assert result["accuracy"] == (predicted == test_y).mean() > result["chance"] == 0.25
    assert result["confusion"] == confusion_matrix(test_y, predicted).tolist()
    assert not {"chosen", "validation"} & set(result)


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_parameter_is_chosen_on_a_fifth_of_the_train_rows(name: str) -> None:
    (X, y), (test_X, test_y) = rows_and_labels(300, 0), rows_and_labels(100, 3)
    parameter, values, candidate = CANDIDATES[name]
    accuracies = held_out_accuracies(name, X, y)
    result = classify("tried", CLASSIFIERS[name](), X, y, test_X, test_y)
    assert result["validation"] == [
        {parameter: value, "accuracy": pytest.approx(accuracy)}
        for value, accuracy in zip(values, accuracies, strict=True)
    ]
    best = values[int(np.argmax(accuracies))]  # of equally good ones, the first
    assert result["chosen"] == {parameter: best}
    # What is scored has learned from all of the train rows.
    predicted = candidate(best)(X, y, test_X)
    assert result["accuracy"] == (predicted == test_y).mean()
    assert result["confusion"] == confusion_matrix(test_y, predicted).tolist()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_on_the_logits_of_prompts_it_is_the_same_classifier(name: str) -> None:
    (X, y), (test_X, test_y) = rows_and_labels(300, 0), rows_and_labels(100, 3)
    text = np.random.default_rng(2).normal(size=(6, DIMENSIONS))
    z, test_z = (cosine_similarity(rows, text) for rows in (X, test_X))
    result = class_agnostic(X, y, test_X, test_y, text, classifier=name)
    expected = classify("class-agnostic", CLASSIFIERS[name](), z, y, test_z, test_y)
    assert result["classifier"] == name
    # One row of the 100, for the cosines differ in their last bits.
    assert result["accuracy"] == pytest.approx(expected["accuracy"], abs=0.011)
    assert result.get("chosen") == expected.get("chosen")
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_thesis_svm() -> None:
    expected = {"kernel": "linear", "C": 1.0, "random_state": 42}
    assert {name: linear_svm().get_params()[name] for name in expected} == expected
    assert linear_svm(C=7.0).get_params()["C"] == 7.0
    assert CLASSIFIERS["svm"]() is not CLASSIFIERS["svm"]()


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, 2, -1], "rows without a label cannot be scored: 2 of 5, the first is row 2"),
        ([0, 1, 2], "inconsistent numbers of samples"),
        ([0.0, 1, 2, 3, 0], "integer labels, not float64"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused(name: str, labels: list[float], message: str) -> None:
    X, y = rows_and_labels(5, 0)
    with pytest.raises(ValueError, match=message):
        classify("tried", CLASSIFIERS[name](), X, np.array(labels), X, y)
    with pytest.raises(ValueError, match=message):
        classify("tried", CLASSIFIERS[name](), X, y, X, np.array(labels))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_that_are_no_numbers_are_refused(name: str) -> None:
    X, y = rows_and_labels(300, 0)
    X[5, 2] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        classify("tried", CLASSIFIERS[name](), X, y, X, y)


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_class_of_one_row_leaves_nothing_to_choose_on(name: str) -> None:
    X, y = rows_and_labels(300, 0)
    y = np.where(np.arange(300) == 7, 4, y)
    with pytest.raises(ValueError, match="least populated class"):
        classify("tried", CLASSIFIERS[name](), X, y, X, y)


def test_too_few_rows_for_the_most_neighbours_are_refused() -> None:
    X, y = rows_and_labels(60, 0)
    with pytest.raises(ValueError, match="n_neighbors <= n_samples"):
        classify("tried", CLASSIFIERS["knn"](), X, y, X, y)


@pytest.mark.parametrize("name", list(CLASSIFIERS))
def test_one_class_is_refused(name: str) -> None:
    X, y = rows_and_labels(300, 0)
    with pytest.raises(ValueError, match="train_y holds one class only, 0"):
        classify("tried", CLASSIFIERS[name](), X, np.zeros_like(y), X, y)


def test_svm_seconds_grow_by_a_power_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []

    class Stub:
        def fit(self, X: Array, y: Labels) -> None:
            fitted.append((X.shape, len(np.unique(y))))

    ticks = iter(range(100))
    monkeypatch.setattr(classifiers, "linear_svm", Stub)
    monkeypatch.setattr(classifiers, "time", SimpleNamespace(process_time=lambda: next(ticks)))  # a fit takes a second
    small, measured, double, large = (svm_seconds(rows) for rows in (500, 2_000, 4_000, 50_000))
    assert small == measured == 1
    power = math.log2(double)
    assert 2 <= power < 3
    assert large == pytest.approx(25**power)
    assert svm_seconds(1_000, features=32) == 1
    assert fitted == [((500, 512), 10), *3 * [((2_000, 512), 10)], ((1_000, 32), 10)]


def test_svm_seconds_are_measured_here() -> None:
    assert svm_seconds(400, features=8) > 0
