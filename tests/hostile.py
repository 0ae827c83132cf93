"""Kinds of image files: odd ones that decode all the same, and broken ones with the class of their rejects."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

Picture = Image.Image


def encoded(picture: Picture, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def cut(picture: Picture, image_format: str, share: float, **options: Any) -> bytes:
    """The first part of a file; a share below 0 takes that many bytes off its end."""
    data = encoded(picture, image_format, **options)
    return data[: int(share if share < 0 else share * len(data))]


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of that size by its header, with these chunks behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def patched(data: bytes, offset: int, replacement: bytes) -> bytes:
    return data[:offset] + replacement + data[offset + len(replacement) :]


def bad_checksum(picture: Picture) -> bytes:
    """A PNG with one changed byte in its pixels' chunk."""
    data = encoded(picture, "PNG")
    middle = data.index(b"IDAT") + 4 + 40
    return patched(data, middle, bytes([data[middle] ^ 0xFF]))


def bomb(picture: Picture, image_format: str) -> bytes:
    """A file of a few kilobytes whose header promises gigabytes of pixels."""
    data = encoded(picture, image_format)
    if image_format == "GIF":
        return patched(data, 6, struct.pack("<HH", 65_535, 65_535))
    if image_format == "BMP":
        return patched(data, 18, struct.pack("<ii", 50_000, 50_000))
    return tiff(picture, {256: 60_000, 257: 60_000})


def tiff(picture: Picture, tags: dict[int, int]) -> bytes:
    """A TIFF with these values (256 is the width, 257 the height, 277 the number of channels) in its header."""
    data = encoded(picture, "TIFF")
    (first,) = struct.unpack_from("<I", data, 4)
    for entry in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
        (tag,) = struct.unpack_from("<H", data, entry)
        if tag in tags:
            data = patched(data, entry + 2, struct.pack("<HII", 4, 1, tags[tag]))
    return data


def zipped(picture: Picture) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("picture.png", encoded(picture, "PNG"))
    return file.getvalue()


def link(path: Path, target: str) -> None:
    path.symlink_to(target)


def rgba(picture: Picture) -> Picture:
    picture = picture.convert("RGBA")
    picture.putalpha(picture.convert("L"))
    return picture


def animated(picture: Picture, image_format: str, **options: Any) -> bytes:
    others = [picture.rotate(90 * turn) for turn in (1, 2)]
    return encoded(picture, image_format, save_all=True, append_images=others, **options)


def cmyk(picture: Picture, adobe: int | None) -> bytes:
    """A CMYK JPEG, inverted as Adobe's are: with its marker saying CMYK (0) or YCCK (2), or without the marker."""
    data = encoded(picture.convert("CMYK"), "JPEG", quality=95)
    marker = data.index(b"\xff\xee")
    if adobe is None:
        return data[:marker] + data[marker + 2 + int.from_bytes(data[marker + 2 : marker + 4], "big") :]
    return patched(data, marker + 15, bytes([adobe]))


def rotated_by_exif(picture: Picture) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture, "JPEG", exif=exif)


def grey16(picture: Picture) -> Picture:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 3)


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name's end, and its bytes made of a picture; `plant` where it is no file with bytes."""

    suffix: str
    make: Callable[[Picture], bytes] = lambda _: b""
    error: str | None = None  # the class of its reject; None where it is to be embedded
    plant: Callable[[Path], None] | None = None


GOOD = {
    "jpeg": Kind(".jpg", lambda picture: encoded(picture, "JPEG")),
    "progressive jpeg": Kind(".jpeg", lambda picture: encoded(picture, "JPEG", progressive=True)),
    "grey jpeg": Kind(".JPG", lambda picture: encoded(picture.convert("L"), "JPEG")),
    "cmyk jpeg": Kind(".jpg", partial(cmyk, adobe=0)),
    "ycck jpeg": Kind(".jpg", partial(cmyk, adobe=2)),
    "cmyk jpeg without marker": Kind(".jpg", partial(cmyk, adobe=None)),
    "jpeg with exif orientation": Kind(".jpg", rotated_by_exif),
    "jpeg with rubbish behind": Kind(".jpg", lambda picture: encoded(picture, "JPEG") + b"rubbish" * 99),
    "jpeg of two pictures": Kind(".jpg", partial(animated, image_format="MPO")),
    "png": Kind(".png", lambda picture: encoded(picture, "PNG")),
    "png called jpg": Kind(".jpg", lambda picture: encoded(picture, "PNG")),
    "jpeg called gif": Kind(".gif", lambda picture: encoded(picture, "JPEG")),
    "palette": Kind(".png", lambda picture: encoded(picture.quantize(40), "PNG")),
    "transparent palette": Kind(
        ".png", lambda picture: encoded(picture.quantize(40), "PNG", transparency=bytes(range(40)))
    ),
    "transparent colour": Kind(".png", lambda picture: encoded(picture, "PNG", transparency=(0, 0, 0))),
    "16-bit grey": Kind(".png", lambda picture: encoded(grey16(picture), "PNG")),
    "bilevel": Kind(".png", lambda picture: encoded(picture.convert("1"), "PNG")),
    "grey and alpha": Kind(".png", lambda picture: encoded(rgba(picture).convert("LA"), "PNG")),
    "rgba": Kind(".png", lambda picture: encoded(rgba(picture), "PNG")),
    "one pixel": Kind(".png", lambda picture: encoded(picture.crop((9, 9, 10, 10)), "PNG")),
    "thin": Kind(".png", lambda picture: encoded(picture.resize((1, 600)), "PNG")),
    "animated png": Kind(".apng", partial(animated, image_format="PNG")),
    "animated gif": Kind(".gif", partial(animated, image_format="GIF")),
    "animated webp": Kind(".webp", partial(animated, image_format="WEBP", lossless=True)),
    "webp": Kind(".webp", lambda picture: encoded(picture, "WEBP")),
    "webp with alpha": Kind(".webp", lambda picture: encoded(rgba(picture), "WEBP")),
    "bmp": Kind(".bmp", lambda picture: encoded(picture, "BMP")),
    "ppm": Kind(".ppm", lambda picture: encoded(picture, "PPM")),
    "tiff of pages": Kind(".tif", partial(animated, image_format="TIFF")),
    "cmyk tiff": Kind(".tiff", lambda picture: encoded(picture.convert("CMYK"), "TIFF", compression="tiff_lzw")),
    "float tiff": Kind(".tiff", lambda picture: encoded(picture.convert("F"), "TIFF")),
}
BAD = {
    "zero bytes": Kind(".jpg", lambda _: b"", "empty"),
    "text": Kind(".jpg", lambda _: b"this is not a picture\n" * 50, "not-an-image"),
    "error page": Kind(".jpg", lambda _: b"<!DOCTYPE html><html><title>404 Not Found</title></html>", "not-an-image"),
    "pdf": Kind(".jpg", lambda picture: encoded(picture, "PDF"), "not-an-image"),
    "postscript": Kind(".jpg", lambda picture: encoded(picture, "EPS"), "not-an-image"),
    "svg": Kind(".png", lambda _: b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "not-an-image"),
    "zip": Kind(".png", zipped, "not-an-image"),
    "pickle": Kind(".png", lambda picture: pickle.dumps(np.asarray(picture)), "not-an-image"),
    "zeros": Kind(".gif", lambda _: bytes(5000), "not-an-image"),
    "noise": Kind(".webp", lambda picture: np.random.default_rng(picture.width).bytes(4000), "not-an-image"),
    "start of a jpeg": Kind(".jpg", lambda _: b"\xff\xd8", "not-an-image"),
    "jpeg cut in its header": Kind(".jpg", lambda picture: encoded(picture, "JPEG")[:120], "truncated"),
    "jpeg cut early": Kind(".jpg", partial(cut, image_format="JPEG", share=0.5), "truncated"),
    "jpeg without its end": Kind(".jpg", partial(cut, image_format="JPEG", share=-60), "truncated"),
    "progressive jpeg, cut": Kind(".jpg", partial(cut, image_format="JPEG", share=0.7, progressive=True), "truncated"),
    "png cut early": Kind(".png", partial(cut, image_format="PNG", share=0.1), "truncated"),
    "png without its end": Kind(".png", partial(cut, image_format="PNG", share=-200), "truncated"),
    "png without pixels": Kind(".png", lambda _: png(64, 64), "truncated"),
    "png with too few pixels": Kind(".png", lambda _: png(64, 64, (b"IDAT", zlib.compress(bytes(9)))), "truncated"),
    "png with a bad checksum": Kind(".png", bad_checksum, "truncated"),
    "gif, cut": Kind(".gif", partial(cut, image_format="GIF", share=0.6), "truncated"),
    "webp, cut": Kind(".webp", partial(cut, image_format="WEBP", share=0.6), "truncated"),
    "bmp, cut": Kind(".bmp", partial(cut, image_format="BMP", share=0.6), "truncated"),
    "bmp of an unknown kind": Kind(
        ".bmp", lambda picture: patched(encoded(picture, "BMP"), 28, b"\x07\x00"), "truncated"
    ),
    "tiff, cut": Kind(".tif", partial(cut, image_format="TIFF", share=0.6), "truncated"),
    "tiff of 60,000 channels": Kind(".tif", lambda picture: tiff(picture, {277: 60_000}), "not-an-image"),
    "ppm, cut": Kind(".ppm", partial(cut, image_format="PPM", share=0.6), "truncated"),
    "png bomb": Kind(".png", lambda _: png(60_000, 60_000, (b"IDAT", zlib.compress(bytes(99)))), "too-large"),
    "gif bomb": Kind(".gif", partial(bomb, image_format="GIF"), "too-large"),
    "bmp bomb": Kind(".bmp", partial(bomb, image_format="BMP"), "too-large"),
    "tiff bomb": Kind(".tif", partial(bomb, image_format="TIFF"), "too-large"),
    # 32 is what the embedded model resizes the short edge to: 32 x 3,200,000 pixels
    "extremely thin": Kind(".png", lambda picture: encoded(picture.resize((1, 100_000)), "PNG"), "bad-size"),
    "dangling link": Kind(".jpg", error="unreadable", plant=partial(link, target="nowhere.jpg")),
    "link to itself": Kind(".jpg", error="unreadable", plant=lambda path: link(path, path.name)),
    "pipe": Kind(".jpg", error="unreadable", plant=os.mkfifo),
}
if features.check("jpg_2000"):
    GOOD["jpeg 2000"] = Kind(".jp2", lambda picture: encoded(picture, "JPEG2000"))
    BAD["jpeg 2000, cut"] = Kind(".jp2", partial(cut, image_format="JPEG2000", share=0.5), "truncated")
if features.check("avif"):
    GOOD["avif"] = Kind(".avif", lambda picture: encoded(picture, "AVIF", speed=10))
    # What is missing of it is, to its decoder, the sound header that makes it an image.
    BAD["avif, cut"] = Kind(".avif", partial(cut, image_format="AVIF", share=0.4, speed=10), "not-an-image")
