"""Temperature: what tau does to the entropy of the prompts, and what it does to an SVM on logits / tau.

The thesis "What Do Vision-Language Models Understand? Dissecting CLIP" fits a linear SVM on z / tau and finds that a
small tau helps. A linear SVM with C on z / tau minimises |w|^2 / 2 + C sum hinge(w z / tau); with w = tau v this is
tau^2 (|v|^2 / 2 + (C / tau^2) sum hinge(v z)): the SVM with C / tau^2 on z. So what tau changes is how strongly the
SVM is regularised. `regularisation` shows it.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from engine.kernels import cosine_logits, prompt_entropies
from probes.classifiers import linear_svm
from probes.common import Result, check_labels
from probes.linear import class_agnostic

TAUS = (0.5, 0.07, 0.05, 0.03, 0.02)  # the thesis'
SWEEP = tuple(float(f"{tau:.4g}") for tau in np.geomspace(0.01, 1, 25))


def entropy_sweep(
    embeddings: Iterable[npt.ArrayLike], text_embeddings: npt.ArrayLike, taus: Sequence[float] = SWEEP
) -> Result:
    """The mean entropy in nats of softmax(z / tau) over all rows of the blocks (n, D), for many taus in one pass.

    Only one block and its logits stand in memory at a time. Returns probe, rows, prompts (K), max_entropy (log K),
    mean_entropy (of the largest tau), and sweep: tau and mean_entropy of each. Raises ValueError where there is no row.
    """
    rows, sums = 0, np.zeros(len(taus))
    for entropies in prompt_entropies(embeddings, text_embeddings, taus):
        rows, sums = rows + len(entropies), sums + entropies.sum(axis=0)
    if rows == 0:
        raise ValueError("there is no embedding to take entropies of")
    means = sums / rows
    return {
        "probe": "entropy-sweep",
        "rows": rows,
        "prompts": len(np.asarray(text_embeddings)),
        "max_entropy": math.log(len(np.asarray(text_embeddings))),
        "mean_entropy": float(means[np.argmax(taus)]),
        "sweep": [{"tau": float(tau), "mean_entropy": float(mean)} for tau, mean in zip(taus, means, strict=True)],
    }


def temperature(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
    taus: Sequence[float] = TAUS,
) -> Result:
    """The class-agnostic SVM at each tau; arrays as `classify`.

    Returns probe, chance, prompts, points (of `class_agnostic` at each tau: tau, accuracy, mean_entropy, confidence),
    and of `regularisation` agreement and its points as `as_C`. No accuracy stands alone: to take the best would be to
    choose tau on the test rows.
    """
    found = [class_agnostic(train_X, train_y, test_X, test_y, text_embeddings, tau) for tau in taus]
    proof = regularisation(train_X, train_y, test_X, test_y, text_embeddings, taus)
    return {
        "probe": "temperature",
        **{name: found[0][name] for name in ("chance", "prompts", "max_entropy", "train_rows", "test_rows")},
        "agreement": proof["agreement"],
        "points": [
            {name: result[name] for name in ("tau", "accuracy", "mean_entropy", "confidence")} for result in found
        ],
        "as_C": proof["points"],
    }


def regularisation(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
    taus: Sequence[float] = TAUS,
) -> Result:
    """The SVM with C = 1 on z / tau beside the one with C = 1 / tau^2 on z, for each tau: arrays as `classify`.

    Returns probe, agreement (the smallest share of test rows that both put into the same class), accuracy (of the last
    tau), prompts, and points: tau, C (1 / tau^2), accuracy, accuracy_with_C and agreement.
    """
    train_labels, test_labels = check_labels(train_X, train_y), check_labels(test_X, test_y)
    # In float64, so that z / tau and C / tau^2 are rounded to nothing that could tell the two problems apart.
    train, test = (cosine_logits(X, text_embeddings).astype(np.float64) for X in (train_X, test_X))
    points = []
    for tau in taus:
        scaled = linear_svm().fit(train / tau, train_labels).predict(test / tau)
        weighted = linear_svm(C=1 / tau**2).fit(train, train_labels).predict(test)
        points.append(
            {
                "tau": float(tau),
                "C": 1 / tau**2,
                "accuracy": float((scaled == test_labels).mean()),
                "accuracy_with_C": float((weighted == test_labels).mean()),
                "agreement": float((scaled == weighted).mean()),
            }
        )
    return {
        "probe": "regularisation",
        "agreement": min(point["agreement"] for point in points),
        "accuracy": points[-1]["accuracy"],
        "chance": 1 / len(np.unique(train_labels)),
        "prompts": train.shape[1],
        "points": points,
    }
