"""What the sources that read files share: names and identity of the files, unique keys, and labels that can be."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.decode import BadImage
from engine.errors import ClipmillError

UNKNOWN = -1  # a label that the source does not know; Hugging Face's unlabelled test splits say it so too
LARGEST_LABEL = np.iinfo(np.int32).max  # what a shard's column holds


def source_name(scheme: str, path: str) -> str:
    """The source as the user named it, in valid UTF-8."""
    return f"{scheme}:{path}".encode("utf-8", "backslashreplace").decode("utf-8")


def source_slug(scheme: str, path: str) -> str:
    """The source's name, safe in a file name: "wds-train-000..012" of "wds:tars/train-{000..012}.tar"."""
    return f"{scheme}-{file_name_safe(os.path.splitext(os.path.basename(path.rstrip('/')))[0])}"


def file_name_safe(name: str) -> str:
    """A name without what some file system would not take."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:64] or "images"


def one_file(scheme: str, path: str) -> str:
    """The absolute path of a source that is one file, "~" expanded; ClipmillError when there is none."""
    found = os.path.abspath(os.path.expanduser(path))
    if not path or not os.path.exists(found):
        raise ClipmillError(f'there is no file "{path}"; --dataset {scheme}: takes the path of a file')
    if not os.path.isfile(found):
        raise ClipmillError(f"{found} is not a file; --dataset {scheme}: takes the path of a file")
    return found


def matching_files(pattern: str) -> list[str]:
    """The files that a path or a glob pattern names, sorted; "**" goes into subfolders."""
    if os.path.isfile(pattern):  # whatever characters its name has
        return [pattern]
    return sorted(name for name in glob.iglob(pattern, recursive=True) if os.path.isfile(name))


def files_digest(files: Iterable[tuple[str, str]]) -> str:
    """sha256 over the name, size and modification time of (name, path) pairs; a file that is not there counts too."""
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = os.stat(path)
            size, mtime_ns = status.st_size, status.st_mtime_ns
        except OSError:
            size, mtime_ns = -1, -1
        digest.update(os.fsencode(name) + b"\0%d %d\0" % (size, mtime_ns))
    return digest.hexdigest()


def first_duplicate(keys: Callable[[], Iterator[str]]) -> str | None:
    """The first key that comes a second time, or None. Goes through `keys()` twice at most, 8 bytes a key."""
    hashes = np.fromiter((hash(key) for key in keys()), dtype=np.int64)
    hashes.sort()
    repeated = {int(value) for value in hashes[1:][hashes[1:] == hashes[:-1]]}
    if not repeated:
        return None
    seen = set()
    for key in keys():
        if hash(key) in repeated:
            if key in seen:
                return key
            seen.add(key)
    return None


def label_or_problem(label: int, classes: int, labelled: bool) -> int | BadImage | None:
    """A row's label, None where nothing has one, or what is wrong with it.

    `classes` is the length of the class list, 0 when there is none; `labelled` says that some row has a label.
    """
    if label == UNKNOWN:
        return BadImage("missing-label", "has no label, though others have one") if labelled else None
    if not 0 <= label <= LARGEST_LABEL:
        return BadImage("bad-label", f"label {label} is no class number")
    if classes and label >= classes:
        return BadImage("bad-label", f"label {label} is outside the class list, which ends at {classes - 1}")
    return label


def known_labels(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Labels (rows,) int64, with UNKNOWN for each that label_or_problem would not let pass."""
    limit = classes or LARGEST_LABEL + 1
    return np.where((labels >= 0) & (labels < limit), labels, UNKNOWN)


def names_to_labels(names: Sequence[str], codes: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and labels (rows,) of rows that say their class in words; `codes` index `names`, UNKNOWN is kept.

    Where every name is an integer, these are the labels, and there are no class names; else the names are, sorted.
    """
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in names):
        class_names: tuple[str, ...] = ()
        values = [int(name) for name in names]
    else:
        class_names = tuple(sorted(names))
        order = {name: label for label, name in enumerate(class_names)}
        values = [order[name] for name in names]
    # UNKNOWN, -1, takes the last of these
    return class_names, np.array([*values, UNKNOWN], dtype=np.int64)[codes]
