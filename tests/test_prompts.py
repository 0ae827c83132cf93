"""Prompt sets, prompt files and class-name templates."""

import io
import sys
from pathlib import Path

import pytest

from engine.errors import ClipmillError
from probes.prompts import fill_template, prompt_sets, read_prompts


def test_the_thesis_prompts_are_built_in() -> None:
    prompts = read_prompts("generic-32")
    assert len(prompts) == len(set(prompts)) == 32
    assert prompts[0] == "a photo of an object"
    assert prompts[-1] == "a centered object"
    assert prompt_sets()["generic-32"].read_text(encoding="utf-8").splitlines() == prompts


@pytest.mark.parametrize(
    "data",
    [
        b"a cat\na dog\n",
        b"\n  a cat \n\n\t\na dog",
        b"a cat\r\n\r\na dog\r\n",
        b"\xef\xbb\xbfa cat\na dog",
        b"a cat\ra dog",
    ],
    ids=["plain", "blank lines", "CRLF", "byte order mark", "CR"],
)
def test_a_file_holds_one_prompt_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    (tmp_path / "mine.txt").write_bytes(data)
    assert read_prompts(str(tmp_path / "mine.txt")) == ["a cat", "a dog"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_prompts("-") == ["a cat", "a dog"]


def test_prompts_keep_their_order_their_repeats_and_their_language(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("ein Löwe\n猫\nein Löwe\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "mine.txt")) == ["ein Löwe", "猫", "ein Löwe"]


def test_a_built_in_set_comes_before_a_file_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("generic-32").write_text("a cat\n", encoding="utf-8")
    assert len(read_prompts("generic-32")) == 32
    assert read_prompts("./generic-32") == ["a cat"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "mine.txt holds no prompt: it must hold one prompt a line"),
        (b"\n \r\n\t\n", "mine.txt holds no prompt: it must hold one prompt a line"),
        (b"a caf\xe9\n", "mine.txt is not UTF-8 text (byte 5)"),
        ("a cat".encode("utf-16"), "mine.txt is not UTF-8 text (byte 0)"),
    ],
)
def test_a_file_without_prompts_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "mine.txt").write_bytes(data)
    with pytest.raises(ClipmillError) as error:
        read_prompts(str(tmp_path / "mine.txt"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ClipmillError, match="standard input holds no prompt"):
        read_prompts("-")


def test_neither_a_set_nor_a_file() -> None:
    with pytest.raises(ClipmillError) as error:
        read_prompts("generic-31")
    assert str(error.value) == (
        f"--prompts generic-31 is neither a built-in prompt set ({', '.join(prompt_sets())}) nor a file with one "
        "prompt a line"
    )
    assert next(iter(prompt_sets())) == "alternative-32"


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(ClipmillError, match=r"--prompts .* cannot be read: Is a directory"):
        read_prompts(str(tmp_path))


def test_a_template_takes_each_name_as_it_is() -> None:
    assert fill_template("a photo of a {}", ["airplane", "maple_tree"]) == [
        "a photo of a airplane",
        "a photo of a maple tree",
    ]
    assert fill_template("{}: {{x}}, {}", ["cat"]) == ["cat: {x}, cat"]
    assert fill_template("a photo of a {}", []) == []


def test_a_raw_name_keeps_its_underscores() -> None:
    names = ["airplane", "maple_tree"]
    assert fill_template("a photo of a {raw}", names) == [
        "a photo of a airplane",
        "a photo of a maple_tree",
    ]
    assert fill_template("{raw}: {}, {a}, {{raw}}", names[1:2]) == ["maple_tree: maple tree, a maple tree, {raw}"]


@pytest.mark.parametrize(
    ("name", "filled"),
    [
        ("airplane", "an airplane"),
        ("automobile", "an automobile"),
        ("cat", "a cat"),
        ("aquarium_fish", "an aquarium fish"),
        ("hourglass", "an hourglass"),
        ("unicycle", "a unicycle"),
        ("European hornet", "a European hornet"),
        ("MRI scan", "an MRI scan"),
        ("1", "a 1"),
        ("8", "an 8"),
        ("11", "an 11"),
        ("18-wheeler", "an 18-wheeler"),
        ("747", "a 747"),
    ],
)
def test_a_template_takes_names_with_their_article(name: str, filled: str) -> None:
    assert fill_template("a photo of {a}.", [name]) == [f"a photo of {filled}."]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "a photo",
        "a photo of {{}}",
        "a {b}",
        "a {} {b}",
        "a {0}",
        "a {a!r}",
        "a {:>9}",
        "a {a.x}",
        "a {raw.x}",
        "a {raw!s}",
        "a {",
        "a }",
        "{a} {",
    ],
)
def test_other_placeholders_are_refused(template: str) -> None:
    with pytest.raises(ClipmillError, match="--template"):
        fill_template(template, ["cat"])


def test_a_blank_name_is_refused() -> None:
    with pytest.raises(ClipmillError, match="class name 1 is blank"):
        fill_template("{a}", ["cat", "_"])
