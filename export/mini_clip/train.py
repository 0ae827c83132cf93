"""Train the embedded mini CLIP: a genuine CLIPModel, small enough to ship and to train on a laptop.

The idea: CIFAR-10 and digits have labels, not captions, so the captions are composed (captions.py), and because a
caption of a batch is true of many of its images, the contrastive loss has several right answers a row instead of one.

It reads CIFAR-10 (a Parquet folder, or a download through torchvision) and scikit-learn's digits (rows 0-1296 to
train), and writes a checkpoint in Hugging Face format: fp16 safetensors, configuration, tokenizer, image processor.

The shipped checkpoint took 95 minutes on 2 CPU cores, with --compile: 3,848 steps of 256 images. Zero-shot, it is right
on 75.4% of CIFAR-10's test images and on 97.4% of the held-out digits. The learning rate follows the clock, not the
step count, so every run anneals fully in its minutes; a faster machine takes more steps, and no two runs are equal to
the bit.

    python export/mini_clip/train.py --output mini --cifar10 FOLDER --minutes 95 --compile
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from engine.errors import ClipmillError
from export.mini_clip.bpe import CONTEXT_LENGTH, build_tokenizer
from export.mini_clip.captions import (
    CIFAR10_CLASSES,
    DIGIT_CLASSES,
    FIRST_DIGIT,
    STYLES,
    caption,
    choose_concept,
    with_article,
)
from export.mini_clip.images import (
    IMAGE_SIZE,
    NO_STYLE,
    LabelledImages,
    augment,
    normalise,
    read_cifar10,
    read_digits,
    scale,
)

PHOTOS_PER_BATCH = 240
DIGITS_PER_BATCH = 16
PEAK_LEARNING_RATE = 1e-3
WARM_UP = 0.06
MAX_LOG_SCALE = 4.6  # e^4.6 = 99.5: CLIP keeps its logit scale below 100

_SEED = 0
_LOG_EVERY = 25
_EVALUATE_EVERY = 400


@click.command(help="Train the mini CLIP and save it as a Hugging Face checkpoint.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="New folder for the checkpoint.")
@click.option(
    "--cifar10",
    type=click.Path(path_type=Path),
    help="Folder with train.parquet and test.parquet (columns image, label). Default: download through torchvision.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=95.0,
    show_default=True,
    help="Length of the training.",
)
@click.option("--compile", "compile_vision", is_flag=True, help="Compile the vision tower (needs a C++ compiler).")
def main(output: Path, cifar10: Path | None, minutes: float, compile_vision: bool) -> None:
    try:
        _make_empty_folder(output)
        data = read_data(cifar10)
    except ClipmillError as error:
        raise click.ClickException(str(error)) from error
    model, tokenizer = train(data, minutes, compile_vision)
    click.echo(_accuracy_report(model, tokenizer, data))
    save(model, tokenizer, output)
    click.echo(f"saved to {output}")


@dataclass(frozen=True)
class Data:
    """The images of both sources, each with its own test split."""

    photos: LabelledImages
    photos_test: LabelledImages
    digits: LabelledImages
    digits_test: LabelledImages


@dataclass(frozen=True)
class Batch:
    """Images (N, 3, 32, 32), N captions, and truth (N, N) bool: of which image (row) which caption (column) is true."""

    images: Tensor
    captions: list[str]
    truth: Tensor


def read_data(cifar10: Path | None) -> Data:
    """Both datasets. Raises ClipmillError where a file is missing, damaged or too small for one batch."""
    photos = read_cifar10("train", cifar10)
    if len(photos.labels) < PHOTOS_PER_BATCH:
        count = len(photos.labels)
        raise ClipmillError(f"--cifar10 has {count} training images, one batch takes {PHOTOS_PER_BATCH}")
    digits, digits_test = read_digits()
    return Data(photos, read_cifar10("test", cifar10), digits, digits_test)


def train(data: Data, minutes: float, compile_vision: bool = False) -> tuple[CLIPModel, CLIPTokenizerFast]:
    """Train a fresh model for the given time, at least one step; returns it in fp32 with its tokenizer."""
    torch.manual_seed(_SEED)
    rng = random.Random(_SEED)
    tokenizer = build_tokenizer()
    model = CLIPModel(_config(tokenizer)).train()
    if compile_vision:
        model.vision_model.compile()
    optimizer = _optimizer(model)
    batches = _batches(data, rng)
    for step, progress in enumerate(_clock(minutes), start=1):
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(progress)
        tokens = tokenizer(batch.captions, padding=True, return_tensors="pt")
        logits = model(**tokens, pixel_values=batch.images).logits_per_image
        loss = contrastive_loss(logits, batch.truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MAX_LOG_SCALE)
        if step % _LOG_EVERY == 0:
            logit_scale = math.exp(model.logit_scale.item())
            click.echo(f"{progress:6.1%} step {step} loss {loss.item():.3f} scale {logit_scale:.1f}", err=True)
        if step % _EVALUATE_EVERY == 0:
            click.echo(_accuracy_report(model, tokenizer, data), err=True)
    click.echo(f"{step} steps", err=True)
    return model, tokenizer


def contrastive_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Symmetric cross-entropy with several right answers, which share the target probability equally.

    `logits` (N, N) float, images by captions; `truth` (N, N) bool. An image's own caption is true of it, so no row or
    column of `truth` is empty. Where nothing else is true this is CLIP's loss (arXiv:2103.00020, figure 3).
    """
    shares = truth.float()
    image_to_text = F.cross_entropy(logits, shares / shares.sum(1, keepdim=True))
    text_to_image = F.cross_entropy(logits.T, shares.T / shares.T.sum(1, keepdim=True))
    return (image_to_text + text_to_image) / 2


def zero_shot_accuracy(
    model: CLIPModel, tokenizer: CLIPTokenizerFast, test: LabelledImages, classes: Sequence[str], first_label: int
) -> float:
    """Share of images whose nearest prompt "a photo of a(n) {class}" is that of their own class."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        prompts = [f"a photo of {with_article(name)}" for name in classes]
        texts = F.normalize(model.get_text_features(**tokenizer(prompts, padding=True, return_tensors="pt")), dim=-1)
        # The length of an image's embedding does not change which prompt is nearest to it.
        images = [model.get_image_features(pixel_values=normalise(scale(part))) for part in test.pixels.split(500)]
        nearest = (torch.cat(images) @ texts.T).argmax(1)
    model.train(was_training)
    return (nearest + first_label == test.labels).float().mean().item()


def save(model: CLIPModel, tokenizer: CLIPTokenizerFast, folder: Path) -> None:
    """Write the checkpoint; the model is saved, and left, in fp16."""
    model.half().save_pretrained(folder)
    sides = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=sides)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)


def _make_empty_folder(folder: Path) -> None:
    """Made before the training, so that a bad --output costs seconds and not the 95 minutes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = any(folder.iterdir())
    except OSError as error:
        raise ClipmillError(f"--output {folder} cannot be used: {error.strerror}") from error
    if occupied:
        raise ClipmillError(f"--output {folder} is not empty; name a new folder")


def _config(tokenizer: CLIPTokenizerFast) -> CLIPConfig:
    projection = 128
    layers = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": projection}
    text = layers | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 3,
        "max_position_embeddings": CONTEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = layers | {"num_hidden_layers": 6, "image_size": IMAGE_SIZE, "patch_size": 4}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection, logit_scale_init_value=2.6592)


def _optimizer(model: CLIPModel) -> torch.optim.AdamW:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))


def _clock(minutes: float) -> Iterator[float]:
    """The share of the time that has passed, from exactly 0, until it is over."""
    start = time.monotonic()
    progress = 0.0
    while progress < 1:
        yield progress
        progress = (time.monotonic() - start) / (60 * minutes)


def _learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to almost nothing."""
    warm_up = progress / WARM_UP
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - WARM_UP) / (1 - WARM_UP))))
    return PEAK_LEARNING_RATE * min(warm_up, cosine) + 1e-6


def _batches(data: Data, rng: random.Random) -> Iterator[Batch]:
    """Batches without end: each pass over the photos in a new order, the few digits drawn with replacement."""
    while True:
        order = torch.randperm(len(data.photos.labels))
        for start in range(0, len(order) - PHOTOS_PER_BATCH + 1, PHOTOS_PER_BATCH):
            photos = order[start : start + PHOTOS_PER_BATCH]
            digits = torch.randint(0, len(data.digits.labels), (DIGITS_PER_BATCH,))
            pixels = torch.cat([data.photos.pixels[photos], data.digits.pixels[digits]])
            labels = torch.cat([data.photos.labels[photos], data.digits.labels[digits]])
            images, styles = augment(pixels, labels)
            yield Batch(images, *_describe(labels, styles, rng))


def _describe(labels: Tensor, styles: Tensor, rng: random.Random) -> tuple[list[str], Tensor]:
    """One caption an image, and the truth of each (a column) of every image (a row).

    Half of the images that took a style are described by it alone: such a caption says nothing of the class.
    """
    captions: list[str] = []
    columns: list[Tensor] = []
    for label, style in zip(labels.tolist(), styles.tolist(), strict=True):
        if style != NO_STYLE and rng.random() < 0.5:
            captions.append(with_article(STYLES[style]))
            columns.append(styles == style)
        else:
            concept = choose_concept(label, rng)
            captions.append(caption(concept, rng))
            columns.append(torch.isin(labels, torch.tensor([*concept.labels])))
    return captions, torch.stack(columns, dim=1)


def _accuracy_report(model: CLIPModel, tokenizer: CLIPTokenizerFast, data: Data) -> str:
    photos = zero_shot_accuracy(model, tokenizer, data.photos_test, CIFAR10_CLASSES, 0)
    digits = zero_shot_accuracy(model, tokenizer, data.digits_test, DIGIT_CLASSES, FIRST_DIGIT)
    return f"zero-shot accuracy CIFAR-10 test {photos:.1%}, digits test {digits:.1%}"


if __name__ == "__main__":
    main()
