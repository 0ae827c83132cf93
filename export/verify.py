"""The fidelity certificate: a bundle, run by the engine, against the PyTorch reference on real images and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engine.bundle import TOWERS, Bundle
from engine.errors import ClipmillError
from engine.preprocess import image_feeds
from engine.session import Tower
from engine.stages import overlapped
from engine.text import BATCH_SIZE, embed_tokens
from engine.tokenizer import load_tokenizer, tokenize
from export.checkpoint import Checkpoint
from export.samples import sample_images

PHOTOS, DIGITS = 192, 64
TEMPLATES = ("a photo of a {}", "a blurry photo of a {}", "{}")
BARS = {  # by precision
    "fp32": {"min_cosine": 0.9999},
    "fp16": {"min_cosine": 0.999},
    "int8": {"mean_cosine": 0.99, "top1_agreement": 0.98},
}
FP16_ON_CPU = (
    "made on the CPU, where ONNX Runtime computes in float32 and skips most roundings to fp16 in between: it covers "
    "the weights' rounding, not that of the GPU's activations, nor how the GPU accumulates, nor overflow there"
)
CUDA_ON_CPU = "made on the CPU: it covers the graph, not the GPU's kernels"
TENSORRT_ON_CPU = "made on the CPU: it covers the fp32 graph, not what TensorRT makes of it, least of all in fp16"


def certify(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Any]:
    """The certificate of a bundle as JSON; ClipmillError when it misses the bar of its precision.

    It is made on the bundle's provider, or on the CPU where that cannot run: its "caveat" says what that leaves out.

    The reference is transformers' CLIPModel in float32, its images preprocessed by the checkpoint's CLIPImageProcessor.
    Cosines are also given after subtracting the reference's mean embedding: embeddings of random weights, whatever the
    image, are within a cosine of 0.9 of each other, so an uncentred cosine would flatter.
    """
    images, class_names = sample_images("test", photos=PHOTOS, digits=DIGITS)
    input_ids, eos_position = _tokens(bundle, class_names)
    provider, caveat = _provider(bundle)
    image = _embed_images(bundle, images, provider)
    text = embed_tokens(bundle, input_ids, eos_position, provider)
    reference_image, reference_text = _reference_images(checkpoint, images), _reference_texts(checkpoint, input_ids)
    certificate: dict[str, Any] = {
        "reference": "transformers CLIPModel, PyTorch float32, CLIPImageProcessor (PIL)",
        "provider": provider,
        "caveat": caveat,
        "images": len(images),
        "prompts": len(input_ids),
        "prompts_are": "class prompts" if bundle.has_tokenizer else "random tokens: the checkpoint has no tokenizer",
        "image": cosines(image, reference_image),
        "text": cosines(text, reference_text),
        "top1_agreement": None,
        "bar": BARS[bundle.target.precision],
    }
    if bundle.has_tokenizer:  # random tokens name no classes to decide between
        classes = slice(0, len(class_names))
        decided, expected = image @ text[classes].T, reference_image @ reference_text[classes].T
        certificate["top1_agreement"] = float((decided.argmax(1) == expected.argmax(1)).mean())
    _judge(certificate, bundle.target.precision)
    return certificate


def _provider(bundle: Bundle) -> tuple[str, str | None]:
    """Where the certificate is made, and what it cannot show there."""
    target = bundle.target
    if target.provider == "cpu":
        return "cpu", None
    prompts = {"batch": BATCH_SIZE["gpu"], "length": bundle.architecture.context_length}  # TensorRT builds this once
    try:
        Tower(bundle, "text", target.provider, shape=prompts)
        return target.provider, None
    except ClipmillError as error:
        cause = str(error).partition("; ")[0]
        if target.provider == "tensorrt":
            return "cpu", f"{TENSORRT_ON_CPU} ({cause})"
        return "cpu", f"{FP16_ON_CPU if target.precision == 'fp16' else CUDA_ON_CPU} ({cause})"


def _judge(certificate: dict[str, Any], precision: str) -> None:
    """Raise ClipmillError where the certificate misses the bar."""
    for measure, bar in certificate["bar"].items():
        if measure == "top1_agreement":
            reached = {"zero-shot decision": certificate[measure]}
        else:
            reached = {f"{tower} tower": certificate[tower][measure] for tower in TOWERS}
        for what, value in reached.items():
            if value is not None and not value >= bar:  # also when it is NaN
                raise ClipmillError(
                    f"the exported {what} differs from the PyTorch reference: {measure.replace('_', ' ')} "
                    f"{value:.6f}, {precision} needs {bar}; nothing was written"
                )


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


def _embed_images(bundle: Bundle, images: Sequence[NDArray[np.uint8]], provider: str) -> NDArray[np.float32]:
    """One image a batch: their sizes differ."""
    embeddings: list[NDArray[np.float32]] = []
    for (height, width, _), group in groupby(images, key=np.shape):
        tower = Tower(bundle, "image", provider, shape={"batch": 1, "height": height, "width": width})
        feeds = (image_feeds(image[None], bundle.preprocessing) for image in group)
        embeddings.extend(overlapped(tower.run, feeds, tower.lanes, tower.lanes))
    return np.concatenate(embeddings)


@torch.inference_mode()
def _reference_images(checkpoint: Checkpoint, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    pixel_values = checkpoint.processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    batches = [checkpoint.model.get_image_features(pixel_values=batch) for batch in pixel_values.split(16)]
    return _unit_rows(torch.cat(batches))


@torch.inference_mode()
def _reference_texts(checkpoint: Checkpoint, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    return _unit_rows(checkpoint.model.get_text_features(input_ids=torch.from_numpy(input_ids)))


def _unit_rows(x: torch.Tensor) -> NDArray[np.float32]:
    return torch.nn.functional.normalize(x, dim=-1).numpy()


def cosines(embeddings: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, float]:
    """Smallest and mean cosine of rows to the reference's, as they are and after subtracting its mean row."""
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
