"""Every dataset and every source through the command line's extract: labels, names and counts in the run, the same
bytes again, and subsets that a run remembers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_cifar
import test_food101
import test_mnist
import test_tiny_imagenet
from archives import everything
from click.testing import CliRunner
from pictures import contents, one_by_one
from PIL import Image
from sources import CLASSES, PHOTOS, SOURCES, make_list, photographs

import cli
from engine.bundle import Bundle
from engine.datasets import open_dataset
from engine.decode import decode
from engine.manifest import read_run
from engine.shards import embeddings_of

# Each serves small archives of genuine format, and makes the readers take them for the published ones.
published_cifar = test_cifar.published
published_mnist = test_mnist.published
published_food101 = test_food101.published
published_tiny_imagenet = test_tiny_imagenet.published
url = test_tiny_imagenet.url

CIFAR = tuple(test_cifar.NAMES)
DIGITS = tuple(f"digit {digit}" for digit in range(10))
# Fixture, class names, labels of the train and of the test split.
NAMED: dict[str, tuple[str, tuple[str, ...], list[int], list[int]]] = {
    "cifar10": ("published_cifar", CIFAR, [0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 0, 1]),
    "cifar100": ("published_cifar", CIFAR, [0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 0, 1]),
    "mnist": ("published_mnist", DIGITS, [1, 4, 7, 0, 3, 6, 9], [1, 4, 7, 0, 3]),
    "food101": ("published_food101", ("apple_pie", "churros"), [1, 1, 0, 0], [1, 0, 0]),
    "tiny-imagenet": (
        "published_tiny_imagenet",
        ("goldfish", "crane (n02012849)", "crane (n03126707)", "maillot", "maillot (tank suit)"),
        [0, 0, 0, 1, 2, 3, 4],
        [4, 0, 2],
    ),
}


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mini: Bundle) -> Path:
    """The current directory, with the embedded model under models/mini; the index of tars is kept in it too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CLIPMILL_DATA_DIR", raising=False)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mini").symlink_to(mini.path)
    return tmp_path


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(cli.main, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def extracted(dataset: str, output: str, *options: str) -> tuple[dict[str, Any], pa.Table]:
    """Manifest and rows of a run that must succeed."""
    command = ["extract", "--dataset", dataset, "--model", "mini", "--provider", "cpu", "--output", output]
    result = run(*command, *options)
    assert result.exit_code == 0, result.stderr
    return read_run(Path(output))


def refused(dataset: str, output: str, *options: str) -> str:
    command = ["extract", "--dataset", dataset, "--model", "mini", "--provider", "cpu", "--output", output]
    result = run(*command, *options)
    assert result.exit_code == 1
    return str(result.stderr)


def names_in(table: pa.Table, name: str = "class_names") -> tuple[str, ...]:
    return tuple(json.loads(table.schema.metadata[name.encode()]))


# Named datasets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_named_datasets(name: str, request: pytest.FixtureRequest, mini: Bundle, tmp_path: Path) -> None:
    fixture, class_names, train, test = NAMED[name]
    published = request.getfixturevalue(fixture)
    data = tmp_path / "data"
    got = run("datasets", "get", name, "--data-dir", str(data))
    assert got.exit_code == 0, got.stderr
    assert Path(got.stdout.strip()).is_relative_to(data)
    shutil.rmtree(published if published.is_dir() else published.parent)  # from here on nothing can be fetched
    offline = ("--data-dir", str(data), "--no-download", "--shard-size", "5")

    manifest, table = extracted(name, "one", "--split", "all", "--workers", "1", *offline)
    rows = len(train) + len(test)
    assert (manifest["status"], manifest["written"], manifest["rejected"]) == ("complete", rows, 0)
    assert table["row"].to_pylist() == list(range(rows))
    assert table["label"].to_pylist() == train + test
    assert table["split"].to_pylist() == ["train"] * len(train) + ["test"] * len(test)
    assert len(set(table["key"].to_pylist())) == rows
    assert names_in(table) == class_names
    if name == "cifar100":
        assert table["coarse_label"].to_pylist() == [int(label == 2) for label in train + test]
        assert names_in(table, "coarse_label_names") == ("fish", "people")
    else:
        assert "coarse_label" not in table.column_names
    source = open_dataset(name, "all", data_dir=data, download=False)
    resize = None if source.image_size else (32, 32)
    pixels = [decode(sample.image, resize) for sample in source.samples(0, rows)]  # type: ignore[arg-type]
    np.testing.assert_array_equal(embeddings_of(table), one_by_one(mini, pixels))

    extracted(name, "two", "--split", "all", "--workers", "4", *offline)
    assert contents(Path("one")) == contents(Path("two"))
    _, default = extracted(name, "three", *offline)
    assert default["label"].to_pylist() == test
    assert default["key"].to_pylist() == table["key"].to_pylist()[len(train) :]


def test_no_download_is_one_line_and_leaves_nothing(workdir: Path) -> None:
    before = everything(workdir)
    for name in NAMED:
        line = refused(name, "run", "--data-dir", "data", "--no-download").splitlines()[-1]
        assert line.startswith(f"Error: {name}: ")
        assert f"into {workdir}/data" in line
        assert "--no-download" in line
    assert everything(workdir) == before


# Sources: the same twenty photographs in each -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SOURCES)
def test_sources(scheme: str, mini: Bundle, tmp_path: Path) -> None:
    make, key, *_ = SOURCES[scheme]
    source = make(tmp_path)
    manifest, table = extracted(source, "one", "--workers", "1", "--shard-size", "7")
    assert (manifest["status"], manifest["written"], manifest["rejected"]) == ("complete", PHOTOS, 0)
    assert manifest["fingerprint"]["dataset"] == source
    order = sorted(photographs(), key=lambda photo: CLASSES[photo[2]]) if scheme == "folder" else photographs()
    assert table["row"].to_pylist() == list(range(PHOTOS))
    assert table["label"].to_pylist() == [label for _, _, label in order]
    assert set(table["split"].to_pylist()) == {"all"}
    assert table["key"].to_pylist()[3] == key
    assert names_in(table) == (() if scheme == "npy" else CLASSES)
    expected = one_by_one(mini, [decode(image) for _, image, _ in order])
    np.testing.assert_array_equal(embeddings_of(table), expected)
    extracted(source, "two", "--workers", "4", "--shard-size", "7")
    assert contents(Path("one")) == contents(Path("two"))


@pytest.mark.parametrize("scheme", SOURCES)
def test_one_bad_row_is_a_reject_and_the_rest_is_as_it_was(scheme: str, tmp_path: Path) -> None:
    make, _, spoil, error = SOURCES[scheme]
    source = make(tmp_path)
    _, whole = extracted(source, "whole")
    spoil(tmp_path)
    manifest, table = extracted(source, "spoilt")
    (reject,) = pq.read_table("spoilt/rejects.parquet").to_pylist()
    assert reject["error"] == error
    assert (manifest["written"], manifest["rejected"]) == (len(table), 1)
    kept = set(table["key"].to_pylist())
    assert len(kept) == PHOTOS - 1
    # A tar's damaged header takes the sample with it, whose other member is then a sample without an image.
    same = whole.filter([key in kept for key in whole["key"].to_pylist()])
    assert table.drop_columns("row").equals(same.drop_columns("row"))
    assert "another data" in refused(source, "whole")
    assert reject["key"] in refused(source, "strict", "--on-error", "fail")


def test_the_pixel_limit_is_an_option_and_part_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 70)).save("photos/large.png")  # 4,200 pixels
    Image.new("RGB", (8, 32)).save("photos/thin.png")  # 256, but 32 x 128 = 4,096 when resized
    for limit, rejects in {
        "4200": {},
        "4199": {"large.png": "too-large"},
        "4096": {"large.png": "too-large"},
        "4095": {"large.png": "too-large", "thin.png": "bad-size"},
    }.items():
        manifest, _ = extracted("folder:photos", limit, "--max-pixels", limit)
        assert manifest["fingerprint"]["max_pixels"] == int(limit)
        assert manifest["rejected"] == len(rejects)
        if rejects:
            rows = pq.read_table(f"{limit}/rejects.parquet").to_pylist()
            assert {row["key"]: row["error"] for row in rows} == rejects
    assert "another max_pixels (4200, now 4100)" in refused("folder:photos", "4200", "--max-pixels", "4100")


# Subsets --------------------------------------------------------------------------------------------------------------


def subset_of(manifest: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(manifest["fingerprint"][choice] for choice in ("classes", "sample", "seed", "limit", "rows"))


def test_a_run_remembers_its_subset_and_refuses_another(tmp_path: Path) -> None:
    chosen = ("--classes", "truck, cat", "--sample", "30", "--seed", "3")
    manifest, table = extracted("cifar10-sample", "named", *chosen)
    assert subset_of(manifest) == ([3, 9], 30, 3, None, 30)
    assert Counter(table["label"].to_pylist()) == {3: 15, 9: 15}
    assert names_in(table) == CLASSES
    assert names_in(table, "classes") == (3, 9)
    rows = table["row"].to_pylist()
    assert rows == sorted(rows)
    whole = {sample.row: sample.key for sample in open_dataset("cifar10-sample").samples(0, 1000)}
    assert table["key"].to_pylist() == [whole[row] for row in rows]
    assert (
        "complete already"
        in run(
            "extract",
            "--dataset",
            "cifar10-sample",
            "--model",
            "mini",
            "--output",
            "named",
            "--provider",
            "cpu",
            *chosen,
        ).stderr
    )
    assert "another seed (3, now 4)" in refused("cifar10-sample", "named", *chosen[:-1], "4")
    assert "another sample (30, now 31)" in refused("cifar10-sample", "named", *chosen[:3], "31", *chosen[4:])
    assert "another classes ([3, 9], now [3, 5])" in refused("cifar10-sample", "named", "--classes", "cat,dog")
    assert "another limit (none, now 10)" in refused("cifar10-sample", "named", *chosen, "--limit", "10")


def test_a_number_of_classes_is_drawn_by_its_seed() -> None:
    number = ("--classes", "4", "--sample", "40", "--class-seed")
    drawn = {}
    for seed in ("1", "2"):
        manifest, table = extracted("cifar10-sample", seed, *number, seed)
        drawn[seed] = manifest["fingerprint"]["classes"]
        assert Counter(table["label"].to_pylist()) == dict.fromkeys(drawn[seed], 10)
    assert drawn["1"] != drawn["2"]
    assert extracted("cifar10-sample", "again", *number, "1")[0]["fingerprint"]["classes"] == drawn["1"]
    assert f"another classes ({drawn['1']}, now {drawn['2']})" in refused("cifar10-sample", "1", *number, "2")


@pytest.mark.usefixtures("published_cifar")
def test_superclasses_come_along_in_a_subset() -> None:
    manifest, table = extracted("cifar100", "fine", "--classes", "apple,baby", "--limit", "3", "--data-dir", "data")
    assert subset_of(manifest) == ([0, 2], None, None, 3, 3)
    assert table["row"].to_pylist() == [0, 2, 3]
    assert table["label"].to_pylist() == [0, 2, 0]
    assert table["coarse_label"].to_pylist() == [0, 1, 0]


@pytest.mark.usefixtures("published_tiny_imagenet")
def test_some_classes_of_tiny_imagenet() -> None:
    drawn, table = extracted(
        "tiny-imagenet", "tiny", "--split", "train", "--classes", "3", "--class-seed", "7", "--data-dir", "data"
    )
    classes = drawn["fingerprint"]["classes"]
    assert len(classes) == 3
    assert table["label"].to_pylist() == [label for label in [0, 0, 0, 1, 2, 3, 4] if label in classes]
    assert "goldfish" in names_in(table)


def test_some_classes_of_a_source(tmp_path: Path) -> None:
    manifest, table = extracted(make_list(tmp_path), "list", "--classes", "dog,cat")
    assert subset_of(manifest) == ([3, 5], None, None, None, 4)
    assert sorted(table["label"].to_pylist()) == [3, 3, 5, 5]


def test_zero_shot_decides_between_the_classes_of_the_run_only() -> None:
    _, table = extracted("cifar10-sample", "some", "--classes", "cat,dog,ship", "--sample", "90")
    result = json.loads(run("probe", "zero-shot", "--test", "some", "--template", "a photo of {a}", "--json").stdout)
    assert result["class_prompts"] == ["a photo of a cat", "a photo of a dog", "a photo of a ship"]
    assert result["chance"] == pytest.approx(1 / 3)
    Path("names.txt").write_text("\n".join(result["class_prompts"]))
    run("embed-text", "--prompts", "names.txt", "--model", "mini", "--output", "names.parquet")
    text = np.stack(pq.read_table("names.parquet")["embedding"].to_numpy())
    decided = np.array([3, 5, 8])[(embeddings_of(table) @ text.T).argmax(axis=1)]
    assert result["accuracy"] == pytest.approx((decided == table["label"].to_numpy()).mean())
    assert result["accuracy"] > 0.6
