"""Published files arrive whole and checked or not at all, and unpacking them writes nowhere else."""

from __future__ import annotations

import io
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from archives import CutOff, everything, md5, serving

from engine.datasets import download
from engine.datasets.download import Archive, Store, fetch, open_store, unpacked
from engine.datasets.unpack import BROKEN_ARCHIVE, unpack
from engine.errors import ClipmillError

CONTENT = bytes(range(256)) * 9000  # more than two chunks


@pytest.fixture
def published(tmp_path: Path) -> Path:
    file = tmp_path / "published" / "things.tar.gz"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    return file


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "data").mkdir()
    return Store(tmp_path / "data")


def refusal(archive: Archive, store: Store) -> str:
    with pytest.raises(ClipmillError) as caught:
        fetch("things", archive, store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFetch:
    def test_a_file_is_downloaded_once(self, published: Path, store: Store) -> None:
        pytest.importorskip("pooch")
        with serving(published.parent) as url:
            archive = Archive("deep/things.tar.gz", (f"{url}/{published.name}",), md5(published))
            path = fetch("things", archive, store)
        assert path == store.folder / "deep" / "things.tar.gz"
        assert path.read_bytes() == CONTENT
        assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o666
        assert fetch("things", archive, store) == path  # the server is gone
        assert everything(store.folder) == {"deep", "deep/things.tar.gz"}

    def test_what_is_there_needs_no_package_and_no_permission(
        self, published: Path, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        archive = Archive("things.tar.gz", ("http://localhost:1/x",), md5(published))
        monkeypatch.setitem(sys.modules, "pooch", None)
        assert "pip install -e '.[datasets]'" in refusal(archive, store)
        (store.folder / "things.tar.gz").write_bytes(CONTENT)
        assert fetch("things", archive, Store(store.folder, download=False)).read_bytes() == CONTENT

    def test_a_wrong_checksum_leaves_nothing(self, published: Path, store: Store) -> None:
        pytest.importorskip("pooch")
        with serving(published.parent) as url:
            message = refusal(Archive("things.tar.gz", (f"{url}/{published.name}",), "0" * 32), store)
        assert "checksum differs" in message
        assert f"put things.tar.gz from {url}/{published.name} into {store.folder}" in message
        assert everything(store.folder) == set()

    def test_a_connection_that_breaks_leaves_nothing(self, published: Path, store: Store) -> None:
        pytest.importorskip("pooch")
        with serving(published.parent, CutOff) as url:
            message = refusal(Archive("things.tar.gz", (f"{url}/{published.name}",), md5(published)), store)
        assert message.startswith("things could not be downloaded (")
        assert "--data-dir" in message
        assert everything(store.folder) == set()

    def test_without_a_network_the_message_says_what_to_do(self, published: Path, store: Store) -> None:
        pytest.importorskip("pooch")
        with serving(published.parent) as url:
            pass
        message = refusal(Archive("things.tar.gz", (f"{url}/things.tar.gz",), md5(published)), store)
        assert "no connection" in message
        assert f"put things.tar.gz from {url}/things.tar.gz into {store.folder}, or say with --data-dir" in message

    def test_a_terminal_sees_progress_and_a_pipe_does_not(
        self, published: Path, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("pooch")
        pytest.importorskip("tqdm")
        for is_terminal in (True, False):
            stderr = io.StringIO()
            stderr.isatty = lambda is_terminal=is_terminal: is_terminal  # type: ignore[method-assign]
            monkeypatch.setattr(sys, "stderr", stderr)
            with serving(published.parent) as url:
                fetch("things", Archive(f"{is_terminal}", (f"{url}/{published.name}",), md5(published)), store)
            assert ("100%" in stderr.getvalue()) == is_terminal

    def test_a_folder_that_cannot_be_written(self, published: Path, tmp_path: Path) -> None:
        pytest.importorskip("pooch")
        (tmp_path / "file").touch()
        with serving(published.parent) as url:
            archive = Archive("things.tar.gz", (f"{url}/{published.name}",), md5(published))
            assert "--data-dir" in refusal(archive, Store(tmp_path / "file"))

    def test_mirrors_are_tried_in_turn(self, published: Path, store: Store) -> None:
        pytest.importorskip("pooch")
        with serving(published.parent) as url:
            missing, there = f"{url}/no-such-file", f"{url}/{published.name}"
            assert "the server answered 404" in refusal(Archive("a.gz", (missing,), md5(published)), store)
            assert fetch("things", Archive("a.gz", (missing, there), md5(published)), store).read_bytes() == CONTENT

    def test_a_file_that_is_not_the_published_one_is_replaced(self, published: Path, store: Store) -> None:
        pytest.importorskip("pooch")
        (store.folder / "things.tar.gz").write_bytes(CONTENT[:1000])
        with serving(published.parent) as url:
            archive = Archive("things.tar.gz", (f"{url}/{published.name}",), md5(published))
            message = refusal(archive, Store(store.folder, download=False))
            assert "things.tar.gz is not the published file (its checksum differs)" in message
            assert fetch("things", archive, store).read_bytes() == CONTENT

    def test_no_download_says_which_file_to_put_where(self, store: Store) -> None:
        archive = Archive("deep/things.tar.gz", ("http://localhost:1/things.tar.gz", "http://other/"), "0" * 32)
        message = refusal(archive, Store(store.folder, download=False))
        put = f"put things.tar.gz from http://localhost:1/things.tar.gz into {store.folder / 'deep'}"
        assert put in message
        assert "--no-download" in message
        assert "--data-dir" in message
        assert everything(store.folder) == set()


def test_where_data_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIPMILL_DATA_DIR", raising=False)
    assert open_store(None, True) == Store(Path(__file__).parents[1].resolve() / "datasets_cache", True)
    monkeypatch.setenv("CLIPMILL_DATA_DIR", str(tmp_path / "a"))
    assert open_store(None, False) == Store(tmp_path / "a", False)
    assert open_store(tmp_path / "b", True).folder == tmp_path / "b"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert open_store(Path("~/c"), True).folder == open_store(Path("c"), True).folder == tmp_path / "c"


def write_zip(path: Path, members: dict[str, str], links: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
        for name in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            file.writestr(info, "..")
    return path


def write_tar(path: Path, members: dict[str, str], links: tuple[str, ...] = (), kind: bytes = tarfile.SYMTYPE) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, ".."
            file.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content.encode()))
    return path


GOOD = {f"things/{number}/a.txt": str(number) for number in range(150)} | {"things/b.txt": "b", "aside/c.txt": "c"}


class TestUnpack:
    @pytest.mark.parametrize("write", [write_zip, write_tar])
    def test_the_top_folder_appears_with_all_that_is_in_it(self, write: object, tmp_path: Path) -> None:
        archive = write(tmp_path / "archive", GOOD)  # type: ignore[operator]
        (tmp_path / "data" / "things").mkdir(parents=True)
        (tmp_path / "data" / "things" / "old").touch()
        unpack(archive, tmp_path / "data" / "things")
        found = {path.relative_to(tmp_path / "data").as_posix(): path for path in (tmp_path / "data").rglob("*.txt")}
        assert {name: path.read_text() for name, path in found.items()} == {
            name: content for name, content in GOOD.items() if name.startswith("things/")
        }
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["things"]
        assert not (tmp_path / "data" / "things" / "old").exists()
        assert (tmp_path / "data" / "things").stat().st_mode == (tmp_path / "data").stat().st_mode

    @pytest.mark.parametrize("write", [write_zip, write_tar])
    @pytest.mark.parametrize(
        "name", ["../evil", "things/../../evil", "{outside}/evil", "..\\evil", "\\evil", "C:\\evil", "C:evil"]
    )
    def test_a_name_that_leads_out_condemns_the_archive(self, write: object, name: str, tmp_path: Path) -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "data").mkdir()
        members = {"things/good.txt": "good", name.format(outside=tmp_path / "outside"): "evil"}
        archive = write(tmp_path / "data" / "archive", members)  # type: ignore[operator]
        with pytest.raises(ClipmillError, match=r"is not unpacked: its member .*evil"):
            unpack(archive, tmp_path / "data" / "things")
        assert everything(tmp_path) == {"outside", "data", "data/archive"}

    @pytest.mark.parametrize("kind", ["zip", "symbolic", "hard", "device", "pipe"])
    def test_a_link_or_a_device_condemns_the_archive(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        path, members = tmp_path / "data" / "archive", {"things/link/evil": "evil"}
        types = {
            "symbolic": tarfile.SYMTYPE,
            "hard": tarfile.LNKTYPE,
            "device": tarfile.CHRTYPE,
            "pipe": tarfile.FIFOTYPE,
        }
        if kind == "zip":
            write_zip(path, members, ("things/link",))
        else:
            write_tar(path, members, ("things/link",), types[kind])
        with pytest.raises(ClipmillError, match="is a link or a device"):
            unpack(path, tmp_path / "data" / "things")
        assert everything(tmp_path) == {"data", "data/archive"}

    @pytest.mark.parametrize("write", [write_zip, write_tar])
    def test_a_broken_archive_leaves_what_was_there(self, write: object, tmp_path: Path) -> None:
        (tmp_path / "data" / "things").mkdir(parents=True)
        (tmp_path / "data" / "things" / "old").touch()
        archive = write(tmp_path / "archive", GOOD)  # type: ignore[operator]
        archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
        with pytest.raises(BROKEN_ARCHIVE):
            unpack(archive, tmp_path / "data" / "things")
        assert everything(tmp_path / "data") == {"things", "things/old"}

    def test_an_archive_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(ClipmillError, match="holds no folder things"):
            unpack(write_zip(tmp_path / "archive", {"other/a": "a", "things": "a file"}), tmp_path / "things")
        assert everything(tmp_path) == {"archive"}

    def test_what_is_unpacked_is_not_unpacked_again(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_tar(store.folder / "things.tar.gz", GOOD)
        archive = Archive(path.name, ("http://localhost:1/",), md5(path))
        closed = Store(store.folder, download=False)
        folder = unpacked("things", archive, "things", closed)
        path.unlink()
        monkeypatch.setattr(download, "unpack", lambda *_: pytest.fail("unpacked again"))
        assert unpacked("things", archive, "things", closed) == folder == store.folder / "things"
        with pytest.raises(ClipmillError, match="--no-download"):
            unpacked("things", archive, "things", closed, anew=True)

    def test_a_disk_error_is_one_line(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_tar(store.folder / "things.tar.gz", GOOD)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(download, "unpack", full)
        with pytest.raises(ClipmillError, match=r"cannot unpack .*No space left on device.*--data-dir"):
            unpacked("things", Archive(path.name, ("http://localhost:1/",), md5(path)), "things", store)
