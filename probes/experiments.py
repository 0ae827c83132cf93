"""A row of a study to the probe that it asks for: what it needs is fetched, what the probe found comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.kernels import Floats, cosine_logits
from probes.calibration import calibrated_zero_shot
from probes.clustering import cluster
from probes.common import Result, name_classes
from probes.embeddings import ImageEmbeddings
from probes.fused_metrics import fused
from probes.linear import baseline, class_agnostic
from probes.modality import modality_gap
from probes.prompt_maps import read_map
from probes.prompts import fill_template
from probes.redundancy import redundancy
from probes.temperature import entropy_sweep, regularisation
from probes.zero_shot import ensemble, zero_shot


@dataclass(frozen=True)
class Material:
    """What an experiment may ask for; nothing is extracted or embedded before it does."""

    run: Callable[[str], ImageEmbeddings]  # of "train" or "test"
    embed: Callable[[Sequence[str]], Floats]  # prompts to embeddings (K, D)
    prompts: Sequence[str]  # of the row, empty where it has none
    parameters: Mapping[str, Any]
    tau: float  # the model's own, 1 / exp(logit_scale)

    def train_and_test(self) -> tuple[Any, Any, Any, Any]:
        train, test = self.run("train"), self.run("test")
        return train.X, train.y, test.X, test.y

    def prompt_embeddings(self) -> Floats:
        return self.embed(self.prompts)

    def class_embeddings(self) -> Floats:
        test = self.run("test")
        names = test.decided()
        templates: list[str] = self.parameters["templates"]
        return ensemble([self.embed(fill_template(template, names)) for template in templates])


def _baseline(material: Material) -> Result:
    return name_classes(baseline(*material.train_and_test()), material.run("test").class_names)


def _zero_shot(material: Material) -> Result:
    test = material.run("test")
    found = zero_shot(test.X, test.positions(), material.class_embeddings())
    return name_classes(found, test.decided())


def _class_agnostic(material: Material) -> Result:
    options = {name: value for name, value in material.parameters.items() if name in ("tau", "classifier")}
    found = class_agnostic(*material.train_and_test(), material.prompt_embeddings(), **options)
    return name_classes(found, material.run("test").class_names)


def _cluster(material: Material) -> Result:
    test = material.run("test")
    return cluster(cosine_logits(test.X, material.prompt_embeddings()) if material.prompts else test.X, test.y)


def _entropy_sweep(material: Material) -> Result:
    return entropy_sweep([material.run("test").X], material.prompt_embeddings())


def _regularisation(material: Material) -> Result:
    return regularisation(*material.train_and_test(), material.prompt_embeddings())


def _calibration(material: Material) -> Result:
    train, test = material.run("train"), material.run("test")
    classes = material.class_embeddings()
    return calibrated_zero_shot(train.X, train.positions(), test.X, test.positions(), classes, material.tau)


def _redundancy(material: Material) -> Result:
    found = redundancy(*material.train_and_test(), material.prompt_embeddings())
    return {**found, "first": [material.prompts[index] for index in found["first"]]}


def _modality_gap(material: Material) -> Result:
    test = material.run("test")
    return modality_gap(test.X, test.positions(), material.class_embeddings())


def _fused(material: Material) -> Result:
    test, strategy = material.run("test"), material.parameters["strategy"]
    names = test.decided()
    prompt_map = read_map(material.parameters["map"])
    prompts = prompt_map.group_prompts() if strategy == "grouped" else prompt_map.class_prompts(names)
    train = material.run("train")
    found = fused(
        train.X,
        train.positions(),
        test.X,
        test.positions(),
        material.embed(prompts),
        strategy,
        groups=prompt_map.group_of_class(names) if strategy == "grouped" else None,
        swap=prompt_map.swapped(names) if strategy == "swapped" else None,
        view=True,
    )
    return {
        **found,
        "missing_classes": [(prompts if strategy == "grouped" else names)[i] for i in found["missing_classes"]],
    }


EXPERIMENTS: Mapping[str, Callable[[Material], Result]] = {
    "baseline": _baseline,
    "zero-shot": _zero_shot,
    "class-agnostic": _class_agnostic,
    "cluster": _cluster,
    "entropy-sweep": _entropy_sweep,
    "regularisation": _regularisation,
    "calibration": _calibration,
    "redundancy": _redundancy,
    "modality-gap": _modality_gap,
    "fused": _fused,
}
TEST_ONLY = ("zero-shot", "cluster", "entropy-sweep", "modality-gap")  # these learn from no image
MEASURES: Mapping[str, Sequence[str]] = {  # what a table shows of each, besides what was published
    **dict.fromkeys(("baseline", "zero-shot", "class-agnostic"), ("accuracy",)),
    "cluster": ("purity",),
    "entropy-sweep": ("mean_entropy",),
    "regularisation": ("agreement",),
    "calibration": ("ece",),
    "redundancy": ("effective_rank",),
    "modality-gap": ("gap",),
    "fused": (
        *("accuracy", "nearest_centroid_accuracy", "zero_shot_accuracy", "missing_classes"),
        *("silhouette", "ari", "nmi", "ami", "test_silhouette", "test_ari", "test_nmi", "test_ami"),
    ),
}
