"""wds:PATTERN on damaged tars: nothing that is cut or overwritten vanishes, and the rest is read."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import bad, members, offsets, overwrite, rows, summary, write_tar

from engine.datasets.webdataset import load
from engine.decode import BadImage, decode


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def test_damaged_image_is_a_reject_and_the_rest_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(5))
    clean = summary(rows(load(str(path))))
    overwrite(path, offsets(path)["000002.jpg"] + 512, b"\0" * 400)
    found = rows(load(str(path)))
    assert [sample.key for sample in found] == [key for key, _, _ in clean]
    for sample, expected in zip(found, clean, strict=True):
        if sample.key == "000002":
            with pytest.raises(BadImage):
                decode(sample.image)
        else:
            assert summary([sample]) == [expected]


@pytest.mark.parametrize("damage", [b"\xff" * 512, b"\0" * 512, b"\0" * 200 + b"x"])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_header_is_a_row_and_the_rest_is_read(tmp_path: Path, damage: bytes, kind: int) -> None:
    path = write_tar(tmp_path / "x.tar", members(5), kind)
    clean = rows(load(str(path)))
    where = offsets(path)
    overwrite(path, where["000002.jpg"], damage)
    found = rows(load(str(path)))
    assert [sample.key for sample in found] == [
        "000000", "000001", f"damaged.{where['000002.jpg']}", "000003", "000004",
    ]  # fmt: skip
    assert bad(found[2]) == "corrupt-member"
    message = f"from byte {where['000002.jpg']:,} to {where['000003.cls']:,}"
    assert message in str(found[2].image)
    assert load(str(path)).notes == ("passed over: 1 sample(s) without an image",)
    kept = [*found[:2], *found[3:]]
    assert summary(kept) == summary([*clean[:2], *clean[3:]])

    overwrite(path, where["000004.cls"], damage)
    assert [bad(sample) for sample in rows(load(str(path)))[4:]] == ["corrupt-member", "missing-label"]


@pytest.mark.parametrize("name", ["a", "ü"])
def test_damage_after_an_extended_header(tmp_path: Path, name: str) -> None:
    """The header that a long or non-ASCII name puts in front is sound, the one that it belongs to is not."""
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = [("0.jpg", b"x"), (f"{name * 120}1.jpg", b"y" * 700), ("2.jpg", b"z")]
        path = write_tar(tmp_path / f"{kind}.tar", content, kind)
        start = offsets(path)[f"{name * 120}1.jpg"]
        with tarfile.open(path) as tar:
            header = tar.getmember(f"{name * 120}1.jpg").offset_data - 512
        assert start < header
        overwrite(path, header, b"\xff" * 512)
        found = rows(load(str(path)))
        assert [sample.key for sample in found] == ["0", f"damaged.{start}", "2"]


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 30_000), junk=st.binary(min_size=1, max_size=3000), kind=st.sampled_from([0, 2]))
def test_damage_anywhere_hides_no_sample(
    start: int, junk: bytes, kind: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is overwritten: a header that it touched lies in a stretch that a reject names, all others are read."""
    path = write_tar(tmp_path_factory.mktemp("tar") / "x.tar", members(8), kind)
    content = path.read_bytes()
    assert len(content) > 28_000
    with tarfile.open(path) as tar:
        headers = [(each.offset, each.offset_data) for each in tar if each.name.endswith(".jpg")]
    overwrite(path, start, junk)
    damaged = path.read_bytes()
    if start < 512 and damaged[:512] != content[:512]:
        return  # whether it is still taken for a tar, another test asks
    samples = rows(load(str(path)))
    keys = {sample.key for sample in samples}
    stretches = [
        [int(number.replace(",", "")) for number in re.findall(r"[0-9][0-9,]*", str(sample.image))[:2]]
        for sample in samples
        if sample.key.startswith("damaged.")
    ]
    for number, (header, data) in enumerate(headers):
        if damaged[header:data] == content[header:data] or f"{number:06d}" in keys:
            assert f"{number:06d}" in keys
        else:
            assert any(low <= header < high for low, high in stretches)


def test_first_header_damaged(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(3))
    overwrite(path, 0, b"\xff" * 50)
    assert [sample.key for sample in rows(load(str(path)))] == ["damaged.0", "000000", "000001", "000002"]


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    """Cut anywhere: each sample that lies before the cut is there, and something says that the rest is not."""
    whole = write_tar(tmp_path / "whole.tar", members(3))
    content, where = whole.read_bytes(), offsets(whole)
    clean = rows(load(str(whole)))
    with tarfile.open(whole) as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    last = ends["000002.jpg"]
    for cut in sorted({*range(600, last + 1024, 97), *where.values(), *ends.values(), last + 511}):
        path = tmp_path / "cut.tar"
        path.write_bytes(content[:cut])
        if cut < where["000000.jpg"] + 512:  # not one image
            assert cut <= where["000000.jpg"] or bad(rows(load(str(path)))[0]) == "corrupt-member"
            continue
        dataset = load(str(path))
        found = rows(dataset)
        complete = sum(ends[f"00000{number}.jpg"] <= cut for number in range(3))
        assert summary(found[:complete]) == summary(clean[:complete])
        assert all(bad(sample) == "corrupt-member" for sample in found[complete:])
        assert len(found) > complete or any("end-of-archive" in note for note in dataset.notes) or cut >= last + 512


def test_cut_inside_a_small_member(tmp_path: Path) -> None:
    for content, expected in (
        ([("a.jpg", b"x"), ("b.cls", b"12345")], ["fine", "corrupt-member"]),
        ([("a.jpg", b"x"), ("b.txt", b"words")], ["fine", "corrupt-member"]),
        ([("b.jpg", b"x"), ("b.json", b"12345")], ["corrupt-member"]),
        ([("b.jpg", b"x"), ("b.txt", b"words")], ["fine"]),
    ):
        path = write_tar(tmp_path / "x.tar", content)
        os.truncate(path, offsets(path)[content[1][0]] + 512 + 3)
        dataset = load(str(path))
        assert [bad(each) if isinstance(each.image, BadImage) else "fine" for each in rows(dataset)] == expected
        assert dataset.notes == ("1 tar(s) lack an end-of-archive mark, so they may be cut short",)


def test_many_zeros_at_the_end_are_told(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", members(2))
    os.truncate(path, 3_000_000)
    dataset = load(str(path))
    assert dataset.rows == 2
    assert dataset.notes == ("1 tar(s) end in more zeros than tar writes, so they may be half a download",)


def test_joined_tars_are_read_on(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "a.tar", members(2)).read_bytes()
    (tmp_path / "b.tar").write_bytes(first + write_tar(tmp_path / "c.tar", members(2, first=2)).read_bytes())
    dataset = load(f"{tmp_path}/b.tar")
    assert [sample.key for sample in rows(dataset)] == ["000000", "000001", "000002", "000003"]
    assert dataset.notes == ("1 end-of-archive mark(s) with more behind: read on",)
