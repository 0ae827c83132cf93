"""Prompt maps: the built-in ones against the datasets' classes, the direction of a swap, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import normalize

from engine.datasets import open_dataset
from engine.errors import ClipmillError
from probes.fused import FusedCentroidClassifier, fuse
from probes.fused_metrics import check_swap, fused
from probes.prompt_maps import PromptMap, prompt_maps, read_map

DIGITS = [f"digit {digit}" for digit in range(10)]  # MNIST's and scikit-learn's
CIFAR_10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009): the classes of each superclass.
LIVING = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
}
OBJECTS = {
    "food containers": "bottle bowl can cup plate",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}
CIFAR_100 = sorted(name for names in (LIVING | OBJECTS).values() for name in names.split())
CLASSES = {"digits": DIGITS, "cifar10": CIFAR_10, "cifar100": CIFAR_100}


# --- the built-in maps ---


def test_there_is_a_map_for_each_of_the_papers_datasets() -> None:
    assert set(prompt_maps()) == set(CLASSES)
    assert list(open_dataset("digits").class_names) == DIGITS
    assert list(open_dataset("cifar10-sample").class_names) == CIFAR_10
    assert len(CIFAR_100) == len(set(CIFAR_100)) == 100


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_has_a_prompt_of_its_own(name: str) -> None:
    prompts = read_map(name).class_prompts(CLASSES[name])
    assert len(set(prompts)) == len(CLASSES[name])
    assert all(prompt.startswith("This is ") for prompt in prompts)
    for class_name, prompt in zip(CLASSES[name], prompts, strict=True):
        assert prompt.endswith(class_name.replace("_", " "))
    assert set(read_map(name).prompts) == set(CLASSES[name])


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_in_one_of_two_groups(name: str) -> None:
    prompt_map = read_map(name)
    prompts = prompt_map.group_prompts()
    assert len(set(prompts)) == 2
    assert all(prompt.startswith(("This is an ", "This is a ")) for prompt in prompts)
    assert sorted(member for members in prompt_map.groups.values() for member in members) == sorted(CLASSES[name])
    groups = prompt_map.group_of_class(CLASSES[name])
    for class_name, group in zip(CLASSES[name], groups, strict=True):
        assert class_name in prompt_map.groups[prompts[group]]


def test_the_groups_are_the_papers() -> None:
    """Even and odd digits, animals and the rest, living things and objects by whole superclasses."""
    assert read_map("digits").group_of_class(DIGITS) == [0, 1] * 5
    animals = read_map("cifar10").groups["This is an animal"]
    assert sorted(animals) == ["bird", "cat", "deer", "dog", "frog", "horse"]
    groups = read_map("cifar100").groups
    assert list(groups) == ["This is a living thing", "This is an object"]
    for members, superclasses in zip(groups.values(), (LIVING, OBJECTS), strict=True):
        assert sorted(members) == sorted(" ".join(superclasses.values()).split())


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_built_in_swap_is_a_derangement(name: str) -> None:
    swap = read_map(name).swap
    assert sorted(swap) == sorted(swap.values()) == sorted(CLASSES[name])
    assert all(class_name != other for class_name, other in swap.items())
    swapped = read_map(name).swapped(CLASSES[name])
    assert swapped is not None
    assert check_swap(swapped, 10).tolist() == swapped


def test_a_map_without_a_swap_leaves_it_to_the_seed() -> None:
    assert read_map("cifar100").swapped(CIFAR_100) is None


# --- some classes of a map ---


def test_a_run_with_some_of_the_classes_in_another_order() -> None:
    prompt_map = read_map("cifar100")
    names = ["sea", "wolf", "lawn_mower"]
    assert prompt_map.class_prompts(names) == ["This is the sea", "This is a wolf", "This is a lawn mower"]
    assert prompt_map.group_of_class(names) == [1, 0, 1]


# --- the direction of a swap ---

NAMES = ["a", "b", "c", "d"]
SWAP = {"a": "b", "b": "c", "c": "d", "d": "a"}  # a cycle, which its inverse is not
PAIRED = [1, 2, 3, 0]  # the prompt with which each class is trained
TEXT = np.random.default_rng(1).normal(size=(4, 8))


def pure(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows whose four classes lie far apart."""
    random = np.random.default_rng(seed)
    y = np.arange(rows) % 4
    return 3 * np.eye(4, 8)[y] + 0.1 * random.normal(size=(rows, 8)), y


def test_a_swap_is_told_by_prompt_and_read_by_class() -> None:
    swapped = PromptMap("map.toml", {}, {}, SWAP).swapped(NAMES)
    assert swapped == [3, 0, 1, 2]
    assert [NAMES[swapped.index(label)] for label in range(4)] == [SWAP[name] for name in NAMES]


def test_in_training_a_class_gets_the_prompt_that_the_swap_names() -> None:
    X, y = pure(40, 0)
    swapped = PromptMap("map.toml", {}, {}, SWAP).swapped(NAMES)
    classifier = FusedCentroidClassifier(TEXT, prompt_labels=swapped).fit(X, y)
    for label, centroid in zip(classifier.cluster_labels_, classifier.centroids_, strict=True):
        images = normalize(X[y == label])
        text = normalize(TEXT)[PAIRED[label]]
        np.testing.assert_allclose(centroid, ((images + text) / 2).mean(axis=0), atol=1e-6)


def test_the_probe_pairs_a_class_with_the_prompt_that_the_swap_names() -> None:
    (X, y), (test_X, test_y) = pure(40, 0), pure(40, 1)
    swapped = PromptMap("map.toml", {}, {}, SWAP).swapped(NAMES)
    result = fused(X, y, test_X, test_y, TEXT, "swapped", swap=swapped, clusters_per_class=1)
    assert (result["ari"], result["accuracy"]) == (1, 1)
    paired = np.array(PAIRED)
    assert result["silhouette"] == pytest.approx(silhouette_score(fuse(X, TEXT[paired[y]]), y), abs=1e-6)
    assert result["test_silhouette"] == pytest.approx(
        silhouette_score(fuse(test_X, TEXT[paired[test_y]]), test_y), abs=1e-6
    )
    wrong = np.argsort(paired)
    assert result["silhouette"] != pytest.approx(silhouette_score(fuse(X, TEXT[wrong[y]]), y), abs=1e-6)


# --- files of one's own, and what is refused ---

GOOD = """
[prompts]
cat = "This is a cat"
dog = "This is a dog"
car = "This is a car"
[groups]
"This is an animal" = ["cat", "dog"]
"This is an object" = ["car"]
[swap]
cat = "dog"
dog = "car"
car = "cat"
"""


def map_of(content: str, folder: Path) -> PromptMap:
    file = folder / "mine.toml"
    file.write_text(content, encoding="utf-8")
    return read_map(str(file))


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    prompt_map = map_of(GOOD, tmp_path)
    names = ["car", "cat", "dog"]
    assert prompt_map.class_prompts(names) == ["This is a car", "This is a cat", "This is a dog"]
    assert prompt_map.group_prompts() == ["This is an animal", "This is an object"]
    assert prompt_map.group_of_class(names) == [1, 0, 0]
    assert prompt_map.swapped(names) == [2, 0, 1]
    assert map_of("", tmp_path).swapped(names) is None


def message_of(use: Callable[[], object]) -> str:
    with pytest.raises(ClipmillError) as raised:
        use()
    message = str(raised.value)
    assert "\n" not in message
    return message


CLASS_MISTAKES: list[tuple[str, Callable[[PromptMap], object], str]] = [
    (
        "cat = 'This is a cat'",
        lambda prompt_map: prompt_map.class_prompts(["cat", "bird", "cow"]),
        'mine.toml has no prompt for the class "bird": add it under [prompts]',
    ),
    (
        "[groups]\nG = ['cat']\nH = ['dog']",
        lambda prompt_map: prompt_map.group_of_class(["cat", "bird", "dog"]),
        'mine.toml has the class "bird" in no group: see [groups]',
    ),
    (
        "[groups]\nG = ['cat', 'dog']\nH = ['dog']",
        lambda prompt_map: prompt_map.group_of_class(["cat", "dog"]),
        'mine.toml has the class "dog" in several groups: see [groups]',
    ),
    (
        "[groups]\nG = ['cat', 'dog']\nH = ['car']",
        lambda prompt_map: prompt_map.group_of_class(["cat", "dog"]),
        'mine.toml: the group "H" has none of the classes cat, dog',
    ),
    (
        "[prompts]\ncat = 'This is a cat'",
        lambda prompt_map: prompt_map.group_of_class(["cat"]),
        'mine.toml has the class "cat" in no group: see [groups]',
    ),
    *(
        (
            f"[swap]\n{swap}",
            lambda prompt_map: prompt_map.swapped(["cat", "dog", "car"]),
            "mine.toml: [swap] must give each of the classes the prompt of another one, each once",
        )
        for swap in (
            "cat = 'cat'\ndog = 'car'\ncar = 'dog'",  # its own prompt
            "cat = 'dog'\ndog = 'car'\ncar = 'dog'",  # one prompt twice
            "cat = 'dog'\ndog = 'cat'",  # a class without
            "cat = 'dog'\ndog = 'car'\ncar = 'cow'",  # the prompt of a class that the run lacks
        )
    ),
]


@pytest.mark.parametrize(("content", "use", "message"), CLASS_MISTAKES)
def test_a_map_that_does_not_fit_the_classes_says_so_in_a_line_that_names_the_file(
    tmp_path: Path, content: str, use: Callable[[PromptMap], object], message: str
) -> None:
    text = content if content.startswith("[") else f"[prompts]\n{content}"
    prompt_map = map_of(text, tmp_path)
    assert message_of(lambda: use(prompt_map)) == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    "content",
    [
        "[prompts]\ncat = 1",
        "[prompts]\ncat = ['This is a cat']",
        "prompts = 'This is a cat'",
        "[groups]\n'This is an animal' = 'cat'",
        "groups = ['cat']",
        "[swap]\ncat = 1",
        "swap = ['cat']",
        "[[swap]]\ncat = 'dog'",
        "[clases]\ncat = 'This is a cat'",
        "cat = 'This is a cat'",
    ],
)
def test_a_file_with_other_tables_is_refused(tmp_path: Path, content: str) -> None:
    message = message_of(lambda: map_of(content, tmp_path))
    assert message == (
        f"{tmp_path}/mine.toml must hold the tables [prompts] (class = prompt), [groups] (prompt = classes), [swap]"
    )


def test_a_name_that_is_neither_a_map_nor_a_file_says_what_there_is() -> None:
    assert message_of(lambda: read_map("cifar-10")) == (
        "--map cifar-10 is neither a built-in prompt map (cifar10, cifar100, digits) nor a TOML file"
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    start = f"--map {tmp_path}/mine.toml cannot be read: "
    assert message_of(lambda: map_of("cat: This is a cat", tmp_path)).startswith(start)
    assert message_of(lambda: map_of("[prompts]\ncat = 'a'\ncat = 'b'", tmp_path)).startswith(start)
    (tmp_path / "mine.toml").write_bytes(b"[prompts]\ncat = '\xff'")
    assert message_of(lambda: read_map(str(tmp_path / "mine.toml"))).startswith(start)
    assert message_of(lambda: read_map(str(tmp_path))).startswith(f"--map {tmp_path} cannot be read: ")
