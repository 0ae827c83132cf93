"""What every probe asks of its arrays, and the result fields that several of them share."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.utils.validation import check_consistent_length

from engine.kernels import Floats, normalise, softmax_entropy

Result = dict[str, Any]  # JSON-able: strings, integers and floats by name


def check_labels(X: npt.ArrayLike, y: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The labels y (N,) of the rows of X (N, D) as int64.

    Raises ValueError where y is not 1-D integers, is empty or not as long as X, or holds a negative label, which means
    that the label is unknown.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or labels.size == 0:
        raise ValueError(f"y must hold one label a row, not be of shape {labels.shape}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"y must be integer labels, not {labels.dtype}")
    check_consistent_length(X, labels)
    unknown = labels < 0
    if unknown.any():
        raise ValueError(
            f"rows without a label cannot be scored: {unknown.sum()} of {len(labels)}, the first is row "
            f"{unknown.argmax()}"
        )
    return labels.astype(np.int64)


def check_text_embeddings(text_embeddings: npt.ArrayLike | None, dimensions: int | None = None) -> Floats:
    """The text embeddings (K, D) as unit rows, float32; where `dimensions` is given, D must equal it.

    Raises ValueError where they are missing or empty, are of another dimension, or hold a row that is zero, NaN or
    infinite.
    """
    if text_embeddings is None:
        raise ValueError("text_embeddings is None: give one embedding a prompt, an array (K, D)")
    unit = normalise(text_embeddings, "text embeddings")
    if len(unit) == 0:
        raise ValueError("text_embeddings holds no embedding: give one a prompt, an array (K, D)")
    if dimensions is not None and unit.shape[1] != dimensions:
        raise ValueError(
            f"X has {dimensions} features, but the text embeddings have {unit.shape[1]} dimensions: both must come "
            "from one CLIP model"
        )
    return unit


def entropy_fields(logits: Floats, tau: float) -> Result:
    """tau, the mean entropy in nats of softmax(logits / tau) over the rows of logits (N, K), and its bound log K."""
    return {
        "tau": float(tau),
        "mean_entropy": float(softmax_entropy(logits, tau).mean()),
        "max_entropy": math.log(logits.shape[1]),
    }
