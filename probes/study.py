"""A study: every experiment of a paper as a row of studies/<name>.toml, run one by one beside its published value.

What a row needs is extracted or embedded when it comes up, by the two callables that `run` is given; what it found is
written at once to rows/<id>.json of the output folder, so that a crash loses the row in hand, and a row whose
embeddings, prompts and parameters are the same is not run again. results.json gathers them in the end.
"""

from __future__ import annotations

import hashlib
import math
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.errors import ClipmillError
from engine.files import read_json, sha256_json, write_json
from engine.kernels import Floats
from engine.machine import library_versions
from probes.classifiers import SEED
from probes.embeddings import ImageEmbeddings
from probes.experiments import EXPERIMENTS, MEASURES, TEST_ONLY, Material
from probes.prompt_maps import read_map
from probes.prompts import read_prompts

FOLDER = Path(__file__).parent / "studies"
PROFILES = {"sample": "mini", "paper": None}  # the model of each unless told otherwise; None: that of `extract`
LIBRARIES = ("clipmill", "numpy", "scipy", "scikit-learn", "numba")
ABOUT = ("id", "section", "probe", "dataset", "stand_in", "published", "measures", "where", "note", "reference_only")


@dataclass(frozen=True)
class Source:
    """Images of a row: a named dataset, or `classes` of its classes drawn by class_seed, or at `pixels` a side."""

    name: str
    classes: int | None = None
    class_seed: int = 0
    pixels: int | None = None

    def __str__(self) -> str:
        classes = f" ({self.classes} classes, seed {self.class_seed})" if self.classes else ""
        return self.name + classes + (f" at {self.pixels} pixels" if self.pixels else "")


@dataclass(frozen=True)
class Row:
    """One experiment, see studies/thesis.toml; `parameters` are those of its probe."""

    id: str
    section: str
    probe: str
    dataset: Source
    stand_in: Source | None
    published: Mapping[str, float]
    measures: Sequence[str]  # what a table shows of it, in this order
    where: str
    note: str
    reference_only: str  # why nothing can repeat what was published, where that is so
    parameters: Mapping[str, Any]

    def source(self, profile: str) -> Source | None:
        return self.dataset if profile == "paper" else self.stand_in


@dataclass(frozen=True)
class Trend:
    """What the paper finds, as an order of rows: `measure` of each is above that of the next, or near it."""

    claim: str
    measure: str
    rows: Sequence[str]
    sample_rows: Sequence[str] | None = None  # where another order of rows asks the same of the stand-ins
    within: float | None = None  # the values lie within so much of each other, in any order


@dataclass(frozen=True)
class Study:
    """A file of studies/."""

    name: str
    title: str
    model: str  # that it was published with
    published_prompts: Mapping[str, str]  # prompt set -> sha256 of the published one
    rows: Sequence[Row]
    trends: Sequence[Trend]

    def chosen(self, only: Sequence[str]) -> list[Row]:
        """The rows of these ids and sections, all where none is named; ClipmillError for a name that is neither."""
        known = {row.id for row in self.rows} | {row.section for row in self.rows}
        for name in only:
            if name not in known:
                sections = ", ".join(dict.fromkeys(row.section for row in self.rows))
                raise ClipmillError(f"--only {name}: study {self.name} has no such row or section ({sections})")
        return [row for row in self.rows if not only or {row.id, row.section} & set(only)]


@dataclass(frozen=True)
class Tools:
    """What a study works with, and how it asks for embeddings."""

    run: Callable[[Source, str], ImageEmbeddings]  # of a split, "train" or "test"
    embed: Callable[[Sequence[str]], Floats]
    bundle: Mapping[str, Any]  # name, fingerprint, model, precision: told in results.json
    tau: float  # the model's own
    # prompt set -> the file in its place, and its prompts
    prompts: Mapping[str, tuple[str, Sequence[str]]] = field(default_factory=dict)


def studies() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_study(name: str) -> Study:
    """Read studies/<name>.toml."""
    with (FOLDER / f"{name}.toml").open("rb") as file:
        content = tomllib.load(file)
    return Study(
        name,
        content["title"],
        content["model"],
        content["published_prompts"],
        [_row(row) for row in content["row"]],
        [Trend(**trend) for trend in content["trend"]],
    )


def run(
    study: Study, profile: str, output: Path, tools: Tools, only: Sequence[str], said: Callable[[str], None]
) -> dict[str, Any]:
    """Run the rows of `only` (all where it is empty) that are not done; what results.json of `output` then holds.

    A row whose images cannot be had says what it needs, one that its probe refuses that it failed, and why; the others
    go on. `said` hears a line a row.
    """
    rows = study.chosen(only)
    results: list[dict[str, Any]] = []
    for number, row in enumerate(rows, start=1):
        result = _result(study, row, profile, output / "rows" / f"{row.id}.json", tools)
        reason = result.get("reason")
        new = f": {reason}" if reason and all(reason != other.get("reason") for other in results) else ""
        said(f"[{number}/{len(rows)}] {row.id}: {_told(result)}{new}")
        results.append(result)
    by_id = {result["id"]: result for result in results}
    found = {
        "study": study.name,
        "title": study.title,
        "profile": profile,
        "bundle": dict(tools.bundle),
        "versions": library_versions(LIBRARIES),
        "random_state": SEED,  # of all that is drawn, but for classes: their seed is in the name of the data
        "rows": results,
        "trends": [_trend(trend, profile, by_id) for trend in study.trends if not only or set(trend.rows) & set(by_id)],
    }
    write_json(output / "results.json", found)
    return found


def svm_fits(rows: Sequence[Row]) -> int:
    """How many SVMs the rows fit to a training split: what takes longest where that is large."""
    searches = {"svm": 1, "scaled-svm": 1, "chosen-svm": 6, "logistic": 0, "knn": 0, "mlp": 0}
    fits = {"baseline": 1, "regularisation": 10, "redundancy": 19}
    return sum(
        searches[row.parameters.get("classifier", "svm")] if row.probe == "class-agnostic" else fits.get(row.probe, 0)
        for row in rows
    )


def _row(values: dict[str, Any]) -> Row:
    assert values["probe"] in EXPERIMENTS, values["probe"]
    stand_in = values.get("stand_in")
    return Row(
        id=values["id"],
        section=values["section"],
        probe=values["probe"],
        dataset=Source(**values["dataset"]),
        stand_in=Source(**stand_in) if stand_in else None,
        published=values.get("published", {}),
        measures=values.get(
            "measures", list(dict.fromkeys([*MEASURES[values["probe"]], *values.get("published", {})]))
        ),
        where=values.get("where", ""),
        note=values.get("note", ""),
        reference_only=values.get("reference_only", ""),
        parameters={name: value for name, value in values.items() if name not in ABOUT},
    )


def _result(study: Study, row: Row, profile: str, file: Path, tools: Tools) -> dict[str, Any]:
    """What is kept of a row: from its file where that was made of the same things, else anew."""
    source = row.source(profile)
    prompts = _prompts(row, tools)
    about = {
        "id": row.id,
        "section": row.section,
        "probe": row.probe,
        "dataset": str(row.dataset),
        "data": str(source) if source else None,
        "published": dict(row.published),
        "where": row.where or "ours, not published",
        "comparable": profile == "paper"
        and bool(row.published)
        and not row.reference_only
        and Path(tools.bundle["model"]).name == Path(study.model).name
        and _are_published(study, row, prompts),
        "note": " ".join(_notes(study, row, profile, prompts, tools)),
        "measures": list(row.measures),
        "own_prompts": not _are_published(study, row, prompts),
        "parameters": dict(row.parameters),
    }
    if source is None:
        return {**about, "status": "needs", "needs": f"needs {row.dataset}", "reason": "see --profile paper"}
    runs: dict[str, ImageEmbeddings] = {}

    def run_of(split: str) -> ImageEmbeddings:
        if split not in runs:
            runs[split] = tools.run(source, split)
        return runs[split]

    splits = ("test",) if row.probe in TEST_ONLY else ("train", "test")
    try:
        inputs = _digest(row, prompts, tools, {split: run_of(split).digest for split in splits})
    except ClipmillError as error:
        return {**about, "status": "needs", "needs": f"needs {source}", "reason": str(error)}
    kept = read_json(file) if file.is_file() else {}
    if kept.get("inputs") == inputs:
        return {**about, **{name: kept[name] for name in ("status", "result", "seconds", "runs", "inputs")}}
    began = time.perf_counter()
    material = Material(run_of, tools.embed, prompts, row.parameters, tools.tau)
    try:
        found = EXPERIMENTS[row.probe](material)
    except (ClipmillError, ValueError) as error:
        return {**about, "status": "failed", "needs": "failed", "reason": str(error)}
    result = {
        **about,
        "status": "done",
        "result": found,
        "seconds": round(time.perf_counter() - began, 3),
        "runs": {split: str(run.path) for split, run in runs.items()},
        "inputs": inputs,
    }
    write_json(file, result)
    return result


def _prompts(row: Row, tools: Tools) -> list[str]:
    if "prompts" not in row.parameters:
        return []
    name = row.parameters["prompts"]
    return list(tools.prompts[name][1]) if name in tools.prompts else read_prompts(name)


def _are_published(study: Study, row: Row, prompts: Sequence[str]) -> bool:
    """Whether the row has no prompt set, or the one that was published."""
    name = row.parameters.get("prompts")
    return not name or hashlib.sha256("\n".join(prompts).encode()).hexdigest() == study.published_prompts[name]


def _notes(study: Study, row: Row, profile: str, prompts: Sequence[str], tools: Tools) -> list[str]:
    notes = [note for note in (row.note, row.reference_only) if note]
    if not _are_published(study, row, prompts):
        name = row.parameters["prompts"]
        whose, _ = tools.prompts.get(name, (name, []))
        notes.append(f"Own prompts, not the published set ({whose}).")
    if profile == "sample" and row.stand_in:
        notes.append(f"Here {row.stand_in} stands in for {row.dataset}.")
    return notes


def _digest(row: Row, prompts: Sequence[str], tools: Tools, runs: Mapping[str, str]) -> str:
    """sha256 of all that a row's result depends on."""
    versions = library_versions(LIBRARIES)
    things = [row.probe, dict(row.parameters), list(prompts), tools.bundle["fingerprint"], dict(runs), versions]
    if "map" in row.parameters:
        things.append(asdict(read_map(row.parameters["map"])))
    return sha256_json(things)


def _told(result: Mapping[str, Any]) -> str:
    if result["status"] != "done":
        return str(result["needs"])
    values = [
        f"{measure} {shown(result['result'][measure])}"
        + (f" (published {result['published'][measure]:.4f})" if measure in result["published"] else "")
        for measure in result["measures"]
    ]
    return ", ".join(values) + f", {result['seconds']:.1f} s"


def shown(value: float | Sequence[str] | None) -> str:
    """A measure to four digits, or names; "none" where there are none, or it is not defined (a silhouette of one)."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return ", ".join(value) if value else "none"


def _trend(trend: Trend, profile: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = trend.rows if profile == "paper" or trend.sample_rows is None else trend.sample_rows
    told: dict[str, Any] = {"claim": trend.claim, "measure": trend.measure, "rows": list(rows), "holds": None}
    if not rows or any(results.get(row, {}).get("status") != "done" for row in rows):
        return {**told, "values": []}
    values = [float(results[row]["result"][trend.measure]) for row in rows]
    assert not any(math.isnan(value) for value in values)
    if trend.within is not None:
        return {**told, "values": values, "holds": max(values) - min(values) <= trend.within}
    holds = all(above > below for above, below in pairwise(values))
    return {**told, "values": values, "holds": holds}
