"""folder:PATH on real folders: order, classes, links, odd names, and nothing passed over without a word."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.datasets import Dataset, open_dataset
from engine.datasets.folder import key_of
from engine.decode import BadImage, decode
from engine.errors import ClipmillError


def plant(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def keys_of(dataset: Dataset) -> list[str]:
    return [sample.key for sample in dataset.samples(0, dataset.rows)]


def test_class_subfolders(tmp_path: Path) -> None:
    root = plant(
        tmp_path / "My Birds!",
        "owl/b.JPG",
        "owl/a.png",
        "owl/old/c.webp",
        "owl-eagle/x.gif",
        "root.jpeg",
        "empty/n.txt",
    )
    dataset = open_dataset(f"folder:{root}")
    assert keys_of(dataset) == ["owl-eagle/x.gif", "owl/a.png", "owl/b.JPG", "owl/old/c.webp", "root.jpeg"]
    assert dataset.class_names == ("owl", "owl-eagle")
    assert [sample.label for sample in dataset.samples(0, 5)] == [1, 0, 0, 0, None]
    assert [sample.row for sample in dataset.samples(2, 9)] == [2, 3, 4]
    assert {sample.split for sample in dataset.samples(0, 5)} == {dataset.split} == {"all"}
    assert (dataset.name, dataset.slug, dataset.image_size) == (f"folder:{root}", "folder-My-Birds", None)
    assert open_dataset(f"folder:{root}", "all", limit=2).rows == 2


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    dataset = open_dataset(f"folder:{plant(tmp_path, 'b.tif', 'a.ppm')}")
    assert dataset.class_names == ()
    assert [(sample.key, sample.label) for sample in dataset.samples(0, 2)] == [("a.ppm", None), ("b.tif", None)]


def test_images_are_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (3, 2), (9, 9, 9)).save(tmp_path / "cats" / "a.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    relative, home, here = open_dataset("folder:cats"), open_dataset("folder:~/cats"), open_dataset("folder:cats/.")
    monkeypatch.chdir("/")
    for dataset in (relative, home, here):
        (sample,) = dataset.samples(0, 1)
        assert decode(sample.image).shape == (2, 3, 3)
        assert dataset.slug == "folder-cats"
    assert relative.name == "folder:cats"
    assert relative.identity == home.identity


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    root = plant(tmp_path, "a/1.jpg", "a/readme.txt", "a/jpg", "notes.md", ".hidden.jpg", ".git/x.png", "b/.DS_Store")
    dataset = open_dataset(f"folder:{root}")
    assert keys_of(dataset) == ["a/1.jpg"]
    assert dataset.notes == (
        "passed over: 3 file(s) without an image suffix",
        "passed over: 3 hidden file(s) or folder(s)",
    )
    assert open_dataset(f"folder:{root / 'a'}").notes == ("passed over: 2 file(s) without an image suffix",)


def test_links(tmp_path: Path) -> None:
    root = plant(tmp_path / "root", "cats/1.jpg")
    plant(tmp_path / "elsewhere", "2.jpg", "deep/3.jpg")
    (root / "dogs").symlink_to(tmp_path / "elsewhere")
    (root / "dogs" / "deep" / "up").symlink_to(root)
    (root / "cats" / "self").symlink_to(".")
    (root / "cats" / "knot").symlink_to("knot")
    (root / "cats" / "dangling.jpg").symlink_to("nowhere")
    (root / "cats" / "linked.jpg").symlink_to("1.jpg")
    dataset = open_dataset(f"folder:{root}")
    assert keys_of(dataset) == ["cats/1.jpg", "cats/dangling.jpg", "cats/linked.jpg", "dogs/2.jpg", "dogs/deep/3.jpg"]
    assert dataset.class_names == ("cats", "dogs")
    assert dataset.notes == (
        "passed over: 1 file(s) without an image suffix",
        "passed over: 2 link(s) back to a folder above",
    )
    (dangling,) = dataset.samples(1, 2)
    with pytest.raises(BadImage, match="unreadable"):
        decode(dangling.image)


def test_identity_is_path_size_and_time(tmp_path: Path) -> None:
    root = plant(tmp_path / "a", "x/1.jpg", "x/2.jpg")
    for name in ("x/1.jpg", "x/2.jpg"):
        os.utime(root / name, ns=(10**18, 10**18))
    identity = open_dataset(f"folder:{root}").identity
    assert identity["images"] == 2
    moved = tmp_path / "b"
    root.rename(moved)
    assert open_dataset(f"folder:{moved}").identity == identity
    plant(moved, "x/readme.txt")
    assert open_dataset(f"folder:{moved}").identity == identity
    changes = (
        lambda: os.utime(moved / "x/1.jpg", ns=(10**18, 10**18 + 1)),
        lambda: (moved / "x/2.jpg").write_bytes(b"more"),
        lambda: (moved / "x/2.jpg").rename(moved / "x/3.jpg"),
    )
    seen = {identity["sha256"]}
    for change in changes:
        change()
        seen.add(open_dataset(f"folder:{moved}").identity["sha256"])
    assert len(seen) == 4


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for name in (b"caf\xe9.jpg", b"caf\\xe9.jpg", b"caf\\\xe9.jpg", "café.jpg".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"x")
    dataset = open_dataset(f"folder:{tmp_path}")
    keys = keys_of(dataset)
    assert set(keys) == {r"./caf\xe9.jpg", r"caf\xe9.jpg", r"./caf\\\xe9.jpg", "café.jpg"}
    assert all(key.encode("utf-8") for key in keys)
    for sample in dataset.samples(0, 4):
        assert isinstance(sample.image, Path)
        assert sample.image.read_bytes() == b"x"


@given(st.lists(st.binary(min_size=1, max_size=6), unique=True))
def test_keys_stay_unique(names: list[bytes]) -> None:
    relative = {os.fsdecode(name) for name in names if not name.startswith(b"./")}
    assert len({key_of(name).encode("utf-8") for name in relative}) == len(relative)


NAMES = st.lists(st.sampled_from(["a", "a-b", "a.b", "ab", "B", "0", "a b", "é"]), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(paths=st.lists(NAMES, min_size=1, max_size=20))
def test_order_is_that_of_the_relative_paths(paths: list[list[str]], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = plant(tmp_path_factory.mktemp("tree"), *("/".join(path) + ".jpg" for path in paths))
    expected = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.jpg") if path.is_file())
    assert keys_of(open_dataset(f"folder:{root}")) == expected


def test_memory_per_image_is_that_of_its_path(tmp_path: Path) -> None:
    root = plant(tmp_path, *(f"class{number % 10}/{number:06d}.jpg" for number in range(5000)))
    tracemalloc.start()
    dataset = open_dataset(f"folder:{root}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.rows == 5000
    assert peak / 5000 < 250


def test_unusable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "empty/readme.txt", "file.jpg")
    (tmp_path / "knot").symlink_to("knot")
    wrong = {
        "folder:": "there is no folder",
        f"folder:{tmp_path}/missing": "there is no folder",
        f"folder:{tmp_path}/knot": "there is no folder",
        f"folder:{tmp_path}/file.jpg": "is not a folder",
        f"folder:{tmp_path}/empty": r"no images in .*1 file\(s\) without an image suffix.*\.jpg",
        f"{tmp_path}/empty": f'say "folder:{tmp_path}/empty"',
    }
    for name, words in wrong.items():
        with pytest.raises(ClipmillError, match=words) as caught:
            open_dataset(name)
        assert "--dataset" in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ClipmillError, match=rf"--split test .*folder:{tmp_path}/test"):
        open_dataset(f"folder:{tmp_path}", "test")

    def forbidden(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ClipmillError, match=r"cannot list .*Permission denied"):
        open_dataset(f"folder:{tmp_path}")
