"""wds:PATTERN on genuine tars: the plan from the headers, labels, keys, and nothing that is damaged vanishes."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tars import bad, members, photographs, rows, summary, write_tar

from engine.datasets import tar_index
from engine.datasets.webdataset import load
from engine.decode import decode
from engine.errors import ClipmillError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_labels_and_keys(tmp_path: Path, kind: int) -> None:
    content = [(f"{'a long folder name/' * 4}{name}", data) for name, data in members(12)]
    dataset = load(str(write_tar(tmp_path / "train-000.tar", content, kind)))
    expected = photographs(12)
    assert dataset.rows == 12
    assert (dataset.name, dataset.slug) == (f"wds:{tmp_path}/train-000.tar", "wds-train-000")
    assert (dataset.split, dataset.class_names, dataset.notes, dataset.image_size) == ("all", (), (), None)
    found = rows(dataset)
    assert [sample.image for sample in found] == [sample.image for sample in expected]
    assert [sample.label for sample in found] == [sample.label for sample in expected]
    assert dataset.labels().tolist() == [sample.label for sample in expected]
    assert dataset.labels().dtype == np.int64
    assert [sample.key for sample in found] == [f"{'a long folder name/' * 4}{number:06d}" for number in range(12)]
    assert [sample.row for sample in found] == list(range(12))


def test_tars_of_webdatasets_own_writer(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the webdataset library is not installed")
    expected = photographs(6)
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number, photograph in enumerate(expected):
            picture = decode(photograph.image)
            sample = {"__key__": f"sub.dir/{number:04d}", "txt": "a caption", "json": {"label": photograph.label}}
            writer.write({**sample, "left.png": picture, "jpg": photograph.image})
    dataset = load(str(tmp_path / "x.tar"))
    theirs = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    found = rows(dataset)
    assert [sample.key for sample in found] == [sample["__key__"] for sample in theirs]
    assert [sample.image for sample in found] == [sample["jpg"] for sample in theirs]
    assert [sample.label for sample in found] == [json.loads(sample["json"])["label"] for sample in theirs]
    assert dataset.notes == ("6 sample(s) hold more than one image: the first one counts",)


def test_any_range_is_the_slice(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"train-{number:03d}.tar", members(4, first=4 * number))
    dataset = load(str(tmp_path / "train-{000..002}.tar"))
    whole = rows(dataset)
    assert [sample.row for sample in whole] == list(range(12))
    for start in range(13):
        for stop in range(start, 15):
            assert summary(dataset.samples(start, stop)) == summary(whole[start:stop])
    again = load(str(tmp_path / "train-{000..002}.tar"))
    assert (summary(rows(again)), again.identity) == (summary(whole), dataset.identity)


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.jpg", b"x")])
    write_tar(tmp_path / "a{b}*.tar", [("odd.jpg", b"x")])

    def keys(pattern: str) -> list[str]:
        return [sample.key for sample in rows(load(pattern))]

    assert keys(f"{tmp_path}/{{9..11}}.tar") == ["9", "10", "11"]
    assert keys(f"{tmp_path}/{{3,1}}.tar") == ["3", "1"]
    assert keys(f"{tmp_path}/1*.tar") == ["1", "10", "11"]
    assert keys(f"{tmp_path}/a{{b}}*.tar") == ["odd"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    relative = load("[23].tar")
    assert keys("~/{2,3}.tar") == ["2", "3"]
    monkeypatch.chdir("/")
    assert [sample.key for sample in rows(relative)] == ["2", "3"]


def test_keys_that_two_tars_share(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, members(2))
    assert [sample.key for sample in rows(load(f"{tmp_path}/*.tar"))] == [
        "a.tar/000000", "a.tar/000001", "b.tar/000000", "b.tar/000001",
    ]  # fmt: skip
    (tmp_path / "c").mkdir()
    write_tar(tmp_path / "c" / "a.tar", members(1))
    with pytest.raises(ClipmillError, match=r'two tars of one name hold "a.tar/000000": rename one; --dataset'):
        load(f"{tmp_path}/{{a,c/a}}.tar")


def test_labels_good_bad_and_missing(tmp_path: Path) -> None:
    content = [
        ("a.cls", b" 3\n"), ("a.jpg", b"x"),
        ("b.jpg", b"x"),
        ("c.json", b'{"cls": 4, "caption": "x"}'), ("c.jpg", b"x"),
        ("d.cls", b"cat"), ("d.jpg", b"x"),
        ("e.cls", b"-7"), ("e.jpg", b"x"),
        ("f.json", b"{nonsense"), ("f.jpg", b"x"),
        ("g.json", b'{"label": true}'), ("g.jpg", b"x"),
        ("h.cls", b"5"), ("h.json", b'{"label": "name"}'), ("h.jpg", b"x"),
        ("i.json", b"[1]"), ("i.txt", b"7"), ("i.jpg", b"x"),
        ("j.cls", b"1" * 2_000_000), ("j.jpg", b"x"),
        ("k.cls", b"99999999999"), ("k.jpg", b"x"),
        ("l.cls", b"no image here"), ("l.txt", b"x"),
    ]  # fmt: skip
    dataset = load(str(write_tar(tmp_path / "x.tar", content)))
    found = {sample.key: sample.label if sample.label is not None else bad(sample) for sample in rows(dataset)}
    assert found == {
        "a": 3, "b": "missing-label", "c": 4, "d": "bad-label", "e": "bad-label", "f": "bad-label", "g": "bad-label",
        "h": 5, "i": "missing-label", "j": "bad-label", "k": "bad-label",
    }  # fmt: skip
    assert dataset.labels().tolist() == [3, -1, 4, -1, -1, -1, -1, 5, -1, -1, -1]
    bare = load(str(write_tar(tmp_path / "y.tar", [("a.jpg", b"x"), ("a.json", b'{"url": "u"}'), ("b.jpg", b"x")])))
    assert summary(rows(bare)) == [("a", None, b"x"), ("b", None, b"x")]


@pytest.mark.parametrize("where", ["", ".."])
def test_class_names_beside_the_tars(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    content = [("a.cls", b"1"), ("a.jpg", b"x"), ("b.cls", b"2"), ("b.jpg", b"x")]
    write_tar(folder / "0.tar", content)
    before = load(f"{folder}/0.tar").identity
    (folder / where / "classnames.txt").write_text("grey owl\nbärn owl\n", encoding="utf-8")
    dataset = load(f"{folder}/0.tar")
    assert dataset.class_names == ("grey owl", "bärn owl")
    good, outside = rows(dataset)
    assert (good.label, bad(outside)) == (1, "bad-label")
    assert dataset.labels().tolist() == [1, -1]
    assert dataset.identity != before


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("__meta__", "README", ".DS_Store", "a.txt", "b.jpg", "b.webp", "c.JPEG"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for name, kind in (("folder.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE), ("m.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    dataset = load(str(path))
    assert [sample.key for sample in rows(dataset)] == ["b", "c"]
    assert dataset.notes == (
        "1 sample(s) hold more than one image: the first one counts",
        "passed over: 1 sample(s) without an image",
        "passed over: 2 link(s) or other member(s) that are no regular file",
        "passed over: 2 member(s) whose name is not KEY.EXTENSION",
    )


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    content = [(os.fsdecode(b"caf\xe9.jpg"), b"x"), ("café.jpg", b"y")]
    dataset = load(str(write_tar(tmp_path / os.fsdecode(b"t\xe9.tar"), content, tarfile.GNU_FORMAT)))
    assert summary(rows(dataset)) == [(r"./caf\xe9", None, b"x"), ("café", None, b"y")]
    assert all(text.encode("utf-8") for text in (dataset.name, dataset.slug))


def test_index_is_kept_and_rebuilt(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "x.tar", [*members(3), ("a.txt", b"")])
    first = load(str(path))
    (kept,) = cache.rglob("*.index")
    walks = 0
    genuine = tar_index.tar_members

    def counted(*arguments: object) -> object:
        nonlocal walks
        walks += 1
        return genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tar_index, "tar_members", counted)
    again = load(str(path))
    assert (walks, summary(rows(again)), again.notes) == (0, summary(rows(first)), first.notes)
    content = kept.read_bytes()
    for number, damaged in enumerate((b"", b"junk", content[:-1], content[:100] + b"\0" + content[101:]), start=1):
        kept.write_bytes(damaged)
        assert (summary(rows(load(str(path)))), walks) == (summary(rows(first)), number)
        assert kept.read_bytes() == content
    write_tar(path, members(2))
    assert load(str(path)).rows == 2
    assert list(cache.rglob("*.index")) == [kept]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x.tar"))  # a file: nothing can be kept in there
    assert "the index could not be kept in the cache folder: see XDG_CACHE_HOME" in load(str(path)).notes


def test_identity_is_name_size_and_time(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(2))
    os.utime(path, ns=(10**18, 10**18))
    seen = {load(str(path)).identity["sha256"]}
    os.utime(path, ns=(10**18, 10**18 + 1))
    seen.add(load(str(path)).identity["sha256"])
    path = path.rename(tmp_path / "y.tar")
    dataset = load(str(path))
    seen.add(dataset.identity["sha256"])
    assert len(seen) == 3
    write_tar(path, members(1))
    with pytest.raises(ClipmillError, match="changed while it was read"):
        rows(dataset)


def test_a_member_beyond_reason_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    size = 1 << 33
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    with path.open("wb") as file:  # sparse: it takes no room
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + size)
        info = tarfile.TarInfo("b.jpg")
        file.write(info.tobuf() + b"\0" * 1024)
    huge, empty = rows(load(str(path)))
    assert bad(huge) == "too-large"
    assert empty.image == b""


def test_unusable_tars(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", members(1))
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(good.read_bytes()))
    (tmp_path / "photo.tar").write_bytes(members(1)[1][1])
    (tmp_path / "zero.tar").touch()
    write_tar(tmp_path / "empty.tar", [("a.txt", b"x")])
    write_tar(tmp_path / "twice.tar", [("a.jpg", b"x"), ("a.JPG", b"x")])
    write_tar(tmp_path / "apart.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"1")])
    (tmp_path / "folder").mkdir()
    wrong = {
        "": "there is no file",
        f"{tmp_path}/missing.tar": "there is no file",
        f"{tmp_path}/{{good,missing}}.tar": r'there is no file ".*missing\.tar"',
        f"{tmp_path}/none-*.tar": "there is no file",
        f"{tmp_path}/{{good.tar": "unbalanced braces",
        f"{tmp_path}/{{good,good}}.tar": "names .*good.tar twice",
        f"{tmp_path}/folder": r'is a folder; .*"wds:.*/folder/\*\.tar"',
        f"{tmp_path}/packed.tar.gz": r"compressed \(gzip\): decompress it",
        f"{tmp_path}/photo.tar": "no tar archive",
        f"{tmp_path}/zero.tar": "no images in",
        f"{tmp_path}/empty.tar": r"no images in .*1 sample\(s\) without an image",
        f"{tmp_path}/twice.tar": r"holds a\.jpg twice",
        f"{tmp_path}/apart.tar": r'the members of sample "a" in .* do not lie together',
    }
    for path, words in wrong.items():
        with pytest.raises(ClipmillError, match=words) as caught:
            load(path)
        assert "--dataset" in str(caught.value)
        assert "\n" not in str(caught.value)


READ_ALL = """
import sys
from engine.datasets.webdataset import load
def peak():
    # of this program alone: getrusage() would count what the process that started it held
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
dataset = load(sys.argv[1])
read = sum(len(sample.image) for sample in dataset.samples(0, dataset.rows))
print(dataset.rows, read, peak(), "torch" in sys.modules or "webdataset" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """20 MB in one tar, and 2 GB in a hundred links to it (benchmarks/memory.py: 1 GB, embedded)."""
    write_tar(tmp_path / "000.tar", [(f"{number}.jpg", os.urandom(1 << 20)) for number in range(20)])
    for number in range(1, 100):
        os.link(tmp_path / "000.tar", tmp_path / f"{number:03d}.tar")
    peaks = []
    for pattern, count in (("000.tar", 1), ("{000..099}.tar", 100)):
        command = [sys.executable, "-c", READ_ALL, f"{tmp_path}/{pattern}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        images, read, peak, heavy = done.stdout.split()
        assert (int(images), int(read), heavy) == (20 * count, 20 * count << 20, "False")
        peaks.append(int(peak))
    assert peaks[1] < 1.05 * peaks[0]


def test_the_index_takes_less_than_a_hundred_bytes_a_row(tmp_path: Path) -> None:
    count = 20_000
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        for number in range(count):
            info = tarfile.TarInfo(f"class/{number:09d}.jpg")
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(b"\0" * 1024)
    index, _ = tar_index.index_tar(str(path))
    assert index.rows.num_rows == count
    assert index.rows.get_total_buffer_size() / count < 75
