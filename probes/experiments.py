"""A row of a study to the probe that it asks for: what it needs is fetched, what the probe found comes back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ClipmillError
from engine.kernels import Floats, cosine_logits
from probes.calibration import calibrated_zero_shot
from probes.clustering import cluster
from probes.common import Result, name_classes
from probes.embeddings import ImageEmbeddings
from probes.fused import derangement
from probes.fused_metrics import Strategy, fused
from probes.linear import baseline, class_agnostic
from probes.modality import modality_gap
from probes.prompt_maps import PromptMap, read_map
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
    prompt_map = read_map(material.parameters["map"])
    strategy = material.parameters["strategy"]
    return fused_runs(material.run("train"), material.run("test"), prompt_map, strategy, material.embed, view=True)


def fused_runs(
    train: ImageEmbeddings,
    test: ImageEmbeddings,
    prompt_map: PromptMap,
    strategy: Strategy,
    embed: Callable[[Sequence[str]], Floats],
    *,
    clusters_per_class: int | None = None,
    view: bool = False,
) -> Result:
    """`fused` of two runs with the prompts, groups and swap of a map; ClipmillError for classes that do not fit it.

    Adds prompts (of the classes or groups, in order), classes_by_name and, for "swapped", swap (the class that each
    prompt is given to); missing_classes are names.
    """
    names = test.decided()
    if len(names) < 2:
        raise ClipmillError(f'the run at {test.path} has one class only, "{names[0]}": there is nothing to tell apart')
    grouped = strategy == "grouped"
    prompts = prompt_map.group_prompts() if grouped else prompt_map.class_prompts(names)
    swap = None
    if strategy == "swapped":
        swap = prompt_map.swapped(names) or derangement(len(names)).tolist()
    found = fused(
        train.X,
        train.positions(),
        test.X,
        test.positions(),
        embed(prompts),
        strategy,
        groups=prompt_map.group_of_class(names) if grouped else None,
        swap=swap,
        clusters_per_class=clusters_per_class,
        view=view,
    )
    labels = prompts if grouped else names
    return {
        **found,
        "missing_classes": [labels[index] for index in found["missing_classes"]],
        "prompts": prompts,
        "classes_by_name": names,
        **({"swap": [names[label] for label in swap]} if swap else {}),
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
    "cluster": ("purity", "ari", "nmi"),
    "entropy-sweep": ("mean_entropy",),
    "regularisation": ("agreement",),
    "calibration": ("own_ece", "ece", "own_nll", "nll", "fitted_tau"),
    "redundancy": ("accuracy", "effective_rank", "centred_effective_rank", "effective_rank_of_logits"),
    "modality-gap": ("gap", "matched_cosine", "unmatched_cosine", "image_cosine", "text_cosine"),
    "fused": (
        *("accuracy", "nearest_centroid_accuracy", "zero_shot_accuracy", "majority_accuracy", "missing_classes"),
        *("silhouette", "ari", "nmi", "ami", "test_silhouette", "test_ari", "test_nmi", "test_ami"),
    ),
}
