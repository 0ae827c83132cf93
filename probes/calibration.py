"""Calibration: whether zero-shot classification is right as often as its confidence claims, and the tau that mends it.

Source: Guo et al., On Calibration of Modern Neural Networks (2017).
"""

import math

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.utils import check_array

from engine.kernels import Doubles, check_tau, cosine_logits
from probes.common import Result, check_labels, check_text_embeddings

LOWEST_TAU, HIGHEST_TAU = 1e-4, 1e2


def calibration(logits: npt.ArrayLike, y: npt.ArrayLike, tau: float, bins: int = 15) -> Result:
    """Compare the confidence of softmax(logits / tau) with its accuracy: logits (N, K), y (N,) integers below K.

    The prediction of a row is its largest logit (of equal ones, the first), the confidence that logit's probability.
    Returns tau, accuracy, mean_confidence, ece, nll and reliability: for each bin that holds a row, in ascending order,
    its bounds lower < confidence <= upper, its rows, their mean confidence and their accuracy. ece, the expected
    calibration error, is the mean over the rows of |accuracy - confidence| of their bin, the bins being equally wide:
    Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning (2015); Guo et al., equation 3. nll is
    the mean of -log softmax(logits / tau)_y in nats. Raises ValueError where logits is not 2-D or holds a NaN or an
    infinity, for labels that `check_labels` refuses or no column stands for, and where tau or bins is not positive.
    """
    scores, labels = _check(logits, y)
    tau = check_tau(tau)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    log_probabilities: Doubles = log_softmax(scores / tau, axis=1)
    rows, predicted = np.arange(len(labels)), scores.argmax(axis=1)
    confidence, correct = np.exp(log_probabilities[rows, predicted]), predicted == labels
    edges = np.linspace(0, 1, bins + 1)
    bin_of_row = np.searchsorted(edges[1:-1], confidence)
    reliability = [
        {
            "lower": float(edges[b]),
            "upper": float(edges[b + 1]),
            "rows": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(correct[inside].mean()),
        }
        for b in np.unique(bin_of_row)
        for inside in [bin_of_row == b]
    ]
    return {
        "tau": tau,
        "accuracy": float(correct.mean()),
        "mean_confidence": float(confidence.mean()),
        "ece": sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in reliability) / len(labels),
        "nll": -float(log_probabilities[rows, labels].mean()),
        "reliability": reliability,
    }


def fit_tau(logits: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """The tau between 1e-4 and 100 that minimises the NLL of logits (N, K) with labels y (N,): temperature scaling.

    Source: Guo et al., section 4.2. Raises ValueError for what `calibration` refuses, and where the minimum lies at an
    end of the range: at the lower end where every row is right, at the upper end where the logits say nothing of y.
    """
    scores, labels = _check(logits, y)
    rows = np.arange(len(labels))

    def nll(log_tau: float) -> float:
        return -float(log_softmax(scores / math.exp(log_tau), axis=1)[rows, labels].mean())

    # The NLL is convex in 1 / tau, so in log tau it has one minimum, which a bounded search finds.
    best = minimize_scalar(nll, bounds=(math.log(LOWEST_TAU), math.log(HIGHEST_TAU)), method="bounded")
    accuracy = np.mean(scores.argmax(axis=1) == labels)
    for end, cause in (HIGHEST_TAU, "the logits are no better than chance"), (LOWEST_TAU, f"{accuracy:.2%} are right"):
        # Compared by value, for where every row is right, the NLL is zero from some tau down: the search ends anywhere.
        if nll(math.log(end)) <= best.fun:
            raise ValueError(f"no tau is best for these {len(labels)} rows, the NLL still falls at {end:g}: {cause}")
    return math.exp(best.x)


def calibrated_zero_shot(
    validation_X: npt.ArrayLike,
    validation_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
    tau: float = 1.0,
) -> Result:
    """Fit tau on the validation rows, calibrate zero-shot classification of the test rows with it: X (N, D), y (N,).

    text_embeddings (K, D) holds one row a class, in label order; tau is the model's own. Returns probe, chance (1 / K),
    rows, validation_rows, fitted_tau, accuracy (which no tau changes), ece and nll at fitted_tau, own_tau with own_ece
    and own_nll, and the `calibration` of the test rows before (at tau) and after. Raises ValueError as `calibration`,
    `fit_tau` and `cosine_logits` do.
    """
    text = check_text_embeddings(text_embeddings)
    validation_logits, test_logits = cosine_logits(validation_X, text), cosine_logits(test_X, text)
    before = calibration(test_logits, test_y, tau)
    fitted_tau = fit_tau(validation_logits, validation_y)
    after = calibration(test_logits, test_y, fitted_tau)
    return {
        "probe": "calibration",
        "chance": 1 / len(text),
        "rows": len(test_logits),
        "validation_rows": len(validation_logits),
        "fitted_tau": fitted_tau,
        **{name: after[name] for name in ("accuracy", "ece", "nll")},
        **{f"own_{name}": before[name] for name in ("tau", "ece", "nll")},
        "before": before,
        "after": after,
    }


def _check(logits: npt.ArrayLike, y: npt.ArrayLike) -> tuple[Doubles, npt.NDArray[np.int64]]:
    scores: Doubles = check_array(logits, dtype=np.float64, input_name="logits")
    labels = check_labels(scores, y)
    if labels.max() >= scores.shape[1]:
        raise ValueError(f"y holds the label {labels.max()}, but logits has the columns 0 to {scores.shape[1] - 1}")
    return scores, labels
