"""Vocabulary: what more prompts add to the class-agnostic classifier."""

from collections.abc import Mapping

import numpy.typing as npt

from probes.common import Result
from probes.linear import class_agnostic


def vocabulary(
    train_X: npt.ArrayLike,
    train_y: npt.ArrayLike,
    test_X: npt.ArrayLike,
    test_y: npt.ArrayLike,
    prompt_sets: Mapping[str, npt.ArrayLike],
) -> Result:
    """The class-agnostic SVM on each prompt set, name -> text embeddings (K, D); other arrays as `classify`.

    Returns probe, chance, and points: set, prompts (K), accuracy, mean_entropy (nats, tau = 1) and
    max_entropy (log K), in the order given. Experiment of the thesis "What Do Vision-Language Models Understand?
    Dissecting CLIP", whose sets are nested.
    """
    found = {name: class_agnostic(train_X, train_y, test_X, test_y, text) for name, text in prompt_sets.items()}
    first = next(iter(found.values()))
    kept = ("prompts", "accuracy", "mean_entropy", "max_entropy")
    return {
        "probe": "vocabulary",
        **{name: first[name] for name in ("chance", "train_rows", "test_rows")},
        "points": [{"set": name, **{key: result[key] for key in kept}} for name, result in found.items()],
    }
