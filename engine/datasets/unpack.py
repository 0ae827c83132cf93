"""A tar or zip file -> a folder that appears when it is whole; nothing is ever written outside it.

Only plain files and folders are unpacked, under names that stay inside: without links, and with every name checked
before its file is opened, no member can lead out. One that tries condemns the whole archive.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Generator
from contextlib import closing
from pathlib import Path, PureWindowsPath
from typing import IO

from engine.errors import ClipmillError

# What reading a damaged archive, and writing what it holds, raise.
BROKEN_ARCHIVE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


def unpack(archive: Path, folder: Path) -> None:
    """Make the archive's top folder of the name `folder.name` into `folder`, replacing what was there.

    Raises ClipmillError for a member that is a link or a device or whose name leads out of the archive, and when there
    is no such top folder; one of BROKEN_ARCHIVE when reading or writing fails. Then `folder` is as it was.
    """
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        # A folder of its own inside: a temporary one is private, this one has the usual permissions.
        inside = Path(temporary, "unpacked")
        inside.mkdir()
        with closing(_members(archive)) as members:
            for name, file in members:
                _write(inside / _checked(name, archive), file)
        whole = inside / folder.name
        if not whole.is_dir():
            raise ClipmillError(f"{archive} holds no folder {folder.name}: remove it, or see --data-dir")
        os.sync()  # the new name must not outlive a power cut that the files do not
        if folder.exists():
            folder.rename(Path(temporary, "replaced"))
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process came first, with the same files
                raise


def _members(archive: Path) -> Generator[tuple[str, IO[bytes] | None], None, None]:
    """Name and contents of each member, None for a folder; ClipmillError for anything else."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zip_file:
            for info in zip_file.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: written where there are no such kinds
                    raise _hostile(archive, info.filename)
                if info.is_dir():
                    yield info.filename, None
                else:
                    with zip_file.open(info) as file:
                        yield info.filename, file
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise _hostile(archive, member.name)
            yield member.name, tar.extractfile(member)
            tar.members.clear()  # type: ignore[attr-defined]  # or it would grow by 101,000 members


def _checked(name: str, archive: Path) -> str:
    # By Windows' rules, which know both slashes and drives: what stays inside there stays inside everywhere.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "\0" in name:
        raise _hostile(archive, name)
    return name


def _hostile(archive: Path, name: str) -> ClipmillError:
    return ClipmillError(
        f"{archive} is not unpacked: its member {name!r} is a link or a device, or leads out of the folder; remove "
        "that file, and put the published one there or in another --data-dir"
    )


def _write(target: Path, file: IO[bytes] | None) -> None:
    if file is None:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        shutil.copyfileobj(file, out)
