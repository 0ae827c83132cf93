"""What the README tells people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import duckdb  # noqa: F401 - the README's lines name these three
import pandas  # noqa: F401
import polars  # noqa: F401
import pytest

import cli
from engine.bundle import Bundle
from engine.datasets import open_dataset
from engine.stream import Settings, extract

README = (Path(cli.__file__).parent / "README.md").read_text()
RUN = "runs/cifar10-sample-test-mini"


def test_commands_parse() -> None:
    lines = re.findall(r"^python cli\.py ([^#\n]+)", README, re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        words = shlex.split(line)
        command: click.Command = cli.main
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        command.make_context("readme", words)


@pytest.mark.parametrize("reader", ["pandas", "polars", "duckdb"])
def test_a_run_is_read_in_one_line(reader: str, mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    extract(mini, open_dataset("cifar10-sample", "test", limit=40), Path(RUN), Settings(provider="cpu"))
    (line,) = re.findall(rf"^{reader}\..+$", README, re.MULTILINE)
    assert RUN in line
    table = eval(line)
    if reader == "duckdb":
        assert sorted(table.fetchall()) == [(label, 4) for label in range(10)]
    else:
        assert list(table["row"]) == list(range(40))
        assert sum(value * value for value in table["embedding"][7]) == pytest.approx(1, abs=1e-5)
