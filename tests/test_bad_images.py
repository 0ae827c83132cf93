"""decode() of images that are not fine: each gives BadImage with its stable error class, and nothing else happens."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.decode import FORMATS, MAX_PIXELS, BadImage, decode

PICTURE = Image.fromarray(np.random.default_rng(7).integers(0, 256, (47, 61, 3), dtype=np.uint8))


def encoded(image_format: str) -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, image_format)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG of that size by its header, with next to no pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    """A PNG with 100 MB of comment, compressed to 100 KB."""
    body = b"comment\0\0" + zlib.compress(bytes(100_000_000), 1)
    png = png_header(4, 4)
    return png[:33] + struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


JPEG, PNG, GIF = encoded("JPEG"), encoded("PNG"), encoded("GIF")
BAD = {
    "zero bytes": (b"", "empty"),
    "text": (b"this is not a picture\n" * 50, "not-an-image"),
    "html": (b"<!DOCTYPE html><title>404</title>", "not-an-image"),
    "zeros": (bytes(1000), "not-an-image"),
    "signature only": (JPEG[:3], "not-an-image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n", "not-an-image"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its end": (JPEG[:-40], "truncated"),
    "half a png": (PNG[: len(PNG) // 2], "truncated"),
    "png with broken pixels": (PNG[:200] + bytes(200) + PNG[400:], "truncated"),
    "half a gif": (GIF[: len(GIF) // 2], "truncated"),
    "half a webp": (encoded("WEBP")[:300], "truncated"),
    "half a bmp": (encoded("BMP")[:300], "truncated"),
    "png header only": (png_header(64, 64), "truncated"),
    "text bomb": (text_bomb(), "truncated"),
    "large": (png_header(10_000, 9_000), "too-large"),
    "bomb": (png_header(60_000, 60_000), "too-large"),
    "gif bomb": (GIF[:6] + struct.pack("<HH", 65_535, 65_535) + GIF[10:], "too-large"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_bytes(kind: str, tmp_path: Path) -> None:
    data, error_class = BAD[kind]
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    messages = set()
    for image in (data, data, path):
        with pytest.raises(BadImage) as caught:
            decode(image, (32, 32))
        assert caught.value.error_class == error_class
        messages.add(caught.value.message)
    (message,) = messages
    assert message
    assert "\n" not in message
    assert str(tmp_path) not in message
    assert " at 0x" not in message


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_large_is_large_also_where_warnings_are_errors() -> None:
    with pytest.raises(BadImage, match="too-large"):
        decode(png_header(10_000, 9_000))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixel_limit_is_inclusive() -> None:
    width, height = 9_449, 9_469
    assert width * height <= MAX_PIXELS < width * (height + 1)
    with pytest.raises(BadImage, match="truncated"):
        decode(png_header(width, height))
    with pytest.raises(BadImage, match="too-large: 9449 x 9470 "):
        decode(png_header(width, height + 1))


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("missing.jpg", "folder.jpg", "dangling.jpg", "pipe.jpg"):
        with pytest.raises(BadImage) as caught:
            decode(tmp_path / name)
        assert caught.value.error_class == "unreadable"
        assert str(tmp_path) not in caught.value.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_file(tmp_path: Path) -> None:
    path = tmp_path / "forbidden.jpg"
    path.write_bytes(JPEG)
    path.chmod(0)
    with pytest.raises(BadImage, match="unreadable"):
        decode(path)


def test_a_disk_that_fails_is_not_the_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FailingDisk(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    monkeypatch.setattr(Path, "open", lambda self, mode: FailingDisk())
    with pytest.raises(BadImage, match="unreadable: Input/output error"):
        decode(path)


def test_bad_image_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(BadImage("truncated", "half of it")))
    assert (error.error_class, error.message, str(error)) == ("truncated", "half of it", "truncated: half of it")


def test_nothing_is_printed_about_bombs_and_broken_metadata() -> None:
    code = """
import sys
from engine.decode import BadImage, decode
for line in sys.stdin:
    try:
        decode(bytes.fromhex(line))
        print("fine")
    except BadImage as error:
        print(error.error_class)
"""
    broken_tag = bytearray(encoded("TIFF"))
    (tags,) = struct.unpack_from("<I", broken_tag, 4)
    last = struct.unpack_from("<H", broken_tag, tags)[0] - 1
    struct.pack_into("<HHII", broken_tag, tags + 2 + 12 * last, 40_000, 2, 2**30, 0)
    images = [png_header(10_000, 9_000), png_header(60_000, 60_000), bytes(broken_tag), JPEG]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="\n".join(image.hex() for image in images),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["too-large", "too-large", "fine", "fine"]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([encoded(image_format) for image_format in FORMATS]),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    st.floats(0, 1),
)
def test_any_damage_gives_pixels_or_bad_image(data: bytes, changes: list[tuple[float, int]], keep: float) -> None:
    damaged = bytearray(data)
    for where, value in changes:
        damaged[int(where * (len(damaged) - 1))] = value
    try:
        pixels = decode(bytes(damaged[: int(keep * len(damaged))]), (16, 16))
    except BadImage:
        return
    assert pixels.shape == (16, 16, 3)
