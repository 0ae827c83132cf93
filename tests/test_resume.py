"""Runs that were interrupted, crashed, repeated or replaced: always the bytes of a straight run, or a refusal."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from pictures import NOT_AN_IMAGE, contents, pictures, settings, watched
from threads import no_thread_left

from engine import files, manifest
from engine.bundle import Bundle
from engine.datasets import Dataset
from engine.errors import ClipmillError
from engine.manifest import read_manifest
from engine.stream import Settings, extract


@pytest.mark.parametrize("interruption", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_interrupted_run_goes_on_where_it_stopped(interruption: BaseException, mini: Bundle, tmp_path: Path) -> None:
    dataset, run = pictures(60, {20: b"", 50: NOT_AN_IMAGE}), tmp_path / "run"
    done: list[int] = []

    def interrupt(rows: int) -> None:
        done.append(rows)
        if sum(done) > 40:
            raise interruption

    with no_thread_left(), pytest.raises(type(interruption)) as raised:
        extract(mini, dataset, run, settings(shard_size=16), advanced=interrupt)
    assert raised.value is interruption
    assert sorted(file.name for file in run.glob("part-*")) == ["part-00000.parquet", "part-00001.parquet"]
    assert read_manifest(run)["status"] == "running"
    written = {file: file.stat().st_mtime_ns for file in run.glob("part-*")}

    read: list[int] = []
    done.clear()
    manifest = extract(mini, watched(dataset, read.append), run, settings(shard_size=16), advanced=done.append)
    assert read == list(range(32, 60))
    assert done[0] == 32
    assert sum(done) == 60
    assert manifest["summary"]["images"] == 28
    assert {file: file.stat().st_mtime_ns for file in written} == written
    extract(mini, dataset, tmp_path / "straight", settings(shard_size=16))
    assert contents(run) == contents(tmp_path / "straight")


def test_whatever_the_moment_of_a_crash(mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder as it was before and after every rename of a run, which is all that a crash could leave behind."""
    dataset, run = pictures(10, {4: b""}), tmp_path / "run"
    left: list[Path] = []
    replace = files.os.replace

    def crash(*names: Any) -> None:
        left.append(shutil.copytree(run, tmp_path / f"crash-{len(left)}"))
        replace(*names)
        left.append(shutil.copytree(run, tmp_path / f"crash-{len(left)}"))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", crash)
        extract(mini, dataset, run, settings(shard_size=4))
    assert len(left) == 2 * (1 + 3 * 2 + 2)  # the plan; shards and their records; rejects and the manifest
    assert any(".tmp" in file.name for folder in left for file in folder.rglob("*"))
    for folder in left:
        extract(mini, dataset, folder, settings(shard_size=4))
        assert contents(folder) == contents(run), folder.name
        assert not (folder / "commits").exists()


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_shard_that_is_not_what_was_committed_is_computed_again(damage: str, mini: Bundle, tmp_path: Path) -> None:
    dataset, run, done = pictures(30), tmp_path / "run", []

    def interrupt(rows: int) -> None:
        done.append(rows)
        if sum(done) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(mini, dataset, run, settings(shard_size=10), advanced=interrupt)
    shard = run / "part-00000.parquet"
    if damage == "flipped":
        whole = bytearray(shard.read_bytes())
        whole[len(whole) // 2] ^= 1
        shard.write_bytes(whole)
    else:
        shard.unlink()
    read: list[int] = []
    extract(mini, watched(dataset, read.append), run, settings(shard_size=10))
    assert read == [*range(10), *range(20, 30)]
    extract(mini, dataset, tmp_path / "straight", settings(shard_size=10))
    assert contents(run) == contents(tmp_path / "straight")


def test_a_complete_run_is_left_as_it_is(mini: Bundle, tmp_path: Path) -> None:
    run, said, heard = tmp_path / "run", [], []
    first = extract(mini, pictures(10), run, settings())
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.rglob("*")}
    dataset = watched(pictures(10), heard.append)
    again = extract(mini, dataset, run, settings(), started=said.append, advanced=heard.append)
    assert again == first
    assert heard == []
    assert len(said) == 1
    assert said[0].startswith(f"{run} is complete already")
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("dtype", {"dtype": "float16"}),
        ("batch_size", {"batch_size": 8}),
        ("format", {"format": "arrow"}),
        ("shard_size", {"shard_size": 5}),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_setting_is_refused_by_name(
    field: str, changes: dict[str, Any], complete: bool, mini: Bundle, tmp_path: Path
) -> None:
    _refused(field, complete, mini, pictures(10), settings(**changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("field", "dataset"),
    [
        ("rows", pictures(9)),  # what --limit changes
        ("data", dataclasses.replace(pictures(10), identity={"noise": 2})),
        ("split", dataclasses.replace(pictures(10), split="train")),
        ("dataset", dataclasses.replace(pictures(10), name="paintings")),
    ],
)
def test_other_images_are_refused_by_name(field: str, dataset: Dataset, mini: Bundle, tmp_path: Path) -> None:
    _refused(field, True, mini, dataset, settings(), tmp_path / "run")


def test_another_bundle_is_refused_by_name(mini: Bundle, tmp_path: Path) -> None:
    other = dataclasses.replace(mini, files={"image.onnx": mini.files["image.onnx"]})
    _refused("bundle", True, other, pictures(10), settings(), tmp_path / "run", first=mini)


def _refused(
    field: str,
    complete: bool,
    bundle: Bundle,
    dataset: Dataset,
    changed: Settings,
    run: Path,
    first: Bundle | None = None,
) -> None:
    """Extracting `dataset` into a run of other settings is refused, naming `field`, and touches nothing."""

    def interrupt(rows: int) -> None:
        if rows:
            raise KeyboardInterrupt

    if complete:
        extract(first or bundle, pictures(10), run, settings())
    else:
        with pytest.raises(KeyboardInterrupt):
            extract(first or bundle, pictures(10), run, settings(), advanced=interrupt)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(ClipmillError) as raised:
        extract(bundle, dataset, run, changed)
    message = str(raised.value)
    assert message.startswith(f"{run} holds a run with another {field} (")
    assert message.endswith("): choose another --output, or replace it with --overwrite")
    assert "\n" not in message
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_the_refusal_shows_both_values(mini: Bundle, tmp_path: Path) -> None:
    extract(mini, pictures(10), tmp_path / "run", settings())
    with pytest.raises(ClipmillError, match=r"another batch_size \(7, now 8\)"):
        extract(mini, pictures(10), tmp_path / "run", settings(batch_size=8))


def test_a_run_keeps_to_its_batch_size_where_none_is_given(mini: Bundle, tmp_path: Path) -> None:
    """What a GPU's free memory allows is not the same every day."""
    bad = pictures(10, {8: b"no image"})
    with pytest.raises(ClipmillError, match="not-an-image"):
        extract(mini, bad, tmp_path / "run", settings(shard_size=4, fail_on_error=True))
    manifest = extract(mini, pictures(10), tmp_path / "run", settings(shard_size=4, batch_size=None))
    assert (manifest["status"], manifest["fingerprint"]["batch_size"]) == ("complete", 7)
    manifest = extract(mini, pictures(10), tmp_path / "run", settings(batch_size=None, overwrite=True))
    assert manifest["fingerprint"]["batch_size"] == 8


def test_overwrite_replaces_a_run_and_only_a_run(mini: Bundle, tmp_path: Path) -> None:
    run = tmp_path / "run"
    extract(mini, pictures(30, {4: b""}), run, settings(shard_size=5))
    (run / "zero_shot.json").write_text("{}")
    (run / "part-of-mine.txt").write_text("mine")
    extract(mini, pictures(12), run, settings(shard_size=7, format="arrow", overwrite=True))
    extract(mini, pictures(12), tmp_path / "straight", settings(shard_size=7, format="arrow"))
    mine = {"zero_shot.json": b"{}", "part-of-mine.txt": b"mine"}
    assert contents(run) == contents(tmp_path / "straight") | mine


def test_overwrite_replaces_the_same_run_too(mini: Bundle, tmp_path: Path) -> None:
    read: list[int] = []
    dataset = watched(pictures(10), read.append)
    for _ in range(2):
        extract(mini, dataset, tmp_path / "run", settings(overwrite=True))
    assert read == [*range(10), *range(10)]


def test_a_crash_while_overwriting_leaves_no_shard_of_the_old_run(
    mini: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, removed, remove = tmp_path / "run", [], manifest._remove
    extract(mini, pictures(30), run, settings(shard_size=5))

    def crash(path: Path) -> None:
        if removed and path.name != "commits":
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_remove", crash)
        with pytest.raises(KeyboardInterrupt):
            extract(mini, pictures(12), run, settings(shard_size=7, overwrite=True))
    assert (run / "part-00005.parquet").exists()
    extract(mini, pictures(12), run, settings(shard_size=7))
    extract(mini, pictures(12), tmp_path / "straight", settings(shard_size=7))
    assert contents(run) == contents(tmp_path / "straight")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["holiday.jpg", "manifest.json", "part-00000.parquet"])
def test_a_folder_that_holds_no_run_is_refused_untouched(
    name: str, overwrite: bool, mini: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / name).write_text('{"name": "a web extension", "version": "1"}')
    (folder / "deep" / "diary.txt").write_text("dear diary")
    with pytest.raises(ClipmillError, match="exists and holds no run: choose another --output"):
        extract(mini, pictures(3), folder, settings(overwrite=overwrite))
    assert {file.name: file.read_text()[:4] for file in folder.rglob("*") if file.is_file()} == {
        name: '{"na',
        "diary.txt": "dear",
    }


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_place_of_the_run_is_refused_untouched(overwrite: bool, mini: Bundle, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("dear diary")
    with pytest.raises(ClipmillError, match="exists and holds no run"):
        extract(mini, pictures(3), tmp_path / "notes", settings(overwrite=overwrite))
    assert (tmp_path / "notes").read_text() == "dear diary"


def test_an_empty_folder_will_do(mini: Bundle, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert extract(mini, pictures(3), tmp_path / "run", settings())["written"] == 3
