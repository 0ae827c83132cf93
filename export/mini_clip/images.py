"""What the mini CLIP is shown: CIFAR-10 and scikit-learn's digits as 32x32 RGB, and how a batch is augmented."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from engine.errors import ClipmillError
from export.mini_clip.captions import CIFAR10_CLASSES, FIRST_DIGIT, STYLES

IMAGE_SIZE = 32
NO_STYLE = -1

_DOWNLOADS = Path(__file__).parents[2] / "datasets_cache"
_DIGITS_TRAIN_ROWS = 1297
_STYLE_SHARE = 0.02


@dataclass(frozen=True)
class LabelledImages:
    """Pixels (N, 32, 32, 3) uint8, and labels (N,) int64: positions in captions.CLASSES."""

    pixels: Tensor
    labels: Tensor


def read_cifar10(split: str, folder: Path | None) -> LabelledImages:
    """One split ("train" or "test") from <folder>/<split>.parquet; without a folder torchvision downloads it."""
    return _cifar10_from_torchvision(split) if folder is None else _cifar10_from_parquet(folder / f"{split}.parquet")


def read_digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's digits enlarged from 8x8: rows 0-1296 to train on, rows 1297-1796 to test on."""
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    large = F.interpolate(small, size=IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (large * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    labels = FIRST_DIGIT + torch.from_numpy(digits.target)
    train = LabelledImages(pixels[:_DIGITS_TRAIN_ROWS], labels[:_DIGITS_TRAIN_ROWS])
    test = LabelledImages(pixels[_DIGITS_TRAIN_ROWS:], labels[_DIGITS_TRAIN_ROWS:])
    return train, test


def scale(pixels: Tensor) -> Tensor:
    """(N, 32, 32, 3) uint8 -> (N, 3, 32, 32) float32 in 0..1."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def normalise(images: Tensor) -> Tensor:
    """(N, 3, 32, 32) in 0..1 -> the same with CLIP's mean and standard deviation taken out."""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1)
    return (images - mean) / std


def augment(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 3, 32, 32) after augmentation, and the style of each (N,): a position in STYLES, or -1.

    All images are shifted by up to 4 pixels. Flips and colour changes are for photos only: a mirrored digit is another
    sign, and a digit has no colour. Each style is then given to about 2% of the images.
    """
    is_photo = labels < FIRST_DIGIT
    images = _shift(scale(pixels), 4)
    flipped = (torch.rand(len(images)) < 0.5) & is_photo
    images[flipped] = images[flipped].flip(-1)
    gains = 0.8 + 0.4 * torch.rand(len(images), 3, 1, 1)
    images = torch.where(is_photo[:, None, None, None], (images * gains).clamp(0, 1), images)
    styles = (torch.rand(len(images)) / _STYLE_SHARE).long()
    styles[styles >= len(STYLES)] = NO_STYLE
    # A digit is gray already: as a style of its own, "grayscale image" would be false of all the other digits.
    styles[(styles == STYLES.index("grayscale image")) & ~is_photo] = NO_STYLE
    for position, style in enumerate(STYLES):
        chosen = styles == position
        images[chosen] = _EFFECTS[style](images[chosen])
    return normalise(images), styles


def _shift(images: Tensor, reach: int) -> Tensor:
    """Move each image by its own random -reach..reach pixels along both axes, mirrored at the border."""
    count = len(images)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    top = torch.randint(0, 2 * reach + 1, (count,))
    left = torch.randint(0, 2 * reach + 1, (count,))
    window = torch.arange(IMAGE_SIZE)
    image = torch.arange(count)[:, None, None, None]
    channel = torch.arange(3)[None, :, None, None]
    row = (top[:, None] + window)[:, None, :, None]
    column = (left[:, None] + window)[:, None, None, :]
    return padded[image, channel, row, column]


def _blur(images: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(images, (2,) * 4, mode="reflect"), kernel_size=5, stride=1)


def _gray(images: Tensor) -> Tensor:
    return images.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _add_noise(images: Tensor) -> Tensor:
    return (images + 0.2 * torch.randn_like(images)).clamp(0, 1)


def _zoom(images: Tensor) -> Tensor:
    return F.interpolate(images[:, :, 6:26, 6:26], size=IMAGE_SIZE, mode="bilinear")


def _darken(images: Tensor) -> Tensor:
    return images * 0.35


def _brighten(images: Tensor) -> Tensor:
    return (images * 1.7).clamp(0, 1)


_EFFECTS: dict[str, Callable[[Tensor], Tensor]] = {
    "blurry photo": _blur,
    "grayscale image": _gray,
    "noisy image": _add_noise,
    "close-up photo": _zoom,
    "dark photo": _darken,
    "bright photo": _brighten,
}


def _cifar10_from_parquet(path: Path) -> LabelledImages:
    try:
        table = pq.ParquetFile(path).read(columns=["image", "label"])
    except (OSError, pa.ArrowException) as error:
        hint = "give --cifar10 a folder with train.parquet and test.parquet"
        raise ClipmillError(f"{path} cannot be read ({error}): {hint}") from error
    if {"image", "label"} - {*table.column_names} or not pa.types.is_integer(table.schema.field("label").type):
        raise ClipmillError(f"{path} needs the columns image (encoded bytes) and label (integers 0-9)")
    labels = table["label"].to_numpy().astype(np.int64)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
        raise ClipmillError(f"{path}: the labels must be CIFAR-10's, 0-9, with at least one row")
    pixels = [_decode(data, f"{path}, row {row}") for row, data in enumerate(table["image"].to_pylist())]
    return LabelledImages(torch.from_numpy(np.stack(pixels)), torch.from_numpy(labels))


def _decode(data: bytes, where: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except (TypeError, OSError) as error:
        raise ClipmillError(f"{where}: the image cannot be decoded: {error}") from error
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ClipmillError(f"{where}: the image is {image.width}x{image.height}, CIFAR-10's are 32x32")
    return np.asarray(image)


def _cifar10_from_torchvision(split: str) -> LabelledImages:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        hint = "pip install 'clipmill[datasets]', or give --cifar10 a folder with train.parquet and test.parquet"
        raise ClipmillError(f"downloading CIFAR-10 takes torchvision: {hint}") from error
    try:
        dataset = CIFAR10(_DOWNLOADS, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        hint = "give --cifar10 a folder with train.parquet and test.parquet"
        raise ClipmillError(f"CIFAR-10 could not be downloaded ({error}): {hint}") from error
    return LabelledImages(torch.from_numpy(dataset.data), torch.tensor(dataset.targets))
