"""Prompt maps: TOML files that say which prompt stands for a class, and for a group of classes, in `probe fused`.

    [prompts]           # of each class
    cat = "This is a cat"
    [groups]            # prompt of a group, its classes
    "This is an animal" = ["cat"]
    [swap]              # class, the class whose prompt it gets in training
    cat = "dog"

A map may know more classes than a run has. Those built in lie beside the prompt sets.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ClipmillError

FOLDER = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class PromptMap:
    """A map file; every method takes the class names of a run, in label order."""

    source: str
    prompts: Mapping[str, str]
    groups: Mapping[str, Sequence[str]]
    swap: Mapping[str, str]

    def class_prompts(self, names: Sequence[str]) -> list[str]:
        """One prompt a class; ClipmillError for a class that has none."""
        for name in names:
            if name not in self.prompts:
                raise ClipmillError(f'{self.source} has no prompt for the class "{name}": add it under [prompts]')
        return [self.prompts[name] for name in names]

    def group_prompts(self) -> list[str]:
        return list(self.groups)

    def group_of_class(self, names: Sequence[str]) -> list[int]:
        """The group of each class, by its place; ClipmillError unless each is in one and every group has a member."""
        groups = []
        for name in names:
            places = [place for place, members in enumerate(self.groups.values()) if name in members]
            if len(places) != 1:
                found = "no group" if not places else "several groups"
                raise ClipmillError(f'{self.source} has the class "{name}" in {found}: see [groups]')
            groups += places
        for place, prompt in enumerate(self.groups):
            if place not in groups:
                raise ClipmillError(f'{self.source}: the group "{prompt}" has none of the classes {", ".join(names)}')
        return groups

    def swapped(self, names: Sequence[str]) -> list[int] | None:
        """The class, by its label, that each class's prompt is given to in training; None where the map does not say.

        ClipmillError unless every class gets the prompt of another one, each prompt once.
        """
        if not self.swap:
            return None
        takers = {of: name for name, of in self.swap.items() if name in names}
        if set(takers) != set(names) or any(of == name for of, name in takers.items()):
            raise ClipmillError(
                f"{self.source}: [swap] must give each of the classes the prompt of another one, each once"
            )
        return [names.index(takers[name]) for name in names]


def prompt_maps() -> dict[str, Path]:
    """The built-in maps: name -> file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def read_map(name_or_file: str) -> PromptMap:
    """A built-in map or a file of one's own; ClipmillError where there is none or it is not of the form above."""
    path = prompt_maps().get(name_or_file, Path(name_or_file))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ClipmillError(
            f"--map {name_or_file} is neither a built-in prompt map ({', '.join(prompt_maps())}) nor a TOML file"
        ) from error
    except (OSError, ValueError) as error:
        raise ClipmillError(f"--map {name_or_file} cannot be read: {error}") from error
    tables = {table: content.get(table, {}) for table in ("prompts", "groups", "swap")}
    lists = tables["groups"].values() if isinstance(tables["groups"], dict) else [None]
    if (
        set(content) - set(tables)
        or not all(isinstance(table, dict) for table in tables.values())
        or not all(isinstance(value, str) for table in ("prompts", "swap") for value in tables[table].values())
        or not all(isinstance(value, list) for value in lists)
    ):
        raise ClipmillError(
            f"{path} must hold the tables [prompts] (class = prompt), [groups] (prompt = classes), [swap]"
        )
    return PromptMap(str(path), **tables)
