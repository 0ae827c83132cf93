"""The index of a tar in webdataset's layout: where each sample's image lies, read from the headers alone, and kept.

Members whose path is the same up to the first dot of the file name are one sample, as in webdataset; they must lie
together. The pass seeks from header to header and reads only the small .cls and .json members, for the labels.

A stretch of the tar without a valid header is one row of the index, a `corrupt-member`: nobody can say what it held, so
it never vanishes. A member that the end of the file cuts off is a `corrupt-member` too.

The index of a tar is kept in the user's cache folder until the tar's size or time changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from engine.datasets.folder import key_of
from engine.datasets.sources import UNKNOWN, first_duplicate
from engine.datasets.tar_members import Damage, refuse_what_is_no_tar, tar_members
from engine.decode import IMAGE_SUFFIXES, ErrorClass
from engine.errors import ClipmillError
from engine.files import atomic_file

VERSION = 1  # of what is kept: another version is not read
COLUMNS = pa.schema(  # a row in about 40 bytes and its key
    {
        "key": pa.large_string(),
        "offset": pa.int64(),  # of the image's bytes in the tar
        "size": pa.int64(),
        "label": pa.int64(),  # UNKNOWN where there is none
        "error": pa.string(),  # null for a sound row, else an error class
        "message": pa.string(),
    }
)
BATCH_ROWS = 8192  # rows held as Python objects
LARGEST_LABEL_MEMBER = 1 << 20

KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
METADATA = re.compile(r"__[^/]*__($|/)")  # members that webdataset, too, keeps for itself

NO_IMAGE = "passed over: {} sample(s) without an image"
NO_KEY = "passed over: {} member(s) whose name is not KEY.EXTENSION"
NO_FILE = "passed over: {} link(s) or other member(s) that are no regular file"
MORE_IMAGES = "{} sample(s) hold more than one image: the first one counts"


@dataclass(frozen=True)
class TarIndex:
    """One tar: its rows in order (COLUMNS, in one piece), and how often each note applies."""

    path: str
    size: int
    mtime_ns: int
    rows: pa.Table
    notes: Counter[str]


@dataclass
class _Group:
    """A sample whose members are being collected."""

    key: str
    extensions: set[str] = field(default_factory=set)
    images: int = 0
    offset: int = 0
    size: int = 0
    label: int = UNKNOWN
    problem: tuple[ErrorClass, str] | None = None


def index_tar(path: str) -> tuple[TarIndex, bool]:
    """The index of a tar, and whether it could be kept for the next time.

    Raises ClipmillError for what is no tar or a compressed one, and when a sample's members do not lie together.
    """
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            kept = _cache_file(path)
            if (index := _read_kept(kept, path, status)) is not None:
                return index, True
            refuse_what_is_no_tar(path, file)
            notes: Counter[str] = Counter()
            rows = pa.Table.from_batches(_batches(path, file, status.st_size, notes), COLUMNS).combine_chunks()
    except OSError as error:
        raise ClipmillError(f"cannot read {path} ({error.strerror or error}); see --dataset wds:") from error
    index = TarIndex(path, status.st_size, status.st_mtime_ns, rows, notes)
    return index, _keep(kept, index)


def _batches(path: str, file: BinaryIO, size: int, notes: Counter[str]) -> Iterator[pa.RecordBatch]:
    """The rows of COLUMNS, a few thousand at a time."""
    rows: list[tuple[Any, ...]] = []
    keys: list[pa.Array] = []  # of every group, also of those that are no row

    def batch() -> pa.RecordBatch:
        columns = list(zip(*rows, strict=True))
        rows.clear()
        return pa.RecordBatch.from_arrays(
            [pa.array(column, kind.type) for column, kind in zip(columns, COLUMNS, strict=True)], schema=COLUMNS
        )

    names: list[str] = []
    for group in _groups(path, file, size, notes):
        names.append(group.key)
        if len(names) == BATCH_ROWS:
            keys.append(pa.array(names, pa.large_string()))
            names.clear()
        if not group.images:
            notes[NO_IMAGE] += 1
            continue
        notes[MORE_IMAGES] += group.images > 1
        error, message = group.problem or (None, None)
        rows.append((group.key, group.offset, group.size, group.label, error, message))
        if len(rows) == BATCH_ROWS:
            yield batch()
    if rows:
        yield batch()
    keys.append(pa.array(names, pa.large_string()))
    twice = first_duplicate(lambda: (str(key) for array in keys for key in array))
    if twice is not None:
        raise ClipmillError(
            f'the members of sample "{twice}" in {path} do not lie together: sort the members by name, '
            "--dataset wds: takes what webdataset takes"
        )


def _groups(path: str, file: BinaryIO, size: int, notes: Counter[str]) -> Iterator[_Group]:
    """The samples, and each stretch of damage after the sample that it lies behind, or within."""
    group: _Group | None = None
    damages: list[_Group] = []
    for member in tar_members(file, size, notes):
        if isinstance(member, Damage):
            message = f"no valid tar header from byte {member.start:,} to {member.stop:,}: what lay there is lost"
            # No sample's key has a dot in its last part: this one is free.
            damages.append(_Group(f"damaged.{member.start}", images=1, problem=("corrupt-member", message)))
            continue
        if not member.isreg():
            notes[NO_FILE] += not member.isdir()
            continue
        if METADATA.match(member.name):
            continue
        parts = KEY_AND_EXTENSION.fullmatch(member.name)
        if not parts:
            notes[NO_KEY] += 1
            continue
        key, extension = key_of(parts[1]), parts[2].lower()
        if group is None or group.key != key:
            yield from [group] if group is not None else []
            yield from damages
            group, damages = _Group(key), []
        if extension in group.extensions:
            raise ClipmillError(f"{path} holds {key}.{extension} twice; --dataset wds: needs unique keys")
        group.extensions.add(extension)
        _take(group, member, extension, file, size)
    yield from [group] if group is not None else []
    yield from damages


def _take(group: _Group, member: tarfile.TarInfo, extension: str, file: BinaryIO, size: int) -> None:
    cut = size - member.offset_data if member.offset_data + member.size > size else None
    if "." + extension.rpartition(".")[2] in IMAGE_SUFFIXES:
        group.images += 1
        if group.images > 1:
            return
        group.offset, group.size = member.offset_data, member.size
        if cut is not None:
            group.problem = "corrupt-member", f"the tar ends after {cut:,} of the image's {member.size:,} bytes"
        elif member.sparse is not None:
            group.problem = "corrupt-member", "the image is stored as a sparse file"
    elif cut is not None:
        if not group.images or extension in ("cls", "json"):  # the image, or the label, would have come
            group.images = group.images or 1
            group.problem = group.problem or ("corrupt-member", f"the tar ends inside its .{extension}")
    elif extension == "cls" or (extension == "json" and "cls" not in group.extensions):
        label: int | str | None = f"its .{extension} has {member.size:,} bytes"
        if member.size <= LARGEST_LABEL_MEMBER:
            file.seek(member.offset_data)
            label = _label(file.read(member.size), extension)
        if isinstance(label, int):
            group.label = label
        group.problem = group.problem or (("bad-label", label) if isinstance(label, str) else None)


def _label(content: bytes, extension: str) -> int | str | None:
    """The label that a .cls or .json member says, None if a .json says none, or what is wrong with it."""
    if extension == "json":
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return "its .json is no JSON"
        label = next((value[name] for name in ("label", "cls") if name in value), None) if value else None
        if label is None or (isinstance(label, int) and not isinstance(label, bool) and abs(label) < 1 << 63):
            return label
    elif re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", content):
        return int(content)
    return f"its .{extension} holds no integer label"


def _cache_file(path: str) -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()
    return Path(folder, "clipmill", "wds", f"{name}.index")


def _stamp(size: int, mtime_ns: int) -> dict[str, int]:
    return {"version": VERSION, "size": size, "mtime_ns": mtime_ns}


def _keep(kept: Path, index: TarIndex) -> bool:
    """Write sha256 and an Arrow file; False where that cannot be written: then the next opening reads the headers."""
    about = {**_stamp(index.size, index.mtime_ns), "notes": index.notes}
    schema = COLUMNS.with_metadata({"about": json.dumps(about)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(index.rows)
    content = sink.getvalue()
    try:
        with atomic_file(kept) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
    except ClipmillError:
        return False
    return True


def _read_kept(kept: Path, path: str, status: os.stat_result) -> TarIndex | None:
    """The index kept for this tar as it is now; None if there is none, or it is damaged."""
    try:
        content = kept.read_bytes()
    except OSError:
        return None
    digest, content = content[:32], content[32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    with pa.ipc.open_file(pa.py_buffer(content)) as reader:
        about = json.loads(reader.schema.metadata[b"about"])
        if any(about.get(name) != value for name, value in _stamp(status.st_size, status.st_mtime_ns).items()):
            return None
        rows = reader.read_all().replace_schema_metadata(None).combine_chunks()
    return TarIndex(path, status.st_size, status.st_mtime_ns, rows, Counter(about["notes"]))
