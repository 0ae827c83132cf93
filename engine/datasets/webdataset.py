"""wds:PATTERN: webdataset tars. Their headers make the plan; an image is read from its place when its row comes.

Nothing is extracted, and memory is one image and the index (engine/datasets/tar_index.py): about 40 bytes and its key
for each sample. The pattern takes braces ("train-{000..012}.tar") and globs. A label is the integer in a sample's .cls,
or "label" or "cls" in its .json; .txt members are captions and no labels. Class names come from a `classnames.txt`, one
a line, in the folder of the tars or the one above, as CLIP_benchmark lays them out.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import pyarrow as pa
from braceexpand import braceexpand
from numpy.typing import NDArray

from engine.datasets.folder import key_of
from engine.datasets.sources import (
    UNKNOWN,
    files_digest,
    first_duplicate,
    known_labels,
    label_or_problem,
    matching_files,
    source_name,
    source_slug,
)
from engine.datasets.tar_index import TarIndex, index_tar
from engine.datasets.types import Dataset, DatasetInfo, Sample
from engine.decode import BadImage
from engine.errors import ClipmillError
from engine.files import sha256_json

INFO = DatasetInfo(
    name="wds:PATTERN",
    what='webdataset tars, uncompressed: "wds:train-{000..012}.tar"; images with .cls or .json labels',
    splits={"all": None},
    classes=None,
    image_size=None,
    source="your own files",
)

CLASS_NAMES = "classnames.txt"
MAX_IMAGE_BYTES = 1 << 28  # what the largest image that is decoded takes as pixels: no member is read beyond that


@dataclass(frozen=True)
class Source:
    """What `load` found out."""

    tars: tuple[TarIndex, ...]
    firsts: tuple[int, ...]  # the source's row at which each tar begins, and the number of rows
    class_names: tuple[str, ...]
    labelled: bool
    long_keys: bool  # whether keys begin with the tar's name

    def key(self, tar: TarIndex, key: str) -> str:
        return f"{key_of(os.path.basename(tar.path))}/{key}" if self.long_keys else key

    def keys(self) -> Iterator[str]:
        return (self.key(tar, str(key)) for tar in self.tars for key in tar.rows.column("key"))


def load(path: str) -> Dataset:
    """Open the tars that the pattern `path` names, in its order, as the one split "all".

    A key is the sample's own, or "TAR/KEY" where two tars have the same. Raises ClipmillError when a tar is missing,
    compressed or no tar, when there is no image in any of them, or a key comes twice.
    """
    files = _files(path)
    tars, kept = [], True
    for file in files:
        tar, tar_kept = index_tar(file)
        tars.append(tar)
        kept = kept and tar_kept
    counts = sum((tar.notes for tar in tars), Counter[str]())
    notes = sorted(note.format(count) for note, count in counts.items() if count)
    firsts = tuple(accumulate((tar.rows.num_rows for tar in tars), initial=0))
    if not firsts[-1]:
        reason = f" ({'; '.join(notes)})" if notes else ""
        raise ClipmillError(
            f"no images in {files[0]}{' and the others' * (len(files) > 1)}{reason}; see --dataset wds:"
        )
    class_names_file, class_names = _class_names(files)
    if class_names_file:
        notes.append(f"class names from {class_names_file}")
    if not kept:
        notes.append("the index could not be kept in the cache folder: see XDG_CACHE_HOME")
    labelled = any((_numbers(tar, "label") != UNKNOWN).any() or "bad-label" in _errors(tar) for tar in tars)
    source = Source(tuple(tars), firsts, class_names, labelled, long_keys=False)
    if len(tars) > 1 and first_duplicate(source.keys) is not None:
        source = Source(tuple(tars), firsts, class_names, labelled, long_keys=True)
        if (twice := first_duplicate(source.keys)) is not None:
            raise ClipmillError(f'two tars of one name hold "{twice}": rename one; --dataset wds: needs unique keys')
    identity = {
        "images": firsts[-1],
        "sha256": files_digest((os.path.basename(file), file) for file in files),
        **({"class_names": sha256_json(class_names)} if class_names_file else {}),
    }
    return Dataset(
        name=source_name("wds", path),
        slug=source_slug("wds", path),
        split="all",
        class_names=class_names,
        rows=firsts[-1],
        image_size=None,
        identity=identity,
        samples=partial(_samples, source),
        labels=partial(_labels, source),
        notes=tuple(notes),
    )


def _samples(source: Source, start: int, stop: int) -> Iterator[Sample]:
    start = max(start, 0)
    stop = min(stop, source.firsts[-1])
    for number in range(bisect_right(source.firsts, start) - 1, len(source.tars)):
        tar, first = source.tars[number], source.firsts[number]
        if first >= stop:
            return
        yield from _tar_samples(source, tar, first, max(start - first, 0), min(stop - first, tar.rows.num_rows))


def _tar_samples(source: Source, tar: TarIndex, first: int, low: int, high: int) -> Iterator[Sample]:
    keys, errors, messages = (tar.rows.column(name) for name in ("key", "error", "message"))
    offsets, sizes, labels = (_numbers(tar, name) for name in ("offset", "size", "label"))
    try:
        # no buffer: an image is read at once, and what follows it belongs to another
        with open(tar.path, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (tar.size, tar.mtime_ns):
                raise ClipmillError(f"{tar.path} changed while it was read; run again")
            for position in range(low, high):
                key = source.key(tar, str(keys[position]))
                label: int | BadImage | None
                if (error := errors[position].as_py()) is not None:
                    label = BadImage(error, messages[position].as_py())
                else:
                    label = label_or_problem(int(labels[position]), len(source.class_names), source.labelled)
                if isinstance(label, BadImage):
                    yield Sample(first + position, key, "all", None, label)
                else:
                    image = _read(file.fileno(), int(offsets[position]), int(sizes[position]))
                    yield Sample(first + position, key, "all", label, image)
    except OSError as error:
        raise ClipmillError(f"cannot read {tar.path} ({error.strerror or error}); see --dataset wds:") from error


def _read(descriptor: int, offset: int, size: int) -> bytes | BadImage:
    if size > MAX_IMAGE_BYTES:
        return BadImage("too-large", f"{size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
    try:
        content = os.pread(descriptor, size, offset)
    except OSError as error:
        return BadImage("unreadable", os.strerror(error.errno or 0))
    if len(content) < size:
        return BadImage("corrupt-member", f"only {len(content):,} of its {size:,} bytes could be read")
    return content


def _labels(source: Source) -> NDArray[np.int64]:
    labels = [np.where(_sound(tar), _numbers(tar, "label"), UNKNOWN) for tar in source.tars]
    return known_labels(np.concatenate(labels), len(source.class_names))


def _sound(tar: TarIndex) -> NDArray[np.bool_]:
    return np.asarray(tar.rows.column("error").is_null())


def _errors(tar: TarIndex) -> list[str | None]:
    return list(tar.rows.column("error").unique().to_pylist())


def _numbers(tar: TarIndex, column: str) -> NDArray[np.int64]:
    chunks = tar.rows.column(column)
    values: pa.Array = chunks.chunk(0) if chunks.num_chunks else pa.array([], pa.int64())
    return np.asarray(values.to_numpy(zero_copy_only=True))


def _files(path: str) -> list[str]:
    """The tars that a pattern names: braces in their order, globs sorted."""
    whole = os.path.expanduser(path)
    try:
        patterns = [whole] if os.path.exists(whole) else list(braceexpand(whole, escape=False))
    except ValueError as error:
        raise ClipmillError(f'unbalanced braces in "{path}"; --dataset wds: takes "train-{{000..012}}.tar"') from error
    files: list[str] = []
    for pattern in patterns:
        if os.path.isdir(pattern):
            raise ClipmillError(
                f'{pattern} is a folder; for its tars say --dataset "wds:{os.path.join(pattern, "*.tar")}"'
            )
        found = matching_files(os.path.abspath(pattern)) if pattern else []
        if not found:
            raise ClipmillError(
                f'there is no file "{pattern}"; --dataset wds: takes tars on this machine, or a pattern'
            )
        files += found
    if (twice := first_duplicate(lambda: iter(files))) is not None:
        raise ClipmillError(f'"{path}" names {twice} twice; see --dataset wds:')
    return files


def _class_names(files: list[str]) -> tuple[str | None, tuple[str, ...]]:
    for folder in dict.fromkeys(os.path.dirname(file) for file in files):
        for file in (os.path.join(folder, CLASS_NAMES), os.path.join(os.path.dirname(folder), CLASS_NAMES)):
            if os.path.isfile(file):
                try:
                    with open(file, encoding="utf-8-sig") as text:
                        return file, tuple(line.strip() for line in text.read().rstrip().split("\n"))
                except (OSError, UnicodeDecodeError) as error:
                    raise ClipmillError(
                        f"cannot read {file} ({error}); mend it or take it away, see --dataset"
                    ) from error
    return None, ()
