"""The fidelity certificate: a bundle, run by the engine, against the PyTorch reference on real images and prompts."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.bundle import Bundle
from engine.datasets import open_dataset
from engine.decode import decode
from engine.errors import ClipmillError
from engine.preprocess import image_feeds
from engine.session import Tower
from engine.text import embed_tokens
from engine.tokenizer import load_tokenizer, tokenize
from export.towers import Checkpoint

PHOTOS, DIGITS = 48, 16  # of the embedded sample's and the digits' test splits: 32x32 colour and 8x8 grey
TEMPLATES = ("a photo of a {}", "a blurry photo of a {}", "{}")
BARS = {"fp32": {"min_cosine": 0.9999}}  # by precision


def certify(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Any]:
    """The certificate of a bundle as JSON; ClipmillError when it misses the bar of its precision.

    The reference is transformers' CLIPModel in float32, its images preprocessed by the checkpoint's CLIPImageProcessor.
    Cosines are also given after subtracting the reference's mean embedding: embeddings of random weights, whatever the
    image, are within a cosine of 0.9 of each other, so an uncentred cosine would flatter.
    """
    images, class_names = _images()
    input_ids, eos_position = _tokens(bundle, class_names)
    image = _embed_images(bundle, images)
    text = embed_tokens(bundle, input_ids, eos_position, "cpu")
    reference_image, reference_text = _reference_images(checkpoint, images), _reference_texts(checkpoint, input_ids)
    certificate: dict[str, Any] = {
        "reference": "transformers CLIPModel, PyTorch float32, CLIPImageProcessor (PIL)",
        "provider": "cpu",
        "images": len(images),
        "prompts": len(input_ids),
        "prompts_are": "class prompts" if bundle.has_tokenizer else "random tokens: the checkpoint has no tokenizer",
        "image": _cosines(image, reference_image),
        "text": _cosines(text, reference_text),
        "top1_agreement": None,
        "bar": BARS[bundle.target.precision],
    }
    if bundle.has_tokenizer:  # random tokens name no classes to decide between
        classes = slice(0, len(class_names))
        decided, expected = image @ text[classes].T, reference_image @ reference_text[classes].T
        certificate["top1_agreement"] = float((decided.argmax(1) == expected.argmax(1)).mean())
    for tower in ("image", "text"):
        for measure, bar in BARS[bundle.target.precision].items():
            reached = certificate[tower][measure]
            if not reached >= bar:  # also when it is NaN
                raise ClipmillError(
                    f"the exported {tower} tower differs from the PyTorch reference: {measure.replace('_', ' ')} "
                    f"{reached:.6f}, {bundle.target.precision} needs {bar}; nothing was written"
                )
    return certificate


def _images() -> tuple[list[NDArray[np.uint8]], tuple[str, ...]]:
    photos, digits = open_dataset("cifar10-sample", "test"), open_dataset("digits", "test")
    samples = [*islice(photos.samples(0, PHOTOS), PHOTOS), *islice(digits.samples(0, DIGITS), DIGITS)]
    return [decode(sample.image, None) for sample in samples], photos.class_names


def _tokens(bundle: Bundle, class_names: tuple[str, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and EOS positions of class prompts; of seeded random tokens where there is no tokenizer."""
    prompts = [template.format(name) for template in TEMPLATES for name in class_names]
    context = bundle.architecture.context_length
    if bundle.has_tokenizer:
        return tokenize(load_tokenizer(bundle), prompts, context)
    random = np.random.default_rng(0)
    bos, eos = bundle.architecture.vocabulary_size - 2, bundle.architecture.vocabulary_size - 1
    eos_position = random.integers(2, context, size=len(prompts))
    input_ids = random.integers(0, bos, size=(len(prompts), context))
    input_ids[:, 0] = bos
    input_ids[np.arange(context) >= eos_position[:, None]] = eos
    return input_ids, eos_position


def _embed_images(bundle: Bundle, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    tower = Tower(bundle, "image", "cpu")
    return np.concatenate([tower.run(image_feeds(image[None], bundle.preprocessing)) for image in images])


@torch.inference_mode()
def _reference_images(checkpoint: Checkpoint, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    pixel_values = checkpoint.processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    batches = [checkpoint.model.get_image_features(pixel_values=batch) for batch in pixel_values.split(16)]
    return _unit_rows(torch.cat(batches))


@torch.inference_mode()
def _reference_texts(checkpoint: Checkpoint, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return _unit_rows(checkpoint.model.get_text_features(input_ids=torch.from_numpy(input_ids)))


def _unit_rows(x: torch.Tensor) -> NDArray[np.float32]:
    return torch.nn.functional.normalize(x, dim=-1).numpy()


def _cosines(embeddings: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    if embeddings.shape != reference.shape:
        raise ClipmillError(
            f"the exported tower returns embeddings of shape {embeddings.shape}, the reference {reference.shape}: "
            "is the projection missing? nothing was written"
        )
    cosine = _cosine(embeddings, reference)
    centred = _cosine(embeddings - reference.mean(axis=0), reference - reference.mean(axis=0))
    return {
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "min_centred_cosine": float(centred.min()),
        "mean_centred_cosine": float(centred.mean()),
    }


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    cosine: NDArray[np.float64] = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    return cosine
