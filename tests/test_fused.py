"""Fused embeddings: the classifier against the paper's loops written out, the metrics against scikit-learn's."""

import json
from collections.abc import Callable
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize
from sklearn.utils.estimator_checks import check_estimator

from probes import fused_metrics
from probes.fused import FusedCentroidClassifier, choose_clusters_per_class, derangement, fuse
from probes.fused_metrics import check_groups, check_swap, fused
from probes.zero_shot import zero_shot

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

CLASSES, DIMENSIONS = 6, 16
GROUPS = [0, 1, 0, 1, 0, 1]


def embeddings(rows: int, seed: int, spread: float = 0.15) -> tuple[Array, Labels]:
    random = np.random.default_rng(seed)
    y = np.arange(rows) % CLASSES
    directions = normalize(np.random.default_rng(1).normal(size=(CLASSES, DIMENSIONS)))
    return (directions[y] + random.normal(0, spread, (rows, DIMENSIONS))).astype(np.float32), y


def random_text(prompts: int = CLASSES, dimensions: int = DIMENSIONS) -> Array:
    return np.random.default_rng(2).normal(size=(prompts, dimensions)).astype(np.float32)


# --- scikit-learn's conventions ---

EXPECTED = {"check_estimators_dtypes": "its integers hold an all-zero row, which has no direction"}
IMAGE_ONLY = {"check_fit2d_1feature": "its rows are one point once they have unit length, too few for two clusters"}


class FusedOfAnyDimension(FusedCentroidClassifier):
    """FusedCentroidClassifier with a prompt for each label, of the dimension of whatever X a check brings."""

    def fit(self, X: Any, y: Any) -> Self:
        shape, labels = np.asarray(X).shape, np.asarray(y)
        given = self.get_params()
        known = np.unique(labels) if labels.ndim == 1 and labels.dtype.kind != "f" else np.arange(3)
        dimensions = shape[1] if len(shape) == 2 and shape[1] else 2
        self.set_params(text_embeddings=random_text(len(known), dimensions), prompt_labels=known)
        try:
            return super().fit(X, y)
        finally:
            self.set_params(**given)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(FusedCentroidClassifier(), EXPECTED | IMAGE_ONLY), (FusedOfAnyDimension(), EXPECTED)],
    ids=["image-only", "with text"],
)
def test_scikit_learn_accepts_the_estimator(estimator: Any, expected: dict[str, str]) -> None:
    results = check_estimator(estimator, expected_failed_checks=expected, on_skip=None)
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(expected)


# --- the method ---


def test_fuse_averages_unit_rows() -> None:
    X, text = embeddings(10, 0)[0], random_text(10)
    means = (normalize(X.astype(np.float64)) + normalize(text.astype(np.float64))) / 2
    fused_rows = fuse(X, text)
    assert fused_rows.dtype == np.float64
    np.testing.assert_allclose(fused_rows, means, atol=1e-7)
    # (x + t) / 2 - (m + t) / 2 = (x - m) / 2: between images with one prompt, the text cancels out.
    one_prompt = np.repeat(text[:1], 10, axis=0)
    differences = fuse(X, one_prompt) - fuse(X[::-1], one_prompt)
    np.testing.assert_allclose(differences, (fuse(X, X) - fuse(X[::-1], X[::-1])) / 2, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    classes=st.integers(2, 4),
    clusters_per_class=st.integers(1, 3),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    with_text=st.booleans(),
)
def test_prediction_is_the_papers_loop_over_images_prompts_and_clusters(
    seed: int, classes: int, clusters_per_class: int, spread: float, with_text: bool
) -> None:
    random = np.random.default_rng(seed)
    y = np.concatenate([np.arange(classes), random.integers(0, classes, 30)])
    X = 3 * random.normal(size=(classes, 5))[y] + spread * random.normal(size=(len(y), 5))
    text, prompt_labels = random.normal(size=(classes, 5)), random.permutation(classes)
    classifier = FusedCentroidClassifier(
        text if with_text else None, prompt_labels=prompt_labels, clusters_per_class=clusters_per_class
    ).fit(X, y)

    test_X = random.normal(size=(10, 5))
    clusters, predicted = classifier.assign(test_X), classifier.predict(test_X)
    for row, image in enumerate(test_X):
        distances: dict[int, float] = {}
        for prompt in range(classes):
            for cluster, label in enumerate(classifier.cluster_labels_):
                if not with_text:
                    distances[cluster] = np.linalg.norm(image / np.linalg.norm(image) - classifier.centroids_[cluster])
                elif label == prompt_labels[prompt]:
                    fused_row = fuse(image[None], text[prompt][None])[0]
                    distances[cluster] = np.linalg.norm(fused_row - classifier.centroids_[cluster])
        assert distances[clusters[row]] == pytest.approx(min(distances.values()), abs=1e-6)
        assert predicted[row] == classifier.cluster_labels_[clusters[row]]


def test_what_fit_learns() -> None:
    X, y = embeddings(240, 0, spread=0.4)
    text, swap = random_text(), derangement(CLASSES)
    classifier = FusedCentroidClassifier(text, prompt_labels=swap, clusters_per_class=2).fit(X, y)
    fused_rows = fuse(X, text[np.argsort(swap)[y]])
    for cluster in range(2 * CLASSES):
        members = classifier.clusters_ == cluster
        np.testing.assert_allclose(classifier.centroids_[cluster], fused_rows[members].mean(axis=0), atol=1e-12)
        assert classifier.cluster_labels_[cluster] == np.bincount(y[members]).argmax()
    assert classifier.classes_.tolist() == list(range(CLASSES))
    again = clone(classifier).fit(X, y)
    np.testing.assert_array_equal(again.clusters_, classifier.clusters_)
    np.testing.assert_array_equal(again.predict(X), classifier.predict(X))


@pytest.mark.parametrize("prompt_labels", [None, derangement(CLASSES)], ids=["task", "swapped"])
def test_of_pure_clusters_the_text_cancels_out(prompt_labels: Labels | None) -> None:
    (X, y), (test_X, test_y) = embeddings(240, 0, spread=0.2), embeddings(300, 3, spread=0.3)
    classifier = FusedCentroidClassifier(random_text(), prompt_labels=prompt_labels).fit(X, y)
    assert adjusted_rand_score(y, classifier.clusters_) == 1
    predicted = classifier.predict(test_X)
    np.testing.assert_array_equal(predicted, NearestCentroid().fit(normalize(X), y).predict(normalize(test_X)))
    assert 0.5 < (predicted == test_y).mean() < 1


def test_image_only_is_the_nearest_centroid_of_image_clusters() -> None:
    (X, y), (test_X, _) = embeddings(240, 0, spread=0.4), embeddings(100, 3, spread=0.4)
    classifier = FusedCentroidClassifier().fit(X, y)
    nearest = NearestCentroid().fit(normalize(X), classifier.clusters_).predict(normalize(test_X))
    np.testing.assert_array_equal(classifier.assign(test_X), nearest)
    np.testing.assert_array_equal(classifier.predict(test_X), classifier.cluster_labels_[nearest])


def test_a_tie_goes_to_the_smallest_label_and_a_class_without_a_cluster_is_missing() -> None:
    random = np.random.default_rng(0)
    blob = np.repeat([0, 1, 2], 20)
    X = np.eye(3)[blob] + 0.01 * random.normal(size=(60, 3))
    # In the first blob b and a are equally many; c is a minority wherever it is.
    y = np.array(["b", "a"] * 10 + ["b"] * 20 + ["b"] * 15 + ["c"] * 5)
    classifier = FusedCentroidClassifier().fit(X, y)
    assert classifier.predict(np.eye(3)).tolist() == ["a", "b", "b"]
    assert classifier.missing_classes_.tolist() == ["c"]
    assert FusedCentroidClassifier(clusters_per_class=5).fit(X, y).predict(X[-5:]).shape == (5,)


# --- clusters a class ---


def test_clusters_per_class_are_chosen_on_a_fifth_of_the_rows() -> None:
    X, y = embeddings(300, 0, spread=0.5)
    # Two directions a class: one cluster cannot stand for both.
    X[::2] *= -1
    y[::2] = (y[::2] + 1) % CLASSES
    classifier = FusedCentroidClassifier(random_text())
    chosen = choose_clusters_per_class(classifier, X, y)
    train_X, part_X, train_y, part_y = train_test_split(X, y, test_size=0.2, stratify=y, random_state=42)
    scores = {
        count: clone(classifier).set_params(clusters_per_class=count).fit(train_X, train_y).score(part_X, part_y)
        for count in (1, 2, 5)
    }
    assert scores[chosen] == max(scores.values())
    assert chosen > 1
    assert not hasattr(classifier, "clusters_")
    assert choose_clusters_per_class(classifier, *embeddings(300, 0, spread=0.01)) == 1  # all are perfect


def test_too_few_rows_to_choose_from_are_refused() -> None:
    with pytest.raises(ValueError, match="30 clusters need at least as many distinct points, there are 24"):
        choose_clusters_per_class(FusedCentroidClassifier(), *embeddings(30, 0))


@given(n=st.integers(2, 30), seed=st.integers(0, 1000))
def test_a_derangement_leaves_nothing_in_its_place(n: int, seed: int) -> None:
    permutation = derangement(n, seed)
    assert sorted(permutation) == list(range(n))
    assert (permutation != np.arange(n)).all()
    np.testing.assert_array_equal(derangement(n, seed), permutation)


# --- the probe ---

STRATEGIES: dict[str, dict[str, Any]] = {
    "task": {"text_embeddings": random_text()},
    "grouped": {"text_embeddings": random_text(2), "groups": GROUPS},
    "swapped": {"text_embeddings": random_text()},
    "image-only": {"text_embeddings": random_text()},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_result_is_what_scikit_learn_says_of_the_classifier(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_metrics, "SILHOUETTE_ROWS", 100)
    (X, y), (test_X, test_y) = embeddings(240, 0, spread=0.4), embeddings(150, 3, spread=0.4)
    arguments = STRATEGIES[strategy]
    text = arguments["text_embeddings"]
    result = fused(X, y, test_X, test_y, **arguments, strategy=strategy, clusters_per_class=2)

    if strategy == "grouped":
        y, test_y = np.array(GROUPS)[y], np.array(GROUPS)[test_y]
    prompt_labels = derangement(CLASSES) if strategy == "swapped" else np.arange(len(text))
    image_only = strategy == "image-only"
    classifier = FusedCentroidClassifier(
        None if image_only else text, prompt_labels=prompt_labels, clusters_per_class=2
    ).fit(X, y)
    predicted = classifier.predict(test_X)
    prompt_of = np.argsort(prompt_labels)

    def scores(rows: Array, clusters: Labels, labels: Labels, paired: Labels) -> list[Any]:
        points = normalize(rows) if image_only else fuse(rows, text[prompt_of[paired]])
        return [
            pytest.approx(silhouette_score(points, clusters, sample_size=100, random_state=42), abs=1e-6),
            pytest.approx(adjusted_rand_score(labels, clusters)),
            pytest.approx(normalized_mutual_info_score(labels, clusters)),
            pytest.approx(adjusted_mutual_info_score(labels, clusters)),
        ]

    names = ["silhouette", "ari", "nmi", "ami"]
    classes = len(text)
    assert result == {
        "probe": "fused",
        "strategy": strategy,
        "accuracy": (predicted == test_y).mean(),
        "chance": 1 / classes,
        "majority_accuracy": max(np.unique(test_y, return_counts=True)[1]) / len(test_y),
        "classes": classes,
        "missing_classes": classifier.missing_classes_.tolist(),
        "clusters": 2 * classes,
        "clusters_per_class": 2,
        "train_rows": 240,
        "test_rows": 150,
        **dict(zip(names, scores(X, classifier.clusters_, y, y), strict=True)),
        **dict(
            zip(
                [f"test_{name}" for name in names],
                scores(test_X, classifier.assign(test_X), test_y, predicted),
                strict=True,
            )
        ),
        "zero_shot_accuracy": zero_shot(test_X, test_y, text)["accuracy"],
        "nearest_centroid_accuracy": NearestCentroid().fit(normalize(X), y).score(normalize(test_X), test_y),
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_clusters_a_class_are_chosen_where_none_are_given() -> None:
    (X, y), test = embeddings(240, 0, spread=0.5), embeddings(60, 3, spread=0.5)
    result = fused(X, y, *test, random_text(), "task")
    assert result["clusters_per_class"] == choose_clusters_per_class(FusedCentroidClassifier(random_text()), X, y)


def test_a_given_swap_is_taken() -> None:
    train, test = embeddings(120, 0), embeddings(60, 3)
    drawn = fused(*train, *test, random_text(), "swapped", clusters_per_class=1, random_state=5)
    swap = derangement(CLASSES, 5)
    given = fused(*train, *test, random_text(), "swapped", swap=swap, clusters_per_class=1, random_state=5)
    assert given == drawn


def test_a_single_cluster_has_no_silhouette() -> None:
    train, (test_X, test_y) = embeddings(120, 0), embeddings(60, 3)
    ours = test_y == 0
    result = fused(*train, test_X[ours], test_y[ours], random_text(), "task", clusters_per_class=1)
    assert (result["accuracy"], result["test_silhouette"]) == (1.0, None)


# --- what is refused ---

X, Y = embeddings(24, 0)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda: FusedCentroidClassifier().fit(X, np.zeros(24, int)), "y holds one class only, 0"),
        (lambda: FusedCentroidClassifier(clusters_per_class=5).fit(X, Y), "30 clusters need .* there are 24"),
        (lambda: FusedCentroidClassifier(clusters_per_class=0).fit(X, Y), "n_clusters must be at least 1, not 0"),
        (lambda: FusedCentroidClassifier(random_text(5)).fit(X, Y), "the class 5 has no prompt"),
        (lambda: FusedCentroidClassifier(random_text(6, 7)).fit(X, Y), "16 features, .* have 7 dimensions"),
        (
            lambda: FusedCentroidClassifier(random_text(), prompt_labels=[0, 1, 2, 3, 4, 4]).fit(X, Y),
            "prompt_labels holds a label twice: a class has one prompt",
        ),
        (
            lambda: FusedCentroidClassifier(random_text(), prompt_labels=[0, 1]).fit(X, Y),
            r"6 text embeddings need as many prompt_labels, not the shape \(2,\)",
        ),
        (lambda: FusedCentroidClassifier().fit(np.zeros((24, 3)), Y), "row 0 of the embeddings is all zeros"),
        (lambda: fuse(X, random_text(3)), r"X is of shape \(24, 16\), the text embeddings of \(3, 16\)"),
        (lambda: derangement(1), "1 prompts cannot be swapped: at least two are needed"),
        (lambda: fused(X, Y, X, Y, random_text(), "tasks"), "must be one of task, grouped, swapped, image-only"),  # type: ignore[arg-type]
        (lambda: fused(X, Y, X, Y, random_text(2), "grouped"), 'groups belong to the strategy "grouped"'),
        (lambda: fused(X, Y, X, Y, random_text(), "task", groups=GROUPS), 'groups belong to the strategy "grouped"'),
        (lambda: fused(X, Y, X, Y, random_text(), "task", swap=derangement(6)), 'and a swap to "swapped"'),
        (lambda: fused(X, Y - 1, X, Y, random_text(), "task"), "rows without a label .* 4 of 24, the first is row 0"),
        (lambda: fused(X, Y, X, Y - 1, random_text(), "task"), "rows without a label .* 4 of 24, the first is row 0"),
        (lambda: fused(X, Y, X, Y, random_text(5), "image-only"), "stand for the labels 0 to 4"),
        (lambda: check_groups([0, 1, 0], classes=4, prompts=2), "the class 3 is in no group"),
        (lambda: check_groups([0, 1, 2], classes=3, prompts=2), "class 2 is in the group 2, .* the groups 0 to 1"),
        (lambda: check_groups([0, -1, 1], classes=3, prompts=2), "class 1 is in the group -1"),
        (lambda: check_groups([0, 0, 2], classes=3, prompts=3), "the group 1 has no class"),
        (lambda: check_groups([0.0, 1.0], classes=2, prompts=2), "groups must hold one integer a class"),
        (lambda: check_swap([1, 0, 2], 3), "once, and none in its own place"),
        (lambda: check_swap([1, 2, 1], 3), "each class from 0 to 2 once"),
        (lambda: check_swap([1, 0], 3), "each class from 0 to 2 once"),
    ],
)
def test_what_cannot_be_used_is_refused(fit: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit()
