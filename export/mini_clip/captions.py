"""What the mini CLIP is told: concepts, the classes each is true of, and the sentences that mention them.

Class names alone would teach twenty words. So an image is described by one of many concepts, some true of one class
("a kitten"), some of several ("something man-made", "an even digit"); which classes a concept is true of is kept with
it, and becomes the target of the contrastive loss.
"""

from dataclasses import dataclass
from random import Random

# Class name -> the nouns that mean it. The order is CIFAR-10's own, so a position is a label.
_NOUNS = {
    "airplane": "airplane plane jet aircraft",
    "automobile": "automobile car",
    "bird": "bird",
    "cat": "cat kitten",
    "deer": "deer",
    "dog": "dog puppy",
    "frog": "frog toad",
    "horse": "horse pony",
    "ship": "ship boat",
    "truck": "truck lorry",
}
_ANIMALS = "bird cat deer dog frog horse"
_VEHICLES = "airplane automobile ship truck"
_ATTRIBUTES = {
    "animal": _ANIMALS,
    "living thing": _ANIMALS,
    "creature": _ANIMALS,
    "vehicle": _VEHICLES,
    "machine": _VEHICLES,
    "man-made object": _VEHICLES,
    "something natural": _ANIMALS,
    "something man-made": _VEHICLES,
    "synthetic thing": _VEHICLES,
    "metallic object": _VEHICLES,
    "flying thing": "airplane bird",
    "object with wings": "airplane bird",
    "object with wheels": "automobile truck",
    "road vehicle": "automobile truck",
    "watercraft": "ship",
    "object on the water": "ship",
    "machine used for flying": "airplane",
    "mammal": "cat deer dog horse",
    "mammal with hooves": "deer horse",
    "pet": "cat dog",
    "animal commonly kept as a pet": "cat dog",
    "furry animal": "cat deer dog horse",
    "amphibian": "frog",
    "cold-blooded animal": "frog",
    "farm animal": "horse",
    "wild animal": "bird deer frog",
    "animal living in the forest": "deer bird frog",
    "large object": "airplane ship truck",
    "small animal": "bird cat dog frog",
    "thing in the sky": "airplane bird",
    "object with feathers": "bird",
    "animal with antlers": "deer",
}
_DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_ATTRIBUTES = {
    "even digit": "02468",
    "odd digit": "13579",
    "handwritten digit": "0123456789",
    "digit": "0123456789",
    "small digit": "01234",
    "large digit": "56789",
    "prime digit": "2357",
}

CIFAR10_CLASSES = tuple(_NOUNS)
DIGIT_CLASSES = tuple(f"digit {digit}" for digit in range(10))
CLASSES = CIFAR10_CLASSES + DIGIT_CLASSES
FIRST_DIGIT = len(CIFAR10_CLASSES)

# What an augmentation can do to an image, as a caption names it; images.py holds the effect of each.
STYLES = ("blurry photo", "grayscale image", "noisy image", "close-up photo", "dark photo", "bright photo")

# {thing} has its article, {bare} has none. Only the first group suits "something natural".
_TEMPLATES_FOR_ALL = ("a photo of {thing}", "{thing}", "an image of {thing}", "a picture of {thing}", "this is {thing}")
_TEMPLATES = (
    *_TEMPLATES_FOR_ALL,
    "a low resolution photo of {thing}",
    "a photo of the {bare}",
    "a good photo of {thing}",
)

# Words of everyday prompts beyond the captions: each becomes one token instead of a string of letters.
_EVERYDAY_WORDS = (
    "object photo something indoors outdoors day round rectangular textured smooth surface plastic moves stationary "
    "angle view centered taken during from top low colorful with near water sky grass road tree person people food "
    "fruit flower plant house chair table bed clock phone keyboard bottle cup plate bowl lamp"
)


@dataclass(frozen=True)
class Concept:
    """A phrase, and the labels (positions in CLASSES) of the classes that it is true of."""

    text: str
    labels: frozenset[int]


def with_article(noun: str) -> str:
    """The noun phrase with "a" or "an" by its first letter; "something ..." takes neither."""
    if noun.startswith("something"):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def choose_concept(label: int, rng: Random) -> Concept:
    """A concept true of the class: in 60% of draws one that is true of no other class, else any."""
    only_here = rng.random() < 0.6
    return rng.choice(_DISTINCTIVE[label] if only_here else _TRUE_OF[label])


def caption(concept: Concept, rng: Random) -> str:
    """One sentence that mentions the concept, in a randomly chosen template."""
    templates = _TEMPLATES_FOR_ALL if concept.text.startswith("something") else _TEMPLATES
    return rng.choice(templates).format(thing=with_article(concept.text), bare=concept.text)


def tokenizer_corpus() -> list[str]:
    """The text that the tokenizer learns from: every concept in every template, the styles, everyday words."""
    sentences = [
        template.format(thing=with_article(concept.text), bare=concept.text)
        for concept in CONCEPTS
        for template in _TEMPLATES
    ]
    styles = [with_article(style) for style in STYLES]
    return sentences + styles + 3 * [_EVERYDAY_WORDS]


def _all_concepts() -> tuple[Concept, ...]:
    concepts = [
        Concept(noun, frozenset({label})) for label, nouns in enumerate(_NOUNS.values()) for noun in nouns.split()
    ]
    for text, names in _ATTRIBUTES.items():
        concepts.append(Concept(text, frozenset(CIFAR10_CLASSES.index(name) for name in names.split())))
    for digit, word in enumerate(_DIGIT_WORDS):
        label = frozenset({FIRST_DIGIT + digit})
        concepts += [
            Concept(f"digit {digit}", label),
            Concept(f"digit {word}", label),
            Concept(f"number {digit}", label),
        ]
    for text, digits in _DIGIT_ATTRIBUTES.items():
        concepts.append(Concept(text, frozenset(FIRST_DIGIT + int(digit) for digit in digits)))
    return tuple(concepts)


CONCEPTS = _all_concepts()
_TRUE_OF = [[concept for concept in CONCEPTS if label in concept.labels] for label in range(len(CLASSES))]
_DISTINCTIVE = [[concept for concept in concepts if len(concept.labels) == 1] for concepts in _TRUE_OF]
