"""One image, however it comes, to RGB pixels exactly as CLIP's reference sees it; every way it can be bad has a name.

The reference is transformers' PIL-based CLIPImageProcessor. RGB is what `Image.convert("RGB")` makes of palette, grey,
CMYK and alpha images (alpha is dropped, 16-bit grey is clipped at 255); of an animation the first frame counts; the
EXIF orientation is not applied, because the reference does not apply it.
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import warnings
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

ErrorClass = Literal[
    "unreadable", "empty", "not-an-image", "truncated", "too-large", "bad-size",
    "corrupt-member", "bad-label", "missing-label",  # found by the source, not by decode()
]  # fmt: skip

MAX_PIXELS = 89_478_485  # unless asked otherwise: where Pillow's own guard begins to warn, 256 MiB of RGB

# Only formats with a signature are tried: a guess at a weak header would make garbage "truncated" instead of
# "not-an-image". EPS is out for good: Pillow hands it to Ghostscript, a program, and our input may be hostile.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

# What Pillow warns of does not touch the pixels (damaged metadata, a line for every tag). A filter for good, and not
# around the call: warnings.catch_warnings swaps process-wide state, and decode() runs in many threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
# And what it logs, of TIFF tags above all: logging prints to stderr for a library that has no handler.
logging.getLogger("PIL").addHandler(logging.NullHandler())
# Its guard against decompression bombs has one limit for the process; ours is decode()'s own, at the same place.
Image.MAX_IMAGE_PIXELS = None


class BadImage(Exception):
    """An image that cannot be embedded: `error_class` is stable, `message` is one line that names no file."""

    def __init__(self, error_class: ErrorClass, message: str) -> None:
        super().__init__(error_class, message)
        self.error_class = error_class
        self.message = message

    def __str__(self) -> str:
        return f"{self.error_class}: {self.message}"


def decode(
    image: bytes | Path | NDArray[np.uint8] | BadImage,
    resize: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Pixels of one image, (H, W, 3) uint8, C-contiguous and perhaps read-only.

    `image` is an encoded file's bytes, the path of one, pixels (H, W, 3) uint8, or what its source found wrong. With
    `resize`, (shortest edge, crop) in pixels, the shortest edge is resized to the first by PIL's bicubic, the long edge
    to int(first * long / short), and the centre is cropped to (crop, crop, 3), padded with black where the crop is
    larger: byte for byte as CLIPImageProcessor does it.

    Raises BadImage, or the image where it is one already: `unreadable` (the file cannot be opened or read), `empty` (no
    bytes), `not-an-image` (no format of FORMATS claims it: no signature, or no sound header after it), `truncated` (the
    decoder gave up), `too-large` (more than `max_pixels` by the header, before decoding), `bad-size` (so long and thin
    that resizing makes it so).
    """
    if isinstance(image, BadImage):
        raise image
    if isinstance(image, np.ndarray):
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        if resize is None:
            return np.ascontiguousarray(image)
        picture = Image.fromarray(image)
    else:
        with _open_file(image) as file:
            picture = _read_rgb(file, max_pixels)
    return np.asarray(picture if resize is None else _resize_and_crop(picture, *resize, max_pixels))


def _open_file(image: bytes | Path) -> BinaryIO:
    if isinstance(image, bytes):
        size, file = len(image), io.BytesIO(image)
        if size == 0:
            raise BadImage("empty", "zero bytes")
        return file
    try:
        # Asked before opening: opening a named pipe would wait for its writer for ever.
        status = image.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadImage("unreadable", "not a regular file")
        if status.st_size == 0:
            raise BadImage("empty", "zero bytes")
        return image.open("rb")
    except OSError as error:
        raise BadImage("unreadable", _one_line(error) if error.errno is None else os.strerror(error.errno)) from error


def _read_rgb(file: BinaryIO, max_pixels: int) -> Image.Image:
    Image.init()
    try:
        picture: Image.Image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        pixels = picture.width * picture.height
        if pixels <= max_pixels:
            picture.load()
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadImage("not-an-image", "no known image format, or its header is damaged") from error
    # Pillow's decoders meet hostile bytes with nearly any exception: OSError, SyntaxError, ValueError, struct.error,
    # EOFError, IndexError, KeyError, zlib.error, MemoryError... Whatever it is, this image is bad and the run goes on.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise BadImage("unreadable", os.strerror(error.errno)) from error
        raise BadImage("truncated", _one_line(error)) from error
    raise BadImage("too-large", f"{picture.width} x {picture.height} is more than {max_pixels:,} pixels")


def _resize_and_crop(picture: Image.Image, shortest_edge: int, crop: int, max_pixels: int) -> Image.Image:
    width, height = picture.size
    long_edge = int(shortest_edge * max(width, height) / min(width, height))
    if shortest_edge * long_edge > max_pixels:
        raise BadImage("bad-size", f"{width} x {height} would be resized to more than {max_pixels:,} pixels")
    size = (shortest_edge, long_edge) if width <= height else (long_edge, shortest_edge)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = ((edge - crop) // 2 for edge in picture.size)
    return picture.crop((left, top, left + crop, top + crop))


def _one_line(error: Exception) -> str:
    # Object addresses differ between two runs whose reject tables must be the same bytes.
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:200].removesuffix(": ")
