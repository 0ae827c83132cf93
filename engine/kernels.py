"""The numeric kernels under the probes: row norms, cosine logits, softmax and its entropy at a temperature, purity.

Each public function checks its arrays and hands them to one compiled loop. Inputs are float32 (other dtypes are
converted), sums are float64. numba compiles a loop at its first call and keeps the machine code beside this file, or
under NUMBA_CACHE_DIR, so that only the first process on a machine waits for the compiler.
"""

import math
import threading
from numbers import Real
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Of numba's threading layers only OpenMP and TBB may be entered by two Python threads at once; where neither is
# installed, the third one aborts the process. One lock makes the kernels safe to call from anywhere.
_one_caller = threading.Lock()


def normalise(x: npt.ArrayLike, name: str = "embeddings") -> Floats:
    """Scale each row of x (N, D) to unit Euclidean length; `name` is what an error message calls x.

    Returns (N, D) float32. Raises ValueError where x is not 2-D, and for the first row that holds a NaN or an infinity
    or is all zeros, which has no direction.
    """
    rows = _rows(x, name)
    unit = np.empty_like(rows)
    norms = np.empty(len(rows), np.float64)
    with _one_caller:
        _normalise(rows, unit, norms)
    _refuse_first(~np.isfinite(norms), name, "holds a NaN or an infinity")
    _refuse_first(norms == 0, name, "is all zeros and has no direction")
    return unit


def cosine_logits(x: npt.ArrayLike, text: npt.ArrayLike) -> Floats:
    """The cosine of every image embedding with every text embedding: CLIP's logits before the logit scale.

    x (N, D) and text (K, D) need not be normalised. Returns (N, K) float32. Raises ValueError as `normalise` does, and
    where the two dimensions differ. Formula: Radford et al., Learning Transferable Visual Models From Natural Language
    Supervision (2021), figure 3.
    """
    images, prompts = normalise(x), normalise(text, "text embeddings")
    if images.shape[1] != prompts.shape[1]:
        raise ValueError(f"embeddings have {images.shape[1]} dimensions, text embeddings {prompts.shape[1]}")
    logits: Floats = images @ prompts.T
    return logits


def softmax_entropy(logits: npt.ArrayLike, tau: float = 1.0) -> Doubles:
    """The Shannon entropy in nats of softmax(logits / tau) over the last axis of logits (N, K).

    With z = (logits - max logits) / tau and s = sum_k exp(z_k), the probabilities are exp(z_k) / s and their entropy
    -sum_k p_k log p_k is

        H = log s - (1/s) sum_k z_k exp(z_k),   0 <= H <= log K.

    Entropy: Shannon, A Mathematical Theory of Communication (1948), section 6; tau: Hinton et al., Distilling the
    Knowledge in a Neural Network (2015), equation 1. Each row is read from memory once and no probability is stored;
    s >= 1, so no logarithm needs an epsilon.

    Returns (N,) float64. Raises ValueError where logits is not 2-D or has no column, where tau is not a positive
    number, and for the first row that holds a NaN or an infinity.
    """
    tau = check_tau(tau)
    rows = _rows(logits, "logits")
    entropies = np.empty(len(rows), np.float64)
    with _one_caller:
        _softmax_entropy(rows, tau, entropies)
    _refuse_first(np.isnan(entropies), "logits", "holds a NaN or an infinity")
    return entropies


def softmax(logits: npt.ArrayLike, tau: float = 1.0) -> Floats:
    """The probabilities softmax(logits / tau) over the last axis of logits (N, K); source as for `softmax_entropy`.

    Returns (N, K) float32. Raises ValueError as `softmax_entropy` does.
    """
    tau = check_tau(tau)
    rows = _rows(logits, "logits")
    probabilities = np.empty_like(rows)
    with _one_caller:
        _softmax(rows, tau, probabilities)
    _refuse_first(np.isnan(probabilities[:, 0]), "logits", "holds a NaN or an infinity")
    return probabilities


def purity(labels: npt.ArrayLike, clusters: npt.ArrayLike) -> float:
    """The share of rows whose cluster is mostly of their label: (1/N) sum_k max_j |C_k ∩ L_j|.

    labels and clusters are (N,) integers, any values. Returns a number in (0, 1]. Raises ValueError where they are not
    1-D integers of one length, or empty. Formula: Manning, Raghavan and Schütze, Introduction to Information Retrieval
    (2008), equation 16.1.
    """
    label_codes, label_count = _codes(labels, "labels")
    cluster_codes, cluster_count = _codes(clusters, "clusters")
    if len(label_codes) != len(cluster_codes):
        raise ValueError(f"{len(label_codes)} labels but {len(cluster_codes)} clusters: both need one entry a row")
    majorities = _majorities(label_codes, label_count, cluster_codes, cluster_count)
    return float(majorities.sum() / len(label_codes))


def check_tau(tau: float) -> float:
    """The temperature tau as a float; ValueError unless it is a positive, finite number."""
    if not (isinstance(tau, Real) and 0 < tau < math.inf):
        raise ValueError(f"tau must be a positive number, not {tau!r}")
    return float(tau)


def _rows(x: npt.ArrayLike, name: str) -> Floats:
    array = np.asarray(x)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must be 2-D with at least one column, not of shape {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be real numbers, not {array.dtype}")
    # A float64 beyond the range of float32 becomes an infinity, which the kernels report by its row.
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def _refuse_first(bad: npt.NDArray[np.bool_], name: str, reason: str) -> None:
    if bad.any():
        raise ValueError(f"row {int(bad.argmax())} of the {name} {reason}")


def _codes(values: npt.ArrayLike, name: str) -> tuple[npt.NDArray[np.int64], int]:
    """The values renamed to 0 .. count - 1 (some codes may go unused), and count, which is at most N."""
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be 1-D and not empty, not of shape {array.shape}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    # Wraps the upper half of uint64, which keeps distinct values distinct: all that a code has to do.
    array = array.astype(np.int64)
    low, high = int(array.min()), int(array.max())
    if high - low < array.size:
        return array - low, high - low + 1
    # Sparse values need the sort, which takes ten times as long as the counting (a million rows: 70 ms).
    distinct, codes = np.unique(array, return_inverse=True)
    return codes.astype(np.int64), len(distinct)


@numba.njit(parallel=True, cache=True)
def _normalise(rows: Any, unit: Any, norms: Any) -> None:
    for i in numba.prange(rows.shape[0]):
        total = 0.0
        for j in range(rows.shape[1]):
            total += np.float64(rows[i, j]) * np.float64(rows[i, j])
        norms[i] = np.sqrt(total)
        if norms[i] > 0.0:
            for j in range(rows.shape[1]):
                unit[i, j] = rows[i, j] / norms[i]


@numba.njit(parallel=True, cache=True)
def _softmax_entropy(rows: Any, tau: float, entropies: Any) -> None:
    for i in numba.prange(rows.shape[0]):
        top = _top(rows[i])
        total = 0.0
        weighted = 0.0
        for k in range(rows.shape[1]):
            # exp(-746) is zero in float64: the floor only keeps -inf * 0 out of the sum at a tiny tau.
            z = max((np.float64(rows[i, k]) - top) / tau, -746.0)
            e = np.exp(z)
            total += e
            weighted += z * e
        entropies[i] = np.log(total) - weighted / total


@numba.njit(parallel=True, cache=True)
def _softmax(rows: Any, tau: float, probabilities: Any) -> None:
    for i in numba.prange(rows.shape[0]):
        top = _top(rows[i])
        total = 0.0
        for k in range(rows.shape[1]):
            e = np.exp((np.float64(rows[i, k]) - top) / tau)
            total += e
            probabilities[i, k] = e
        for k in range(rows.shape[1]):
            probabilities[i, k] /= total


@numba.njit(cache=True)
def _top(row: Any) -> float:
    """The largest value of a row, or NaN where one of them is not finite."""
    top = np.float64(row[0])
    spoiled = 0.0
    for value in row:
        # Zero for every finite value, NaN for the others; cheaper than a test in each step.
        spoiled += value * np.float32(0.0)
        top = max(top, np.float64(value))
    return top + spoiled


@numba.njit(cache=True)
def _majorities(labels: Any, label_count: int, clusters: Any, cluster_count: int) -> Any:
    """max_j |C_k ∩ L_j| of each cluster k, in memory for N + labels + clusters, never for their product."""
    ends = np.zeros(cluster_count + 1, np.int64)
    for cluster in clusters:
        ends[cluster + 1] += 1
    ends = np.cumsum(ends)
    by_cluster = np.empty_like(labels)
    cursor = ends[:-1].copy()
    for i in range(labels.size):
        by_cluster[cursor[clusters[i]]] = labels[i]
        cursor[clusters[i]] += 1
    counts = np.zeros(label_count, np.int64)
    majorities = np.zeros(cluster_count, np.int64)
    for cluster in range(cluster_count):
        members = by_cluster[ends[cluster] : ends[cluster + 1]]
        for label in members:
            counts[label] += 1
            majorities[cluster] = max(majorities[cluster], counts[label])
        for label in members:
            counts[label] = 0
    return majorities
