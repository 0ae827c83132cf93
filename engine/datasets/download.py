"""Published files -> checked files in the data folder: whole and with the right checksum, or not there at all.

pooch downloads to a temporary name, compares the checksum and renames. The files land where torchvision looks for
them, so an archive that torchvision once fetched, or that was put there by hand, is taken as it is.
"""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from engine.datasets.unpack import BROKEN_ARCHIVE, unpack
from engine.errors import ClipmillError

DATA_DIR = Path(__file__).resolve().parents[2] / "datasets_cache"
DATA_DIR_VARIABLE = "CLIPMILL_DATA_DIR"
TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Store:
    """Where downloaded datasets lie, and whether what is not there may be downloaded."""

    folder: Path
    download: bool = True


@dataclass(frozen=True)
class Archive:
    """A published file: its path in the data folder, where it is to be had, and what its bytes must be."""

    path: str
    urls: tuple[str, ...]  # of the same file, tried in this order
    md5: str


def open_store(data_dir: Path | None, download: bool) -> Store:
    """The store at `data_dir`, else at $CLIPMILL_DATA_DIR, else in the project's own datasets_cache/."""
    return Store(Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or DATA_DIR).expanduser().absolute(), download)


def fetch(name: str, archive: Archive, store: Store) -> Path:
    """The path of a published file of dataset `name`, downloaded if need be; its checksum is compared every time.

    Raises ClipmillError, saying which file to put where, when it cannot be had; nothing half is left then.
    """
    path = store.folder / archive.path
    try:
        if path.exists() and _md5(path) == archive.md5:
            return path
    except OSError as error:
        raise ClipmillError(f"cannot read {path} ({error.strerror}): make it readable, see --data-dir") from error
    if not store.download:
        state = "is not the published file (its checksum differs)" if path.exists() else "is not there"
        raise ClipmillError(
            f"{name}: {path} {state} and --no-download forbids to fetch it: {_by_hand(archive, store)}, or leave "
            "--no-download out"
        )
    failures = []
    for url in archive.urls:
        failure = _download(name, url, archive.md5, path)
        if failure is None:
            return path
        failures.append(f"{url}: {failure}")
    raise ClipmillError(f"{name} could not be downloaded ({'; '.join(failures)}): {_by_hand(archive, store)}")


def unpacked(name: str, archive: Archive, folder: str, store: Store, anew: bool = False) -> Path:
    """The folder `folder` of the store, unpacked from its archive if it is not there yet, or, with `anew`, anyway.

    It is there only when it is whole. Raises ClipmillError as fetch does, and when the archive cannot be unpacked.
    """
    target = store.folder / folder
    if anew or not target.is_dir():
        path = fetch(name, archive, store)
        try:
            unpack(path, target)
        except BROKEN_ARCHIVE as error:
            raise ClipmillError(
                f"{name}: cannot unpack {path} into {store.folder} ({error}); see --data-dir"
            ) from error
    return target


def damaged(name: str, folder: Path, error: Exception) -> ClipmillError:
    """What to say of an unpacked folder that is not as its archive had it."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ClipmillError(f"{name}: {folder} is not as published ({reason}): remove it, and it is unpacked again")


def missing_extra(name: str, error: ImportError) -> ClipmillError:
    """What to say when a package of the `datasets` extra is not installed."""
    return ClipmillError(f"{name} needs a package that is not installed ({error}): pip install -e '.[datasets]'")


def _by_hand(archive: Archive, store: Store) -> str:
    path = store.folder / archive.path
    return f"put {path.name} from {archive.urls[0]} into {path.parent}, or say with --data-dir where it lies"


def _download(name: str, url: str, md5: str, path: Path) -> str | None:
    """None when `path` now holds the file with this checksum, else why not, in a few words."""
    try:
        import pooch
        import requests
    except ImportError as error:
        raise missing_extra(name, error) from error
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=CHUNK_BYTES,
        timeout=TIMEOUT_SECONDS,
        # Some servers label a .tar.gz as a compressed transfer, and requests would then undo the compression.
        headers={"Accept-Encoding": "identity"},
    )
    try:
        pooch.retrieve(url, known_hash=f"md5:{md5}", fname=path.name, path=path.parent, downloader=downloader)
        path.chmod(path.parent.stat().st_mode & 0o666)  # as readable as its folder; pooch made it private
        return None
    except requests.HTTPError as error:
        return f"the server answered {getattr(error.response, 'status_code', 'with an error')}"
    except (requests.ConnectionError, requests.Timeout) as error:
        return f"no connection ({type(error).__name__})"
    except requests.RequestException as error:
        return f"the connection broke off ({type(error).__name__})"
    except ValueError:  # pooch's word for a checksum that differs; it has removed the file
        return "what came is not the published file, its checksum differs"
    except OSError as error:
        raise ClipmillError(f"cannot write {path} ({error.strerror or error}); see --data-dir") from error


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
