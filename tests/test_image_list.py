"""list:FILE on CSV, TSV and JSONL: paths, labels as numbers or names, keys, and the line that is wrong."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from engine.datasets import Dataset, Sample, cifar10_sample
from engine.datasets.image_list import load
from engine.decode import BadImage, decode
from engine.errors import ClipmillError


def rows(dataset: Dataset) -> list[Sample]:
    return list(dataset.samples(0, dataset.rows))


def summary(dataset: Dataset) -> list[tuple[str, int | str | None]]:
    return [
        (sample.key, sample.image.error_class if isinstance(sample.image, BadImage) else sample.label)
        for sample in rows(dataset)
    ]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_names_make_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs = list(cifar10_sample.load("test").samples(0, 3))
    (tmp_path / "deep").mkdir()
    for number, photograph in enumerate(photographs):
        assert isinstance(photograph.image, bytes)
        (tmp_path / "deep" / f"{number}, ü.jpg").write_bytes(photograph.image)
    # a byte order mark, Windows line ends, blank lines, quotes, another order of columns, one more column
    text = f"""\ufefflabel,Path,more\r\nowl,"deep/1, ü.jpg",x\r\n\r
auk,"{tmp_path}/deep/0, ü.jpg",\r\nowl,"deep/2, ü.jpg",x\r\n"""
    dataset = load(write(tmp_path / "My List.csv", text))
    assert (dataset.name, dataset.slug) == (f"list:{tmp_path}/My List.csv", "list-My-List")
    assert (dataset.rows, dataset.split, dataset.class_names) == (3, "all", ("auk", "owl"))
    assert summary(dataset) == [("deep/1, ü.jpg", 1), (f"{tmp_path}/deep/0, ü.jpg", 0), ("deep/2, ü.jpg", 1)]
    assert dataset.labels().tolist() == [1, 0, 1]
    for sample, number in zip(rows(dataset), (1, 0, 2), strict=True):
        assert (decode(sample.image) == decode(photographs[number].image)).all()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/My List.csv").identity == dataset.identity


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_same_list_in_each_format(tmp_path: Path, suffix: str) -> None:
    table = [("a.jpg", "3", "x"), ("a.jpg", "10", "y"), ("b.jpg", "", "z"), ("c.jpg", "-1", "7"), ("d.jpg", "-2", "8")]
    if suffix == ".jsonl":
        text = "".join(
            json.dumps({"path": path, "label": int(label) if label else None, "key": key}) + "\n\n"
            for path, label, key in table
        )
    else:
        delimiter = "\t" if suffix == ".tsv" else ","
        text = "".join(delimiter.join(row) + "\n" for row in [("path", "label", "key"), *table])
    dataset = load(write(tmp_path / f"list{suffix}", text))
    expected = [("x", 3), ("y", 10), ("z", "missing-label"), ("7", "missing-label"), ("8", "bad-label")]
    assert summary(dataset) == expected
    assert (dataset.class_names, dataset.labels().tolist()) == ((), [3, 10, -1, -1, -1])
    whole = rows(dataset)
    for start in range(6):
        for stop in range(start, 8):
            found = [(sample.row, sample.key, sample.label) for sample in dataset.samples(start, stop)]
            assert found == [(sample.row, sample.key, sample.label) for sample in whole[start:stop]]


def test_no_labels(tmp_path: Path) -> None:
    assert summary(load(write(tmp_path / "a.csv", "path\nb.jpg\na.jpg\n"))) == [("b.jpg", None), ("a.jpg", None)]
    assert summary(load(write(tmp_path / "b.csv", "path,label\nb.jpg,\n"))) == [("b.jpg", None)]
    # one word among numbers: all are names
    assert load(write(tmp_path / "c.csv", "path,label\na,1\nb,cat\n")).class_names == ("1", "cat")


def test_what_is_not_there_is_a_row(tmp_path: Path) -> None:
    (sample,) = rows(load(write(tmp_path / "a.jsonl", '{"path": "missing.jpg"}')))
    with pytest.raises(BadImage, match="unreadable"):
        decode(sample.image)
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (sample,) = rows(load(write(tmp_path / "b.jsonl", r'{"path": "caf\udce9.jpg"}')))
    assert sample.key == r"./caf\xe9.jpg"
    assert isinstance(sample.image, Path)
    assert sample.image.read_bytes() == b"x"


def test_identity_follows_list_and_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    name = write(tmp_path / "l.csv", "path,label\na.jpg,1\n")
    seen = [load(name).identity]
    (tmp_path / "a.jpg").write_bytes(b"xy")
    seen.append(load(name).identity)
    write(tmp_path / "l.csv", "path,label\na.jpg,12\n")
    seen.append(load(name).identity)
    assert load(name).identity == seen[-1]
    assert len({json.dumps(identity) for identity in seen}) == 3


def test_memory_per_row(tmp_path: Path) -> None:
    text = "path,label\n" + "".join(f"class{number % 10}/{number:06d}.jpg,{number % 10}\n" for number in range(20_000))
    name = write(tmp_path / "l.csv", text)
    tracemalloc.start()
    dataset = load(name)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.rows == 20_000
    assert held / dataset.rows < 110


def test_unusable_lists(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"path\ncaf\xe9.jpg\n")
    (tmp_path / "folder.csv").mkdir()
    texts = {
        "none.csv": ("path,label\n", "lists no images"),
        "empty.csv": ("", r'line 1: no column "path" in the header \(empty\)'),
        "empty.jsonl": ("\n", "lists no images"),
        "column.csv": ("file,label\na,b\n", r'line 1: no column "path" in the header \(file, label\)'),
        "columns.csv": ("path,path\na,b\n", "line 1: a column name comes twice"),
        "cells.csv": ("path,label\na,1\nb\n", "line 3: 1 cells, where the header has 2"),
        "quote.csv": ('path\n"a\n', "line 2: unexpected end of data"),
        "nopath.csv": ("path,label\na,1\n,2\n", "line 3: no path"),
        "zero.jsonl": ('{"path": "a\\u0000b"}', "line 1: no path"),
        "broken.jsonl": ('{"path": "a"}\n{"path"\n', "line 2: no JSON"),
        "array.jsonl": ("[1]", "line 1: no JSON object"),
        "missing.jsonl": ('{"file": "a"}', "line 1: no path"),
        "bool.jsonl": ('{"path": "a", "label": true}', "line 1: the label True is neither"),
        "float.jsonl": ('{"path": "a", "label": 1.5}', "line 1: the label 1.5 is neither"),
        "keyless.csv": ("path,key\na,1\nb,\n", "line 3: either every row has a key or none"),
        "twice.csv": ("path\na.jpg\nb.jpg\na.jpg\n", r'lists "a.jpg" twice; give each row a "key"'),
        "keys.csv": ("path,key\na,1\nb,1\n", r'lists "1" twice; make the keys unique'),
        "list.txt": ("path\na\n", r"ends in none of \.csv \.tsv \.jsonl"),
    }
    wrong = {"latin.csv": "is not UTF-8", "folder.csv": "is not a file", "nowhere.csv": "there is no file"}
    for name, (text, words) in texts.items():
        write(tmp_path / name, text)
        wrong[name] = words
    for name, words in wrong.items():
        with pytest.raises(ClipmillError, match=words) as caught:
            load(f"{tmp_path}/{name}")
        assert "--dataset" in str(caught.value)
        assert "\n" not in str(caught.value)
