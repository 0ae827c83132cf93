"""The thesis study on the embedded model and sample, against the same experiments in PyTorch and scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import thesis_script
from click.testing import CliRunner, Result

import cli
from engine.bundle import Bundle
from probes.study import load_study

ROWS = {  # of the study: the experiment of the script
    "baseline-cifar10": "baseline",
    "zero-shot-cifar10": "zero-shot",
    "class-agnostic": "class-agnostic-32",
    **{f"temperature-{tau:.2f}": f"temperature-{tau}" for tau in thesis_script.TAUS},
    "vocabulary-32": "class-agnostic-32",
    **{f"vocabulary-{count}": f"vocabulary-{count}" for count in (99, 205, 415)},
    **{name: name for name in ("clustering-embeddings", "clustering-32", "clustering-415")},
}
# 0.1 points: one image of the 1,000, for an SVM may turn on the last bit of a feature.
MEASURES = {"accuracy": ("accuracy", 0.001), "purity": ("purity", 0.001)} | {
    "entropy": ("mean_entropy", 1e-4),
    "confidence": ("confidence", 1e-4),
}


@dataclass(frozen=True)
class Studied:
    """A folder to work in, and what the command said and left there."""

    folder: Path
    result: Result

    @property
    def output(self) -> Path:
        return self.folder / "studies" / "thesis-sample-mini"

    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in json.loads(self.result.stdout)["rows"]}


def study() -> Result:
    command = ["study", "thesis", "--profile", "sample", "--only", ",".join(ROWS), "--json"]
    return CliRunner().invoke(cli.main, command, catch_exceptions=False)


@pytest.fixture(scope="module")
def studied(mini: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studied]:
    folder = tmp_path_factory.mktemp("thesis")
    (folder / "models").mkdir()
    (folder / "models" / "mini").symlink_to(mini.path)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        yield Studied(folder, study())


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, float]]:
    return thesis_script.results()


def test_the_script_does_every_row_that_is_compared(reference: dict[str, dict[str, float]]) -> None:
    assert set(ROWS.values()) == set(reference)


@pytest.mark.parametrize(("row", "experiment"), ROWS.items())
def test_a_row_finds_what_the_script_finds(
    studied: Studied, reference: dict[str, dict[str, float]], row: str, experiment: str
) -> None:
    found, expected = studied.rows()[row], reference[experiment]
    assert (found["status"], found["data"]) == ("done", "cifar10-sample")
    for name, value in expected.items():
        measure, tolerance = MEASURES[name]
        assert found["result"][measure] == pytest.approx(value, abs=tolerance + 1e-9), measure


def test_the_command_succeeds_and_prints_results_json(studied: Studied) -> None:
    assert studied.result.exit_code == 0, studied.result.output
    stored = json.loads((studied.output / "results.json").read_text(encoding="utf-8"))
    assert json.loads(studied.result.stdout) == {"output": "studies/thesis-sample-mini", **stored}
    assert [row["id"] for row in stored["rows"]] == [row.id for row in load_study("thesis").rows if row.id in ROWS]
    assert stored["bundle"]["name"] == "mini"


def test_a_line_is_said_for_each_row_and_a_report_is_left(studied: Studied) -> None:
    lines = studied.result.stderr.splitlines()
    for name in ROWS:
        assert len([line for line in lines if f"] {name}: " in line]) == 1
    report = (studied.output / "report.md").read_text(encoding="utf-8")
    for name in ROWS:
        assert f"| {name} | " in report
    plots = {path.name for path in (studied.output / "plots").iterdir()}
    for section in ("baseline", "zero-shot", "class-agnostic", "temperature", "vocabulary", "clustering"):
        assert {f"{section}.png", f"{section}.svg"} <= plots
        assert f"![{section}](plots/{section}.png)" in report


def test_the_runs_are_left_where_extract_would_leave_them(studied: Studied) -> None:
    assert {path.name for path in (studied.folder / "runs").iterdir()} == {
        "cifar10-sample-train-mini",
        "cifar10-sample-test-mini",
    }


def test_the_same_command_again_does_nothing_anew(studied: Studied) -> None:
    def times() -> dict[Path, int]:
        files = [*(studied.output / "rows").iterdir(), *(studied.folder / "runs").rglob("*.*")]
        return {file: file.stat().st_mtime_ns for file in files}

    before = times()
    again = study()
    assert again.exit_code == 0, again.output
    assert times() == before
    assert "extracting" not in again.stderr
    assert json.loads(again.stdout) == json.loads(studied.result.stdout)  # the seconds of each row included
