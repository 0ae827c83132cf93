"""The probes: estimators by scikit-learn's own rules, results against the same thing written out by hand."""

import json
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    classification_report,
    confusion_matrix,
    normalized_mutual_info_score,
    top_k_accuracy_score,
)
from sklearn.metrics.cluster import contingency_matrix
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator

from probes.clustering import cluster
from probes.common import name_classes
from probes.linear import baseline, class_agnostic, class_agnostic_classifier
from probes.logits import PromptLogits
from probes.zero_shot import ZeroShotClassifier, ensemble, zero_shot

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

CLASSES, DIMENSIONS = 4, 12


def embeddings(rows: int, seed: int) -> tuple[Array, Labels]:
    """Rows scattered around one direction a class, so that every probe is better than chance and none is perfect."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows)
    return (class_directions()[y] + rng.normal(0, 0.5, (rows, DIMENSIONS))).astype(np.float32), y


def class_directions() -> Array:
    return np.random.default_rng(1).normal(size=(CLASSES, DIMENSIONS)).astype(np.float32)


def random_text(prompts: int, dimensions: int) -> Array:
    return np.random.default_rng(2).normal(size=(prompts, dimensions)).astype(np.float32)


def decisions(y: Labels, predicted: npt.NDArray[Any], classes: list[int]) -> dict[str, Any]:
    """The fields that tell how well labels were predicted, by scikit-learn's metrics."""
    labels = sorted({*classes, *y.tolist()})
    report = classification_report(y, predicted, labels=labels, output_dict=True, zero_division=0)
    by_f1 = sorted(labels, key=lambda label: -report[str(label)]["f1-score"])
    return {
        "accuracy": (predicted == y).mean(),
        "chance": 1 / len(classes),
        "classes": len(classes),
        "per_class": [
            {
                "label": label,
                **{name: report[str(label)][name] for name in ("precision", "recall")},
                "f1": report[str(label)]["f1-score"],
                "rows": report[str(label)]["support"],
            }
            for label in labels
        ],
        "best": by_f1[:3],
        "worst": by_f1[::-1][:3],
        "confusion": confusion_matrix(y, predicted, labels=labels).tolist(),
    }


# --- scikit-learn's conventions ---

# Checks that cannot hold, whatever the text embeddings: the first for both estimators, the others for the classifier.
ZERO_ROW = {"check_estimators_dtypes": "its integers hold an all-zero row, which has no cosine with anything"}
POSITIONS = {
    "check_classifiers_classes": "labels are positions in the text embeddings, never strings or negative",
    "check_classifiers_one_label": "the text embeddings decide how many classes there are, not y",
}

# Checks that bring data of another dimension than the text embeddings'; the stand-ins below pass them.
FIXED_DIMENSION = dict.fromkeys(
    [
        "check_dtype_object",
        "check_estimators_dtypes",
        "check_estimators_fit_returns_self",
        "check_estimators_overwrite_params",
        "check_fit2d_1feature",
        "check_fit2d_1sample",
        "check_fit_check_is_fitted",
        "check_fit_idempotent",
        "check_n_features_in",
        "check_n_features_in_after_fitting",
        "check_positive_only_tag_during_fit",
        "check_readonly_memmap_input",
    ],
    "its data is not of the dimension that the text embeddings fix",
)
FIXED_DIMENSION_CLASSIFIER = FIXED_DIMENSION | dict.fromkeys(
    [
        "check_classifier_data_not_an_array",
        "check_classifiers_regression_target",
        "check_classifiers_train",
        "check_decision_proba_consistency",
    ],
    "its data is not of the dimension that the text embeddings fix",
)


class PromptLogitsOfAnyDimension(PromptLogits):
    """PromptLogits that is given text embeddings of the dimension of whatever X a check brings."""

    def fit(self, X: Any, y: object = None) -> Self:
        with text_embeddings_for(self, X, 5):
            return super().fit(X, y)


class ZeroShotOfAnyDimension(ZeroShotClassifier):
    """ZeroShotClassifier with text embeddings of the dimension of a check's X, one for each label up to y's largest."""

    def fit(self, X: Any = None, y: Any = None) -> Self:
        labels = np.asarray(y)
        with text_embeddings_for(self, X, int(labels.max()) + 1 if labels.dtype.kind == "i" else 3):
            return super().fit(X, y)


@contextmanager
def text_embeddings_for(estimator: Any, X: Any, rows: int) -> Iterator[None]:
    shape = np.asarray(X).shape
    given = estimator.text_embeddings
    estimator.text_embeddings = random_text(rows, shape[1] if len(shape) == 2 and shape[1] else 2)
    try:
        yield
    finally:
        estimator.text_embeddings = given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (PromptLogitsOfAnyDimension(), ZERO_ROW),
        (PromptLogitsOfAnyDimension(tau=0.07, softmax=True), ZERO_ROW),
        (PromptLogits(random_text(4, 3)), FIXED_DIMENSION),
        (ZeroShotOfAnyDimension(), ZERO_ROW | POSITIONS),
        (ZeroShotClassifier(random_text(3, 3)), FIXED_DIMENSION_CLASSIFIER | POSITIONS),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scikit_learn_accepts_the_estimator(estimator: Any, expected: dict[str, str]) -> None:
    results = check_estimator(estimator, expected_failed_checks=expected, on_skip=None)
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(expected)


@pytest.mark.parametrize(
    "estimator", [PromptLogits(random_text(3, DIMENSIONS), tau=0.1), ZeroShotClassifier(class_directions(), tau=0.1)]
)
def test_a_fitted_estimator_survives_clone_and_pickle(estimator: Any) -> None:
    X, y = embeddings(20, 0)
    apply = "transform" if hasattr(estimator, "transform") else "predict_proba"
    expected = getattr(estimator.fit(X, y), apply)(X)
    np.testing.assert_array_equal(clone(estimator).text_embeddings, estimator.text_embeddings)
    assert clone(estimator).tau == estimator.tau
    for copy in (clone(estimator).fit(X, y), pickle.loads(pickle.dumps(estimator))):
        np.testing.assert_array_equal(getattr(copy, apply)(X), expected)


# --- PromptLogits ---


@pytest.mark.parametrize("tau", [1.0, 0.02, 1e-4])
def test_prompt_logits_are_cosines_over_tau(tau: float) -> None:
    X, _ = embeddings(30, 0)
    text = random_text(5, DIMENSIONS)
    expected = cosine_similarity(X.astype(np.float64), text.astype(np.float64)) / tau
    logits = PromptLogits(text, tau=tau).fit(X).transform(X)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6 / tau)
    probabilities = PromptLogits(text, tau=tau, softmax=True).fit_transform(X)
    np.testing.assert_allclose(
        probabilities, softmax(logits.astype(np.float64), axis=1), atol=1e-2 if tau < 0.01 else 1e-5
    )


def test_prompt_logits_name_their_features() -> None:
    names = PromptLogits(random_text(3, DIMENSIONS)).fit(embeddings(5, 0)[0]).get_feature_names_out()
    assert names.tolist() == ["promptlogits0", "promptlogits1", "promptlogits2"]


@pytest.mark.parametrize(
    ("text", "tau", "message"),
    [
        (None, 1.0, "text_embeddings is None"),
        (np.empty((0, DIMENSIONS)), 1.0, "holds no embedding"),
        (random_text(3, DIMENSIONS + 1), 1.0, "X has 12 features, but the text embeddings have 13 dimensions"),
        (np.zeros((3, DIMENSIONS)), 1.0, "row 0 of the text embeddings is all zeros"),
        (random_text(3, DIMENSIONS), 0.0, "tau must be a positive number"),
    ],
)
@pytest.mark.parametrize("estimator", [PromptLogits, ZeroShotClassifier])
def test_parameters_are_checked_by_fit(estimator: Any, text: Any, tau: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimator(text, tau=tau).fit(embeddings(5, 0)[0])


# --- zero-shot ---


@pytest.mark.parametrize("classes", [1, 2, CLASSES])
def test_zero_shot_is_the_largest_cosine(classes: int) -> None:
    X, _ = embeddings(50, 0)
    text = class_directions()[:classes]
    z = cosine_similarity(X.astype(np.float64), text.astype(np.float64))
    classifier = ZeroShotClassifier(text, tau=0.1).fit()
    assert classifier.classes_.tolist() == list(range(classes))
    np.testing.assert_array_equal(classifier.predict(X), z.argmax(axis=1))
    np.testing.assert_allclose(classifier.predict_proba(X), softmax(z / 0.1, axis=1), atol=1e-5)
    scores = (z[:, 1] - z[:, 0]) / 0.1 if classes == 2 else z / 0.1
    np.testing.assert_allclose(classifier.decision_function(X), scores, atol=1e-5)


def test_zero_shot_result() -> None:
    X, y = embeddings(200, 0)
    result = zero_shot(X, y, class_directions(), tau=0.1)
    z = cosine_similarity(X.astype(np.float64), class_directions().astype(np.float64))
    assert result == {
        "probe": "zero-shot",
        **decisions(y, z.argmax(axis=1), [0, 1, 2, 3]),
        "rows": 200,
        "tau": 0.1,
        "mean_entropy": pytest.approx(entropy(softmax(z / 0.1, axis=1), axis=1).mean(), abs=1e-5),
        "max_entropy": math.log(4),
        "confidence": pytest.approx(softmax(z / 0.1, axis=1).max(axis=1).mean(), abs=1e-5),
    }
    assert 0.5 < result["accuracy"] < 1


def test_zero_shot_scores_rows_of_some_classes_against_all_of_them() -> None:
    X, y = embeddings(200, 0)
    few = np.isin(y, [0, 3])
    z = cosine_similarity(X[few], class_directions())
    result = zero_shot(X[few], y[few], class_directions())
    expected = decisions(y[few], z.argmax(axis=1), [0, 1, 2, 3])
    assert {name: result[name] for name in expected} == expected
    assert [row["rows"] for row in result["per_class"]] == [(y == 0).sum(), 0, 0, (y == 3).sum()]


@pytest.mark.parametrize(("classes", "five"), [(5, False), (6, True), (20, True)])
def test_zero_shot_has_a_top_5_accuracy_where_there_are_more_than_five_classes(classes: int, five: bool) -> None:
    text = random_text(classes, DIMENSIONS)
    y = np.arange(100) % classes
    X = text[y] + np.random.default_rng(0).normal(0, 3, (100, DIMENSIONS)).astype(np.float32)
    result = zero_shot(X, y, text)
    assert ("top5_accuracy" in result) == five
    if five:
        z = cosine_similarity(X.astype(np.float64), text.astype(np.float64))
        assert result["top5_accuracy"] == top_k_accuracy_score(y, z, k=5, labels=range(classes))
        assert result["accuracy"] < result["top5_accuracy"] < 1


def test_an_ensemble_is_the_mean_of_unit_rows_made_unit_again() -> None:
    templates = np.random.default_rng(3).normal(size=(3, CLASSES, DIMENSIONS)) * [[[1]], [[10]], [[0.1]]]
    expected = np.empty((CLASSES, DIMENSIONS))
    for k in range(CLASSES):
        mean = sum(template[k] / np.linalg.norm(template[k]) for template in templates) / 3
        expected[k] = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(ensemble(templates), expected, atol=1e-6)
    alone = templates[0] / np.linalg.norm(templates[0], axis=1, keepdims=True)
    np.testing.assert_allclose(ensemble(templates[:1]), alone, atol=1e-6)
    with pytest.raises(ValueError, match="row 0 of the text embeddings is all zeros"):
        ensemble([class_directions(), -class_directions()])


@pytest.mark.parametrize("y", [[0, 4], ["0", "1"], [-1, 0]])
def test_zero_shot_refuses_labels_without_a_text_embedding(y: list[Any]) -> None:
    with pytest.raises(ValueError, match="stand for the labels 0 to 3"):
        ZeroShotClassifier(class_directions()).fit(embeddings(2, 0)[0], y)


# --- linear probes ---


def test_baseline_is_a_scaler_and_a_linear_svm() -> None:
    (X, y), (test_X, test_y) = embeddings(120, 0), embeddings(60, 3)
    reference = make_pipeline(StandardScaler(), SVC(kernel="linear", C=1.0, random_state=42)).fit(X, y)
    assert baseline(X, y, test_X, test_y) == {
        "probe": "baseline",
        **decisions(test_y, reference.predict(test_X), [0, 1, 2, 3]),
        "train_rows": 120,
        "test_rows": 60,
    }


@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_class_agnostic_is_a_linear_svm_on_scaled_cosines(tau: float) -> None:
    (X, y), (test_X, test_y) = embeddings(120, 0), embeddings(60, 3)
    text = random_text(6, DIMENSIONS)
    z, test_z = (cosine_similarity(rows, text) for rows in (X, test_X))
    reference = SVC(kernel="linear", C=1.0, random_state=42).fit(z / tau, y)
    predicted = class_agnostic_classifier(text, tau).fit(X, y).predict(test_X)
    np.testing.assert_array_equal(predicted, reference.predict(test_z / tau))
    assert class_agnostic(X, y, test_X, test_y, text, tau) == {
        "probe": "class-agnostic",
        **decisions(test_y, predicted, [0, 1, 2, 3]),
        "train_rows": 120,
        "test_rows": 60,
        "classifier": "svm",
        "prompts": 6,
        "tau": tau,
        "mean_entropy": pytest.approx(entropy(softmax(test_z / tau, axis=1), axis=1).mean(), abs=1e-4),
        "max_entropy": math.log(6),
        "confidence": pytest.approx(softmax(test_z / tau, axis=1).max(axis=1).mean(), abs=1e-4),
    }


def test_labels_may_have_gaps() -> None:
    (X, y), (test_X, test_y) = embeddings(120, 0), embeddings(60, 3)
    gaps = np.array([0, 3, 7, 8])
    few, test_few = y < 3, test_y < 3
    result = baseline(X[few], gaps[y[few]], test_X[test_few], gaps[test_y[test_few]])
    reference = make_pipeline(StandardScaler(), SVC(kernel="linear", C=1.0, random_state=42)).fit(X[few], gaps[y[few]])
    expected = decisions(gaps[test_y[test_few]], reference.predict(test_X[test_few]), [0, 3, 7])
    assert {name: result[name] for name in expected} == expected
    assert [row["label"] for row in result["per_class"]] == [0, 3, 7]
    assert cluster(X[few], gaps[y[few]]) == cluster(X[few], y[few])


def test_a_test_label_that_no_train_row_has_is_never_predicted() -> None:
    (X, y), (test_X, test_y) = embeddings(120, 0), embeddings(60, 3)
    result = baseline(X[y != 1], y[y != 1], test_X, test_y)
    reference = make_pipeline(StandardScaler(), SVC(kernel="linear", C=1.0, random_state=42)).fit(X[y != 1], y[y != 1])
    expected = decisions(test_y, reference.predict(test_X), [0, 2, 3])
    expected |= {"chance": 1 / 3, "classes": 3}
    assert {name: result[name] for name in expected} == expected
    assert np.array(result["confusion"])[:, 1].sum() == 0
    unseen = result["per_class"][1]
    assert unseen == {"label": 1, "precision": 0, "recall": 0, "f1": 0, "rows": (test_y == 1).sum()}
    assert result["worst"][0] == 1


def test_a_train_label_that_no_test_row_has_counts_as_a_class() -> None:
    (X, y), (test_X, test_y) = embeddings(120, 0), embeddings(60, 3)
    seen = test_y != 2
    result = baseline(X, y, test_X[seen], test_y[seen])
    assert (result["classes"], result["chance"], len(result["confusion"])) == (4, 0.25, 4)
    assert result["per_class"][2]["rows"] == sum(result["confusion"][2]) == 0


def test_classes_are_named_where_there_are_names() -> None:
    X, y = embeddings(80, 0)
    few = y < 3
    result = baseline(X[few], np.array([0, 3, 7])[y[few]], X[few], np.array([0, 3, 7])[y[few]])
    names = ["airplane", "", "", "cat", "", "", "", "horse"]
    named = name_classes(result, names)
    assert [(row["label"], row["name"]) for row in named["per_class"]] == [(0, "airplane"), (3, "cat"), (7, "horse")]
    for end in ("best", "worst"):
        assert named[end] == [names[label] for label in result[end]]
    assert {name: named[name] for name in ("accuracy", "confusion")} == {
        name: result[name] for name in ("accuracy", "confusion")
    }
    assert name_classes(result, ()) == result
    without_classes = cluster(X, y)
    assert name_classes(without_classes, names) == without_classes


def test_one_class_cannot_be_told_apart() -> None:
    X, _ = embeddings(10, 0)
    with pytest.raises(ValueError, match="train_y holds one class only, 0"):
        baseline(X, np.zeros(10, np.int64), X, np.zeros(10, np.int64))


# --- clustering ---


def test_cluster_is_k_means_scored_by_purity() -> None:
    X, y = embeddings(200, 0)
    X = X + np.random.default_rng(4).normal(0, 1, X.shape).astype(np.float32)
    reference = KMeans(n_clusters=4, n_init=10, random_state=42).fit(X)
    result = cluster(X, y)
    assert result["purity"] == pytest.approx(contingency_matrix(y, reference.labels_).max(axis=0).sum() / 200)
    assert result["ari"] == pytest.approx(adjusted_rand_score(y, reference.labels_))
    assert result["nmi"] == pytest.approx(normalized_mutual_info_score(y, reference.labels_))
    assert result["inertia"] == pytest.approx(reference.inertia_)
    assert (result["probe"], result["clusters"], result["classes"], result["rows"]) == ("cluster", 4, 4, 200)
    assert 0.25 <= result["chance"] < result["purity"] < 1
    assert cluster(X, y, n_clusters=7)["clusters"] == 7


def test_every_row_its_own_cluster_is_pure() -> None:
    X, y = embeddings(12, 0)
    assert cluster(X, y, n_clusters=12)["purity"] == cluster(X, y, n_clusters=12)["chance"] == 1.0
    with pytest.raises(ValueError, match="13 clusters need at least as many rows, there are 12"):
        cluster(X, y, n_clusters=13)


def test_perfect_clusters_score_one() -> None:
    y = np.arange(40) % CLASSES
    X = 10 * np.eye(CLASSES, DIMENSIONS)[y] + np.random.default_rng(0).normal(0, 0.01, (40, DIMENSIONS))
    result = cluster(X, y)
    assert (result["purity"], result["ari"], result["nmi"]) == (1.0, 1.0, pytest.approx(1.0))
    assert result["chance"] < 1


# --- every probe ---

PROBES: dict[str, Callable[[Array, Labels], dict[str, Any]]] = {
    "zero-shot": lambda X, y: zero_shot(X, y, class_directions()),
    "baseline": lambda X, y: baseline(X, y, X, y),
    "class-agnostic": lambda X, y: class_agnostic(X, y, X, y, random_text(6, DIMENSIONS)),
    "cluster": cluster,
}


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_results_are_json_and_repeat_themselves(probe: Callable[[Array, Labels], dict[str, Any]]) -> None:
    X, y = embeddings(100, 0)
    result = probe(X, y)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert probe(X, y) == result
    in_other_dtypes = probe(X.astype(np.float64), y.astype(np.int32))
    assert in_other_dtypes == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value for name, value in result.items()
    }


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.array([0, 1, -1, 2, -1]), "rows without a label cannot be scored: 2 of 5, the first is row 2"),
        (np.array([0, 1, 2]), "inconsistent numbers of samples"),
        (np.array([0.0, 1, 2, 3, 0]), "integer labels, not float64"),
        (np.zeros((5, 1), np.int64), "one label a row"),
        (np.array([], np.int64), "one label a row"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(
    probe: Callable[[Array, Labels], dict[str, Any]], y: Labels, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        probe(embeddings(5, 0)[0], y)
