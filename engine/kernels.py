"""The numeric kernels under the probes: row norms, cosine logits, softmax and its entropy at temperatures, top-k.

Each public function checks its arrays and hands them to one compiled loop. Inputs are float32 (other dtypes are
converted), sums are float64. numba compiles a loop at its first call and keeps the machine code beside this file, or
under NUMBA_CACHE_DIR, so that only the first process on a machine waits for the compiler.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# What the entropy kernel is built of, see _entropies, _exp and _log.
BLOCK = 32  # rows whose logarithms are taken together
LANES = 16  # float32 in the widest register
LOWEST = np.float32(-87)  # exp(-87) is 1.6e-38, the smallest float32 with all its digits
LARGEST = np.finfo(np.float32).max
LOG2, PER_LOG2 = np.float32(math.log(2)), np.float32(1 / math.log(2))
ROUNDER = np.float32(1.5 * 2**23)
ZERO = np.float32(0)
ONE, SECOND, THIRD, FOURTH, FIFTH, SIXTH = (np.float32(1 / math.factorial(k)) for k in range(1, 7))
ROOT_HALF = np.float64(math.sqrt(0.5)).view(np.int64)

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


def softmax_entropy(logits: npt.ArrayLike, tau: float | npt.ArrayLike = 1.0) -> Doubles:
    """The Shannon entropy in nats of softmax(logits / tau) over the last axis of logits (N, K), for one tau or several.

    With z = (logits - max logits) / tau and s = sum_k exp(z_k), the probabilities are exp(z_k) / s and their entropy
    -sum_k p_k log p_k is

        H = log s - (1/s) sum_k z_k exp(z_k),   0 <= H <= log K.

    Entropy: Shannon, A Mathematical Theory of Communication (1948), section 6; tau: Hinton et al., Distilling the
    Knowledge in a Neural Network (2015), equation 1. Each row is read from memory once, for all taus, and no
    probability is stored; s >= 1, so no logarithm needs an epsilon. Off by at most 2e-6 max(1, H), see `_exp`.

    Returns (N,) float64 for a number tau, (N, T) for T of them. Raises ValueError where logits is not 2-D or has no
    column, where a tau is not a positive number, and for the first row that holds a NaN or an infinity.
    """
    taus = [check_tau(one) for one in np.asarray(tau, dtype=object).reshape(-1).tolist()]
    if not taus:
        raise ValueError("tau holds no temperature: give at least one")
    rows = _rows(logits, "logits")
    # Of halves, see _entropies. A tau below 6e-39 counts as that: its inverse is no float32.
    scales = np.minimum(2 / np.array(taus + taus[-1:] * (len(taus) % 2)), LARGEST).astype(np.float32)
    entropies = np.empty((len(rows), len(taus)), np.float64)
    with _one_caller:
        _entropies(rows, scales, entropies)
    _refuse_first(np.isnan(entropies[:, 0]), "logits", "holds a NaN or an infinity")
    return entropies[:, 0] if np.ndim(tau) == 0 else entropies


def prompt_entropies(
    embeddings: Iterable[npt.ArrayLike], text: npt.ArrayLike, tau: float | npt.ArrayLike = 1.0
) -> Iterator[Doubles]:
    """`softmax_entropy` of the cosine logits of embeddings that come in blocks: only one block's stand in memory.

    embeddings: blocks (n, D), such as `engine.manifest.run_embeddings` gives; text (K, D). Yields, for each, (n,) or
    (n, T) float64. Raises ValueError as `cosine_logits` and `softmax_entropy` do; a row's number is that in its block.
    """
    prompts = normalise(text, "text embeddings")
    for block in embeddings:
        yield softmax_entropy(cosine_logits(block, prompts), tau)


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


def top_k(logits: npt.ArrayLike, k: int) -> npt.NDArray[np.int64]:
    """The columns of the k largest values of each row of logits (N, K), the largest first; of equal ones the first.

    Returns (N, k) int64. Raises ValueError where k is not from 1 to K, where logits is not 2-D or has no column, and
    for the first row that holds a NaN or an infinity.
    """
    rows = _rows(logits, "logits")
    if not 1 <= k <= rows.shape[1]:
        raise ValueError(f"k must be from 1 to {rows.shape[1]}, the number of columns, not {k}")
    columns = np.empty((len(rows), k), np.int64)
    with _one_caller:
        _top_k(rows, columns)
    _refuse_first(columns[:, 0] < 0, "logits", "holds a NaN or an infinity")
    return columns


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


@numba.njit(parallel=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
def _entropies(rows: Any, scales: Any, entropies: Any) -> None:
    """`scales` holds 2 / tau, an even number; what is beyond the columns of `entropies` is computed for nothing.

    Two temperatures at a time, which share what they read: 1.2 times as fast as one by one. fastmath lets the sums run
    in the lanes of a vector register; a check for division by zero would keep the last loop from vectorising.
    """
    columns = rows.shape[1]
    most = math.log(columns)
    for block in numba.prange((rows.shape[0] + BLOCK - 1) // BLOCK):
        first = block * BLOCK
        count = min(BLOCK, rows.shape[0] - first)
        # Filled up with what has no probability, so that whole registers are summed.
        z = np.full((columns + LANES - 1) // LANES * LANES, -np.inf, np.float32)
        total = np.empty((BLOCK, scales.size), np.float32)
        weighted = np.empty((BLOCK, scales.size), np.float32)
        spoiled = np.empty(BLOCK, np.float32)
        for r in range(count):
            top = _top(rows[first + r])
            spoiled[r] = top * 0.0
            for k in range(columns):
                # Half of the difference: the whole one can be too large for float32.
                z[k] = np.float32(0.5) * rows[first + r, k] - np.float32(0.5 * top)
            for t in range(0, scales.size, 2):
                sum_0, weighted_0, sum_1, weighted_1 = ZERO, ZERO, ZERO, ZERO
                for value in z:
                    u = max(value * scales[t], LOWEST)
                    e = _exp(u)
                    sum_0 += e
                    weighted_0 += e * u
                    u = max(value * scales[t + 1], LOWEST)
                    e = _exp(u)
                    sum_1 += e
                    weighted_1 += e * u
                total[r, t], weighted[r, t], total[r, t + 1], weighted[r, t + 1] = sum_0, weighted_0, sum_1, weighted_1
        for r in range(count):
            for t in range(entropies.shape[1]):
                # Rounding can carry it 1e-6 past log K.
                h = _log(np.float64(total[r, t])) - weighted[r, t] / total[r, t]
                entropies[first + r, t] = min(h, most) + spoiled[r]


@numba.njit(cache=True, fastmath={"contract"})
def _exp(u: Any) -> Any:
    """exp of a float32 from LOWEST to 0, relative error 5e-7; np.exp is a call for each number and not vectorised here.

    exp(u) = 2^n exp(r) with n = round(u / log 2), so |r| <= log(2) / 2: the Taylor series of exp(r) to r^6 leaves out
    at most r^7 / 7! = 1.2e-7. Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits; shifted to
    the place of the exponent, and added to the bits of exp(r), it multiplies by 2^n.
    """
    shifted = u * PER_LOG2 + ROUNDER
    r = u - (shifted - ROUNDER) * LOG2
    series = (((((SIXTH * r + FIFTH) * r + FOURTH) * r + THIRD) * r + SECOND) * r + ONE) * r + ONE
    bits = np.float32(series).view(np.int32) + (np.float32(shifted).view(np.int32) << np.int32(23))
    return np.int32(bits).view(np.float32)


@numba.njit(cache=True, error_model="numpy")
def _log(x: Any) -> Any:
    """log of a float64 from 1 to 2^52, absolute error 1e-9; math.log takes a fifth of the entropy's time.

    x = 2^n m with m from sqrt(1/2) to sqrt(2); log m = 2 artanh((m - 1) / (m + 1)), its series to the ninth power.
    """
    bits = np.float64(x).view(np.int64)
    n = (bits - ROOT_HALF) >> np.int64(52)
    m = np.int64(bits - (n << np.int64(52))).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    return np.float64(n) * math.log(2) + 2.0 * s * ((((q / 9 + 1 / 7) * q + 1 / 5) * q + 1 / 3) * q + 1.0)


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


@numba.njit(parallel=True, cache=True)
def _top_k(rows: Any, columns: Any) -> None:
    """Insertion into the k best so far: most values end at the first comparison. -1 where a row is not finite."""
    k = columns.shape[1]
    for i in numba.prange(rows.shape[0]):
        if np.isnan(_top(rows[i])):
            columns[i, :] = -1
            continue
        filled = 0
        for column in range(rows.shape[1]):
            value = rows[i, column]
            if filled == k and value <= rows[i, columns[i, k - 1]]:
                continue
            place = min(filled, k - 1)
            while place > 0 and rows[i, columns[i, place - 1]] < value:
                columns[i, place] = columns[i, place - 1]
                place -= 1
            columns[i, place] = column
            filled = min(filled + 1, k)
