"""Redundancy: how much of a prompt set repeats the rest of it, and how few of its prompts carry its accuracy."""

import numpy as np
import numpy.typing as npt
from scipy.linalg import qr
from scipy.special import entr
from sklearn.utils import check_array

from engine.kernels import Doubles, cosine_logits
from probes.classifiers import SEED, linear_svm
from probes.common import Result, check_labels, check_text_embeddings


def effective_rank(matrix: npt.ArrayLike) -> float:
    """The exponential of the Shannon entropy of the singular values of matrix (K, D), scaled to sum 1.

    From 1, where all rows are multiples of one, to the rank, where all singular values are equal; 0 for a matrix of
    zeros. Source: Roy and Vetterli, The Effective Rank: A Measure of Effective Dimensionality (2007), definition 1.
    Raises ValueError where matrix is not 2-D, is empty or holds a NaN or an infinity.
    """
    singular_values = np.linalg.svd(check_array(matrix, dtype=np.float64, input_name="matrix"), compute_uv=False)
    total = singular_values.sum()
    return float(np.exp(entr(singular_values / total).sum())) if total > 0 else 0.0


def greedy_order(logits: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The prompts in the order of a greedy choice that looks at logits (N, K) only, never at labels.

    Next comes the prompt whose logits, centred by column, leave the largest residual when a least-squares fit on those
    already taken explains them: QR with column pivoting (Businger and Golub, Linear Least Squares Solutions by
    Householder Transformations, 1965). Once the rank is used up, all residuals are rounding and so is the order.
    Returns (K,) int64, a permutation of 0 .. K - 1. Raises ValueError where logits is not 2-D, is empty or holds a NaN
    or an infinity.
    """
    # R has the inner products of the N-row columns in at most K rows; pivoting is left to them, and unlike the Gram
    # matrix it does not square the condition number.
    triangle = np.linalg.qr(_centred(logits), mode="r")
    _, order = qr(triangle, mode="r", pivoting=True)
    return np.asarray(order, dtype=np.int64)


def redundancy(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
) -> Result:
    """Measure the repetition in K prompts, text_embeddings (K, D): X (N, D) image embeddings, y (N,) integers.

    Returns probe, prompts (K), three effective ranks (effective_rank of the unit text embeddings,
    centred_effective_rank of those less their mean, effective_rank_of_logits of the train rows' cosine logits centred
    by column), accuracy of a linear SVM on all K logits of the test rows, chance (1 / classes), first (up to ten
    prompts, by position, that `greedy_order` takes first on the train rows) and curve: for k = 1, 2, 4, ... and K
    prompts, the accuracy with the first k of that order and random_accuracy, that with k drawn at random (of one seeded
    permutation, the first k). Raises ValueError for rows without a label, where train_y holds one class only, and as
    `cosine_logits` does.
    """
    train_labels, test_labels = check_labels(train_X, train_y), check_labels(test_X, test_y)
    text = check_text_embeddings(text_embeddings)
    train_logits, test_logits = cosine_logits(train_X, text), cosine_logits(test_X, text)

    def accuracy(prompts: npt.NDArray[np.int64]) -> float:
        svm = linear_svm().fit(train_logits[:, prompts], train_labels)
        return float(svm.score(test_logits[:, prompts], test_labels))

    count = len(text)
    order = greedy_order(train_logits)
    at_random = np.random.default_rng(SEED).permutation(count)
    curve = []
    k = 1
    while k < count:
        curve.append({"prompts": k, "accuracy": accuracy(order[:k]), "random_accuracy": accuracy(at_random[:k])})
        k *= 2
    # With all prompts the two choices are one, and the SVM on them is the slowest: it is fitted once.
    with_all = accuracy(np.arange(count))
    curve.append({"prompts": count, "accuracy": with_all, "random_accuracy": with_all})
    return {
        "probe": "redundancy",
        "accuracy": with_all,
        "chance": 1 / len(np.unique(train_labels)),
        "prompts": count,
        "effective_rank": effective_rank(text),
        "centred_effective_rank": effective_rank(_centred(text)),
        "effective_rank_of_logits": effective_rank(_centred(train_logits)),
        "first": order[:10].tolist(),
        "curve": curve,
    }


def _centred(matrix: npt.ArrayLike) -> Doubles:
    """matrix (N, K) less the mean of each column, in float64: the residuals of near-copies survive the subtraction."""
    columns = check_array(matrix, dtype=np.float64, input_name="logits")
    centred: Doubles = columns - columns.mean(axis=0)
    return centred
