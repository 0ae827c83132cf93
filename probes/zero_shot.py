"""Zero-shot classification: the class whose text embedding lies closest to the image's; no image is learned from.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision (2021), section 3.1.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from engine.kernels import Floats, check_tau, cosine_logits, normalise, softmax, top_k
from probes.common import Result, check_labels, check_text_embeddings, decision_fields, entropy_fields


def zero_shot(X: npt.ArrayLike, y: npt.ArrayLike, text_embeddings: npt.ArrayLike, tau: float = 1.0) -> Result:
    """Score zero-shot classification of the image embeddings X (N, D) with labels y (N,) integers.

    text_embeddings (K, D) holds one row a class, in label order. Returns probe, the fields of `decision_fields` and
    `entropy_fields`, top5_accuracy where there are more than five classes, and rows. Raises ValueError for rows without
    a label, labels that no text embedding stands for, and whatever `ZeroShotClassifier` refuses.
    """
    labels = check_labels(X, y)
    classifier = ZeroShotClassifier(text_embeddings, tau=tau).fit(X, labels)
    logits = cosine_logits(X, text_embeddings)
    five = {}
    if logits.shape[1] > 5:
        five["top5_accuracy"] = float((top_k(logits, 5) == labels[:, None]).any(axis=1).mean())
    return {
        "probe": "zero-shot",
        **decision_fields(labels, classifier.predict(X), classifier.classes_),
        **five,
        "rows": len(labels),
        **entropy_fields(logits, tau),
    }


def ensemble(text_embeddings: npt.ArrayLike) -> Floats:
    """One embedding a class from several templates: (T, K, D) to (K, D), the mean of unit rows, made unit again.

    Source: Radford et al. (2021), section 3.1.4.
    """
    templates = [normalise(template, "text embeddings") for template in np.asarray(text_embeddings)]
    return normalise(np.mean(templates, axis=0), "text embeddings")


class ZeroShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The class whose text embedding has the largest cosine with the image embedding.

    text_embeddings: (K, D), row k is the embedding of the prompt of class k; need not be normalised.
    tau: the temperature of `predict_proba` and `decision_function`, a positive number; CLIP's own is
    1 / exp(logit_scale).

    Learned: classes_ (0 .. K - 1), text_embeddings_ (K, D) float32 of unit length, n_features_in_ (D).
    """

    def __init__(self, text_embeddings: npt.ArrayLike | None = None, *, tau: float = 1.0) -> None:
        self.text_embeddings = text_embeddings
        self.tau = tau

    def fit(self, X: npt.ArrayLike | None = None, y: npt.ArrayLike | None = None) -> Self:
        """Check the parameters; X (N, D) and y (N,) are optional, and nothing is learned from them.

        Raises ValueError where the text embeddings are missing or of another dimension than X, tau is not positive, or
        y holds anything but integers from 0 to K - 1.
        """
        dimensions = None if X is None else validate_data(self, X, dtype=np.float32).shape[1]
        check_tau(self.tau)
        self.text_embeddings_ = check_text_embeddings(self.text_embeddings, dimensions)
        self.n_features_in_ = self.text_embeddings_.shape[1]
        self.classes_ = np.arange(len(self.text_embeddings_))
        if y is not None:
            self._check_targets(X, y)
        return self

    def decision_function(self, X: npt.ArrayLike) -> Floats:
        """z / tau, (N, K) float32; with two classes the second column less the first, (N,), as scikit-learn has it."""
        logits = self._logits(X)
        logits /= self.tau
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: npt.ArrayLike) -> Floats:
        """softmax(z / tau), (N, K) float32."""
        return softmax(self._logits(X), self.tau)

    def predict(self, X: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The class of the largest cosine, (N,) int64; of equal ones, the first."""
        nearest = self._logits(X).argmax(axis=1)
        labels: npt.NDArray[np.int64] = self.classes_[nearest]
        return labels

    def _logits(self, X: npt.ArrayLike) -> Floats:
        check_is_fitted(self)
        return cosine_logits(validate_data(self, X, dtype=np.float32, reset=False), self.text_embeddings_)

    def _check_targets(self, X: npt.ArrayLike | None, y: npt.ArrayLike) -> None:
        check_classification_targets(y)
        labels = column_or_1d(y, warn=True)
        check_consistent_length(X, labels)
        # Compared as they are, strings would be: "0" is no label 0.
        known = np.isin(labels, self.classes_) if labels.dtype.kind in "biuf" else np.zeros(len(labels), bool)
        if not known.all():
            raise ValueError(
                f"y holds the label {labels[known.argmin()]}, but the text embeddings stand for the labels 0 to "
                f"{len(self.classes_) - 1}"
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = False
        # Its accuracy is the text embeddings' doing; on data that they do not describe it is chance.
        tags.classifier_tags.poor_score = True
        return tags
