"""Temperature and vocabulary: entropies against SciPy, and what tau is to the SVM on embeddings of the sample."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.svm import SVC

from engine.bundle import Bundle
from engine.datasets import open_dataset
from engine.stream import Settings, extract
from engine.text import embed_prompts
from probes.embeddings import ImageEmbeddings, load_run
from probes.linear import class_agnostic
from probes.prompts import read_prompts
from probes.temperature import SWEEP, TAUS, entropy_sweep, regularisation, temperature
from probes.vocabulary import vocabulary

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    train: ImageEmbeddings
    test: ImageEmbeddings
    text: Array  # of alternative-32

    def arrays(self) -> tuple[Array, npt.NDArray[np.int64], Array, npt.NDArray[np.int64]]:
        return self.train.X, self.train.y, self.test.X, self.test.y


@pytest.fixture(scope="module")
def sample(mini: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """800 images of the embedded sample to learn from and 1,000 to score on, as the embedded model sees them."""
    folder = tmp_path_factory.mktemp("runs")
    for split, rows in (("train", 800), ("test", 1000)):
        extract(mini, open_dataset("cifar10-sample", split, sample=rows), folder / split, Settings())
    text = embed_prompts(mini, read_prompts("alternative-32"))
    return Material(load_run(folder / "train"), load_run(folder / "test"), text)


def random_rows(rows: int, dimensions: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, dimensions)).astype(np.float32)


def scipy_entropy(X: Array, text: Array, tau: float) -> float:
    z = cosine_similarity(X.astype(np.float64), text.astype(np.float64))
    return float(entropy(softmax(z / tau, axis=1), axis=1).mean())


# --- the entropy of many temperatures ---


def test_the_taus_are_the_thesis_ones_and_the_sweep_goes_around_them() -> None:
    assert TAUS == (0.5, 0.07, 0.05, 0.03, 0.02)
    assert len(SWEEP) == 25
    assert (SWEEP[0], SWEEP[-1]) == (0.01, 1.0)
    ratios = [above / below for below, above in pairwise(SWEEP)]
    assert ratios == pytest.approx([100 ** (1 / 24)] * 24, rel=1e-3)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 9),
    st.lists(st.floats(1e-3, 10), min_size=1, max_size=6, unique=True),
    st.integers(0, 2**32 - 1),
)
def test_entropies_of_any_blocks_equal_scipy(blocks: list[int], prompts: int, taus: list[float], seed: int) -> None:
    X, text = random_rows(sum(blocks), 6, seed), random_rows(prompts, 6, 7)
    result = entropy_sweep(np.split(X, np.cumsum(blocks)[:-1]), text, taus)
    assert (result["rows"], result["prompts"], result["max_entropy"]) == (len(X), prompts, math.log(prompts))
    for point, tau in zip(result["sweep"], taus, strict=True):
        assert point["tau"] == tau
        # A cosine in float32 is off by 1e-7, its quotient by tau that much more.
        assert point["mean_entropy"] == pytest.approx(scipy_entropy(X, text, tau), abs=max(1e-5, 1e-6 / tau))
    assert result["mean_entropy"] == result["sweep"][taus.index(max(taus))]["mean_entropy"]


def test_the_entropy_falls_with_tau_and_stays_below_log_K(sample: Material) -> None:
    result = entropy_sweep([sample.test.X], sample.text)
    entropies = [point["mean_entropy"] for point in result["sweep"]]
    assert [point["tau"] for point in result["sweep"]] == list(SWEEP)
    assert entropies == sorted(entropies)
    assert 0 < entropies[0] < entropies[-1] < result["max_entropy"] == math.log(32)
    assert entropies == pytest.approx([scipy_entropy(sample.test.X, sample.text, tau) for tau in SWEEP], abs=1e-4)
    assert result["mean_entropy"] == entropies[-1]


def test_the_size_of_the_blocks_changes_nothing(sample: Material) -> None:
    whole = entropy_sweep([sample.test.X], sample.text, [0.1, 0.01])
    parts = entropy_sweep((sample.test.X[start : start + 37] for start in range(0, 1000, 37)), sample.text, [0.1, 0.01])
    for one, other in zip(whole.pop("sweep"), parts.pop("sweep"), strict=True):
        assert other == {"tau": one["tau"], "mean_entropy": pytest.approx(one["mean_entropy"], rel=1e-6)}
    assert parts.pop("mean_entropy") == pytest.approx(whole.pop("mean_entropy"), rel=1e-6)
    assert parts == whole


def test_one_prompt_leaves_nothing_unsure() -> None:
    result = entropy_sweep([random_rows(5, 4, 0)], random_rows(1, 4, 1), [1.0])
    assert (result["mean_entropy"], result["max_entropy"]) == (0, 0)


@pytest.mark.parametrize("taus", [[0.0], [1, -0.1], [math.nan], [math.inf]])
def test_a_tau_that_is_no_temperature_is_refused(taus: list[float]) -> None:
    with pytest.raises(ValueError, match="tau must be a positive number"):
        entropy_sweep([random_rows(5, 4, 0)], random_rows(3, 4, 1), taus)


# --- tau is the SVM's regularisation ---


def test_tau_is_C(sample: Material) -> None:
    """C = 1 on z / tau and C = 1 / tau^2 on z are one problem, and both are what scikit-learn makes of it by hand."""
    result = regularisation(*sample.arrays(), sample.text)
    text = sample.text.astype(np.float64)
    train, test = (cosine_similarity(X.astype(np.float64), text) for X in (sample.train.X, sample.test.X))
    y, test_y = sample.train.y, sample.test.y
    assert [point["tau"] for point in result["points"]] == list(TAUS)
    for point in result["points"]:
        tau = point["tau"]
        assert point["C"] == pytest.approx(1 / tau**2)
        assert point["agreement"] >= 0.999
        scaled = SVC(kernel="linear", C=1.0, random_state=42).fit(train / tau, y).predict(test / tau)
        weighted = SVC(kernel="linear", C=1 / tau**2, random_state=42).fit(train, y).predict(test)
        # A row or two of the 1,000, for ours starts from cosines in float32.
        assert point["accuracy"] == pytest.approx((scaled == test_y).mean(), abs=0.0021)
        assert point["accuracy_with_C"] == pytest.approx((weighted == test_y).mean(), abs=0.0021)
    assert result["agreement"] == min(point["agreement"] for point in result["points"])
    assert result["accuracy"] == result["points"][-1]["accuracy"]
    assert (result["probe"], result["chance"], result["prompts"]) == ("regularisation", 0.1, 32)


def test_a_larger_tau_is_another_svm(sample: Material) -> None:
    """So that agreement says something: without the C, the predictions differ."""
    text = sample.text.astype(np.float64)
    train, test = (cosine_similarity(X.astype(np.float64), text) for X in (sample.train.X, sample.test.X))
    plain, scaled = (
        SVC(kernel="linear", C=1.0, random_state=42).fit(train / tau, sample.train.y).predict(test / tau)
        for tau in (1, 0.02)
    )
    assert (plain == scaled).mean() < 0.999


def test_temperature_is_the_class_agnostic_probe_at_each_tau(sample: Material) -> None:
    taus = [1.0, 0.1]
    result = temperature(*sample.arrays(), sample.text, taus)
    alone = [class_agnostic(*sample.arrays(), sample.text, tau) for tau in taus]
    fields = ("tau", "accuracy", "mean_entropy", "confidence")
    proof = regularisation(*sample.arrays(), sample.text, taus)
    assert result == {
        "probe": "temperature",
        "chance": 0.1,
        "prompts": 32,
        "max_entropy": math.log(32),
        "train_rows": 800,
        "test_rows": 1000,
        "agreement": proof["agreement"],
        "points": [{name: one[name] for name in fields} for one in alone],
        "as_C": proof["points"],
    }
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@pytest.mark.parametrize("probe", [temperature, regularisation])
def test_rows_without_a_label_are_refused(probe: object) -> None:
    assert callable(probe)
    X, text = random_rows(5, 4, 0), random_rows(3, 4, 1)
    y, unknown = np.array([0, 1, 0, 1, 0]), np.array([0, 1, -1, 1, 0])
    for labels in ((y, unknown), (unknown, y)):
        with pytest.raises(ValueError, match="rows without a label cannot be scored: 1 of 5, the first is row 2"):
            probe(X, labels[0], X, labels[1], text)


# --- vocabulary ---


def test_vocabulary_is_the_class_agnostic_probe_on_each_set(sample: Material, mini: Bundle) -> None:
    sets = {name: embed_prompts(mini, read_prompts(name)) for name in ("generic-99", "generic-32")}
    result = vocabulary(*sample.arrays(), sets)
    alone = {name: class_agnostic(*sample.arrays(), text) for name, text in sets.items()}
    assert result == {
        "probe": "vocabulary",
        "chance": 0.1,
        "train_rows": 800,
        "test_rows": 1000,
        "points": [
            {
                "set": name,
                **{field: alone[name][field] for field in ("prompts", "accuracy", "mean_entropy", "max_entropy")},
            }
            for name in ("generic-99", "generic-32")
        ],
    }
    assert [point["prompts"] for point in result["points"]] == [99, 32]
    assert all(point["mean_entropy"] <= point["max_entropy"] for point in result["points"])
