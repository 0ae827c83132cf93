"""The command line: what each command prints and leaves, and what a mistake says and exits with."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import cli
from engine.bundle import Bundle
from probes.embeddings import ImageEmbeddings, load_run

ROOT = Path(cli.__file__).parent
HEAVY = {
    "numpy", "pyarrow", "onnxruntime", "onnx", "numba", "sklearn", "scipy", "PIL", "tokenizers",
    "torch", "torchvision", "transformers", "optimum", "inflect", "matplotlib",
}  # fmt: skip
TRAIN, TEST = "runs/digits-train-mini", "runs/digits-test-mini"


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: Bundle) -> Path:
    """An empty current directory with the embedded model under models/mini."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mini").symlink_to(mini.path)
    return tmp_path


@pytest.fixture(scope="module")
def digit_runs(mini: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole of digits, extracted by other settings than a study's own."""
    folder = tmp_path_factory.mktemp("digits")
    for split in ("train", "test"):
        command = ["extract", "--dataset", "digits", "--split", split, "--model", str(mini.path)]
        result = run(*command, "--batch-size", "5", "--dtype", "float16", "--output", f"{folder}/digits-{split}-mini")
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def digits(workdir: Path, digit_runs: Path) -> tuple[ImageEmbeddings, ImageEmbeddings]:
    """The runs of digits under runs/, where they are not to be changed."""
    (workdir / "runs").mkdir()
    for path in digit_runs.iterdir():
        (workdir / "runs" / path.name).symlink_to(path)
    return load_run(TRAIN), load_run(TEST)


def run(*arguments: str, stdin: str | None = None) -> Result:
    """A command in this process; a traceback is a failure of the test, an error line is not."""
    result = CliRunner().invoke(cli.main, arguments, input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def error_of(*arguments: str, code: int = 1) -> str:
    """The one error line of a command that must fail, with nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == lines[0]
    return lines[0]


def commands() -> Iterator[tuple[str, click.Command]]:
    for name, command in cli.main.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            for child, sub_command in command.commands.items():
                yield f"{name} {child}", sub_command


@pytest.mark.parametrize(("name", "command"), [pytest.param(*item, id=item[0]) for item in commands()])
def test_every_command_has_help_and_an_example_that_parses(name: str, command: click.Command) -> None:
    result = run(*name.split(), "--help")
    assert result.exit_code == 0
    assert command.get_short_help_str()
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.name} has no help"
    in_one_line = re.sub(r"\\\n\s*", "", command.help or "")  # a command may go on behind a backslash
    examples = re.findall(r"python cli\.py (.+)", in_one_line)
    assert examples
    for example in examples:
        words = shlex.split(example)
        group: click.Command = cli.main
        while isinstance(group, click.Group) and words:
            group = group.commands[words.pop(0)]
        group.make_context("example", words)  # raises for an option or a value that does not exist


@pytest.mark.parametrize(
    "arguments", [["--help"], ["extract", "--help"], ["probe", "zero-shot", "--help"], ["--version"]]
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, cli\n"
        f"try: cli.main({arguments})\n"
        "except SystemExit: pass\n"
        "print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    loaded = set(output.rpartition("LOADED")[2].split())
    assert "click" in loaded
    assert not loaded & HEAVY


def test_the_main_job_by_hand(workdir: Path) -> None:
    """export's bundle, extract, embed-text, the four probes, in the order of the README."""
    for split in ("train", "test"):
        result = run("extract", "--dataset", "digits", "--split", split, "--model", "mini", "--limit", "300")
        assert result.exit_code == 0, result.output
        assert result.stdout == f"runs/digits-{split}-mini\n"
        assert "300 embeddings, 0 rejects" in result.stderr
    result = run("embed-text", "--prompts", "generic-32", "--model", "mini")
    assert result.stdout == "runs/text-generic-32-mini.parquet\n"
    assert pq.read_table(result.stdout.strip()).num_rows == 32

    runs = ["--train", "runs/digits-train-mini", "--test", "runs/digits-test-mini"]
    zero_shot = json.loads(run("probe", "zero-shot", *runs[2:], "--json").stdout)
    assert zero_shot["accuracy"] > 0.9
    assert zero_shot["class_prompts"][3] == "a photo of a digit 3"
    baseline = json.loads(run("probe", "baseline", *runs, "--json").stdout)
    assert baseline["accuracy"] > 0.9
    table = run("probe", "class-agnostic", *runs, "--prompts", "runs/text-generic-32-mini.parquet", "--json")
    embedded = run("probe", "class-agnostic", *runs, "--output", "result.json", "--json")
    assert json.loads(table.stdout)["accuracy"] == json.loads(embedded.stdout)["accuracy"] > 0.9
    assert json.loads(embedded.stdout) == json.loads(Path("result.json").read_text())
    cluster = run("probe", "cluster", *runs[2:])
    assert re.search(r"^purity +0\.\d{4}$", cluster.stdout, re.MULTILINE)


def found_by(name: str, *arguments: str) -> dict[str, Any]:
    """What `probe NAME` prints as JSON, of the runs of digits."""
    result = run("probe", name, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def assert_holds(printed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: printed[name] for name in expected} == json.loads(json.dumps(expected))


def test_the_probes_of_prompts_print_what_their_functions_find(
    digits: tuple[ImageEmbeddings, ImageEmbeddings], mini: Bundle
) -> None:
    from engine.kernels import cosine_logits
    from engine.text import embed_prompts
    from probes.clustering import cluster
    from probes.linear import class_agnostic
    from probes.prompts import read_prompts
    from probes.redundancy import redundancy
    from probes.temperature import TAUS, entropy_sweep, temperature
    from probes.vocabulary import vocabulary

    train, test = digits
    arrays = (train.X, train.y, test.X, test.y)
    both = ["--train", TRAIN, "--test", TEST]
    prompts = read_prompts("generic-32")
    generic, food, alternative = (
        embed_prompts(mini, read_prompts(name)) for name in ("generic-32", "food-32", "alternative-32")
    )

    printed = found_by("temperature", *both, "--taus", "1,0.1", "--prompts", "generic-32")
    assert_holds(printed, temperature(*arrays, generic, [1.0, 0.1]))
    assert printed["agreement"] >= 0.99
    printed = found_by("temperature", "--test", TEST)
    assert_holds(printed, entropy_sweep([test.X], alternative, TAUS) | {"prompt_set": "alternative-32"})
    assert [point["tau"] for point in printed["sweep"]] == list(TAUS)
    assert "accuracy" not in printed

    printed = found_by("vocabulary", *both, "--prompts", "food-32", "--prompts", "generic-32")
    assert_holds(printed, vocabulary(*arrays, {"food-32": food, "generic-32": generic}))

    expected = redundancy(*arrays, generic)
    expected["first"] = [prompts[index] for index in expected["first"]]
    assert_holds(found_by("redundancy", *both, "--prompts", "generic-32"), expected)

    printed = found_by("cluster", "--test", TEST, "--prompts", "generic-32")
    assert_holds(printed, cluster(cosine_logits(test.X, generic), test.y) | {"features": "logits of generic-32"})
    printed = found_by("cluster", "--test", TEST)
    assert_holds(printed, cluster(test.X, test.y) | {"features": "image embeddings"})

    printed = found_by("class-agnostic", *both, "--classifier", "knn", "--tau", "0.1")
    expected = class_agnostic(*arrays, generic, tau=0.1, classifier="knn")
    assert_holds(printed, {name: expected[name] for name in expected if name not in ("per_class", "best", "worst")})
    assert printed["classifier"] == "knn"
    assert printed["chosen"]["n_neighbors"] in [1, 5, 10, 20, 50]
    assert printed["best"] == [f"digit {label}" for label in expected["best"]]
    assert [row["name"] for row in printed["per_class"]] == [f"digit {label}" for label in range(10)]


def test_the_probes_of_class_prompts_print_what_their_functions_find(
    digits: tuple[ImageEmbeddings, ImageEmbeddings], mini: Bundle
) -> None:
    from engine.text import embed_prompts
    from probes.calibration import calibrated_zero_shot
    from probes.modality import modality_gap
    from probes.zero_shot import ensemble, zero_shot

    train, test = digits
    templates = ["a photo of a {}", "this is {a}"]
    filled = [f"a photo of a digit {digit}" for digit in range(10)] + [
        f"this is a digit {digit}" for digit in range(10)
    ]
    two = ensemble(embed_prompts(mini, filled).reshape(2, 10, -1))
    one = ensemble(embed_prompts(mini, filled[:10])[None])

    printed = found_by("zero-shot", "--test", TEST, "--template", templates[0], "--template", templates[1])
    expected = zero_shot(test.X, test.y, two)
    fields = ("accuracy", "top5_accuracy", "confusion", "mean_entropy", "confidence")
    assert_holds(printed, {name: expected[name] for name in fields} | {"class_prompts": filled})

    tau = 1 / mini.architecture.logit_scale
    printed = found_by("calibration", "--train", TRAIN, "--test", TEST)
    assert_holds(printed, calibrated_zero_shot(train.X, train.y, test.X, test.y, one, tau))
    assert printed["before"]["tau"] == tau
    assert printed["after"]["tau"] == printed["fitted_tau"]

    printed = found_by("modality-gap", "--test", TEST, "--template", templates[0])
    assert_holds(printed, modality_gap(test.X, test.y, one) | {"class_prompts": filled[:10]})


def test_a_probe_without_json_prints_its_numbers_and_its_table(
    digits: tuple[ImageEmbeddings, ImageEmbeddings],
) -> None:
    result = run("probe", "temperature", "--test", TEST, "--taus", "1,0.5", "--output", "found.json")
    assert result.exit_code == 0
    found = json.loads(Path("found.json").read_text(encoding="utf-8"))
    assert re.search(rf"^mean_entropy +{found['mean_entropy']:.4f}$", result.stdout, re.MULTILINE)
    first, second = found["sweep"]
    assert result.stdout.splitlines()[-4:] == [
        "sweep",
        "tau  mean entropy",
        f"1    {first['mean_entropy']:.6g}",
        f"0.5  {second['mean_entropy']:.6g}",
    ]
    result = run("probe", "baseline", "--train", TRAIN, "--test", TEST)
    assert re.search(r"^best +digit \d, digit \d, digit \d$", result.stdout, re.MULTILINE)


def test_what_a_probe_of_prompts_cannot_use_is_one_line(digits: tuple[ImageEmbeddings, ImageEmbeddings]) -> None:
    both = ["--train", TRAIN, "--test", TEST]
    for runs in (both, both[2:]):
        assert "--taus abc: must be numbers with commas between" in error_of(
            "probe", "temperature", *runs, "--taus", "abc"
        )
        assert "--taus 1,,2: must be numbers" in error_of("probe", "temperature", *runs, "--taus", "1,,2")
        for taus in ("0", "0.5,-1", "nan"):
            line = error_of("probe", "temperature", *runs, "--taus", taus)
            assert "probe temperature: tau must be a positive number" in line
    assert "neither a built-in prompt set" in error_of("probe", "vocabulary", *both, "--prompts", "nosuch")
    assert 'template "a photo"' in error_of("probe", "modality-gap", "--test", TEST, "--template", "a photo")
    assert error_of("probe", "class-agnostic", *both, "--classifier", "forest", code=2)
    exclusive = error_of("probe", "zero-shot", *both[2:], "--template", "{}", "--prompts", "generic-32", code=2)
    assert "exclude each other" in exclusive


def test_prompts_of_another_bundle_are_refused(digits: tuple[ImageEmbeddings, ImageEmbeddings]) -> None:
    run("embed-text", "--prompts", "generic-32", "--model", "mini", "--output", "text.parquet")
    table = pq.read_table("text.parquet")
    metadata = table.schema.metadata | {b"bundle": b"0" * 64}
    pq.write_table(table.replace_schema_metadata(metadata), "other.parquet")
    both = ["--train", TRAIN, "--test", TEST]
    for name, runs in {
        "temperature": both[2:],
        "vocabulary": both,
        "redundancy": both,
        "cluster": both[2:],
        "class-agnostic": both,
    }.items():
        line = error_of("probe", name, *runs, "--prompts", "other.parquet")
        assert "different bundles" in line
        assert "--model" in line
        assert run("probe", name, *runs, "--prompts", "text.parquet").exit_code == 0


# --- studies ---


def test_a_study_takes_the_run_that_is_there_whatever_it_was_made_with(
    digits: tuple[ImageEmbeddings, ImageEmbeddings], mini: Bundle
) -> None:
    from probes.linear import baseline

    train, test = digits
    command = ["study", "thesis", "--only", "baseline-cifar100", "--json"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "extracting" not in result.stderr
    (row,) = json.loads(result.stdout)["rows"]
    assert row["result"]["accuracy"] == baseline(train.X, train.y, test.X, test.y)["accuracy"]
    assert row["runs"] == {"train": TRAIN, "test": TEST}
    assert sorted(path.name for path in Path("runs").iterdir()) == ["digits-test-mini", "digits-train-mini"]
    again = run(*command, "--output", "elsewhere")
    assert json.loads(again.stdout)["output"] == "elsewhere"
    assert {path.name for path in Path("elsewhere").iterdir()} == {"rows", "plots", "results.json", "report.md"}


def test_a_study_extracts_classes_and_pixels_under_names_of_their_own(workdir: Path, mini: Bundle) -> None:
    from probes.study import Source

    source = Source("digits", classes=3, class_seed=2, pixels=4)
    first = cli.study_run(mini, source, "test", "cpu", None, False)
    folder = Path("runs/digits-3classes-seed2-4px-test-mini")
    assert first.path == folder
    assert (first.dataset, len(first.classes)) == ("digits at 4 pixels", 3)
    assert set(first.y.tolist()) == set(first.classes)
    before = (folder / "manifest.json").stat().st_mtime_ns
    again = cli.study_run(mini, source, "test", "cpu", None, False)
    assert again.digest == first.digest
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    other = cli.study_run(mini, dataclasses.replace(source, class_seed=3), "test", "cpu", None, False)
    assert (other.path != folder, other.classes != first.classes) == (True, True)


def test_a_study_prints_a_table_and_what_the_paper_finds(digits: tuple[ImageEmbeddings, ImageEmbeddings]) -> None:
    result = run("study", "thesis", "--only", "baseline-cifar100,zero-shot-cifar100")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["row", "measure", "published", "ours", "difference", "chance", "seconds", "data"]
    assert re.fullmatch(r"baseline-cifar100 +accuracy +\(0\.7801\) +[01]\.\d{4} +0\.1000 +\d+\.\d +digits", lines[1])
    assert re.fullmatch(r"zero-shot-cifar100 +accuracy +\(0\.6171\) +[01]\.\d{4} +0\.1000 +\d+\.\d +digits", lines[2])
    assert any(line.startswith("cannot be told: the baseline is above zero-shot") for line in lines)


def test_a_study_takes_prompts_of_ones_own(digits: tuple[ImageEmbeddings, ImageEmbeddings]) -> None:
    Path("mine.txt").write_text("\n".join(f"the digit {digit}" for digit in range(10)))
    command = ["study", "thesis", "--only", "resolution-32", "--json"]
    # The sample takes long to extract: digits stand in for it here.
    import probes.study as runner

    load = runner.load_study

    def on_digits(name: str) -> runner.Study:
        study = load(name)
        digits = runner.Source("digits")
        return dataclasses.replace(study, rows=[dataclasses.replace(row, stand_in=digits) for row in study.rows])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "load_study", on_digits)
        (row,) = json.loads(run(*command).stdout)["rows"]
        assert row["result"]["prompts"] == 32
        result = run(*command, "--prompts", "generic-32=mine.txt")
        (row,) = json.loads(result.stdout)["rows"]
        assert row["result"]["prompts"] == 10
        assert "Own prompts, not the published set (mine.txt)." in row["note"]
        line = error_of(*command, "--prompts", "generic-32=nowhere.txt")
        assert "nowhere.txt is neither a built-in prompt set" in line


def test_what_a_study_cannot_use_is_one_line(workdir: Path) -> None:
    for wrong in ("nosuch=x", "generic-32"):
        line = error_of("study", "thesis", "--prompts", wrong)
        assert f"--prompts {wrong}: must be SET=FILE, with one of alternative-32, " in line
    line = error_of("study", "thesis", "--only", "baseline,nosuch")
    assert "--only nosuch: study thesis has no such row or section (baseline, zero-shot, " in line
    assert error_of("study", "nosuch", code=2)
    (workdir / "models" / "mini").unlink()
    missing = error_of("study", "thesis")
    assert "mini" in missing
    assert "python cli.py export" in missing
    assert "models/clip-vit-base-patch32" in error_of("study", "thesis", "--profile", "paper")
    assert not (workdir / "runs").exists()
    assert not (workdir / "studies").exists()


def test_a_study_leaves_another_run_alone_and_says_which_row_it_could_not_do(workdir: Path) -> None:
    run("extract", "--dataset", "digits", "--split", "train", "--model", "mini", "--limit", "20")
    before = Path(TRAIN, "manifest.json").read_bytes()
    result = run("study", "thesis", "--only", "baseline-cifar100")
    assert result.exit_code == 1
    assert "baseline-cifar100" in result.stdout
    assert "needs digits" in result.stdout
    assert f"{TRAIN} holds a run with another " in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: 1 of 1 rows are not done: needs digits")
    assert Path(TRAIN, "manifest.json").read_bytes() == before
    assert json.loads(Path("studies/thesis-sample-mini/results.json").read_text())["rows"][0]["status"] == "needs"


def test_the_papers_profile_says_first_what_it_needs(workdir: Path) -> None:
    command = ["study", "thesis", "--profile", "paper", "--model", "mini", "--only", "baseline-cifar100"]
    result = run(*command, "--no-download", "--data-dir", "data")
    assert result.exit_code == 1
    announced = result.stderr.split("[1/1]")[0]
    assert "cifar100: is not there" in announced  # and, without --no-download, will be downloaded
    assert re.search(r"60000 images to embed .* about \d+ min at \d+ images/s", announced)
    assert "1 SVMs: very roughly" in announced
    assert "Error: 1 of 1 rows are not done: needs cifar100" in result.stderr
    assert not (workdir / "runs").exists()


def test_a_study_without_its_extra_says_what_to_install(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib" or name == "probes.plots"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = error_of("study", "thesis")
    assert "study needs matplotlib, which is not installed: pip install -e '.[study]'" in line


def test_a_run_is_told_by_bundle_dataset_split_and_classes(
    digits: tuple[ImageEmbeddings, ImageEmbeddings], mini: Bundle
) -> None:
    from engine.datasets.subset import draw_classes
    from engine.manifest import holds_run_of

    assert holds_run_of(Path(TEST), mini, "digits", "test", None)
    assert not holds_run_of(Path(TEST), mini, "digits", "train", None)
    assert not holds_run_of(Path(TEST), mini, "mnist", "test", None)
    assert not holds_run_of(Path(TEST), mini, "digits", "test", range(10))
    assert not holds_run_of(Path(TEST), dataclasses.replace(mini, files={}), "digits", "test", None)
    assert not holds_run_of(Path("runs/none"), mini, "digits", "test", None)
    for options in (["--limit", "20"], ["--sample", "20"]):
        run("extract", "--dataset", "digits", "--model", "mini", *options, "--output", "part", "--overwrite")
        assert not holds_run_of(Path("part"), mini, "digits", "test", None)
    run("extract", "--dataset", "digits", "--model", "mini", "--classes", "2", "--output", "two")
    two = draw_classes(10, 2, seed=0)
    assert holds_run_of(Path("two"), mini, "digits", "test", two)
    assert not holds_run_of(Path("two"), mini, "digits", "test", draw_classes(10, 2, seed=1))
    assert not holds_run_of(Path("two"), mini, "digits", "test", None)
    manifest = json.loads(Path("two/manifest.json").read_text(encoding="utf-8"))
    Path("two/manifest.json").write_text(json.dumps(manifest | {"status": "running"}), encoding="utf-8")
    assert not holds_run_of(Path("two"), mini, "digits", "test", two)


def test_extract_json_is_the_manifest(workdir: Path) -> None:
    result = run("extract", "--dataset", "cifar10-sample", "--model", "mini", "--limit", "40", "--json")
    manifest = json.loads(result.stdout)
    stored = json.loads(Path(manifest["run"], "manifest.json").read_text())
    assert manifest == {"run": "runs/cifar10-sample-test-mini", **stored}
    assert stored["status"] == "complete"
    assert stored["written"] == 40


def test_a_second_extract_leaves_a_complete_run_alone(workdir: Path) -> None:
    command = ["extract", "--dataset", "digits", "--model", "mini", "--limit", "20"]
    run(*command)
    before = {path: path.stat().st_mtime_ns for path in Path("runs/digits-test-mini").iterdir()}
    again = run(*command)
    assert again.exit_code == 0
    assert "complete already" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs/digits-test-mini").iterdir()}
    assert "another dtype" in error_of(*command, "--dtype", "float16")
    assert run(*command, "--dtype", "float16", "--overwrite").exit_code == 0


def test_bad_images_are_rejects_and_the_run_exits_0(workdir: Path) -> None:
    photos = workdir / "photos" / "cats"
    photos.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "good.jpg")
    (photos / "cut.jpg").write_bytes((photos / "good.jpg").read_bytes()[:900])
    (photos / "note.jpg").write_text("not an image")
    (photos / "notes.txt").write_text("passed over")
    command = ["extract", "--dataset", "folder:photos", "--model", "mini"]
    stops = error_of(*command, "--on-error", "fail", "--output", "runs/strict")
    assert "cats/cut.jpg" in stops
    assert "truncated" in stops
    assert "--on-error" in stops
    result = run(*command)
    assert result.exit_code == 0
    assert "1 embeddings, 2 rejects" in result.stderr
    assert "passed over: 1" in result.stderr
    rejects = pq.read_table("runs/folder-photos-all-mini/rejects.parquet").to_pylist()
    assert [(reject["row"], reject["key"], reject["error"]) for reject in rejects] == [
        (0, "cats/cut.jpg", "truncated"),
        (2, "cats/note.jpg", "not-an-image"),
    ]


def test_mistakes_are_one_line_that_says_what_and_which_flag(workdir: Path) -> None:
    assert "python cli.py export" in (missing := error_of("extract", "--dataset", "digits"))
    assert "models/clip-vit-base-patch32" in missing
    assert "--model" in missing
    unknown = error_of("extract", "--dataset", "cifar10-simple", "--model", "mini")
    assert 'did you mean "cifar10-sample"' in unknown
    assert "--dataset" in unknown
    (workdir / "empty").mkdir()
    assert "no images in" in error_of("extract", "--dataset", "folder:empty", "--model", "mini")
    assert "--split" in error_of("extract", "--dataset", "digits", "--split", "val", "--model", "mini")
    assert "--limit" in error_of("extract", "--dataset", "digits", "--limit", "0", "--model", "mini")
    assert "--output" in error_of("extract", "--dataset", "digits", "--model", "mini", "--output", "s3://bucket/run")
    assert "extract" in error_of("probe", "cluster", "--test", "runs/none")
    assert not (workdir / "runs").exists()


def test_a_provider_that_is_not_there_is_refused_and_nothing_is_written(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    line = error_of("extract", "--dataset", "digits", "--model", "mini", "--provider", "cuda")
    assert "no CUDA provider" in line
    assert "onnxruntime-gpu" in line
    assert not (workdir / "runs").exists()
    assert run("extract", "--dataset", "digits", "--provider", "rocm").exit_code == 2


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without NVIDIA's driver, but with onnxruntime-gpu, as ONNX Runtime itself claims of the two."""
    import onnxruntime

    from engine.providers import EXECUTION_PROVIDERS

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(EXECUTION_PROVIDERS.values()))
    monkeypatch.setattr("engine.providers.DRIVER", "libno-driver.so.1")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_without_a_gpu_its_providers_are_refused_in_one_line_and_nothing_is_written(
    provider: str, workdir: Path, no_driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    opened: list[Any] = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *arguments, **options: opened.append(arguments))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, Path("models") / f"mini-{provider}", ignore_errors=True)
        own = Path(shutil.copytree("models/mini", f"models/mini-{provider}")) / "bundle.json"
        stored = json.loads(own.read_text())
        stored["target"] = {"provider": provider, "precision": "fp16"}
        own.write_text(json.dumps(stored))
        for command in (
            ["extract", "--dataset", "digits", "--device-id", "1"],
            ["embed-text", "--prompts", "generic-32", "--device-id", "1"],
        ):
            line = error_of(*command, "--model", f"mini-{provider}", "--provider", provider)
            assert line == (
                "Error: no NVIDIA driver on this machine (libno-driver.so.1 does not load); install it, or choose "
                "--provider cpu"
            )
    assert not (workdir / "runs").exists()
    assert opened == []


def test_auto_runs_on_the_cpu_without_a_gpu_and_says_so(workdir: Path, no_driver: None) -> None:
    because = "cpu (auto: no NVIDIA driver on this machine (libno-driver.so.1 does not load))"
    result = run("extract", "--dataset", "digits", "--model", "mini", "--limit", "20")
    assert result.exit_code == 0
    assert f"{because}, batches of 8" in result.stderr
    assert because in run("embed-text", "--prompts", "generic-32", "--model", "mini").stderr
    assert because in run("probe", "zero-shot", "--test", "runs/digits-test-mini").stderr


def test_tensorrt_refuses_a_bundle_that_is_not_its_own(workdir: Path) -> None:
    line = error_of("extract", "--dataset", "digits", "--model", "mini", "--provider", "tensorrt")
    assert "this bundle is made for cpu, with operators that TensorRT has not; export one" in line
    assert not (workdir / "runs").exists()


def test_prompts_that_cannot_be_embedded(workdir: Path) -> None:
    Path("blank.txt").write_text("\n  \n\n")
    assert "blank.txt holds no prompt" in error_of("embed-text", "--prompts", "blank.txt", "--model", "mini")
    long = "a photo of " + "a very " * 40 + "long prompt"
    Path("long.txt").write_text(f"a cat\n{long}\n")
    line = error_of("embed-text", "--prompts", "long.txt", "--model", "mini")
    assert "the model reads 32" in line
    assert long[:60] in line
    assert "neither a built-in prompt set" in error_of("embed-text", "--prompts", "generic-33", "--model", "mini")
    assert "--template" in error_of("embed-text", "--prompts", "generic-32", "--template", "a photo", "--model", "mini")
    assert not (workdir / "runs").exists()


def test_prompts_from_a_file_with_blank_lines_and_from_stdin(workdir: Path) -> None:
    Path("names.txt").write_text("airplane\n\n  dog  \n\n")
    run(
        "embed-text",
        "--prompts",
        "names.txt",
        "--template",
        "a photo of {a}",
        "--model",
        "mini",
        "--output",
        "a.parquet",
    )
    assert pq.read_table("a.parquet")["prompt"].to_pylist() == ["a photo of an airplane", "a photo of a dog"]
    run("embed-text", "--prompts", "-", "--model", "mini", "--output", "b.parquet", stdin="a photo of a dog\n")
    both = [pq.read_table(name)["embedding"].to_pylist()[-1] for name in ("a.parquet", "b.parquet")]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_tables_of_different_bundles_are_refused(workdir: Path) -> None:
    run("extract", "--dataset", "digits", "--model", "mini", "--limit", "20")
    run("embed-text", "--prompts", "generic-32", "--model", "mini", "--output", "text.parquet")
    table = pq.read_table("text.parquet")
    metadata = table.schema.metadata | {b"bundle": b"0" * 64}
    pq.write_table(table.replace_schema_metadata(metadata), "other.parquet")
    runs = ["--train", "runs/digits-test-mini", "--test", "runs/digits-test-mini"]
    line = error_of("probe", "class-agnostic", *runs, "--prompts", "other.parquet")
    assert "different bundles" in line
    assert "--model" in line
    assert "one prompt a class" in error_of("probe", "zero-shot", *runs[2:], "--prompts", "text.parquet")


def test_runs_of_different_datasets_are_refused(workdir: Path) -> None:
    for dataset in ("digits", "cifar10-sample"):
        run("extract", "--dataset", dataset, "--model", "mini", "--limit", "20")
    runs = ["--train", "runs/digits-test-mini", "--test", "runs/cifar10-sample-test-mini"]
    assert "different classes" in error_of("probe", "baseline", *runs)


def test_what_a_probe_cannot_use_is_one_line(workdir: Path) -> None:
    (workdir / "flat").mkdir()
    Image.new("RGB", (40, 40)).save("flat/a.png")
    run("extract", "--dataset", "folder:flat", "--model", "mini")
    run("extract", "--dataset", "digits", "--model", "mini", "--limit", "3")
    assert "without a label" in error_of("probe", "cluster", "--test", "runs/folder-flat-all-mini")
    assert "no classes" in error_of("probe", "zero-shot", "--test", "runs/folder-flat-all-mini")
    assert "clusters" in error_of("probe", "cluster", "--test", "runs/digits-test-mini", "--clusters", "4")


def test_what_there_is(workdir: Path) -> None:
    datasets = {row["name"]: row for row in json.loads(run("datasets", "--json").stdout)}
    assert datasets["cifar10-sample"]["splits"] == {"train": 4000, "test": 1000}
    assert datasets["cifar10-sample"]["cached"] == "yes"
    assert {"digits", "cifar100", "folder:PATH"} <= set(datasets)
    assert error_of("datasets", "get", "digits").startswith("Error: digits comes with the project")
    assert "generic-32" in run("prompts").stdout
    (row,) = json.loads(run("models", "--json").stdout)
    assert row["bundle"] == "models/mini"
    assert row["weights"] == "trained"
    assert row["min_cosine"] > 0.9999


def test_a_checkpoint_that_is_not_clip_is_refused_and_nothing_is_written(workdir: Path) -> None:
    (workdir / "bert").mkdir()
    Path("bert/config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    line = error_of("export", "--model", "./bert")
    assert "bert checkpoint" in line
    assert "--model" in line
    assert [path.name for path in Path("models").iterdir()] == ["mini"]


def test_int8_and_fp16_bundles_have_folders_of_their_own(workdir: Path) -> None:
    with contextlib.ExitStack() as stack:
        for bundle in ("mini-cpu-int8", "mini-cuda-fp16"):
            stack.callback(shutil.rmtree, Path("models") / bundle, ignore_errors=True)
        int8 = run("export", "--model", "mini", "--precision", "int8")
        assert int8.stdout.strip().endswith("models/mini-cpu-int8")
        fp16 = run("export", "--model", "mini", "--provider", "cuda")
        assert fp16.stdout.strip().endswith("models/mini-cuda-fp16")
        assert "the certificate was made on the CPU" in fp16.stderr
        assert "the certificate was" not in int8.stderr
        refusal = error_of("extract", "--dataset", "digits", "--model", "mini-cpu-int8", "--provider", "cuda")
        assert "an int8 bundle runs on the CPU only" in refusal
        assert "--provider cpu" in refusal
    assert "no int8 for the cuda provider" in error_of("export", "--provider", "cuda", "--precision", "int8")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_a_terminal_gets_a_progress_bar(workdir: Path) -> None:
    import pty

    reader, writer = pty.openpty()
    command = [sys.executable, str(ROOT / "cli.py"), "extract", "--dataset", "digits", "--model", "mini"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, text=True, check=True)
    os.close(writer)
    shown = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal says that its other end is closed
        while chunk := os.read(reader, 4096):
            shown += chunk
    os.close(reader)
    assert "500/500" in shown.decode()
    assert done.stdout == "runs/digits-test-mini\n"


def test_export_without_its_extra_says_what_to_install(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("export.")]:
        monkeypatch.delitem(sys.modules, name)
    line = error_of("export", "--model", "mini")
    assert "pip install -e '.[export]'" in line


def test_the_choices_of_the_command_line_are_the_engines() -> None:
    from engine.bundle import DEFAULT_MODEL
    from engine.session import PROVIDERS
    from engine.shards import DTYPES, FORMATS
    from engine.stream import SHARD_SIZE
    from probes.classifiers import CLASSIFIERS
    from probes.study import PROFILES, studies
    from probes.temperature import TAUS

    options = {option.name: option for option in cli.extract.params}
    for name, choices in {"provider": PROVIDERS, "format": FORMATS, "dtype": tuple(DTYPES)}.items():
        kind = options[name].type
        assert isinstance(kind, click.Choice)
        assert tuple(kind.choices) == choices
    assert options["shard_size"].default == SHARD_SIZE
    assert tuple(CLASSIFIERS) == cli.CLASSIFIERS
    assert tuple(studies()) == cli.STUDIES
    assert set(cli.BENCHMARKS) <= {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    profile = next(option for option in cli.study.params if option.name == "profile").type
    assert isinstance(profile, click.Choice)
    assert tuple(profile.choices) == tuple(PROFILES)
    taus = next(option for option in cli.temperature.params if option.name == "taus").default
    assert tuple(map(float, str(taus).split(","))) == TAUS
    assert next(option for option in cli.export_command.params if option.name == "model").default == DEFAULT_MODEL
