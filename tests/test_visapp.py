"""The VISAPP 2025 study: its rows against the paper's Table 1, a real run of the stand-in for MNIST, `probe fused`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import normalize

import cli
from engine.bundle import Bundle
from engine.datasets.subset import Subset, take
from engine.datasets.types import Dataset
from engine.errors import ClipmillError
from probes.embeddings import ImageEmbeddings, load_run
from probes.experiments import MEASURES
from probes.fused_metrics import VIEW_ROWS, Strategy
from probes.prompt_maps import read_map
from probes.study import Source, Tools, load_study, studies
from probes.study import run as run_study

# Table 1: accuracy, silhouette, ARI, NMI.
PUBLISHED = {
    "mnist": {
        "task": (0.8500, 0.1747, 0.7819, 0.8964),
        "image-only": (0.1073, 0.0749, 0.5885, 0.7487),
        "swapped": (0.8667, 0.1551, 0.7560, 0.8912),
        "grouped": (0.7487, 0.1205, 0.9995, 0.9981),
    },
    "cifar10": {
        "task": (0.8792, 0.1390, 0.8591, 0.9277),
        "image-only": (0.0993, 0.0637, 0.5771, 0.7306),
        "swapped": (0.8790, 0.0637, 0.5768, 0.7305),
        "grouped": (0.6232, 0.0915, 0.6523, 0.7138),
    },
    "cifar100-1": {
        "task": (0.702, 0.1496, 0.7815, 0.8976),
        "image-only": (0.144, 0.0345, 0.2042, 0.4480),
        "swapped": (0.7, 0.1333, 0.7815, 0.8976),
        "grouped": (0.52, 0.0928, 0.6749, 0.7327),
    },
    "cifar100-2": {
        "task": (0.888, 0.1164, 0.7417, 0.8892),
        "image-only": (0.069, 0.0563, 0.4169, 0.6735),
        "swapped": (0.867, 0.0998, 0.6803, 0.8640),
        "grouped": (0.746, 0.1619, 0.7306, 0.7506),
    },
    "cifar100-3": {
        "task": (0.674, 0.0929, 0.6644, 0.8583),
        "image-only": (0.1, 0.0412, 0.2190, 0.4508),
        "swapped": (0.735, 0.1105, 0.7487, 0.8884),
        "grouped": (0.504, 0.0793, 0.6338, 0.7150),
    },
    "cifar100-4": {
        "task": (0.796, 0.1278, 0.7944, 0.9022),
        "image-only": (0.064, 0.0631, 0.3835, 0.6122),
        "swapped": (0.795, 0.1354, 0.8006, 0.8985),
        "grouped": (0.506, 0.2377, 0.7192, 0.7443),
    },
    "cifar100-5": {
        "task": (0.634, 0.0819, 0.6528, 0.8332),
        "image-only": (0.133, 0.0540, 0.3174, 0.5394),
        "swapped": (0.722, 0.1167, 0.7729, 0.8976),
        "grouped": (0.537, 0.0978, 0.6697, 0.7306),
    },
}
STRATEGIES = ("task", "image-only", "swapped", "grouped")
SUBSETS = [f"cifar100-{number}" for number in range(1, 6)]
MNIST_ROWS = [f"mnist-{strategy}" for strategy in STRATEGIES]
STUDY = load_study("visapp")
ROWS = {row.id: row for row in STUDY.rows}
MNIST_TRENDS = [trend for trend in STUDY.trends if trend.rows[0] in MNIST_ROWS]


# --- the file ---


def test_every_entry_of_the_papers_table_is_a_row() -> None:
    assert [row.id for row in STUDY.rows] == [f"{data}-{strategy}" for data in PUBLISHED for strategy in STRATEGIES]
    assert len(STUDY.rows) == 28
    for data, strategies in PUBLISHED.items():
        for strategy, figures in strategies.items():
            row = ROWS[f"{data}-{strategy}"]
            assert row.published == dict(zip(("accuracy", "silhouette", "ari", "nmi"), figures, strict=True))
            assert (row.section, row.probe) == (data, "fused")
            assert row.where.startswith("Table 1, ")


def test_every_row_asks_for_its_strategy_and_the_map_of_its_dataset() -> None:
    maps = {"mnist": "digits", "cifar10": "cifar10"} | dict.fromkeys(SUBSETS, "cifar100")
    for data, prompt_map in maps.items():
        for strategy in STRATEGIES:
            assert ROWS[f"{data}-{strategy}"].parameters == {"strategy": strategy, "map": prompt_map}
    assert "class 96 missing" in ROWS["cifar100-5-task"].note


def test_the_choices_of_the_command_line_are_the_studies_and_the_strategies() -> None:
    assert tuple(studies()) == cli.STUDIES
    assert get_args(Strategy) == cli.STRATEGIES
    assert set(cli.STRATEGIES) == set(STRATEGIES)


def drawn_classes(seed: int) -> list[str]:
    """The classes that `extract --dataset cifar100 --classes 10 --class-seed` takes, whose names are in this order."""
    names = tuple(sorted(read_map("cifar100").prompts))
    labels = np.arange(len(names))
    dataset = Dataset("cifar100", "cifar100", "test", names, 100, None, {}, lambda _, __: iter(()), lambda: labels)
    chosen = take(dataset, Subset(classes="10", class_seed=seed)).classes
    assert chosen is not None
    assert list(chosen) == sorted(np.random.default_rng(seed).choice(100, 10, replace=False))
    return [names[label] for label in chosen]


def test_the_subsets_of_cifar_100_are_drawn_with_seeds_0_to_4_and_hold_both_groups() -> None:
    drawn = []
    for seed, subset in enumerate(SUBSETS):
        for strategy in STRATEGIES:
            assert ROWS[f"{subset}-{strategy}"].dataset == Source("cifar100", classes=10, class_seed=seed)
        drawn.append(drawn_classes(seed))
        assert set(read_map("cifar100").group_of_class(drawn[-1])) == {0, 1}
    assert len({tuple(names) for names in drawn}) == 5


def test_mnist_and_cifar_10_have_a_stand_in_and_cifar_100_has_none() -> None:
    sources = {"mnist": ("mnist", Source("digits")), "cifar10": ("cifar10", Source("cifar10-sample"))}
    for data in PUBLISHED:
        name, stand_in = sources.get(data, ("cifar100", None))
        for strategy in STRATEGIES:
            row = ROWS[f"{data}-{strategy}"]
            assert (row.dataset.name, row.stand_in) == (name, stand_in)
            assert row.source("paper") == row.dataset
            assert row.source("sample") == row.stand_in


def test_each_finding_is_true_of_the_published_figures() -> None:
    for data in PUBLISHED:
        of_data = [trend for trend in STUDY.trends if trend.rows[0].startswith(f"{data}-")]
        assert [(trend.measure, list(trend.rows)) for trend in of_data] == [
            ("ari", [f"{data}-task", f"{data}-image-only"]),
            ("accuracy", [f"{data}-task", f"{data}-swapped"]),
            ("accuracy", [f"{data}-task", f"{data}-grouped"]),
        ]
    assert len(STUDY.trends) == 3 * len(PUBLISHED)
    for trend in STUDY.trends:
        values = [ROWS[row].published[trend.measure] for row in trend.rows]
        if trend.within is None:
            assert all(above > below for above, below in pairwise(values)), trend.claim
        else:
            assert max(values) - min(values) <= trend.within, trend.claim


def nothing_to_be_had(source: Source, split: str) -> ImageEmbeddings:
    raise ClipmillError(f"no {source}, {split}")


def without_images(profile: str, output: Path) -> dict[str, dict[str, Any]]:
    """What a study says of its rows where no image is to be had."""
    bundle = {"name": "mini", "fingerprint": "0" * 64, "model": STUDY.model, "precision": "fp32"}
    tools = Tools(nothing_to_be_had, lambda _: np.zeros((0, 4), np.float32), bundle, 0.01)
    found = run_study(STUDY, profile, output, tools, [], lambda _: None)
    return {row["id"]: row for row in found["rows"]}


def test_a_subset_of_cifar_100_is_a_reference_only(tmp_path: Path) -> None:
    """The paper does not name its classes: whatever was found here, there is no difference to be told."""
    sample, paper = (without_images(profile, tmp_path / profile) for profile in ("sample", "paper"))
    for row in STUDY.rows:
        assert paper[row.id]["comparable"] is (row.dataset.name != "cifar100")
        assert sample[row.id]["comparable"] is False
        assert bool(row.reference_only) is (row.dataset.name == "cifar100")
        assert row.reference_only in paper[row.id]["note"]


def test_a_subset_of_cifar_100_has_nothing_to_stand_in_under_the_sample_profile(tmp_path: Path) -> None:
    rows = without_images("sample", tmp_path)
    for seed, subset in enumerate(SUBSETS):
        for strategy in STRATEGIES:
            row = rows[f"{subset}-{strategy}"]
            assert (row["status"], row["data"]) == ("needs", None)
            assert row["needs"].startswith(f"needs cifar100 (10 classes, seed {seed})")


# --- a real run: `study visapp --profile sample --only mnist` on the embedded model ---

COMMAND = ("study", "visapp", "--profile", "sample", "--only", "mnist", "--model", "mini", "--json")
RUNS = ("--train", "runs/digits-train-mini", "--test", "runs/digits-test-mini")


@dataclass(frozen=True)
class Found:
    """A study that was run, and the folder in which it was."""

    workdir: Path
    output: Path
    results: dict[str, Any]
    remarks: str

    def row(self, strategy: str) -> dict[str, Any]:
        return next(row for row in self.results["rows"] if row["id"] == f"mnist-{strategy}")


def run(*arguments: str) -> Result:
    """A command in this process; a traceback is a failure of the test, an error line is not."""
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def fused_of(*arguments: str) -> dict[str, Any]:
    result = run("probe", "fused", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, mini: Bundle) -> Iterator[Found]:
    """The study, run in a folder with the embedded model under models/mini, which stays the current one."""
    workdir = tmp_path_factory.mktemp("visapp")
    (workdir / "models").mkdir()
    (workdir / "models" / "mini").symlink_to(mini.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workdir)
        result = run(*COMMAND)
        assert result.exit_code == 0, result.output
        results = json.loads(result.stdout)
        yield Found(workdir, workdir / results["output"], results, result.stderr)


def test_the_study_runs_all_four_strategies_and_tells_each(found: Found) -> None:
    assert found.results["output"] == "studies/visapp-sample-mini"
    assert [row["id"] for row in found.results["rows"]] == MNIST_ROWS
    for row in found.results["rows"]:
        assert (row["status"], row["data"], row["comparable"]) == ("done", "digits", False)
        assert "digits stands in for mnist" in row["note"]
        assert row["id"] in found.remarks
    assert found.results["bundle"]["name"] == "mini"
    stored = json.loads((found.output / "results.json").read_text())
    assert {"output": found.results["output"], **stored} == found.results


def test_every_metric_is_there_and_is_json(found: Found) -> None:
    json.dumps(found.results, allow_nan=False)
    for row in found.results["rows"]:
        result = row["result"]
        assert set(row["measures"]) == set(MEASURES["fused"])
        for measure in MEASURES["fused"]:
            if measure == "missing_classes":
                continue
            assert isinstance(result[measure], float), (row["id"], measure)
            assert math.isfinite(result[measure])
            assert (-1 if "silhouette" in measure or measure.endswith(("ari", "ami")) else 0) <= result[measure] <= 1
        assert (result["train_rows"], result["test_rows"]) == (1297, 500)
        assert result["clusters_per_class"] in (1, 2, 5)
        assert result["clusters"] == result["clusters_per_class"] * result["classes"]
        assert isinstance(result["missing_classes"], list)
        assert result["classes"] == (2 if row["id"] == "mnist-grouped" else 10)
        assert result["chance"] == 1 / result["classes"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_views_hold_what_the_metrics_are_of(found: Found, strategy: str) -> None:
    result = found.row(strategy)["result"]
    assert result["classes_by_name"] == [f"digit {digit}" for digit in range(10)]
    assert ("swap" in result) is (strategy == "swapped")
    for split, rows in (("train", VIEW_ROWS), ("test", 500)):
        view = result["view"][split]
        assert {len(view[name]) for name in ("x", "y", "label", "assigned")} == {rows}
        assert all(math.isfinite(value) for value in view["x"] + view["y"])
        assert set(view["label"]) == set(range(result["classes"]))
        assert len(set(view["assigned"])) <= result["classes"] - len(result["missing_classes"])
    test = result["view"]["test"]  # all of its rows
    assert np.mean(np.equal(test["label"], test["assigned"])) == pytest.approx(result["accuracy"])
    if result["clusters_per_class"] == 1 and len(set(test["assigned"])) == result["clusters"]:
        assert adjusted_rand_score(test["label"], test["assigned"]) == pytest.approx(result["test_ari"])


def test_what_stands_beside_each_accuracy_is_scikit_learns_and_zero_shots(found: Found) -> None:
    train, test = load_run("runs/digits-train-mini"), load_run("runs/digits-test-mini")
    zero_shot = run("probe", "zero-shot", "--test", "runs/digits-test-mini", "--template", "This is {raw}", "--json")
    for strategy in STRATEGIES:
        labels, test_labels = (train.y % 2, test.y % 2) if strategy == "grouped" else (train.y, test.y)
        nearest = NearestCentroid().fit(normalize(train.X), labels)
        result = found.row(strategy)["result"]
        assert result["nearest_centroid_accuracy"] == nearest.score(normalize(test.X), test_labels)
        if strategy != "grouped":
            assert result["zero_shot_accuracy"] == json.loads(zero_shot.stdout)["accuracy"]


def test_the_plots_are_the_accuracies_and_a_view_of_each_strategy(found: Found) -> None:
    names = ["fused-mnist", *(f"tsne-{row}" for row in MNIST_ROWS)]
    plots = found.output / "plots"
    assert {path.name for path in plots.iterdir()} == {f"{name}{end}" for name in names for end in (".png", ".svg")}
    for name in names:
        with Image.open(plots / f"{name}.png") as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 0  # something is drawn
        assert "</svg>" in (plots / f"{name}.svg").read_text(encoding="utf-8")


def test_the_report_names_each_row_each_plot_and_each_finding(found: Found) -> None:
    report = (found.output / "report.md").read_text(encoding="utf-8")
    for row in found.results["rows"]:
        assert f"| {row['id']} | accuracy | ({row['published']['accuracy']:.4f}) |" in report
        assert f"**{row['id']}** ({row['where']})" in report
        assert f"(plots/tsne-{row['id']}.png)" in report
    assert "(plots/fused-mnist.png)" in report
    for trend in MNIST_TRENDS:
        assert trend.claim in report


def test_each_finding_on_the_rows_that_were_run_is_told_from_their_figures(found: Found) -> None:
    for trend, told in zip(MNIST_TRENDS, found.results["trends"], strict=True):
        assert (told["claim"], told["measure"]) == (trend.claim, trend.measure)
        first, second = (found.row(row.removeprefix("mnist-"))["result"][trend.measure] for row in trend.rows)
        assert told["values"] == [first, second]
        assert told["holds"] is (first > second if trend.within is None else abs(first - second) <= trend.within)


@pytest.mark.parametrize("strategy", ["swapped", "grouped"])
def test_the_study_finds_what_the_probe_finds(found: Found, strategy: str) -> None:
    probe = fused_of("--strategy", strategy, "--map", "digits", *RUNS)
    result = dict(found.row(strategy)["result"])
    assert set(result.pop("view")) == {"train", "test"}
    assert {name: probe[name] for name in result} == result
    assert (
        probe["prompts"][:2]
        == {
            "swapped": ["This is digit 0", "This is digit 1"],
            "grouped": ["This is an even digit", "This is an odd digit"],
        }[strategy]
    )
    assert probe["train"]["run"] == "runs/digits-train-mini"


@pytest.mark.parametrize("strategy", ["task", "swapped"])
def test_where_clusters_are_pure_the_text_cancels_out(found: Found, strategy: str) -> None:
    """(x + t) / 2 - (m + t) / 2 = (x - m) / 2: it is scikit-learn's NearestCentroid, and the prompts say nothing."""
    result = fused_of("--strategy", strategy, "--map", "digits", *RUNS, "--clusters-per-class", "1")
    assert (result["clusters"], result["clusters_per_class"]) == (10, 1)
    if result["ari"] != 1:
        pytest.skip(f"the training clusters are not pure: ARI {result['ari']}")
    train, test = load_run("runs/digits-train-mini"), load_run("runs/digits-test-mini")
    nearest = NearestCentroid().fit(normalize(train.X), train.y).score(normalize(test.X), test.y)
    assert result["accuracy"] == result["nearest_centroid_accuracy"] == nearest


def test_a_row_that_is_run_again_finds_the_same(found: Found) -> None:
    """All but the seconds, t-SNE included; the rows that are there are not run again."""
    (found.output / "rows" / "mnist-task.json").unlink()
    again = run(*COMMAND)
    assert again.exit_code == 0, again.output
    assert (found.output / "rows" / "mnist-task.json").is_file()
    rows = json.loads(again.stdout)["rows"]
    assert [row["seconds"] for row in rows[1:]] == [row["seconds"] for row in found.results["rows"][1:]]
    before = [row | {"seconds": None} for row in found.results["rows"]]
    assert [row | {"seconds": None} for row in rows] == before


# --- what `probe fused` refuses ---


def error_of(*arguments: str) -> str:
    """The one error line of a `probe fused` that must fail, with nothing on stdout."""
    result = run("probe", "fused", *arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("Error: ")
    assert sum(line.startswith("Error: ") for line in lines) == 1, result.stderr
    return lines[-1]


@pytest.fixture(scope="module")
def folders(found: Found) -> dict[str, tuple[str, ...]]:
    """Runs of four images a class: of no class, of one, of two."""
    random = np.random.default_rng(0)
    runs: dict[str, tuple[str, ...]] = {}
    for name, classes in {"flat": ["."], "one": ["cat"], "two": ["cat", "dog"]}.items():
        for class_name in classes:
            photos = found.workdir / name / class_name
            photos.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(photos / f"{number}.png")
        result = run("extract", "--dataset", f"folder:{name}", "--model", "mini")
        assert result.exit_code == 0, result.output
        path = result.stdout.strip()
        runs[name] = ("--train", path, "--test", path)
    return runs


def test_a_map_that_lacks_a_class_is_refused(found: Found) -> None:
    for strategy in ("task", "swapped", "image-only"):
        line = error_of("--strategy", strategy, "--map", "cifar10", *RUNS)
        assert line.endswith('cifar10.toml has no prompt for the class "digit 0": add it under [prompts]')
    line = error_of("--strategy", "grouped", "--map", "cifar10", *RUNS)
    assert line.endswith('cifar10.toml has the class "digit 0" in no group: see [groups]')


def test_a_map_with_a_group_that_the_run_lacks_is_refused(folders: dict[str, tuple[str, ...]]) -> None:
    line = error_of("--strategy", "grouped", "--map", "cifar10", *folders["two"])
    assert line.endswith('cifar10.toml: the group "This is an object" has none of the classes cat, dog')


def test_a_map_that_is_not_there_is_refused(found: Found) -> None:
    line = error_of("--strategy", "task", "--map", "mnist", *RUNS)
    assert line == "Error: --map mnist is neither a built-in prompt map (cifar10, cifar100, digits) nor a TOML file"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_of_one_class_is_refused(folders: dict[str, tuple[str, ...]], strategy: str) -> None:
    line = error_of("--strategy", strategy, "--map", "cifar10", *folders["one"])
    assert line.endswith('has one class only, "cat": there is nothing to tell apart')


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_without_labels_is_refused(folders: dict[str, tuple[str, ...]], strategy: str) -> None:
    assert "no classes" in error_of("--strategy", strategy, "--map", "cifar10", *folders["flat"])


def test_more_clusters_than_points_are_refused(found: Found) -> None:
    line = error_of("--strategy", "task", "--map", "digits", *RUNS, "--clusters-per-class", "130")
    assert line == "Error: probe fused: 1300 clusters need at least as many distinct points, there are 1297"


def test_too_few_images_to_choose_the_clusters_from_are_refused(folders: dict[str, tuple[str, ...]]) -> None:
    line = error_of("--strategy", "task", "--map", "cifar10", *folders["two"])
    assert line.startswith("Error: probe fused: 10 clusters need at least as many distinct points, there are 6")
    assert line.endswith("(in choosing among 1, 2 and 5 clusters a class; say how many to spare that)")


def test_an_unknown_strategy_and_no_clusters_are_usage_errors(found: Found) -> None:
    for wrong in (("--strategy", "tasks"), ("--strategy", "task", "--clusters-per-class", "0")):
        result = run("probe", "fused", *wrong, "--map", "digits", *RUNS)
        assert (result.exit_code, result.stdout) == (2, "")
        assert wrong[-2] in result.stderr
