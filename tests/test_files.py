"""Files and folders that are either whole or as they were, JSON, and digests."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from pathlib import Path

import pytest

from engine import files
from engine.errors import ClipmillError
from engine.files import atomic_file, atomic_folder, read_json, sha256_file, sha256_json, write_json

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_file_is_whole_or_as_it_was(error: BaseException, tmp_path: Path) -> None:
    def write(path: Path, text: str, fails: bool) -> None:
        with atomic_file(path) as temporary:
            temporary.write_text(text)
            if fails:
                raise error

    path = tmp_path / "new" / "folder" / "file.txt"
    with pytest.raises(type(error)):
        write(path, "half", fails=True)
    assert names_in(path.parent) == []
    write(path, "whole", fails=False)
    assert path.read_text() == "whole"
    with pytest.raises(type(error)):
        write(path, "half", fails=True)
    assert path.read_text() == "whole"
    assert names_in(path.parent) == ["file.txt"]
    write(path, "newer", fails=False)
    assert path.read_text() == "newer"
    assert names_in(path.parent) == ["file.txt"]


@needs_proc
def test_a_file_has_no_name_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def fsync_seen(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def replace_seen(source: Path, target: Path) -> None:
        calls.append(f"replace {target.name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync_seen)
    monkeypatch.setattr(files.os, "replace", replace_seen)
    with atomic_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
        name = temporary.name
        assert not (tmp_path / "file.txt").exists()
    assert calls == [f"fsync {name}", "replace file.txt", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_folder_is_whole_or_as_it_was(error: BaseException, tmp_path: Path) -> None:
    def write(path: Path, name: str, fails: bool) -> None:
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
            (temporary / "common").write_text(name)
            assert not (path / name).exists()
            if fails:
                raise error

    path = tmp_path / "models" / "mini"
    with pytest.raises(type(error)):
        write(path, "half", fails=True)
    assert names_in(tmp_path / "models") == []
    write(path, "first", fails=False)
    assert names_in(path) == ["common", "first"]
    with pytest.raises(type(error)):
        write(path, "half", fails=True)
    assert names_in(path) == ["common", "first"]
    write(path, "second", fails=False)
    assert names_in(path) == ["common", "second"]  # replaced, not merged
    assert (path / "common").read_text() == "second"
    assert names_in(tmp_path / "models") == ["mini"]


def test_files_and_folders_have_the_modes_that_others_expect(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "file").touch()
        write_json(tmp_path / "file.json", {})
        assert os.umask(0o027) == 0o027  # it was only looked at
    finally:
        os.umask(mask)
    assert oct((tmp_path / "folder").stat().st_mode & 0o777) == "0o750"
    assert oct((tmp_path / "file.json").stat().st_mode & 0o777) == "0o640"


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "below" / "x.json"
    with pytest.raises(ClipmillError) as raised:
        write_json(target, {})
    assert str(raised.value) == f"cannot write {target}: {os.strerror(errno.ENOTDIR)}; see --output"


def test_json_keeps_its_order_and_its_letters(tmp_path: Path) -> None:
    value = {"zebra": "Zeisig ✓", "ant": [1, 2.5, None, True], "nested": {"b": 1, "a": 2}}
    write_json(tmp_path / "x.json", value)
    read = read_json(tmp_path / "x.json")
    assert read == value
    assert list(read) == ["zebra", "ant", "nested"]
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "Zeisig ✓" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe{}"])
def test_what_is_no_json_object_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ClipmillError, match=r"cannot read .*x\.json: ") as raised:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(raised.value)


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    assert sha256_json({"b": [1, None], "a": "ü"}) == hashlib.sha256(b'{"a":"\\u00fc","b":[1,null]}').hexdigest()
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 2, "b": 1})
    with pytest.raises(ClipmillError, match=r"cannot read .*: No such file"):
        sha256_file(tmp_path / "missing")
