"""The prompt sets that we wrote: how many, nested, and free of the names of the classes that they are to tell apart."""

from __future__ import annotations

import re
from collections.abc import Iterable

import inflect
import pytest
from transformers import CLIPTokenizerFast

from export.checkpoint import MINI_CHECKPOINT
from probes.prompts import prompt_sets, read_prompts

COUNTS = {"generic-99": 99, "generic-205": 205, "generic-415": 415, "alternative-32": 32, "food-32": 32}
MINI_CONTEXT = 32  # tokens, start and end included; CLIP itself reads 77

CIFAR_100 = """
apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus, butterfly, camel,
can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile, cup, dinosaur,
dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower, leopard, lion,
lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter, palm tree,
pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket, rose, sea,
seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper, table, tank,
telephone, television, tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf, woman, worm
"""
CIFAR_10 = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
FOOD_101 = """
apple pie, baby back ribs, baklava, beef carpaccio, beef tartare, beet salad, beignets, bibimbap, bread pudding,
breakfast burrito, bruschetta, caesar salad, cannoli, caprese salad, carrot cake, ceviche, cheesecake, cheese plate,
chicken curry, chicken quesadilla, chicken wings, chocolate cake, chocolate mousse, churros, clam chowder,
club sandwich, crab cakes, creme brulee, croque madame, cup cakes, deviled eggs, donuts, dumplings, edamame,
eggs benedict, escargots, falafel, filet mignon, fish and chips, foie gras, french fries, french onion soup,
french toast, fried calamari, fried rice, frozen yogurt, garlic bread, gnocchi, greek salad, grilled cheese sandwich,
grilled salmon, guacamole, gyoza, hamburger, hot and sour soup, hot dog, huevos rancheros, hummus, ice cream, lasagna,
lobster bisque, lobster roll sandwich, macaroni and cheese, macarons, miso soup, mussels, nachos, omelette,
onion rings, oysters, pad thai, paella, pancakes, panna cotta, peking duck, pho, pizza, pork chop, poutine, prime rib,
pulled pork sandwich, ramen, ravioli, red velvet cake, risotto, samosa, sashimi, scallops, seaweed salad,
shrimp and grits, spaghetti bolognese, spaghetti carbonara, spring rolls, steak, strawberry shortcake, sushi, tacos,
takoyaki, tiramisu, tuna tartare, waffles
"""


def names(table: str) -> list[str]:
    return [" ".join(name.split()) for name in table.split(",")]


def spaced(text: str) -> str:
    """The words of a text, each between spaces; a hyphenated compound is one word."""
    return " " + " ".join(re.findall(r"[a-z0-9'-]+", text.lower())) + " "


def named(prompts: Iterable[str], forbidden: Iterable[str]) -> list[str]:
    """The prompts that hold one of the forbidden words or phrases."""
    return [prompt for prompt in prompts if any(f" {name} " in spaced(prompt) for name in forbidden)]


def with_other_number(engine: inflect.engine, words: Iterable[str]) -> set[str]:
    """Each name, its plural and, for a name that is a plural already, its singular."""
    forms = set(words)
    return forms | {engine.plural(word) for word in forms} | {engine.singular_noun(word) or word for word in forms}


def added(name: str) -> list[str]:
    """The prompts of a set that we wrote: all but the thesis' own 32 at the front of the generic sets."""
    return read_prompts(name)[32 if name.startswith("generic") else 0 :]


@pytest.fixture(scope="module")
def engine() -> inflect.engine:
    return inflect.engine()


@pytest.fixture(scope="module")
def class_names(engine: inflect.engine) -> set[str]:
    """What no prompt of ours may say: the classes of CIFAR-100 and CIFAR-10 and what a two-word one is a kind of."""
    classes = names(CIFAR_100) + names(CIFAR_10)
    return with_other_number(engine, classes + [name.split()[-1] for name in classes])


def test_the_tables_are_whole() -> None:
    assert [len(set(names(table))) for table in (CIFAR_100, CIFAR_10, FOOD_101)] == [100, 10, 101]


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_a_set_holds_as_many_distinct_prompts_as_it_says(name: str, count: int) -> None:
    data = prompt_sets()[name].read_bytes()
    lines = data.decode("utf-8").split("\n")
    assert lines.pop() == ""  # a newline ends the last line
    assert lines == [line.strip() for line in lines] == read_prompts(name)
    assert len(lines) == len({spaced(line) for line in lines}) == count


def test_the_generic_sets_are_nested() -> None:
    small, *larger = (read_prompts(f"generic-{count}") for count in (32, 99, 205, 415))
    for large in larger:
        assert large[: len(small)] == small
        small = large


def test_the_alternative_set_shares_no_prompt_with_the_generic_ones() -> None:
    assert not set(read_prompts("alternative-32")) & set(read_prompts("generic-415"))


@pytest.mark.parametrize("name", COUNTS)
def test_prompts_are_short_lower_case_and_take_the_right_article(name: str, engine: inflect.engine) -> None:
    for prompt in added(name):
        assert re.fullmatch(r"[a-z0-9' ,-]+", prompt), prompt
        assert 3 <= len(prompt.split()) <= 12, prompt
        for article, word in re.findall(r"\b(an?) ([\w'-]+)", prompt):
            assert engine.a(word) == f"{article} {word}", prompt


@pytest.mark.parametrize("name", COUNTS)
def test_no_prompt_is_longer_than_the_smallest_context(name: str) -> None:
    tokens = CLIPTokenizerFast.from_pretrained(MINI_CHECKPOINT)(read_prompts(name))["input_ids"]
    assert max(map(len, tokens)) <= MINI_CONTEXT


@pytest.mark.parametrize("name", COUNTS)
def test_no_prompt_names_a_class(name: str, class_names: set[str]) -> None:
    assert named(added(name), class_names) == []


def test_no_food_prompt_names_a_dish(engine: inflect.engine) -> None:
    assert named(read_prompts("food-32"), with_other_number(engine, names(FOOD_101))) == []


def test_the_check_tells_a_class_name_from_a_compound(engine: inflect.engine, class_names: set[str]) -> None:
    told = ["two roses", "an orange", "the aquarium fish", "Wolves, at night", "three men", "maple trees", "mice"]
    assert (
        named([*told, "a rose-coloured wall", "a scandal", "something plainer", "a treeless slope"], class_names)
        == told
    )
    dishes = with_other_number(engine, names(FOOD_101))
    assert named(["a donut", "two pizzas", "hot dogs", "a hot day"], dishes) == ["a donut", "two pizzas", "hot dogs"]
