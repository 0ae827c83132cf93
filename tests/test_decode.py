"""decode() of images that are fine: pixels against the PIL-based CLIPImageProcessor and PIL itself, to the byte."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.decode import FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, BadImage, decode

RNG = np.random.default_rng(7)


def picture(width: int, height: int) -> Image.Image:
    """Blocks of pure colours under noise: bicubic overshoots at both ends of the range."""
    blocks = RNG.integers(0, 2, (max(height // 4, 1), max(width // 4, 1), 3), dtype=np.uint8) * 255
    large = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST))
    noise = RNG.integers(-40, 40, (height, width, 3))
    return Image.fromarray((large + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("resize", [(224, 224), (32, 32), (40, 32), (32, 40), (31, 24)])
@pytest.mark.parametrize(
    "size", [(32, 32), (28, 28), (500, 333), (100, 260), (61, 47), (47, 61), (225, 224), (7, 301), (1, 1), (2, 9)]
)
def test_same_bytes_as_the_reference_processor(size: tuple[int, int], resize: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessor

    shortest_edge, crop = resize
    processor = CLIPImageProcessor(
        size={"shortest_edge": shortest_edge},
        crop_size={"height": crop, "width": crop},
        do_rescale=False,
        do_normalize=False,
    )
    data = encoded(picture(*size), "JPEG", quality=90)
    with Image.open(io.BytesIO(data)) as image:
        # Told the layout, which it would otherwise guess wrongly for heights 1 and 3.
        expected = processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    pixels = decode(data, resize)
    assert pixels.dtype == expected.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected.transpose(1, 2, 0))


@pytest.mark.parametrize("resize", [None, (32, 32)])
def test_bytes_path_and_pixels_agree(tmp_path: Path, resize: tuple[int, int] | None) -> None:
    data = encoded(picture(61, 47), "PNG")
    path = tmp_path / "wrong suffix.txt"
    path.write_bytes(data)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    expected = decode(data, resize)
    np.testing.assert_array_equal(decode(path, resize), expected)
    np.testing.assert_array_equal(decode(pixels, resize), expected)
    assert expected.shape == ((47, 61, 3) if resize is None else (32, 32, 3))
    assert decode(pixels[:, ::-1]).flags.c_contiguous


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_mode_is_converted_as_pil_does_it() -> None:
    base = picture(21, 13)
    grey16 = Image.fromarray(np.arange(273, dtype=np.uint16).reshape(13, 21) * 200)
    alpha = base.convert("RGBA")
    alpha.putalpha(base.convert("L"))
    images = {
        "cmyk": encoded(base.convert("CMYK"), "JPEG"),
        "grey": encoded(base.convert("L"), "JPEG"),
        "progressive": encoded(base, "JPEG", progressive=True),
        "palette": encoded(base.quantize(17), "PNG"),
        "transparent palette": encoded(base.quantize(17), "PNG", transparency=bytes(range(17))),
        "16-bit": encoded(grey16, "PNG"),
        "bilevel": encoded(base.convert("1"), "PNG"),
        "rgba": encoded(alpha, "PNG"),
        "grey and alpha": encoded(alpha.convert("LA"), "PNG"),
        "float": encoded(base.convert("F"), "TIFF"),
        "pixel": encoded(picture(1, 1), "PNG"),
    }
    for name, data in images.items():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(decode(data), expected, err_msg=name)
        assert decode(data, (32, 32)).shape == (32, 32, 3)
    # Alpha is dropped and not blended; 16-bit grey is clipped, not scaled: pinned, for both are surprising.
    np.testing.assert_array_equal(decode(images["rgba"]), np.asarray(base))
    np.testing.assert_array_equal(decode(images["16-bit"])[0, :3, 0], [0, 200, 255])


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(image_format: str) -> None:
    first, second = Image.new("RGB", (9, 6), (255, 0, 0)), Image.new("RGB", (9, 6), (0, 0, 255))
    data = encoded(first, image_format, save_all=True, append_images=[second])
    with Image.open(io.BytesIO(data)) as animation:
        animation.seek(1)
        assert animation.convert("RGB").getpixel((0, 0)) != (255, 0, 0)
    assert np.abs(decode(data).astype(int) - (255, 0, 0)).max() <= 2


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture(61, 47), "JPEG", exif=exif)).shape == (47, 61, 3)


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_decodes_and_owns_its_suffixes(image_format: str) -> None:
    assert decode(encoded(picture(16, 12), image_format)).shape == (12, 16, 3)
    registered = Image.registered_extensions()
    assert {registered[suffix] for suffix in FORMATS[image_format]} == {image_format}
    assert IMAGE_SUFFIXES.issuperset(FORMATS[image_format])


def test_pixel_limit_holds_after_resizing() -> None:
    thin = np.zeros((1, 2000, 3), np.uint8)
    assert 224 * 224 * 1783 <= MAX_PIXELS < 224 * 224 * 1784
    assert decode(thin[:, :1783], (224, 224)).shape == (224, 224, 3)
    with pytest.raises(BadImage, match="bad-size: 1784 x 1 "):
        decode(thin[:, :1784], (224, 224))
    assert decode(thin).shape == (1, 2000, 3)
