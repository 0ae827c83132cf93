"""CLIP's preprocessing in the graph against the PIL-based CLIPImageProcessor: each level, then the embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import utils as onnx_utils
from PIL import Image

from engine.bundle import Bundle
from engine.datasets import open_dataset
from engine.decode import decode
from engine.preprocess import image_feeds, resize_matrices
from engine.session import Tower

Pixels = NDArray[np.uint8]
# Measured on 16 images of each size: at most 1.9e-4 of the levels differ (none at 224 x 224), by at most 2; all of it
# is the rounding of float32 products, for in float64 the same matrices give PIL's levels exactly (below).
SHARE_THAT_MAY_DIFFER, LEVELS_APART = 4e-4, 2
SIZES = [(28, 28), (32, 32), (64, 64), (500, 333), (333, 500), (100, 260), (260, 100), (448, 448), (1, 7), (7, 1)]


@pytest.fixture(scope="module")
def photographs() -> list[Pixels]:
    return [decode(sample.image) for sample in open_dataset("cifar10-sample").samples(0, 160)]


@pytest.fixture(scope="module")
def levels_of(random_vit_b_32: Bundle) -> Callable[[Pixels], NDArray[np.float32]]:
    """The graph of the image tower, cut after its last Clip: what the patch embedding takes, (3, 224, 224)."""
    model = onnx.load(random_vit_b_32.onnx_path("image"))
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == 2, "one rounding for each axis"
    levels = onnx.helper.make_tensor_value_info(clips[-1].output[0], onnx.TensorProto.FLOAT, None)
    model.graph.value_info.append(levels)
    cut = onnx_utils.Extractor(model).extract_model(["pixels", "rows", "columns"], [levels.name])
    session = ort.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, image_feeds(image[None], random_vit_b_32.preprocessing))[0][0]


@pytest.mark.parametrize("size", SIZES)
def test_levels_are_those_of_the_reference_processor(
    size: tuple[int, int], photographs: list[Pixels], levels_of: Callable[[Pixels], NDArray[np.float32]]
) -> None:
    apart = np.stack([levels_of(image) - reference_levels(image) for image in resized_and_tiled(photographs, *size)])
    share, most = np.mean(apart != 0), np.abs(apart).max()
    print(f"{size[0]} x {size[1]}: {share:.1e} of the levels differ, by at most {most:.0f}")
    assert share <= SHARE_THAT_MAY_DIFFER
    assert most <= LEVELS_APART


@pytest.mark.parametrize(("size", "border"), [(224, 0), (112, 5), (448, 2)])
def test_levels_are_exact_where_weights_are_dyadic(
    size: int, border: int, photographs: list[Pixels], levels_of: Callable[[Pixels], NDArray[np.float32]]
) -> None:
    """Halves are common there: rounded to the even neighbour, 1% (112) and 3% (448) of the levels would differ.

    At the border the kernel is cut and its weights normalised again: no longer dyadic.
    """
    inside = np.s_[:, border : 224 - border, border : 224 - border]
    for image in resized_and_tiled(photographs, size, size):
        np.testing.assert_array_equal(levels_of(image)[inside], reference_levels(image)[inside])


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(1, 600), st.integers(1, 600), st.booleans())
def test_matrices_in_float64_are_pillows_resampling(
    data: st.DataObject, height: int, width: int, extreme: bool
) -> None:
    short, long = sorted((height, width))
    resize = data.draw(st.integers(1, min(300, 3000 * short // long)), label="resize")  # no image longer than 3000
    crop = data.draw(st.integers(1, resize), label="crop")
    assume(horizontal_first(height, width, resize))
    image = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if extreme:  # bicubic overshoots and clips
        image = np.where(image < 128, 0, 255).astype(np.uint8)

    rows, columns = (matrix.astype(np.float64) for matrix in resize_matrices(height, width, resize, crop))
    levels = rounded(rows @ rounded(image.transpose(2, 0, 1) @ columns.T))

    np.testing.assert_array_equal(levels, reference_levels(image, resize, crop))
    for matrix in (rows, columns):
        # every weight is rounded to a multiple of 2**-22, so is off by half of that at most
        assert (np.abs(matrix.sum(axis=1) - 1) <= np.count_nonzero(matrix, axis=1) * 2.0**-23).all()


@given(st.integers(1, 600), st.data())
def test_matrices_of_an_image_of_the_right_size_only_crop(size: int, data: st.DataObject) -> None:
    crop = data.draw(st.integers(1, size), label="crop")
    first = (size - crop) // 2
    for matrix in resize_matrices(size, size, size, crop):
        np.testing.assert_array_equal(matrix, np.eye(size)[first : first + crop])


@pytest.mark.parametrize("bundle", ["mini", "random_vit_b_32"])
def test_normalisation_folded_into_the_patch_embedding_is_that_of_the_processor(
    bundle: str, photographs: list[Pixels], request: pytest.FixtureRequest
) -> None:
    """At the model's own size levels are exact, so whatever differs is the arithmetic after them."""
    import torch

    from export.checkpoint import load_checkpoint

    exported: Bundle = request.getfixturevalue(bundle)
    checkpoint = load_checkpoint(exported.source.model)
    images = [*resized_and_tiled(photographs, *[exported.architecture.image_size] * 2)][:8]
    with torch.inference_mode():
        pixel_values = checkpoint.processor([*map(Image.fromarray, images)], return_tensors="pt").pixel_values
        expected = torch.nn.functional.normalize(checkpoint.model.get_image_features(pixel_values)).numpy()
    embeddings = Tower(exported, "image", "cpu").run(image_feeds(np.stack(images), exported.preprocessing))
    cosine = (embeddings * expected).sum(axis=1, dtype=np.float64)
    print(f"min cosine 1 - {1 - cosine.min():.1e}, largest difference {np.abs(embeddings - expected).max():.1e}")
    assert cosine.min() > 0.999999
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)


def resized_and_tiled(photographs: list[Pixels], width: int, height: int) -> list[Pixels]:
    """8 photographs made large by PIL (smooth) and 8 mosaics of many (edges everywhere), (height, width, 3)."""
    smooth = [np.asarray(Image.fromarray(image).resize((width, height))) for image in photographs[:8]]
    across, down = -(-width // 32), -(-height // 32)
    mosaics = []
    for first in range(0, 160, 20):
        tiles = np.stack([photographs[(first + tile) % 160] for tile in range(across * down)])
        mosaic = tiles.reshape(down, across, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(32 * down, 32 * across, 3)
        mosaics.append(np.ascontiguousarray(mosaic[:height, :width]))
    return [*smooth, *mosaics]


def reference_levels(image: Pixels, resize: int = 224, crop: int = 224) -> NDArray[np.float32]:
    """(3, crop, crop) levels 0..255 by CLIPImageProcessor."""
    from transformers import CLIPImageProcessor

    processor: Any = CLIPImageProcessor(
        size={"shortest_edge": resize},
        crop_size={"height": crop, "width": crop},
        do_rescale=False,
        do_normalize=False,
    )
    # Told the layout, which it would otherwise guess wrongly for heights 1 and 3.
    levels = processor(Image.fromarray(image), input_data_format="channels_last", return_tensors="np").pixel_values[0]
    return levels.astype(np.float32)


def horizontal_first(height: int, width: int, resize: int) -> bool:
    """Whether Pillow resizes horizontally first, as the graph does.

    Pillow 13 does not when an image loses more than twice as many rows as columns: when it shrinks and is more than
    twice as high as wide (its pull request 9549).
    """
    short, long = sorted((height, width))
    resized = (resize, int(resize * long / short)) if height <= width else (int(resize * long / short), resize)
    return height - resized[0] <= 2 * max(width - resized[1], 0)


def rounded(levels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.floor(levels + 0.5).clip(0, 255)
