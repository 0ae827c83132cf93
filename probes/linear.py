"""The two linear probes of the thesis: one SVM, on image embeddings or on what generic prompts say of them.

Thesis: "What Do Vision-Language Models Understand? Dissecting CLIP". SVM: Cortes and Vapnik, Support-Vector Networks
(1995).
"""

import numpy.typing as npt
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from engine.kernels import cosine_logits
from probes.common import Result, check_labels, entropy_fields
from probes.logits import PromptLogits


def baseline_classifier() -> Pipeline:
    """The thesis' baseline, to be fitted on image embeddings (N, D): StandardScaler and a linear SVM."""
    return make_pipeline(StandardScaler(), _linear_svm())


def class_agnostic_classifier(text_embeddings: npt.ArrayLike, tau: float = 1.0) -> Pipeline:
    """The thesis' class-agnostic classifier: `PromptLogits` of text_embeddings (K, D) at tau and the same linear SVM.

    No scaler stands between them: tau then sets how strongly the SVM is regularised (C on z / tau is C / tau^2 on z).
    """
    return make_pipeline(PromptLogits(text_embeddings, tau=tau), _linear_svm())


def baseline(train_X: npt.ArrayLike, train_y: npt.ArrayLike, test_X: npt.ArrayLike, test_y: npt.ArrayLike) -> Result:
    """Fit `baseline_classifier` on the train rows, score it on the test rows: X (N, D), y (N,) integers.

    Returns probe, accuracy, chance (1 / classes), classes (distinct train labels), train_rows and test_rows. Raises
    ValueError for rows without a label and where train_y holds one class only.
    """
    return _score("baseline", baseline_classifier(), train_X, train_y, test_X, test_y)


def class_agnostic(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
    tau: float = 1.0,
) -> Result:
    """Fit `class_agnostic_classifier` on the train rows, score it on the test rows: X (N, D), y (N,) integers.

    Returns the fields of `baseline`, and prompts (K), tau, mean_entropy (nats, of softmax(z / tau) on the test rows)
    and max_entropy (log K). Raises ValueError as `baseline` and `PromptLogits` do.
    """
    classifier = class_agnostic_classifier(text_embeddings, tau)
    result = _score("class-agnostic", classifier, train_X, train_y, test_X, test_y)
    logits = cosine_logits(test_X, text_embeddings)
    return {**result, "prompts": logits.shape[1], **entropy_fields(logits, tau)}


def _linear_svm() -> SVC:
    return SVC(kernel="linear", C=1.0, random_state=42)


def _score(
    probe: str,
    classifier: Pipeline,
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
) -> Result:
    train_labels, test_labels = check_labels(train_X, train_y), check_labels(test_X, test_y)
    classifier.fit(train_X, train_labels)
    classes = len(classifier.classes_)
    return {
        "probe": probe,
        "accuracy": float(classifier.score(test_X, test_labels)),
        "chance": 1 / classes,
        "classes": classes,
        "train_rows": len(train_labels),
        "test_rows": len(test_labels),
    }
