"""PromptLogits: describe an image by how well each of K prompts fits it.

The thesis "What Do Vision-Language Models Understand? Dissecting CLIP" calls a linear SVM on these features
class-agnostic: no prompt names a class, so what the SVM finds is what the prompts carry.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from engine.kernels import Floats, check_tau, cosine_logits
from engine.kernels import softmax as kernel_softmax
from probes.common import check_text_embeddings


class PromptLogits(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Image embeddings (N, D) to their cosine logits with K prompts over the temperature: z / tau, (N, K) float32.

    text_embeddings: (K, D), one row a prompt, of the same model as the images; need not be normalised.
    tau: the temperature, a positive number.
    softmax: return the probabilities softmax(z / tau) in place of z / tau.

    Learned: text_embeddings_ (K, D) float32 of unit length, n_features_in_ (D). Source: the thesis' class-agnostic and
    temperature experiments, whose features are z / tau.
    """

    def __init__(
        self, text_embeddings: npt.ArrayLike | None = None, *, tau: float = 1.0, softmax: bool = False
    ) -> None:
        self.text_embeddings = text_embeddings
        self.tau = tau
        self.softmax = softmax

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:
        """Check the parameters against X (N, D); nothing else is taken from X, and y is ignored.

        Raises ValueError where the text embeddings are missing or of another dimension than X, or tau is not positive.
        """
        dimensions = validate_data(self, X, dtype=np.float32).shape[1]
        check_tau(self.tau)
        self.text_embeddings_ = check_text_embeddings(self.text_embeddings, dimensions)
        self._n_features_out = len(self.text_embeddings_)
        return self

    def transform(self, X: npt.ArrayLike) -> Floats:
        """z / tau of X (N, D), or the probabilities with softmax=True: (N, K) float32.

        Raises ValueError for a row of X that is all zeros, NaN or infinite.
        """
        check_is_fitted(self)
        logits = cosine_logits(validate_data(self, X, dtype=np.float32, reset=False), self.text_embeddings_)
        if self.softmax:
            return kernel_softmax(logits, self.tau)
        logits /= self.tau
        return logits

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags
