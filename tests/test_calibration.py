"""Calibration: each figure against scikit-learn or a loop written out by hand, and what a fitted tau must satisfy."""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss
from sklearn.metrics.pairwise import cosine_similarity

from probes.calibration import calibrated_zero_shot, calibration, fit_tau


def noisy_logits(rows: int, classes: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Cosine-like logits whose largest is often, not always, that of the label."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, rows)
    return 0.3 * np.eye(classes)[y] + rng.normal(0, 0.2, (rows, classes)), y


def embeddings(rows: int, seed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    rng = np.random.default_rng(seed)
    y, text = rng.integers(0, 4, rows), np.random.default_rng(1).normal(size=(4, 12))
    return text[y] + rng.normal(0, 1.5, (rows, 12)), y, text


@given(st.integers(1, 200), st.integers(2, 12), st.floats(0.03, 10), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_calibration_equals_scikit_learn(rows: int, classes: int, tau: float, bins: int, seed: int) -> None:
    logits, y = noisy_logits(rows, classes, seed)
    result = calibration(logits, y, tau, bins)
    probabilities = softmax(logits / tau, axis=1)
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    assert (result["accuracy"], result["mean_confidence"]) == (correct.mean(), pytest.approx(confidence.mean()))
    assert result["nll"] == pytest.approx(log_loss(y, probabilities, labels=range(classes)))
    accuracies, confidences = calibration_curve(correct, confidence, n_bins=bins)
    for name, expected in ("accuracy", accuracies), ("confidence", confidences):
        assert [part[name] for part in result["reliability"]] == pytest.approx(expected.tolist())
    parts, ece = [], 0.0
    for lower, upper in pairwise(np.linspace(0, 1, bins + 1).tolist()):
        inside = (confidence > lower) & (confidence <= upper)
        if inside.any():
            parts.append((lower, upper, inside.sum()))
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert [(part["lower"], part["upper"], part["rows"]) for part in result["reliability"]] == parts
    assert result["ece"] == pytest.approx(ece)


def test_three_quarters_confident_and_three_quarters_right() -> None:
    logits = np.tile([math.log(3), 0], (4, 1))
    result = calibration(logits, [0, 0, 1, 0], 1.0)
    assert (result["ece"], result["nll"]) == (pytest.approx(0), pytest.approx(math.log(4) - 0.75 * math.log(3)))
    assert calibration(logits, [1, 1, 1, 1], 1.0)["ece"] == pytest.approx(0.75)
    # A probability that underflows still has a likelihood.
    assert calibration([[0.0, 1.0]], [0], 1e-4)["nll"] == pytest.approx(1e4)


@pytest.mark.parametrize("seed", range(5))
def test_no_other_tau_has_a_smaller_nll(seed: int) -> None:
    logits, y = noisy_logits(300, 5, seed)
    tau = fit_tau(logits, y)
    others = [*np.geomspace(1e-4, 1e2, 40), *(tau * np.linspace(0.9, 1.1, 10))]
    assert calibration(logits, y, tau)["nll"] <= min(calibration(logits, y, other)["nll"] for other in others) + 1e-12
    # At the minimum, the expected logit is the label's: the derivative of the NLL by 1 / tau is zero.
    expected = (softmax(logits / tau, axis=1) * logits).sum() / 300
    assert expected == pytest.approx(logits[np.arange(300), y].mean(), abs=1e-6)
    assert fit_tau(7 * logits, y) == pytest.approx(7 * tau, rel=1e-4)


def test_fit_tau_refuses_a_minimum_at_an_end() -> None:
    logits, y = noisy_logits(50, 3, 0)
    with pytest.raises(ValueError, match="label 3, but logits has the columns 0 to 2"):
        fit_tau(np.eye(3)[y], y + 1)
    with pytest.raises(ValueError, match=r"these 50 rows, the NLL still falls at 0.0001: 100.00% are right"):
        fit_tau(np.eye(3)[y], y)
    for useless in (-logits, np.zeros((50, 3))):
        with pytest.raises(ValueError, match="still falls at 100: the logits are no better than chance"):
            fit_tau(useless, y)


def test_calibrated_zero_shot_result() -> None:
    (X, y, text), (test_X, test_y, _) = embeddings(300, 0), embeddings(200, 2)
    result = calibrated_zero_shot(X, y, test_X, test_y, text, tau=0.5)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    before, after = result.pop("before"), result.pop("after")
    z, test_z = cosine_similarity(X, text), cosine_similarity(test_X, text)
    assert result == {
        "probe": "calibration",
        "chance": 0.25,
        "rows": 200,
        "validation_rows": 300,
        "fitted_tau": pytest.approx(fit_tau(z, y), rel=1e-4),
        "accuracy": (test_z.argmax(axis=1) == test_y).mean(),
        "ece": after["ece"],
        "nll": pytest.approx(calibration(test_z, test_y, after["tau"])["nll"], rel=1e-5),
        "own_tau": 0.5,
        "own_ece": before["ece"],
        "own_nll": before["nll"],
    }
    assert (before["tau"], after["tau"], after["accuracy"]) == (0.5, result["fitted_tau"], before["accuracy"])
    assert after["nll"] < before["nll"]


def test_arrays_that_cannot_be_used_are_refused() -> None:
    X, y, text = embeddings(5, 0)
    for logits, labels, tau, bins, message in [
        (np.eye(3), [0, 1, 3], 1, 15, "label 3, but logits has the columns 0 to 2"),
        (np.eye(3), [0, 1, -1], 1, 15, "rows without a label"),
        (np.full((3, 3), np.nan), [0, 1, 2], 1, 15, "logits contains NaN"),
        (np.eye(3), [0, 1, 2], 0, 15, "tau must be a positive number"),
        (np.eye(3), [0, 1, 2], 1, 0, "bins must be at least 1, not 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibration(logits, labels, tau, bins)
    with pytest.raises(ValueError, match="12 dimensions, text embeddings 11"):
        calibrated_zero_shot(X, y, X, y, text[:, 1:])
