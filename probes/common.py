"""What every probe asks of its arrays, and the result fields that several of them share."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import precision_recall_fscore_support
from sklearn.utils.validation import check_consistent_length

from engine.counting import contingency
from engine.kernels import Floats, normalise, softmax, softmax_entropy

Result = dict[str, Any]  # JSON-able, by name


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


def decision_fields(y: npt.NDArray[np.int64], predicted: npt.ArrayLike, classes: npt.ArrayLike) -> Result:
    """How well `predicted` (N,) tells the labels y (N,) apart, over `classes` and any further label of y.

    Returns accuracy, chance (1 / classes), classes (their number), per_class (label, precision, recall, f1, rows),
    best and worst (three labels each, by F1) and confusion (rows are true labels, columns predicted ones).
    """
    labels = np.union1d(classes, y)
    positions, guesses = np.searchsorted(labels, y), np.searchsorted(labels, predicted)
    confusion = contingency(positions, guesses, (len(labels), len(labels)))
    scores = precision_recall_fscore_support(positions, guesses, labels=np.arange(len(labels)), zero_division=0)
    per_class = [
        {"label": int(label), "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for label, p, r, f, n in zip(labels, *scores, strict=True)
    ]
    order = [labels[position] for position in np.argsort(-scores[2], kind="stable")]
    return {
        "accuracy": float(np.trace(confusion) / len(y)),
        "chance": 1 / len(np.atleast_1d(classes)),
        "classes": len(np.atleast_1d(classes)),
        "per_class": per_class,
        "best": [int(label) for label in order[:3]],
        "worst": [int(label) for label in order[::-1][:3]],
        "confusion": confusion.tolist(),
    }


def name_classes(result: Result, class_names: Sequence[str]) -> Result:
    """The result with the names of the classes in per_class, best and worst, where it has these and there are names."""
    if "per_class" not in result or not class_names:
        return result
    return {
        **result,
        "per_class": [{"name": class_names[row["label"]], **row} for row in result["per_class"]],
        **{end: [class_names[label] for label in result[end]] for end in ("best", "worst")},
    }


def entropy_fields(logits: Floats, tau: float) -> Result:
    """tau, mean_entropy (nats), its bound max_entropy (log K) and confidence of softmax(logits / tau), logits (N, K).

    The mean is over the rows; confidence is the mean of the largest probability.
    """
    return {
        "tau": float(tau),
        "mean_entropy": float(softmax_entropy(logits, tau).mean()),
        "max_entropy": math.log(logits.shape[1]),
        "confidence": float(softmax(logits, tau).max(axis=1).mean()),
    }
