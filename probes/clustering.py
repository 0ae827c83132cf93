"""Clustering: whether the classes can be found in the embeddings without a single label."""

import numpy as np
import numpy.typing as npt
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from engine.counting import purity
from probes.common import Result, check_labels


def cluster(X: npt.ArrayLike, y: npt.ArrayLike, n_clusters: int | None = None, random_state: int = 42) -> Result:
    """Cluster X (N, D) with k-means and compare the clusters with the labels y (N,) integers.

    n_clusters defaults to the number of distinct labels; the best of ten starts counts, as in the thesis "What Do
    Vision-Language Models Understand? Dissecting CLIP". Returns probe, purity, ari (adjusted Rand index), nmi
    (normalised mutual information), chance, clusters, classes, rows and inertia (the sum of squared distances to the
    cluster centres). chance is the purity of the same cluster sizes dealt
    out at random (a permutation of the assignment, seeded with random_state): unlike accuracy's, it is not 1 / classes.
    Raises ValueError for rows without a label and for more clusters than rows.
    """
    labels = check_labels(X, y)
    classes = len(np.unique(labels))
    clusters = classes if n_clusters is None else n_clusters
    if clusters > len(labels):
        raise ValueError(f"{clusters} clusters need at least as many rows, there are {len(labels)}")
    kmeans = KMeans(n_clusters=clusters, n_init=10, random_state=random_state).fit(X)
    shuffled = np.random.default_rng(random_state).permutation(kmeans.labels_)
    return {
        "probe": "cluster",
        "purity": purity(labels, kmeans.labels_),
        "ari": float(adjusted_rand_score(labels, kmeans.labels_)),
        "nmi": float(normalized_mutual_info_score(labels, kmeans.labels_)),
        "chance": purity(labels, shuffled),
        "clusters": clusters,
        "classes": classes,
        "rows": len(labels),
        "inertia": float(kmeans.inertia_),
    }
