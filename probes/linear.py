"""The two supervised probes of the thesis: one SVM, on image embeddings or on what generic prompts say of them.

Thesis: "What Do Vision-Language Models Understand? Dissecting CLIP".
"""

import numpy.typing as npt
from sklearn.pipeline import Pipeline, make_pipeline

from engine.kernels import cosine_logits
from probes.classifiers import CLASSIFIERS, classify
from probes.common import Result, entropy_fields
from probes.logits import PromptLogits


def class_agnostic_classifier(text_embeddings: npt.ArrayLike, tau: float = 1.0, classifier: str = "svm") -> Pipeline:
    """The thesis' class-agnostic classifier: `PromptLogits` of text_embeddings (K, D) at tau and a linear SVM.

    No scaler stands between them: tau then sets how strongly the SVM is regularised, see probes/temperature.py.
    classifier: another one of CLASSIFIERS in the SVM's place.
    """
    return make_pipeline(PromptLogits(text_embeddings, tau=tau), CLASSIFIERS[classifier]())


def baseline(train_X: npt.ArrayLike, train_y: npt.ArrayLike, test_X: npt.ArrayLike, test_y: npt.ArrayLike) -> Result:
    """The thesis' baseline on image embeddings: StandardScaler and a linear SVM; arrays and result as `classify`."""
    return classify("baseline", CLASSIFIERS["scaled-svm"](), train_X, train_y, test_X, test_y)


def class_agnostic(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    text_embeddings: npt.ArrayLike,
    tau: float = 1.0,
    classifier: str = "svm",
) -> Result:
    """Fit `class_agnostic_classifier` on the train rows, score it on the test rows; arrays as `classify`.

    Returns the fields of `classify`, and classifier, prompts (K) and those of `entropy_fields` on the test rows. Raises
    ValueError as `classify` and `PromptLogits` do.
    """
    pipeline = class_agnostic_classifier(text_embeddings, tau, classifier)
    result = classify("class-agnostic", pipeline, train_X, train_y, test_X, test_y)
    logits = cosine_logits(test_X, text_embeddings)
    return {**result, "classifier": classifier, "prompts": logits.shape[1], **entropy_fields(logits, tau)}
