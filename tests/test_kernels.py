"""The kernels against SciPy and scikit-learn: |difference| <= 1e-5 max(1, value), whatever the input looks like."""

import os
import subprocess
import sys
from collections.abc import Callable
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
from sklearn.metrics.cluster import contingency_matrix
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import normalize

from engine.kernels import check_tau, cosine_logits, normalise, purity, softmax, softmax_entropy

Array = npt.NDArray[np.floating]

# The first example may compile for seconds, which is no property of the example.
unhurried = settings(deadline=None, max_examples=60)
taus = st.one_of(st.sampled_from([1e-4, 0.01, 0.07, 1.0, 1e3]), st.floats(1e-4, 1e3))
integers = st.integers(-(2**63), 2**63 - 1)


@st.composite
def matrices(draw: st.DrawFn, columns: int | None = None, bound: float = 3e38) -> Array:
    """Matrices of 1-6 rows and 1-40 columns in every floating dtype and memory layout, ordinary or extreme values."""
    dtype = np.dtype(draw(st.sampled_from(["float16", "float32", "float64"])))
    shape = (draw(st.integers(1, 6)), columns or draw(st.integers(1, 40)))
    extreme = min(bound, 6e4) if dtype == np.float16 else bound
    limit = dtype.type(draw(st.sampled_from([1.0, 100.0, extreme]))).item()
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


@unhurried
@given(matrices(), taus)
def test_softmax_entropy_equals_scipy(logits: Array, tau: float) -> None:
    entropies = softmax_entropy(logits, tau)
    assert entropies.dtype == np.float64
    assert_close(entropies, scipy_entropy(reference_probabilities(logits, tau), axis=1))
    assert (entropies >= 0).all()
    assert (entropies <= np.log(logits.shape[1]) + 1e-12).all()


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


@given(matrices(bound=100.0), taus, taus)
@unhurried
def test_entropy_does_not_fall_as_tau_grows(logits: Array, tau: float, other: float) -> None:
    low, high = sorted([tau, other])
    assert (softmax_entropy(logits, high) >= softmax_entropy(logits, low) - 1e-12).all()


@unhurried
@given(st.integers(1, 60).flatmap(lambda n: st.tuples(*[hnp.arrays(np.int64, n, elements=st.integers(-3, 5))] * 2)))
def test_purity_equals_the_contingency_matrix(pair: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> None:
    labels, clusters = pair
    expected = contingency_matrix(labels, clusters).max(axis=0).sum() / len(labels)
    assert purity(labels, clusters) == pytest.approx(expected, abs=1e-12)


@unhurried
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40),
    st.lists(integers, min_size=4, max_size=4, unique=True),
    st.lists(integers, min_size=4, max_size=4, unique=True),
)
def test_purity_depends_on_no_label_value(
    rows: list[tuple[int, int]], label_names: list[int], cluster_names: list[int]
) -> None:
    labels, clusters = np.array(rows).T
    renamed = purity(np.array(label_names)[labels], np.array(cluster_names)[clusters])
    assert renamed == purity(labels, clusters)


def test_purity_of_the_textbook_example() -> None:
    # Manning et al., figure 16.4: 17 points, majorities of 5, 4 and 3.
    clusters = np.repeat([1, 2, 3], [6, 6, 5])
    labels = np.array(list("xxxxxoxoooodxxddd")).view(np.uint32)
    assert purity(labels, clusters) == pytest.approx(12 / 17)
    assert purity(labels, labels) == 1.0


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_purity_takes_every_integer_dtype_to_its_ends(dtype: type[np.integer]) -> None:
    ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype)
    assert purity(ends[[0, 0, 1, 1]], ends[[1, 1, 0, 1]]) == 0.75


@pytest.mark.parametrize("tau", [1e-300, 1e-4, 0.07, 1.0, 1e3])
def test_entropy_at_its_two_bounds(tau: float) -> None:
    equal = np.full((2, 32), 0.25)
    np.testing.assert_allclose(softmax_entropy(equal, tau), np.log(32), rtol=1e-12)
    assert softmax_entropy(np.array([[7.0]]), tau) == 0.0
    np.testing.assert_array_equal(softmax_entropy(np.array([[-3e38, 3e38, 0.0]]), min(tau, 1.0)), 0.0)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 1e38])
def test_the_shortest_and_the_longest_rows_have_a_direction(scale: float) -> None:
    np.testing.assert_allclose(normalise(np.array([[1.0, 1.0]]) * scale), np.sqrt(0.5), rtol=1e-6)


def test_empty_tables_pass_through() -> None:
    assert normalise(np.empty((0, 4))).shape == (0, 4)
    assert softmax_entropy(np.empty((0, 4))).shape == (0,)
    assert cosine_logits(np.empty((0, 4)), np.ones((2, 4))).shape == (0, 2)


@pytest.mark.parametrize("kernel", [normalise, softmax, softmax_entropy, lambda x: cosine_logits(x, np.ones((2, 3)))])
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
@pytest.mark.parametrize("kernel", [normalise, softmax, softmax_entropy])
def test_anything_but_a_real_matrix_is_refused(kernel: Callable[[Array], Array], x: Array) -> None:
    with pytest.raises(ValueError, match="must be"):
        kernel(x)


@pytest.mark.parametrize("tau", [0, -1.0, np.nan, np.inf, "1", None, 1j])
def test_tau_must_be_a_positive_number(tau: float) -> None:
    for call in (softmax, softmax_entropy):
        with pytest.raises(ValueError, match="tau must be a positive number"):
            call(np.ones((1, 2)), tau)
    assert check_tau(float(np.float32(0.5))) == check_tau(1) / 2


def test_dimensions_of_images_and_text_must_agree() -> None:
    with pytest.raises(ValueError, match="3 dimensions, text embeddings 4"):
        cosine_logits(np.ones((2, 3)), np.ones((2, 4)))


@pytest.mark.parametrize(
    ("labels", "clusters", "message"),
    [
        ([], [], "not empty"),
        ([1, 2], [1], "2 labels but 1 clusters"),
        ([[1, 2]], [1, 2], "1-D"),
        ([0.5, 1.0], [1, 2], "labels must be integers"),
        ([1, 2], ["a", "b"], "clusters must be integers"),
    ],
)
def test_purity_refuses_what_is_no_labelling(labels: list[int], clusters: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        purity(labels, clusters)


CALL_EVERY_KERNEL = """
import numpy as np
from engine import kernels
compiled = [kernels._normalise, kernels._softmax_entropy, kernels._softmax, kernels._majorities]
assert not any(kernel.signatures for kernel in compiled), "importing the module compiled something"
x = np.ones((3, 4), np.float32)
kernels.normalise(x), kernels.softmax_entropy(x), kernels.softmax(x), kernels.purity([0, 1], [0, 1])
hits = [sum(kernel.stats.cache_hits.values()) for kernel in compiled]
misses = [sum(kernel.stats.cache_misses.values()) for kernel in compiled]
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
    assert first == "[0, 0, 0, 0] [1, 1, 1, 1]"
    assert second == "[1, 1, 1, 1] [0, 0, 0, 0]"


def test_threads_may_call_the_kernels_at_once() -> None:
    assert run_python(CALL_FROM_THREADS, NUMBA_THREADING_LAYER="workqueue") == "workqueue"
