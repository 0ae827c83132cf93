"""CLIP's image preprocessing as operators of the graph: bicubic resize and centre crop of uint8 pixels.

PIL resizes along one axis at a time, the horizontal one first, and rounds to uint8 after each. Two matrix products with
a rounding and a clip after each do the same; engine/preprocess.py computes the matrices. Rescaling and normalisation
are folded into the patch embedding (export/towers.py).
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPImageProcessor

from engine.bundle import Preprocessing
from engine.errors import ClipmillError

BICUBIC = 3  # PIL.Image.Resampling.BICUBIC


class ResizeAndCrop(nn.Module):
    """forward: pixels (B, H, W, 3) uint8, rows (S, H), columns (S, W) float32 -> (B, 3, S, S) float32 levels, 0..255.

    Stays in float32 in every precision: in float16 6% of the levels would differ.
    """

    def forward(self, pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        levels = pixels.float().permute(0, 3, 1, 2)  # in this order: TensorRT can do nothing with uint8 but cast it
        levels = _round_to_level(levels @ columns.T)
        return _round_to_level(rows @ levels)


def _round_to_level(x: Tensor) -> Tensor:
    # PIL rounds halves up; ONNX's Round goes to the even neighbour, which differs wherever weights are dyadic (2x, 4x)
    return (x + 0.5).floor().clamp(0, 255)


def read_preprocessing(processor: CLIPImageProcessor, image_size: int) -> Preprocessing:
    """The constants of a Hugging Face processor; ClipmillError for a pipeline that the graph does not reproduce."""
    resize = processor.size.get("shortest_edge")
    crop = (processor.crop_size.get("height"), processor.crop_size.get("width"))
    wanted = {
        "do_resize, do_center_crop, do_rescale and do_normalize on": all(
            (processor.do_resize, processor.do_center_crop, processor.do_rescale, processor.do_normalize)
        ),
        "bicubic resampling": processor.resample == BICUBIC,
        "a rescale factor of 1/255": abs((processor.rescale_factor or 0) * 255 - 1) < 1e-6,
        "a shortest_edge no smaller than the crop": resize is not None and resize >= image_size,
        f"a centre crop of {image_size} x {image_size}, the model's image size": crop == (image_size, image_size),
        "three means and three standard deviations": all(
            isinstance(values, list | tuple) and len(values) == 3
            for values in (processor.image_mean, processor.image_std)
        ),
    }
    for what, holds in wanted.items():
        if not holds:
            raise ClipmillError(f"the checkpoint's image processor is not CLIP's: expected {what}; see --model")
    return Preprocessing(resize, image_size, "bicubic", tuple(processor.image_mean), tuple(processor.image_std))
