"""Modality gap: how far apart CLIP keeps images and text in the one space that they share.

Source: Liang et al., Mind the Gap: Understanding the Modality Gap in Multi-modal Contrastive Representation Learning
(NeurIPS 2022).
"""

import numpy as np
import numpy.typing as npt

from engine.kernels import Floats, normalise
from probes.common import Result, check_labels
from probes.zero_shot import ZeroShotClassifier


def modality_gap(X: npt.ArrayLike, y: npt.ArrayLike, text_embeddings: npt.ArrayLike) -> Result:
    """Measure the gap between the image embeddings X (N, D), labels y (N,) integers, and text_embeddings (K, D).

    text_embeddings holds one row a class, in label order. Returns probe, gap (the Euclidean distance, from 0 to 2,
    between the mean unit image and the mean unit text embedding: Liang et al., section 2), four mean cosines
    (matched_cosine of an image with its class's prompt, unmatched_cosine with another class's, image_cosine of two
    different rows of X, text_cosine of two different prompts), rows and classes. Raises ValueError for rows without a
    label, for fewer than two rows or prompts, and whatever `ZeroShotClassifier` refuses.
    """
    labels = check_labels(X, y)
    text = ZeroShotClassifier(text_embeddings).fit(X, labels).text_embeddings_
    images = normalise(X)
    rows, classes = len(images), len(text)
    if min(rows, classes) < 2:
        raise ValueError(f"pairs need two images and two prompts at least, there are {rows} and {classes}")
    cosines = images @ text.T
    matched = cosines[np.arange(rows), labels].sum(dtype=np.float64)
    unmatched = cosines.sum(dtype=np.float64) - matched
    return {
        "probe": "modality-gap",
        "gap": float(np.linalg.norm(images.mean(axis=0, dtype=np.float64) - text.mean(axis=0, dtype=np.float64))),
        "matched_cosine": float(matched / rows),
        "unmatched_cosine": float(unmatched / (rows * (classes - 1))),
        "image_cosine": _mean_cosine(images),
        "text_cosine": _mean_cosine(text),
        "rows": rows,
        "classes": classes,
    }


def _mean_cosine(unit: Floats) -> float:
    """The mean cosine of two different rows of unit (N, D): |sum of the rows|^2 is N + the sum over ordered pairs."""
    total = unit.sum(axis=0, dtype=np.float64)
    return float((total @ total - len(unit)) / (len(unit) * (len(unit) - 1)))
