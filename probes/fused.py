"""Fused embeddings: the mean of an image's and a prompt's embedding, clustered, and classified by the clusters.

Source: Oliveira et al., Improving Image Classification Tasks Using Fused Embeddings and Multimodal Models, VISAPP 2025.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.metrics import pairwise_distances_argmin
from sklearn.metrics.cluster import contingency_matrix
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from engine.kernels import Doubles, normalise
from probes.common import check_text_embeddings
from probes.spectral import cluster_means, spectral_clusters

CLUSTERS_PER_CLASS = [1, 2, 5]  # the paper's


def fuse(X: npt.ArrayLike, text: npt.ArrayLike) -> Doubles:
    """(x + t) / 2 of the unit rows of X (N, D) and of text (N, D), which stands row by row: (N, D) float64.

    The paper averages, so the mean is not scaled to unit length. Raises ValueError where the shapes differ, and for a
    row that is all zeros, NaN or infinite.
    """
    images, texts = normalise(X), normalise(text, "text embeddings")
    if images.shape != texts.shape:
        raise ValueError(
            f"X is of shape {images.shape}, the text embeddings of {texts.shape}: each image needs the embedding of "
            "its prompt"
        )
    return (images.astype(np.float64) + texts) / 2


class FusedCentroidClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The label of the nearest cluster of fused embeddings, an image being fused with every prompt in turn.

    text_embeddings: (P, D), one row a prompt, of the same model as the images; need not be normalised. None clusters
    the image embeddings alone.
    prompt_labels: (P,), the label that each prompt stands for in training, each label once; None means 0 .. P - 1.
    clusters_per_class: the number of clusters is this times the number of classes.
    random_state: the seed of the clustering, and of the sample that is clustered of more than 10,000 rows.

    These arguments are all that sets the paper's strategies apart. Task-specific: one prompt a class, in label order.
    Grouped: the labels given to fit are groups, and there is one prompt a group. Swapped: prompt_labels is a
    `derangement`. Image-only: no text embeddings.

    fit takes no text beside X and y: the labels say which prompt belongs to which row, and predict needs all of them,
    so that the prompts are parameters, as they are of `ZeroShotClassifier`, and pipelines and cross-validation work.

    Learned: classes_ (distinct labels), clusters_ (N,) the cluster of each training row, centroids_ (K, D) float64 the
    mean fused embedding of each cluster, cluster_labels_ (K,) its majority label (of equal ones, the smallest),
    missing_classes_ (those that no cluster carries), anchors_ (K, D) float64 the points that unit image embeddings are
    compared with (see `assign`), n_features_in_ (D).
    """

    def __init__(
        self,
        text_embeddings: npt.ArrayLike | None = None,
        *,
        prompt_labels: npt.ArrayLike | None = None,
        clusters_per_class: int = 1,
        random_state: int = 42,
    ) -> None:
        self.text_embeddings = text_embeddings
        self.prompt_labels = prompt_labels
        self.clusters_per_class = clusters_per_class
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: npt.ArrayLike) -> Self:
        """Fuse the rows of X (N, D) with the prompts of their labels y (N,) and cluster them.

        Raises ValueError for one class only, a class with no prompt, prompts of another dimension than X, a row that is
        all zeros, and fewer distinct points than clusters.
        """
        images, labels = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) == 1:
            raise ValueError(f"y holds one class only, {self.classes_[0]!s}: there is nothing to tell apart")
        prompts = self._prompts_of_classes(images.shape[1])
        embeddings = normalise(images).astype(np.float64) if prompts is None else fuse(images, prompts[codes])
        self.clusters_ = spectral_clusters(
            embeddings,
            self.clusters_per_class * len(self.classes_),
            strata=codes,
            random_state=self.random_state,
        )
        self.centroids_ = cluster_means(embeddings, self.clusters_)
        majority = contingency_matrix(codes, self.clusters_).argmax(axis=0)
        self.cluster_labels_ = self.classes_[majority]
        self.missing_classes_ = np.setdiff1d(self.classes_, self.cluster_labels_)
        # A cluster has one label and a label one prompt t, so each cluster is a candidate exactly once, and as
        # |(x + t) / 2 - c| = |x - (2c - t)| / 2, `assign` needs no pass over the prompts. Without text it is |x - c|.
        self.anchors_ = self.centroids_ if prompts is None else 2 * self.centroids_ - prompts[majority]
        return self

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[Any]:
        """The label of the cluster that `assign` gives each row of X (N, D): (N,), of y's dtype."""
        clusters = self.assign(X)
        labels: npt.NDArray[Any] = self.cluster_labels_[clusters]
        return labels

    def assign(self, X: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The cluster of each row of X (N, D): (N,) int64.

        For each prompt in turn, the clusters of that prompt's label are candidates; the one whose centroid is nearest
        to the image fused with that prompt is taken, over all prompts. Raises ValueError for a row that is all zeros.
        """
        check_is_fitted(self)
        images = normalise(validate_data(self, X, dtype=np.float32, reset=False)).astype(np.float64)
        nearest: npt.NDArray[np.int64] = pairwise_distances_argmin(images, self.anchors_).astype(np.int64)
        return nearest

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Without text, classes that share a cluster cannot be told apart.
        tags.classifier_tags.poor_score = True
        return tags

    def _prompts_of_classes(self, dimensions: int) -> npt.NDArray[np.float32] | None:
        """The unit embedding of the prompt of each of classes_, or None where there is no text."""
        if self.text_embeddings is None:
            return None
        text = check_text_embeddings(self.text_embeddings, dimensions)
        labels = np.arange(len(text)) if self.prompt_labels is None else np.asarray(self.prompt_labels)
        if labels.shape != (len(text),):
            raise ValueError(f"{len(text)} text embeddings need as many prompt_labels, not the shape {labels.shape}")
        known, prompt_of_label = np.unique(labels, return_index=True)
        if len(known) < len(labels):
            raise ValueError("prompt_labels holds a label twice: a class has one prompt")
        without = ~np.isin(self.classes_, known)
        if without.any():
            raise ValueError(f"the class {self.classes_[without.argmax()]!s} has no prompt")
        return text[prompt_of_label[np.searchsorted(known, self.classes_)]]


def choose_clusters_per_class(classifier: FusedCentroidClassifier, X: npt.ArrayLike, y: npt.ArrayLike) -> int:
    """1, 2 or 5: the clusters a class with which the classifier does best on a validation part; of equals, the fewest.

    A fifth of the rows of X (N, D), from each class of y (N,) in its share and drawn with the classifier's
    random_state, is held out. The classifier is left unfitted. Raises ValueError as `FusedCentroidClassifier.fit`
    does, and where a class has one row only.
    """
    fifth = StratifiedShuffleSplit(1, test_size=0.2, random_state=classifier.random_state)
    candidates = {"clusters_per_class": CLUSTERS_PER_CLASS}
    search = GridSearchCV(clone(classifier), candidates, cv=fifth, refit=False, error_score="raise")
    try:
        search.fit(X, y)
    except ValueError as error:
        raise ValueError(
            f"{error} (in choosing among 1, 2 and 5 clusters a class; say how many to spare that)"
        ) from error
    return int(search.best_params_["clusters_per_class"])


def derangement(n: int, random_state: int = 42) -> npt.NDArray[np.int64]:
    """A permutation of 0 .. n - 1 that leaves no number in its place, the same for the same random_state: (n,) int64.

    Each is as likely as any other: permutations are drawn until one will do, e = 2.7 on average. Raises ValueError for
    n < 2, of which there is none.
    """
    if n < 2:
        raise ValueError(f"{n} prompts cannot be swapped: at least two are needed")
    random = np.random.default_rng(random_state)
    while True:
        permutation = random.permutation(n)
        if (permutation != np.arange(n)).all():
            return permutation
