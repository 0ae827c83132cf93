"""A folder of 1,000 images, 200 of them broken in every way we know: 800 embeddings as the reference has them, 200
rejects that say why, and the same bytes whatever the number of workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from archives import photographs
from click.testing import CliRunner
from hostile import BAD, GOOD
from numpy.typing import NDArray
from pictures import contents
from PIL import Image

import cli
from engine.bundle import Bundle
from engine.datasets.folder import key_of
from engine.manifest import read_run
from engine.shards import embeddings_of

ROWS, BROKEN = 1000, 200
# Pillow's word on images that it converts as the reference has it; the engine silences it, and pytest unsilences it
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")
CHECKPOINT = Path(cli.__file__).parent / "export" / "mini_clip" / "checkpoint"
CLASSES = ("airships", "bees", "dogs; and \n others", "çà et là")  # in the order of their bytes


@dataclass(frozen=True)
class Planted:
    """One of the 1,000: where it lies, relative to the folder, and what it is."""

    path: str
    kind: str
    error: str | None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Planted]]:
    """The folder, and what lies in it in the order of its rows; good and broken ones mixed."""
    root = tmp_path_factory.mktemp("hostile") / "photos"
    random = np.random.default_rng(4)
    broken = set(random.choice(ROWS, BROKEN, replace=False).tolist())
    kinds = {True: iter(list(BAD) * BROKEN), False: iter(list(GOOD) * ROWS)}
    planted = []
    for number, pixels in enumerate(photographs("train", ROWS)):
        kind = next(kinds[number in broken])
        what = BAD.get(kind) or GOOD[kind]
        # A stray byte, as old cameras and archives leave them: no UTF-8, and a good name on Linux all the same.
        stray = b"caf\xe9 " if number % 50 == 7 else b""
        name = os.fsdecode(b"%04d %s%s" % (number, stray, kind.encode())) + what.suffix
        path = root / CLASSES[number % len(CLASSES)] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        size = random.integers(33, 97, 2)
        picture = Image.fromarray(pixels).resize((int(size[0]), int(size[1])), Image.Resampling.BICUBIC)
        if what.plant is None:
            path.write_bytes(what.make(picture))
        else:
            what.plant(path)
        planted.append(Planted(path.relative_to(root).as_posix(), kind, what.error))
    return root, sorted(planted, key=lambda each: each.path)


@pytest.fixture(scope="module")
def extract(folder: tuple[Path, list[Planted]], mini: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line's extract on the folder: its result, and the run that it was told to make."""
    runs = tmp_path_factory.mktemp("runs")

    def extracted(name: str, *options: str) -> tuple[Any, Path]:
        command = ["extract", "--dataset", f"folder:{folder[0]}", "--model", str(mini.path), "--provider", "cpu"]
        result = CliRunner().invoke(cli.main, [*command, "--output", str(runs / name), *options])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result, runs / name

    return extracted


@pytest.fixture(scope="module")
def finished(extract: Any) -> Path:
    """The run, made with the defaults."""
    result, run = extract("defaults", "--shard-size", "300")
    assert result.exit_code == 0, result.stderr
    assert "800 embeddings, 200 rejects" in result.stderr
    return run


def test_there_are_many_kinds(folder: tuple[Path, list[Planted]]) -> None:
    counts = Counter(each.kind for each in folder[1])
    assert sum(counts[kind] for kind in BAD) == BROKEN
    assert sum(counts[kind] for kind in GOOD) == ROWS - BROKEN
    assert min(counts.values()) >= 5
    assert len(BAD) >= 30
    assert set(counts) == {*GOOD, *BAD}


def test_every_image_is_embedded_or_rejected_with_its_class(folder: tuple[Path, list[Planted]], finished: Path) -> None:
    manifest, table = read_run(finished)
    rejects = pq.read_table(finished / "rejects.parquet").to_pylist()
    assert (manifest["written"], manifest["rejected"], manifest["plan"]["rows"]) == (800, 200, 1000)
    expected = [(row, key_of(each.path), each.error) for row, each in enumerate(folder[1])]
    found = {reject["row"]: (reject["row"], reject["key"], reject["error"]) for reject in rejects}
    found |= {
        row: (row, key, None) for row, key in zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True)
    }
    wrong = [(each, other) for each, other in zip(expected, map(found.get, range(ROWS)), strict=True) if each != other]
    assert not wrong
    for reject in rejects:
        assert reject["message"]
        assert "\n" not in reject["message"]
        assert str(folder[0]) not in reject["message"]
    classes = json.loads(table.schema.metadata[b"class_names"])
    assert classes == list(CLASSES)
    assert [classes[label] for label in table["label"].to_pylist()] == [
        each.path.partition("/")[0] for each in folder[1] if each.error is None
    ]


def test_every_embedding_is_that_of_the_reference(folder: tuple[Path, list[Planted]], finished: Path) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(CHECKPOINT, use_fast=False)
    model = CLIPModel.from_pretrained(CHECKPOINT).eval()
    embeddings = embeddings_of(read_run(finished)[1]).astype(np.float64)
    good = [each for each in folder[1] if each.error is None]

    def reference(batch: list[Planted]) -> NDArray[np.float32]:
        # Told the layout, which it would otherwise guess wrongly for an image one pixel high.
        pixels = [
            processor(images=Image.open(folder[0] / each.path), input_data_format="channels_last", return_tensors="pt")
            for each in batch
        ]
        with torch.inference_mode():
            features = model.get_image_features(torch.cat([each["pixel_values"] for each in pixels]))
        return (features / features.norm(dim=-1, keepdim=True)).numpy()

    expected = np.concatenate([reference(good[start : start + 100]) for start in range(0, len(good), 100)])
    cosines = (embeddings * expected).sum(axis=1)
    worst = {kind: min(c for c, each in zip(cosines, good, strict=True) if each.kind == kind) for kind in GOOD}
    assert {kind: cosine for kind, cosine in worst.items() if cosine <= 0.9999} == {}
    # It could have failed: the next image's embedding is another one.
    assert np.median((embeddings * np.roll(expected, 1, axis=0)).sum(axis=1)) < 0.9


@pytest.mark.parametrize("workers", [1, 4])
def test_neither_another_run_nor_the_workers_change_a_byte(workers: int, extract: Any, finished: Path) -> None:
    result, run = extract(f"workers-{workers}", "--shard-size", "300", "--workers", str(workers))
    assert result.exit_code == 0
    files = contents(run)
    assert files == contents(finished)
    assert len(files) == 4 + 2


def test_on_error_fail_stops_at_the_first_and_names_it(folder: tuple[Path, list[Planted]], extract: Any) -> None:
    first = next(each for each in folder[1] if each.error is not None)
    result, run = extract("strict", "--on-error", "fail")
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert f"row {folder[1].index(first)}, {key_of(first.path)}, is {first.error}: " in line
    assert "--on-error reject" in line
    assert json.loads((run / "manifest.json").read_text())["status"] == "running"
    assert not list(run.glob("part-*"))


def test_nothing_is_printed_about_a_broken_file() -> None:
    """In a program of its own: pytest listens to warnings and logs, which would else go to stderr."""
    picture = Image.fromarray(photographs("train", 1)[0]).resize((61, 47))
    files = {kind: what.make(picture) for kind, what in BAD.items() if what.plant is None}
    code = """
import sys
from engine.decode import BadImage, decode
for line in sys.stdin:
    try:
        decode(bytes.fromhex(line), (32, 32))
        print(None)
    except BadImage as error:
        print(error.error_class)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(data.hex() for data in files.values()),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(cli.__file__).parent,
    )
    assert done.stderr == ""
    assert dict(zip(files, done.stdout.split(), strict=True)) == {kind: BAD[kind].error for kind in files}


@pytest.fixture
def forbidden(tmp_path: Path) -> Iterator[Path]:
    for name in ("a/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    yield tmp_path
    (tmp_path / "b").chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_we_may_not_read(forbidden: Path, mini: Bundle) -> None:
    command = ["extract", "--dataset", f"folder:{forbidden}", "--model", str(mini.path)]
    (forbidden / "a" / "0.png").chmod(0)
    result = CliRunner().invoke(cli.main, [*command, "--output", str(forbidden / "run")])
    (reject,) = pq.read_table(forbidden / "run" / "rejects.parquet").to_pylist()
    assert (result.exit_code, reject["key"], reject["error"]) == (0, "a/0.png", "unreadable")
    (forbidden / "b").chmod(0)
    result = CliRunner().invoke(cli.main, [*command, "--output", str(forbidden / "other")])
    assert (result.exit_code, "cannot list" in result.stderr) == (1, True)
