"""The classifiers that are put on embeddings or logits: the thesis' linear SVM, and those that it proposes to try.

Where a parameter is chosen, a stratified fifth of the training rows is held out to choose it on, and the classifier is
then fitted on all of them.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from probes.common import Result, check_labels, decision_fields

SEED = 42  # the thesis'


def linear_svm(C: float = 1.0) -> SVC:
    """The thesis' SVM. Cortes and Vapnik, Support-Vector Networks (1995)."""
    return SVC(kernel="linear", C=C, random_state=SEED)


def _chosen(classifier: ClassifierMixin, **grid: list[float]) -> GridSearchCV:
    part = StratifiedShuffleSplit(n_splits=1, test_size=0.2, random_state=SEED)
    return GridSearchCV(classifier, grid, cv=part, error_score="raise")


CLASSIFIERS: Mapping[str, Callable[[], ClassifierMixin]] = {
    "svm": linear_svm,
    "scaled-svm": lambda: make_pipeline(StandardScaler(), linear_svm()),
    "chosen-svm": lambda: _chosen(linear_svm(), C=[1.0, 10.0, 100.0, 1_000.0, 10_000.0]),
    "logistic": lambda: _chosen(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2_000)),
        logisticregression__C=[0.0001, 0.001, 0.01, 0.1],  # more takes minutes on 415 logits, and overfits
    ),
    "knn": lambda: _chosen(KNeighborsClassifier(), n_neighbors=[1, 5, 10, 20, 50]),
    "mlp": lambda: make_pipeline(
        StandardScaler(), MLPClassifier((256,), early_stopping=True, max_iter=200, random_state=SEED)
    ),
}


def svm_seconds(rows: int, features: int = 512) -> float:
    """About how long the linear SVM takes to fit `rows` rows on this machine, in seconds: 2,000 are fitted and scaled.

    Measured on real embeddings of 512 dimensions in 10 classes: 0.8 s for 2,000 rows, 16 for 8,000, 1,370 for 50,000,
    so the time grows with the rows to the power of 2.3.
    """
    random = np.random.default_rng(SEED)
    tried = min(rows, 2_000)
    y = np.arange(tried) % 10
    X = random.normal(size=(10, features))[y] + random.normal(scale=3, size=(tried, features))
    began = time.process_time()  # one thread, whatever else runs
    linear_svm().fit(X, y)
    return float((time.process_time() - began) * (rows / tried) ** 2.3)


def classify(
    probe: str,
    classifier: ClassifierMixin,
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
) -> Result:
    """Fit on the train rows, score on the test rows: X (N, D), y (N,) integers.

    Returns probe, the fields of `decision_fields`, train_rows and test_rows; where a parameter was chosen, also
    `chosen` and `validation`, the accuracy of each candidate on the part held out. Raises ValueError for rows without a
    label and where train_y holds one class only.
    """
    train_labels, test_labels = check_labels(train_X, train_y), check_labels(test_X, test_y)
    if (train_labels == train_labels[0]).all():
        raise ValueError(f"train_y holds one class only, {train_labels[0]}: there is nothing to tell apart")
    classifier.fit(train_X, train_labels)
    return {
        "probe": probe,
        **decision_fields(test_labels, classifier.predict(test_X), classifier.classes_),
        "train_rows": len(train_labels),
        "test_rows": len(test_labels),
        **_choice_fields(classifier[-1] if hasattr(classifier, "steps") else classifier),
    }


def _choice_fields(classifier: Any) -> Result:
    if not isinstance(classifier, GridSearchCV):
        return {}
    tried = classifier.cv_results_
    return {
        "chosen": {name.split("__")[-1]: value for name, value in classifier.best_params_.items()},
        "validation": [
            {**{name.split("__")[-1]: value for name, value in parameters.items()}, "accuracy": float(accuracy)}
            for parameters, accuracy in zip(tried["params"], tried["mean_test_score"], strict=True)
        ],
    }
