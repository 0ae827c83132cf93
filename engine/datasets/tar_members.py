"""The members of a tar by their headers alone, damaged ones included.

Each header has a checksum. Where none is valid, the walk goes on at the next block of 512 bytes that is a header, and
says which stretch it passed: a reader that stops there, as tar readers do, would lose the rest without a word.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from engine.errors import ClipmillError

BLOCK = tarfile.BLOCKSIZE
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
NO_END = "{} tar(s) lack an end-of-archive mark, so they may be cut short"
ZEROS = "{} tar(s) end in more zeros than tar writes, so they may be half a download"
MAX_PADDING = 1 << 20  # bytes of zeros; tar rounds up to 10 KiB, unless told otherwise
SEVERAL = "{} end-of-archive mark(s) with more behind: read on"


@dataclass(frozen=True)
class Damage:
    """A stretch of bytes, start <= byte < stop, where a header should be and none is valid."""

    start: int
    stop: int


def refuse_what_is_no_tar(path: str, file: BinaryIO) -> None:
    """ClipmillError for a compressed file, and for one that does not begin as a tar does."""
    block = file.read(BLOCK)
    for magic, name in COMPRESSED.items():
        if block.startswith(magic):
            raise ClipmillError(f"{path} is compressed ({name}): decompress it, --dataset wds: reads from the middle")
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        return
    # A first header that is damaged is a damaged header like any other, if only its signature is still there.
    if any(block) and block[257:262] != b"ustar":
        raise ClipmillError(f"{path} is no tar archive (no header at its beginning); see --dataset wds:")


def tar_members(file: BinaryIO, size: int, notes: Counter[str]) -> Iterator[tarfile.TarInfo | Damage]:
    """Every member with a valid header, of `size` bytes of file, and each stretch where there should be one.

    Counts in `notes` what is odd about the archive's end.
    """
    # tarfile's own loop ends without a word at a header that is damaged. Here it only reads one header at a time; it is
    # opened at the end of the file, because opening reads a header as well, and fails on a damaged one.
    file.seek(0, os.SEEK_END)
    tar = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape") if size else None
    offset = expected = 0  # where we look for a header, and where the last member ended
    damaged = False  # whether anything but zeros lies between the two
    while tar is not None and offset < size:
        file.seek(offset)
        try:
            member = tarfile.TarInfo.fromtarfile(tar)
            if tar.offset <= offset or member.size < 0:
                raise tarfile.HeaderError("a negative size")
        except OSError:
            raise
        # Hostile headers end in nearly any exception: HeaderError, ValueError, KeyError, RecursionError...
        except Exception:
            file.seek(offset)
            damaged = damaged or any(file.read(BLOCK))
            offset += BLOCK
            continue
        if expected < offset:
            # Tars joined by cat have full records of zeros between them; a hole in a tar ends anywhere.
            if damaged or offset % tarfile.RECORDSIZE:
                yield Damage(expected, offset)
            else:
                notes[SEVERAL] += 1
        yield member
        offset = expected = tar.offset
        damaged = False
    if damaged:
        yield Damage(expected, size)
    elif size - expected < BLOCK:
        notes[NO_END] += 1
    elif size - expected > MAX_PADDING:
        notes[ZEROS] += 1
