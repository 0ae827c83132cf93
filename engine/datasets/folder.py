"""folder:PATH: the images under a folder, in the order of their relative paths; first-level subfolders are the classes.

The walk goes depth first through sorted names, a folder sorted as "name/", which is exactly the order of the relative
POSIX paths: nothing is sorted as a whole, and a row costs the memory of its path (about 100 bytes). Links are followed,
save those that lead back to a folder above. Whatever has an image's suffix is a row, even a dangling link: what cannot
be read becomes a reject, not a gap. All else is counted in the notes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from engine.datasets.sources import UNKNOWN, file_name_safe, files_digest, label_or_problem, source_name
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.decode import IMAGE_SUFFIXES, BadImage
from engine.errors import ClipmillError

INFO = DatasetInfo(
    name="folder:PATH",
    what="images under a folder, recursively; its first-level subfolders are the classes",
    splits={"all": None},
    classes=None,
    image_size=None,
    source="your own files",
)

NO_SUFFIX = "file(s) without an image suffix"
HIDDEN = "hidden file(s) or folder(s)"
LOOP = "link(s) back to a folder above"


def load(path: str) -> Dataset:
    """Open the folder `path` ("~" stands for the home folder) as the one split "all".

    The class names are the subfolders that hold images, sorted. An image directly in the folder has no label, which
    makes it a reject where there are classes.
    Raises ClipmillError when the path is no readable folder or when there is no image in it.
    """
    root = _root(path)
    passed_over: Counter[str] = Counter()
    images = list(_walk(root, passed_over))
    notes = tuple(f"passed over: {count} {what}" for what, count in sorted(passed_over.items()))
    if not images:
        reason = f" ({'; '.join(notes)})" if notes else ""
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise ClipmillError(f"no images in {root}{reason}; --dataset folder:PATH looks for {suffixes}")
    classes = sorted({relative.partition("/")[0] for relative in images if "/" in relative})
    labels = {name: label for label, name in enumerate(classes)}
    return Dataset(
        name=source_name("folder", path),
        slug=f"folder-{file_name_safe(root.name)}",
        split="all",
        class_names=tuple(key_of(name) for name in classes),
        rows=len(images),
        image_size=None,
        identity={"images": len(images), "sha256": files_digest((name, f"{root}/{name}") for name in images)},
        samples=partial(_samples, root, images, labels),
        labels=lambda: np.array([_label(relative, labels) for relative in images], dtype=np.int64),
        notes=notes,
    )


def key_of(relative: str) -> str:
    r"""A relative path as a key: itself where it is valid UTF-8, else "./" and the path, each stray byte as \xNN.

    In the second form a backslash is doubled, and no path of the first form begins with "./", so keys stay unique.
    """
    try:
        relative.encode("utf-8")
    except UnicodeEncodeError:
        doubled = relative.replace("\\", "\\\\")
        return "./" + os.fsencode(doubled).decode("utf-8", "backslashreplace")
    return relative


def _samples(root: Path, images: list[str], labels: Mapping[str, int], start: int, stop: int) -> Iterator[Sample]:
    for row in range(start, min(stop, len(images))):
        relative = images[row]
        label = label_or_problem(_label(relative, labels), len(labels), bool(labels))
        if isinstance(label, BadImage):
            yield Sample(row, key_of(relative), "all", None, label)
        else:
            yield Sample(row, key_of(relative), "all", label, root / relative)


def _label(relative: str, labels: Mapping[str, int]) -> int:
    name, slash, _ = relative.partition("/")
    return labels[name] if slash else UNKNOWN


def _root(path: str) -> Path:
    # os.path and not Path: these answer, rather than raise, for a loop of links and for a folder we may not enter.
    root = Path(os.path.realpath(os.path.expanduser(path)))
    if not path or not os.path.exists(root):
        raise ClipmillError(f'there is no folder "{path}"; --dataset folder:PATH takes the path of a folder of images')
    if not os.path.isdir(root):
        raise ClipmillError(f"{root} is not a folder; --dataset folder:PATH takes the path of a folder of images")
    return root


def _walk(root: Path, passed_over: Counter[str]) -> Iterator[str]:
    """Relative POSIX paths of the images under root, sorted; counts what it passes over."""
    above = [_device_and_inode(root)]
    pending = [iter(_entries(root, "", passed_over))]
    while pending:
        relative = next(pending[-1], None)
        if relative is None:
            pending.pop()
            above.pop()
        elif not relative.endswith("/"):
            yield relative
        elif (folder := _device_and_inode(root / relative)) in above:
            passed_over[LOOP] += 1
        else:
            above.append(folder)
            pending.append(iter(_entries(root, relative, passed_over)))


def _entries(root: Path, prefix: str, passed_over: Counter[str]) -> list[str]:
    found = []
    try:
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                # os.path.isdir, unlike entry.is_dir, answers for a link to itself too.
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                if entry.name.startswith("."):
                    passed_over[HIDDEN] += 1
                elif is_folder:
                    found.append(f"{prefix}{entry.name}/")
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    found.append(f"{prefix}{entry.name}")
                else:
                    passed_over[NO_SUFFIX] += 1
    except OSError as error:
        raise _cannot_list(root / prefix, error) from error
    found.sort()
    return found


def _device_and_inode(folder: Path) -> tuple[int, int]:
    try:
        status = folder.stat()
    except OSError as error:
        raise _cannot_list(folder, error) from error
    return status.st_dev, status.st_ino


def _cannot_list(folder: Path, error: OSError) -> ClipmillError:
    # Not a note: how many images are lost in there, nobody could say.
    return ClipmillError(
        f"cannot list {folder} ({error.strerror}): make it readable, or point --dataset folder: elsewhere"
    )
