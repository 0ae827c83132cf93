"""The kernels against NumPy, SciPy and scikit-learn: |difference| <= 1e-5 max(1, value), whatever the input."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import logsumexp
from scipy.special import softmax as scipy_softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

from engine.kernels import (
    BLOCK,
    LANES,
    check_tau,
    cosine_logits,
    normalise,
    prompt_entropies,
    softmax,
    softmax_entropy,
    top_k,
)

Array = npt.NDArray[np.floating | np.integer]

# An entropy may fall as tau grows by what float32 rounds away: so much of max(1, log K).
ROUNDING = 2e-6

# The first example may compile for seconds, which is no property of the example.
unhurried = settings(deadline=None, max_examples=60)
taus = st.one_of(st.sampled_from([1e-4, 0.01, 0.07, 1.0, 1e4]), st.floats(1e-4, 1e4))


@st.composite
def matrices(draw: st.DrawFn, columns: int | None = None, bound: float = 3e38) -> Array:
    """Matrices of 1-6 rows and 1-40 columns in many dtypes and every memory layout: ordinary, extreme or denormal."""
    dtype = np.dtype(draw(st.sampled_from(["float16", "float32", "float64", "int8", "int64"])))
    shape = (draw(st.integers(1, 6)), columns or draw(st.integers(1, 40)))
    if dtype.kind == "f":
        extreme = min(bound, float(np.finfo(dtype).max))
        limit = dtype.type(draw(st.sampled_from([np.finfo(dtype).tiny, 1.0, 100.0, extreme]))).item()
    else:
        limit = draw(st.sampled_from([1, int(min(bound, np.iinfo(dtype).max))]))
    elements = hnp.from_dtype(dtype, min_value=-limit, max_value=limit)
    x: Array = draw(hnp.arrays(dtype, shape, elements=elements))
    layout = draw(st.sampled_from(["C", "Fortran", "strided", "read-only"]))
    if layout == "Fortran":
        return np.asfortranarray(x)
    if layout == "strided":
        return np.repeat(np.repeat(x, 2, axis=0), 3, axis=1)[::2, ::3]
    if layout == "read-only":
        x.setflags(write=False)
    return x


@st.composite
def long_or_wide(draw: st.DrawFn) -> npt.NDArray[np.float32]:
    """Normal numbers in shapes around what the entropy kernel is cut into: tiles of rows, sums of columns."""
    rows = draw(st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]))
    columns = draw(st.sampled_from([1, 2, LANES - 1, LANES, LANES + 1, 32, 415, 1000, 1500]))
    spread = draw(st.sampled_from([1e-42, 1e-6, 1e-3, 0.1, 1.0, 30.0, 1e37]))
    normal = np.random.default_rng(draw(st.integers(0, 2**32))).standard_normal((rows, columns))
    return np.asarray(normal * spread, np.float32)


def as_read(x: Array) -> npt.NDArray[np.float64]:
    """What a kernel sees: x in float32; the reference then computes in float64."""
    return x.astype(np.float32).astype(np.float64)


def assert_close(ours: Array, reference: Array) -> None:
    assert ours.shape == reference.shape
    assert (np.abs(ours - reference) <= 1e-5 * np.maximum(1, np.abs(reference))).all()


def comparable(x: Array) -> Array:
    """The rows that scikit-learn normalises: it takes a norm below 10 machine epsilons for zero and leaves the row."""
    long: npt.NDArray[np.bool_] = np.linalg.norm(as_read(x), axis=1) > 1e-14
    return np.asarray(x[long])


def reference_probabilities(logits: Array, tau: float) -> npt.NDArray[np.float64]:
    z = as_read(logits)
    return np.asarray(scipy_softmax((z - z.max(axis=1, keepdims=True)) / tau, axis=1))


@unhurried
@given(matrices())
def test_normalise_equals_scikit_learn(x: Array) -> None:
    x = comparable(x)
    if len(x):
        unit = normalise(x)
        assert unit.dtype == np.float32
        assert_close(unit, normalize(as_read(x)))


@unhurried
@given(st.integers(1, 40).flatmap(lambda columns: st.tuples(matrices(columns), matrices(columns))))
def test_cosine_logits_equal_scikit_learn(pair: tuple[Array, Array]) -> None:
    x, text = map(comparable, pair)
    if len(x) and len(text):
        logits = cosine_logits(x, text)
        assert logits.dtype == np.float32
        assert_close(logits, cosine_similarity(as_read(x), as_read(text)))


def assert_entropies(ours: Array, logits: Array, tau: float) -> None:
    assert ours.dtype == np.float64
    assert_close(ours, scipy_entropy(reference_probabilities(logits, tau), axis=1))
    most = np.log(logits.shape[1])
    assert (ours >= -1e-9).all()
    assert (ours <= most + 1e-12).all()


@unhurried
@given(matrices(), taus)
def test_softmax_entropy_equals_scipy(logits: Array, tau: float) -> None:
    assert_entropies(softmax_entropy(logits, tau), logits, tau)


@unhurried
@given(long_or_wide(), taus)
def test_softmax_entropy_equals_scipy_in_every_shape(logits: Array, tau: float) -> None:
    assert_entropies(softmax_entropy(logits, tau), logits, tau)


@unhurried
@given(st.one_of(matrices(), long_or_wide()), st.lists(taus, min_size=1, max_size=6))
def test_many_temperatures_at_once_are_each_alone_to_the_bit(logits: Array, several: list[float]) -> None:
    together = softmax_entropy(logits, several)
    assert together.shape == (len(logits), len(several))
    for column, tau in zip(together.T, several, strict=True):
        np.testing.assert_array_equal(column, softmax_entropy(logits, tau))


@unhurried
@given(matrices(bound=100.0), st.floats(0.01, 1e3))
def test_softmax_entropy_equals_its_definition_by_logsumexp(logits: Array, tau: float) -> None:
    z = as_read(logits) / tau
    log_p = z - logsumexp(z, axis=1, keepdims=True)
    assert_close(softmax_entropy(logits, tau), -(np.exp(log_p) * log_p).sum(axis=1))


@unhurried
@given(matrices(), taus)
def test_softmax_equals_scipy(logits: Array, tau: float) -> None:
    probabilities = softmax(logits, tau)
    assert probabilities.dtype == np.float32
    assert_close(probabilities, reference_probabilities(logits, tau))


@unhurried
@given(st.one_of(matrices(bound=100.0), long_or_wide()), st.lists(taus, min_size=2, max_size=10))
def test_entropy_does_not_fall_as_tau_grows(logits: Array, several: list[float]) -> None:
    steps = np.diff(softmax_entropy(logits, sorted(several)), axis=1)
    assert (steps >= -ROUNDING * max(1, np.log(logits.shape[1]))).all()


def first_largest(logits: Array, k: int) -> npt.NDArray[np.int64]:
    return np.argsort(-as_read(logits), axis=1, kind="stable")[:, :k]


@unhurried
@given(matrices(), st.data())
def test_top_k_equals_a_stable_sort(logits: Array, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, logits.shape[1]))
    columns = top_k(logits, k)
    assert columns.dtype == np.int64
    np.testing.assert_array_equal(columns, first_largest(logits, k))


@unhurried
@given(hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=20), elements=st.integers(0, 3)))
def test_of_equal_values_the_first_column_counts(logits: Array) -> None:
    for k in {1, logits.shape[1]}:
        np.testing.assert_array_equal(top_k(logits, k), first_largest(logits, k))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_top_k_takes_no_more_columns_than_there_are(k: int) -> None:
    with pytest.raises(ValueError, match="k must be from 1 to 3, the number of columns"):
        top_k(np.ones((2, 3)), k)


@pytest.mark.parametrize("columns", [1, 2, 3, 32, 128, 129, 415, 1000, 3001])
@pytest.mark.parametrize("value", [0.25, 1e-42, -3e38])
def test_equal_logits_have_the_largest_entropy(columns: int, value: float) -> None:
    entropies = softmax_entropy(np.full((2, columns), value), [1e-300, 1e-4, 0.07, 1.0, 1e4])
    np.testing.assert_allclose(entropies, np.log(columns), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tau", [1e-300, 1e-4, 0.07, 1.0])
def test_one_logit_far_above_the_others_has_none(tau: float) -> None:
    np.testing.assert_allclose(softmax_entropy(np.array([[-3e38, 3e38, 0.0]]), tau), 0.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
def test_the_shortest_and_the_longest_rows_have_a_direction(scale: float) -> None:
    np.testing.assert_allclose(normalise(np.array([[1.0, 1.0]]) * scale), np.sqrt(0.5), rtol=1e-6)


def test_empty_tables_pass_through() -> None:
    assert normalise(np.empty((0, 4))).shape == (0, 4)
    assert softmax_entropy(np.empty((0, 4))).shape == (0,)
    assert softmax_entropy(np.empty((0, 4)), [0.1, 1]).shape == (0, 2)
    assert softmax(np.empty((0, 4))).shape == (0, 4)
    assert top_k(np.empty((0, 4)), 3).shape == (0, 3)
    assert cosine_logits(np.empty((0, 4)), np.ones((2, 4))).shape == (0, 2)


OF_ONE_TABLE = [
    normalise,
    softmax,
    softmax_entropy,
    lambda x: softmax_entropy(x, [1e-4, 1e4]),
    lambda x: top_k(x, 1),
]
OF_EMBEDDINGS = [
    lambda x: cosine_logits(x, np.ones((2, 3))),
    lambda x: list(prompt_entropies([x], np.ones((2, 3)))),
]


@pytest.mark.parametrize("kernel", OF_ONE_TABLE + OF_EMBEDDINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_the_first_row_that_is_not_finite_is_named(kernel: Callable[[Array], Array], bad: float) -> None:
    x = np.ones((5, 3))
    x[[2, 4], 1] = bad
    with pytest.raises(ValueError, match=r"row 2 of the \w+ holds a NaN or an infinity"):
        kernel(x)


def test_the_first_zero_row_is_named() -> None:
    x = np.ones((4, 3))
    x[1:3] = 0
    with pytest.raises(ValueError, match="row 1 of the embeddings is all zeros"):
        normalise(x)
    with pytest.raises(ValueError, match="row 1 of the text embeddings is all zeros"):
        cosine_logits(np.ones((2, 3)), x)


@pytest.mark.parametrize("x", [np.ones(3), np.ones((2, 0)), np.ones((2, 2, 2)), np.array([["a"]]), np.array([[1j]])])
@pytest.mark.parametrize("kernel", OF_ONE_TABLE)
def test_anything_but_a_real_matrix_is_refused(kernel: Callable[[Array], Array], x: Array) -> None:
    with pytest.raises(ValueError, match="must be"):
        kernel(x)


@pytest.mark.parametrize("tau", [0, -1.0, np.nan, np.inf, "1", None, 1j])
def test_tau_must_be_a_positive_number(tau: float) -> None:
    for call in (softmax, softmax_entropy):
        with pytest.raises(ValueError, match="tau must be a positive number"):
            call(np.ones((1, 2)), tau)
    with pytest.raises(ValueError, match="tau must be a positive number"):
        softmax_entropy(np.ones((1, 2)), [1.0, tau])
    assert check_tau(float(np.float32(0.5))) == check_tau(1) / 2


def test_no_temperature_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="tau holds no temperature"):
        softmax_entropy(np.ones((1, 2)), [])


def test_dimensions_of_images_and_text_must_agree() -> None:
    with pytest.raises(ValueError, match="3 dimensions, text embeddings 4"):
        cosine_logits(np.ones((2, 3)), np.ones((2, 4)))


@unhurried
@given(
    st.lists(st.sampled_from([0, 1, 63, 64, 65, 300]), max_size=4),
    st.sampled_from([0.1, [0.1], [0.1, 1.0, 100.0]]),
    st.sampled_from(["float16", "float32"]),
)
def test_entropies_block_by_block_are_those_of_the_whole(
    sizes: list[int], tau: float | list[float], dtype: str
) -> None:
    random = np.random.default_rng(len(sizes))
    blocks = [random.standard_normal((size, 24)).astype(dtype) for size in sizes]
    text = random.standard_normal((7, 24))
    whole = softmax_entropy(cosine_logits(np.concatenate([np.empty((0, 24), dtype), *blocks]), text), tau)
    ours = np.concatenate([np.empty((0, *whole.shape[1:])), *prompt_entropies(blocks, text, tau)])
    # Not to the bit: a matrix product of another shape may round in another order.
    np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-6)


def test_a_block_is_asked_for_when_its_entropies_are() -> None:
    given_out = 0

    def blocks() -> Iterator[Array]:
        nonlocal given_out
        for _ in range(10):
            given_out += 1
            yield np.ones((5, 3))

    for number, entropies in enumerate(prompt_entropies(blocks(), np.eye(3), [0.1, 1.0]), start=1):
        assert given_out == number
        assert entropies.shape == (5, 2)
    assert given_out == 10


CALL_EVERY_KERNEL = """
import numpy as np
from engine import counting, kernels
compiled = [kernels._normalise, kernels._entropies, kernels._softmax, kernels._top_k]
compiled += [counting._count, counting._majorities]
assert not any(kernel.signatures for kernel in compiled), "importing the modules compiled something"
x = np.ones((3, 4), np.float32)
kernels.normalise(x), kernels.softmax_entropy(x), kernels.softmax(x), kernels.top_k(x, 2)
counting.contingency([0, 1], [0, 1], (2, 2)), counting.purity([0, 1], [0, 1])
hits = {sum(kernel.stats.cache_hits.values()) for kernel in compiled}
misses = {sum(kernel.stats.cache_misses.values()) for kernel in compiled}
print(hits, misses)
"""

# On the threading layer that aborts when two threads enter it, four threads.
CALL_FROM_THREADS = """
import concurrent.futures
import numba, numpy as np
from engine import kernels
x = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32)
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = list(pool.map(lambda _: kernels.softmax_entropy(x, 0.1), range(100)))
assert all((result == results[0]).all() for result in results)
print(numba.threading_layer())
"""


def run_python(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_the_second_process_loads_the_compiled_code_from_disk(tmp_path: Path) -> None:
    first = run_python(CALL_EVERY_KERNEL, NUMBA_CACHE_DIR=str(tmp_path))
    second = run_python(CALL_EVERY_KERNEL, NUMBA_CACHE_DIR=str(tmp_path))
    assert first == "{0} {1}"
    assert second == "{1} {0}"


def test_threads_may_call_the_kernels_at_once() -> None:
    assert run_python(CALL_FROM_THREADS, NUMBA_THREADING_LAYER="workqueue") == "workqueue"
