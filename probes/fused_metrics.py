"""The fused-embedding probe: one strategy's accuracy, how well its clusters match the labels, and what to compare with.

Source: Oliveira et al., Improving Image Classification Tasks Using Fused Embeddings and Multimodal Models, VISAPP 2025.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from sklearn.manifold import TSNE
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)
from sklearn.neighbors import NearestCentroid

from engine.kernels import normalise
from probes.common import Result, check_labels, check_text_embeddings
from probes.fused import FusedCentroidClassifier, choose_clusters_per_class, derangement, fuse
from probes.zero_shot import ZeroShotClassifier

Strategy = Literal["task", "grouped", "swapped", "image-only"]
Labels = npt.NDArray[np.int64]

SILHOUETTE_ROWS = 5_000  # its cost is quadratic
VIEW_ROWS = 500  # 1,000 take four fifths of a row's time


def fused(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
    strategy: Strategy,
    *,
    groups: npt.ArrayLike | None = None,
    swap: npt.ArrayLike | None = None,
    clusters_per_class: int | None = None,
    random_state: int = 42,
    view: bool = False,
) -> Result:
    """Fit a `FusedCentroidClassifier` on the train rows, score it on the test rows: X (N, D), y (N,) integers.

    text_embeddings (P, D) holds one row a class, in label order; for "grouped", one a group. groups (classes,), for
    "grouped" only, is the group of each class, and takes the place of the labels throughout. swap (P,), for "swapped"
    only, is the class to which each prompt is assigned, by default `derangement(P, random_state)`. clusters_per_class
    is chosen by `choose_clusters_per_class` where it is None.

    Returns probe, strategy, accuracy, chance (1 / classes), majority_accuracy (of always the most frequent test label,
    which for groups is more), classes, missing_classes, clusters, clusters_per_class,
    train_rows and test_rows, and
    - silhouette (of 5,000 rows at most, drawn with random_state; None where all rows share a cluster), ari, nmi and
      ami of the training clusters. But for "image-only" these know the labels: each row was fused with its class's
      prompt;
    - test_silhouette to test_ami: the same of the test rows, fused with the prompts of their predicted labels and
      assigned to their predicted clusters;
    - with `view`, a t-SNE of up to VIEW_ROWS train and test rows, so fused: x, y, label and assigned (the label of the
      cluster) of each;
    - zero_shot_accuracy (the nearest prompt, each standing for the class that it names) and nearest_centroid_accuracy
      (scikit-learn's NearestCentroid on unit image embeddings and the train labels).

    Raises ValueError for an unknown strategy, groups or a swap that do not fit it, rows without a label, and whatever
    `FusedCentroidClassifier` and `ZeroShotClassifier` refuse.
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"the strategy must be one of {', '.join(get_args(Strategy))}, not {strategy!r}")
    if (groups is not None) != (strategy == "grouped") or (swap is not None and strategy != "swapped"):
        raise ValueError('groups belong to the strategy "grouped", which needs them, and a swap to "swapped"')
    train_labels, test_labels = check_labels(train_X, train_y), check_labels(test_X, test_y)
    text = check_text_embeddings(text_embeddings)
    if groups is not None:
        group_of_class = check_groups(groups, classes=max(train_labels.max(), test_labels.max()) + 1, prompts=len(text))
        train_labels, test_labels = group_of_class[train_labels], group_of_class[test_labels]
    prompt_labels = np.arange(len(text))
    if strategy == "swapped":
        prompt_labels = derangement(len(text), random_state) if swap is None else check_swap(swap, len(text))
    zero_shot = ZeroShotClassifier(text).fit(test_X, test_labels)

    classifier = FusedCentroidClassifier(
        None if strategy == "image-only" else text, prompt_labels=prompt_labels, random_state=random_state
    )
    if clusters_per_class is None:
        clusters_per_class = choose_clusters_per_class(classifier, train_X, train_labels)
    classifier.set_params(clusters_per_class=clusters_per_class).fit(train_X, train_labels)
    test_clusters = classifier.assign(test_X)
    predicted = classifier.cluster_labels_[test_clusters]
    train_embeddings: npt.NDArray[np.floating] = normalise(train_X)
    test_embeddings: npt.NDArray[np.floating] = normalise(test_X)
    nearest_centroid = NearestCentroid().fit(train_embeddings, train_labels)
    nearest_centroid_accuracy = float(nearest_centroid.score(test_embeddings, test_labels))
    if strategy != "image-only":
        prompt_of_label = np.argsort(prompt_labels)
        train_embeddings = fuse(train_X, text[prompt_of_label[train_labels]])
        test_embeddings = fuse(test_X, text[prompt_of_label[predicted]])
    views: Result = {}
    if view:
        of_cluster = classifier.cluster_labels_[classifier.clusters_]
        views = {
            "train": _tsne(train_embeddings, train_labels, of_cluster, random_state),
            "test": _tsne(test_embeddings, test_labels, predicted, random_state),
        }
    test_scores = _clustering_scores(test_embeddings, test_clusters, test_labels, random_state)
    return {
        "probe": "fused",
        "strategy": strategy,
        "accuracy": float((predicted == test_labels).mean()),
        "chance": 1 / len(classifier.classes_),
        "majority_accuracy": float(np.bincount(test_labels).max() / len(test_labels)),
        "classes": len(classifier.classes_),
        "missing_classes": classifier.missing_classes_.tolist(),
        "clusters": len(classifier.centroids_),
        "clusters_per_class": clusters_per_class,
        "train_rows": len(train_labels),
        "test_rows": len(test_labels),
        **_clustering_scores(train_embeddings, classifier.clusters_, train_labels, random_state),
        **{f"test_{name}": score for name, score in test_scores.items()},
        "zero_shot_accuracy": float(zero_shot.score(test_X, test_labels)),
        "nearest_centroid_accuracy": nearest_centroid_accuracy,
        **({"view": views} if view else {}),
    }


def _tsne(X: npt.NDArray[np.floating], labels: Labels, assigned: npt.NDArray[np.integer], random_state: int) -> Result:
    """van der Maaten and Hinton, Visualizing Data using t-SNE (2008), of rows drawn with random_state."""
    drawn = np.random.default_rng(random_state).permutation(len(X))[:VIEW_ROWS]
    perplexity = min(30, (len(drawn) - 1) / 3)
    points = TSNE(perplexity=perplexity, random_state=random_state).fit_transform(X[drawn].astype(np.float32))
    return {
        "x": points[:, 0].round(3).tolist(),
        "y": points[:, 1].round(3).tolist(),
        "label": labels[drawn].tolist(),
        "assigned": assigned[drawn].tolist(),
    }


def check_groups(groups: npt.ArrayLike, classes: int, prompts: int) -> Labels:
    """The group of each class, (classes,) int64 from 0 to prompts - 1.

    Raises ValueError for a class in no group, a group with no prompt, and a group with no class.
    """
    group_of_class = np.asarray(groups)
    if group_of_class.ndim != 1 or group_of_class.dtype.kind not in "iu":
        raise ValueError("groups must hold one integer a class")
    if len(group_of_class) < classes:
        raise ValueError(f"the class {len(group_of_class)} is in no group: groups must hold one entry a class")
    missing = (group_of_class < 0) | (group_of_class >= prompts)
    if missing.any():
        raise ValueError(
            f"the class {missing.argmax()} is in the group {group_of_class[missing.argmax()]}, but there are prompts "
            f"for the groups 0 to {prompts - 1}"
        )
    empty = np.setdiff1d(np.arange(prompts), group_of_class)
    if len(empty):
        raise ValueError(f"the group {empty[0]} has no class")
    return group_of_class.astype(np.int64)


def check_swap(swap: npt.ArrayLike, prompts: int) -> Labels:
    """The class to which each prompt is assigned, (prompts,) int64; ValueError unless it is a derangement."""
    classes = np.asarray(swap)
    if not np.array_equal(np.sort(classes, axis=None), np.arange(prompts)) or (classes == np.arange(prompts)).any():
        raise ValueError(f"a swap must hold each class from 0 to {prompts - 1} once, and none in its own place")
    return classes.astype(np.int64)


def _clustering_scores(X: npt.NDArray[np.floating], clusters: Labels, labels: Labels, random_state: int) -> Result:
    return {
        "silhouette": _silhouette(X, clusters, random_state),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
    }


def _silhouette(X: npt.NDArray[np.floating], clusters: Labels, random_state: int) -> float | None:
    # Drawn as silhouette_score draws its sample_size, which raises where the sample lies in one cluster.
    drawn = np.random.RandomState(random_state).permutation(len(X))[:SILHOUETTE_ROWS]
    if not 1 < len(np.unique(clusters[drawn])) < len(drawn):
        return None
    return float(silhouette_score(X[drawn], clusters[drawn]))
