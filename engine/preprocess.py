"""The matrices that carry bicubic resize and centre crop into the graph.

Pillow's resampling (src/libImaging/Resample.c) is separable: each output line is a weighted sum of input lines, with
the Keys cubic kernel (a = -0.5) widened by the scale when shrinking, and weights in 22-bit fixed point. A row of a
matrix here holds exactly these weights, so only the order of summation can differ.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.bundle import Preprocessing

SUPPORT = 2.0  # the cubic kernel reaches two pixels to each side
FIXED_POINT = 1 << 22  # Pillow's weights are multiples of 1 / 2**22, which float32 holds exactly


def image_feeds(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> dict[str, NDArray[Any]]:
    """What the image tower takes, for a batch (B, H, W, 3) uint8 of images of one size."""
    _, height, width, _ = pixels.shape
    rows, columns = resize_matrices(height, width, preprocessing.resize, preprocessing.crop)
    return {"pixels": pixels, "rows": rows, "columns": columns}


def resize_matrices(height: int, width: int, resize: int, crop: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(rows (crop, height), columns (crop, width)) float32 for images of height x width.

    The short edge becomes `resize`, the long edge int(resize * long / short), and the centre crop x crop is kept, as
    transformers' CLIPImageProcessor does it. resized = round(rows @ round(image @ columns.T)) for each channel.

    That is horizontally first. Pillow 13 goes vertically first where an image shrinks and is more than twice as high as
    wide (its pull request 9549): there 0.8% of a smooth photograph's levels differ, by up to 2, and more of a busy
    one's. decode() with `resize` is exact for those too.
    """
    short, long = sorted((height, width))
    long_resized = int(resize * long / short)
    resized = (resize, long_resized) if height <= width else (long_resized, resize)
    return _axis_matrix(height, resized[0], crop), _axis_matrix(width, resized[1], crop)


@lru_cache(maxsize=64)
def _axis_matrix(size: int, resized: int, crop: int) -> NDArray[np.float32]:
    """(crop, size): the weights of the centre `crop` of `resized` output pixels over `size` input pixels."""
    scale = size / resized
    stretch = max(scale, 1.0)  # shrinking widens the kernel: this is the antialiasing
    centres = ((resized - crop) // 2 + np.arange(crop) + 0.5) * scale
    first = np.maximum((centres - SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + SUPPORT * stretch + 0.5).astype(np.int64), size)
    pixels = np.arange(size)
    weights = _cubic((pixels + 0.5 - centres[:, None]) / stretch)
    weights[(pixels < first[:, None]) | (pixels >= last[:, None])] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * FIXED_POINT + np.copysign(0.5, weights))
    matrix = (fixed / FIXED_POINT).astype(np.float32)
    matrix.flags.writeable = False  # shared by every caller
    return matrix


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel with a = -0.5 (IEEE Trans. ASSP 29, 1981, eq. 4)."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x**2 + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
