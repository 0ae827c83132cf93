"""The modality gap: every mean against a loop over all pairs."""

import itertools
import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cosine
from sklearn.preprocessing import normalize

from probes.modality import modality_gap

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def embeddings(rows: int, classes: int, dimensions: int, seed: int) -> tuple[Array, Labels, Array]:
    """Images and prompts around two different directions, of any length."""
    rng = np.random.default_rng(seed)
    X = rng.normal(1, 1, (rows, dimensions)) * rng.uniform(0.1, 10, (rows, 1))
    return X, rng.integers(0, classes, rows), rng.normal(-0.5, 1, (classes, dimensions))


@given(st.integers(2, 20), st.integers(2, 6), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_each_figure_is_the_mean_over_its_pairs(rows: int, classes: int, dimensions: int, seed: int) -> None:
    X, y, text = embeddings(rows, classes, dimensions, seed)
    result = modality_gap(X, y, text)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    matched = [1 - cosine(X[i], text[y[i]]) for i in range(rows)]
    unmatched = [1 - cosine(X[i], text[k]) for i in range(rows) for k in range(classes) if k != y[i]]
    images = [1 - cosine(a, b) for a, b in itertools.combinations(X, 2)]
    prompts = [1 - cosine(a, b) for a, b in itertools.combinations(text, 2)]
    assert result == {
        "probe": "modality-gap",
        "gap": pytest.approx(np.linalg.norm(normalize(X).mean(axis=0) - normalize(text).mean(axis=0)), abs=1e-6),
        "matched_cosine": pytest.approx(np.mean(matched), abs=1e-6),
        "unmatched_cosine": pytest.approx(np.mean(unmatched), abs=1e-6),
        "image_cosine": pytest.approx(np.mean(images), abs=1e-6),
        "text_cosine": pytest.approx(np.mean(prompts), abs=1e-6),
        "rows": rows,
        "classes": classes,
    }


def test_images_that_are_their_prompts_have_no_gap() -> None:
    y = np.repeat(np.arange(4), 3)
    result = modality_gap(5 * np.eye(4)[y], y, np.eye(4))
    assert (result["gap"], result["matched_cosine"], result["unmatched_cosine"]) == (0, 1, 0)
    # Of the 66 pairs of images, the 12 of one class are equal and the others orthogonal.
    assert (result["image_cosine"], result["text_cosine"]) == (pytest.approx(12 / 66), 0)


def test_opposite_cones_are_two_apart() -> None:
    result = modality_gap(np.ones((5, 3)), np.array([0, 1, 0, 1, 1]), -np.ones((2, 3)))
    assert result["gap"] == pytest.approx(2)
    assert (result["image_cosine"], result["text_cosine"]) == (pytest.approx(1), pytest.approx(1))
    assert (result["matched_cosine"], result["unmatched_cosine"]) == (pytest.approx(-1), pytest.approx(-1))


def test_a_class_without_an_image_still_counts() -> None:
    X, y, text = embeddings(40, 4, 6, 0)
    assert modality_gap(X[y < 2], y[y < 2], text)["classes"] == 4


def test_arrays_that_cannot_be_used_are_refused() -> None:
    X, y, text = embeddings(10, 3, 6, 0)
    spoiled = np.where(np.arange(10)[:, None] == 3, np.nan, X)
    for bad_X, bad_y, bad_text, message in [
        (X, y + 1, text, "y holds the label 3, but the text embeddings stand for the labels 0 to 2"),
        (X, y - 1, text, "rows without a label"),
        (X, y[:9], text, "inconsistent numbers of samples"),
        (X, y, text[:, 1:], "X has 6 features, but the text embeddings have 5 dimensions"),
        (spoiled, y, text, "Input X contains NaN"),
        (np.where(np.isnan(spoiled), 0, X), y, text, "row 3 of the embeddings is all zeros"),
        (X, 0 * y, text[:1], "two images and two prompts at least, there are 10 and 1"),
        (X[:1], y[:1], text, "two images and two prompts at least, there are 1 and 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            modality_gap(bad_X, bad_y, bad_text)
