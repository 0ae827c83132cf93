"""The study runner on made-up embeddings: what is run, what is kept, what is said beside the published values."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest

from engine.datasets.named import NAMED
from engine.errors import ClipmillError
from probes import study as runner
from probes.classifiers import CLASSIFIERS
from probes.embeddings import ImageEmbeddings
from probes.experiments import EXPERIMENTS, MEASURES
from probes.plots import draw
from probes.prompts import fill_template, prompt_sets, read_prompts
from probes.report import HEADER, table_rows, trend_lines, write_report
from probes.study import Source, Study, Tools, Trend, load_study, run, studies, svm_fits

DIMENSIONS = 8
CLASS_NAMES = ("wug", "dax", "zorp")  # words that are in no prompt
FEW = ("baseline-cifar10", "zero-shot-cifar10", "class-agnostic", "temperature-0.50", "clustering-embeddings")

# The thesis' figures: accuracies and purities as fractions, entropies in nats.
PUBLISHED = {
    "baseline-cifar10": {"accuracy": 0.9324},
    "baseline-cifar100": {"accuracy": 0.7801},
    "zero-shot-cifar10": {"accuracy": 0.888},
    "zero-shot-cifar100": {"accuracy": 0.6171},
    "class-agnostic": {"accuracy": 0.2930, "mean_entropy": 3.4656},
    "temperature-0.50": {"accuracy": 0.5062, "mean_entropy": 3.4649},
    "temperature-0.07": {"accuracy": 0.6295, "mean_entropy": 3.4206},
    "temperature-0.03": {"accuracy": 0.6376, "mean_entropy": 3.2099},
    "temperature-0.02": {"accuracy": 0.6345, "mean_entropy": 2.8957},
    "vocabulary-32": {"accuracy": 0.2930, "mean_entropy": 3.4656},
    "vocabulary-99": {"accuracy": 0.4545, "mean_entropy": 4.5950},
    "vocabulary-205": {"accuracy": 0.5459, "mean_entropy": 5.3299},
    "vocabulary-415": {"accuracy": 0.6286, "mean_entropy": 6.0282},
    "resolution-tiny-imagenet": {"accuracy": 0.3562, "mean_entropy": 3.4656},
    "resolution-food101": {"accuracy": 0.4125, "mean_entropy": 3.4656},
    "resolution-food101-food": {"accuracy": 0.6247, "mean_entropy": 3.4654},
    "clustering-embeddings": {"purity": 0.4455},
    "clustering-32": {"purity": 0.2976},
    "clustering-415": {"purity": 0.3321},
}


class Workshop:
    """Embeddings made up by name, in the place of a model and its runs; counts what is asked of it."""

    def __init__(self) -> None:
        self.runs: Counter[tuple[str, str]] = Counter()
        self.embedded = 0
        self.missing: set[str] = set()  # datasets that are not to be had
        self.seed = 0
        model = "openai/clip-vit-base-patch32"  # or no value could be set against a published one
        self.bundle = {"name": "made-up", "fingerprint": "f" * 64, "model": model, "precision": "fp32"}

    def tools(self, prompts: Mapping[str, str] | None = None) -> Tools:
        read = {name: (file, read_prompts(file)) for name, file in (prompts or {}).items()}
        return Tools(self.run, self.embed, dict(self.bundle), 0.05, read)

    def run(self, source: Source, split: str) -> ImageEmbeddings:
        if source.name in self.missing:
            raise ClipmillError(f"{source.name} cannot be downloaded: no network")
        self.runs[str(source), split] += 1
        rng = np.random.default_rng([self.seed, *str(source).encode(), split == "train"])
        y = np.arange(150 if split == "train" else 60) % len(CLASS_NAMES)
        X = directions()[y] + rng.normal(0, 0.9, (len(y), DIMENSIONS))
        X = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32)
        return ImageEmbeddings(
            path=Path("runs", f"{source.name}-{split}"),
            X=X,
            y=y,
            keys=[f"{split}-{row}" for row in range(len(y))],
            class_names=CLASS_NAMES,
            classes=tuple(range(len(CLASS_NAMES))),
            dataset=source.name,
            split=split,
            bundle=self.bundle["fingerprint"],
            bundle_name=self.bundle["name"],
            digest=hashlib.sha256(X.tobytes()).hexdigest(),
        )

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.embedded += 1
        rows = []
        for text in texts:
            row = np.random.default_rng(list(text.encode())).normal(size=DIMENSIONS)
            for name, direction in zip(CLASS_NAMES, directions(), strict=True):
                row = direction + 0.3 * row if name in text else row
            rows.append(row / np.linalg.norm(row))
        return np.array(rows, np.float32)


def directions() -> npt.NDArray[np.float64]:
    return np.random.default_rng(1).normal(size=(len(CLASS_NAMES), DIMENSIONS))


def quiet(line: str) -> None:
    pass


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The probes that ran, in order."""
    ran: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        def probe(material: Any) -> Any:
            ran.append(name)
            return EXPERIMENTS[name](material)

        return probe

    monkeypatch.setattr(runner, "EXPERIMENTS", {name: counted(name) for name in EXPERIMENTS})
    return ran


@pytest.fixture(scope="module")
def thesis() -> Study:
    return load_study("thesis")


@pytest.fixture
def few(thesis: Study) -> Study:
    """Five rows of the thesis, of four probes."""
    rows = {row.id: row for row in thesis.rows}
    return replace(thesis, rows=[rows[name] for name in FEW], trends=[])


@pytest.fixture(scope="module")
def whole(thesis: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """The thesis study, every row of it, on made-up embeddings: its folder, its results, what it said."""
    output = tmp_path_factory.mktemp("studies") / "thesis"
    said: list[str] = []
    return output, run(thesis, "sample", output, Workshop().tools(), [], said.append), said


def statuses(results: Mapping[str, Any]) -> dict[str, str]:
    return {row["id"]: row["status"] for row in results["rows"]}


def row_files(output: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (output / "rows").glob("*.json")}


# --- the file of the thesis ---


def test_the_thesis_is_a_study_and_every_row_has_an_id_of_its_own(thesis: Study) -> None:
    assert "thesis" in studies()
    assert len({row.id for row in thesis.rows}) == len(thesis.rows) >= 30
    assert not {row.id for row in thesis.rows} & {row.section for row in thesis.rows} - {"class-agnostic"}


@pytest.mark.parametrize("name", studies())
def test_every_dataset_of_a_study_exists(name: str) -> None:
    study = load_study(name)
    assert len({row.id for row in study.rows}) == len(study.rows)
    for row in study.rows:
        for source in (row.dataset, row.stand_in):
            assert source is None or source.name in NAMED, row.id


def test_every_prompt_set_template_and_classifier_of_the_thesis_exists(thesis: Study) -> None:
    for row in thesis.rows:
        assert row.parameters.get("prompts", "generic-32") in prompt_sets(), row.id
        assert row.parameters.get("classifier", "svm") in CLASSIFIERS, row.id
        for template in row.parameters.get("templates", []):
            assert fill_template(template, ["maple_tree"]), row.id


def test_every_prompt_set_that_a_row_asks_for_has_a_published_checksum(thesis: Study) -> None:
    asked = {row.parameters["prompts"] for row in thesis.rows if "prompts" in row.parameters}
    assert asked == set(thesis.published_prompts) == set(prompt_sets())
    ours = {name: hashlib.sha256("\n".join(read_prompts(name)).encode()).hexdigest() for name in asked}
    assert [name for name in asked if ours[name] == thesis.published_prompts[name]] == ["generic-32"]


def test_the_published_values_are_those_of_the_thesis(thesis: Study) -> None:
    assert {row.id: row.published for row in thesis.rows if row.published} == PUBLISHED
    for row in thesis.rows:
        assert bool(row.published) == bool(row.where), row.id
    referred = [row for row in thesis.rows if row.reference_only]
    assert {row.section for row in referred} == {"resolution", "clustering"}
    assert all(row.published for row in referred)


def test_the_temperatures_of_the_thesis(thesis: Study) -> None:
    taus = {row.id: row.parameters["tau"] for row in thesis.rows if "tau" in row.parameters}
    assert taus == {f"temperature-{tau:.2f}": tau for tau in (0.5, 0.07, 0.05, 0.03, 0.02)}


def test_every_probe_has_a_measure() -> None:
    assert set(MEASURES) == set(EXPERIMENTS)


def test_every_row_is_done_and_has_its_measures(whole: tuple[Path, dict[str, Any], list[str]], thesis: Study) -> None:
    _, results, _ = whole
    assert statuses(results) == {row.id: "done" for row in thesis.rows}
    for row, result in zip(thesis.rows, results["rows"], strict=True):
        assert set(result["measures"]) >= {*MEASURES[row.probe], *row.published}, row.id
        assert len(set(result["measures"])) == len(result["measures"]), row.id
        for measure in result["measures"]:
            assert isinstance(result["result"][measure], float), (row.id, measure)


def test_every_trend_names_rows_that_have_its_measure(
    whole: tuple[Path, dict[str, Any], list[str]], thesis: Study
) -> None:
    results = {row["id"]: row["result"] for row in whole[1]["rows"]}
    assert len(thesis.trends) >= 4
    for trend in thesis.trends:
        for name in (*trend.rows, *(trend.sample_rows or ())):
            assert trend.measure in results[name], (trend.claim, name)
        assert len(trend.rows) >= 2


def test_entropies_stay_below_log_K_in_every_row(whole: tuple[Path, dict[str, Any], list[str]]) -> None:
    found = [row["result"] for row in whole[1]["rows"] if "mean_entropy" in row["result"]]
    assert len(found) > 10
    for result in found:
        assert result["mean_entropy"] <= result["max_entropy"] + 1e-5


def test_svm_fits_are_counted(thesis: Study) -> None:
    assert svm_fits(thesis.chosen(["baseline"])) == 2
    assert svm_fits(thesis.chosen(["vocabulary"])) == 4
    assert svm_fits(thesis.chosen(["zero-shot", "clustering", "proposed-mlp"])) == 0
    # Each of five candidates on a part, and the best on all.
    assert svm_fits(thesis.chosen(["temperature-chosen-C"])) == 6
    assert svm_fits(thesis.chosen(["temperature-as-C"])) == 10


# --- running ---


def test_results_json_holds_what_run_returns(whole: tuple[Path, dict[str, Any], list[str]], thesis: Study) -> None:
    output, results, _ = whole
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results
    assert (results["study"], results["profile"], results["title"]) == ("thesis", "sample", thesis.title)
    assert results["bundle"] == Workshop().bundle
    assert {"clipmill", "numpy", "scikit-learn"} <= set(results["versions"])
    assert results["random_state"] == 42
    for row in results["rows"]:
        assert json.loads((output / "rows" / f"{row['id']}.json").read_text(encoding="utf-8")) == row


def test_a_line_is_said_for_each_row(whole: tuple[Path, dict[str, Any], list[str]], thesis: Study) -> None:
    _, results, said = whole
    assert [line.split(":")[0] for line in said] == [
        f"[{number}/{len(thesis.rows)}] {row.id}" for number, row in enumerate(thesis.rows, start=1)
    ]
    accuracy = results["rows"][0]["result"]["accuracy"]
    assert f"accuracy {accuracy:.4f} (published 0.9324), " in said[0]


def test_the_file_of_a_row_is_there_as_soon_as_it_is_done(few: Study, workshop: Workshop, tmp_path: Path) -> None:
    seen = []
    run(few, "sample", tmp_path, workshop.tools(), [], lambda _: seen.append(sorted(row_files(tmp_path))))
    assert seen == [sorted(FEW[:count]) for count in range(1, 6)]


def test_a_second_call_runs_nothing(few: Study, workshop: Workshop, probed: list[str], tmp_path: Path) -> None:
    first = run(few, "sample", tmp_path, workshop.tools(), [], quiet)
    assert probed == [row.probe for row in few.rows]
    probed.clear()
    files = row_files(tmp_path)
    assert run(few, "sample", tmp_path, workshop.tools(), [], quiet) == first
    assert probed == []
    assert row_files(tmp_path) == files


@pytest.mark.parametrize("broken", ["run", "embed", "probe"])
def test_a_crash_loses_the_row_in_hand_only(
    few: Study, workshop: Workshop, probed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    calls = Counter[str]()

    def crashing(name: str, call: Callable[..., Any], at: int) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            calls[name] += 1
            if calls[name] == at and broken == name:
                raise MemoryError("no room")
            return call(*arguments)

        return wrapped

    tools = workshop.tools()
    # The runs of a row are asked for twice, its prompts once; rows 2, 3 and 4 have some. Each crash hits row 4.
    tools = replace(tools, run=crashing("run", tools.run, 7), embed=crashing("embed", tools.embed, 3))
    counted = dict(runner.EXPERIMENTS)
    counted["class-agnostic"] = crashing("probe", counted["class-agnostic"], 2)
    with monkeypatch.context() as patched:
        patched.setattr(runner, "EXPERIMENTS", counted)
        with pytest.raises(MemoryError, match="no room"):
            run(few, "sample", tmp_path, tools, [], quiet)
    files = row_files(tmp_path)
    assert sorted(files) == sorted(FEW[:3])
    assert not (tmp_path / "results.json").exists()
    assert [path.name for path in (tmp_path / "rows").iterdir() if path.suffix != ".json"] == []
    probed.clear()
    results = run(few, "sample", tmp_path, workshop.tools(), [], quiet)
    assert probed == ["class-agnostic", "cluster"]
    assert statuses(results) == dict.fromkeys(FEW, "done")
    assert {name: time for name, time in row_files(tmp_path).items() if name in files} == files


def test_other_prompts_run_the_rows_on_them_again(
    few: Study, workshop: Workshop, probed: list[str], tmp_path: Path
) -> None:
    before = run(few, "sample", tmp_path / "study", workshop.tools(), [], quiet)
    probed.clear()
    (tmp_path / "mine.txt").write_text("\n".join(f"thing {number}" for number in range(9)))
    mine = workshop.tools({"generic-32": str(tmp_path / "mine.txt")})
    after = run(few, "sample", tmp_path / "study", mine, [], quiet)
    assert probed == ["class-agnostic"]  # the row on generic-32; that on alternative-32 stays
    changed = [new["id"] for old, new in zip(before["rows"], after["rows"], strict=True) if old != new]
    assert changed == ["class-agnostic"]
    assert after["rows"][2]["result"]["prompts"] == 9
    assert f"Own prompts, not the published set ({tmp_path / 'mine.txt'})." in after["rows"][2]["note"]
    # And the set as it was, again.
    assert run(few, "sample", tmp_path / "study", workshop.tools(), [], quiet)["rows"][2]["result"]["prompts"] == 32


def test_other_parameters_run_their_row_again(
    few: Study, workshop: Workshop, probed: list[str], tmp_path: Path
) -> None:
    run(few, "sample", tmp_path, workshop.tools(), [], quiet)
    probed.clear()
    rows = [
        replace(row, parameters={**row.parameters, "tau": 0.4}) if row.id == "temperature-0.50" else row
        for row in few.rows
    ]
    results = run(replace(few, rows=rows), "sample", tmp_path, workshop.tools(), [], quiet)
    assert probed == ["class-agnostic"]
    assert results["rows"][3]["result"]["tau"] == results["rows"][3]["parameters"]["tau"] == 0.4


@pytest.mark.parametrize("change", ["embeddings", "bundle"])
def test_other_embeddings_run_every_row_again(
    few: Study, workshop: Workshop, probed: list[str], tmp_path: Path, change: str
) -> None:
    run(few, "sample", tmp_path, workshop.tools(), [], quiet)
    probed.clear()
    if change == "embeddings":
        workshop.seed = 1
    else:
        workshop.bundle["fingerprint"] = "0" * 64
    run(few, "sample", tmp_path, workshop.tools(), [], quiet)
    assert probed == [row.probe for row in few.rows]


def test_what_is_only_said_of_a_row_changes_without_running_it(
    few: Study, workshop: Workshop, probed: list[str], tmp_path: Path
) -> None:
    run(few, "sample", tmp_path, workshop.tools(), [], quiet)
    probed.clear()
    rows = [replace(row, note="Corrected.", published={"accuracy": 0.5}, where="table 9") for row in few.rows[:1]]
    (row,) = run(replace(few, rows=rows), "sample", tmp_path, workshop.tools(), [], quiet)["rows"]
    assert probed == []
    assert row["note"].startswith("Corrected.")
    assert (row["published"], row["where"]) == ({"accuracy": 0.5}, "table 9")


def test_a_row_whose_images_cannot_be_had_says_so_and_the_others_go_on(
    thesis: Study, workshop: Workshop, probed: list[str], tmp_path: Path
) -> None:
    workshop.missing = {"digits"}
    said: list[str] = []
    only = ["baseline", "zero-shot-cifar100", "class-agnostic"]
    results = run(thesis, "sample", tmp_path, workshop.tools(), only, said.append)
    assert statuses(results) == {
        "baseline-cifar10": "done",
        "baseline-cifar100": "needs",
        "zero-shot-cifar100": "needs",
        "class-agnostic": "done",
    }
    missing = results["rows"][1]
    assert (missing["needs"], missing["reason"]) == ("needs digits", "digits cannot be downloaded: no network")
    assert "result" not in missing
    assert said[1] == "[2/4] baseline-cifar100: needs digits: digits cannot be downloaded: no network"
    assert said[2].startswith("[3/4] zero-shot-cifar100: needs digits")
    assert sorted(row_files(tmp_path)) == ["baseline-cifar10", "class-agnostic"]
    workshop.missing, probed[:] = set(), []
    results = run(thesis, "sample", tmp_path, workshop.tools(), only, quiet)
    assert probed == ["baseline", "zero-shot"]
    assert set(statuses(results).values()) == {"done"}


def test_a_row_without_a_stand_in_says_what_it_needs(few: Study, workshop: Workshop, tmp_path: Path) -> None:
    rows = [replace(few.rows[0], dataset=Source("tiny-imagenet", classes=100), stand_in=None), few.rows[1]]
    first, second = run(replace(few, rows=rows), "sample", tmp_path, workshop.tools(), [], quiet)["rows"]
    assert (first["status"], first["data"]) == ("needs", None)
    assert (first["needs"], first["reason"]) == ("needs tiny-imagenet (100 classes, seed 0)", "see --profile paper")
    assert second["status"] == "done"
    assert set(workshop.runs) == {("cifar10-sample", "test")}  # zero-shot learns from no image


def test_a_row_that_its_probe_refuses_says_why_and_the_others_go_on(
    few: Study, workshop: Workshop, tmp_path: Path
) -> None:
    def unlabelled(source: Source, split: str) -> ImageEmbeddings:
        found = workshop.run(source, split)
        return replace(found, y=np.where(np.arange(len(found.y)) == 4, -1, found.y))

    tools = replace(workshop.tools(), run=unlabelled)
    rows = run(few, "sample", tmp_path, tools, [], quiet)["rows"]
    assert (rows[0]["id"], rows[0]["status"]) == ("baseline-cifar10", "failed")
    assert rows[0]["reason"].startswith("rows without a label cannot be scored: 1 of")
    assert [line["ours"] for line in table_rows({"rows": rows[:1]})] == ["failed"]
    assert not (tmp_path / "rows" / "baseline-cifar10.json").exists()  # to be tried again
    assert len(rows) == len(few.rows)


def test_a_profile_chooses_the_images(few: Study, workshop: Workshop, tmp_path: Path) -> None:
    sample = run(few, "sample", tmp_path / "sample", workshop.tools(), [], quiet)
    assert {row["data"] for row in sample["rows"]} == {"cifar10-sample"}
    assert "Here cifar10-sample stands in for cifar100." in sample["rows"][2]["note"]
    paper = run(few, "paper", tmp_path / "paper", workshop.tools(), [], quiet)
    assert [row["data"] for row in paper["rows"]] == ["cifar10"] * 2 + ["cifar100"] * 3
    assert not any("stands in" in row["note"] for row in paper["rows"])
    for results in (sample, paper):
        assert [row["dataset"] for row in results["rows"]] == ["cifar10"] * 2 + ["cifar100"] * 3


def test_a_source_says_its_classes_and_pixels() -> None:
    assert str(Source("food101")) == "food101"
    assert str(Source("tiny-imagenet", classes=100)) == "tiny-imagenet (100 classes, seed 0)"
    assert str(Source("cifar100", classes=20, class_seed=3, pixels=8)) == "cifar100 (20 classes, seed 3) at 8 pixels"


# --- what may be set against the published value ---


def test_stand_ins_are_never_comparable(whole: tuple[Path, dict[str, Any], list[str]]) -> None:
    rows = whole[1]["rows"]
    assert not any(row["comparable"] for row in rows)
    assert all(line["difference"] == "" for line in table_rows(whole[1]))


def test_the_papers_images_are_comparable_only_with_the_published_prompts(
    thesis: Study, workshop: Workshop, tmp_path: Path
) -> None:
    only = ["baseline-cifar10", "vocabulary-32", "vocabulary-99", "temperature-0.05"]
    rows = run(thesis, "paper", tmp_path / "ours", workshop.tools(), only, quiet)["rows"]
    comparable = {row["id"]: row["comparable"] for row in rows}
    assert comparable == {
        "baseline-cifar10": True,
        "temperature-0.05": False,  # nothing was published
        "vocabulary-32": True,
        "vocabulary-99": False,
    }
    assert "Own prompts, not the published set (generic-99)." in rows[3]["note"]
    assert "not the published set" not in rows[2]["note"]
    assert [row["own_prompts"] for row in rows] == [False, True, False, True]

    published = tmp_path / "published.txt"
    published.write_text("\n\nthe sky\n the sea \n", encoding="utf-8")
    digest = hashlib.sha256(b"the sky\nthe sea").hexdigest()
    study = replace(thesis, published_prompts={**thesis.published_prompts, "generic-99": digest})
    tools = workshop.tools({"generic-99": str(published)})
    rows = run(study, "paper", tmp_path / "theirs", tools, ["vocabulary-99"], quiet)["rows"]
    assert rows[0]["comparable"]
    assert "not the published set" not in rows[0]["note"]
    (line, _) = table_rows({"rows": rows})
    assert line["published"] == "0.4545"
    assert line["difference"] == f"{rows[0]['result']['accuracy'] - 0.4545:+.4f}"
    # On the stand-in they stay a reference.
    assert not run(study, "sample", tmp_path / "sample", tools, ["vocabulary-99"], quiet)["rows"][0]["comparable"]
    # Nor is another model's value set against theirs.
    mini = replace(tools, bundle={**tools.bundle, "model": "mini"})
    assert not run(study, "paper", tmp_path / "mini", mini, ["vocabulary-99"], quiet)["rows"][0]["comparable"]
    # And other prompts in the place of the published ones do not pass for them.
    other = workshop.tools({"generic-32": str(published)})
    (row,) = run(thesis, "paper", tmp_path / "other", other, ["vocabulary-32"], quiet)["rows"]
    assert not row["comparable"]
    assert f"Own prompts, not the published set ({published})." in row["note"]


def test_what_nothing_can_repeat_is_never_comparable(few: Study, workshop: Workshop, tmp_path: Path) -> None:
    rows = [replace(few.rows[0], reference_only="Its images are lost.")]
    (row,) = run(replace(few, rows=rows), "paper", tmp_path, workshop.tools(), [], quiet)["rows"]
    assert not row["comparable"]
    assert row["note"] == "Its images are lost."
    (line,) = table_rows({"rows": [row]})
    assert (line["published"], line["difference"]) == ("(0.9324)", "")


# --- some of the rows ---


def test_only_takes_rows_and_sections_in_the_order_of_the_study(thesis: Study) -> None:
    assert thesis.chosen([]) == thesis.rows
    chosen = [row.id for row in thesis.chosen(["vocabulary", "baseline-cifar100"])]
    assert chosen == ["baseline-cifar100", "vocabulary-32", "vocabulary-99", "vocabulary-205", "vocabulary-415"]
    assert [row.id for row in thesis.chosen(["vocabulary-32", "vocabulary-32"])] == ["vocabulary-32"]


def test_an_unknown_row_is_refused(thesis: Study, workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(
        ClipmillError, match=r"--only nosuch: study thesis has no such row or section \(baseline, zero-"
    ):
        run(thesis, "sample", tmp_path, workshop.tools(), ["baseline", "nosuch"], quiet)
    assert list(tmp_path.iterdir()) == []


# --- trends ---


def test_trends_hold_or_do_not_or_cannot_be_told(thesis: Study, workshop: Workshop, tmp_path: Path) -> None:
    """The entropy rises with tau whatever the model, so what is to be said is known."""
    trends = [
        Trend("falls", "mean_entropy", ["temperature-0.50", "temperature-0.05", "temperature-0.02"]),
        Trend("rises", "mean_entropy", ["temperature-0.02", "temperature-0.50"]),
        Trend("level", "mean_entropy", ["temperature-0.50", "temperature-0.50"]),
        Trend("not run", "mean_entropy", ["temperature-0.50", "vocabulary-32"]),
        Trend("not asked", "accuracy", ["temperature-0.50", "temperature-0.02"], []),
        Trend(
            "other rows",
            "mean_entropy",
            ["temperature-0.50", "class-agnostic"],
            ["temperature-0.07", "temperature-0.02"],
        ),
        Trend("near", "accuracy", ["temperature-0.02", "temperature-0.50"], within=1.0),
        Trend("far", "mean_entropy", ["temperature-0.02", "temperature-0.50"], within=0.0),
        Trend("elsewhere", "accuracy", ["vocabulary-32", "vocabulary-99"]),
    ]
    rows = ["temperature-0.50", "temperature-0.07", "temperature-0.05", "temperature-0.02"]
    results = run(replace(thesis, trends=trends), "sample", tmp_path, workshop.tools(), rows, quiet)
    found = results["trends"]  # of trends none of whose rows was asked for, nothing is said
    assert [trend["claim"] for trend in found] == [trend.claim for trend in trends[:-1]]
    assert [trend["holds"] for trend in found] == [True, False, False, None, None, True, True, False]
    entropies = {row["id"]: row["result"]["mean_entropy"] for row in results["rows"]}
    assert found[0]["values"] == [entropies[name] for name in trends[0].rows]
    assert found[3]["values"] == found[4]["values"] == []
    assert found[5]["rows"] == ["temperature-0.07", "temperature-0.02"]
    lines = trend_lines(results)
    assert [line.split(":")[0] for line in lines] == [
        "holds", "does not hold", "does not hold", "cannot be told", "cannot be told", "holds", "holds",
        "does not hold",
    ]  # fmt: skip
    assert lines[1] == (
        f"does not hold: rises (mean_entropy: temperature-0.02 {entropies['temperature-0.02']:.4f}, "
        f"temperature-0.50 {entropies['temperature-0.50']:.4f})"
    )
    assert lines[3] == "cannot be told: not run"


def test_in_the_papers_profile_a_trend_asks_of_the_papers_rows(
    thesis: Study, workshop: Workshop, tmp_path: Path
) -> None:
    trend = Trend("falls", "mean_entropy", ["temperature-0.50", "temperature-0.02"], [])
    rows = ["temperature-0.50", "temperature-0.02"]
    results = run(replace(thesis, trends=[trend]), "paper", tmp_path, workshop.tools(), rows, quiet)
    assert results["trends"][0]["holds"] is True


# --- report ---


def result_of(comparable: bool, **changes: Any) -> dict[str, Any]:
    return {
        "id": "row",
        "section": "vocabulary",
        "status": "done",
        "data": "cifar100",
        "measures": ["accuracy", "mean_entropy"],
        "published": {"accuracy": 0.5, "mean_entropy": 3.0},
        "result": {"accuracy": 0.75, "mean_entropy": 2.5, "chance": 0.01, "max_entropy": 3.4657359},
        "comparable": comparable,
        "own_prompts": False,
        "seconds": 12.34,
        **changes,
    }


def test_the_table_gives_a_difference_to_what_repeats_the_paper() -> None:
    first, second = table_rows({"rows": [result_of(True)]})
    assert tuple(first) == HEADER
    assert first == {
        "row": "row",
        "measure": "accuracy",
        "published": "0.5000",
        "ours": "0.7500",
        "difference": "+0.2500",
        "chance": "0.0100",
        "seconds": "12.3",
        "data": "cifar100",
    }
    assert second["difference"] == "-0.5000"
    assert second["chance"] == "3.4657"  # log K: the entropy of a softmax that says nothing
    assert second["seconds"] == ""  # they are the row's
    (line, _) = table_rows({"rows": [result_of(False, own_prompts=True)]})
    assert line["data"] == "cifar100, own prompts"


def test_the_table_brackets_a_value_that_is_a_reference_only() -> None:
    first, second = table_rows({"rows": [result_of(False)]})
    assert (first["published"], first["difference"]) == ("(0.5000)", "")
    assert (second["published"], second["difference"]) == ("(3.0000)", "")


def test_a_measure_that_is_not_defined_is_none() -> None:
    (line,) = table_rows({"rows": [result_of(True, measures=["accuracy"], result={"accuracy": None})]})
    assert (line["published"], line["ours"], line["difference"]) == ("0.5000", "none", "")


def test_the_table_leaves_out_what_there_is_not() -> None:
    unpublished = result_of(False, measures=["accuracy"], published={})
    needing = {"id": "other", "status": "needs", "needs": "needs food101", "data": None}
    lines = list(table_rows({"rows": [unpublished, needing]}))
    assert [line["published"] + line["difference"] for line in lines] == ["", ""]
    assert (lines[1]["row"], lines[1]["ours"]) == ("other", "needs food101")
    assert set(lines[1]) == set(HEADER)


def test_the_report_names_every_row_trend_note_and_plot(
    whole: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    results = json.loads(json.dumps(whole[1]))
    results["rows"][-1] = {
        **{name: results["rows"][-1][name] for name in ("id", "section", "where", "note", "data")},
        "status": "needs",
        "needs": "needs cifar100",
        "reason": "see --profile paper",
    }
    plots = [tmp_path / "plots" / name for name in ("vocabulary.png", "vocabulary.svg")]
    report = write_report(results, plots, tmp_path)
    text = report.read_text(encoding="utf-8")
    assert report == tmp_path / "report.md"
    assert text.startswith(f"# {results['title']}\n")
    for row in results["rows"]:
        assert f"\n| {row['id']} | " in text
        assert row["note"] in text
    for line in trend_lines(results):
        assert f"- {line}" in text
    assert "| needs cifar100 |" in text
    assert "Needs cifar100: see --profile paper." in text
    assert "![vocabulary](plots/vocabulary.png)" in text
    assert "vocabulary.svg" not in text
    assert results["bundle"]["fingerprint"][:12] in text
    best = results["rows"][0]["result"]["best"]
    assert f"**baseline-cifar10** on cifar10-sample: best {', '.join(best)}; worst " in text
    for row in results["rows"][0]["result"]["per_class"]:
        scores = " | ".join(f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
        assert f"| {row['name']} | {scores} | {row['rows']} |" in text
    assert "Chosen on the validation part: C = " in text
    assert set(best) == set(CLASS_NAMES)


# --- plots ---


@pytest.fixture(scope="module")
def plots(whole: tuple[Path, dict[str, Any], list[str]]) -> list[Path]:
    return draw(whole[1], whole[0] / "plots")


def test_every_section_is_drawn_as_png_and_svg(plots: list[Path], thesis: Study) -> None:
    names = {plot.stem for plot in plots}
    assert {row.section for row in thesis.rows} <= names
    assert {"entropy-sweep", "temperature-as-C", "reliability", "redundancy"} <= names
    decided = [row.id for row in thesis.rows if row.section in ("baseline", "zero-shot")]
    assert {f"confusion-{name}" for name in decided} <= names
    assert sorted(plot.name for plot in plots) == sorted(f"{name}.{kind}" for name in names for kind in ("png", "svg"))
    for plot in plots:
        if plot.suffix == ".png":
            assert plot.read_bytes().startswith(b"\x89PNG\r\n")
        else:
            assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert {path.name for path in plots[0].parent.iterdir()} == {plot.name for plot in plots}


def test_the_same_results_draw_the_same_bytes(
    whole: tuple[Path, dict[str, Any], list[str]], plots: list[Path], tmp_path: Path
) -> None:
    results = json.loads((whole[0] / "results.json").read_text(encoding="utf-8"))
    some = {**results, "rows": [row for row in results["rows"] if row["section"] in ("baseline", "temperature")]}
    again = draw(some, tmp_path)
    first = {plot.name: plot.read_bytes() for plot in plots}
    assert len(again) >= 10
    assert {plot.name: plot.read_bytes() for plot in again} == {plot.name: first[plot.name] for plot in again}


def test_what_is_not_done_is_not_drawn(whole: tuple[Path, dict[str, Any], list[str]], tmp_path: Path) -> None:
    undone = [{**row, "status": "needs", "needs": "needs cifar100"} for row in whole[1]["rows"]]
    assert draw({**whole[1], "rows": undone}, tmp_path) == []
    vocabulary = [row for row in whole[1]["rows"] if row["id"] == "vocabulary-99"]
    assert [plot.name for plot in draw({**whole[1], "rows": undone[:3] + vocabulary}, tmp_path)] == [
        "vocabulary.png",
        "vocabulary.svg",
    ]
