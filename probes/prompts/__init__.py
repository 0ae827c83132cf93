"""Prompts: the built-in sets (each *.txt in this folder, one prompt a line), files of one's own, class-name templates.

generic-32 holds the 32 prompts of the thesis "What Do Vision-Language Models Understand? Dissecting CLIP". The others
are our own: generic-99, -205 and -415 begin with those 32, each with all of the one before; alternative-32 shares
nothing with them. They name no class of CIFAR-10 or CIFAR-100, and food-32 no dish of Food-101.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from string import Formatter

from engine.errors import ClipmillError


def prompt_sets() -> dict[str, Path]:
    """The built-in prompt sets: name -> file, in the order of their names."""
    return {path.stem: path for path in sorted(Path(__file__).parent.glob("*.txt"))}


def read_prompts(name_or_file: str) -> list[str]:
    """The prompts of a built-in set, of a UTF-8 text file, or of standard input for "-": one a line, in order.

    Surrounding white space and blank lines are dropped, repeated prompts stay; a built-in name comes before a file of
    that name. Raises ClipmillError where there is no such set or file, it cannot be read, is not UTF-8, or holds no
    prompt.
    """
    source, data = _read(name_or_file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ClipmillError(
            f"{source} is not UTF-8 text (byte {error.start}): save it as UTF-8, one prompt a line"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ClipmillError(f"{source} holds no prompt: it must hold one prompt a line")
    return prompts


def fill_template(template: str, names: Iterable[str]) -> list[str]:
    """One prompt a class name: `{}` becomes the name, `{a}` the name with its indefinite article, `{{` a brace.

    "a photo of {a}" makes "a photo of an airplane". Underscores in names become spaces, except in `{raw}`, the name as
    the dataset has it. Raises ClipmillError where the template holds none of these or any other, and for a blank name.
    """
    parts = _parse(template)
    raw = list(names)
    readable = [name.replace("_", " ").strip() for name in raw]
    if "" in readable:
        raise ClipmillError(f"class name {readable.index('')} is blank: --template has nothing to put in its place")
    forms = {"": readable, "raw": raw}
    if "a" in {field for _, field in parts}:
        forms["a"] = _with_articles(readable)
    return [
        "".join(literal + ("" if field is None else forms[field][i]) for literal, field in parts)
        for i in range(len(readable))
    ]


def _read(name_or_file: str) -> tuple[str, bytes]:
    if name_or_file == "-":
        return "standard input", sys.stdin.buffer.read()
    path = prompt_sets().get(name_or_file, Path(name_or_file))
    try:
        return str(path), path.read_bytes()
    except FileNotFoundError as error:
        sets = ", ".join(prompt_sets())
        raise ClipmillError(
            f"--prompts {name_or_file} is neither a built-in prompt set ({sets}) nor a file with one prompt a line"
        ) from error
    except OSError as error:
        raise ClipmillError(f"--prompts {name_or_file} cannot be read: {error.strerror}") from error


def _parse(template: str) -> list[tuple[str, str | None]]:
    """The template as (text, placeholder after it or None)."""
    mistake = f'--template "{template}" must hold {{}} (the class name), {{a}} (with a or an) or {{raw}}'
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ClipmillError(f"{mistake}: {error}") from error
    if all(field is None for _, field, _, _ in parts):
        raise ClipmillError(mistake)
    for _, field, form, conversion in parts:
        if field not in (None, "", "a", "raw") or form or conversion:
            raise ClipmillError(f"{mistake} and no other placeholder")
    return [(literal, field) for literal, field, _, _ in parts]


def _with_articles(names: list[str]) -> list[str]:
    import inflect  # takes up to 4 s (it instruments its own types), which only this placeholder should cost

    engine = inflect.engine()

    def article(name: str) -> str:
        # inflect reads digits letter by letter ("a 8"), so it is asked about the number's word: "an eight".
        number = re.match(r"\d+", name)
        spoken = str(engine.number_to_words(number[0])) if number else name
        return engine.a(spoken).split()[0]

    return [f"{article(name)} {name}" for name in names]
